"""How far factors are from where EBLoRA left them, and which are held for it."""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp

from optax_cl._core import trees
from optax_cl._core.linalg import coefficients
from optax_cl._core.orthonormal import identity, inside
from optax_cl.lora import _spectral

# Squared length of a column from which on a factor is held. The update of a point Y is
# R - Y, with R on the manifold: behind a factor f, what Y is off by is multiplied by
# 1 - f. For f in (0, 2) that shrinks, and for f in (0, 1] no column is ever longer than
# one. For a negative f it grows, geometrically, whatever R is; since f cannot be seen
# from here, only an update of zero is safe under all of them.
_LONG = 4.0


class Seen(NamedTuple):
    """What the parameters of a step were found to be."""

    drift: chex.Array  # float32 [], see `eblora`
    held: Any  # like the adapters: bool [*batch] at u and v, else False


def look(factors: _spectral.Factors, params: Any, master: Any) -> Seen:
    """Compares parameters with the manifold, or with their master copies."""
    leaves = factors.structure.flatten_up_to(params)
    masters = factors.structure.flatten_up_to(master)
    held: list[Any] = [False] * len(leaves)
    drift = jnp.zeros([], jnp.float32)
    for group in factors.groups:
        exact = [i for i in group if trees.is_masked(masters[i])]
        rounded = [i for i in group if not trees.is_masked(masters[i])]
        for members in filter(None, (exact, rounded)):
            p = _spectral.stack([leaves[i] for i in members])
            p = p.astype(jnp.promote_types(p.dtype, jnp.float32))
            gram = coefficients(p, p)
            off = jnp.abs(gram - identity(gram))
            if members is rounded:
                off = jnp.sum(
                    (p - _spectral.stack([masters[i] for i in rounded])) ** 2, -2
                )
            drift = jnp.fmax(drift, _largest(off))
            lengths = jnp.max(jnp.diagonal(gram, axis1=-2, axis2=-1), axis=-1)
            too_long = _spectral.unstack(lengths > _LONG, len(members))
            for i, long in zip(members, too_long, strict=True):
                held[i] = long
    return Seen(drift, factors.structure.unflatten(held))


def overlap(y: chex.Array, memory: chex.Array | None) -> chex.Array:
    """The largest entry of ``|Y^T M|`` for ``Y = X + xi``, as ``xi`` is off the memory.

    A retraction computes the same product, so that it costs nothing here.
    """
    if memory is None:
        return jnp.zeros([], jnp.float32)
    share = jnp.max(jnp.abs(inside(y, memory)), axis=(-2, -1))
    # Of a long step rounding leaves a share.
    return _largest(share / jnp.fmax(1.0, jnp.max(jnp.abs(y), axis=(-2, -1))))


def _largest(x: chex.Array) -> chex.Array:
    """The maximum of numbers that are not negative; a NaN does not hide the others."""
    return jnp.max(jnp.fmax(x, 0.0)).astype(jnp.float32)
