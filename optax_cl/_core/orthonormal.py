r"""Matrices with orthonormal columns, made from any matrix in one pass or in several.

A pass multiplies Y, ``[..., d, r]``, from the right by a root Z of its inverse Gram
matrix, :math:`Z^\top (Y^\top Y) Z = I`. The symmetric root gives the polar factor of Y,
the triangular one its Q factor.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import decompositions
from optax_cl._core.linalg import coefficients, lift

# A Gram matrix squares the condition number. Up to this condition of the Gram matrix
# one pass is exact to rounding; beyond it the slow path takes over.
_WELL_CONDITIONED = 100.0
# Enough for an eigenvalue of rounding size in float64; a few are the rule.
_MAX_ITERATIONS = 64

# (y, shifted) -> (x, low, high): the new matrix, and bounds of the squared singular
# values of y, the smallest and the largest.
_Pass = Callable[[chex.Array, bool], tuple[chex.Array, chex.Array, chex.Array]]


# Called by itself, outside any jit, the loops would be compiled anew each time.
@functools.partial(jax.jit, static_argnames="method")
def orthonormalize(
    y: chex.Array,
    method: str,
    *,
    memory: chex.Array | None,
    otherwise: chex.Array,
) -> chex.Array:
    """The polar or Q factor of ``y`` in the complement of the memory.

    Args:
      y: ``[..., d, r]``, float32 or float64.
      method: ``"eigh"``, ``"newton_schulz"`` or ``"svd"`` for the polar factor,
        ``"qr"`` for Q.
      memory: ``[..., d, p]`` of orthonormal or zero columns, in the dtype of ``y``.
      otherwise: Stands in for matrices of ``y`` that are not finite.

    Returns:
      Orthonormal columns off the memory. Where ``y`` has no full rank, the missing
      directions are filled in from a fixed frame.
    """
    one_pass = _PASSES[method]
    x, low, high = one_pass(off_memory(y, memory), False)
    well = high < _WELL_CONDITIONED * low
    if memory is not None:
        # What rounding leaves in the memory is a share of what was there before.
        well &= jnp.sum(inside(y, memory) ** 2, axis=(-2, -1)) < 4 * low
    # A loop that runs once or not at all, not a branch: under vmap a branch would
    # always take both sides.
    x, _ = jax.lax.while_loop(
        lambda carry: carry[1],
        lambda carry: (
            _select(well, carry[0], _carefully(y, one_pass, memory, otherwise)),
            jnp.zeros_like(carry[1]),
        ),
        (x, ~jnp.all(well)),
    )
    return x


def inside(z: chex.Array, memory: chex.Array) -> chex.Array:
    """``Z^T M``: ``[..., d, r], [..., d, p] -> [..., r, p]``.

    Of a stack of narrow Z a CPU computes this a few times faster than ``M^T Z``.
    """
    return coefficients(z, memory)


def off_memory(z: chex.Array, memory: chex.Array | None) -> chex.Array:
    """``(I - M M^T) Z``; Z itself without a memory."""
    return z if memory is None else z - lift(inside(z, memory), memory.mT).mT


def unit_scale(matrix: chex.Array) -> chex.Array:
    """Each matrix divided by its largest entry, which squares then stand; 0 stays 0."""
    size = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True, initial=0)
    # In two factors, since compilers divide by multiplying with a reciprocal, and that
    # of a size near the largest float is below the smallest.
    root = jax.lax.rsqrt(jnp.where(size > 0, size, 1))
    return matrix * root * root


def identity(like: chex.Array) -> chex.Array:
    """The identity of the size of the last axis, with as many axes as ``like``."""
    eye = jnp.eye(like.shape[-1], dtype=like.dtype)
    return jnp.expand_dims(eye, range(like.ndim - 2))


def _carefully(y, one_pass: _Pass, memory, otherwise):
    """The factor of a matrix of any scale, rank and condition."""
    finite = jnp.all(jnp.isfinite(y), axis=(-2, -1))
    y = _select(finite, y, otherwise)
    y = off_memory(off_memory(unit_scale(y), memory), memory)

    def improve(_, x):
        # A shifted pass keeps the factor and lifts the smallest singular values, in
        # float32 about a thousandfold, and with them what rounding left in the memory.
        return off_memory(one_pass(x, True)[0], memory)

    x = jax.lax.fori_loop(0, 4, improve, y)
    # Now singular values are 1, or 0 where a direction is missing: fill that in.
    missing = identity(x) - coefficients(x, x)
    frame = jax.random.normal(jax.random.key(0), x.shape[-2:], x.dtype)
    frame = frame.reshape((1,) * (x.ndim - 2) + frame.shape) / x.shape[-2] ** 0.5
    fill = off_memory(lift(frame, missing), memory)
    fill -= lift(x, coefficients(x, fill))
    x = jax.lax.fori_loop(0, 4, improve, x + fill)
    return one_pass(x, False)[0]


def _gram_pass(inverse_root: Callable[[chex.Array], chex.Array]) -> _Pass:
    """A pass that needs the Gram matrix alone, scaled to eigenvalues up to 1."""

    def one_pass(y, shifted):
        gram = coefficients(y, y)
        # A bound of the largest eigenvalue which is 1 for the identity, so that an
        # almost orthonormal matrix is almost left alone.
        high = jnp.max(jnp.sum(jnp.abs(gram), axis=-1), axis=-1)
        high = jnp.where(high > 0, high, 1)  # the zero matrix
        gram = gram / high[..., None, None]
        if shifted:
            # By the size of its rounding error, so that it stays positive definite.
            shift = gram.shape[-1] * jnp.finfo(gram.dtype).eps
            gram += shift * identity(gram)
        z = inverse_root(gram)
        # |Z|^2 is the reciprocal of the smallest eigenvalue; two norms bound it.
        rows, columns = (jnp.max(jnp.sum(jnp.abs(z), a), -1) for a in (-1, -2))
        x = lift(y, z * jax.lax.rsqrt(high)[..., None, None])
        return x, high / (rows * columns), high

    return one_pass


def _inverse_root_eigh(gram):
    values, vectors = decompositions.eigh(gram)
    floor = gram.shape[-1] * jnp.finfo(gram.dtype).eps
    half = vectors * jnp.maximum(values, floor)[..., None, :] ** -0.25
    z = lift(half, half.mT)
    # Eigenvectors are orthonormal to some rounding errors only: one Newton step.
    return lift(z, 1.5 * identity(z) - lift(z, lift(gram, z)) / 2)


def _inverse_root_newton_schulz(gram):
    # The iteration X <- X (3 I - X^T X) / 2 for X = Y Z, written for Z and for the Gram
    # matrix X^T X alone, so that its steps cost r^3 and not d r^2.
    eye = identity(gram)
    close = jnp.finfo(gram.dtype).eps ** 0.5

    def step(carry):
        gram, z, going, i = carry
        error = jnp.max(jnp.abs(gram - eye), axis=(-2, -1))
        # A matrix that is done waits for the others of its stack as it is, so that
        # its result depends on none of them.
        t = _select(going, 1.5 * eye - gram / 2, eye)
        # One that is not finite is done at once: NaN > close is false.
        return lift(t, lift(gram, t)), lift(z, t), error > close, i + 1

    # The error that is tested is the one before the last step, which squared it.
    going = jnp.ones(gram.shape[:-2], bool)
    start = (gram, jnp.broadcast_to(eye, gram.shape), going, 0)
    _, z, _, _ = jax.lax.while_loop(
        lambda carry: jnp.any(carry[2]) & (carry[3] < _MAX_ITERATIONS), step, start
    )
    return z


def _inverse_root_cholesky(gram):
    lower = decompositions.cholesky(gram)
    eye = jnp.broadcast_to(identity(gram), gram.shape)
    return decompositions.solve_lower(lower, eye).mT


def _svd_pass(y, shifted):
    del shifted
    u, s, vt = decompositions.svd(y)
    return lift(u, vt), s[..., -1] ** 2, s[..., 0] ** 2


_PASSES: dict[str, _Pass] = {
    "eigh": _gram_pass(_inverse_root_eigh),
    "newton_schulz": _gram_pass(_inverse_root_newton_schulz),
    "qr": _gram_pass(_inverse_root_cholesky),
    "svd": _svd_pass,
}


def _select(condition, a, b):
    return jnp.where(condition[..., None, None], a, b)
