"""The start of a frozen input side: where past tasks are not."""

import functools
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_cl._core import decompositions
from optax_cl._core.orthonormal import off_memory
from optax_cl.lora._adapters import Adapters, LoRA
from optax_cl.lora._checks import check_each, check_finite
from optax_cl.lora._targets import Targets


def frozen_a_init(
    targets: Targets,
    matrices: Mapping[str, chex.Array],
    memory: Mapping[str, chex.Array] | None = None,
    *,
    scale: chex.Numeric = 1.0,
) -> Adapters:
    r"""Adapters whose ``a`` reads the strongest new directions off the memory.

    The columns of ``a`` are the r leading left singular vectors of :math:`(I - M
    M^\top) F`, times ``scale``, and ``b`` is zero, so the model is unchanged. For

    * F the task's gradients (``lora.mean_gradients``) this is KeepLoRA's start;
    * F the covariances of its inputs (``lora.input_covariances``) and ``scale =
      3 ** -0.5``, InfLoRA's.

    Columns are orthonormal and orthogonal to M, to rounding. Where F has fewer than r
    directions off the memory (none, when M holds all of them), a fixed draw of random
    ones, off the memory too, fills up.

    Args:
      targets: The kernels that get adapters, from ``lora.targets``.
      matrices: F, ``{path: [*batch, in, k]}``.
      memory: M, ``{path: [*batch, in, p]}``, from ``lora.memory``; None for none.
      scale: Length of the columns of ``a``.

    Returns:
      ``{path: LoRA}`` in float32.

    Raises:
      ValueError: If matrices or bases are missing or do not fit; outside jit, if
        matrices are zero or not finite (inside jit the random directions take over), or
        the memory leaves fewer than r directions.

    Cost. One SVD of ``[in, k]`` and one QR of ``[in, r]`` per kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import lora
      >>> params = {"kernel": jnp.zeros((3, 2))}
      >>> chosen = lora.targets(params, {"kernel": 1}, alpha=1.0)
      >>> gradients = {"kernel": jnp.array([[9.0, 0.0], [0.0, 5.0], [0.0, 0.0]])}
      >>> memory = {"kernel": jnp.array([[1.0], [0.0], [0.0]])}  # protects input 0
      >>> adapters = lora.frozen_a_init(chosen, gradients, memory)
      >>> print(jnp.abs(adapters["kernel"].a[:, 0]))
      [0. 1. 0.]

    References:
      `KeepLoRA <https://arxiv.org/abs/2601.19659>`_, 2026

      Liang and Li, `InfLoRA <https://arxiv.org/abs/2404.00228>`_, 2024
    """
    adapters = {}
    for path, target in targets.items():
        *batch, fan_in, fan_out = target.matrix_shape
        f = _entry("matrices", matrices, path, (*batch, fan_in))
        check_finite("`matrices`", {path: f})
        check_each(
            {path: f},
            lambda f: jnp.any(f != 0, axis=(-2, -1)),
            "`matrices` holds zero, which has no directions to start from. Does the "
            "loss read this kernel?",
        )
        if memory is None:
            basis = jnp.zeros((*batch, fan_in, 1), jnp.float32)
        else:
            basis = _entry("memory", memory, path, (*batch, fan_in))
        _check_room(path, basis, target.rank)
        a = _leading_off(basis, f.astype(jnp.float32), target.rank)
        adapters[path] = LoRA(
            a=scale * a, b=jnp.zeros((*batch, target.rank, fan_out), jnp.float32)
        )
    return adapters


@functools.partial(jax.jit, static_argnames="r")
def _leading_off(memory: chex.Array, f: chex.Array, r: int) -> chex.Array:
    """The r leading left singular vectors of ``(I - M M^T) F``, filled up if fewer."""
    finite = jnp.all(jnp.isfinite(f), axis=(-2, -1), keepdims=True)
    f = jnp.where(finite, f, 0)
    # Only directions matter, and squares of a small gradient would underflow.
    size = jnp.max(jnp.abs(f), axis=(-2, -1), keepdims=True)
    f = f / jnp.where(size > 0, size, 1)
    vectors, singular, _ = decompositions.svd(_off(f, memory))
    floor = jnp.linalg.norm(f, axis=(-2, -1)) * f.shape[-2] * jnp.finfo(f.dtype).eps
    found = min(r, vectors.shape[-1])
    keep = (singular > floor[..., None])[..., :found]
    missing = [(0, 0)] * (keep.ndim - 1) + [(0, r - found)]
    keep = jnp.pad(keep, missing)[..., None, :]
    vectors = jnp.pad(vectors[..., :found], [(0, 0), *missing])
    # Gram and Schmidt leave the first columns, which are orthonormal, as they are.
    drawn = jax.random.normal(jax.random.key(0), vectors.shape, vectors.dtype)
    q, upper = decompositions.qr(_off(jnp.where(keep, vectors, drawn), memory))
    signs = jnp.where(jnp.diagonal(upper, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    # Off the memory once more: random columns had most of their length taken out.
    return off_memory(q * signs[..., None, :], memory)


def _off(matrix, memory):
    # Twice, since one projection leaves rounding of the size of what came in.
    return off_memory(off_memory(matrix, memory), memory)


def _entry(name, given, path, lead):
    if path not in given:
        raise ValueError(
            f"`{name}` must have an entry for every target; there is none for "
            f"`{path}` among {sorted(given)}."
        )
    x = jnp.asarray(given[path])
    if x.ndim != len(lead) + 1 or x.shape[:-1] != lead:
        raise ValueError(
            f"`{name}` must hold matrices [*batch, in, columns]; at `{path}` expected "
            f"{lead} in front, got shape {x.shape}."
        )
    return x


def _check_room(path, basis, r):
    if isinstance(basis, jax.core.Tracer):
        return
    used = np.max(np.sum(np.any(np.asarray(basis) != 0, axis=-2), axis=-1))
    if basis.shape[-2] - used < r:
        raise ValueError(
            f"the memory holds {used} of the {basis.shape[-2]} directions of `{path}`: "
            f"there are no {r} left for an adapter. Use a smaller rank, `memory_rank` "
            "or `threshold`."
        )
