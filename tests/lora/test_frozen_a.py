"""The frozen input side: its memory, and what that protects."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl import lora, testing

RNG = np.random.default_rng(0)
IN, OUT, R = 10, 6, 2
KEY = jax.random.key(0)
PARAMS = {"kernel": np.float32(RNG.normal(size=(IN, OUT)))}
TARGETS = lora.targets(PARAMS, {"kernel": R}, alpha=2.0 * R)

# Compiled as one function: quicker than their operations one by one.
frozen_a_init, merge = jax.jit(lora.frozen_a_init), jax.jit(lora.merge)
apply_updates = jax.jit(optax.apply_updates)


def losses(both, batch):
    adapters, params = both
    outputs = batch["x"] @ lora.merge(TARGETS, params, adapters)["kernel"]
    return jnp.sum((outputs - batch["y"]) ** 2, axis=-1)


TASK = optax_cl.Task(
    loss=losses, layer_inputs=lambda both, batch: {"kernel": batch["x"]}
)


def draw(*shape):
    return np.float32(RNG.normal(size=shape))


def batch_of(n, dimensions=IN):
    """Inputs in the span of a few directions."""
    x = draw(n, dimensions) @ draw(dimensions, IN)
    return {"x": x, "y": draw(n, OUT)}


def frozen(**kwargs):
    settings = {"targets": TARGETS, "memory_rank": IN, "threshold": 1.0}
    return lora.frozen_a(**(settings | kwargs))


def boundary(state, adapters, batches, task=TASK):
    statistics = optax_cl.collect(
        state, adapters, batches, task=task, frozen=PARAMS, key=KEY
    )
    return optax_cl.end_task(state, adapters, statistics)


def start(memory=None):
    return frozen_a_init(TARGETS, {"kernel": draw(IN, OUT)}, memory)


def product(adapters):
    return np.asarray(adapters["kernel"].a) @ np.asarray(adapters["kernel"].b)


def used(memory):
    return np.any(np.asarray(memory) != 0, axis=-2).sum(axis=-1)


# --- The update ----------------------------------------------------------------------


def test_the_input_side_stays_bit_for_bit_and_the_rest_passes():
    tx, adapters = lora.frozen_a(), start()
    gradient = jax.tree.map(lambda x: np.full_like(x, 3.0), adapters)
    nan = np.full((IN, R), np.nan, np.float32)
    broken = {"kernel": gradient["kernel"]._replace(a=nan)}
    update = jax.jit(tx.update)
    for g in (gradient, broken):
        updates, _ = update(g, tx.init(adapters))
        chex.assert_trees_all_equal(updates["kernel"].b, g["kernel"].b)
        moved = apply_updates(adapters, updates)
        chex.assert_trees_all_equal(moved["kernel"].a, adapters["kernel"].a)


def test_it_stands_last_or_weight_decay_moves_the_input_side():
    adapters = start()
    gradient = jax.tree.map(np.ones_like, adapters)
    adamw = optax.adamw(0.1, weight_decay=0.1)
    for links, still in (((adamw, frozen()), True), ((frozen(), adamw), False)):
        tx = optax.chain(*links)
        updates, _ = jax.jit(tx.update)(gradient, tx.init(adapters), adapters)
        assert (not np.any(np.asarray(updates["kernel"].a))) == still


# --- The memory ----------------------------------------------------------------------


def test_a_memory_of_mean_gradients_has_at_most_as_many_columns_as_outputs():
    # 20 inputs span all 10 dimensions; the mean gradient has rank 6.
    batches = [batch_of(20)]
    state = boundary(frozen().init(start()), start(), batches)
    assert used(lora.memory(state)["kernel"]) == OUT
    assert used(lora.memory(boundary(state, start(), batches))["kernel"]) <= IN - R


def test_a_memory_of_mean_gradients_protects_mixtures_of_inputs_only():
    data = batch_of(20, dimensions=IN)
    adapters = start()
    state = boundary(frozen().init(adapters), adapters, [data])
    learned = start(lora.memory(state))
    learned["kernel"] = learned["kernel"]._replace(b=draw(R, OUT))
    delta = product(learned)
    residual = data["x"] @ PARAMS["kernel"] - data["y"]
    mixtures = residual.T @ data["x"]  # what the loss would move: G^T
    size = np.abs(mixtures).max()
    assert np.abs(mixtures @ delta).max() < 1e-5 * size
    assert np.abs(data["x"] @ delta).max() > 0.1  # but not each input


def test_a_memory_of_all_inputs_protects_every_one_of_them():
    data, other = batch_of(20, dimensions=5), batch_of(20)
    adapters = start()
    state = frozen(statistic="inputs").init(adapters)
    state = boundary(state, adapters, [data])
    assert used(lora.memory(state)["kernel"]) == 5
    learned = start(lora.memory(state))
    learned["kernel"] = learned["kernel"]._replace(b=draw(R, OUT))
    delta = product(learned)
    assert np.abs(data["x"] @ delta).max() < 1e-5 * np.abs(data["x"]).max()
    assert np.abs(other["x"] @ delta).max() > 0.1


def test_a_memory_of_batches_spans_all_inputs_that_have_a_gradient():
    data = batch_of(8, dimensions=7)
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], data) for i in range(8)]
    adapters = start()
    state = boundary(frozen(statistic="batches").init(adapters), adapters, rows)
    memory = lora.memory(state)["kernel"]
    assert used(memory) >= 7  # the mean gradient has rank 6
    x, memory = data["x"], np.asarray(memory)
    np.testing.assert_allclose(x @ memory @ memory.T, x, atol=2e-3)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_a_threshold_keeps_the_fewest_directions_that_reach_it(threshold):
    data = batch_of(30)
    state = frozen(statistic="inputs", threshold=threshold).init(start())
    state = boundary(state, start(), [data])
    energy = np.linalg.svd(np.float64(data["x"]))[1] ** 2
    share = np.cumsum(energy) / energy.sum()
    expected = min(np.argmax(share >= threshold) + 1, IN - R)
    assert used(lora.memory(state)["kernel"]) == expected


def test_what_is_protected_stays_protected_over_three_tasks():
    tx = optax.chain(optax.adam(0.1), frozen(statistic="inputs"))
    adapters, params = start(), PARAMS
    state = tx.init(adapters)
    old = []

    @jax.jit
    def ten_steps(adapters, state, params, data):
        def step(carry, _):
            adapters, state = carry
            gradient = jax.grad(lambda t: losses((t, params), data).sum())(adapters)
            updates, state = tx.update(gradient, state, adapters)
            return (optax.apply_updates(adapters, updates), state), None

        return jax.lax.scan(step, (adapters, state), length=10)[0]

    for _ in range(3):
        data = batch_of(6, dimensions=2)
        kept = [d["x"] @ params["kernel"] for d in old]
        adapters, state = ten_steps(adapters, state, params, data)
        params = jax.tree.map(np.asarray, merge(TARGETS, params, adapters))
        for before, d in zip(kept, old, strict=True):
            np.testing.assert_allclose(d["x"] @ params["kernel"], before, atol=2e-5)
        old.append(data)
        state = optax_cl.reset_state(boundary(state, adapters, [data]))
        assert used(lora.memory(state)["kernel"]) == 2 * len(old)
        adapters = start(lora.memory(state))


def test_inputs_that_are_patches_or_stacked_are_counted_one_by_one():
    params = {"conv": np.zeros((3, 3, 2, 4)), "layers": np.zeros((2, IN, OUT))}
    targets = lora.targets(
        params,
        {".": 1},
        alpha=1.0,
        matrices=optax_cl.matrix_views(stacked="layers"),
    )
    patches, stacked = draw(5, 4, 4, 18), draw(2, 5, IN)
    found = lora.input_covariances(
        targets,
        lambda params, b: {"conv": b["p"], "layers": jnp.moveaxis(b["s"], 1, 0)},
        params,
        [
            {"p": patches[:3], "s": stacked.swapaxes(0, 1)[:3]},
            {"p": patches[3:], "s": stacked.swapaxes(0, 1)[3:]},  # ragged
        ],
    )
    flat = np.float64(patches).reshape(-1, 18)
    np.testing.assert_allclose(found["conv"], flat.T @ flat / len(flat), atol=1e-5)
    for i in range(2):
        x = np.float64(stacked[i])
        np.testing.assert_allclose(
            np.asarray(found["layers"])[i], x.T @ x / 5, atol=1e-5
        )


def test_a_full_memory_keeps_the_strongest_or_raises():
    data = batch_of(30)
    state = frozen(statistic="inputs", memory_rank=3).init(start())
    full = boundary(state, start(), [data])
    memory = np.asarray(lora.memory(full)["kernel"])
    top = np.linalg.svd(np.float64(data["x"]).T)[0][:, :3]
    np.testing.assert_allclose(memory @ memory.T, top @ top.T, atol=1e-4)
    strict = frozen(statistic="inputs", memory_rank=3, overflow="error")
    with pytest.raises(ValueError, match=r"`kernel` has 3 columns.*needs 7 more"):
        boundary(strict.init(start()), start(), [data])
    with pytest.raises(ValueError, match="inside a transformed function"):
        jax.jit(lambda s: boundary(s, start(), [data]))(strict.init(start()))
    (row,) = optax_cl.describe(full)
    assert (row.tasks, row.capacity) == (3, 3)
    grown = optax_cl.grow(full, 100)
    assert lora.memory(grown)["kernel"].shape == (IN, IN - R)
    assert used(lora.memory(boundary(grown, start(), [data]))["kernel"]) == IN - R
    with pytest.raises(ValueError, match=r"`capacity` is 100.*no memory has room"):
        optax_cl.grow(grown, 100)
    widest = frozen(statistic="inputs", memory_rank=np.int64(IN), overflow="error")
    with pytest.raises(ValueError, match=f"no room for more than {IN - R}: lower"):
        boundary(widest.init(start()), start(), [data])


def test_tasks_of_one_subspace_add_no_column_of_rounding():
    rng = np.random.default_rng(0)
    params = {"kernel": np.zeros((32, 4), np.float32)}
    targets = lora.targets(params, {"kernel": R}, alpha=2.0)
    tx = lora.frozen_a(
        targets=targets, memory_rank=20, threshold=1.0, statistic="inputs"
    )
    adapters = {"kernel": lora.LoRA(np.zeros((32, R)), np.zeros((R, 4)))}
    state, task = tx.init(adapters), optax_cl.Task(layer_inputs=lambda both, x: x)
    span = np.linalg.qr(rng.normal(size=(32, 8)))[0] * np.logspace(0, -2, 8)
    for _ in range(4):
        x = {"kernel": np.float32(rng.normal(size=(200, 8)) @ span.T)}
        found = optax_cl.collect(
            state, adapters, [x], task=task, frozen=params, key=KEY
        )
        state = optax_cl.end_task(state, adapters, found)
        assert used(lora.memory(state)["kernel"]) == 8


# --- Bad input, and the contract -----------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"memory_rank": None}, ValueError, "only `targets`"),
        ({"targets": None}, ValueError, "only `memory_rank`"),
        ({"targets": {"kernel": R}}, TypeError, "lora.targets"),
        ({"memory_rank": 0}, ValueError, "memory_rank"),
        ({"memory_rank": {"other": 3}}, ValueError, "one for each path"),
        ({"threshold": 1.5}, ValueError, "threshold"),
        ({"statistic": "median"}, ValueError, "'mean', 'batches', 'inputs'"),
        ({"overflow": "wrap"}, ValueError, "overflow"),
        ({"factors": "("}, ValueError, "factors"),
    ],
)
def test_arguments_out_of_range_are_named(kwargs, error, match):
    with pytest.raises(error, match=match):
        frozen(**kwargs)


def test_an_adapter_as_wide_as_its_inputs_leaves_no_room_for_a_memory():
    targets = lora.targets({"kernel": np.ones((2, 4))}, {"kernel": 2}, alpha=1.0)
    with pytest.raises(ValueError, match="no room for a memory"):
        lora.frozen_a(targets=targets, memory_rank=1)


def test_begin_task_refuses_an_input_side_that_overlaps_the_memory():
    data = [batch_of(4)]
    state = boundary(frozen(statistic="inputs").init(start()), start(), data)
    begin_task = jax.jit(optax_cl.begin_task)
    for scale in (1.0, 1e-5):  # of any length
        a = np.full((IN, R), scale, np.float32)
        overlapping = {"kernel": start()["kernel"]._replace(a=a)}
        with pytest.raises(ValueError, match=r"`kernel/a` must be orth.*frozen_a_init"):
            optax_cl.begin_task(state, overlapping)
        begin_task(state, overlapping)  # where values are not known
    for scale in (1e5, 1.0, 1e-4, 0.0):
        ones = {"kernel": np.ones((IN, OUT), np.float32)}
        off = frozen_a_init(TARGETS, ones, lora.memory(state), scale=scale)
        optax_cl.begin_task(state, off)


def test_begin_task_refuses_an_input_side_of_another_shape():
    state = frozen().init(start())
    for shape in ((IN, R + 1), (IN + 1, R)):
        adapters = {"kernel": lora.LoRA(np.ones(shape), np.zeros((shape[1], OUT)))}
        expected = rf"`kernel/a` must have shape \({IN}, {R}\) for its target; got"
        for call in (optax_cl.begin_task, jax.jit(optax_cl.begin_task)):
            with pytest.raises(ValueError, match=expected):
                call(state, adapters)
    seeds = jax.tree.map(lambda x: np.stack([x, x]), start())
    optax_cl.begin_task(jax.vmap(frozen().init)(seeds), seeds)


def test_what_the_memory_reads_must_be_given():
    adapters, data = start(), [batch_of(4)]
    with pytest.raises(ValueError, match="frozen=params"):
        optax_cl.collect(frozen().init(adapters), adapters, data, task=TASK, key=KEY)
    inputs = frozen(statistic="inputs").init(adapters)
    with pytest.raises(ValueError, match=r"`task.layer_inputs` is None"):
        boundary(inputs, adapters, data, optax_cl.Task(loss=losses))
    wrong = optax_cl.Task(layer_inputs=lambda both, batch: {"kernel": batch["y"]})
    with pytest.raises(ValueError, match=r"at `kernel` expected .* got shape \(4, 6\)"):
        boundary(inputs, adapters, data, wrong)
    none = optax_cl.Task(layer_inputs=lambda both, batch: {"bias": batch["y"]})
    with pytest.raises(ValueError, match="no inputs of `kernel`"):
        boundary(inputs, adapters, data, none)
    with pytest.raises(ValueError, match="no input-side factor"):
        frozen().init({"kernel": np.ones((IN, R))})


@pytest.mark.slow
def test_with_a_memory_it_keeps_the_contract():
    data = [batch_of(4), batch_of(3)]

    def make(threshold=0.9):
        hold = frozen(statistic="inputs", threshold=threshold)
        return optax_cl.chain(
            optax_cl.scale_by_decoupled_adam(), hold, optax.scale(-0.1)
        )

    def collect(state, factors):
        adapters = {"kernel": lora.LoRA(**factors["kernel"])}
        return optax_cl.collect(
            state, adapters, data, task=TASK, frozen=PARAMS, key=KEY
        )

    # Factors under the same paths, but not as `LoRA`, whose `a` the contract's
    # boundaries would have to start anew.
    factors = {"kernel": start()["kernel"]._asdict()}
    testing.check_contract(make, factors, collect=collect, converges=False)
