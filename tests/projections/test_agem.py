"""A-GEM: the published map, its average, its places in a chain, and the wrappers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optax_cl
from optax_cl.projections import AgemState, agem, reset_reference
from tests.arrays import normal

SEEDS = st.integers(0, 2**31 - 1)


def stream(seed, steps=60, size=12):
    """Gradients and references that conflict, in coordinates of very different size."""
    scale = jnp.logspace(-2, 0, size)[None]
    grads = (normal(seed, steps, size) + 0.3) * scale
    return grads, (normal(seed + 1, steps, size) - 0.3) * scale


def project_in_float64(g, r):
    dot = g @ r
    return g if dot >= 0 or not r.any() else g - dot / (r @ r) * r


def run(tx, grads, refs, params=None):
    """All updates of a chain over a stream, in one scan."""
    params = jnp.ones_like(grads[0]) if params is None else params

    def step(state, data):
        g, ref = data
        updates, state = tx.update(g, state, params, reference_updates=ref)
        return state, updates

    state, updates = jax.jit(functools.partial(jax.lax.scan, step))(
        tx.init(params), (grads, refs)
    )
    return updates, state


def cosines(updates, refs):
    dots = jnp.sum(updates * refs, axis=1)
    norms = jnp.linalg.norm(updates, axis=1) * jnp.linalg.norm(refs, axis=1)
    return dots / norms


# The map


@jax.jit
def run_plain(grads, refs):
    return run(agem(), grads, refs)[0]


@given(SEEDS)
def test_it_equals_the_formula_in_float64(seed):
    grads, refs = stream(seed)
    updates = run_plain(grads, refs)
    for u, g, r in zip(*map(np.float64, (updates, grads, refs)), strict=True):
        np.testing.assert_allclose(
            u, project_in_float64(g, r), atol=1e-6 * np.linalg.norm(g)
        )


def test_without_conflict_the_gradient_passes_bit_for_bit():
    grads, refs = stream(0)
    updates, _ = run(agem(), grads, refs)
    free = np.einsum("ti,ti->t", np.float64(grads), np.float64(refs)) >= 0
    assert 5 < free.sum() < 55
    np.testing.assert_array_equal(updates[free], grads[free])
    assert (updates[~free] != grads[~free]).any(axis=1).all()


def test_the_sum_and_the_mean_over_past_tasks_give_the_same():
    grads, tasks = normal(0, 20, 8), normal(1, 3, 20, 8)
    by_sum, _ = run(agem(), grads, tasks.sum(0))
    by_mean, _ = run(agem(), grads, tasks.mean(0))
    np.testing.assert_allclose(by_sum, by_mean, atol=1e-6)


def test_the_current_task_in_the_memory_hides_the_conflict():
    g, past = jnp.array([1.0, 0.0]), jnp.array([-0.5, 1.0])
    tx = agem()
    right, _ = tx.update(g, tx.init(g), reference_updates=past)
    wrong, _ = tx.update(g, tx.init(g), reference_updates=past + g)
    assert right @ past >= -1e-6 and wrong @ past < -0.1


def test_without_decay_the_reference_of_this_step_counts_and_nothing_is_kept():
    g = jnp.array([1.0, 1.0])
    tx = agem()
    state = tx.init(g)
    _, state = tx.update(g, state, reference_updates=jnp.array([-1.0, 0.0]))
    updates, state = tx.update(g, state, reference_updates=jnp.array([0.0, -1.0]))
    np.testing.assert_allclose(updates, [1.0, 0.0])
    assert jax.tree.leaves(state) == []


def test_leaf_granularity_reaches_the_projection():
    g = {"a": jnp.array([-1.0]), "b": jnp.array([5.0])}
    ref = {"a": jnp.array([1.0]), "b": jnp.array([1.0])}
    tx = agem(granularity="leaf")
    np.testing.assert_array_equal(
        tx.update(g, tx.init(g), reference_updates=ref)[0]["a"], [0.0]
    )


def test_averaging_over_devices_must_come_before_the_projection():
    grads = jnp.array([[1.0, 0.0], [-3.0, 0.0]])
    refs = jnp.array([[-1.0, 1.0], [-1.0, 1.0]])
    tx = agem()

    def one(g, r):
        return tx.update(g, tx.init(g), reference_updates=r)[0]

    before = one(grads.mean(0), refs.mean(0))
    after = jax.vmap(one)(grads, refs).mean(0)
    np.testing.assert_array_equal(before, [-1.0, 0.0])
    assert jnp.abs(before - after).max() > 0.2


# The moving average


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_average_equals_its_recursion_in_float64(decay):
    grads, refs = stream(3)
    updates, state = run(agem(decay=decay), grads, refs)
    r = np.zeros(grads.shape[1])
    for u, g, ref in zip(*map(np.float64, (updates, grads, refs)), strict=True):
        r = decay * r + (1 - decay) * ref
        np.testing.assert_allclose(
            u, project_in_float64(g, r), atol=1e-5 * np.linalg.norm(g)
        )
        assert u @ r >= -1e-5 * np.linalg.norm(u) * np.linalg.norm(r)
    np.testing.assert_allclose(state.reference, r, atol=1e-6)


def test_the_average_does_not_promise_anything_about_this_steps_reference():
    grads, refs = stream(4)
    updates, _ = run(agem(decay=0.9), grads, refs)
    assert cosines(updates, refs).min() < -0.1


def test_zero_decay_is_no_average():
    grads, refs = stream(5)
    plain, _ = run(agem(), grads, refs)
    averaged, _ = run(agem(decay=0.0), grads, refs)
    np.testing.assert_allclose(averaged, plain, atol=1e-7)


def test_a_zero_reference_keeps_the_direction_of_the_average():
    g = jnp.array([-1.0, 1.0])
    tx = agem(decay=0.5)
    _, state = tx.update(g, tx.init(g), reference_updates=jnp.array([1.0, 0.0]))
    updates, _ = tx.update(g, state, reference_updates=jnp.zeros(2))
    np.testing.assert_allclose(updates, [0.0, 1.0], atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_reference_does_not_stay_in_the_average(bad):
    g, ref = jnp.array([-1.0, 1.0]), jnp.array([1.0, 0.0])
    tx = agem(decay=0.5)
    _, state = tx.update(g, tx.init(g), reference_updates=ref)
    updates, after = tx.update(g, state, reference_updates=ref.at[1].set(bad))
    np.testing.assert_array_equal(after.reference, state.reference)
    np.testing.assert_allclose(updates, [0.0, 1.0], atol=1e-7)


def test_the_average_is_float32_beside_bfloat16_parameters():
    params = {"w": jnp.ones([3], jnp.bfloat16), "hole": None}
    tx = agem(decay=0.9)
    state = tx.init(params)
    assert state.reference["w"].dtype == jnp.float32
    assert state.reference["hole"] is None
    updates, after = tx.update(params, state, reference_updates=params)
    assert updates["w"].dtype == jnp.bfloat16
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


def test_small_terms_add_up_in_the_average_of_bfloat16_references():
    # In bfloat16 .999 r + .001 r_new stalls; the average of ones must approach one.
    ref = jnp.ones([2], jnp.bfloat16)
    _, state = run(agem(decay=0.999), jnp.ones([4000, 2]), jnp.tile(ref, (4000, 1)))
    np.testing.assert_allclose(state.reference, 1 - 0.999**4000, rtol=1e-3)


def test_reset_clears_the_average_and_nothing_else():
    g = {"a": jnp.array([-1.0]), "b": None}
    tx = agem(decay=0.9)
    _, state = tx.update(g, tx.init(g), reference_updates={"a": g["a"] * -1, "b": None})
    fresh = jax.jit(reset_reference, donate_argnums=0)(state)
    assert isinstance(fresh, AgemState)
    assert jax.tree.structure(fresh) == jax.tree.structure(tx.init(g))
    np.testing.assert_array_equal(fresh.reference["a"], [0.0])
    nothing = agem().init(g)
    assert reset_reference(nothing) == nothing


# Places in a chain


def test_pre_keeps_the_gradient_from_opposing_but_not_the_step_of_adam():
    grads, refs = stream(7, steps=1000, size=20)
    routed, _ = run(agem(), grads, refs)
    assert cosines(routed, refs).min() > -1e-6

    def opposed(*links):
        updates, _ = run(optax.chain(*links), grads, refs)
        return float(jnp.mean(cosines(updates, refs) < -1e-6))

    adam, no_momentum = optax.scale_by_adam(), optax.scale_by_adam(b1=0.0)
    # Measured 77 %, 67 %, 21 %, and none.
    assert 0.70 < opposed(adam) < 0.85
    assert 0.60 < opposed(agem(), adam) < 0.75
    assert 0.15 < opposed(agem(), no_momentum) < 0.28
    assert opposed(adam, agem()) == 0.0
    decoupled = optax_cl.chain(agem(), optax_cl.scale_by_decoupled_adam())
    assert abs(opposed(decoupled) - opposed(agem(), adam)) < 0.02


@pytest.mark.parametrize("at_boundary", ["reset", "keep"])
def test_a_boundary_clears_the_average_or_goes_on_with_it(at_boundary):
    grads, refs = jnp.ones([3, 2]), jnp.array([[1.0, -2.0]] * 3)
    tx = agem(decay=0.5, at_boundary=at_boundary)
    _, state = run(tx, grads, refs)
    statistics = optax_cl.collect(
        state, grads[0], [], task=optax_cl.Task(), key=jax.random.key(0)
    )
    after = jax.jit(optax_cl.end_task)(state, grads[0], statistics)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    kept = at_boundary == "keep"
    np.testing.assert_array_equal(after.reference, kept * state.reference)
    # The next step: by hand, r' = (r + g_ref) / 2 with the r that is left.
    next_ref = jnp.array([-2.0, 1.0])
    update, _ = tx.update(grads[0], after, reference_updates=next_ref)
    r = 0.5 * (kept * np.array([0.875, -1.75]) + np.array([-2.0, 1.0]))
    expected = np.ones(2) - min(r.sum(), 0.0) / (r @ r) * r
    np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_keeping_an_average_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"'keep'.*without `decay`"):
        agem(at_boundary="keep")
    with pytest.raises(ValueError, match="at_boundary"):
        agem(decay=0.5, at_boundary="forget")


def test_post_holds_at_every_step_despite_momentum_and_weight_decay():
    grads, refs = stream(8, steps=300)
    links = [optax.scale_by_adam(), optax.add_decayed_weights(0.3)]
    params = -jnp.logspace(0, 1, 12)
    unprotected, _ = run(optax.chain(*links), grads, refs, params)
    assert cosines(unprotected, refs).min() < -0.3
    post = optax.chain(*links, agem(), optax.scale_by_learning_rate(0.1))
    updates, _ = run(post, grads, refs, params)
    assert cosines(-updates, refs).min() > -1e-6


def test_post_before_and_after_the_learning_rate_are_the_same_with_their_signs():
    grads, refs = stream(9)
    adam, rate = optax.scale_by_adam(), optax.scale_by_learning_rate(0.01)
    for decay in (None, 0.5):
        before = agem(decay=decay)
        after = agem(decay=decay, sign="descent")
        one, _ = run(optax.chain(adam, before, rate), grads, refs)
        two, _ = run(optax.chain(adam, rate, after), grads, refs)
        np.testing.assert_allclose(one, two, atol=1e-8)


def test_the_wrong_sign_fails_on_both_sides_of_the_learning_rate():
    grads, refs = stream(9)
    adam, rate = optax.scale_by_adam(), optax.scale_by_learning_rate(0.01)
    before, _ = run(optax.chain(adam, agem(sign="descent"), rate), grads, refs)
    after, _ = run(optax.chain(adam, rate, agem(sign="gradient")), grads, refs)
    for updates in (before, after):
        harm = cosines(-updates, refs)
        assert harm.min() < -0.1  # harmful steps pass,
        assert harm.max() < 1e-5  # helpful ones are projected


def test_descent_leaves_a_helpful_step_bit_for_bit():
    u, ref = jnp.array([-1.0, 0.3]), jnp.array([2.0, 1.0])
    tx = agem(sign="descent")
    updates, _ = tx.update(u, tx.init(u), reference_updates=ref)
    np.testing.assert_array_equal(updates, u)
    updates, _ = tx.update(-u, tx.init(u), reference_updates=ref)
    np.testing.assert_allclose(updates @ ref, 0.0, atol=1e-6)


# Wrappers and transformations of JAX


def test_masked_leaves_take_no_part_in_the_inner_product():
    g = {"in": jnp.array([-1.0, 2.0]), "out": jnp.array([9.0])}
    ref = {"in": jnp.array([1.0, 0.0]), "out": jnp.array([1.0])}
    mask = {"in": True, "out": False}
    for decay in (None, 0.0):
        tx = optax.masked(agem(decay=decay), mask)
        updates, _ = jax.jit(tx.update)(g, tx.init(g), reference_updates=ref)
        np.testing.assert_allclose(updates["in"], [0.0, 2.0], atol=1e-7)
        np.testing.assert_array_equal(updates["out"], g["out"])
        compatible = optax.masked(
            agem(decay=decay), mask, mask_compatible_extra_args=True
        )
        again, _ = compatible.update(g, compatible.init(g), reference_updates=ref)
        np.testing.assert_allclose(again["in"], updates["in"])


def test_partition_projects_each_part_by_itself():
    g = {"a": jnp.array([-1.0]), "b": jnp.array([5.0]), "c": jnp.array([-1.0])}
    ref = jax.tree.map(jnp.ones_like, g)
    tx = optax.partition(
        {"x": agem(), "y": agem(decay=0.5), "z": optax.identity()},
        {"a": "x", "b": "y", "c": "z"},
    )
    updates, _ = tx.update(g, tx.init(g), reference_updates=ref)
    assert {k: float(v[0]) for k, v in updates.items()} == {"a": 0, "b": 5, "c": -1}


@pytest.mark.parametrize("decay", [None, 0.0])
def test_multisteps_uses_the_reference_of_the_last_micro_step(decay):
    grads = jnp.array([[1.0, 0.0], [3.0, 0.0]])
    refs = jnp.array([[0.0, -1.0], [-1.0, 1.0]])
    tx = optax.MultiSteps(agem(decay=decay), 2)
    state = tx.init(grads[0])
    for g, ref in zip(grads, refs, strict=True):
        updates, state = jax.jit(tx.update)(g, state, reference_updates=ref)
    expected = project_in_float64(np.array([2.0, 0.0]), np.array([-1.0, 1.0]))
    np.testing.assert_allclose(updates, expected, atol=1e-6)
    # The mean of the references would have given something else.
    other = project_in_float64(np.array([2.0, 0.0]), np.array([-0.5, 0.0]))
    assert np.abs(other - expected).max() > 0.5


def test_inject_hyperparams_passes_decay_as_an_array():
    grads, refs = stream(11)
    expected, _ = run(agem(decay=0.5, sign="descent"), grads, refs)
    tx = optax.inject_hyperparams(agem)(decay=0.5, sign="descent")
    updates, state = run(tx, grads, refs)
    np.testing.assert_allclose(updates, expected, atol=1e-6)
    assert float(state.hyperparams["decay"]) == 0.5


def test_vmap_over_decays_and_streams_equals_a_loop():
    streams = [stream(s) for s in (12, 14)]
    grads, refs = (jnp.stack(x) for x in zip(*streams, strict=True))
    decays = jnp.array([0.2, 0.8])
    together = jax.vmap(lambda d, g, r: run(agem(decay=d), g, r)[0])(
        decays, grads, refs
    )
    for i, decay in enumerate((0.2, 0.8)):
        alone, _ = run(agem(decay=decay), *streams[i])
        np.testing.assert_allclose(together[i], alone, atol=1e-6)


def test_one_compilation_with_donation_before_and_after_the_first_boundary():
    traces = []
    tx = optax.chain(agem(decay=0.9), optax.scale_by_adam())

    @functools.partial(jax.jit, donate_argnums=1)
    def step(g, state, ref):
        traces.append(None)
        return tx.update(g, state, reference_updates=ref)

    g = {"w": jnp.ones([3]), "s": jnp.ones([])}
    state = tx.init(g)
    for factor in (0.0, 0.0, -1.0):
        ref = jax.tree.map(lambda x, f=factor: f * x, g)
        updates, state = step(g, state, ref)
        state = (reset_reference(state[0]), *state[1:])
    assert len(traces) == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


def test_apply_if_finite_and_none_leaves_and_empty_trees():
    g = {"w": jnp.array([-1.0, 1.0]), "hole": None, "empty": {}}
    ref = {**g, "w": jnp.array([1.0, 0.0])}
    tx = optax.apply_if_finite(agem(decay=0.5), 3)
    updates, state = tx.update(g, tx.init(g), reference_updates=ref)
    np.testing.assert_allclose(updates["w"], [0.0, 1.0], atol=1e-7)
    bad = {**g, "w": jnp.array([np.nan, 1.0])}
    _, state = tx.update(bad, state, reference_updates=ref)
    assert int(state.notfinite_count) == 1
    for tx in (agem(), agem(decay=0.5)):
        assert tx.update({}, tx.init({}), reference_updates={})[0] == {}


def test_state_can_be_mapped_as_parameters():
    g = {"w": jnp.ones([2])}
    tx = agem(decay=0.5)
    doubled = optax.tree.map_params(tx, lambda x: x + 1, tx.init(g))
    np.testing.assert_array_equal(doubled.reference["w"], [1.0, 1.0])


# Bad input


def test_a_missing_reference_names_the_fix():
    g = jnp.ones([2])
    tx = optax.chain(agem(), optax.scale_by_adam())
    with pytest.raises(ValueError, match=r"reference_updates=\.\.\..*zeros_like"):
        tx.update(g, tx.init(g))


def test_a_reference_of_other_shape_names_the_leaf():
    g = {"w": jnp.ones([2])}
    for tx in (agem(), agem(decay=0.5)):
        with pytest.raises(ValueError, match=r"`reference_updates`.*`w` got \(1,\)"):
            tx.update(g, tx.init(g), reference_updates={"w": jnp.ones([1])})
        with pytest.raises(ValueError, match="`reference_updates` must have the tree"):
            tx.update(g, tx.init(g), reference_updates={"v": jnp.ones([2])})


@pytest.mark.parametrize("decay", [-0.1, 1.0, np.nan, np.inf])
def test_a_decay_outside_its_interval_is_refused(decay):
    with pytest.raises(
        ValueError, match=r"`decay` must be a finite number in \[0, 1\)"
    ):
        agem(decay=decay)


def test_leaves_that_are_no_real_numbers_are_refused():
    real, whole = {"w": jnp.ones(2)}, {"w": jnp.ones(2, jnp.int32)}
    tx = agem()
    for g, ref, name in ((whole, real, "updates"), (real, whole, "reference_updates")):
        with pytest.raises(
            TypeError, match=f"`{name}` must hold real.*at `w` got int3"
        ):
            tx.update(g, tx.init(real), reference_updates=ref)


def test_unknown_choices_are_refused():
    with pytest.raises(TypeError, match="`decay` must be a number"):
        agem(decay="0.9")
    with pytest.raises(ValueError, match="`granularity` must be one of"):
        agem(granularity="layer")
    with pytest.raises(ValueError, match="`sign` must be one of 'gradient', 'descent'"):
        agem(sign="minus")
