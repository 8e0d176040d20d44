"""For which inputs is a layer's output unchanged by later tasks? Method by method.

One layer of 64 inputs, the pixels of real digits, learns three tasks of 12 images with
adapters of rank 4. "Unchanged" is to rounding in float32, unless it says bit for bit.
For each method there is a set of inputs for which it holds, and a counter-example: one
for which it does not, though one might think so.

==================  ================================================================
sequential          x orthogonal to the new ``a``, which nobody arranges
per-task adapters   every x, bit for bit, given the right task id
O-LoRA, penalty     as sequential: the overlap with old rows is small, not zero
O-LoRA, projection  x in the span of the rows of all old ``a``; not old inputs
frozen a, "mean"    x in the span of old mean gradients; not single old inputs
frozen a, "inputs"  every input that the memory saw; not others of the same task
replay              nothing exactly, not even what the buffer holds
==================  ================================================================
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import optax_cl
from optax_cl import lora

IN, OUT, RANK, IMAGES, STEPS = 64, 10, 4, 12, 100
KEY = jax.random.key(0)
ROUNDING = 1e-5  # of outputs of order one


PIXELS, LABELS = load_digits(return_X_y=True)


def digits_of(classes):
    rows = np.isin(LABELS, classes)
    # Every task uses the same three outputs for digits of its own.
    return np.float32(PIXELS[rows] / 16), np.int32(LABELS[rows] % 3)


DIGITS = [digits_of(classes) for classes in ([0, 1, 2], [3, 4, 5], [6, 7, 8])]
LEARNED = [{"x": x[:IMAGES], "y": y[:IMAGES]} for x, y in DIGITS]
UNSEEN = [x[IMAGES : 5 * IMAGES] for x, _ in DIGITS]
PARAMS = {"kernel": jax.random.normal(KEY, (IN, OUT)) / 8}
TARGETS = lora.targets(PARAMS, {"kernel": RANK}, alpha=2.0 * RANK)


# Compiled as one function: quicker than their operations one by one.
lora_init, merge = jax.jit(lora.lora_init), jax.jit(lora.merge)
frozen_a_init, project_start = jax.jit(lora.frozen_a_init), jax.jit(lora.project_start)


def logits(both, batch):
    adapters, params = both
    return batch["x"] @ lora.merge(TARGETS, params, adapters)["kernel"]


TASK = optax_cl.classification(logits, lambda batch: batch["y"])._replace(
    layer_inputs=lambda both, batch: {"kernel": batch["x"]}
)


NO_ADAPTERS = {"kernel": lora.LoRA(jnp.zeros((IN, RANK)), jnp.zeros((RANK, OUT)))}


@jax.jit
def mean_loss(params, batch):
    return TASK.loss((NO_ADAPTERS, params), batch).mean()


def base_loss(params, batch):
    return TASK.loss((NO_ADAPTERS, params), batch)


def frozen_a(statistic):
    return lora.frozen_a(
        targets=TARGETS, memory_rank=IN, threshold=1.0, statistic=statistic
    )


# Modifiers before Adam, and what stands behind it.
METHODS = {
    "sequential": ([], []),
    "penalty": ([lora.olora(0.5, capacity=3)], []),
    "projection": ([], [lora.olora_project(capacity=3)]),
    "frozen mean": ([], [frozen_a("mean")]),
    "frozen inputs": ([], [frozen_a("inputs")]),
}


class Learned(NamedTuple):
    """After each task."""

    params: list[Any]
    adapters: list[Any]
    memory: list[Any]


@functools.cache
def learn(method):
    pre, post = METHODS[method]
    tx = optax.chain(*pre, optax.adam(1e-2), *post)

    @jax.jit
    def train(adapters, state, params, batch):
        def step(carry, _):
            adapters, state = carry
            gradient = jax.grad(lambda t: TASK.loss((t, params), batch).mean())(
                adapters
            )
            updates, state = tx.update(gradient, state, adapters)
            return (optax.apply_updates(adapters, updates), state), None

        return jax.lax.scan(step, (adapters, state), length=STEPS)[0]

    params, state = PARAMS, None
    learned = Learned([], [], [])
    for task, batch in enumerate(LEARNED):
        memory = None if state is None else lora.memory(state)
        if method.startswith("frozen"):
            gradient = lora.mean_gradients(TARGETS, base_loss, params, [batch])
            adapters = frozen_a_init(TARGETS, gradient, memory)
        else:
            key = jax.random.fold_in(KEY, task)
            adapters = lora_init(TARGETS, params, key).adapters
        if state is None:
            state = tx.init(adapters)
        if method == "projection":
            adapters = project_start(adapters, state)
        adapters, state = train(adapters, state, params, batch)
        statistics = optax_cl.collect(
            state, adapters, [batch], task=TASK, frozen=params, key=KEY
        )
        state = optax_cl.end_task(state, adapters, statistics)
        state = optax_cl.reset_state(state)  # the moments belong to old factors
        params = merge(TARGETS, params, adapters)
        learned.params.append(params)
        learned.adapters.append(adapters)
        if method.startswith("frozen"):
            learned.memory.append(lora.memory(state)["kernel"])
    return learned


def change(method, x, since, until=2):
    """Largest change of the layer's output for inputs x, in units of their length."""
    params = learn(method).params
    x = np.asarray(x)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    before, after = (x @ np.asarray(params[task]["kernel"]) for task in (since, until))
    return float(np.abs(after - before).max())


def rows(method, *which):
    """Where the adapters of some tasks read, ``[n, in]``."""
    adapters = learn(method).adapters
    return np.concatenate([np.asarray(adapters[task]["kernel"].a).T for task in which])


def mixtures(directions):
    """Inputs in the span of some directions."""
    weights = np.random.default_rng(0).normal(size=(20, len(directions)))
    return np.float32(weights @ np.asarray(directions))


@pytest.mark.parametrize("method", METHODS)
def test_every_task_is_learned(method):
    # Else an unchanged output would show nothing.
    learned = learn(method)
    before = PARAMS
    for after, batch in zip(learned.params, LEARNED, strict=True):
        loss = [mean_loss(p, batch) for p in (before, after)]
        assert loss[1] < 0.5 * loss[0]
        before = after


@pytest.mark.parametrize("method", ["sequential", "penalty"])
def test_without_a_constraint_only_inputs_off_the_new_rows_are_unchanged(method):
    q = np.linalg.qr(rows(method, 1, 2).T)[0]
    off = UNSEEN[0] - UNSEEN[0] @ q @ q.T
    assert change(method, off, since=0) < ROUNDING
    assert change(method, LEARNED[0]["x"], since=0) > 0.1
    assert change(method, mixtures(rows(method, 0)), since=0) > 0.01


def test_the_penalty_makes_old_rows_move_less_but_not_not_at_all():
    moved = {
        method: change(method, mixtures(rows(method, 0)), since=0)
        for method in ("sequential", "penalty", "projection")
    }
    assert moved["penalty"] < 0.5 * moved["sequential"]
    assert moved["projection"] < ROUNDING < 0.01 < moved["penalty"]


def test_the_projection_holds_all_old_rows_but_not_old_inputs():
    assert change("projection", mixtures(rows("projection", 0)), since=0) < ROUNDING
    both = mixtures(rows("projection", 0, 1))
    assert change("projection", both, since=1) < ROUNDING
    # The second task was free to read where it had not yet read itself.
    assert change("projection", mixtures(rows("projection", 1)), since=0) > 0.01
    assert change("projection", LEARNED[0]["x"], since=0) > 0.1
    assert change("projection", LEARNED[1]["x"], since=1) > 0.1


def test_a_memory_of_mean_gradients_holds_its_span_but_not_single_old_inputs():
    memory = learn("frozen mean").memory
    for task in (0, 1):
        columns = np.any(np.asarray(memory[task]) != 0, axis=0).sum()
        assert 0 < columns <= OUT * (task + 1)
        held = mixtures(np.asarray(memory[task]).T)
        assert change("frozen mean", held, since=task) < ROUNDING
    assert change("frozen mean", LEARNED[0]["x"], since=0) > 0.01


def test_a_memory_of_inputs_holds_every_input_it_saw_but_no_others():
    memory = learn("frozen inputs").memory
    for task in (0, 1):
        columns = np.any(np.asarray(memory[task]) != 0, axis=0).sum()
        assert columns == IMAGES * (task + 1)
        seen = LEARNED[task]["x"]
        assert change("frozen inputs", seen, since=task) < ROUNDING
        assert change("frozen inputs", mixtures(seen), since=task) < ROUNDING
        assert change("frozen inputs", UNSEEN[task], since=task) > 0.01


def test_adapters_of_their_own_hold_every_input_given_the_right_task():
    learned = learn("sequential").adapters  # any adapters will do
    stacked, store = lora.stack(learned[0], capacity=3), jax.jit(lora.store)

    @jax.jit
    def outputs(stacked, task, x):
        return logits((lora.select(stacked, task), PARAMS), {"x": x})

    inputs = np.concatenate([UNSEEN[0], LEARNED[0]["x"]])
    stacked = store(stacked, 0, learned[0])
    first = np.asarray(outputs(stacked, 0, inputs))
    for task in (1, 2):
        stacked = store(stacked, task, learned[task])
        np.testing.assert_array_equal(outputs(stacked, 0, inputs), first)
        # With the wrong one nothing is held.
        assert np.abs(outputs(stacked, task, inputs) - first).max() > 0.1


def test_in_bfloat16_every_merge_rounds_the_kernel_and_no_more():
    learned = learn("frozen inputs").adapters
    x = LEARNED[0]["x"]

    @jax.jit
    def outputs(params):
        return x @ params["kernel"].astype(jnp.float32)

    params = {"kernel": np.asarray(PARAMS["kernel"]).astype(jnp.bfloat16)}
    params = lora.merge(TARGETS, params, learned[0])
    before, room = np.asarray(outputs(params)), 0.0
    for adapters in learned[1:]:
        params = lora.merge(TARGETS, params, adapters)
        # Half a unit in the last of eight places, of every entry.
        room += np.abs(x) @ np.abs(np.float32(params["kernel"])) * 2.0**-8
    moved = np.abs(outputs(params) - before)
    assert (moved <= room + ROUNDING).all()
    # Of outputs of order one: what the documentation says.
    assert 1e-3 < float(moved.max()) < 2e-2


def test_replay_holds_nothing_exactly():
    tx = optax_cl.chain(
        optax_cl.mix_replay(0.5),
        optax_cl.scale_by_decoupled_adam(),
        optax.scale(-1e-2),
    )
    first = learn("sequential").params[0]
    start = lora_init(TARGETS, first, jax.random.fold_in(KEY, 1)).adapters

    @jax.jit
    def train(adapters, state):
        def step(carry, _):
            adapters, state = carry
            new, old = (
                jax.grad(lambda t, b=b: TASK.loss((t, first), b).mean())(adapters)
                for b in (LEARNED[1], LEARNED[0])
            )
            updates, state = tx.update(new, state, adapters, replay_updates=old)
            return (optax.apply_updates(adapters, updates), state), None

        return jax.lax.scan(step, (adapters, state), length=STEPS)[0]

    adapters, _ = train(start, tx.init(start))
    after = merge(TARGETS, first, adapters)
    x = LEARNED[0]["x"]  # all of which is replayed, at every step
    moved = np.asarray(after["kernel"]) - np.asarray(first["kernel"])
    assert np.abs(x @ moved).max() > 0.1
    # Its loss is another matter.
    later = {"replay": after, "none": learn("sequential").params[1]}
    loss = {name: mean_loss(p, LEARNED[0]) for name, p in later.items()}
    assert loss["replay"] < 0.5 * loss["none"]


@functools.cache
def alone():
    """Adapters that learned one task each, beside the same weights."""
    tx = optax.adam(1e-2)

    @jax.jit
    def train(adapters, batch):
        def step(carry, _):
            adapters, state = carry
            loss = lambda t: TASK.loss((t, PARAMS), batch).mean()  # noqa: E731
            updates, state = tx.update(jax.grad(loss)(adapters), state)
            return (optax.apply_updates(adapters, updates), state), None

        return jax.lax.scan(step, (adapters, tx.init(adapters)), length=STEPS)[0][0]

    start = lora_init(TARGETS, PARAMS, KEY).adapters
    return [train(start, batch) for batch in LEARNED]


@functools.cache
def kept_apart():
    """Adapters of their own, stacked, and prototypes of what each task's inputs are."""
    adapters = alone()
    store, add = jax.jit(lora.store), jax.jit(lora.prototypes_add)
    stacked = lora.stack(adapters[0], capacity=3)
    prototypes = lora.prototypes_init(tasks=3, dim=IN, classes=3)
    for task, batch in enumerate(LEARNED):
        stacked = store(stacked, task, adapters[task])
        prototypes = add(prototypes, batch["x"], task=task, labels=batch["y"])
    return stacked, prototypes


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def answer(stacked, x, task):
    return logits((lora.select(stacked, task), PARAMS), {"x": x}).argmax()


@pytest.mark.parametrize(
    ("router", "options"), [("nearest_mean", {}), ("mahalanobis", {"shrinkage": 0.3})]
)
def test_adapters_of_their_own_serve_without_a_task_id(router, options):
    stacked, prototypes = kept_apart()
    x = np.concatenate(UNSEEN)
    task = np.repeat(np.arange(3), 4 * IMAGES)
    label = np.concatenate([y[IMAGES : 5 * IMAGES] for _, y in DIGITS])
    make = jax.jit(getattr(lora, router))
    routed = np.asarray(jax.jit(lora.route)(make(prototypes, **options), x).task)
    told, answers, one = (
        np.asarray(answer(stacked, x, np.int32(ids)))
        for ids in (task, routed, 0 * task)
    )
    rightly = routed == task
    np.testing.assert_array_equal(answers[rightly], told[rightly])
    accuracy = [(a == label).mean() for a in (told, answers, one)]
    assert rightly.mean() > 0.7
    assert accuracy[0] > 0.8 and accuracy[1] > 0.65
    assert accuracy[1] > accuracy[2] + 0.15  # than by any one adapter
