"""PiSSA: adapters that hold the principal part of the weights."""

import chex
import jax.numpy as jnp

from optax_cl.lora._absorb import (
    Start,
    absorb,
    check_each,
    check_svd,
    factor_dtype,
    per_target,
    singular_vectors,
)
from optax_cl.lora._adapters import LoRA, Targets, kernels


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
        lambda w: jnp.isfinite(w).all((-2, -1)) & (w != 0).any((-2, -1)),
        "the kernel is zero or not finite, so it has no principal part. Initialise it, "
        "or leave it out of `targets`.",
    )

    def make(target, kernel):
        left, s, right = singular_vectors(
            kernel.astype(factor_dtype(kernel)), target.rank, svd, key
        )
        root = jnp.sqrt(s / target.scale)
        return LoRA(a=left * root[..., None, :], b=root[..., None] * right)

    adapters = per_target(targets, make, weights)
    return Start(absorb(targets, params, adapters), adapters)
