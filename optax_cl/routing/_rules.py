"""How much of the protected coefficients is taken away: strengths and rules.

With C = U^T g the coefficients of the incoming updates in the protected subspace, a
rule gives C' and the routed gradient is ``g + U (C' - C)``. A *strength* a is the
special case C' = (1 - a) C. Gates, overlap and averages read the raw gradient; C are
the updates as they arrive, so that a rule may stand before or after the moments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks, tasks, trees


class Context(NamedTuple):
    """What a rule may read; None for what it did not declare in ``needs``.

    Every tree has the structure of the updates, ``MaskedNode`` at unprotected leaves.
    """

    raw: chex.ArrayTree  # U^T g of the raw gradient, [..., r, out]
    displacement: chex.ArrayTree | None  # D = U^T (W - W*), [..., r, out]
    curvature: chex.ArrayTree | None  # Lambda >= 0, [..., r, out]
    mean: chex.ArrayTree | None  # corrected moving average of `raw`, [..., r, out]
    overlap: chex.ArrayTree | None  # ||U^T g||^2 / ||g||^2 of each leaf, []


NEEDS = ("displacement", "curvature", "mean", "overlap")


class Rule(NamedTuple):
    """A coefficient rule: ``(C, context, state) -> (C', state)``.

    Attributes:
      apply: The rule, on trees; pure and jittable.
      needs: Names of the ``Context`` fields that it reads beside ``raw``; what no rule
        declares is neither stored nor computed.
      init: ``params -> state`` of the rule's own averages.
    """

    apply: Callable[[Any, Context, Any], tuple[Any, Any]]
    needs: frozenset[str] = frozenset()
    init: Callable[[Any], Any] = lambda params: optax.EmptyState()


class StepCountState(NamedTuple):
    """State of a scheduled strength."""

    count: chex.Array  # int32 []


class OverlapState(NamedTuple):
    """State of a strength that follows the overlap."""

    mean_overlap: Any  # float32 [], or a tree of them; 0 after every boundary


tasks.register_boundary(
    OverlapState,
    tasks.Boundary(
        end_task=lambda state, params, results: trees.zeros_like(state),
    ),
)


def constant(strength: jax.typing.ArrayLike | optax.Schedule = 0.5) -> Rule:
    """The same strength for every coefficient: ``C' = (1 - a) C``.

    Needs no anchor. It only delays: the equilibrium of the new task's gradient is the
    same for every a < 1, and reached later.

    Args:
      strength: a in [0, 1], or an Optax schedule of the step. What a schedule gives,
        and an array or tracer, is clipped to it: above 1 it would reverse the gradient
        in the subspace, below 0 enlarge it.

    Returns:
      A ``Rule``.

    Raises:
      ValueError: If a number is outside [0, 1].

    Example:
      >>> import optax_cl
      >>> tx = optax_cl.protect(4, optax_cl.attenuate(optax_cl.constant(0.75)),
      ...                       optax_cl.scale_by_decoupled_adam())
    """
    checks.check_number("strength", strength, low=0.0, high=1.0, schedule=True)
    if callable(strength):

        def scheduled(coeffs, context, state):
            a = _share(strength(state.count))
            count = optax.safe_increment(state.count)
            return _scale(coeffs, 1 - a), StepCountState(count)

        return Rule(
            scheduled, init=lambda params: StepCountState(jnp.zeros([], jnp.int32))
        )
    kept = 1 - _share(strength)
    return Rule(lambda coeffs, context, state: (_scale(coeffs, kept), state))


def one_minus(
    a_max: jax.typing.ArrayLike = 0.5,
    decay: jax.typing.ArrayLike = 0.98,
    *,
    per_leaf: bool = False,
    debias: bool = False,
) -> Rule:
    r"""The published adaptive strength: more overlap, less protection.

    .. math::
      s_t = \mathrm{mean}_\ell \frac{\|U_\ell^T g_\ell\|^2}{\|g_\ell\|^2}, \qquad
      \bar s_t = \beta_s \bar s_{t-1} + (1-\beta_s) s_t, \qquad
      a_t = a_{\max} (1 - \bar s_t)

    It switches protection off exactly where overlap is high. In our studies it gains
    nothing on text domains, next to nothing on digit streams, and is in the middle of
    the field on regression; it is here to reproduce the paper's setting. The average
    starts at zero after every boundary, so protection starts at ``a_max``.

    Args:
      a_max: Largest strength, in [0, 1]; an array or tracer is clipped to it.
      decay: :math:`\beta_s`, in [0, 1); .98 in the companion code, .99 in notes on the
        paper.
      per_leaf: A strength for each leaf from its own overlap instead of one for all.
      debias: Divide the average by :math:`1 - \beta_s^t`; the paper does not.

    Returns:
      A ``Rule``.

    Raises:
      ValueError: For a number outside its interval.

    Example:
      >>> import optax_cl
      >>> rule = optax_cl.one_minus(0.5, decay=0.99)

    References:
      `arXiv:2604.22407v1 <https://arxiv.org/abs/2604.22407v1>`_, since reported
      withdrawn
    """
    return _overlap_strength(
        lambda s: _share(a_max) * (1 - s), a_max, decay, per_leaf, debias
    )


def proportional(
    a_max: jax.typing.ArrayLike = 1.0,
    decay: jax.typing.ArrayLike = 0.98,
    *,
    per_leaf: bool = False,
    debias: bool = False,
) -> Rule:
    r"""More overlap, more protection: :math:`a_t = a_{\max} \bar s_t`.

    The overlap as in ``one_minus``.

    Args:
      a_max: Largest strength, in [0, 1]; an array or tracer is clipped to it.
      decay: Decay of the averaged overlap, in [0, 1).
      per_leaf: A strength for each leaf from its own overlap instead of one for all.
      debias: Divide the average by :math:`1 - \beta_s^t`.

    Returns:
      A ``Rule``.

    Raises:
      ValueError: For a number outside its interval.

    Example:
      >>> import optax_cl
      >>> rule = optax_cl.proportional()
    """
    return _overlap_strength(
        lambda s: _share(a_max) * s, a_max, decay, per_leaf, debias
    )


def ratchet(strength: jax.typing.ArrayLike = 0.75) -> Rule:
    r"""Slows moves away from the anchor, lets moves back pass.

    .. math:: C' = (1 - a\,\mathbf 1[C^{raw} D < 0])\, C, \qquad D = U^T (W - W^*)

    A descent step -C increases \|D\| where C D < 0. Needs the anchor, no curvature.

    Args:
      strength: a in [0, 1]; an array or tracer is clipped to it.

    Returns:
      A ``Rule``.

    Raises:
      ValueError: If ``strength`` is outside [0, 1].

    Example:
      >>> import optax_cl
      >>> tx = optax_cl.protect(4, optax_cl.attenuate(optax_cl.ratchet()),
      ...                       optax_cl.scale_by_decoupled_adam())
    """
    checks.check_number("strength", strength, low=0.0, high=1.0)
    strength = _share(strength)

    def apply(coeffs, context, state):
        return jax.tree.map(
            lambda c, raw, d: jnp.where(raw * d < 0, (1 - strength) * c, c),
            coeffs,
            context.raw,
            context.displacement,
        ), state

    return Rule(apply, frozenset({"displacement"}))


def balance(kappa: jax.typing.ArrayLike = 1.0) -> Rule:
    r"""Takes away what the old tasks' pull-back cancels, and never more.

    .. math::
      a = \mathrm{clip}\!\left(\kappa \frac{\Lambda |D|}{|\bar c|}, 0, 1\right)
      \mathbf 1[\bar c D < 0], \qquad C' = (1 - a)\, C

    for each coefficient, with the old tasks' curvature :math:`\Lambda` along it, the
    displacement D from the anchor and the averaged raw coefficient :math:`\bar c`. To
    second order the old loss pulls with :math:`\Lambda D`; where that equals the new
    task's push, the joint loss is stationary and the coefficient stops there, which no
    constant strength achieves.

    It is EWC restricted to the span of U, in an eigenbasis, clipped so that it can only
    attenuate; we claim no novelty. ``kappa=1`` has that meaning where curvature has
    Hessian units, as ``protect`` estimates it; classifiers that fit their training data
    have a Fisher that is too small, and want kappa of 10 or more.

    Args:
      kappa: Weight of the old tasks, at least 0; the larger, the nearer a ratchet of
        strength 1.

    Returns:
      A ``Rule``.

    Raises:
      ValueError: If ``kappa`` is negative or not finite.

    Example:
      >>> import optax_cl
      >>> tx = optax_cl.protect(4, optax_cl.attenuate(optax_cl.balance(1.0)),
      ...                       optax_cl.scale_by_decoupled_adam())
    """
    checks.check_number("kappa", kappa, low=0.0)

    def apply(coeffs, context, state):
        def one(c, d, curvature, mean):
            pull = kappa * curvature * jnp.abs(d)
            # min(pull, |mean|) / |mean| is the clipped ratio without an overflow; where
            # the mean is zero, so is the gate.
            size = jnp.abs(mean)
            ratio = jnp.minimum(pull, size) / jnp.where(size > 0, size, 1.0)
            return c * (1 - jnp.where(mean * d < 0, ratio, 0.0))

        return jax.tree.map(
            one, coeffs, context.displacement, context.curvature, context.mean
        ), state

    return Rule(apply, frozenset({"displacement", "curvature", "mean"}))


def spring(kappa: jax.typing.ArrayLike = 1.0) -> Rule:
    r"""Pulls back to the anchor: :math:`C' = C + \kappa \Lambda D`.

    Low-rank EWC in the basis: an additive penalty, which can reverse a step. It needs a
    denominator that sees what it adds (``second_moment="max"``), and a place before the
    learning rate.

    Args:
      kappa: Weight of the old tasks, at least 0.

    Returns:
      A ``Rule``.

    Raises:
      ValueError: If ``kappa`` is negative or not finite.

    Example:
      >>> import optax_cl
      >>> rule = optax_cl.spring(1.0)
    """
    checks.check_number("kappa", kappa, low=0.0)

    def apply(coeffs, context, state):
        return jax.tree.map(
            lambda c, d, curvature: c + kappa * curvature * d,
            coeffs,
            context.displacement,
            context.curvature,
        ), state

    return Rule(apply, frozenset({"displacement", "curvature"}))


def as_rule(strength: Any) -> Rule:
    """A rule from a number, a schedule, or a rule."""
    if isinstance(strength, Rule):
        unknown = strength.needs - set(NEEDS)
        if unknown:
            raise ValueError(
                f"a rule needs {sorted(unknown)}, but only {NEEDS} are to be had."
            )
        return strength
    for made in (one_minus, proportional, ratchet, balance, spring, constant):
        if strength is made:
            name = made.__name__
            raise TypeError(
                f"`strength` is the function `{name}`, which makes a rule. Call it: "
                f"`{name}()`."
            )
    return constant(strength)


def _overlap_strength(strength, a_max, decay, per_leaf, debias):
    checks.check_number("a_max", a_max, low=0.0, high=1.0)
    checks.check_number("decay", decay, low=0.0, high=1.0, open_high=True)
    zero = lambda: jnp.zeros([], jnp.float32)  # noqa: E731

    def init(params):
        mean = jax.tree.map(lambda p: zero(), params) if per_leaf else zero()
        return (
            _DebiasedState(OverlapState(mean), zero()) if debias else OverlapState(mean)
        )

    def apply(coeffs, context, state):
        inner = state.overlap if debias else state
        if per_leaf:
            # The averages stand at every leaf; unprotected ones are never read.
            old = trees.align_structure("overlap", inner.mean_overlap, coeffs)
            mean = jax.tree.map(
                lambda m, s: decay * m + (1 - decay) * s, old, context.overlap
            )
            kept = jax.tree.map(
                lambda m, new: m if trees.is_hole(new) else new,
                inner.mean_overlap,
                mean,
            )
        else:
            leaves = jax.tree.leaves(context.overlap)
            s = sum(leaves, start=zero()) / max(len(leaves), 1)
            mean = kept = decay * inner.mean_overlap + (1 - decay) * s
        new_state = OverlapState(kept)
        if debias:
            weight = decay * state.weight + (1 - decay)
            mean = jax.tree.map(lambda m: m / weight, mean)
            new_state = _DebiasedState(new_state, weight)
        if per_leaf:
            result = jax.tree.map(lambda c, m: (1 - strength(m)) * c, coeffs, mean)
        else:
            result = _scale(coeffs, 1 - strength(mean))
        # The overlap of float64 leaves is float64; the averages stay as they began.
        return result, optax.tree.cast_like(new_state, state)

    return Rule(apply, frozenset({"overlap"}), init)


class _DebiasedState(NamedTuple):
    overlap: OverlapState
    weight: chex.Array  # float32 [], total weight of the average


tasks.register_boundary(
    _DebiasedState,
    tasks.Boundary(end_task=lambda state, params, results: trees.zeros_like(state)),
)


def _share(strength):
    """A strength in [0, 1]; a number that was known has been checked already."""
    known = checks.is_concrete_number(strength)
    return strength if known else jnp.clip(strength, 0.0, 1.0)


def _scale(coeffs, factor):
    return jax.tree.map(lambda c: factor * c, coeffs)
