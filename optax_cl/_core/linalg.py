"""Bases of protected subspaces: products with them, and how they grow.

A basis is ``[..., in, r]`` in float32 with orthonormal columns; unused columns are
zero, so that they are inert in ``U U^T``. Its energies ``[..., r]`` are the eigenvalues
that came with the columns, largest first, zero for unused columns.
"""

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import decompositions

# A projector applied in reduced matrix precision (the default of some accelerators)
# leaves a thousandth of what it should remove.
PRECISION = jax.lax.Precision.HIGHEST


def coefficients(basis: chex.Array, matrix: chex.Array) -> chex.Array:
    """``U^T G``: ``[..., in, r], [..., in, out] -> [..., r, out]``, float32 up."""
    return jnp.einsum(
        "...ir,...io->...ro",
        basis,
        matrix.astype(jnp.promote_types(matrix.dtype, basis.dtype)),
        precision=PRECISION,
    )


def lift(basis: chex.Array, coeffs: chex.Array) -> chex.Array:
    """``U C``: ``[..., in, r], [..., r, out] -> [..., in, out]``."""
    return jnp.einsum("...ir,...ro->...io", basis, coeffs, precision=PRECISION)


def gram(matrix: chex.Array) -> chex.Array:
    """``G G^T``: ``[..., in, out] -> [..., in, in]``."""
    return jnp.einsum("...io,...jo->...ij", matrix, matrix, precision=PRECISION)


def merge_gram(
    basis: chex.Array, energy: chex.Array, new_gram: chex.Array
) -> tuple[chex.Array, chex.Array]:
    """The leading eigenvectors of ``U diag(e) U^T + Gram``, as many as U has columns.

    Args:
      basis: ``[..., in, r]``.
      energy: ``[..., r]``.
      new_gram: ``[..., in, in]``, symmetric positive semi-definite.

    Returns:
      The new basis and its energies; columns of negligible energy are zero.
    """
    r = basis.shape[-1]
    total = lift(basis * energy[..., None, :], jnp.swapaxes(basis, -1, -2)) + new_gram
    values, vectors = decompositions.eigh(total)
    return _leading(vectors[..., ::-1], values[..., ::-1], r)


def merge_factor(
    basis: chex.Array, energy: chex.Array, factor: chex.Array
) -> tuple[chex.Array, chex.Array]:
    """As ``merge_gram`` with ``Gram = F F^T``, F ``[..., in, m]``; never forms it."""
    r = basis.shape[-1]
    stacked = jnp.concatenate([basis * jnp.sqrt(energy)[..., None, :], factor], axis=-1)
    vectors, singular, _ = decompositions.svd(stacked)
    return _leading(vectors, singular**2, r)


def nystrom_factor(sketch: chex.Array, test: chex.Array) -> chex.Array:
    """A factor F with ``F F^T`` near a positive semi-definite A, from ``A Omega``.

    The one-pass Nystrom approximation ``(A Omega) (Omega^T A Omega)^+ (A Omega)^T``,
    shifted by a rounding-sized multiple of the identity for a safe Cholesky factor.

    Args:
      sketch: ``A Omega``, ``[..., in, m]``.
      test: ``Omega``, ``[..., in, m]``.

    Returns:
      F, ``[..., in, m]``; zero if A is zero.

    References:
      Tropp et al, `Fixed-Rank Approximation of a Positive-Semidefinite Matrix from
      Streaming Data <https://arxiv.org/abs/1706.05736>`_, 2017
    """
    norm = jnp.sqrt(jnp.sum(sketch**2, axis=(-2, -1), keepdims=True))
    eps = jnp.finfo(sketch.dtype).eps
    shift = jnp.sqrt(jnp.asarray(sketch.shape[-2], sketch.dtype)) * eps * norm
    shifted = sketch + shift * test
    core = jnp.einsum("...im,...in->...mn", test, shifted, precision=PRECISION)
    core = (core + jnp.swapaxes(core, -1, -2)) / 2
    m = core.shape[-1]
    safe = jnp.where(norm > 0, core, jnp.eye(m, dtype=core.dtype))
    lower = decompositions.cholesky(safe)
    factor = decompositions.solve_lower(lower, shifted.mT).mT
    u, s, _ = decompositions.svd(factor)
    s = jnp.sqrt(jnp.maximum(s**2 - shift[..., 0], 0.0))
    return jnp.where(norm > 0, u * s[..., None, :], 0.0)


def keep_energy(
    basis: chex.Array, energy: chex.Array, total: chex.Array, threshold: chex.Array
) -> tuple[chex.Array, chex.Array]:
    """Zeroes the columns beyond those that hold ``threshold`` of the total energy.

    The rank rule: the least k whose k leading energies reach ``threshold * total``; all
    columns if they fall short of it.
    """
    keep = energy_before(energy) < threshold * total[..., None]
    return basis * keep[..., None, :], energy * keep


def drop_rows(basis: chex.Array, alive: chex.Array) -> chex.Array:
    """A basis with rows of exact zeros, where they are zero but for rounding.

    Args:
      basis: ``[..., in, r]``, columns orthonormal or zero.
      alive: Bool ``[..., in]``, which rows stay.

    Returns:
      The basis. A weak column may have been rounding for a good part: what is left of
      it is brought to length one again, or to zero if it is less than half.
    """
    basis = jnp.where(alive[..., None], basis, 0)
    length = jnp.linalg.norm(basis, axis=-2, keepdims=True)
    # Others keep their bits.
    whole, left = length > 0.999, length > 0.5
    return jnp.where(whole, basis, jnp.where(left, basis / (length + ~left), 0))


def energy_before(energy: chex.Array) -> chex.Array:
    """The sum of all energies before each, ``[..., r]``; zero before the first.

    Not the running sum less the energy itself: fused with the square that made it, that
    difference is not zero but a rounding error of either sign.
    """
    running = jnp.cumsum(energy, axis=-1)
    return jnp.concatenate([jnp.zeros_like(energy[..., :1]), running[..., :-1]], -1)


def _leading(vectors, values, r):
    values = jnp.maximum(values, 0.0)
    largest = jnp.max(values, axis=-1, keepdims=True)
    # Below this, an eigenvector of a float32 matrix is rounding noise.
    floor = largest * vectors.shape[-2] * jnp.finfo(values.dtype).eps
    keep = (values > floor)[..., :r]
    return vectors[..., :r] * keep[..., None, :], values[..., :r] * keep
