"""The memory of importances: capacity, overflow, growth, constant structure."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl._core import importance


def rules(anchors="separate", capacity=None, overflow="error", **kwargs):
    settings = {"accumulate": "sum", "decay": None, "ema_init": "zero", **kwargs}
    decay = settings.pop("decay")
    return importance.make_rules(
        anchors, settings["accumulate"], decay, settings["ema_init"], capacity, overflow
    )


def history(n, seed=0):
    rng = np.random.default_rng(seed)
    pairs = [(rng.uniform(0, 2, 5), rng.normal(size=5)) for _ in range(n)]
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), pairs)


def remember(memory, tasks, consolidate=importance.consolidate):
    for f, a in tasks:
        memory = consolidate(memory, f, a)
    return memory


def pull(memory, x):
    return importance.leaf_pull(memory.rules, memory.importance, memory.anchor, x)


@pytest.mark.parametrize("capacity", [1, 2, 3, 7])
def test_merging_on_overflow_keeps_gradient_and_value_exactly(capacity):
    params, x = jnp.zeros(5), jnp.linspace(-1, 1, 5)
    exact = importance.init(params, rules(capacity=7), None)
    small = importance.init(params, rules(capacity=capacity, overflow="merge"), None)
    merged = importance.init(params, rules("merged"), None)
    for task in history(7):
        exact, small, merged = (remember(m, [task]) for m in (exact, small, merged))
        for other in (small, merged):
            np.testing.assert_allclose(pull(other, x), pull(exact, x), 1e-5, 1e-6)
            np.testing.assert_allclose(
                importance.value(other, x), importance.value(exact, x), rtol=1e-5
            )
    assert small.stored == min(7, capacity)
    assert small.tasks == 7


def test_the_oldest_two_are_merged_and_the_rest_move_up():
    memory = importance.init(jnp.zeros(5), rules(capacity=3, overflow="merge"), None)
    tasks = history(4)
    memory = remember(memory, tasks)
    (f0, a0), (f1, a1), *rest = tasks
    np.testing.assert_allclose(memory.importance[0], f0 + f1, rtol=1e-6)
    np.testing.assert_allclose(
        memory.anchor[0], (f0 * a0 + f1 * a1) / (f0 + f1), rtol=1e-5
    )
    for i, (f, a) in enumerate(rest, start=1):
        np.testing.assert_array_equal(memory.importance[i], f)
        np.testing.assert_array_equal(memory.anchor[i], a)


def test_a_full_bank_raises_outside_jit_and_says_what_to_do():
    memory = importance.init(jnp.zeros(5), rules(capacity=2), None)
    memory = remember(memory, history(1))
    importance.check_room(memory)
    memory = remember(memory, history(1))
    with pytest.raises(ValueError, match=r"all 2 places.*optax_cl\.grow"):
        importance.check_room(memory)


def test_a_bank_that_may_overflow_is_refused_inside_jit():
    memory = importance.init(jnp.zeros(5), rules(capacity=2), None)
    with pytest.raises(ValueError, match="cannot be checked inside"):
        jax.jit(lambda m: importance.check_room(m))(memory)
    merging = importance.init(jnp.zeros(5), rules(capacity=2, overflow="merge"), None)
    jax.jit(lambda m: importance.check_room(m))(merging)


def test_a_grown_bank_goes_on_where_the_small_one_was_full():
    tasks, x = history(4), jnp.linspace(-1, 1, 5)
    small = remember(
        importance.init(jnp.zeros(5), rules(capacity=2, overflow="merge"), None),
        tasks[:3],
    )
    grown = importance.grow(small, 5)
    np.testing.assert_array_equal(pull(grown, x), pull(small, x))
    grown = remember(grown, tasks[3:])
    assert grown.stored == 3
    whole = remember(importance.init(jnp.zeros(5), rules(capacity=4), None), tasks)
    np.testing.assert_allclose(pull(grown, x), pull(whole, x), rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"anchors": "merged"},
        {"anchors": "latest", "accumulate": "decay", "decay": 0.9},
        {"anchors": "separate", "capacity": 2, "overflow": "merge"},
        {"anchors": None, "accumulate": "ema", "decay": 0.9, "ema_init": "debias"},
    ],
)
def test_structure_never_changes_and_twenty_tasks_compile_once(settings):
    decay = settings.get("decay")
    fresh, memory = (
        importance.init(jnp.zeros(5), rules(**settings), decay) for _ in range(2)
    )
    consolidate = jax.jit(lambda *args: importance.consolidate(*args), donate_argnums=0)
    for f, a in history(20):
        memory = consolidate(memory, f, a)
        assert np.isfinite(a).all()  # the parameters were not donated
        chex.assert_trees_all_equal_shapes_and_dtypes(memory, fresh)
    assert consolidate._cache_size() == 1
    assert jax.tree.structure(memory) == jax.tree.structure(fresh)
    assert memory.tasks == 20


def test_a_memory_without_anchors_stores_one_tree():
    memory = importance.init(jnp.zeros(5), rules(None), None)
    memory = remember(memory, history(2))
    assert memory.anchor is None
    np.testing.assert_allclose(memory.importance, history(2)[0][0] + history(2)[1][0])
