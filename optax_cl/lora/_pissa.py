"""PiSSA: adapters that hold the principal part of the weights."""

import functools

import chex
import jax
import jax.numpy as jnp

from optax_cl.lora._absorb import (
    Start,
    absorb,
    check_svd,
    factor_dtype,
    per_target,
    singular_vectors,
)
from optax_cl.lora._adapters import LoRA
from optax_cl.lora._checks import check_each
from optax_cl.lora._targets import Targets, kernels


def pissa_init(
    targets: Targets,
    params: chex.ArrayTree,
    *,
    svd: str = "auto",
    key: chex.PRNGKey | None = None,
) -> Start:
    r"""Moves the principal part of the weights into the adapters.

    With a kernel ``[in, out]`` as :math:`W = V \Sigma\, U^\top` and c the scale,

    .. math::

        A = V_{1..r} (\Sigma_{1..r} / c)^{1/2}, \qquad
        B = (\Sigma_{1..r} / c)^{1/2} U_{1..r}^\top, \qquad
        W_{\text{frozen}} = W - c\,A B

    so that the best approximation of rank r is trained and the rest is frozen.

    **Placement.** Once, before the optimizer is made; not a gradient transformation.

    Args:
      targets: The kernels that get adapters, from :func:`targets`.
      params: Parameters of the model.
      svd: ``"exact"``; ``"randomized"``, a range finder of twice the rank with four
        power iterations; or ``"auto"``, exact up to ``min(in, out) = 1024``.
      key: For the randomized range finder; None is a fixed key.

    Returns:
      ``Start``.

    Raises:
      ValueError: If a kernel is zero or not finite (outside jit): its adapter would be
        zero, and could never train.

    Cost. One SVD a kernel, ``O(in * out * min(in, out))`` exact and ``O(in * out * r)``
    randomized. Memory: one more copy of the targeted kernels.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import lora
      >>> params = {"kernel": jnp.diag(jnp.array([9.0, 4.0, 1.0]))}
      >>> chosen = lora.targets(params, {"kernel": 1}, alpha=1.0)
      >>> start = lora.pissa_init(chosen, params)
      >>> print(start.params["kernel"].diagonal(), start.adapters["kernel"].a.ravel())
      [0. 4. 1.] [3. 0. 0.]

    References:
      Meng et al, `PiSSA: Principal Singular Values and Singular Vectors Adaptation of
      Large Language Models <https://arxiv.org/abs/2404.02948>`_, 2024
    """
    check_svd(svd)
    weights = kernels(targets, params)
    check_each(
        weights,
        _is_finite_and_nonzero,
        "the kernel is zero or not finite, so it has no principal part. Initialise it, "
        "or leave it out of `targets`.",
    )

    def make(target, kernel):
        return _adapter(kernel, target.scale, target.rank, svd, key)

    adapters = per_target(targets, make, weights)
    return Start(absorb(targets, params, adapters), adapters)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _adapter(kernel, scale, rank, svd, key):
    left, s, right = singular_vectors(
        kernel.astype(factor_dtype(kernel)), rank, svd, key
    )
    root = jnp.sqrt(s / scale)
    return LoRA(a=left * root[..., None, :], b=root[..., None] * right)


@jax.jit
def _is_finite_and_nonzero(matrix):
    axes = (-2, -1)
    return jnp.isfinite(matrix).all(axes) & (matrix != 0).any(axes)
