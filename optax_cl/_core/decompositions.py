"""Matrix decompositions that go through a stack of matrices safely on a CPU.

``jax.numpy.linalg`` gives a whole stack to one LAPACK call. On a CPU that call spreads
the matrices over the threads that all devices of a process share, and waits for them:
with two devices (fake ones, or the cores of a sharded run) the calls of both can wait
for each other for ever; on a busy machine one alone may take a hundred times as long.
Here a CPU takes the matrices one after the other, also those of a ``vmap`` outside.
Accelerators get the whole stack.

Values are those of ``jax.numpy.linalg``, and so are derivatives.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp


def _one_by_one(decompose: Callable[[chex.Array], Any]) -> Callable[..., Any]:
    single = jax.custom_batching.sequential_vmap(decompose)

    def on_cpu(stack):
        function = single
        for _ in range(stack.ndim - 2):
            function = jax.vmap(function)
        return function(stack)

    @jax.custom_jvp
    def on_any(stack):
        return jax.lax.platform_dependent(stack, cpu=on_cpu, default=decompose)

    # A function that is mapped one by one has no derivative of its own.
    @on_any.defjvp
    def _(primals, tangents):
        return jax.jvp(decompose, primals, tangents)

    return on_any


_svd = _one_by_one(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)))
_eigh = _one_by_one(lambda x: tuple(jnp.linalg.eigh(x)))
_qr = _one_by_one(lambda x: tuple(jnp.linalg.qr(x)))
_inv = _one_by_one(jnp.linalg.inv)


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
