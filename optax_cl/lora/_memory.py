r"""The memory of past tasks' gradient space: a basis on the fan-in side of each kernel.

Its columns are orthonormal or zero. An update of a kernel W ``[in, out]`` whose fan-in
side is orthogonal to the basis M leaves what the layer computes from inputs in the span
of M exactly as it was: :math:`x \in \operatorname{span} M` gives :math:`x^\top \Delta W
= 0`.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import (
    checks,
    decompositions,
    linalg,
    orthonormal,
    statistics,
    tasks,
)
from optax_cl._core.orthonormal import off_memory
from optax_cl.lora._targets import Targets, kernels, replace_kernels

STATISTICS = ("mean", "batches")
OVERFLOWS = ("strongest", "error")


class GradientMemory(NamedTuple):
    """Bases of fixed capacity; trees like the adapters.

    There is one entry for each restricted factor, and a ``MaskedNode`` elsewhere.
    """

    basis: chex.ArrayTree  # M, float32 [*batch, in, p]; columns orthonormal or zero
    count: chex.ArrayTree  # int32 [*batch], columns in use; they stand first


def memory(opt_state: optax.OptState) -> dict[str, chex.Array]:
    """The bases that an optimizer state protects, by the path of their kernel.

    Args:
      opt_state: Any optimizer state with a method that keeps a memory of gradients.

    Returns:
      ``{path: [*batch, in, p]}``, float32, columns orthonormal or zero; empty if such
      a method runs without a memory.

    Raises:
      ValueError: If two memories hold the same kernel.
    """

    def is_memory(node):
        return isinstance(node, GradientMemory)

    bases: dict[str, chex.Array] = {}
    for node in jax.tree.leaves(opt_state, is_leaf=is_memory):
        if not is_memory(node):
            continue
        for path, basis in jax.tree_util.tree_leaves_with_path(node.basis):
            name = path[-2].key
            if name in bases:
                raise ValueError(f"`opt_state` holds two memories for `{name}`.")
            bases[name] = basis
    return bases


@functools.cache
def memory_pass(targets: Targets, statistic: str = "mean") -> tasks.Pass:
    r"""The pass that streams the gradient with respect to the kernels under adapters.

    The loss reads W + update(adapter), so the gradient with respect to the frozen W is
    that with respect to the adapted kernel. ``collect`` needs ``frozen=``, the tree
    that ``targets`` were chosen from.

    Args:
      targets: The adapted kernels.
      statistic: ``"mean"``: the gradient of the mean loss over all examples.
        ``"batches"``: a factor F of :math:`F F^\top = \sum_b G_b G_b^\top`,
        :math:`G_b` the gradient of the summed loss of batch b. Near an optimum the mean
        is small and hardly of more than its noise; gradients of batches are not.
        Directions that hold less than about 1e-6 of the largest one's energy are lost
        in rounding.

    Returns:
      A ``Pass`` with result ``{path: float32 [*batch, in, out]}`` (``[*batch, in, in]``
      for ``"batches"``); the same object for the same arguments.
    """
    checks.check_choice("statistic", statistic, STATISTICS)

    def init(state, params):
        del state, params
        sums = {}
        for path, target in targets.items():
            *batch, fan_in, fan_out = target.matrix_shape
            width = fan_out if statistic == "mean" else fan_in
            sums[path] = jnp.zeros((*batch, fan_in, width), jnp.float32)
        return {"sum": sums, "examples": jnp.zeros([], jnp.float32)}

    def step(acc, data):
        gradients = kernel_gradients(targets, data)
        if statistic == "batches":
            gradients = {path: linalg.gram(g) for path, g in gradients.items()}
        return {
            "sum": {path: acc["sum"][path] + g for path, g in gradients.items()},
            "examples": acc["examples"] + data.weights.sum(),
        }

    def finish(acc, state, earlier):
        del state, earlier
        if statistic == "mean":
            return {path: g / acc["examples"] for path, g in acc["sum"].items()}
        return {path: factor(gram) for path, gram in acc["sum"].items()}

    return tasks.Pass(f"kernel_gradients/{statistic}", init, step, finish)


def kernel_gradients(targets: Targets, data: tasks.PassInput) -> dict[str, chex.Array]:
    """Gradient of a batch's summed loss with respect to the frozen kernels, float32."""
    loss = tasks.require(data.task, "loss", "a memory of gradients")
    if data.frozen is None:
        raise ValueError(
            "a memory of gradients needs the kernels under the adapters, but `frozen` "
            "is None. Call `collect(opt_state, adapters, batches, task=task, "
            "frozen=params, key=key)`, with task functions that take `(adapters, "
            "params)` where they otherwise take parameters."
        )
    statistics.check_loss(loss, data)

    def summed(matrices):
        frozen = replace_kernels(targets, data.frozen, matrices)
        return jnp.sum(data.weights * loss(data.params, data.batch, frozen=frozen))

    gradients = jax.grad(summed)(kernels(targets, data.frozen))
    return {path: g.astype(jnp.float32) for path, g in gradients.items()}


@jax.jit
def grow_memory(
    memory: chex.Array,
    count: chex.Array,
    gradient: chex.Array,
    threshold: chex.Numeric,
) -> tuple[chex.Array, chex.Array]:
    r"""Adds the directions of a gradient that the memory is missing (the GPM rule).

    With :math:`R = (I - M M^\top) G` and its singular values :math:`\sigma_i`, the
    leading left singular vectors of R are added, as few as reach

    .. math:: \|M M^\top G\|^2 + \sum_{i \le k} \sigma_i^2 \ge \epsilon\, \|G\|^2 .

    If they are more than fit, the strongest are kept. A gradient that is zero or not
    finite adds nothing.

    Args:
      memory: M, ``[*batch, in, p]``, columns orthonormal, or zero beyond ``count``.
      count: Columns in use, int32 ``[*batch]``.
      gradient: G, ``[*batch, in, out]``; only :math:`G G^\top` matters.
      threshold: Epsilon, the share of energy to reach, in (0, 1].

    Returns:
      The new memory and count, of the same shapes. One SVD of ``[in, out]``.

    References:
      Saha et al, `Gradient Projection Memory <https://arxiv.org/abs/2103.09762>`_, 2021
    """
    directions, wanted = _missing(memory, gradient, threshold)
    taken = jnp.minimum(wanted, memory.shape[-1] - count)
    # Column j of the memory takes direction j - count, if that is one to be taken.
    shape = (*count.shape, memory.shape[-1])
    column = jax.lax.broadcasted_iota(jnp.int32, shape, count.ndim)
    source = column - jnp.expand_dims(count, -1)
    fresh = (source >= 0) & (source < jnp.expand_dims(taken, -1))
    index = jnp.clip(source, 0, directions.shape[-1] - 1)
    picked = jnp.take_along_axis(directions, index[..., None, :], axis=-1)
    return jnp.where(fresh[..., None, :], picked, memory), count + taken


@jax.jit
def missing_columns(
    memory: chex.Array, gradient: chex.Array, threshold: chex.Numeric
) -> chex.Array:
    """How many columns ``grow_memory`` would add with room for all, ``[*batch]``."""
    return _missing(memory, gradient, threshold)[1]


def _missing(memory, gradient, threshold):
    gradient = gradient.astype(memory.dtype)
    finite = jnp.all(jnp.isfinite(gradient), axis=(-2, -1), keepdims=True)
    gradient = jnp.where(finite, gradient, 0)
    # Only its direction matters, and squares of a small gradient would underflow.
    gradient = orthonormal.unit_scale(gradient)
    total = jnp.sum(gradient**2, axis=(-2, -1))[..., None]
    covered = jnp.sum(linalg.coefficients(memory, gradient) ** 2, axis=(-2, -1))
    # Twice, since one projection leaves rounding of the size of G, not of R.
    rest = off_memory(off_memory(gradient, memory), memory)
    vectors, singular, _ = decompositions.svd(rest)
    energy = singular**2
    before = covered[..., None] + linalg.energy_before(energy)
    noise = jnp.sqrt(total) * gradient.shape[-2] * jnp.finfo(energy.dtype).eps
    keep = (before < threshold * total) & (singular > noise)
    # Weak directions carry the most of what rounding left in the memory.
    directions = off_memory(vectors, memory) * keep[..., None, :]
    return directions, jnp.sum(keep, axis=-1, dtype=jnp.int32)


def factor(gram: chex.Array) -> chex.Array:
    """F with ``F F^T = gram``, ``[*batch, in, in]``; zero where that is rounding."""
    values, vectors = decompositions.eigh(gram)
    # Below this an eigenvalue is rounding of the sum, and its root would not be small.
    noise = 4 * jnp.sqrt(float(gram.shape[-1])) * jnp.finfo(gram.dtype).eps
    keep = values > noise * values[..., -1:]
    return vectors * jnp.sqrt(jnp.where(keep, values, 0.0))[..., None, :]
