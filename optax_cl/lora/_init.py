"""Starts whose product is zero: they leave the weights as they are."""

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks, decompositions
from optax_cl.lora._absorb import Start, factor_dtype, per_target
from optax_cl.lora._adapters import LoRA
from optax_cl.lora._targets import Targets, kernels


def lora_init(targets: Targets, params: chex.ArrayTree, key: chex.PRNGKey) -> Start:
    r"""The plain start of LoRA: a random input side and a zero output side.

    .. math:: A_{ij} \sim U(-in^{-1/2},\ in^{-1/2}), \qquad B = 0

    the uniform law of the published code (Kaiming with slope :math:`\sqrt5`). The model
    is unchanged bit for bit. In the first step only B moves.

    Args:
      targets: The kernels that get adapters, from :func:`targets`.
      params: Parameters of the model; only shapes and dtypes are read.
      key: Random key.

    Returns:
      ``Start``, whose ``params`` are the given ones.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_cl import lora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> chosen = lora.targets(params, {"kernel": 2}, alpha=4.0)
      >>> adapter = lora.lora_init(chosen, params, jax.random.key(0)).adapters["kernel"]
      >>> adapter.a.shape, float(abs(adapter.b).max())
      ((4, 2), 0.0)

    References:
      Hu et al, `LoRA: Low-Rank Adaptation of Large Language Models
      <https://arxiv.org/abs/2106.09685>`_, 2021
    """

    def uniform(key, shape, dtype):
        bound = shape[-2] ** -0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return _zero_product(targets, params, key, uniform)


def orthogonal_init(
    targets: Targets, params: chex.ArrayTree, key: chex.PRNGKey
) -> Start:
    r"""As :func:`lora_init`, with orthonormal directions on the input side.

    .. math:: A^\top A = I_r, \qquad B = 0

    A is uniform over all such matrices. The first step of SGD then moves the kernel by
    the gradient projected on r random input directions, each followed equally well.

    Args:
      targets: The kernels that get adapters, from :func:`targets`.
      params: Parameters of the model; only shapes and dtypes are read.
      key: Random key.

    Returns:
      ``Start``, whose ``params`` are the given ones.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_cl import lora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> chosen = lora.targets(params, {"kernel": 2}, alpha=4.0)
      >>> start = lora.orthogonal_init(chosen, params, jax.random.key(0))
      >>> a = start.adapters["kernel"].a
      >>> print(jnp.abs(a.T @ a - jnp.eye(2)).max() < 1e-6)
      True
    """

    def orthonormal(key, shape, dtype):
        q, r = decompositions.qr(jax.random.normal(key, shape, dtype))
        # Without these signs the law of Q depends on how it was computed.
        signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
        return q * signs[..., None, :].astype(dtype)

    return _zero_product(targets, params, key, orthonormal)


def _zero_product(targets, params, key, draw):
    weights = kernels(targets, params)
    checks.check_key("key", key)
    keys = dict(zip(targets, jax.random.split(key, len(targets)), strict=True))

    def make(target, kernel, key):
        *batch, fan_in, fan_out = kernel.shape
        dtype = factor_dtype(kernel)
        return LoRA(
            a=draw(key, (*batch, fan_in, target.rank), dtype),
            b=jnp.zeros((*batch, target.rank, fan_out), dtype),
        )

    return Start(params, per_target(targets, make, weights, keys))
