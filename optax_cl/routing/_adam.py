"""Adam and its kin with separate gradients for the two moments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cl._core import checks, tasks, trees
from optax_cl.routing import _capture

FIRST_MOMENTS = ("routed", "raw")
SECOND_MOMENTS = ("max", "raw", "routed")


class ScaleByDecoupledAdamState(NamedTuple):
    """State of ``scale_by_decoupled_adam``."""

    count: chex.Array  # int32 [], number of updates done
    mu: optax.Updates  # first moment; like params, dtype mu_dtype
    nu: optax.Updates  # second moment; like params


class ScaleByDecoupledAmsgradState(NamedTuple):
    """State of ``scale_by_decoupled_amsgrad``."""

    count: chex.Array  # int32 [], number of updates done
    mu: optax.Updates  # first moment; like params, dtype mu_dtype
    nu: optax.Updates  # second moment; like params
    nu_max: optax.Updates  # elementwise maximum of the corrected nu; like params


def scale_by_decoupled_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    first_moment: str = "routed",
    second_moment: str = "max",
) -> optax.GradientTransformationExtraArgs:
    r"""Adam whose moments may read two gradients: the raw and the routed one.

    With raw gradient :math:`g` and routed gradient :math:`\tilde g` (what the modifiers
    made of it),

    .. math::
      \mu_t &= \beta_1 \mu_{t-1} + (1-\beta_1)\, a_t, \qquad
      \nu_t = \beta_2 \nu_{t-1} + (1-\beta_2)\, b_t, \\
      u_t &= \frac{\mu_t / (1-\beta_1^t)}{\sqrt{\nu_t/(1-\beta_2^t) + \bar\epsilon}
      + \epsilon}

    where :math:`a_t` is :math:`\tilde g_t` (``first_moment="routed"``) or :math:`g_t`
    (``"raw"``), and :math:`b_t` is :math:`\max(g_t^2, \tilde g_t^2)` elementwise
    (``second_moment="max"``), :math:`g_t^2` (``"raw"``) or :math:`\tilde g_t^2`
    (``"routed"``). The four routings are settings of this one function:

    ================  ================  =================  ============================
    routing           ``first_moment``  ``second_moment``  a modifier that scales a
                                                           coordinate by c moves it by
    ================  ================  =================  ============================
    decoupled (safe)  ``"routed"``      ``"max"``          c (1 if c > 1)
    decoupled         ``"routed"``      ``"raw"``          c
    shared (Adam)     ``"routed"``      ``"routed"``       1: the modifier is cancelled
    denominator only  ``"raw"``         ``"routed"``       1/c
    ================  ================  =================  ============================

    (times the step of unmodified Adam). Post-update routing is not a setting: put the
    modifier after this link.

    **Why "max" is the default.** With a basis that is not axis-aligned, a coordinate
    whose raw gradient is near zero still receives a routed one, and under ``"raw"`` its
    step has no bound: one dead coordinate of 16 and strength one half gave steps of
    millions of learning rates. ``"max"`` equals ``"raw"`` wherever modifiers only
    attenuate coordinates, and keeps Adam's bound on every step. Its price: a modifier
    that *adds* much more than the raw gradient (a large penalty) is renormalised, as
    under shared routing.

    **Placement.** After the modifiers, inside a capture (``optax_cl.chain``,
    ``capture_raw``, ``protect``), before weight decay, ``post`` links and the learning
    rate. No routing makes a projection exact: dividing elementwise by
    :math:`\sqrt{\nu}` turns vectors out of any subspace that is not axis-aligned. For a
    strict constraint add ``project()`` after this link.

    **Cost.** State of ``optax.scale_by_adam``; one extra read of the raw gradient.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the denominator outside the root.
      eps_root: Added inside the root.
      mu_dtype: Dtype of the first moment; that of the parameters if None.
      nesterov: Nesterov momentum (NAdam); the look-ahead term reads the same gradient
        as the first moment.
      first_moment: ``"routed"`` or ``"raw"``.
      second_moment: ``"max"``, ``"raw"`` or ``"routed"``.

    Returns:
      A ``GradientTransformationExtraArgs``. Its update reads the keyword-only extra
      argument ``raw_updates`` (a tree like the updates) unless both moments are
      ``"routed"``, in which case it is Adam. With ``raw_updates`` equal to the updates
      it is bit-identical to ``optax.scale_by_adam`` under the same jit (but where a
      denominator underflows to zero, in float16 say: not NaN or inf, but the mean).

    Raises:
      TypeError: For a ``mu_dtype`` that is no floating-point dtype.
      ValueError: For an unknown moment name, a hyper-parameter out of range, or a
        ``b2`` in bfloat16, where .999 is 1; at trace time if ``raw_updates`` is needed
        and missing, or of another structure.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl
      >>> f = lambda x: jnp.sum(x**2)
      >>> protect_first = optax.stateless(lambda g, _: g * jnp.array([0.1, 1.0]))
      >>> tx = optax_cl.chain(protect_first, optax_cl.scale_by_decoupled_adam(),
      ...                     optax.scale_by_learning_rate(0.1))
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     updates, state = tx.update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(2))  # the first coordinate moved a tenth as far
      [0.95 0.51]

    References:
      Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015

      `Hidden Failure Modes of Gradient Modification under Adam in Continual Learning
      <https://arxiv.org/abs/2604.22407v1>`_, 2026: a preprint since reported withdrawn;
      cited for the algebra of its first proposition only.

    **Differs from the paper.** (1) The default second moment is the elementwise
    maximum, for the reason above; ``"raw"`` is the published form. (2) The strength of
    a modifier is the modifier's affair (``attenuate``), not the optimizer's.
    """
    _check(b1, b2, eps, eps_root, mu_dtype, first_moment, second_moment)

    def init_fn(params):
        return ScaleByDecoupledAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=optax.tree.zeros_like(params),
        )

    def update_fn(updates, state, params=None, *, raw_updates=None, **extra_args):
        del params, extra_args
        trees.check_fits("updates", updates, state.mu)
        numerator, square = _select(
            "scale_by_decoupled_adam", updates, raw_updates, first_moment, second_moment
        )
        mu, nu, count = _advance(state, numerator, square, b1, b2)
        mu_hat = _corrected_mean(mu, numerator, b1, count, nesterov)
        nu_hat = optax.tree.bias_correction(nu, b2, count)
        new_state = ScaleByDecoupledAdamState(
            count=count,
            mu=optax.tree.cast(mu, mu_dtype),
            nu=optax.tree.cast_like(nu, state.nu),
        )
        return _divide(mu_hat, nu_hat, eps, eps_root), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_decoupled_amsgrad(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    first_moment: str = "routed",
    second_moment: str = "max",
) -> optax.GradientTransformationExtraArgs:
    r"""AMSGrad whose moments may read two gradients.

    As ``scale_by_decoupled_adam`` with the denominator replaced by the running maximum

    .. math:: \hat\nu^{\max}_t = \max(\hat\nu^{\max}_{t-1}, \nu_t/(1-\beta_2^t)).

    The maximum never forgets: one large penalty or reference gradient in an early task
    lowers the steps of every later one. ``begin_task`` leaves it alone unless told
    otherwise (``begin_task(..., reset_nu_max=True)``).

    **Placement, memory.** As ``scale_by_decoupled_adam``; one more tree like params.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the denominator outside the root.
      eps_root: Added inside the root.
      mu_dtype: Dtype of the first moment; that of the parameters if None.
      first_moment: ``"routed"`` or ``"raw"``.
      second_moment: ``"max"``, ``"raw"`` or ``"routed"``.

    Returns:
      A ``GradientTransformationExtraArgs``; bit-identical to ``optax.scale_by_amsgrad``
      when ``raw_updates`` equals the updates.

    Raises:
      ValueError: As ``scale_by_decoupled_adam``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_cl
      >>> tx = optax_cl.chain(optax.scale(0.5), optax_cl.scale_by_decoupled_amsgrad())
      >>> grads = jnp.array([1.0, -2.0])
      >>> print(tx.update(grads, tx.init(grads))[0].round(3))
      [ 0.5 -0.5]

    References:
      Reddi et al, `On the Convergence of Adam and Beyond
      <https://openreview.net/forum?id=ryQu7f-RZ>`_, 2018
    """
    _check(b1, b2, eps, eps_root, mu_dtype, first_moment, second_moment)

    def init_fn(params):
        return ScaleByDecoupledAmsgradState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=optax.tree.zeros_like(params),
            nu_max=optax.tree.zeros_like(params),
        )

    def update_fn(updates, state, params=None, *, raw_updates=None, **extra_args):
        del params, extra_args
        trees.check_fits("updates", updates, state.mu)
        numerator, square = _select(
            "scale_by_decoupled_amsgrad",
            updates,
            raw_updates,
            first_moment,
            second_moment,
        )
        mu, nu, count = _advance(state, numerator, square, b1, b2)
        mu_hat = optax.tree.bias_correction(mu, b1, count)
        nu_hat = optax.tree.bias_correction(nu, b2, count)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu_hat)
        new_state = ScaleByDecoupledAmsgradState(
            count=count,
            mu=optax.tree.cast(mu, mu_dtype),
            nu=optax.tree.cast_like(nu, state.nu),
            nu_max=optax.tree.cast_like(nu_max, state.nu_max),
        )
        return _divide(mu_hat, nu_max, eps, eps_root), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def second_moment_input(
    second_moment: str,
    updates: chex.ArrayTree,
    raw_updates: chex.ArrayTree | None,
    square: Callable[[chex.Array], chex.Array],
) -> chex.ArrayTree:
    """Elementwise squares that feed the second moment."""
    if second_moment == "routed":
        return _map(square, updates)
    if second_moment == "raw":
        return _map(square, raw_updates)
    return _map(lambda g, r: jnp.maximum(square(g), square(r)), updates, raw_updates)


def needs_raw(first_moment: str, second_moment: str) -> bool:
    """Whether this routing reads the raw gradient at all."""
    return first_moment == "raw" or second_moment != "routed"


def _select(method, updates, raw_updates, first_moment, second_moment):
    if needs_raw(first_moment, second_moment):
        raw_updates = _capture.require_raw(method, raw_updates, updates)
    numerator = raw_updates if first_moment == "raw" else updates
    square = second_moment_input(second_moment, updates, raw_updates, _abs_sq)
    return numerator, square


def _advance(state, numerator, square, b1, b2):
    """Both moments and the count after one more step."""
    mu = optax.tree.update_moment(numerator, state.mu, b1, 1)
    nu = _map(lambda s, v: (1 - b2) * s + b2 * v, square, state.nu)
    return mu, nu, optax.safe_increment(state.count)


def _corrected_mean(mu, numerator, b1, count, nesterov):
    if not nesterov:
        return optax.tree.bias_correction(mu, b1, count)
    # Nesterov looks one step ahead: the mean as it will be corrected then, mixed with
    # the gradient of now, which must be the one that feeds the mean.
    return _map(
        lambda m, g: b1 * m + (1 - b1) * g,
        optax.tree.bias_correction(mu, b1, optax.safe_increment(count)),
        optax.tree.bias_correction(numerator, b1, count),
    )


def _divide(mu_hat, nu_hat, eps, eps_root):
    def one(m, v):
        root = jnp.sqrt(v + eps_root) + eps
        # Zero where `eps` and small squares underflow, as in float16; a NaN stays one.
        if isinstance(eps, jax.core.Tracer) or not np.asarray(eps, root.dtype) > 0:
            root = jnp.where(root == 0, 1, root)
        return m / root

    return _map(one, mu_hat, nu_hat)


def _abs_sq(g):
    return g**2 if jnp.isrealobj(g) else g.real**2 + g.imag**2


def _map(f, *leaves):
    # None leaves (Equinox trees) stay None.
    return jax.tree.map(
        lambda x, *rest: None if x is None else f(x, *rest),
        *leaves,
        is_leaf=lambda x: x is None,
    )


def _check(b1, b2, eps, eps_root, mu_dtype, first_moment, second_moment):
    checks.check_number("b1", b1, low=0.0, high=1.0, open_high=True)
    checks.check_number("b2", b2, low=0.0, high=1.0, open_high=True)
    if isinstance(b2, jax.Array) and b2.dtype == jnp.bfloat16:
        raise ValueError(
            "`b2` is an array of bfloat16, in which .999 is 1: the second moment would "
            "stay zero, and steps be NaN. `optax.inject_hyperparams` takes the dtype "
            "of the parameters; pass it `hyperparam_dtype=jnp.float32`."
        )
    checks.check_number("eps", eps, low=0.0)
    checks.check_number("eps_root", eps_root, low=0.0)
    checks.check_float_dtype("mu_dtype", mu_dtype)
    checks.check_choice("first_moment", first_moment, FIRST_MOMENTS)
    checks.check_choice("second_moment", second_moment, SECOND_MOMENTS)


for _state in (ScaleByDecoupledAdamState, ScaleByDecoupledAmsgradState):
    tasks.register_moments(
        _state, ("mu",), tuple(f for f in _state._fields if f.startswith("nu"))
    )
