"""Eight devices compute what one computes: pmap, jit with shardings, shard_map.

Adam hides a gradient that is eight times too long, so SGD and the norms of the raw
gradients are compared beside it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_cl
from optax_cl._core.sharding import state_sharding

DEVICES = 8
STEPS = 2  # of each task


def chain(moments):
    links = (
        optax_cl.agem(),
        optax_cl.ewc(2.0),
        optax_cl.attenuate(optax_cl.ratchet(0.75)),
        moments,
    )
    return optax.chain(optax_cl.protect(2, *links), optax.scale(-0.1))


CHAINS = {
    "sgd": lambda: chain(optax.identity()),
    "adam": lambda: chain(optax_cl.scale_by_decoupled_adam()),
}


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 6), "b": (6,), "head": (6, 3)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def make_batch(seed):
    rng = np.random.default_rng(100 + seed)
    x = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    return {"x": x, "y": jnp.asarray(rng.integers(0, 3, 16))}


def logits(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
    return hidden @ params["head"]


TASK = optax_cl.classification(logits, lambda batch: batch["y"])


def loss(params, batch):
    return TASK.loss(params, batch).mean()


def finish(tx, params, state, gradients):
    """The rest of a step, from gradients that are means over all devices."""
    grads, reference = gradients
    updates, state = tx.update(grads, state, params, reference_updates=reference)
    norms = jnp.stack([optax.tree.norm(grads), optax.tree.norm(reference)])
    return optax.apply_updates(params, updates), state, norms


def both_gradients(gradient, params, batch, memory):
    return gradient(params, batch), gradient(params, memory)


def end(state, params, statistics):
    return optax_cl.begin_task(optax_cl.end_task(state, params, statistics), params)


def collect(state, params, seeds):
    batches = [make_batch(seed) for seed in seeds]
    return optax_cl.collect(state, params, batches, task=TASK, key=jax.random.key(0))


def train(tx, step, place=lambda tree: tree, boundary=None, first=lambda tree: tree):
    """Parameters and norms after each step of two tasks.

    ``place`` puts parameters and state on the devices, ``first`` takes one copy.
    """
    if boundary is None:
        boundary = jax.jit(end)
    params = make_params()
    params, state = place((params, tx.init(params)))
    history = []
    for task in range(2):
        for i in range(STEPS):
            seed = 10 * task + i
            params, state, norms = step(
                params, state, make_batch(seed), make_batch(30 + seed)
            )
            history.append(jax.tree.map(np.asarray, (first(params), first(norms))))
        if task == 0:
            # One batch; sums that go on to a second are in the test of sharded ones.
            statistics = collect(first(state), first(params), [50])
            state = boundary(state, params, statistics)
    return history


def on_one_device(tx):
    def step(params, state, batch, memory):
        gradients = both_gradients(jax.grad(loss), params, batch, memory)
        return finish(tx, params, state, gradients)

    return train(tx, jax.jit(step))


def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def with_jit(tx):
    replicated = NamedSharding(mesh(), P())
    split = NamedSharding(mesh(), P("data"))

    @functools.partial(
        jax.jit,
        in_shardings=(replicated, replicated, split, split),
        out_shardings=replicated,
        donate_argnums=(0, 1),
    )
    def step(params, state, batch, memory):
        gradients = both_gradients(jax.grad(loss), params, batch, memory)
        return finish(tx, params, state, gradients)

    return train(tx, step, lambda tree: jax.device_put(tree, replicated))


def mean_inside(params, batch):
    return jax.grad(lambda p: jax.lax.pmean(loss(p, batch), "data"))(params)


def mean_outside(params, batch):
    return jax.lax.pmean(jax.grad(loss)(params, batch), "data")


def with_shard_map(tx, gradient=mean_inside):
    replicated = NamedSharding(mesh(), P())

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh(),
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=P(),
    )
    def step(params, state, batch, memory):
        gradients = both_gradients(gradient, params, batch, memory)
        return finish(tx, params, state, gradients)

    return train(tx, step, lambda tree: jax.device_put(tree, replicated))


def with_pmap(tx):
    @functools.partial(jax.pmap, axis_name="data")
    def parallel(params, state, batch, memory):
        gradients = both_gradients(mean_outside, params, batch, memory)
        return finish(tx, params, state, gradients)

    def split(x):
        return np.reshape(x, (DEVICES, -1, *x.shape[1:]))

    def step(params, state, batch, memory):
        return parallel(params, state, *jax.tree.map(split, (batch, memory)))

    def replicate(tree):
        # From the host: JAX would compile a program for every shape.
        return jax.tree.map(lambda x: np.stack([x] * DEVICES), tree)

    def boundary(state, params, statistics):
        return jax.pmap(end, in_axes=(0, 0, None))(state, params, statistics)

    def first(tree):
        return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[0]), tree)

    return train(tx, step, replicate, boundary, first)


@functools.cache
def expected(name):
    return on_one_device(CHAINS[name]())


def assert_same(found, wanted, **tolerance):
    for f, w in zip(found, wanted, strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), f, w)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("run", [with_jit, with_shard_map, with_pmap])
# `jax.pmap` says that it is the old way; users still have it.
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_eight_devices_equal_one(run, name):
    assert_same(run(CHAINS[name]()), expected(name), rtol=2e-4, atol=1e-6)


def test_the_chains_route_on_this_data():
    # Or else the tests above would compare plain descent.
    routed = expected("sgd")
    plain = on_one_device(optax.with_extra_args_support(optax.chain(optax.scale(-0.1))))
    moved = routed[-1][0]["w"] - plain[-1][0]["w"]
    assert np.abs(moved).max() > 1e-2


def test_mean_after_grad_is_eight_times_too_long_in_shard_map():
    # Replicated parameters are cast to varying ones inside, and the transpose of that
    # cast already sums over the devices. SGD and norms show it, Adam does not.
    wrong = with_shard_map(optax.with_extra_args_support(optax.sgd(0.1)), mean_outside)
    right = on_one_device(optax.with_extra_args_support(optax.sgd(0.1)))
    np.testing.assert_allclose(wrong[0][1], DEVICES * right[0][1], rtol=1e-5)
    adam = optax_cl.decoupled_adamw(0.1)
    hidden = with_shard_map(adam, mean_outside)
    np.testing.assert_allclose(hidden[0][1], DEVICES * right[0][1], rtol=1e-5)
    assert_same([hidden[0][0]], [on_one_device(adam)[0][0]], rtol=1e-4, atol=1e-6)


def test_routing_each_shard_before_the_mean_is_another_method():
    # By hand: the second shard conflicts with the reference, their mean does not.
    shards = jnp.array([[3.0, 1.0], [-2.0, 1.0]])
    reference = jnp.array([1.0, 0.0])
    tx = optax_cl.agem()
    pair = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def route(grads):
        return tx.update(grads, tx.init(grads), reference_updates=reference)[0]

    def mean(grads):
        return jax.lax.pmean(grads, "data")

    def on_shards(function):
        mapped = jax.shard_map(
            lambda g: function(g[0]), mesh=pair, in_specs=P("data"), out_specs=P()
        )
        return np.asarray(jax.jit(mapped)(shards))

    np.testing.assert_allclose(on_shards(lambda g: mean(route(g))), [1.5, 1.0])
    np.testing.assert_allclose(on_shards(lambda g: route(mean(g))), [0.5, 1.0])


# --- Sharded parameters --------------------------------------------------------------


def grid():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


SPECS = {"w": P("model"), "b": P(), "head": P(None, "data")}


def sharded_params():
    params = make_params()
    return params | {"head": jnp.concatenate([params["head"], params["b"][:, None]], 1)}


def banked_chain():
    ewc = optax_cl.ewc(2.0, anchors="separate", capacity=3, overflow="merge")
    adam = optax_cl.scale_by_decoupled_adam()
    inside = ewc, optax_cl.attenuate(optax_cl.balance()), adam
    return optax.chain(optax_cl.protect(2, *inside), optax.scale(-0.1))


def test_state_sharding_follows_the_parameters():
    mesh = grid()
    found = state_sharding(banked_chain(), sharded_params(), SPECS, mesh=mesh)
    ewc, attenuation, adam = found[0].inner

    def specs(tree):
        return {k: s.spec for k, s in tree.items() if isinstance(s, NamedSharding)}

    whole = {"w": P("model", None), "b": P(None), "head": P(None, "data")}
    bank = {k: P(None, *s) for k, s in whole.items()}
    assert specs(adam.mu) == specs(adam.nu) == whole
    assert specs(ewc.memory.importance) == specs(ewc.memory.anchor) == bank
    assert specs(found[0].basis) == {"w": P("model", None), "head": P(None, None)}
    for replicated in (found[0].energy, found[0].anchor, found[0].curvature):
        assert set(specs(replicated).values()) == {P()}
    assert adam.count.spec == ewc.strength.spec == found[0].threshold.spec == P()
    assert not jax.tree.leaves(attenuation)


def test_state_sharding_takes_named_shardings_as_well():
    mesh = grid()
    named = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    tx, params = banked_chain(), sharded_params()
    by_name = state_sharding(tx, params, named)
    assert by_name == state_sharding(tx, params, SPECS, mesh=mesh)
    abstract = jax.eval_shape(lambda: params)
    assert by_name == state_sharding(tx, abstract, named)


def test_a_stack_of_kernels_has_its_bases_sharded_alike():
    views = optax_cl.matrix_views(stacked="layers")
    tx = optax_cl.protect(2, optax_cl.attenuate(0.5), matrices=views)
    params = {"layers": jnp.zeros((2, 4, 3)), "conv": jnp.zeros((3, 3, 4, 8))}
    specs = {"layers": P("data", "model", None), "conv": P(None, None, "model", None)}
    found = state_sharding(tx, params, specs, mesh=grid())
    assert found.basis["layers"].spec == P("data", "model", None)
    # Its fan-in is three axes in one: [36, r] follows none of them.
    assert found.basis["conv"].spec == P()


def test_a_single_array_has_its_state_sharded():
    found = state_sharding(optax.adam(0.1), jnp.zeros((4, 3)), P("model"), mesh=grid())
    assert found[0].mu.spec == P("model", None)
    assert found[0].count.spec == P()


def test_states_inside_wrappers_are_sharded():
    seen = {"w": True, "b": False, "head": True}
    tx = optax_cl.multi_steps(optax.masked(banked_chain(), seen), 2)
    found = state_sharding(tx, sharded_params(), SPECS, mesh=grid())
    adam = found.inner_opt_state.inner_state[0].inner[2]
    assert adam.mu["w"].spec == found.acc_grads["w"].spec == P("model", None)
    assert isinstance(adam.mu["b"], optax.MaskedNode)


def test_a_step_on_sharded_parameters_equals_one_device():
    mesh, tx = grid(), banked_chain()
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    states = state_sharding(tx, sharded_params(), shardings)
    batches = NamedSharding(mesh, P("data"))

    def step(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run(step, boundary, place):
        params = sharded_params()
        params, state = place(params, tx.init(params))
        for seed in range(4):
            params, state = step(params, state, make_batch(seed))
            if seed == 1:
                statistics = collect(state, params, [50, 60])
                state = boundary(state, params, statistics)
        return params, state

    sharded = jax.jit(
        step,
        in_shardings=(shardings, states, batches),
        out_shardings=(shardings, states),
        donate_argnums=(0, 1),
    )
    found = run(
        sharded,
        jax.jit(end, out_shardings=states),
        lambda *trees: jax.device_put(trees, (shardings, states)),
    )
    wanted = run(jax.jit(step), jax.jit(end), lambda *trees: trees)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        found,
        wanted,
    )
    importance = found[1][0].inner[0].memory.importance["w"]
    assert importance.addressable_shards[0].data.shape == (3, 1, 6)


@pytest.mark.parametrize(
    ("shardings", "mesh", "error", "match"),
    [
        ({"w": P()}, grid, ValueError, "structure of `params`"),
        (SPECS, lambda: None, ValueError, "at `b`, which names no devices"),
        (SPECS | {"w": 3}, grid, TypeError, "at `w` got 3 of type int"),
        (SPECS | {"b": P(None, "data")}, grid, ValueError, "at `b` is .* more entries"),
    ],
)
def test_state_sharding_refuses_what_it_can_not_place(shardings, mesh, error, match):
    with pytest.raises(error, match=match):
        state_sharding(optax.adam(0.1), make_params(), shardings, mesh=mesh())


def test_state_sharding_of_no_parameters_needs_a_mesh():
    with pytest.raises(ValueError, match="names no mesh"):
        state_sharding(optax.adam(0.1), {}, {})
    assert state_sharding(optax.adam(0.1), {}, {}, mesh=grid())[0].count.spec == P()
