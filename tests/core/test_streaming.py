"""Stacked batches: one scan that computes what the loop from the host computes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_cl
from optax_cl import boundaries
from optax_cl._core import streaming
from tests.arrays import normal

KEY = jax.random.key(4)
PARAMS = {"w": np.asarray(normal(0, 6, 3))}
BATCHES = {
    "x": np.asarray(normal(1, 3, 4, 6)),
    "y": np.random.default_rng(2).integers(0, 3, [3, 4], np.int32),
}
LISTED = [jax.tree.map(lambda x, i=i: x[i], BATCHES) for i in range(3)]
TASK = optax_cl.classification(lambda p, b: b["x"] @ p["w"], lambda b: b["y"])
STATE = optax_cl.chain(
    optax_cl.ewc(1.0, estimator="sampled"),  # reads the keys
    optax_cl.protect(2, optax_cl.attenuate(), optax_cl.scale_by_decoupled_adam()),
).init(PARAMS)
stacked = functools.partial(optax_cl.collect, task=TASK, key=KEY, stacked=True)


def assert_same(ours, theirs):
    """But for signs of eigenvectors, which are arbitrary: bases are what they span."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    ours, theirs = (dict(r.results, seen=r.num_examples) for r in (ours, theirs))
    (name,) = (n for n in ours if n.startswith("basis"))
    bases = [np.asarray(r.pop(name)["basis"]["w"]) for r in (ours, theirs)]
    np.testing.assert_allclose(*(u @ u.T for u in bases), atol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        ours,
        theirs,
    )


def test_stacked_batches_give_what_a_list_of_them_gives():
    theirs = optax_cl.collect(STATE, PARAMS, LISTED, task=TASK, key=KEY)
    assert_same(stacked(STATE, PARAMS, BATCHES), theirs)
    assert_same(jax.jit(stacked)(STATE, PARAMS, BATCHES), theirs)


class TotalState(NamedTuple):
    total: Any


# A pass that starts from what the state holds, and twice from one array.
TOTAL = boundaries.Pass(
    "total",
    lambda state, params: (state.total, state.total, [jnp.zeros([])] * 2),
    lambda acc, data: jax.tree.map(lambda x: x + data.weights.sum(), acc),
)
boundaries.register_boundary(
    TotalState,
    boundaries.Boundary(
        passes=lambda state: (TOTAL,),
        end_task=lambda state, params, results: TotalState(results["total"][0]),
        like=lambda state: state.total,
    ),
)


def test_a_pass_may_start_from_the_arrays_of_its_state():
    state = TotalState({"w": np.ones((6, 3), np.float32)})
    statistics = optax_cl.collect(state, PARAMS, LISTED, task=TASK, key=KEY)
    ended = optax_cl.end_task(state, PARAMS, statistics)
    np.testing.assert_array_equal(ended.total["w"], 13.0)
    np.testing.assert_array_equal(state.total["w"], 1.0)  # it is there still


def test_a_whole_boundary_runs_under_jit_and_vmap():
    @jax.jit
    @jax.vmap
    def two_boundaries(batches):
        statistics = stacked(STATE, PARAMS, batches)
        return optax_cl.begin_task(optax_cl.end_task(STATE, PARAMS, statistics), PARAMS)

    two = jax.tree.map(lambda x: np.stack([x, x[::-1]]), BATCHES)
    after = two_boundaries(two)
    alone = optax_cl.end_task(STATE, PARAMS, stacked(STATE, PARAMS, BATCHES))
    for both, one in zip(*map(jax.tree.leaves, (after[0], alone[0])), strict=True):
        np.testing.assert_allclose(np.asarray(both)[0], one, rtol=1e-4, atol=1e-6)


def test_later_tasks_compile_nothing_new_and_nothing_is_unrolled():
    stacked(STATE, PARAMS, BATCHES)
    compiled = streaming._scan._cache_size()
    stacked(STATE, jax.tree.map(np.cos, PARAMS), BATCHES)
    assert streaming._scan._cache_size() == compiled
    more = jax.tree.map(lambda x: np.concatenate([x] * 4), BATCHES)
    lengths = [
        len(str(jax.make_jaxpr(stacked)(STATE, PARAMS, b))) for b in (BATCHES, more)
    ]
    assert lengths[1] < 1.01 * lengths[0]


def test_frozen_arrays_reach_the_functions_of_the_task():
    task = optax_cl.classification(
        lambda both, b: b["x"] @ both[0]["w"] + both[1], lambda b: b["y"]
    )
    given = {"task": task, "key": KEY, "frozen": np.arange(3, dtype=np.float32)[None]}
    theirs = optax_cl.collect(STATE, PARAMS, LISTED, **given)
    assert_same(optax_cl.collect(STATE, PARAMS, BATCHES, stacked=True, **given), theirs)


@pytest.mark.parametrize(
    ("batches", "got"),
    [
        (LISTED[0], r"leaves of shapes .*\(4,\)"),
        (BATCHES | {"y": np.zeros([2, 4], np.int32)}, r"`y`|'y'.*\(2, 4\)"),
        (jax.tree.map(lambda x: x[:0], BATCHES), r"non-empty.*\(0, 4\)"),
        ({}, r"shapes \{\}"),
    ],
)
def test_batches_that_are_not_stacked_are_refused_with_their_shapes(batches, got):
    with pytest.raises(ValueError, match=got):
        stacked(STATE, PARAMS, batches)


def test_a_bank_that_may_be_full_is_refused_while_tracing_and_says_what_to_do():
    tx = optax_cl.ewc(1.0, anchors="separate", capacity=2)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"outside `jit`.*overflow='merge'"):
        jax.jit(stacked)(state, PARAMS, BATCHES)
    # The same bank is checked outside jit, where it is known to have room, and one
    # that merges needs no check.
    stacked(state, PARAMS, BATCHES)
    merging = optax_cl.ewc(1.0, anchors="separate", capacity=2, overflow="merge")
    jax.jit(stacked)(merging.init(PARAMS), PARAMS, BATCHES)
