"""LoRAM: a fixed basis with the magnitude of a data-driven start."""

import functools

import chex
import jax
import jax.numpy as jnp

from optax_cl.lora._absorb import (
    Start,
    absorb,
    check_magnitude,
    factor_dtype,
    per_target,
    scale_like_kernel,
)
from optax_cl.lora._adapters import LoRA
from optax_cl.lora._targets import Targets, kernels


def loram_init(targets: Targets, params: chex.ArrayTree) -> Start:
    r"""Starts adapters in sine waves, as large as the weights suggest; no data needed.

    With :math:`\Phi_m` the first r columns of the orthonormal discrete sine transform
    of size m,

    .. math::

        \Phi_m[i, j] = \sqrt{\tfrac{2}{m+1}}\,
        \sin\frac{(i+1)(j+1)\,\pi}{m+1}, \qquad
        A = \beta\,\Phi_{in}, \quad B = \beta\,\Phi_{out}^\top, \qquad
        \beta = \left(\frac{\log r}{\log\min(in, out)}\,
        \frac{\operatorname{Var} W}{\operatorname{Var} \Phi_{in}\Phi_{out}^\top}
        \right)^{1/4}

    and the product is taken out of the weights, so that the model is as it was.

    **Placement.** Once, before the optimizer is made; not a gradient transformation.

    Args:
      targets: The kernels that get adapters, from :func:`targets`.
      params: Parameters of the model.

    Returns:
      ``Start``. Every kernel of one shape starts in the same directions.

    Raises:
      ValueError: If a rank is 1, or a kernel is constant (outside jit): the magnitude
        would be zero, and the adapter could never train.

    Cost. ``O(in * out * r)`` a kernel. Memory: one more copy of the targeted kernels.

    Example:
      >>> import jax
      >>> from optax_cl import lora
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (6, 5))}
      >>> chosen = lora.targets(params, {"kernel": 2}, alpha=2.0, rslora=True)
      >>> start = lora.loram_init(chosen, params)
      >>> start.adapters["kernel"].a.shape, start.adapters["kernel"].b.shape
      ((6, 2), (2, 5))

    References:
      Zhang et al, `The Primacy of Magnitude in Low-Rank Adaptation
      <https://arxiv.org/abs/2507.06558>`_, 2025
    """
    weights = kernels(targets, params)
    check_magnitude(targets, weights)

    adapters = per_target(targets, lambda t, kernel: _adapter(kernel, t.rank), weights)
    return Start(absorb(targets, params, adapters), adapters)


@functools.partial(jax.jit, static_argnums=1)
def _adapter(kernel, rank):
    *batch, fan_in, fan_out = kernel.shape
    a, b = (_sines(m, rank, factor_dtype(kernel)) for m in (fan_in, fan_out))
    vectors = LoRA(
        a=jnp.broadcast_to(a, (*batch, fan_in, rank)),
        b=jnp.broadcast_to(b.T, (*batch, rank, fan_out)),
    )
    return scale_like_kernel(vectors, kernel)


def _sines(m, rank, dtype):
    """The first columns of the orthonormal discrete sine transform, ``[m, rank]``."""
    # The argument is reduced in integers: float32 would lose it at (i+1)(j+1) ~ 1e6.
    turns = (jnp.arange(1, m + 1)[:, None] * jnp.arange(1, rank + 1)[None, :]) % (
        2 * (m + 1)
    )
    angle = turns.astype(dtype) * (jnp.pi / (m + 1))
    return (2.0 / (m + 1)) ** 0.5 * jnp.sin(angle)
