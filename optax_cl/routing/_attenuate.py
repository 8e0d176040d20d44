"""Links that take from updates what lies in the protected subspace of their owner."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks, subspaces, trees
from optax_cl.routing import _capture, _rules, _subspace


class AttenuateState(NamedTuple):
    """State of ``attenuate``: the rule's own averages."""

    rule: Any
    declaration: Any  # Declaration: static, no leaves


class ScaledProjectState(NamedTuple):
    """State of ``project`` with a scale: no arrays."""

    declaration: Any  # Declaration: static, no leaves


def attenuate(
    strength: Any = None, *, weighted: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Attenuates the updates' component in the protected subspace.

    .. math:: \tilde g = g + U (C' - C), \qquad C = U^T g, \quad C' = \text{rule}(C)

    **Placement.** Inside ``protect``. Before the moments it is a modifier: with
    decoupled moments an axis-aligned direction moves (1 - a) times as far as under
    plain Adam, with shared moments just as far as if it were not there. After the
    moments it acts on the update (``post``): U^T u shrinks by exactly (1 - a). With a
    basis that is not axis-aligned, only ``post`` is exact: at a = 1, the study
    ``alpha_sweep`` finds 6 % (shared), 7 to 13 % (max) and 15 to 18 % (raw) of the
    updates' energy still inside the subspace, against 1e-13 after the moments. The
    wider the coordinates' scales are spread, the worse. Gates read the raw gradient,
    and scale what arrives, so they mean the same on both sides of the learning rate;
    ``spring`` adds, and belongs before it.

    Args:
      strength: A number in [0, 1], an Optax schedule, or a rule (``constant``,
        ``one_minus``, ``proportional``, ``ratchet``, ``balance``, ``spring``). None is
        ``balance(1)``, the safest choice in our comparisons.
      weighted: Scale the strength of column k by :math:`\sqrt{e_k / e_1}`, its relative
        singular value, instead of plain :math:`U U^T`.

    Returns:
      A ``GradientTransformationExtraArgs``; its update reads the extra arguments
      ``basis`` and ``raw_updates`` that ``protect`` binds. Its state holds the rule's
      own averages only.

    Raises:
      TypeError: For a strength that is neither number, schedule nor rule; at trace time
        outside ``protect``, where there is no basis.
      ValueError: For a number outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, optax_cl
      >>> tx = optax_cl.protect(2, optax_cl.attenuate(0.5),
      ...                       optax_cl.scale_by_decoupled_adam())
      >>> w = jnp.ones((3, 4))
      >>> updates, state = tx.update(w, tx.init(w), w)  # nothing to protect yet
      >>> print(updates[0, 0].round(3))
      1.0

    References:
      `arXiv:2604.22407v1 <https://arxiv.org/abs/2604.22407v1>`_, since reported
      withdrawn

      Saha and Roy, `Scaled Gradient Projection <https://arxiv.org/abs/2302.01386>`_,
      2023 (weights from singular values; theirs, by another formula, are
      ``project(scale=10)``)
    """
    rule = _rules.balance() if strength is None else _rules.as_rule(strength)

    def init_fn(params):
        return AttenuateState(
            rule.init(params), _subspace.Declaration(frozenset(rule.needs))
        )

    def update_fn(
        updates, state, params=None, *, basis=None, raw_updates=None, **extra_args
    ):
        del params, extra_args
        space = _subspace.require_basis("attenuate", basis)
        coeffs = subspaces.coefficients(space.views, space.basis, updates)
        context = _context(space, rule.needs, coeffs, raw_updates, updates)
        new, rule_state = rule.apply(coeffs, context, state.rule)
        change = jax.tree.map(jnp.subtract, new, coeffs)
        if weighted:
            change = jax.tree.map(_weigh, change, _aligned(space.energy, change))
        updates = _subspace.add_lifted(space.views, space.basis, updates, change)
        return updates, state._replace(rule=rule_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def project(*, scale: float | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Removes the protected component: :math:`u - U U^T u`, or a share of it.

    **Placement.** Inside ``protect``, after the moments and after weight decay; then
    the step leaves ``U^T W`` unchanged to rounding (\|U^T u\| / \|u\| below 1e-6), on
    either side of the learning rate. Whatever is chained after it that is not a
    scalar multiple breaks that. Before the moments it is the projection of the SGD
    papers, and Adam leaks. Stateless.

    **With a scale** it is the scaled projection of SGP, for bases that grow:

    .. math::
        u - U \mathrm{diag}(\lambda) U^T u, \qquad
        \lambda \leftarrow \min\Bigl(\lambda + \frac{(\alpha + 1)\, s}{\alpha s + \max_j
        s_j}, 1\Bigr)

    at every boundary, with :math:`s_i = \|u_i^T G\|` what column i holds of the task's
    inputs or gradients G. What matters little to old tasks stays free to learn; how
    much, the scale tells: 0 weighs by relative singular values, and without a bound it
    is the whole projection. Nothing is left unchanged exactly but columns with
    :math:`\lambda = 1`.

    Args:
      scale: SGP's :math:`\alpha`, at least 0, a Python number; its authors take 10. The
        owner then stores :math:`\lambda`, r numbers a matrix.

    Returns:
      A ``GradientTransformationExtraArgs``, without a state of arrays.

    Raises:
      TypeError: For a scale that is no Python number; at trace time outside
        ``protect``, where there is no basis.
      ValueError: For a scale below 0. By ``protect``, at ``init``: for a scale beside
        another memory than ``"grow"``, or another scale.

    Example:
      >>> import optax_cl
      >>> tx = optax_cl.protect(8, optax_cl.scale_by_decoupled_adam(),
      ...                       optax_cl.project())

    References:
      Wang et al, `Training Networks in Null Space <https://arxiv.org/abs/2103.07113>`_,
      2021

      Saha and Roy, `Scaled Gradient Projection <https://arxiv.org/abs/2302.01386>`_,
      2023
    """
    if scale is not None:
        if not checks.is_concrete_number(scale):
            raise TypeError(
                f"`scale` must be a Python number; got {scale!r}. It is read at task "
                "boundaries, and can't be traced or injected."
            )
        checks.check_number("scale", scale, low=0.0)
        declaration = _subspace.Declaration(frozenset({"importance"}), float(scale))

    def init_fn(params):
        del params
        return optax.EmptyState() if scale is None else ScaledProjectState(declaration)

    def update_fn(updates, state, params=None, *, basis=None, **extra_args):
        del params, extra_args
        space = _subspace.require_basis("project", basis)
        importance = None if scale is None else space.importance
        updates = _subspace.removed(space.views, space.basis, updates, importance)
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _context(space, needs, coeffs, raw_updates, updates):
    def get(name):
        if name not in needs:
            return None
        return _aligned(getattr(space, name), coeffs)

    measured = None
    if "overlap" in needs:
        raw = _capture.require_raw("attenuate", raw_updates, updates)
        measured = _subspace.overlap(space, raw)
    return _rules.Context(
        raw=_aligned(space.raw, coeffs),
        displacement=get("displacement"),
        curvature=get("curvature"),
        mean=get("mean"),
        overlap=measured,
    )


def _aligned(tree, like):
    return trees.align_structure("basis", tree, like)


def _weigh(change, energy):
    largest = jnp.max(energy, axis=-1, keepdims=True)
    ratio = jnp.sqrt(energy / jnp.where(largest > 0, largest, 1.0))
    return change * ratio[..., :, None]
