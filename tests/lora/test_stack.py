"""One adapter per task in a stack of fixed capacity, chosen by a task id."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cl import lora
from tests.arrays import normal


def adapters(seed, dtype=jnp.float32):
    return {
        "q": lora.LoRA(
            normal(seed, 4, 2, dtype=dtype), normal(seed + 20, 2, 3, dtype=dtype)
        ),
        "v": lora.Spectral(
            normal(seed + 40, 3), normal(seed + 60, 3, 5, 1), normal(seed + 80, 3, 4, 1)
        ),
    }


# Compiled as one function: quicker than its operations one by one.
store = jax.jit(lora.store)


def filled(capacity=4, tasks=3):
    stacked = lora.stack(adapters(0), capacity)
    for task in range(tasks):
        stacked = store(stacked, task, adapters(task))
    return stacked


def is_zero(tree):
    return all(not np.any(np.asarray(x)) for x in jax.tree.leaves(tree))


def test_what_is_stored_is_selected_bitwise():
    stacked = filled()
    for task in range(3):
        chex.assert_trees_all_equal(lora.select(stacked, task), adapters(task))


def test_an_empty_slot_is_a_zero_update():
    assert is_zero(lora.select(filled(), 3))


def test_a_dynamic_task_id_compiles_once():
    select = jax.jit(chex.assert_max_traces(lora.select, 1))
    store = jax.jit(chex.assert_max_traces(lora.store, 1))
    stacked = lora.stack(adapters(0), 5)
    for task in range(5):
        stacked = store(stacked, jnp.int32(task), adapters(task))
    for task in range(5):
        chex.assert_trees_all_equal(select(stacked, jnp.int32(task)), adapters(task))


@pytest.mark.parametrize("index", [-1, -4, 4, 100])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_array_out_of_range_selects_the_base_model_and_stores_nothing(
    index, compiled
):
    # Plain indexing would wrap -1 and clip 4: the last task's adapter.
    stacked = filled(tasks=4)
    wrap = jax.jit if compiled else lambda f: f
    assert is_zero(wrap(lora.select)(stacked, jnp.int32(index)))
    after = wrap(lora.store)(stacked, jnp.int32(index), adapters(9))
    chex.assert_trees_all_equal(after, stacked)


def test_nothing_leaks_from_a_slot_that_is_not_finite():
    stacked = jax.tree.map(lambda x: np.full_like(x, np.nan), filled())
    assert is_zero(jax.jit(lora.select)(stacked, jnp.int32(-1)))


@pytest.mark.parametrize("index", [-1, 4, np.int64(7)])
def test_a_python_index_out_of_range_raises(index):
    with pytest.raises(ValueError, match=r"in \[0, 4\)"):
        lora.select(filled(), index)
    with pytest.raises(ValueError, match=r"in \[0, 4\)"):
        lora.store(filled(), index, adapters(0))


@pytest.mark.parametrize("index", [1.0, True, jnp.float32(1)])
def test_an_index_that_is_no_integer_raises(index):
    with pytest.raises(TypeError, match="integer task id"):
        lora.select(filled(), index)


def test_several_ids_at_once_are_refused_with_the_way_to_do_it():
    with pytest.raises(ValueError, match=r"jax.vmap"):
        lora.select(filled(), jnp.array([0, 1]))


def test_adapters_of_another_shape_are_refused():
    other = adapters(0)
    other["q"] = lora.LoRA(np.ones((4, 1)), np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"`adapters`.*`q/a`.*\(4, 1\)"):
        lora.store(filled(), 0, other)


def test_a_tree_that_is_no_stack_is_refused():
    with pytest.raises(ValueError, match="`stacked` must come from `stack`"):
        lora.select(adapters(0), 0)


@pytest.mark.parametrize("capacity", [0, -1])
def test_capacity_must_be_positive(capacity):
    with pytest.raises(ValueError, match="`capacity`"):
        lora.stack(adapters(0), capacity)


def test_the_stack_keeps_its_dtypes():
    stacked = lora.stack(adapters(0, jnp.bfloat16), 2)
    stored = lora.store(stacked, 0, adapters(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(stored, stacked)
    assert stored["q"].a.dtype == jnp.bfloat16


def test_a_mixed_batch_gathers_by_vmap_as_one_by_one_would():
    stacked, kernel = filled(), normal(7, 4, 3)
    x = normal(8, 6, 5, 4)
    ids = jnp.array([2, 0, 3, 1, -1, 2])

    def layer(x, task):
        return lora.dense(x, kernel, lora.select(stacked, task)["q"], 0.5)

    together = jax.jit(jax.vmap(layer))(x, ids)
    for i, task in enumerate(np.asarray(ids)):
        expected = np.asarray(x[i], np.float64) @ np.asarray(kernel, np.float64)
        if 0 <= task < 3:
            a, b = (np.asarray(f, np.float64) for f in adapters(int(task))["q"])
            expected += 0.5 * np.asarray(x[i], np.float64) @ a @ b
        np.testing.assert_allclose(together[i], expected, rtol=1e-4, atol=1e-5)


def test_the_frozen_kernel_is_not_copied_for_each_example():
    stacked, kernel = filled(), jnp.ones((4, 3))

    def layer(x, task):
        return lora.dense(x, kernel, lora.select(stacked, task)["q"], 0.5)

    text = str(jax.make_jaxpr(jax.vmap(layer))(jnp.ones((6, 5, 4)), jnp.zeros(6, int)))
    assert "[6,4,2]" in text  # a, gathered
    assert "[6,4,3]" not in text  # kernels


def test_training_one_task_leaves_the_others_and_the_kernel_bitwise():
    kernel = {"q": normal(7, 4, 3)}
    targets = lora.targets(kernel, {"q": 2}, alpha=2.0)
    stacked = lora.stack({"q": adapters(0)["q"]}, 3)
    for task in range(3):
        stacked = lora.store(stacked, task, {"q": adapters(task)["q"]})
    x = normal(8, 6, 4)
    tx = optax.adamw(0.1, weight_decay=0.1)

    @jax.jit
    def train(params, stacked, task):
        chosen = lora.select(stacked, task)
        state = tx.init(chosen)
        for _ in range(3):
            grads = jax.grad(
                lambda a: jnp.sum((x @ lora.merge(targets, params, a)["q"]) ** 2)
            )(chosen)
            updates, state = tx.update(grads, state, chosen)
            chosen = optax.apply_updates(chosen, updates)
        return params, lora.store(stacked, task, chosen)

    params, after = train(kernel, stacked, jnp.int32(1))
    chex.assert_trees_all_equal(params, kernel)
    for other in (0, 2):
        chex.assert_trees_all_equal(
            lora.select(after, other), lora.select(stacked, other)
        )
    assert not np.array_equal(after["q"].a[1], stacked["q"].a[1])
