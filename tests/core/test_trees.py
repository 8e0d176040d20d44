"""Trees: masks of one laid over another, sums in float32, copies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cl._core import trees
from tests.arrays import normal

HOLE = optax.MaskedNode()


def test_align_hides_what_the_updates_hide():
    full = {"a": jnp.ones(2), "b": {"c": jnp.ones(3), "d": jnp.ones(1)}}
    like = {"a": jnp.zeros(2), "b": {"c": HOLE, "d": jnp.zeros(1)}}
    aligned = trees.align("x", full, like)
    assert jax.tree.structure(aligned) == jax.tree.structure(like)
    assert aligned["a"] is full["a"]


def test_align_hides_a_whole_subtree():
    full = {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}
    aligned = trees.align("x", full, {"a": jnp.zeros(2), "b": HOLE})
    assert aligned["b"] == HOLE


def test_align_spreads_a_hole_over_a_subtree():
    # A mask that is a prefix hides a subtree by one node.
    tree = {"a": jnp.ones(2), "b": HOLE}
    like = {"a": jnp.zeros(2), "b": {"c": jnp.zeros(3), "d": [jnp.zeros(1)]}}
    aligned = trees.align_structure("x", tree, like)
    assert aligned["b"] == {"c": HOLE, "d": [HOLE]}
    assert aligned["a"] is tree["a"]


def test_align_handles_holes_on_both_sides():
    tree = {"a": HOLE, "b": {"c": jnp.ones(3)}, "n": None}
    like = {"a": {"x": jnp.zeros(1)}, "b": HOLE, "n": None}
    aligned = trees.align_structure("x", tree, like)
    assert aligned == {"a": {"x": HOLE}, "b": HOLE, "n": None}


def test_align_lets_leaves_be_anything():
    basis = {"a": {"sum": 1, "trace": 2}}
    assert trees.align_structure("x", basis, {"a": jnp.zeros(2)}) == basis


@pytest.mark.parametrize("tree", [{"a": 1.0}, {"a": 1.0, "c": 1.0}, [1.0, 1.0], 1.0])
def test_align_refuses_another_structure_by_name(tree):
    like = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    with pytest.raises(ValueError, match="`extra` must have the tree structure"):
        trees.align("extra", tree, like)


def test_align_refuses_another_shape_by_path():
    with pytest.raises(
        ValueError, match=r"`extra`.*at `a/b` got \(3,\), expected \(2,\)"
    ):
        trees.align("extra", {"a": {"b": jnp.zeros(3)}}, {"a": {"b": jnp.zeros(2)}})


def test_inner_products_of_bfloat16_accumulate_in_float32():
    # In bfloat16 the sum of 1000 ones stops at 256.
    ones = {"a": jnp.ones(1000, jnp.bfloat16), "b": jnp.ones((2, 3), jnp.bfloat16)}
    assert trees.vdot(ones, ones) == 1006.0
    assert trees.vdot(ones, ones).dtype == jnp.float32
    assert trees.squared_norm({}) == 0.0


def test_vdot_of_many_small_leaves_is_few_sums():
    shapes = [(), (3,), (2, 5), (64, 64), (65, 64)]
    a = {i: normal(i, *shapes[i % 5]) for i in range(100)}
    b = {i: normal(200 + i, *shapes[i % 5]) for i in range(100)}
    b = {i: x.astype(jnp.bfloat16) if i % 3 else x for i, x in b.items()}
    u, v = (np.concatenate([np.float64(x).ravel() for x in t.values()]) for t in (a, b))
    ours = trees.vdot(a, b)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, u @ v, rtol=1e-5, atol=1e-3)
    program = str(jax.make_jaxpr(trees.vdot)(a, b))
    assert program.count("reduce_sum") == 21  # 20 large leaves, and all the others

    few = {i: a[i] for i in range(60)}, {i: b[i] for i in range(60)}
    one_by_one = sum(map(trees.leaf_vdot, *(t.values() for t in few)), jnp.zeros([]))
    assert trees.vdot(*few) == one_by_one


def test_vdot_against_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 5)).astype(np.float32)
    expected = np.vdot(a.astype(np.float64), b.astype(np.float64))
    np.testing.assert_allclose(
        trees.vdot([jnp.asarray(a[:3]), jnp.asarray(a[3:])], [b[:3], b[3:]]),
        expected,
        rtol=1e-5,
    )


def test_copies_are_other_buffers():
    x = jnp.ones(3)
    copied = trees.copy({"x": x})["x"]
    x.delete()
    np.testing.assert_array_equal(copied, 1.0)


def test_holes_and_dtypes():
    assert trees.is_hole(None) and trees.is_hole(HOLE) and not trees.is_hole(0)
    assert not trees.is_masked(None)
    assert trees.importance_dtype(jnp.bfloat16) == jnp.float32
    zeros = trees.zeros_like({"x": jnp.ones(2, jnp.bfloat16), "n": None}, jnp.float32)
    assert zeros["x"].dtype == jnp.float32 and zeros["n"] is None


@pytest.mark.parametrize("size", [2.0**-120, 1e-30, 3.0, 1e30, 3.4e38])
def test_scale_down_is_exact_and_leaves_the_largest_entry_near_one(size):
    tree = {"a": jnp.array([size, -size / 3], jnp.float32), "b": jnp.zeros((0, 2))}
    scaled, power = trees.scale_down(tree)
    assert 1 <= scaled["a"][0] < 4 and np.frexp(np.float64(power))[0] == 0.5
    exact = np.asarray(tree["a"], np.float64) / np.float64(power)
    np.testing.assert_array_equal(np.asarray(scaled["a"], np.float64), exact)


@pytest.mark.parametrize("entry", [0.0, 1e-42, np.inf, np.nan])
def test_scale_down_leaves_alone_what_has_no_largest_entry(entry):
    scaled, power = trees.scale_down([jnp.array([entry], jnp.bfloat16)])
    assert power == 1 and scaled[0].dtype == jnp.float32
    assert trees.scale_down({})[1] == 1
