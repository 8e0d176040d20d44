"""GEM: its places in a chain, the wrappers, devices, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_cl
from optax_cl.projections import gem
from tests.arrays import distance, normal
from tests.projections.memories import (
    ALL,
    K,
    by_nnls,
    flat,
    problem,
    route,
    routed,
    tree_of,
    unit,
)

# Places in a chain


def stream(seed, steps=60, size=12):
    """Gradients and three memories each that conflict, in coordinates of all sizes."""
    scale = jnp.logspace(-2, 0, size)
    grads = (normal(seed, steps, size) + 0.3) * scale[None]
    return grads, (normal(seed + 1, steps, 3, size) - 0.3) * scale[None, None]


def run(tx, grads, memories, params=None):
    """All updates of a chain over a stream, in one scan."""
    params = jnp.ones_like(grads[0]) if params is None else params

    def step(state, data):
        g, rows = data
        updates, state = tx.update(
            g, state, params, memory_updates=rows, memory_mask=jnp.arange(3) < 2
        )
        return state, updates

    return jax.jit(lambda *data: jax.lax.scan(step, tx.init(params), data)[1])(
        grads, memories
    )


def worst_cosines(updates, memories):
    rows = unit(np.float64(memories[:, :2]))
    updates = np.float64(updates)
    dots = np.einsum("tki,ti->tk", rows, updates).min(1)
    return dots / np.maximum(np.linalg.norm(updates, axis=1), 1e-9)


def test_pre_keeps_the_gradient_from_opposing_but_not_the_step_of_adam():
    grads, memories = stream(7, steps=300, size=20)
    adam = optax.scale_by_adam()
    opposed = [
        np.mean(
            worst_cosines(run(optax.chain(*links), grads, memories), memories) < -1e-4
        )
        for links in ([adam], [gem()], [gem(), adam], [adam, gem()])
    ]
    assert opposed[0] > 0.8 and opposed[2] > 0.6
    assert opposed[1] == opposed[3] == 0


def test_post_holds_at_every_step_despite_momentum_and_weight_decay():
    grads, memories = stream(8, steps=200)
    links = [optax.scale_by_adam(), optax.add_decayed_weights(0.3)]
    post = optax.chain(*links, gem(), optax.scale_by_learning_rate(0.1))
    updates = run(post, grads, memories, -jnp.logspace(0, 1, 12))
    assert worst_cosines(-updates, memories).min() > -1e-4


def test_post_before_and_after_the_learning_rate_are_the_same_with_their_signs():
    grads, memories = stream(9)
    adam, rate = optax.scale_by_adam(), optax.scale_by_learning_rate(0.01)
    before = run(optax.chain(adam, gem(), rate), grads, memories)
    after = run(optax.chain(adam, rate, gem(sign="descent")), grads, memories)
    np.testing.assert_allclose(before, after, atol=1e-6)
    for links in ((adam, gem(sign="descent"), rate), (adam, rate, gem())):
        harm = worst_cosines(-run(optax.chain(*links), grads, memories), memories)
        assert harm.min() < -0.1  # the wrong sign lets harmful steps pass


def test_averaging_over_devices_must_come_before_the_projection():
    grads = np.array([[1.0, 0.0], [-3.0, 0.0]], np.float32)
    rows = jnp.array([[-1.0, 1.0]])
    tx = gem()

    @jax.jit
    def one(g):
        return tx.update(g, tx.init(g), memory_updates=rows, memory_mask=ALL[:1])[0]

    before = one(grads.mean(0))
    np.testing.assert_array_equal(before, [-1.0, 0.0])
    assert jnp.abs(before - np.mean([one(g) for g in grads], 0)).max() > 0.2


# Wrappers and transformations of JAX


def small(hidden=9.0):
    g = {"in": jnp.array([-1.0, 2.0]), "out": jnp.array([hidden])}
    rows = {"in": jnp.array([[1.0, 0.0], [0.0, 1.0]]), "out": jnp.ones((2, 1))}
    return g, {"memory_updates": rows, "memory_mask": jnp.ones(2, bool)}


def test_masked_leaves_take_no_part_in_the_inner_products():
    g, extra = small()
    for compatible in (False, True):
        tx = optax.masked(
            gem(), {"in": True, "out": False}, mask_compatible_extra_args=compatible
        )
        if compatible:
            extra = {**extra, "memory_mask": np.ones(2, bool)}
        updates, _ = jax.jit(tx.update)(g, tx.init(g), **extra)
        np.testing.assert_allclose(updates["in"], [0.0, 2.0], atol=1e-5)
        np.testing.assert_array_equal(updates["out"], g["out"])


def test_partition_projects_each_part_by_itself():
    g, extra = small(hidden=-9.0)
    tx = optax.partition({"a": gem(), "b": gem(margin=2.0)}, {"in": "a", "out": "b"})
    updates, _ = tx.update(g, tx.init(g), **extra)
    np.testing.assert_allclose(updates["in"], [0.0, 2.0], atol=1e-5)
    # Two equal memories with floors of 2 and a dual sum of 9.
    np.testing.assert_allclose(updates["out"], [0.0], atol=1e-4)


def test_multisteps_uses_the_memories_of_the_last_micro_step():
    grads = jnp.array([[1.0, 0.0], [3.0, 0.0]])
    rows = jnp.array([[[0.0, -1.0]], [[-1.0, 1.0]]])
    tx = optax.MultiSteps(gem(), 2)
    state = tx.init(grads[0])
    for g, memories in zip(grads, rows, strict=True):
        updates, state = jax.jit(tx.update)(
            g, state, memory_updates=memories, memory_mask=jnp.ones(1, bool)
        )
    np.testing.assert_allclose(updates, [1.0, 1.0], atol=1e-5)


def test_inject_hyperparams_passes_the_margin_as_an_array():
    grads, memories = stream(11)
    expected = run(gem(margin=0.5), grads, memories)
    injected = optax.inject_hyperparams(gem)(margin=0.5)
    np.testing.assert_allclose(run(injected, grads, memories), expected, atol=1e-6)


def test_vmap_over_margins_and_seeds_equals_a_loop():
    problems = [problem(seed, "all opposed") for seed in range(3)]
    g, rows = (np.stack(x) for x in zip(*problems, strict=True))
    rows[0, 3:] = np.nan  # masked there, and read for the others
    margins = np.array([0.0, 0.2, 0.9], np.float32)
    masks = np.arange(K) < np.array([[3], [1], [5]])
    together = jax.jit(jax.vmap(route))(tree_of(g), tree_of(rows), masks, margins)
    for i, margin in enumerate(margins):
        alone = routed(g[i], rows[i], masks[i], margin=margin)
        np.testing.assert_allclose(flat(together, 1)[i], alone, atol=1e-5)


def test_one_compilation_with_donation_while_the_memory_fills():
    traces = []
    tx = optax.chain(gem(margin=0.1), optax.scale_by_adam())

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(g, state, rows, count):
        traces.append(None)
        mask = jnp.arange(K) < count
        return tx.update(g, state, memory_updates=rows, memory_mask=mask)

    g, rows = problem(0, "all opposed")
    state = tx.init(tree_of(g))
    for count in range(K + 1):
        updates, state = step(tree_of(g), state, tree_of(rows), count)
    assert len(traces) == 1
    assert np.isfinite(flat(updates)).all()


def test_holes_and_empty_trees_pass_and_bad_gradients_are_skipped():
    g, extra = small()
    g["hole"] = None
    extra["memory_updates"]["hole"] = None
    tx = optax.apply_if_finite(gem(), 3)
    updates, state = tx.update(g, tx.init(g), **extra)
    assert updates["hole"] is None and np.isfinite(updates["in"]).all()
    bad = {**g, "in": jnp.array([np.nan, 1.0])}
    _, state = tx.update(bad, state, **extra)
    assert int(state.notfinite_count) == 1
    tx, mask = gem(), extra["memory_mask"]
    assert tx.update({}, tx.init({}), memory_updates={}, memory_mask=mask)[0] == {}
    assert jax.tree.leaves(tx.init(g)) == []


def test_bfloat16_gradients_are_projected_to_their_rounding():
    g, rows = problem(6, "all opposed")
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (tree_of(g), tree_of(rows)))
    out = route(*low)
    assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
    expected = by_nnls(flat(low[0]), flat(low[1], 1))
    bound = 2.0**-8 * np.abs(expected) + 1e-5 * np.linalg.norm(g)
    assert (np.abs(flat(out) - expected) <= bound).all()


def test_in_64_bits_the_oracle_is_met_closely(x64):
    g, rows = (jnp.asarray(x) for x in problem(7, "all opposed"))
    out, _ = gem().update(
        g, optax.EmptyState(), memory_updates=rows, memory_mask=jnp.asarray(ALL)
    )
    expected = by_nnls(np.asarray(g), np.asarray(rows))
    np.testing.assert_allclose(out, expected, atol=1e-12)


def test_sharded_leaves_give_what_one_device_gives():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    g = {"w": normal(0, 16, 3), "b": normal(1, 3)}
    rows = {"w": normal(2, K, 16, 3) - 0.4 * g["w"][None], "b": normal(3, K, 3)}
    expected = route(g, rows)
    assert distance(expected, g) > 0.1

    def place(tree, *specs):
        shardings = dict(
            zip(("w", "b"), (NamedSharding(mesh, s) for s in specs), strict=True)
        )
        return jax.device_put(tree, shardings)

    out = route(place(g, P("model"), P()), place(rows, P(None, "model"), P()))
    assert out["w"].sharding.spec == P("model")
    assert distance(out, expected) < 1e-5

    # Inside `shard_map` every device has all of it, and a loop's carry must vary alike.
    def on_each(g, rows):
        mean = functools.partial(jax.lax.pmean, axis_name="model")
        return jax.tree.map(mean, route(g, rows))

    mapped = jax.shard_map(on_each, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    assert distance(jax.jit(mapped)(g, rows), expected) < 1e-5
    split = jax.shard_map(
        lambda g, rows: route(g[0], rows[0])[None],
        mesh=mesh,
        in_specs=P("model"),
        out_specs=P("model"),
    )
    grads, memories = normal(4, 8, 6), normal(5, 8, K, 6)
    apart = jax.jit(split)(grads, memories)
    for i in range(8):
        assert distance(apart[i], route(grads[i], memories[i])) < 1e-5
    # The gradient may be the same on all devices, and then it is the start of a loop
    # whose result is not.
    split = jax.shard_map(
        lambda g, rows: route(g, rows[0])[None],
        mesh=mesh,
        in_specs=(P(), P("model")),
        out_specs=P("model"),
    )
    apart = jax.jit(split)(grads[0], memories)
    for i in range(8):
        assert distance(apart[i], route(grads[0], memories[i])) < 1e-5


def test_compiled_size_grows_linearly_with_the_number_of_leaves():
    def lines(n):
        g = {str(i): jnp.ones([80, 80]) for i in range(n)}
        rows = jax.tree.map(lambda x: jnp.stack([x, -x]), g)
        compiled = route.lower(g, rows, ALL[:2]).compile()
        return len(compiled.as_text().splitlines())

    assert lines(40) < 2.5 * lines(20)


@pytest.mark.parametrize("sign", ["gradient", "descent"])
def test_the_memories_are_not_copied(sign):
    size = 4096
    compiled = route.lower(
        jax.ShapeDtypeStruct([size], jnp.float32),
        jax.ShapeDtypeStruct([8, size], jnp.float32),
        ALL[:1].repeat(8),
        sign=sign,
    ).compile()
    # One tree at most is held beside what comes and goes.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * size


# Bad input


def test_missing_arguments_name_the_fix():
    g, extra = small()
    tx = optax.chain(gem(), optax.scale_by_adam())
    for name in extra:
        short = {k: v for k, v in extra.items() if k != name}
        with pytest.raises(ValueError, match=r"memory_mask=\.\.\..*all False"):
            tx.update(g, tx.init(g), **short)


def test_memories_of_other_shapes_name_the_leaf():
    g, extra = small()
    tx = gem()
    rows = extra["memory_updates"]
    with pytest.raises(
        ValueError, match=r"axis of 3.*`in` got \(2, 2\), expected \(3,"
    ):
        tx.update(g, tx.init(g), memory_updates=rows, memory_mask=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"`out` got \(1,\), expected \(2, 1\)"):
        extra["memory_updates"] = {**rows, "out": jnp.ones(1)}
        tx.update(g, tx.init(g), **extra)
    with pytest.raises(ValueError, match="`memory_updates` must have the tree"):
        extra["memory_updates"] = {"in": rows["in"]}
        tx.update(g, tx.init(g), **extra)


def test_a_mask_of_other_kind_is_refused():
    g, extra = small()
    tx = gem()
    for mask, error, match in [
        (jnp.array([1, 0]), TypeError, "must be boolean; got int32.*arange"),
        (jnp.ones((), bool), ValueError, r"shape \[K\].*got \(\)"),
        (jnp.ones((0,), bool), ValueError, r"shape \[K\].*got \(0,\)"),
    ]:
        with pytest.raises(error, match=match):
            tx.update(g, tx.init(g), **{**extra, "memory_mask": mask})


def test_leaves_that_are_no_real_numbers_are_refused():
    real, mask = {"w": jnp.ones(2)}, jnp.ones(1, bool)
    for sign, dtype in (("gradient", "int32"), ("descent", "bool")):
        tx, other = gem(sign=sign), {"w": jnp.ones(2, dtype)}
        for g, row, name in ((other, real, "updates"), (real, other, "memory_updates")):
            rows = {"w": row["w"][None]}
            with pytest.raises(TypeError, match=f"`{name}` .*at `w` got {dtype}"):
                tx.update(g, tx.init(g), memory_updates=rows, memory_mask=mask)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"`margin` must be .* \[0, inf"):
        gem(margin=-0.1)
    with pytest.raises(TypeError, match="`margin` must be a number"):
        gem(margin="0.5")
    with pytest.raises(ValueError, match="`sign` must be one of 'gradient', 'descent'"):
        gem(sign="minus")


def test_the_same_in_decoupled_adamw():
    grads, memories = stream(12)
    tx = optax_cl.decoupled_adamw(0.1, post=[gem()])
    assert worst_cosines(-run(tx, grads, memories), memories).min() > -1e-4
