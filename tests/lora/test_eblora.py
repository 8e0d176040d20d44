import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl import lora, testing
from optax_cl.lora import stiefel

PATH = "layer/kernel"


def chosen(fan_in=12, fan_out=12, rank=2, stack=()):
    params = {"layer": {"kernel": jnp.zeros((*stack, fan_in, fan_out))}}
    views = optax_cl.matrix_views(stacked="kernel" if stack else None)
    return lora.targets(params, {"kernel": rank}, alpha=2.0 * rank, matrices=views)


# Outside jit the loops in it would be compiled anew by every call.
draw = jax.jit(stiefel.random, static_argnames=("shape", "dtype"))


def start(targets, key=0, s=-0.5, dtype=jnp.float32):
    adapters = {}
    for i, (path, target) in enumerate(targets.items()):
        *batch, fan_in, fan_out = target.matrix_shape
        keys = jax.random.split(jax.random.fold_in(jax.random.key(key), i))
        adapters[path] = lora.Spectral(
            s=jnp.full(batch, s, dtype),
            u=draw(keys[0], (*batch, fan_out, target.rank), dtype=dtype),
            v=draw(keys[1], (*batch, fan_in, target.rank), dtype=dtype),
        )
    return adapters


@functools.cache
def pull(targets, key=9):
    """The gradient of half the squared distance of each product to a random matrix."""

    def loss(adapters):
        total = 0.0
        for i, (path, target) in enumerate(targets.items()):
            shape = target.matrix_shape
            wanted = jax.random.normal(
                jax.random.fold_in(jax.random.key(key), i), shape
            )
            total += jnp.sum((lora.product(adapters[path]) - wanted) ** 2) / 2
        return total

    return jax.grad(loss)


@functools.cache
def scanned(tx, gradient, steps):
    def body(carry, _):
        params, opt_state = carry
        updates, opt_state = tx.update(gradient(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.jit(lambda carry: jax.lax.scan(body, carry, None, length=steps)[0])


def run(tx, adapters, gradient, steps, state=None):
    """The adapters and the state after some steps; one compilation for each ``tx``."""
    state = tx.init(adapters) if state is None else state
    return scanned(tx, gradient, steps)((adapters, state))


def distance(a, b):
    return max(
        float(jnp.max(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32))))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- What holds after every step -----------------------------------------------------


def test_three_thousand_adam_steps_leave_balanced_adapters_off_the_memory():
    targets = chosen(256, 192, 8)
    memory = jnp.linalg.qr(jax.random.normal(jax.random.key(5), (256, 40)))[0]
    adapters = start(targets)
    v = draw(jax.random.key(6), (256, 8), memory=memory)
    adapters = {PATH: adapters[PATH]._replace(v=v)}
    tx = lora.eblora(
        optax.adam(1e-2), optax.adam(1e-2), targets=targets, memory_rank=40
    )
    state = tx.init(adapters)
    basis = jax.tree.map(lambda _: memory, state.memory.basis)
    state = state._replace(memory=state.memory._replace(basis=basis))
    adapters, state = run(tx, adapters, pull(targets), 3000, state)
    adapter = adapters[PATH]
    assert float(stiefel.orthonormality_error(adapter.u)) < 5e-6
    assert float(stiefel.orthonormality_error(adapter.v)) < 5e-6
    assert float(jnp.max(jnp.abs(memory.T @ adapter.v))) < 1e-6
    update = np.asarray(lora.product(adapter), np.float64)
    singular = np.linalg.svd(update, compute_uv=False)
    s = abs(float(adapter.s))
    assert s > 1  # it went somewhere
    np.testing.assert_allclose(singular[:8], s, rtol=3e-6)
    assert singular[8:].max() < 1e-5 * s
    np.testing.assert_allclose(np.linalg.norm(update), s * 8**0.5, rtol=3e-6)
    assert float(state.drift) < 1e-5


def test_a_zero_magnitude_moves_first_and_alone():
    targets = chosen()
    tx = lora.eblora(optax.adam(0.1), targets=targets, memory_rank=None)
    adapters = start(targets, s=0.0)
    gradient = pull(targets)(adapters)[PATH]
    assert not gradient.u.any() and not gradient.v.any()
    first, state = run(tx, adapters, pull(targets), 1)
    assert distance(first[PATH].u, adapters[PATH].u) < 1e-6
    assert abs(abs(float(first[PATH].s)) - 0.1) < 1e-6
    second, _ = run(tx, first, pull(targets), 1, state)
    assert distance(second[PATH].u, first[PATH].u) > 1e-2


def test_signs_shared_out_differently_give_the_same_update():
    targets = chosen()
    tx = lora.eblora(optax.adam(0.05), targets=targets, memory_rank=None)
    adapters = start(targets)
    flipped = {PATH: adapters[PATH]._replace(s=0.5 * jnp.ones([]), u=-adapters[PATH].u)}
    one, _ = run(tx, adapters, pull(targets), 5)
    other, _ = run(tx, flipped, pull(targets), 5)
    np.testing.assert_allclose(
        lora.product(one[PATH]), lora.product(other[PATH]), atol=1e-5
    )


def test_stacked_layers_train_as_each_by_itself():
    single, stacked = chosen(), chosen(stack=(3,))
    gradients = start(stacked, key=4)[PATH]
    adapters = start(stacked)[PATH]

    def after(targets, params, g):
        tx = lora.eblora(optax.adam(0.05), targets=targets, memory_rank=3)
        return run(tx, {PATH: params}, lambda p: {PATH: g}, 3)[0][PATH]

    together = after(stacked, adapters, gradients)
    for i in (0, 2):
        pick = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
        alone = after(single, pick(adapters), pick(gradients))
        assert distance(pick(together), alone) < 1e-5


def test_weight_decay_inside_does_nothing_to_directions_and_shrinks_magnitudes():
    targets = chosen()
    adapters = start(targets)

    def after(tx):
        return run(
            lora.eblora(tx, targets=targets, memory_rank=None),
            adapters,
            pull(targets),
            1,
        )[0][PATH]

    plain, decayed = after(optax.adam(0.1)), after(optax.adamw(0.1, weight_decay=0.5))
    assert distance(plain[1:], decayed[1:]) < 2e-6
    np.testing.assert_allclose(plain.s - decayed.s, 0.1 * 0.5 * -0.5, atol=1e-6)


def test_other_leaves_go_through_the_inner_optimizer_untouched():
    targets = chosen()
    others = {
        "head": jnp.arange(6.0).reshape(2, 3),
        "old": lora.LoRA(a=jnp.ones((4, 2)), b=jnp.ones((2, 3))),
    }
    params = {**start(targets), **others}
    grads = jax.tree.map(lambda p: 0.1 * p + 0.3, params)
    adam = optax.adamw(0.1)
    tx = lora.eblora(adam, optax.adam(0.1), targets=targets, memory_rank=2)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    pick = lambda tree: {name: tree[name] for name in others}  # noqa: E731
    expected, _ = jax.jit(adam.update)(pick(grads), adam.init(others), others)
    assert distance(pick(updates), expected) == 0


def test_the_canonical_metric_doubles_rotations_inside_the_span():
    targets = chosen()
    adapters = start(targets)
    u, v = adapters[PATH].u, adapters[PATH].v
    turn = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    grads = {PATH: lora.Spectral(s=jnp.zeros([]), u=1e-3 * u @ turn, v=0 * v)}

    def moved(metric):
        tx = lora.eblora(
            optax.sgd(1.0), targets=targets, memory_rank=None, metric=metric
        )
        return jax.jit(tx.update)(grads, tx.init(adapters), adapters)[0][PATH].u

    # Once for the gradient and once for the step.
    np.testing.assert_allclose(moved("canonical"), 4 * moved("euclidean"), atol=2e-5)


def test_the_multiplier_scales_steps_of_directions_only():
    targets = chosen()
    adapters = start(targets)

    def after(rate, multiplier):
        tx = lora.eblora(
            optax.sgd(rate),
            optax.sgd(0.1),
            targets=targets,
            memory_rank=None,
            step_multiplier=multiplier,
        )
        return run(tx, adapters, pull(targets), 2)[0]

    assert distance(after(0.02, 1.0), after(0.005, 4.0)) < 1e-6


def test_transported_moments_are_tangent_at_the_new_points():
    targets = chosen()
    tx = lora.eblora(
        optax.adam(0.3),
        optax.adam(0.1),
        targets=targets,
        memory_rank=None,
        transport=True,
    )
    adapters, state = run(tx, start(targets), pull(targets), 3)
    found = []
    for node in jax.tree.leaves(
        state, is_leaf=lambda n: isinstance(n, optax.ScaleByAdamState)
    ):
        if isinstance(node, optax.ScaleByAdamState):
            mu = node.mu[PATH].u
            if isinstance(mu, jax.Array):
                found.append(adapters[PATH].u.T @ mu)
    (inner,) = found
    assert float(jnp.abs(inner + inner.T).max()) < 1e-5


# --- Tasks ---------------------------------------------------------------------------


class Sequence:
    """Three linear tasks, each with inputs from a subspace of three dimensions."""

    def __init__(self, memory_rank=9):
        self.key = jax.random.key(0)
        self.params = {"layer": {"kernel": jax.random.normal(self.key, (12, 10))}}
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

    def batch(self, t):
        keys = jax.random.split(jax.random.fold_in(self.key, t), 3)
        inputs = jax.random.normal(keys[0], (8, 3)) @ jax.random.normal(
            keys[1], (3, 12)
        )
        return inputs, jax.random.normal(keys[2], (8, 10))

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

    def gradients(self, params, batch):
        def loss(kernel):
            return jnp.mean(jnp.sum((batch[0] @ kernel - batch[1]) ** 2, -1))

        return {PATH: jax.grad(loss)(params["layer"]["kernel"])}


@functools.cache
def sequence(memory_rank=9):
    return Sequence(memory_rank)


def test_responses_to_the_inputs_of_old_tasks_stay_exactly():
    tasks = sequence()
    params, state, after = tasks.params, None, []
    for t in range(3):
        params, state = tasks.learn(params, state, t)
        after.append(params["layer"]["kernel"])
    assert int(jax.tree.leaves(state.memory.count)[0]) == 9
    assert int(state.tasks) == 3
    for t in range(2):
        inputs, _ = tasks.batch(t)
        np.testing.assert_allclose(inputs @ after[-1], inputs @ after[t], atol=2e-5)
        # Each task did change the responses to its own inputs.
        before = after[t - 1] if t else tasks.params["layer"]["kernel"]
        assert float(jnp.abs(inputs @ (after[t] - before)).max()) > 1.0
    assert tasks.traces == 1  # over tasks, and over the tests that share it


def test_without_a_memory_they_change():
    tasks = sequence(memory_rank=None)
    params, state = tasks.learn(tasks.params, None, 0)
    later, state = tasks.learn(params, state, 1)
    inputs, _ = tasks.batch(0)
    kernels = params["layer"]["kernel"], later["layer"]["kernel"]
    assert float(jnp.abs(inputs @ (kernels[0] - kernels[1])).max()) > 0.1
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
        return max(float(jnp.abs(basis.T @ v).max()) for v in vs)

    assert overlap(kept) > 1e-3
    assert overlap(projected) < 1e-4 * overlap(kept)


# --- Low precision -------------------------------------------------------------------


def test_small_steps_count_in_bfloat16_thanks_to_the_master_copy():
    targets = chosen(64, 64, 2)
    adapters = start(targets, s=1.0, dtype=jnp.bfloat16)
    wanted = start(targets, key=1, s=1.0)[PATH]
    tx = lora.eblora(
        optax.adam(2e-4), optax.sgd(0.0), targets=targets, memory_rank=None
    )

    def gradient(params):
        loss = lambda p: jnp.sum(  # noqa: E731
            (lora.product(p[PATH]) - lora.product(wanted)) ** 2
        )
        return jax.grad(loss)(params)

    def train(resync):
        def body(carry, _):
            params, state = carry
            if resync:  # as if there were no master copy
                state = optax_cl.begin_task(state, params)
            updates, state = tx.update(gradient(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = jax.jit(lambda c: jax.lax.scan(body, c, None, length=1200)[0])(
            (adapters, tx.init(adapters))
        )
        return carry

    def alignment(params):
        # 1 if the column spaces agree.
        return float(jnp.linalg.norm(params[PATH].u.T @ wanted.u) ** 2 / 2)

    with_master, state = train(resync=False)
    without, _ = train(resync=True)
    assert state.inner.inner_states["directions"].inner_state[0].mu[PATH].u.dtype == (
        jnp.float32
    )
    assert with_master[PATH].u.dtype == jnp.bfloat16
    assert float(stiefel.orthonormality_error(state.master[PATH].u)) < 5e-6
    assert float(stiefel.orthonormality_error(with_master[PATH].u)) < 1e-2
    assert alignment(with_master) > alignment(without) + 0.3
    assert float(state.drift) < 1e-4


def test_new_factors_count_only_after_begin_task():
    targets = chosen()
    old = start(targets, dtype=jnp.bfloat16)
    new = start(targets, key=1, dtype=jnp.bfloat16)
    tx = lora.eblora(optax.sgd(1e-3), targets=targets, memory_rank=None)
    state = tx.init(old)
    grads = jax.tree.map(jnp.zeros_like, new)

    update = jax.jit(tx.update)

    def next_params(state):
        updates, state = update(grads, state, new)
        return optax.apply_updates(new, updates), state

    stale, state_after = next_params(state)
    assert distance(stale, old) < 0.01 < 0.1 < distance(stale, new)
    with pytest.warns(UserWarning, match="begin_task"):
        optax_cl.end_task(state_after, stale, optax_cl.Statistics(jnp.ones([]), {}))
    synced, _ = next_params(optax_cl.begin_task(state, new))
    assert distance(synced, new) < 0.01


# --- Wrappers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "after",
    [optax.scale(0.5), optax.clip_by_global_norm(0.3), optax.add_decayed_weights(0.01)],
)
def test_what_stands_behind_it_is_told_at_the_boundary(after):
    targets = chosen()
    inner = lora.eblora(optax.adam(0.1), targets=targets, memory_rank=None)
    adapters, state = run(optax.chain(inner, after), start(targets), pull(targets), 2)
    assert float(stiefel.orthonormality_error(adapters[PATH].u)) > 1e-3
    with pytest.warns(UserWarning, match="inside `directions`"):
        optax_cl.end_task(state, adapters, optax_cl.Statistics(jnp.ones([]), {}))


def test_the_table_of_damage_in_the_docstring_holds():
    params = {"k": jnp.zeros((128, 128))}
    targets = lora.targets(params, {"k": 8}, alpha=16.0)
    key, *keys = jax.random.split(jax.random.key(0), 3)
    adapters = lora.eblora_init(targets, {"k": jax.random.normal(key, (128, 128))})
    u, v = (jax.random.normal(k, (128, 8)) for k in keys)
    grads = {"k": lora.Spectral(jnp.ones([]), u, v)}

    def error(inner, *after):
        tx = lora.eblora(inner, targets=targets, memory_rank=None)
        tx = optax.chain(tx, *after)
        updates, _ = jax.jit(tx.update)(grads, tx.init(adapters), adapters)
        moved = np.float64(optax.apply_updates(adapters, updates)["k"].u)
        return np.abs(moved.T @ moved - np.eye(8)).max()

    adam = optax.adam(0.1)
    assert error(adam) < 1e-6
    assert error(optax.adamw(0.1, weight_decay=0.1)) < 1e-6
    # The largest entry depends on the draw of the gradient, by a tenth or so.
    assert error(adam, optax.scale(0.5)) == pytest.approx(0.17, rel=0.2)
    clip = optax.clip_by_global_norm(1.0)
    assert error(adam, clip) == pytest.approx(0.14, rel=0.2)
    decay = optax.add_decayed_weights(0.01)
    assert error(adam, decay) == pytest.approx(0.014, rel=0.2)


@functools.cache
def _plain(targets):
    return lora.eblora(optax.adam(0.1), targets=targets, memory_rank=3)


def _inject(targets):
    return lora.eblora(
        optax.inject_hyperparams(optax.adam)(optax.constant_schedule(0.1)),
        targets=targets,
        memory_rank=3,
    )


@pytest.mark.parametrize(
    "wrap",
    [
        _inject,
        lambda t: optax.MultiSteps(_plain(t), 1).gradient_transformation(),
        lambda t: optax.apply_if_finite(_plain(t), 2),
        lambda t: optax.masked(_plain(t), lambda p: jax.tree.map(lambda _: True, p)),
        lambda t: optax.partition(
            {"a": _plain(t), "b": optax.set_to_zero()}, {PATH: "a", "frozen": "b"}
        ),
        lambda t: optax_cl.chain(
            lora.eblora(
                optax.chain(
                    optax_cl.scale_by_decoupled_adam(),
                    optax.scale_by_learning_rate(0.1),
                ),
                targets=t,
                memory_rank=3,
            )
        ),
        lambda t: lora.eblora(
            optax_cl.chain(
                optax_cl.scale_by_decoupled_adam(), optax.scale_by_learning_rate(0.1)
            ),
            targets=t,
            memory_rank=3,
        ),
        lambda t: lora.eblora(
            optax_cl.chain(
                optax_cl.scale_by_decoupled_adam(), optax.scale_by_learning_rate(0.1)
            ),
            optax.adam(0.1),
            targets=t,
            memory_rank=3,
        ),
    ],
    ids=[
        "inject",
        "multi_steps",
        "apply_if_finite",
        "masked",
        "partition",
        "decoupled outside",
        "decoupled inside",
        "decoupled beside",
    ],
)
def test_wrappers_and_routes_give_the_same_steps(wrap):
    targets = chosen()
    adapters = start(targets)
    expected, _ = run(_plain(targets), adapters, pull(targets), 3)
    params = {**adapters, "frozen": jnp.ones(2)}

    def gradient(params):
        grads = pull(targets)({PATH: params[PATH]})
        return {**grads, "frozen": jnp.zeros(2)}

    found, state = run(wrap(targets), params, gradient, 3)
    assert distance(found[PATH], expected[PATH]) < 5e-6
    assert lora.memory(state)[PATH].shape == (12, 3)


def test_an_adapter_of_which_only_one_factor_is_seen_trains_that_one():
    targets = chosen()
    adapters = start(targets)
    mask = {PATH: lora.Spectral(s=False, u=False, v=True)}
    tx = optax.masked(_plain(targets), mask)
    grads = pull(targets)(adapters)
    updates, _ = jax.jit(tx.update)(grads, tx.init(adapters), adapters)
    moved = adapters[PATH].v + updates[PATH].v
    assert float(stiefel.orthonormality_error(moved)) < 5e-6
    assert distance(updates[PATH].u, grads[PATH].u) == 0


def test_seeds_under_vmap_train_as_each_by_itself():
    targets = chosen()
    tx = _plain(targets)

    def one(s):
        adapters = {PATH: start(targets)[PATH]._replace(s=s)}
        updates, _ = tx.update(pull(targets)(adapters), tx.init(adapters), adapters)
        return optax.apply_updates(adapters, updates)

    magnitudes = jnp.array([0.1, -0.4])
    both = jax.jit(jax.vmap(one))(magnitudes)
    alone = jax.jit(one)(magnitudes[1])
    assert distance(jax.tree.map(lambda x: x[1], both), alone) < 1e-5


def test_adapters_keep_what_the_contract_shows_by_tracing():
    targets = chosen()
    params = {**start(targets), "plain": jnp.ones((2, 3))}
    for memory_rank in (None, 3):
        tx = lora.eblora(
            optax.adam(0.1), optax.sgd(0.1), targets=targets, memory_rank=memory_rank
        )
        testing.check_accepts_extra_args(tx, params)
        testing.check_update_dtypes(tx, params)
        testing.check_state_is_stable(tx, params)
        testing.check_map_params(tx, params)
        testing.check_empty_tree(tx)


def test_a_step_that_is_not_finite_leaves_the_factors_where_they_are():
    targets = chosen()
    tx = lora.eblora(optax.sgd(0.1), targets=targets, memory_rank=None)
    adapters = start(targets)
    grads = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), adapters)
    updates, _ = jax.jit(tx.update)(grads, tx.init(adapters), adapters)
    assert distance(updates[PATH].u, jnp.zeros((12, 2))) < 1e-6
    assert distance(updates[PATH].v, jnp.zeros((12, 2))) < 1e-6


# --- Bad input -----------------------------------------------------------------------


def test_errors_of_arguments_name_the_argument():
    targets = chosen(12, 10)
    good = {"targets": targets, "memory_rank": None}
    for change, match in [
        ({"targets": {PATH: 2}}, "lora.targets"),
        ({"memory_rank": 0}, "`memory_rank` must be at least 1"),
        ({"memory_rank": {"other": 3}}, "one for each path"),
        ({"threshold": 1.5}, "`threshold`"),
        ({"metric": "riemannian"}, "`metric`"),
        ({"retraction": "svd"}, "`retraction`"),
        ({"statistic": "sum"}, "`statistic`"),
        ({"overflow": "merge"}, "`overflow`"),
        ({"step_multiplier": 0.0}, "`step_multiplier`"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            lora.eblora(optax.sgd(0.1), **(good | change))
    with pytest.raises(TypeError, match="`directions`"):
        lora.eblora(optax.sgd, **good)
    with pytest.raises(TypeError, match="`magnitude`"):
        lora.eblora(optax.sgd(0.1), 0.1, **good)


def test_errors_of_adapters_name_the_leaf():
    targets = chosen(12, 10)
    tx = lora.eblora(optax.sgd(0.1), targets=targets, memory_rank=None)
    good = start(targets)[PATH]
    for adapters, match in [
        ({"other": good}, "`other`, which is none of"),
        ({PATH: good._replace(u=good.v)}, "layer/kernel/u` must have shape"),
        ({PATH: good._replace(s=jnp.ones(3))}, "layer/kernel/s` must have shape"),
        ({PATH: good._replace(v=2 * good.v)}, "layer/kernel/v` must have orthonormal"),
        ([good], "stand in a dictionary"),
    ]:
        with pytest.raises(ValueError, match=match):
            tx.init(adapters)
    with pytest.raises(ValueError, match="`params` is None"):
        tx.update({PATH: good}, tx.init({PATH: good}))
    full = chosen(fan_in=2, rank=2)
    with pytest.raises(ValueError, match="no room"):
        lora.eblora(optax.sgd(0.1), targets=full, memory_rank=1).init(start(full))


# --- Starts --------------------------------------------------------------------------


def test_the_start_and_the_first_move_of_its_magnitude_descend():
    targets = chosen(12, 10)
    kernel = jax.random.normal(jax.random.key(1), (12, 10))
    wanted = jax.random.normal(jax.random.key(2), (12, 10))
    loss = lambda w: float(jnp.sum((w - wanted) ** 2) / 2)  # noqa: E731
    adapter = lora.eblora_init(targets, {PATH: kernel - wanted}, magnitude=1e-2)[PATH]
    assert float(adapter.s) < 0
    here = loss(kernel + lora.product(adapter))
    assert here < loss(kernel)
    larger = adapter._replace(s=1.1 * adapter.s)
    assert loss(kernel + lora.product(larger)) < here
    # To first order by the sum of the leading singular values.
    values = np.linalg.svd(np.asarray(kernel - wanted, np.float64), compute_uv=False)
    np.testing.assert_allclose(
        here - loss(kernel), -1e-2 * values[:2].sum() + 1e-4, rtol=1e-3
    )


def test_a_negative_magnitude_means_its_absolute_value():
    targets = chosen(12, 10)
    gradients = {PATH: jax.random.normal(jax.random.key(1), (12, 10))}
    one = lora.eblora_init(targets, gradients, magnitude=0.3)
    other = lora.eblora_init(targets, gradients, magnitude=-0.3)
    assert distance(one, other) == 0 and float(one[PATH].s) < 0


def test_starts_are_the_leading_directions_off_the_memory():
    targets = chosen(12, 10)
    memory = jnp.linalg.qr(jax.random.normal(jax.random.key(5), (12, 4)))[0]
    memory = jnp.concatenate([memory, jnp.zeros((12, 2))], axis=1)
    gradient = jax.random.normal(jax.random.key(1), (12, 10))
    adapter = lora.eblora_init(targets, {PATH: gradient}, {PATH: memory})[PATH]
    m, g = np.asarray(memory, np.float64), np.asarray(gradient, np.float64)
    left, _, right = np.linalg.svd(g - m @ (m.T @ g))
    expected = -0.02 * left[:, :2] @ right[:2]
    np.testing.assert_allclose(lora.product(adapter), expected, atol=1e-6)
    assert np.abs(m.T @ np.asarray(adapter.v, np.float64)).max() < 1e-6


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_directions_are_filled_in_off_the_memory(rank):
    targets = chosen(12, 10, 3)
    memory = jnp.linalg.qr(jax.random.normal(jax.random.key(5), (12, 9)))[0]
    column = jax.random.normal(jax.random.key(1), (12, 1))
    gradient = rank * column * jnp.ones((1, 10))
    adapter = lora.eblora_init(targets, {PATH: gradient}, {PATH: memory})[PATH]
    assert float(stiefel.orthonormality_error(adapter.u)) < 5e-6
    assert float(stiefel.orthonormality_error(adapter.v)) < 5e-6
    assert float(jnp.abs(memory.T @ adapter.v).max()) < 2e-6


def test_gradients_that_are_not_finite_raise_outside_jit_and_fill_in_inside():
    targets = chosen(12, 10)
    bad = {PATH: jnp.full((12, 10), jnp.nan)}
    with pytest.raises(ValueError, match="layer/kernel"):
        lora.eblora_init(targets, bad)
    adapter = jax.jit(lambda g: lora.eblora_init(targets, g))(bad)[PATH]
    assert float(stiefel.orthonormality_error(adapter.v)) < 5e-6


def test_magnitudes_follow_the_depth():
    params = {
        f"layers/{i}": {"kernel": jnp.zeros((4, 3)), "gate_kernel": jnp.zeros((4, 3))}
        for i in (2, 4, 10)
    }
    several = lora.targets(params, {"kernel": 1}, alpha=1.0)
    ones = {path: jnp.ones((4, 3)) for path in several}
    start = lora.eblora_init(several, ones, magnitude=(0.002, 0.010))
    found = {path: round(-float(a.s), 6) for path, a in start.items()}
    assert found == {
        f"layers/{i}/{name}": s
        for i, s in ((2, 0.002), (4, 0.004), (10, 0.010))
        for name in ("kernel", "gate_kernel")
    }
    stack = chosen(4, 3, 1, stack=(3,))
    start = lora.eblora_init(stack, {PATH: jnp.ones((3, 4, 3))}, magnitude=(0.0, 0.4))
    np.testing.assert_allclose(-start[PATH].s, [0.0, 0.2, 0.4], atol=1e-7)
    one = chosen(4, 3, 1)
    start = lora.eblora_init(one, {PATH: jnp.ones((4, 3))}, magnitude=(0.1, 0.4))
    np.testing.assert_allclose(-start[PATH].s, 0.1, atol=1e-7)


def test_errors_of_starts_name_what_does_not_fit():
    targets = chosen(12, 10)
    ones = {PATH: jnp.ones((12, 10))}
    with pytest.raises(ValueError, match=r"layer/kernel.*nothing"):
        lora.eblora_init(targets, {})
    with pytest.raises(ValueError, match="expected shape"):
        lora.eblora_init(targets, {PATH: jnp.ones((10, 12))})
    with pytest.raises(ValueError, match="leaves no room"):
        lora.eblora_init(targets, ones, {PATH: jnp.zeros((12, 11))})
    params = {"a": jnp.zeros((12, 10)), "b": jnp.zeros((12, 10))}
    two = lora.targets(params, {"a|b": 2}, alpha=1.0)
    with pytest.raises(ValueError, match="no whole number"):
        lora.eblora_init(two, {k: ones[PATH] for k in two}, magnitude=(0.1, 0.2))
