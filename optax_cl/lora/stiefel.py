r"""The geometry of matrices with orthonormal columns.

A point of the Stiefel manifold is a tall matrix X, ``[..., d, r]`` with d >= r and
:math:`X^\top X = I`; leading axes stack independent points. With ``memory`` M,
``[..., d, p]``, everything happens in the complement of its columns: points and tangent
vectors satisfy :math:`M^\top X = 0` too. The columns of M are orthonormal or zero, so
that a memory of fixed capacity can fill up without a new compilation.

A step on the manifold is ``retract(x, tangent_project(x, step))``, where ``step`` is
what an optimizer made of ``riemannian_gradient(x, gradient)``. Nothing may come after
the retraction: whatever scales or shifts its result leaves the manifold.

Half precision is computed in float32 and rounded at the end. That rounding leaves a
bfloat16 point orthonormal to some 4e-3 (12 x 3), 1.7e-3 (64 x 8) or 3e-4 (2048 x 32),
and small steps vanish in it: keep a float32 copy where steps matter.

What the caller holds to: ``x`` is orthonormal and off the memory up to rounding;
a factor stored wide, ``[r, d]``, is transposed before it comes here. (The factors of a
``Spectral`` adapter, ``[out, r]`` and ``[in, r]``, are tall whatever the shape of the
kernel, since its rank is at most the smaller side.)
"""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks, decompositions
from optax_cl._core.linalg import coefficients, lift
from optax_cl._core.orthonormal import identity, off_memory, orthonormalize

METRICS = ("euclidean", "canonical")
RETRACTIONS = ("polar", "newton_schulz", "qr", "cayley")
POLARS = ("eigh", "newton_schulz", "svd")


def tangent_project(
    x: chex.Array,
    z: chex.Array,
    *,
    metric: str = "euclidean",
    memory: chex.Array | None = None,
) -> chex.Array:
    r"""Maps a matrix to a tangent vector at ``x``.

    With :math:`Z' = Z - M M^\top Z`,

    .. math::

        \text{euclidean: } Z' - X\,\mathrm{sym}(X^\top Z'), \qquad
        \text{canonical: } Z' - X Z'^\top X.

    Both are tangent: :math:`X^\top\xi + \xi^\top X = 0` and :math:`M^\top\xi = 0`. The
    first is the orthogonal projection. The second is *not* a projection: it doubles the
    rotation inside the span of X, so that twice is not once. (It is how the canonical
    metric turns a gradient into a Riemannian one; some released code applies it to
    steps as well.) Both map :math:`X A`, A symmetric, to zero: decoupled weight decay
    does nothing on the manifold.

    Args:
      x: Points, ``[..., d, r]``.
      z: Any matrices, ``[..., d, r]``.
      metric: ``"euclidean"`` or ``"canonical"``.
      memory: Directions to stay off, ``[..., d, p]``, or None.

    Returns:
      Tangent vectors in the dtype of ``z``. Two products with ``x`` and two with
      ``memory``: ``O(d r (r + p))``.

    Raises:
      ValueError: For shapes that do not fit, wide matrices or an unknown metric.
      TypeError: For dtypes that are not real and floating.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_cl.lora import stiefel
      >>> x = stiefel.random(jax.random.key(0), (6, 2))
      >>> xi = stiefel.tangent_project(x, jnp.ones((6, 2)))
      >>> bool(jnp.allclose(x.T @ xi + xi.T @ x, 0, atol=1e-6))
      True
    """
    checks.check_choice("metric", metric, METRICS)
    _check("x", x, memory)
    _check_like("z", z, x)
    x, z, memory, dtype = _widen(x, z, memory)
    z = off_memory(z, memory)
    inner = coefficients(x, z)
    if metric == "euclidean":
        return (z - lift(x, (inner + inner.mT) / 2)).astype(dtype)
    return (z - lift(x, inner.mT)).astype(dtype)


def riemannian_gradient(
    x: chex.Array,
    g: chex.Array,
    *,
    metric: str = "euclidean",
    memory: chex.Array | None = None,
) -> chex.Array:
    r"""The Riemannian gradient at ``x`` of a function with Euclidean gradient ``g``.

    The tangent vector :math:`\rho` with :math:`\langle\rho, \xi\rangle_X = \langle g,
    \xi\rangle` for every tangent :math:`\xi`. The Euclidean metric is :math:`\langle
    a, b\rangle = \mathrm{tr}(a^\top b)`; the canonical one, :math:`\mathrm{tr}(a^\top
    (I - \tfrac12 X X^\top)\, b)`, counts a rotation inside the span of X half. Both
    gradients have the formulas of :func:`tangent_project`, and both are directions of
    ascent.

    Args:
      x: Points, ``[..., d, r]``.
      g: Euclidean gradients, ``[..., d, r]``.
      metric: ``"euclidean"`` or ``"canonical"``.
      memory: Directions to stay off, ``[..., d, p]``, or None.

    Returns:
      Tangent vectors in the dtype of ``g``.

    Raises:
      ValueError: For shapes that do not fit, wide matrices or an unknown metric.
      TypeError: For dtypes that are not real and floating.

    References:
      Edelman et al, `The Geometry of Algorithms with Orthogonality Constraints
      <https://arxiv.org/abs/physics/9806030>`_, 1998
    """
    return tangent_project(x, g, metric=metric, memory=memory)


def retract(
    x: chex.Array,
    xi: chex.Array,
    *,
    method: str = "polar",
    memory: chex.Array | None = None,
) -> chex.Array:
    r"""Moves from ``x`` along the tangent vector ``xi``, back onto the manifold.

    With :math:`Y = X + \xi` (off the memory):

    * ``"polar"``: the nearest point to Y, :math:`Y (Y^\top Y)^{-1/2}`, by an
      eigendecomposition of the r x r Gram matrix.
    * ``"newton_schulz"``: the same point in matrix products only, for devices where an
      eigendecomposition is slow.
    * ``"qr"``: the Q of Y = Q R with a positive diagonal of R, by a Cholesky
      factor of the Gram matrix.
    * ``"cayley"``: :math:`(I - W/2)^{-1} (I + W/2)\, X` with the skew W that has
      :math:`W X = \xi`, by an r x r solve. It follows the tangent part of ``xi``
      alone.

    All agree with the geodesic of either metric to first order. To second order polar
    follows the geodesic of the Euclidean metric, and Cayley that of the canonical one.

    The result is orthonormal to rounding, at every step anew, so that error does not
    build up over steps; a zero ``xi`` gives ``x``. A tangent ``xi`` never makes Y rank
    deficient. One that isn't tangent may: the missing directions are then filled in
    arbitrarily but reproducibly. A point whose step is not finite stays where it is.

    Args:
      x: Points, ``[..., d, r]``.
      xi: Tangent vectors, ``[..., d, r]``.
      method: One of the four.
      memory: Directions to stay off, ``[..., d, p]`` with ``p + r <= d``, or None.

    Returns:
      Points in the dtype of ``x``. Two products of ``d r^2`` (six for Cayley), an
      ``O(r^3)`` part, and two of ``d r p`` with memory. Ill-conditioned input costs
      about ten times that.

    Raises:
      ValueError: For shapes that do not fit, wide matrices or an unknown method.
      TypeError: For dtypes that are not real and floating.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_cl.lora import stiefel
      >>> x = stiefel.random(jax.random.key(0), (6, 2))
      >>> xi = stiefel.tangent_project(x, 0.1 * jnp.ones((6, 2)))
      >>> bool(stiefel.orthonormality_error(stiefel.retract(x, xi)) < 1e-6)
      True
      >>> bool(stiefel.orthonormality_error(x + xi) < 1e-6)
      False

    References:
      Absil et al, `Optimization Algorithms on Matrix Manifolds
      <https://press.princeton.edu/absil>`_, 2008

      Wen and Yin, `A Feasible Method for Optimization with Orthogonality Constraints
      <https://doi.org/10.1007/s10107-012-0584-1>`_, 2013
    """
    checks.check_choice("method", method, RETRACTIONS)
    _check("x", x, memory)
    _check_like("xi", xi, x)
    dtype = jnp.result_type(x)
    x, xi, memory, _ = _widen(x, xi, memory)
    if method == "cayley":
        # A Cayley transform is orthogonal, so that it hands on the rounding error of
        # `x`, which would build up; a polar step takes it away.
        y, factor = _cayley(x, off_memory(xi, memory)), "newton_schulz"
    else:
        y, factor = x + xi, "eigh" if method == "polar" else method
    return orthonormalize(y, factor, memory=memory, otherwise=x).astype(dtype)


def polar(
    y: chex.Array, *, method: str = "eigh", memory: chex.Array | None = None
) -> chex.Array:
    r"""The nearest matrix with orthonormal columns, :math:`Y (Y^\top Y)^{-1/2}`.

    Nearest in the Frobenius norm, and unique if Y (off the memory) has full rank. If it
    has not, the missing directions are filled in arbitrarily but reproducibly, which is
    still a nearest matrix; one that is not finite counts as zero.

    ``"newton_schulz"`` iterates :math:`Z \leftarrow Z (3 I - Z G Z) / 2` on the Gram
    matrix G, scaled by a bound of its norm, until it converges. (The quintic of the
    Muon optimizer is faster and stops at singular values from 0.68 to 1.13.)

    Whatever the condition, the result is orthonormal to rounding. How near it is to the
    polar factor depends on it, since a Gram matrix squares the condition. The largest
    entry of the error in float32, over 32 matrices of 64 x 8:

    ===================  =====  =====  =====  =====  =====
    condition            1      10     1e2    1e3    1e4
    ===================  =====  =====  =====  =====  =====
    ``"eigh"``           6e-8   5e-7   1e-5   5e-4   2e-3
    ``"newton_schulz"``  6e-8   5e-7   1e-5   7e-4   4e-3
    ``"svd"``            2e-7   6e-7   3e-6   3e-5   2e-4
    ===================  =====  =====  =====  =====  =====

    Args:
      y: Matrices, ``[..., d, r]`` with ``d >= r``.
      method: ``"eigh"``, ``"newton_schulz"`` (matrix products only) or ``"svd"``.
      memory: Directions to stay off, ``[..., d, p]`` with ``p + r <= d``, or None.

    Returns:
      Points in the dtype of ``y``.

    Raises:
      ValueError: For shapes that do not fit, wide matrices or an unknown method.
      TypeError: For dtypes that are not real and floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl.lora import stiefel
      >>> y = jnp.array([[2.0, 0.0], [0.0, -3.0], [0.0, 0.0]])
      >>> stiefel.polar(y).round(3)
      Array([[ 1.,  0.],
             [ 0., -1.],
             [ 0.,  0.]], dtype=float32)
    """
    checks.check_choice("method", method, POLARS)
    _check("y", y, memory)
    dtype = jnp.result_type(y)
    y, _, memory, _ = _widen(y, y, memory)
    return orthonormalize(y, method, memory=memory, otherwise=jnp.zeros_like(y)).astype(
        dtype
    )


def transport(
    x_new: chex.Array, z: chex.Array, *, memory: chex.Array | None = None
) -> chex.Array:
    """Carries tangent vectors (a first moment) over to ``x_new``, by projection.

    Args:
      x_new: The points to carry them to, ``[..., d, r]``.
      z: Tangent vectors at other points, ``[..., d, r]``.
      memory: Directions to stay off, ``[..., d, p]``, or None.

    Returns:
      Tangent vectors at ``x_new``, none longer than it was.

    Raises:
      ValueError: For shapes that do not fit, or wide matrices.
      TypeError: For dtypes that are not real and floating.
    """
    return tangent_project(x_new, z, metric="euclidean", memory=memory)


def orthonormality_error(x: chex.Array) -> chex.Array:
    r"""The largest entry of :math:`|X^\top X - I|` of each matrix, ``[...]``."""
    _check("x", x, None)
    x, _, _, _ = _widen(x, x, None)
    return jnp.max(jnp.abs(coefficients(x, x) - identity(x)), axis=(-2, -1))


def random(
    key: chex.PRNGKey,
    shape: Sequence[int],
    *,
    memory: chex.Array | None = None,
    dtype: Any = jnp.float32,
) -> chex.Array:
    """Draws points uniformly (from the Haar measure), off the memory.

    Args:
      key: A random key.
      shape: ``[..., d, r]``.
      memory: Directions to stay off, ``[..., d, p]`` with ``p + r <= d``, or None.
      dtype: Of the result.

    Returns:
      Points of the given shape.

    Raises:
      ValueError: For shapes that do not fit, or a wide one.
      TypeError: For a dtype that is not real and floating.
    """
    _check_floating("dtype", dtype)
    _check_shape("shape", tuple(shape), memory)
    compute = jnp.promote_types(dtype, jnp.float32)
    normal = jax.random.normal(key, tuple(shape), compute)
    return polar(normal, memory=memory).astype(dtype)


def _cayley(x, xi):
    # With A = skew(X^T xi) and K = xi - X X^T xi, the skew W with W X = X A + K is
    # P xi X^T - X xi^T P, P = I - X X^T / 2. Woodbury's formula makes of I - W/2 a
    # system of size 2r whose upper right block is -I/2; eliminating by it leaves
    #   X' = (2 X + K) (I - A/2 + K^T K / 4)^{-1} - X,
    # where the symmetric part of the r x r matrix is at least I: no step is singular.
    inner = coefficients(x, xi)
    skew = (inner - inner.mT) / 2
    k = xi - lift(x, inner)
    system = identity(x) - skew / 2 + coefficients(k, k) / 4
    return lift(2 * x + k, decompositions.inv(system)) - x


def _widen(x, z, memory):
    """Everything in one dtype, at least float32; and the dtype that ``z`` had."""
    dtype = jnp.promote_types(jnp.result_type(x, z), jnp.float32)
    if memory is not None:
        memory = jnp.asarray(memory, dtype)
    return jnp.asarray(x, dtype), jnp.asarray(z, dtype), memory, jnp.result_type(z)


def _check(name, x, memory):
    _check_floating(name, x)
    _check_shape(name, jnp.shape(x), memory)
    if memory is not None:
        _check_floating("memory", memory)


def _check_floating(name, x):
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`{name}` must be real and floating; got dtype {dtype}.")


def _check_shape(name, shape, memory):
    if len(shape) < 2 or shape[-1] < 1 or shape[-2] < shape[-1]:
        raise ValueError(
            f"`{name}` must be tall, `[..., d, r]` with d >= r >= 1; got shape {shape}."
            " Transpose a factor that is stored wide."
        )
    if memory is None:
        return
    found = jnp.shape(memory)
    *lead, d, r = shape
    if len(found) < 2 or found[-2] != d or found[-1] + r > d:
        raise ValueError(
            f"`memory` must be `[..., d, p]` with the d of `{name}` and p + r <= d, so "
            f"that r directions stay free; got shape {found} for `{name}` of shape "
            f"{shape}."
        )
    axes = zip(reversed(found[:-2]), reversed(lead), strict=False)
    if len(found) > len(shape) or any(m not in (1, n) for m, n in axes):
        raise ValueError(
            f"The leading axes of `memory` must broadcast to those of `{name}`; got "
            f"shape {found} for `{name}` of shape {shape}."
        )


def _check_like(name, z, x):
    _check_floating(name, z)
    if jnp.shape(z) != jnp.shape(x):
        raise ValueError(
            f"`{name}` must have the shape of the points, {jnp.shape(x)}; got "
            f"{jnp.shape(z)}."
        )
