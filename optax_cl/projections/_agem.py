"""A-GEM: never step against the gradient of a batch from the memory."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks, surgery, tasks, trees


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class AgemRules:
    """What happens to the averaged reference at a boundary: a static node."""

    at_boundary: str = "reset"


class AgemState(NamedTuple):
    """State of :func:`agem`."""

    reference: Any  # like params, at least float32; None without `decay`
    rules: Any = AgemRules()  # static


def agem(
    *,
    decay: chex.Numeric | None = None,
    at_boundary: str = "reset",
    granularity: str = "global",
    sign: str = "gradient",
) -> optax.GradientTransformationExtraArgs:
    r"""Projects the update so that it does not work against past tasks.

    With :math:`g` the gradient on the current batch and :math:`r` the gradient of the
    mean loss on a batch drawn from the memory of *past* tasks,

    .. math::

        \tilde g = \begin{cases}
          g & \langle g, r\rangle \ge 0,\\
          g - \dfrac{\langle g, r\rangle}{\langle r, r\rangle}\, r & \text{otherwise.}
        \end{cases}

    Then :math:`\langle\tilde g, r\rangle \ge 0`, :math:`\langle\tilde g, g\rangle \ge
    0` and :math:`\|\tilde g\| \le \|g\|`. Only the direction of :math:`r` matters, so
    it is the same whether one averages or sums over past tasks. A zero reference (no
    past task yet), or one that is not finite, leaves the update bit for bit as it is.

    The update takes the keyword-only extra argument ``reference_updates``, a tree like
    the updates. It depends on the parameters, so compute it anew at every step: that is
    one more backward pass, however many tasks went before. While there is no past task
    pass zeros, which keeps one compilation. Keep the current task out of the memory, or
    :math:`r` drifts towards :math:`g` and nothing is ever projected.

    With ``decay`` :math:`=\rho` the projection is on the moving average :math:`r_t =
    \rho\, r_{t-1} + (1 - \rho)\, g_{\text{ref},t}` (no bias correction: length does not
    matter). This smooths small memory batches, at a price: the guarantee then holds for
    :math:`r_t`, and :math:`\langle\tilde g, g_{\text{ref},t}\rangle` may be negative.
    Old terms were taken at old parameters; stay at 0.9 or below unless steps are small.
    At a task boundary ``end_task`` clears the average, since the set of past tasks has
    changed; ``at_boundary="keep"`` goes on with it, which spares the steps in which a
    new average is noisy while the finished task fades in. A reference that is not
    finite is left out of it.

    **Placement.** Three places, by what is guaranteed there:

    * ``pre``, before the moments (the published form, made for SGD): the *routed
      gradient* does not oppose the reference. The step that follows may: momentum holds
      directions from before, and dividing by the second moment rotates the gradient. In
      the example below 77 % of Adam's directions oppose the reference without A-GEM,
      68 % with ``pre`` (60 % and 22 % without momentum; decoupled moments leak as much
      as shared ones), and none with ``post``.
    * ``post``, after the moments and weight decay, before the learning rate: the *step*
      does not oppose the reference. Optax's ``scale_by_*`` directions point along the
      gradient, so the sign is that of ``pre``: ``sign="gradient"``.
    * ``post``, after the learning rate: updates now point downhill, and the constraint
      is :math:`\langle u, r\rangle \le 0`. Say ``sign="descent"``; the result equals
      the place before it. The wrong sign projects harmless steps and lets harmful ones
      through.

    Under ``optax.masked`` and ``optax.partition`` the inner product runs over the
    visible leaves; pass ``reference_updates`` whole. Under ``optax.MultiSteps`` the
    gradient is the mean over micro-steps, but the reference is that of the *last*
    micro-step alone, in the average too: draw that memory batch large enough. With
    several devices give both gradients as global means; projecting before averaging is
    another map.

    Args:
      decay: None, or :math:`\rho` in ``[0, 1)``: project on the moving average. Only
        then does the state hold a tree. May be a tracer.
      at_boundary: ``"reset"`` or ``"keep"``: what ``end_task`` does with the average.
      granularity: ``"global"``: one inner product over all leaves (A-GEM). ``"leaf"``:
        each leaf by itself, a stricter method of its own.
      sign: ``"gradient"`` where updates point along the gradient, ``"descent"`` where
        they are to be added to the parameters.

    Returns:
      A transformation with state :class:`AgemState`.

    Raises:
      ValueError: At build time for a ``decay`` outside ``[0, 1)``, unknown choices, or
        ``at_boundary="keep"`` without ``decay``; at update for missing or mismatched
        ``reference_updates``.

    Example:
      How often does Adam's direction oppose the reference?

      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_cl.projections import agem
      >>> scale = jnp.logspace(-2, 0, 20)[None]  # coordinates of very different size
      >>> noise = jax.random.normal(jax.random.key(0), (2, 1000, 20))
      >>> grads, refs = (noise[0] + 0.3) * scale, (noise[1] - 0.3) * scale
      >>> def opposed(*links):
      ...   tx = optax.chain(*links)
      ...   def step(state, data):
      ...     grad, ref = data
      ...     u, state = tx.update(grad, state, reference_updates=ref)
      ...     cosine = u @ ref / (jnp.linalg.norm(u) * jnp.linalg.norm(ref))
      ...     return state, cosine < -1e-6
      ...   hits = jax.lax.scan(step, tx.init(grads[0]), (grads, refs))[1]
      ...   return f"{hits.mean():.0%}"
      >>> opposed(optax.scale_by_adam())
      '77%'
      >>> opposed(agem(), optax.scale_by_adam())
      '68%'
      >>> opposed(optax.scale_by_adam(), agem())
      '0%'

    References:
      Chaudhry et al, `Efficient Lifelong Learning with A-GEM
      <https://arxiv.org/abs/1812.00420>`_, 2019

    Differs from the paper:
      1. A zero or non-finite reference gives the gradient itself, not NaN.
      2. The moving average, ``"leaf"`` and the ``post`` places are additions.
      3. The memory, its sampling and the exclusion of the current task are the
         caller's; see :mod:`optax_cl.replay` for a buffer.
    """
    if decay is not None:
        checks.check_number("decay", decay, low=0.0, high=1.0, open_high=True)
    checks.check_choice("granularity", granularity, ("global", "leaf"))
    checks.check_choice("sign", sign, ("gradient", "descent"))
    checks.check_choice("at_boundary", at_boundary, ("reset", "keep"))
    if at_boundary == "keep" and decay is None:
        raise ValueError(
            "`at_boundary='keep'` has no meaning without `decay`: no reference is "
            "averaged. Pass `decay`, for instance 0.9, or leave `at_boundary` out."
        )
    rules = AgemRules(at_boundary)

    def init_fn(params):
        if decay is None:
            return AgemState(None, rules)
        return AgemState(
            jax.tree.map(
                lambda p: jnp.zeros(
                    jnp.shape(p), trees.importance_dtype(jnp.result_type(p))
                ),
                params,
            ),
            rules,
        )

    def update_fn(updates, state, params=None, *, reference_updates=None, **extra_args):
        del params, extra_args
        if reference_updates is None:
            raise ValueError(
                "`agem` needs `reference_updates`, the gradient on a batch from the "
                "memory of past tasks. Call `tx.update(grads, state, params, "
                "reference_updates=...)`; before the first boundary pass "
                "`optax.tree.zeros_like(grads)`."
            )
        ref = trees.align("reference_updates", reference_updates, updates)
        surgery.check_floating("updates", updates)
        surgery.check_floating("reference_updates", ref)
        if decay is not None:
            ref = _moving_average(state.reference, ref, decay)
            state = state._replace(reference=ref)
        if sign == "descent":
            ref = jax.tree.map(jnp.negative, ref)
        return surgery.project_conflict(updates, ref, granularity=granularity), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def reset_reference(state: AgemState) -> AgemState:
    """Forgets the averaged reference: the set of past tasks has changed.

    Args:
      state: State of :func:`agem`, with or without a moving average.

    Returns:
      A state of the same structure, shapes and dtypes, with a zero average.
    """
    return state._replace(reference=trees.zeros_like(state.reference))


def _moving_average(average, ref, decay):
    new = jax.tree.map(
        lambda a, r: (decay * a + (1 - decay) * jnp.asarray(r, a.dtype)).astype(
            a.dtype
        ),
        average,
        ref,
    )
    # One bad batch would stay in the average for good, and switch the method off.
    finite = jnp.isfinite(trees.squared_norm(ref))
    return jax.tree.map(lambda n, a: jnp.where(finite, n, a), new, average)


def _end_task(state: AgemState, params: Any, results: Any) -> AgemState:
    del params, results
    return state if state.rules.at_boundary == "keep" else reset_reference(state)


tasks.register_boundary(AgemState, tasks.Boundary(end_task=_end_task))
