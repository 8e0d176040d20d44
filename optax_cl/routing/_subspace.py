"""What the owner of a protected subspace lends to the links inside it."""

from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks, linalg, subspaces, trees
from optax_cl._core.matrices import ViewRule, from_matrix


@jax.tree_util.register_static
@dataclass(frozen=True)
class Declaration:
    """What a link needs of the owner; leafless, read by ``protect``."""

    needs: frozenset[str]
    scale: float | None = None  # SGP's alpha, for those that need the importance


class Subspace(NamedTuple):
    """The extra argument ``basis`` that ``protect`` binds for the links inside it."""

    basis: chex.ArrayTree  # U
    energy: chex.ArrayTree  # e
    raw: chex.ArrayTree  # U^T g, g the raw gradient
    displacement: chex.ArrayTree | None  # U^T (W - W*)
    curvature: chex.ArrayTree | None  # Lambda
    mean: chex.ArrayTree | None  # corrected average of `raw`
    importance: chex.ArrayTree | None  # lambda
    views: ViewRule


def require_basis(method: str, basis: Subspace | None) -> Subspace:
    """The bound subspace, or an error naming the fix."""
    if basis is None:
        raise TypeError(
            f"`{method}` needs a protected subspace, and there is no `basis` here. Put "
            f"it inside the owner of one: `optax_cl.protect(rank, {method}(...), ...)`."
        )
    return basis


def overlap(space: Subspace, raw_updates: chex.ArrayTree) -> chex.ArrayTree:
    """``||U^T g||^2 / ||g||^2`` of every protected leaf, in [0, 1].

    It is 0 where g is 0, or ``U^T g`` is not finite: the averages of it would stay NaN.
    """
    raw = trees.align_structure("basis.raw", space.raw, raw_updates)

    def one(g, c):
        if trees.is_masked(c):
            return c
        g, power = trees.scale_down(g)
        c = c / power
        total = trees.leaf_vdot(g, g)
        inside = trees.leaf_vdot(c, c)
        usable = (total > 0) & jnp.isfinite(total) & jnp.isfinite(inside)
        return jnp.where(usable, inside, 0.0) / jnp.where(usable, total, 1.0)

    return jax.tree.map(one, raw_updates, raw)


def add_lifted(
    views: ViewRule,
    basis: chex.ArrayTree,
    updates: chex.ArrayTree,
    change: chex.ArrayTree,
) -> chex.ArrayTree:
    """``g + U C`` at every protected leaf, in the dtype of g."""
    bases = trees.align_structure("basis", basis, updates)

    def one(path, g, u, c):
        view = views(checks.path_str(path), g.shape)
        if view is None or trees.is_masked(u):
            return g
        lifted = from_matrix(linalg.lift(u, c), view, g.shape)
        return (g.astype(lifted.dtype) + lifted).astype(g.dtype)

    return jax.tree_util.tree_map_with_path(one, updates, bases, change)


def removed(
    views: ViewRule,
    basis: chex.ArrayTree,
    updates: chex.ArrayTree,
    importance: chex.ArrayTree | None = None,
) -> chex.ArrayTree:
    """``g - U diag(lambda) U^T g`` at every protected leaf; None is lambda = 1."""
    coeffs = subspaces.coefficients(views, basis, updates)
    if importance is not None:
        importance = trees.align_structure("importance", importance, coeffs)
        coeffs = jax.tree.map(lambda c, lam: lam[..., None] * c, coeffs, importance)
    return add_lifted(views, basis, updates, jax.tree.map(jnp.negative, coeffs))
