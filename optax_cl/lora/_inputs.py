"""Second moments of the inputs that adapted kernels multiply."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import growth, linalg, streaming, tasks
from optax_cl._core.layer_inputs import by_path, weighted_rows
from optax_cl.lora._targets import Targets

LayerInputs = Callable[[Any, Any], chex.ArrayTree]


def input_covariances(
    targets: Targets,
    layer_inputs: LayerInputs,
    params: Any,
    batches: Iterable[chex.ArrayTree],
) -> dict[str, chex.Array]:
    r"""The mean of :math:`x x^\top` over the inputs x of every targeted kernel.

    Args:
      targets: The kernels, from ``lora.targets``.
      layer_inputs: ``(params, batch) -> tree``, as ``Task.layer_inputs``: at the path
        of each targeted kernel its inputs ``[*batch, B, ..., in]``, None elsewhere.
        Keep the function: one not seen before is compiled anew.
      params: What ``layer_inputs`` takes.
      batches: Trees of arrays with a leading axis of examples.

    Returns:
      ``{path: float32 [*batch, in, in]}``, symmetric positive semi-definite; not
      centred.

    Raises:
      ValueError: If there is no batch, or inputs are missing or do not fit.

    Cost. One forward pass a batch, and ``n in^2`` for its n inputs.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import lora
      >>> params = {"kernel": jnp.zeros((2, 2))}
      >>> chosen = lora.targets(params, {"kernel": 1}, alpha=1.0)
      >>> inputs = lambda params, batch: {"kernel": batch}
      >>> batches = [jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 4.0]])]
      >>> print(lora.input_covariances(chosen, inputs, params, batches)["kernel"])
      [[2. 0.]
       [0. 8.]]
    """
    streaming.check_batches(batches, 1)
    acc = _zeros(targets)
    seen = False
    for batch, weights in streaming.padded_batches(batches):
        acc = _step(layer_inputs, targets, acc, params, batch, weights)
        seen = True
    if not seen:
        raise ValueError(
            "`batches` is empty, so there are no inputs. Is it an iterator that was "
            "gone through before?"
        )
    return {path: acc["sum"][path] / acc["items"][path] for path in targets}


@functools.cache
def input_pass(targets: Targets) -> tasks.Pass:
    """The pass that finds, for every kernel, a factor F of its inputs' second moment.

    Its result is ``{path: float32 [*batch, in, in]}`` with ``F F^T`` the mean of
    ``x x^T``: a matrix of inputs, up to a rotation that no basis sees. Directions that
    hold less than about 1e-6 of the largest one's energy are lost in rounding.
    """

    def step(acc, data):
        function = tasks.require(data.task, "layer_inputs", "a memory of inputs")
        tree = function(data.params, data.batch)
        return _add(targets, acc, tree, data.weights)

    def finish(acc, state, earlier):
        del state, earlier
        return {
            path: growth.factor(acc["sum"][path] / acc["items"][path])
            for path in targets
        }

    return tasks.Pass("layer_inputs", lambda s, p: _zeros(targets), step, finish)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(layer_inputs, targets, acc, params, batch, weights):
    return _add(targets, acc, layer_inputs(params, batch), weights)


def _zeros(targets):
    sums, items = {}, {}
    for path, target in targets.items():
        *batch, fan_in, _ = target.matrix_shape
        sums[path] = jnp.zeros((*batch, fan_in, fan_in), jnp.float32)
        items[path] = jnp.zeros([], jnp.float32)
    return {"sum": sums, "items": items}


def _add(targets, acc, tree, weights):
    inputs = by_path(tree)
    sums, items = {}, {}
    for path, target in targets.items():
        shape = target.matrix_shape
        rows, count = weighted_rows(inputs, path, weights, shape)
        sums[path] = acc["sum"][path] + linalg.gram(rows.mT)
        items[path] = acc["items"][path] + count
    return {"sum": sums, "items": items}
