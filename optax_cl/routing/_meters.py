"""Meters: links that change nothing and note a number in the optimizer state."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks, linalg, subspaces, tasks, trees
from optax_cl._core.matrices import to_matrix
from optax_cl.routing import _capture, _subspace


class ShadowMomentState(NamedTuple):
    """A second moment that reads the raw gradient, whatever the optimizer's reads."""

    raw_nu: optax.Updates  # like params


# It is corrected by the optimizer's count, so it must be reset together with it.
tasks.register_moments(ShadowMomentState, (), ("raw_nu",))

QUANTITIES = ("overlap", "strength", "leak", "cosine")


def measure(
    quantity: str, name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Notes a number about the updates that pass, and lets them through untouched.

    ============== =====================================================================
    ``"overlap"``  :math:`\|U^T g\|^2 / \|g\|^2` of the raw gradient, mean over the
                   protected leaves; its place does not matter
    ``"strength"`` :math:`1 - \langle U^T u, U^T g\rangle / \|U^T g\|^2` over all
                   protected leaves: which share of the raw gradient's component was
                   taken away so far; stands directly behind ``attenuate``
    ``"leak"``     :math:`\sum \|U^T u\|^2 / \sum \|u\|^2` over the protected leaves:
                   the share of what passes that lies inside the protected subspace;
                   stands last, to see the step that is applied
    ``"cosine"``   of the updates that pass to the extra argument ``reference_updates``,
                   over the whole tree
    ============== =====================================================================

    Each is 0 where its denominator is 0; overlap and strength also where ``U^T g`` is
    not finite. A gradient may have any size that float32 has: it is divided by its
    largest entry before it is squared. ``optax.tree.get(opt_state, name)`` reads the
    number after a step.

    **Placement.** Inside ``protect`` (``"cosine"``: anywhere), as the table says.

    **Cost.** One float32 of state; products with the basis that the links beside it
    compute anyway are shared by the compiler. Without meters, nothing.

    Args:
      quantity: One of the table.
      name: Name in the state; ``quantity`` if None. Two meters in one chain need two
        names, since ``optax.tree.get`` refuses an ambiguous one.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``{name: float32 []}``.

    Raises:
      ValueError: For an unknown quantity; at trace time for a missing
        ``reference_updates`` or ``raw_updates``.
      TypeError: At trace time without a ``basis`` where one is needed.

    Example:
      >>> import jax.numpy as jnp, optax, optax_cl
      >>> tx = optax_cl.protect(
      ...     1, optax_cl.attenuate(0.5), optax_cl.measure("strength"),
      ...     optax_cl.scale_by_decoupled_adam())
      >>> w = jnp.ones((3, 2))
      >>> updates, state = tx.update(w, tx.init(w), w)
      >>> print(optax.tree.get(state, "strength"))  # no basis yet
      0.0
    """
    checks.check_choice("quantity", quantity, QUANTITIES)
    name = quantity if name is None else name
    read = {
        "overlap": _overlap,
        "strength": _strength,
        "leak": _leak,
        "cosine": _cosine,
    }[quantity]

    def init_fn(params):
        del params
        return {name: jnp.zeros([], jnp.float32)}

    def update_fn(updates, state, params=None, **extra_args):
        del state, params
        value = read(updates, extra_args)
        return updates, {name: jnp.asarray(value, jnp.float32)}

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def measure_gain(
    inner: optax.GradientTransformation,
    *,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    name: str = "gain_inflation",
) -> optax.GradientTransformationExtraArgs:
    r"""Measures how much a routing inflates the gain in the protected subspace.

    With :math:`D = \mathrm{diag}(\sqrt{\hat\nu + \bar\epsilon} + \epsilon)` of the
    second moment that ``inner`` uses, and :math:`D_{raw}` of one that reads the raw
    gradient and is otherwise advanced by ``inner`` itself, with its own decay,

    .. math:: R = \mathrm{mean}_k
       \frac{u_k^T D^{-1} u_k}{u_k^T D_{raw}^{-1} u_k}

    over all protected directions. 1 for ``second_moment="raw"``. Shared routing with
    strength a gives 1/(1-a) on an axis-aligned direction, and near
    :math:`[1 - a(2-a)s]^{-1/2}` with the gradient's energy share s inside a rotated
    basis (within 8 % for eight strengths and three overlaps in our tests).

    **Placement.** Inside ``protect``, around the moments:
    ``protect(r, attenuate(.5), measure_gain(scale_by_decoupled_adam()))``.

    **Cost.** One tree like params, the shadow second moment; one product with the
    squared basis a step.

    Args:
      inner: A transformation whose state has one ``nu`` and one ``count``
        (``scale_by_decoupled_adam``, ``optax.scale_by_adam``).
      eps: As given to ``inner``; where it is far below the root of the second moment,
        it makes no difference.
      eps_root: As given to ``inner``.
      name: Name of the number in the state.

    Returns:
      A ``GradientTransformationExtraArgs`` with state
      ``{name: float32 [], "shadow": ShadowMomentState, "inner": inner's state}``. The
      number is 1 before the first boundary.

    Raises:
      TypeError: At trace time without a ``basis``.
      ValueError: For numbers out of range, or at ``init`` if ``inner`` has no ``nu``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_cl
      >>> adam = optax_cl.scale_by_decoupled_adam(second_moment="routed")
      >>> tx = optax_cl.protect(1, optax_cl.attenuate(0.5), optax_cl.measure_gain(adam))
      >>> w = jnp.ones((3, 2))
      >>> updates, state = tx.update(w, tx.init(w), w)
      >>> print(optax.tree.get(state, "gain_inflation"))
      1.0
    """
    checks.check_number("eps", eps, low=0.0)
    checks.check_number("eps_root", eps_root, low=0.0)
    _capture.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        inner_state = inner.init(params)
        if not optax.tree.get_all_with_path(inner_state, "nu"):
            raise ValueError(
                "`measure_gain` reads the second moment `nu` of the transformation "
                "inside it, but its state has none. Put it around "
                "`scale_by_decoupled_adam(...)`."
            )
        return {
            name: jnp.ones([], jnp.float32),
            "shadow": ShadowMomentState(optax.tree.zeros_like(params)),
            "inner": inner_state,
        }

    def update_fn(
        updates, state, params=None, *, basis=None, raw_updates=None, **extra_args
    ):
        space = _subspace.require_basis("measure_gain", basis)
        raw = _capture.require_raw("measure_gain", raw_updates, updates)
        old, extra_args["basis"] = state["shadow"].raw_nu, basis

        def next_nu(nu, g):
            """What ``inner`` makes of ``nu`` where both of its gradients are g."""
            replaced = optax.tree.set(state["inner"], nu=nu)
            _, new = inner.update(g, replaced, params, raw_updates=g, **extra_args)
            return optax.tree.get(new, "nu")

        shadow = next_nu(old, raw)
        b2 = _decay(next_nu, updates, old)
        updates, inner_state = inner.update(
            updates, state["inner"], params, raw_updates=raw, **extra_args
        )
        count = optax.tree.get(inner_state, "count")
        gain = functools.partial(
            _gain, space, count=count, b2=b2, eps=eps, eps_root=eps_root
        )
        ratio = _mean_ratio(
            space, gain(optax.tree.get(inner_state, "nu")), gain(shadow)
        )
        return updates, {
            name: ratio,
            "shadow": ShadowMomentState(shadow),
            "inner": inner_state,
        }

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _overlap(updates, extra_args):
    space = _subspace.require_basis("measure", extra_args.get("basis"))
    raw = _capture.require_raw("measure", extra_args.get("raw_updates"), updates)
    shares = jax.tree.leaves(_subspace.overlap(space, raw))
    return sum(shares, start=jnp.zeros([])) / max(len(shares), 1)


def _strength(updates, extra_args):
    space = _subspace.require_basis("measure", extra_args.get("basis"))
    now = subspaces.coefficients(space.views, space.basis, updates)
    now, now_power = trees.scale_down(now)
    raw, raw_power = trees.scale_down(
        trees.align_structure("basis.raw", space.raw, now)
    )
    energy = trees.squared_norm(raw)
    usable = (energy > 0) & jnp.isfinite(energy)
    kept = trees.vdot(now, raw) / jnp.where(usable, energy, 1.0)
    return jnp.where(usable, 1 - kept * (now_power / raw_power), 0.0)


def _leak(updates, extra_args):
    space = _subspace.require_basis("measure", extra_args.get("basis"))
    bases = trees.align_structure("basis", space.basis, updates)
    protected = jax.tree.map(
        lambda u, b: b if trees.is_masked(b) else u, updates, bases
    )
    protected, _ = trees.scale_down(protected)
    coeffs = subspaces.coefficients(space.views, space.basis, protected)
    total = trees.squared_norm(protected)
    return trees.squared_norm(coeffs) / jnp.where(total > 0, total, 1.0)


def _cosine(updates, extra_args):
    reference = extra_args.get("reference_updates")
    if reference is None:
        raise ValueError(
            "`measure('cosine')` needs the extra argument `reference_updates`: "
            "`tx.update(grads, state, params, reference_updates=reference)`."
        )
    reference = trees.align("reference_updates", reference, updates)
    updates, _ = trees.scale_down(updates)
    reference, _ = trees.scale_down(reference)
    norms = trees.squared_norm(updates) * trees.squared_norm(reference)
    dot = trees.vdot(updates, reference)
    return jnp.where(norms > 0, dot / jnp.sqrt(jnp.where(norms > 0, norms, 1.0)), 0.0)


def _decay(next_nu, updates, nu):
    """What is left of ones after a gradient of zero: the decay of ``nu``."""
    ones = jax.tree.map(lambda v: jnp.ones(v.shape, jnp.float32), nu)
    left = jax.tree.leaves(next_nu(ones, trees.zeros_like(updates)))
    # One number; the rest of the step is never computed under jit.
    return jnp.max(jnp.concatenate([jnp.zeros(1), *(v.ravel()[:1] for v in left)]))


def _gain(space, nu, *, count, b2, eps, eps_root):
    """``u_k^T D^-1 u_k`` for every protected direction, ``[*batch, r, out]``."""
    corrected = optax.tree.bias_correction(nu, b2, count)
    bases = trees.align_structure("basis", space.basis, corrected)

    def one(path, v, u):
        if trees.is_masked(u):
            return u
        inverse = 1 / (jnp.sqrt(v.astype(jnp.float32) + eps_root) + eps)
        view = space.views(checks.path_str(path), v.shape)
        return linalg.coefficients(u**2, to_matrix(inverse, view))

    return jax.tree_util.tree_map_with_path(one, corrected, bases)


def _mean_ratio(
    space: _subspace.Subspace, used: chex.ArrayTree, raw: chex.ArrayTree
) -> chex.Array:
    bases = trees.align_structure("basis", space.basis, used)
    filled = jax.tree.map(
        lambda u, g: jnp.broadcast_to(jnp.any(u != 0, axis=-2)[..., None], g.shape),
        bases,
        used,
    )
    ratios = jax.tree.map(
        lambda a, b, f: jnp.where(f, a / jnp.where(f, b, 1.0), 0.0), used, raw, filled
    )
    total = jnp.asarray(optax.tree.sum(ratios), jnp.float32)
    count = jnp.asarray(
        optax.tree.sum(jax.tree.map(lambda f: f.astype(jnp.float32), filled))
    )
    return jnp.where(count > 0, total / jnp.maximum(count, 1.0), 1.0)
