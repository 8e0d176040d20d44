"""LoRA-GA: adapters that start in the singular vectors of the gradient."""

from collections.abc import Mapping

import chex

from optax_cl._core import checks
from optax_cl.lora._absorb import (
    ORDERS,
    Start,
    absorb,
    check_disjoint,
    check_magnitude,
    check_svd,
    gradient_adapters,
)
from optax_cl.lora._checks import check_directions
from optax_cl.lora._gradients import check_gradients
from optax_cl.lora._targets import Targets, kernels


def lora_ga_init(
    targets: Targets,
    params: chex.ArrayTree,
    gradients: Mapping[str, chex.Array],
    *,
    order: str = "ArB2r",
    scaling: str = "stable",
    gamma: float = 16.0,
    svd: str = "auto",
    key: chex.PRNGKey | None = None,
) -> Start:
    r"""Starts adapters in the singular vectors of the mean gradient.

    With the gradient of a kernel ``[in, out]`` as :math:`G = V \Sigma\, U^\top`,

    .. math::

        A = \beta\,V_{1..r}, \qquad B = \beta\,U_{r+1..2r}^\top, \qquad
        \beta = \frac{out^{1/4}}{\sqrt\gamma}

    and the product is taken out of the weights, so that the model is as it was. The
    first step of SGD then changes the kernel by a multiple of the best approximation of
    G of rank 2r, the most that two factors of rank r can follow of it.

    **Placement.** Once, before the optimizer is made; not a gradient transformation.

    Args:
      targets: The kernels that get adapters, from :func:`targets`.
      params: Parameters of the model.
      gradients: ``{path: [*batch, in, out]}``, from :func:`mean_gradients`.
      order: Where the factors start, by the names of the published code, whose A is the
        input side: ``"ArB2r"``, A with the first block of singular vectors and B with
        the second; ``"A2rBr"``, the other way round (as SLICE); ``"ArBr"``, both the
        first.
      scaling: ``"stable"`` as above; ``"loram"`` by the variance of the kernel (as
        SLICE); ``"none"`` leaves the vectors at unit length.
      gamma: Divides the magnitude under ``"stable"``.
      svd: ``"exact"``; ``"randomized"``, a range finder of four times the rank with
        four power iterations; or ``"auto"``, exact up to ``min(in, out) = 1024``.
      key: For the randomized range finder; None is a fixed key.

    Returns:
      ``Start``. Signs of singular vectors are fixed: in each input vector the entry of
      largest magnitude is positive.

    Raises:
      ValueError: If ``2 * rank > min(in, out)`` with disjoint blocks, or a gradient is
        zero or not finite (outside jit, with its path; inside, the directions mean
        nothing, and are never NaN); under ``"loram"``, as :func:`slice_init`.

    Warns (``UserWarning``), outside jit, if a gradient has a rank below the singular
    vectors taken, 2r with disjoint blocks: the vectors beyond it are orthonormal and
    mean nothing, and so they are inside jit.

    Cost. One SVD a kernel, ``O(in * out * min(in, out))`` exact and ``O(in * out * r)``
    randomized. Memory: one more copy of the targeted kernels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_cl import lora
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (6, 5))}
      >>> chosen = lora.targets(params, {"kernel": 2}, alpha=2.0, rslora=True)
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(1), (6, 5))}
      >>> start = lora.lora_ga_init(chosen, params, gradients)
      >>> merged = lora.merge(chosen, start.params, start.adapters)
      >>> print(bool(jnp.allclose(merged["kernel"], params["kernel"], atol=1e-5)))
      True

    References:
      Wang et al, `LoRA-GA: Low-Rank Adaptation with Gradient Approximation
      <https://arxiv.org/abs/2407.05000>`_, 2024
    """
    checks.check_choice("order", order, tuple(ORDERS))
    checks.check_choice("scaling", scaling, ("stable", "loram", "none"))
    checks.check_number("gamma", gamma, low=0.0, open_low=True)
    check_svd(svd)
    check_disjoint(targets, order, "`order='ArBr'`")
    check_gradients("gradients", targets, gradients)
    weights = kernels(targets, params)
    if scaling == "loram":
        check_magnitude(targets, weights)
    check_directions(gradients)

    adapters = gradient_adapters(
        targets,
        weights,
        gradients,
        order=order,
        scaling=scaling,
        gamma=gamma,
        svd=svd,
        key=key,
    )
    return Start(absorb(targets, params, adapters), adapters)
