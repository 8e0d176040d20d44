import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl import lora
from tests.arrays import normal
from tests.lora.helpers import PATH, start


class Sequence:
    """Three linear tasks, each with inputs from a subspace of three dimensions."""

    def __init__(self, memory_rank=9):
        self.key = jax.random.key(0)
        self.params = {"layer": {"kernel": normal(0, 12, 10)}}
        self.targets = lora.targets(self.params, {"kernel": 2}, alpha=4.0)
        self.traces = 0
        # At threshold one the memory takes in all inputs that the gradient reads.
        self.tx = lora.eblora(
            optax.adam(0.05),
            optax.adam(0.05),
            targets=self.targets,
            memory_rank=memory_rank,
            threshold=0.99999,
        )

        def losses(given, batch):
            adapters, params = given
            merged = lora.merge(self.targets, params, adapters)
            return jnp.sum((batch[0] @ merged["layer"]["kernel"] - batch[1]) ** 2, -1)

        self.task = optax_cl.Task(loss=losses)

        @jax.jit
        def train(adapters, state, params, batch):
            self.traces += 1

            def body(carry, _):
                adapters, state = carry
                loss = lambda a: losses((a, params), batch).mean()  # noqa: E731
                updates, state = self.tx.update(
                    jax.grad(loss)(adapters), state, adapters
                )
                return (optax.apply_updates(adapters, updates), state), None

            return jax.lax.scan(body, (adapters, state), None, length=20)[0]

        self.train = train

        @jax.jit
        def gradients(params, batch):
            def loss(kernel):
                return jnp.mean(jnp.sum((batch[0] @ kernel - batch[1]) ** 2, -1))

            return {PATH: jax.grad(loss)(params["layer"]["kernel"])}

        self.gradients = gradients

    def batch(self, t):
        rng = np.random.default_rng(t)
        inputs = rng.normal(size=(8, 3)) @ rng.normal(size=(3, 12))
        return np.float32(inputs), np.float32(rng.normal(size=(8, 10)))

    def learn(self, params, state, t):
        """One task: start, train, boundary, merge."""
        batch = self.batch(t)
        gradients = self.gradients(params, batch)
        memory = None if state is None else lora.memory(state)
        adapters = lora.eblora_init(self.targets, gradients, memory)
        state = self.tx.init(adapters) if state is None else state
        state = optax_cl.begin_task(state, adapters)
        adapters, state = self.train(adapters, state, params, batch)
        statistics = optax_cl.collect(
            state, adapters, [batch], task=self.task, frozen=params, key=self.key
        )
        state = optax_cl.end_task(state, adapters, statistics, moments="reset")
        return lora.merge(self.targets, params, adapters), state


@functools.cache
def sequence(memory_rank=9):
    return Sequence(memory_rank)


def test_responses_to_the_inputs_of_old_tasks_stay_exactly():
    tasks = sequence()
    params, state, after = tasks.params, None, []
    for t in range(3):
        params, state = tasks.learn(params, state, t)
        after.append(np.asarray(params["layer"]["kernel"]))
    assert int(jax.tree.leaves(state.memory.count)[0]) == 9
    assert int(state.tasks) == 3
    for t in range(2):
        inputs, _ = tasks.batch(t)
        np.testing.assert_allclose(inputs @ after[-1], inputs @ after[t], atol=2e-5)
        # Each task did change the responses to its own inputs.
        before = after[t - 1] if t else np.asarray(tasks.params["layer"]["kernel"])
        assert np.abs(inputs @ (after[t] - before)).max() > 1.0
    assert tasks.traces == 1  # over tasks, and over the tests that share it


def test_without_a_memory_they_change():
    tasks = sequence(memory_rank=None)
    params, state = tasks.learn(tasks.params, None, 0)
    later, state = tasks.learn(params, state, 1)
    inputs, _ = tasks.batch(0)
    change = np.subtract(params["layer"]["kernel"], later["layer"]["kernel"])
    assert np.abs(inputs @ change).max() > 0.1
    assert lora.memory(state) == {}


def test_begin_task_refuses_old_factors_that_overlap_the_memory():
    tasks = sequence()
    adapters = lora.eblora_init(
        tasks.targets, tasks.gradients(tasks.params, tasks.batch(0))
    )
    _, state = tasks.learn(tasks.params, None, 0)
    with pytest.raises(ValueError, match=r"layer/kernel/v.*orthogonal to the memory"):
        optax_cl.begin_task(state, adapters)


def test_gradients_at_the_weights_before_the_first_task_come_by_the_documented_recipe():
    # Those weights as `frozen`, with adapters of magnitude zero.
    tasks = sequence()
    learned, state = tasks.learn(tasks.params, None, 0)
    batch = tasks.batch(1)
    adapters = lora.eblora_init(tasks.targets, tasks.gradients(learned, batch))

    def found(adapters, frozen):
        statistics = optax_cl.collect(
            state, adapters, [batch], task=tasks.task, frozen=frozen, key=tasks.key
        )
        (gradients,) = statistics.results.values()
        return gradients[PATH]

    zero = {PATH: adapters[PATH]._replace(s=jnp.zeros([]))}
    at_base = tasks.gradients(tasks.params, batch)[PATH]
    np.testing.assert_allclose(found(zero, tasks.params), at_base, rtol=1e-4, atol=1e-5)
    # Otherwise they are those at the adapted weights.
    merged = lora.merge(tasks.targets, learned, adapters)
    at_adapted = tasks.gradients(merged, batch)[PATH]
    np.testing.assert_allclose(
        found(adapters, learned), at_adapted, rtol=1e-4, atol=1e-5
    )
    assert np.abs(np.asarray(at_adapted - at_base)).max() > 0.1


def collected(tasks, state, adapters, params, t=0):
    return optax_cl.collect(
        state, adapters, [tasks.batch(t)], task=tasks.task, frozen=params, key=tasks.key
    )


@pytest.mark.parametrize("call", ["none", "jitted"])
def test_going_on_with_merged_adapters_is_told_at_the_next_boundary(call):
    tasks = sequence()
    params, batch = tasks.params, tasks.batch(0)
    adapters = lora.eblora_init(tasks.targets, tasks.gradients(params, batch))
    state = tasks.tx.init(adapters)
    adapters, state = tasks.train(adapters, state, params, batch)
    statistics = collected(tasks, state, adapters, params)
    state = optax_cl.end_task(state, adapters, statistics, moments="reset")
    assert float(state.drift) < 1e-5
    params = lora.merge(tasks.targets, params, adapters)
    if call == "jitted":  # where it cannot look
        state = jax.jit(optax_cl.begin_task)(state, adapters)
    basis = np.asarray(lora.memory(state)[PATH])
    overlap = np.abs(basis.T @ np.asarray(adapters[PATH].v)).max()
    assert overlap > 0.1
    # Not only the first step, after which V is off the memory again.
    adapters, state = tasks.train(adapters, state, params, tasks.batch(1))
    assert np.abs(basis.T @ np.asarray(adapters[PATH].v)).max() < 1e-5
    assert float(state.drift) == pytest.approx(overlap, rel=0.3)
    with pytest.warns(UserWarning, match="start new adapters"):
        collected(tasks, state, adapters, params, 1)


@pytest.mark.parametrize("memory_rank", [9, None])
def test_adapters_of_lower_precision_than_the_state_was_made_for_are_refused(
    memory_rank,
):
    tasks = sequence(memory_rank)
    state = tasks.tx.init(start(tasks.targets))
    rounded = start(tasks.targets, dtype=jnp.bfloat16)
    match = r"layer/kernel/[sv]` is of dtype bfloat16.*no master copy"
    with pytest.raises(ValueError, match=match):
        tasks.tx.update(rounded, state, rounded)
    if memory_rank:
        for call in (optax_cl.begin_task, jax.jit(optax_cl.begin_task)):
            with pytest.raises(ValueError, match=match):
                call(state, rounded)
    # The other way round there is a copy, and it serves.
    state = optax_cl.begin_task(tasks.tx.init(rounded), start(tasks.targets))
    jax.eval_shape(tasks.tx.update, start(tasks.targets), state, start(tasks.targets))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("memory_rank", [9, None])
def test_factors_of_another_shape_are_refused(memory_rank, dtype):
    tasks = sequence(memory_rank)
    good = start(tasks.targets, dtype=dtype)
    state = tasks.tx.init(good)
    adapter = good[PATH]

    def step(state, adapters):
        return tasks.tx.update(adapters, state, adapters)

    calls = [step]
    if memory_rank or dtype == jnp.bfloat16:
        calls += [optax_cl.begin_task, jax.jit(optax_cl.begin_task)]
    bad = {PATH: adapter._replace(v=adapter.v[:, :1])}
    match = r"kernel/v` must have shape \(12, 2\) for its target; got \(12, 1\)"
    for call in calls:
        with pytest.raises(ValueError, match=match):
            call(state, bad)


def test_begin_task_is_silent_about_adapters_that_a_mask_hides():
    tasks = sequence(None)
    seen = start(tasks.targets)
    params = {**seen, "hidden": start(tasks.targets, dtype=jnp.bfloat16)}
    hide = {PATH: True, "hidden": False}
    state = optax.masked(tasks.tx, hide).init(params)
    optax_cl.begin_task(state, params)


def test_begin_task_refuses_factors_of_another_length():
    tasks = sequence()
    good = start(tasks.targets)
    long = {PATH: good[PATH]._replace(v=2 * good[PATH].v)}
    with pytest.raises(ValueError, match="kernel/v` must have orthonormal columns"):
        optax_cl.begin_task(tasks.tx.init(good), long)


@pytest.mark.parametrize("memory_rank", [9, None])
def test_begin_task_takes_the_states_of_seeds_side_by_side(memory_rank):
    tasks = sequence(memory_rank)
    seeds = jax.tree.map(lambda x: jnp.stack([x, x]), start(tasks.targets))
    states = jax.vmap(tasks.tx.init)(seeds)
    assert optax_cl.begin_task(states, seeds).drift.shape == (2,)


def test_a_full_memory_raises_where_that_is_the_policy_and_can_grow():
    tasks = sequence()
    tx = lora.eblora(
        optax.sgd(0.1),
        targets=tasks.targets,
        memory_rank=2,
        threshold=0.99999,
        overflow="error",
    )
    adapters = start(tasks.targets)
    state = tx.init(adapters)
    statistics = optax_cl.collect(
        state,
        adapters,
        [tasks.batch(0)],
        task=tasks.task,
        frozen=tasks.params,
        key=tasks.key,
    )
    with pytest.raises(ValueError, match=r"optax_cl\.grow"):
        optax_cl.end_task(state, adapters, statistics)
    with pytest.raises(ValueError, match="outside `jit`"):
        jax.jit(optax_cl.end_task)(state, adapters, statistics)
    (row,) = optax_cl.describe(state)
    assert (row.method, row.tasks, row.capacity) == ("Eblora", 0, 2)
    state = optax_cl.end_task(optax_cl.grow(state, 5), adapters, statistics)
    (row,) = optax_cl.describe(state)
    assert (row.tasks, row.left) == (3, 2)


def test_projected_moments_lose_what_is_in_the_memory():
    tasks = sequence()
    adapters, state = tasks.train(
        start(tasks.targets),
        tasks.tx.init(start(tasks.targets)),
        tasks.params,
        tasks.batch(0),
    )
    statistics = optax_cl.collect(
        state,
        adapters,
        [tasks.batch(0)],
        task=tasks.task,
        frozen=tasks.params,
        key=tasks.key,
    )
    kept = optax_cl.end_task(state, adapters, statistics)
    projected = optax_cl.end_task(state, adapters, statistics, moments="project")

    def overlap(state):
        basis = lora.memory(state)[PATH]
        mu = optax.tree.get_all_with_path(state, "mu")
        vs = [m[PATH].v for _, m in mu if isinstance(m[PATH].v, jax.Array)]
        return max(np.abs(np.asarray(basis).T @ np.asarray(v)).max() for v in vs)

    assert overlap(kept) > 1e-3
    assert overlap(projected) < 1e-4 * overlap(kept)
