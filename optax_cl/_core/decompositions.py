"""Matrix decompositions that go through a stack of matrices safely on a CPU.

``jax.numpy.linalg`` gives a whole stack to one LAPACK call. On a CPU that call spreads
the matrices over the threads that all devices of a process share, and waits for them:
with two devices (fake ones, or the cores of a sharded run) the calls of both can wait
for each other for ever. Here a CPU takes the matrices one after the other, also those
of a ``vmap`` outside. Accelerators get the whole stack.

Values are those of ``jax.numpy.linalg``, and so are derivatives.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp


def one_by_one(decompose: Callable[..., Any]) -> Callable[..., Any]:
    """A function of matrices, ``[..., m, n]`` each, that a CPU calls for one at a time.

    Args:
      decompose: Takes arrays with equal leading axes, or with none.

    Returns:
      A function with the same arguments and results.
    """
    single = jax.custom_batching.sequential_vmap(decompose)

    def on_cpu(*stacks):
        function = single
        for _ in range(stacks[0].ndim - 2):
            function = jax.vmap(function)
        return function(*stacks)

    @jax.custom_jvp
    def on_any(*stacks):
        return jax.lax.platform_dependent(*stacks, cpu=on_cpu, default=decompose)

    # A function that is mapped one by one has no derivative of its own.
    @on_any.defjvp
    def _(primals, tangents):
        return jax.jvp(decompose, primals, tangents)

    return on_any


_svd = one_by_one(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)))
_eigh = one_by_one(lambda x: tuple(jnp.linalg.eigh(x)))
_qr = one_by_one(lambda x: tuple(jnp.linalg.qr(x)))
_inv = one_by_one(jnp.linalg.inv)
_cholesky = one_by_one(jnp.linalg.cholesky)
_solve_lower = one_by_one(
    functools.partial(jax.lax.linalg.triangular_solve, left_side=True, lower=True)
)
_solve_transposed = one_by_one(
    functools.partial(
        jax.lax.linalg.triangular_solve, left_side=True, lower=True, transpose_a=True
    )
)


def svd(x: chex.Array) -> tuple[chex.Array, chex.Array, chex.Array]:
    """``x = U diag(s) V^T``, thin: ``[..., m, k], [..., k], [..., k, n]``."""
    return _svd(x)


def eigh(x: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Eigenvalues ``[..., n]``, smallest first, and vectors ``[..., n, n]``."""
    return _eigh(x)


def qr(x: chex.Array) -> tuple[chex.Array, chex.Array]:
    """``x = Q R``, thin: ``[..., m, k], [..., k, n]``."""
    return _qr(x)


def inv(x: chex.Array) -> chex.Array:
    """The inverse, ``[..., n, n]``."""
    return _inv(x)


def cholesky(x: chex.Array) -> chex.Array:
    """The lower triangular L with ``x = L L^T``, ``[..., n, n]``."""
    return _cholesky(x)


def solve_lower(lower: chex.Array, x: chex.Array) -> chex.Array:
    """``L^-1 x``: ``[..., n, n], [..., n, m] -> [..., n, m]``."""
    return _solve_lower(lower, x)


def solve_transposed(lower: chex.Array, x: chex.Array) -> chex.Array:
    """``L^-T x``: ``[..., n, n], [..., n, m] -> [..., n, m]``."""
    return _solve_transposed(lower, x)
