r"""How strongly a network's outputs react to each parameter, without labels.

.. math:: \Omega = \frac1N \sum_x
   \Big| \nabla_\theta \lVert f_\theta(x) \rVert_2^2 \Big|

The absolute value is taken *example by example*: gradients of several examples that
point in opposite directions would cancel in the gradient of their sum, whose absolute
value is a lower bound that falls with the size of the batch.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import per_example, statistics, tasks


class _Sums(NamedTuple):
    sizes: chex.ArrayTree  # like params, float32: of gradients, added up
    num_examples: chex.Array  # float32 []


def _init(state: Any, params: chex.ArrayTree) -> _Sums:
    del state
    sizes = per_example.zeros("a sensitivity of the outputs", params)
    return _Sums(sizes, jnp.zeros([], jnp.float32))


def _add(sums: _Sums, data: tasks.PassInput) -> _Sums:
    outputs = tasks.require(data.task, "outputs", "the sensitivity of the outputs")
    shape = statistics.result_shape("outputs", outputs, data)
    dtype = jax.eval_shape(outputs, data.params, data.batch).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            "the sensitivity of the outputs needs real numbers with a gradient, such "
            f"as logits; `task.outputs` gives dtype {dtype} and shape {shape}. Leave "
            "an argmax out of it."
        )

    def one(example):
        def outputs_of(params):
            return outputs(params, per_example.lead(example))

        # J^T f is half the gradient of |f|^2: twice f might overflow in half precision.
        f, pull_back = jax.vjp(outputs_of, data.params)
        (half,) = pull_back(f)
        return jax.tree.map(
            lambda g, like: 2 * jnp.abs(g.astype(like.dtype)), half, sums.sizes
        )

    return _Sums(
        per_example.sum_over_examples(one, data.batch, data.weights, sums.sizes),
        sums.num_examples + data.weights.sum(),
    )


def _finish(sums: _Sums, state: Any, earlier: dict[str, Any]) -> chex.ArrayTree:
    del state, earlier
    count = jnp.maximum(sums.num_examples, 1.0)
    return jax.tree.map(lambda s: s / count, sums.sizes)


# Its result is a tree like params, float32, at least 0.
PASS = tasks.Pass("output_sensitivity", _init, _add, _finish, shared=True)
