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

from optax_cl._core import checks, growth, linalg, statistics, tasks
from optax_cl.lora._targets import Targets, kernels, replace_kernels

STATISTICS = ("mean", "batches")


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
        return {path: growth.factor(gram) for path, gram in acc["sum"].items()}

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
