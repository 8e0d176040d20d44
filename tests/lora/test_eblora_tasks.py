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
