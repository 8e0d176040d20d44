"""Conflict projection, against float64 NumPy and against Optax's halfspace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optax_cl._core import surgery

SEEDS = st.integers(0, 2**31 - 1)


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    # Leaves of very different size, as gradients of a network have.
    return {
        "dense": {
            "kernel": np.float32(scale * rng.normal(size=(4, 3))),
            "bias": np.float32(scale * 1e-3 * rng.normal(size=3)),
        },
        "gain": np.float32(scale * 10 * rng.normal()),
    }


def flat(t):
    return np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(t)])


def project_in_float64(g, r):
    dot = g @ r
    return g if dot >= 0 or not r.any() else g - dot / (r @ r) * r


def bits(t):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(t)]


project = jax.jit(surgery.project_conflict, static_argnames=("granularity", "gate"))
halfspace = jax.jit(optax.projections.projection_halfspace)


@given(SEEDS)
def test_it_equals_the_formula_in_float64(seed):
    g, ref = tree(seed), tree(seed + 1)
    expected = project_in_float64(flat(g), flat(ref))
    np.testing.assert_allclose(
        flat(project(g, ref)), expected, atol=1e-6 * np.linalg.norm(flat(g))
    )


@given(SEEDS)
def test_it_equals_the_halfspace_projection_of_optax(seed):
    g, ref = tree(seed), tree(seed + 1)
    opposite = jax.tree.map(np.negative, ref)
    expected = halfspace(g, opposite, 0.0)
    np.testing.assert_allclose(
        flat(project(g, ref)), flat(expected), atol=1e-6 * np.linalg.norm(flat(g))
    )


@pytest.mark.parametrize("granularity", ["global", "leaf"])
@given(seed=SEEDS)
def test_the_result_opposes_neither_input_and_is_not_longer(granularity, seed):
    g, ref = tree(seed), tree(seed + 1)
    v, a, b = flat(project(g, ref, granularity=granularity)), flat(g), flat(ref)
    tolerance = 1e-6 * np.linalg.norm(a)
    assert v @ b >= -tolerance * np.linalg.norm(b)
    assert v @ a >= -tolerance * np.linalg.norm(a)
    assert np.linalg.norm(v) <= np.linalg.norm(a) + tolerance


@given(SEEDS)
def test_it_is_idempotent(seed):
    g, ref = tree(seed), tree(seed + 1)
    once = project(g, ref)
    np.testing.assert_allclose(
        flat(project(once, ref)), flat(once), atol=1e-6 * np.linalg.norm(flat(g))
    )


@given(SEEDS, st.sampled_from([1e-3, 1 / 7, 1e3, 1e-9, 1e15]))
def test_only_the_direction_of_the_reference_matters(seed, factor):
    g, ref = tree(seed), tree(seed + 1)
    scaled = jax.tree.map(lambda r: factor * r, ref)
    np.testing.assert_allclose(
        flat(project(g, scaled)),
        flat(project(g, ref)),
        atol=2e-6 * np.linalg.norm(flat(g)),
    )


@given(SEEDS)
def test_without_conflict_the_gradient_comes_back_bit_for_bit(seed):
    g, ref = tree(seed), tree(seed + 1)
    sign = 1.0 if flat(g) @ flat(ref) >= 0 else -1.0
    agreeing = jax.tree.map(lambda r: sign * r, ref)
    assert bits(project(g, agreeing)) == bits(g)


def test_an_orthogonal_reference_is_no_conflict_and_minus_zero_survives():
    g, ref = jnp.array([1.5, -0.0, 2.0]), jnp.array([0.0, -3.0, 0.0])
    assert bits(project(g, ref)) == bits(g)


def test_a_zero_reference_gives_the_gradient_where_the_plain_formula_gives_nan():
    g = tree(0)
    zero = jax.tree.map(np.zeros_like, g)
    assert bits(project(g, zero)) == bits(g)
    assert bits(project(g, zero, granularity="leaf")) == bits(g)
    assert bits(project(zero, g)) == bits(zero)
    unguarded = halfspace(g, zero, 0.0)
    assert np.isnan(flat(unguarded)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_a_reference_that_is_not_finite_or_overflows_gives_the_gradient(bad):
    g = jnp.array([1.0, -2.0, 3.0])
    assert bits(project(g, jnp.array([-1.0, bad, -1.0]))) == bits(g)


def test_a_gradient_that_is_not_finite_comes_back_as_it_is():
    g = jnp.array([1.0, np.nan, np.inf])
    assert bits(project(g, jnp.array([-1.0, 1.0, 1.0]))) == bits(g)


def test_a_reference_too_small_to_square_does_not_blow_up():
    # Squares of the first half are just above the smallest normal float32, those of the
    # second just below: the computed squared norm would miss almost half.
    ref = -np.repeat(np.float32([1.1e-19, 1.05e-19]), 500)
    g = np.ones(1000, np.float32)
    with np.errstate(under="ignore"):
        squares = np.float32(ref) ** 2
    flushed = np.where(squares < np.finfo(np.float32).tiny, 0, squares)
    wrong = g - (g @ ref / flushed.sum()) * ref
    assert np.linalg.norm(wrong) > 0.9 * np.linalg.norm(g)  # should be about zero
    assert bits(project(g, ref)) == bits(g)
    # A million times larger it is projected as any other.
    exact = project_in_float64(np.float64(g), np.float64(1e6 * ref))
    np.testing.assert_allclose(project(g, np.float32(1e6) * ref), exact, atol=1e-5)


def test_a_dot_accumulated_in_bfloat16_would_flip_the_sign():
    # Ones add up to 256 in bfloat16 and stay there; the last product then wins.
    g, ref = np.ones([2, 401], jnp.bfloat16)
    g[-1], ref[-1] = 300.0, -1.0

    def add(total, product):
        return total + product, None

    wrong = jax.lax.scan(add, np.zeros([], jnp.bfloat16), g * ref)[0]
    assert wrong < 0 < np.float64(g) @ np.float64(ref)
    assert bits(project(g, ref)) == bits(g)


@given(SEEDS)
def test_bfloat16_gradients_are_projected_to_rounding(seed):
    g, ref = (
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(s))
        for s in (seed, seed + 1)
    )
    out = project(g, ref)
    assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
    expected = project_in_float64(flat(g), flat(ref))
    # One rounding of each entry to eight bits, after float32 arithmetic.
    bound = 2.0**-8 * np.abs(expected) + 1e-6 * np.linalg.norm(flat(g))
    assert (np.abs(flat(out) - expected) <= bound).all()


def test_a_float32_reference_leaves_the_gradients_dtype():
    g = jnp.array([1.0, -1.0], jnp.bfloat16)
    assert project(g, jnp.array([0.0, 1.0])).dtype == jnp.bfloat16


def test_in_64_bits_the_oracle_is_met_closely(x64):
    rng = np.random.default_rng(0)
    g, ref = rng.normal(size=50), rng.normal(size=50)
    ref -= (ref @ g + 1) * g / (g @ g)
    np.testing.assert_allclose(
        project(g, ref),
        project_in_float64(g, ref),
        rtol=1e-13,
        atol=1e-14,
    )


@given(SEEDS)
def test_leaf_granularity_projects_each_leaf_by_itself(seed):
    g, ref = tree(seed), tree(seed + 1)
    out = project(g, ref, granularity="leaf")
    for v, a, b in zip(*map(jax.tree.leaves, (out, g, ref)), strict=True):
        expected = project_in_float64(flat(a), flat(b))
        np.testing.assert_allclose(
            flat(v), expected, atol=1e-6 * np.linalg.norm(flat(a))
        )


def test_a_conflict_in_one_leaf_counts_per_leaf_but_not_globally():
    g = {"a": jnp.array([-1.0]), "b": jnp.array([5.0])}
    ref = {"a": jnp.array([1.0]), "b": jnp.array([1.0])}
    assert bits(project(g, ref)) == bits(g)
    np.testing.assert_array_equal(project(g, ref, granularity="leaf")["a"], [0.0])


def test_the_order_of_leaves_does_not_matter():
    g, ref = tree(3), jax.tree.map(np.negative, tree(3))
    forward = project(g, ref)
    turned = project(list(jax.tree.leaves(g))[::-1], list(jax.tree.leaves(ref))[::-1])
    for a, b in zip(jax.tree.leaves(forward), turned[::-1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("granularity", ["global", "leaf"])
def test_holes_and_empty_trees_pass_through(granularity):
    g = {"a": jnp.array([-1.0]), "b": None, "c": optax.MaskedNode(), "d": {}}
    ref = {**g, "a": jnp.array([1.0])}
    out = surgery.project_conflict(g, ref, granularity=granularity)
    assert out["b"] is None and out["c"] == optax.MaskedNode() and out["d"] == {}
    np.testing.assert_array_equal(out["a"], [0.0])
    assert surgery.project_conflict({}, {}, granularity=granularity) == {}


def test_vmap_equals_a_loop():
    g, ref = (
        jax.tree.map(lambda *xs: np.stack(xs), *[tree(s) for s in seeds])
        for seeds in (range(6), range(6, 12))
    )
    together = jax.tree.map(np.asarray, jax.jit(jax.vmap(project))(g, ref))
    for i in range(6):
        one = project(tree(i), tree(6 + i))
        mapped = jax.tree.map(lambda x, i=i: x[i], together)
        np.testing.assert_allclose(flat(mapped), flat(one), rtol=1e-5, atol=1e-6)


def test_compiled_size_grows_linearly_with_the_number_of_leaves():
    # Scalars that a compiler copies into the loop of every leaf make it quadratic:
    # a minute of compilation for 200 leaves.
    def lines(n):
        g = {str(i): np.ones([8, 8], np.float32) for i in range(n)}
        compiled = jax.jit(surgery.project_conflict).lower(g, g).compile()
        return len(compiled.as_text().splitlines())

    assert lines(60) < 2.5 * lines(30)


def test_bad_arguments_are_named():
    g = {"w": jnp.ones([2])}
    with pytest.raises(ValueError, match=r"`granularity` must be one of 'global'"):
        surgery.project_conflict(g, g, granularity="layer")
    with pytest.raises(ValueError, match=r"`ref`.*at `w` got \(3,\), expected \(2,\)"):
        surgery.project_conflict(g, {"w": jnp.ones([3])})
    with pytest.raises(ValueError, match=r"`ref` must have the tree structure"):
        surgery.project_conflict(g, {"v": jnp.ones([2])})
    with pytest.raises(TypeError, match=r"`g` must hold real .* at `w` got int32"):
        surgery.project_conflict({"w": jnp.ones([2], jnp.int32)}, g)
    with pytest.raises(TypeError, match=r"`ref`.*complex64.*split_real_and_imaginary"):
        surgery.project_conflict(g, {"w": jnp.ones([2], jnp.complex64)})


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.75])
def test_a_strength_leaves_its_complement_of_the_conflict(strength):
    g, ref = tree(3), tree(4)
    dot = flat(g) @ flat(ref)
    g = jax.tree.map(
        lambda x: np.float32(-np.sign(dot)) * x, g
    )  # conflicting, whatever the draw
    out = project(g, ref, strength=strength)
    np.testing.assert_allclose(
        flat(out) @ flat(ref), -(1 - strength) * abs(dot), rtol=1e-5
    )


def test_the_gate_always_removes_agreement_too():
    g, ref = tree(3), tree(4)
    for sign in (1.0, -1.0):
        signed = jax.tree.map(lambda x, sign=sign: sign * x, g)
        out = project(signed, ref, gate="always")
        scale = np.linalg.norm(flat(g)) * np.linalg.norm(flat(ref))
        assert abs(flat(out) @ flat(ref)) < 1e-6 * scale


def test_a_strength_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match=r"`strength` must be .* \[0, 1\]; got 1.5"):
        surgery.project_conflict(tree(0), tree(1), strength=1.5)
