"""Starts of balanced adapters: directions in which a task's gradient is largest."""

import functools
import re
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks, decompositions
from optax_cl._core.orthonormal import off_memory
from optax_cl.lora import stiefel
from optax_cl.lora._adapters import Spectral
from optax_cl.lora._checks import check_directions, check_finite
from optax_cl.lora._targets import Targets


def eblora_init(
    targets: Targets,
    gradients: Mapping[str, chex.Array],
    memory: Mapping[str, chex.Array] | None = None,
    *,
    magnitude: chex.Numeric | tuple[chex.Numeric, chex.Numeric] = 0.02,
) -> dict[str, Spectral]:
    r"""Starts adapters along a task's gradient, off the memory of past tasks.

    With G ``[in, out]`` the gradient with respect to a kernel and M the memory,

    .. math:: (I - M M^\top)\, G \approx V \Sigma U^\top \quad\text{(rank r)}, \qquad
       s = -|s_0| ,

    so that the start itself is a step down the gradient, and so is the first move of s:
    :math:`\partial L / \partial s = c \operatorname{tr} \Sigma \ge 0`. Where the
    gradient has less than r directions off the memory (or, inside jit, is zero or not
    finite), orthonormal directions off the memory are filled in; they are the same in
    each call.

    The model with fresh adapters computes :math:`W + c\,s\,V U^\top`, not W; with
    ``magnitude=0`` it computes W, and only s moves in the first step.

    Args:
      targets: The adapted kernels.
      gradients: ``{path: [*batch, in, out]}`` on the new task.
      memory: ``{path: [*batch, in, p]}`` from ``lora.memory(opt_state)``; None, or a
        path that is missing, restricts nothing.
      magnitude: :math:`s_0`, of which only the absolute value counts: one for all, or
        a pair, for the first layer and the last, with even steps between. Layers are
        the positions along the (first) batch axis of stacked kernels; else the first
        whole number in the path (``layers/3/q/kernel``), counted from the smallest to
        the largest that occur. A single layer gets the first of the pair.

    Returns:
      ``{path: Spectral}`` in float32 with one magnitude per matrix. For one per column,
      broadcast ``s`` to ``[*batch, r]``.

    Raises:
      ValueError: For gradients or memories that do not fit, gradients that are zero or
        not finite (outside jit), a memory that leaves no room, or a pair of magnitudes
        where a path tells no layer.

    **Cost.** One singular value decomposition of ``[in, out]`` per matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import lora
      >>> params = {"kernel": jnp.zeros((3, 2))}
      >>> chosen = lora.targets(params, {"kernel": 1}, alpha=1.0)
      >>> gradient = jnp.array([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
      >>> start = lora.eblora_init(chosen, {"kernel": gradient})
      >>> print(lora.product(start["kernel"]).round(3) + 0.0)
      [[-0.02  0.  ]
       [ 0.    0.  ]
       [ 0.    0.  ]]

    References:
      `Spectral Imbalance Causes Forgetting in Low-Rank Continual Adaptation
      <https://arxiv.org/abs/2602.00722>`_, 2026

    Differs from the released code:
      1. Its magnitudes are 0 or run from 0.002 to 0.008 over the layers.
      2. It divides by the number of layers less one.
      3. Exact instead of randomized decomposition, nowhere in half precision.
    """
    if not isinstance(memory, Mapping | None):
        raise TypeError(
            "`memory` must map paths to bases, as `lora.memory(opt_state)` gives them; "
            f"got {type(memory).__name__}."
        )
    shares = _depths(targets, isinstance(magnitude, tuple))
    first, last = magnitude if isinstance(magnitude, tuple) else (magnitude, magnitude)
    for name, value in (("magnitude", first), ("magnitude", last)):
        checks.check_number(name, value)
    adapters = {}
    for path, target in targets.items():
        gradient = _gradient(path, gradients, target.matrix_shape)
        *batch, fan_in, _ = target.matrix_shape
        basis = None if memory is None else memory.get(path)
        basis = jnp.zeros((*batch, fan_in, 0)) if basis is None else basis
        _check_memory(path, basis, target)
        u, v = _directions(gradient, basis, target.rank)
        s = -jnp.abs(first + (last - first) * shares[path])
        adapters[path] = Spectral(jnp.broadcast_to(s, batch).astype(jnp.float32), u, v)
    return adapters


def _gradient(path, gradients, shape):
    if path not in gradients or jnp.shape(gradients[path]) != shape:
        got = jnp.shape(gradients[path]) if path in gradients else "nothing"
        raise ValueError(
            f"`gradients` must map the path of every target to a matrix [*batch, in, "
            f"out]; at `{path}` expected shape {shape}, got {got}."
        )
    matrix = {path: gradients[path]}
    check_finite("`gradients`", matrix)
    check_directions(matrix)
    return jnp.asarray(gradients[path], jnp.float32)


def _check_memory(path, basis, target):
    *batch, fan_in, _ = target.matrix_shape
    if jnp.shape(basis)[:-1] != (*batch, fan_in):
        raise ValueError(
            f"`memory` must map paths to bases [*batch, in, p]; at `{path}` expected "
            f"shape {(*batch, fan_in, 'p')}, got {jnp.shape(basis)}."
        )
    if basis.shape[-1] + target.rank > fan_in:
        raise ValueError(
            f"`memory` has {basis.shape[-1]} columns at `{path}`, which leaves no room "
            f"for {target.rank} directions in {fan_in} dimensions."
        )


@functools.partial(jax.jit, static_argnums=2)
def _directions(gradient, basis, rank):
    """``U [*batch, out, r]`` and ``V [*batch, in, r]``, both orthonormal."""
    finite = jnp.all(jnp.isfinite(gradient), axis=(-2, -1), keepdims=True)
    gradient = jnp.where(finite, gradient, 0)
    size = jnp.max(jnp.abs(gradient), axis=(-2, -1), keepdims=True)
    gradient = gradient / jnp.where(size > 0, size, 1)
    rest = off_memory(off_memory(gradient, basis), basis)
    left, singular, right = decompositions.svd(rest)
    norm = jnp.sqrt(jnp.sum(gradient**2, axis=(-2, -1)))[..., None]
    noise = norm * gradient.shape[-2] * jnp.finfo(jnp.float32).eps
    keep = (singular > noise)[..., None, :rank]
    # Directions that are missing are zero columns, which a polar step fills in, off the
    # memory; it also takes out what rounding left in it.
    v = stiefel.polar(left[..., :rank] * keep, memory=basis)
    u = stiefel.polar(jnp.swapaxes(right, -1, -2)[..., :rank] * keep)
    return u, v


def _depths(targets: Targets, needed: bool) -> dict[str, chex.Array | float]:
    """How deep each kernel lies: 0 for the first layer, 1 for the last."""
    shares: dict[str, chex.Array | float] = {}
    layers = {}
    for path, target in targets.items():
        batch = target.matrix_shape[:-2]
        number = re.search(r"(?<![^/_.\[])\d+|(?<=[a-z])\d+", path)
        if batch:
            along = jnp.linspace(0.0, 1.0, batch[0])
            shares[path] = along.reshape(batch[0], *[1] * (len(batch) - 1))
        elif number:
            layers[path] = int(number[0])
        elif needed and len(targets) > 1:
            raise ValueError(
                "`magnitude` is a pair, for the first and the last layer, but the path "
                f"`{path}` has no whole number that says which it is. Pass one number, "
                "or scale `s` of the adapters yourself."
            )
        else:
            shares[path] = 0.0
    low, high = min(layers.values(), default=0), max(layers.values(), default=0)
    return shares | {
        path: (number - low) / max(high - low, 1) for path, number in layers.items()
    }
