import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl import lora
from optax_cl.lora import stiefel
from tests.arrays import distance, normal, orthonormal
from tests.lora.helpers import PATH, chosen, pull, run, start
from tests.lora.stiefel_points import orthonormality

eblora_init = jax.jit(lora.eblora_init)


def product(adapter):
    s, u, v = map(np.float64, adapter)
    return s * v @ u.T


# --- What holds after every step -----------------------------------------------------


def test_three_thousand_adam_steps_leave_balanced_adapters_off_the_memory():
    targets = chosen(256, 192, 8)
    memory = orthonormal(5, 256, 40)
    v = orthonormal(6, 256, 8, off=memory)
    adapters = {PATH: start(targets)[PATH]._replace(v=v)}
    tx = lora.eblora(
        optax.adam(1e-2), optax.adam(1e-2), targets=targets, memory_rank=40
    )
    state = tx.init(adapters)
    basis = jax.tree.map(lambda _: memory, state.memory.basis)
    state = state._replace(memory=state.memory._replace(basis=basis))
    gradient = pull(targets)

    def errors(adapter):
        return jnp.stack(
            [
                stiefel.orthonormality_error(adapter.u),
                stiefel.orthonormality_error(adapter.v),
                jnp.abs(memory.T @ adapter.v).max(),
            ]
        )

    @jax.jit
    def train(adapters, state):
        def body(carry, _):
            params, state, worst = carry
            updates, state = tx.update(gradient(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state, jnp.maximum(worst, errors(params[PATH]))), None

        carry = (adapters, state, jnp.zeros(3))
        return jax.lax.scan(body, carry, None, length=3000)[0]

    adapters, state, worst = train(adapters, state)
    adapter = adapters[PATH]
    assert np.all(np.asarray(worst) < [5e-6, 5e-6, 1e-6])  # after every single step
    s, u, v = map(np.float64, adapter)
    assert np.abs(np.asarray(memory).T @ v).max() < 1e-6
    update = s * v @ u.T
    singular = np.linalg.svd(update, compute_uv=False)
    s = abs(s)
    assert s > 1  # it went somewhere
    np.testing.assert_allclose(singular[:8], s, rtol=3e-6)
    assert singular[8:].max() < 1e-5 * s
    np.testing.assert_allclose(np.linalg.norm(update), s * 8**0.5, rtol=3e-6)
    assert float(state.drift) < 1e-5


@pytest.mark.parametrize(
    ("fan_in", "fan_out", "rank", "memory_rank"),
    [
        (6, 12, 2, 3),
        pytest.param(8, 12, 8, None, marks=pytest.mark.slow),
        (8, 8, 8, None),
        pytest.param(1, 5, 1, None, marks=pytest.mark.slow),
        (5, 1, 1, 3),
    ],
)
def test_kernels_of_any_shape_train_on_the_manifold(fan_in, fan_out, rank, memory_rank):
    targets = chosen(fan_in, fan_out, rank)
    gradients = {PATH: normal(0, fan_in, fan_out)}
    tx = lora.eblora(optax.adam(0.03), targets=targets, memory_rank=memory_rank)
    if memory_rank:
        basis = orthonormal(1, fan_in, memory_rank)
        before = eblora_init(targets, gradients, {PATH: basis})
        state = tx.init(before)
        kept = jax.tree.map(lambda _: basis, state.memory.basis)
        state = state._replace(memory=state.memory._replace(basis=kept))
    else:
        before, state = eblora_init(targets, gradients), None
    after, state = run(tx, before, pull(targets), 30, state)
    assert orthonormality(after[PATH].u) < 5e-6
    assert orthonormality(after[PATH].v) < 5e-6
    assert float(state.drift) < 1e-5
    if memory_rank:
        assert np.abs(np.asarray(basis).T @ np.asarray(after[PATH].v)).max() < 2e-6
    # It learned: towards what `pull` pulls to.
    rng = np.random.default_rng(9)
    wanted = rng.normal(size=(fan_in, fan_out))
    off = [np.linalg.norm(product(a[PATH]) - wanted) for a in (before, after)]
    assert off[1] < off[0] - 0.05


def test_a_zero_magnitude_moves_first_and_alone():
    targets = chosen()
    tx = lora.eblora(optax.adam(0.1), targets=targets, memory_rank=None)
    adapters = start(targets, s=0.0)
    gradient = pull(targets)(adapters)[PATH]
    assert not np.any(np.asarray(gradient.u)) and not np.any(np.asarray(gradient.v))
    first, state = run(tx, adapters, pull(targets), 1)
    assert distance(first[PATH].u, adapters[PATH].u) < 1e-6
    assert abs(abs(float(first[PATH].s)) - 0.1) < 1e-6
    second, _ = run(tx, first, pull(targets), 1, state)
    assert distance(second[PATH].u, first[PATH].u) > 1e-2


def test_signs_shared_out_differently_give_the_same_update():
    targets = chosen()
    tx = lora.eblora(optax.adam(0.05), targets=targets, memory_rank=None)
    adapters = start(targets)
    s, u, v = map(np.asarray, adapters[PATH])
    flipped = {PATH: lora.Spectral(-s, -u, v)}
    one, _ = run(tx, adapters, pull(targets), 5)
    other, _ = run(tx, flipped, pull(targets), 5)
    np.testing.assert_allclose(product(one[PATH]), product(other[PATH]), atol=1e-5)


def test_stacked_layers_train_as_each_by_itself():
    single, stacked = chosen(), chosen(stack=(3,))
    gradients = start(stacked, seed=4)[PATH]
    adapters = start(stacked)[PATH]

    def three_steps(targets):
        tx = lora.eblora(optax.adam(0.05), targets=targets, memory_rank=3)

        def after(params, g):
            def body(_, carry):
                params, state = carry
                updates, state = tx.update(g, state, params)
                return optax.apply_updates(params, updates), state

            return jax.lax.fori_loop(0, 3, body, (params, tx.init(params)))[0]

        return jax.jit(after)

    together = three_steps(stacked)({PATH: adapters}, {PATH: gradients})
    one = three_steps(single)
    for i in (0, 2):
        pick = lambda tree, i=i: jax.tree.map(lambda x: np.asarray(x)[i], tree)  # noqa: E731
        alone = one({PATH: pick(adapters)}, {PATH: pick(gradients)})
        assert distance(pick(together), alone) < 1e-5


@pytest.mark.parametrize("layers", [3, pytest.param(16, marks=pytest.mark.slow)])
def test_kernels_of_one_shape_train_as_each_by_itself(layers):
    # Small stacks are joined to one, large ones are not.
    kernel = np.zeros((layers, 8, 6), np.float32)
    both = lora.targets(
        {"a": kernel, "b": kernel},
        {"a|b": 2},
        alpha=2.0,
        matrices=optax_cl.matrix_views(stacked="a|b"),
    )
    adapters, gradients = start(both), start(both, seed=4)

    @functools.partial(jax.jit, static_argnums=0)
    def step(targets, adapters, gradients):
        tx = lora.eblora(optax.adam(0.05), targets=targets, memory_rank=3)
        updates, _ = tx.update(gradients, tx.init(adapters), adapters)
        return updates

    together = step(both, adapters, gradients)
    for path in "ab":
        one = lora.targets(
            {path: kernel},
            {path: 2},
            alpha=2.0,
            matrices=optax_cl.matrix_views(stacked=path),
        )
        alone = step(one, {path: adapters[path]}, {path: gradients[path]})
        assert distance(together[path], alone[path]) < 1e-6
        assert distance(alone[path], jax.tree.map(jnp.zeros_like, alone[path])) > 1e-3


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
        "head": normal(0, 2, 3),
        "old": lora.LoRA(a=normal(1, 4, 2), b=normal(2, 2, 3)),
    }
    params = {**start(targets), **others}
    grads = jax.tree.map(lambda p: 0.1 * np.asarray(p) + np.float32(0.3), params)
    adam = optax.adamw(0.1)
    tx = lora.eblora(adam, optax.adam(0.1), targets=targets, memory_rank=2)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    pick = lambda tree: {name: tree[name] for name in others}  # noqa: E731
    expected, _ = jax.jit(adam.update)(pick(grads), adam.init(others), others)
    assert distance(pick(updates), expected) == 0


def test_the_canonical_metric_doubles_rotations_inside_the_span():
    targets = chosen()
    adapters = start(targets)
    s, u, v = map(np.asarray, adapters[PATH])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]], np.float32)
    grads = {PATH: lora.Spectral(s=0 * s, u=1e-3 * u @ turn, v=0 * v)}

    def moved(metric):
        tx = lora.eblora(
            optax.sgd(1.0), targets=targets, memory_rank=None, metric=metric
        )
        return jax.jit(tx.update)(grads, tx.init(adapters), adapters)[0][PATH].u

    # Once for the gradient and once for the step.
    one, other = np.asarray(moved("euclidean")), np.asarray(moved("canonical"))
    np.testing.assert_allclose(other, 4 * one, atol=2e-5)


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
                found.append(np.asarray(adapters[PATH].u).T @ np.asarray(mu))
    (inner,) = found
    assert np.abs(inner + inner.T).max() < 1e-5


@pytest.mark.parametrize("transport", [False, True])
def test_transport_keeps_the_bound_on_steps_of_adam(transport):
    # The projection puts some of mu on entries whose second moment is next to nothing.
    targets = chosen(64, 48, 8)
    tx = lora.eblora(
        optax.adam(0.02), targets=targets, memory_rank=None, transport=transport
    )
    gradient = pull(targets)

    @jax.jit
    def largest_ratio(adapters):
        def body(carry, _):
            params, state = carry
            updates, state = tx.update(gradient(params), state, params)
            mu, nu = (optax.tree.get(state, name)[PATH] for name in ("mu", "nu"))
            ratios = jax.tree.map(lambda m, n: jnp.abs(m) / jnp.sqrt(n), mu, nu)
            largest = jnp.maximum(ratios.u.max(), ratios.v.max())
            return (optax.apply_updates(params, updates), state), largest

        return jax.lax.scan(body, (adapters, tx.init(adapters)), length=100)[1].max()

    # By Cauchy-Schwarz, of sums of (1 - b1) b1^k g and of (1 - b2) b2^k g^2.
    bound = 0.1 / np.sqrt(0.001 * (1 - 0.9**2 / 0.999))
    assert 1 < largest_ratio(start(targets)) <= bound


def test_a_step_that_is_not_finite_leaves_the_factors_where_they_are():
    targets = chosen()
    tx = lora.eblora(optax.sgd(0.1), targets=targets, memory_rank=None)
    adapters = start(targets)
    grads = jax.tree.map(lambda x: np.nan * np.asarray(x), adapters)
    updates, _ = jax.jit(tx.update)(grads, tx.init(adapters), adapters)
    assert np.abs(updates[PATH].u).max() < 1e-6
    assert np.abs(updates[PATH].v).max() < 1e-6


# --- Low precision -------------------------------------------------------------------


def test_small_steps_count_in_bfloat16_thanks_to_the_master_copy():
    targets = chosen(64, 64, 2)
    adapters = start(targets, s=1.0, dtype=jnp.bfloat16)
    wanted = start(targets, seed=1, s=1.0)[PATH]
    tx = lora.eblora(
        optax.adam(2e-4), optax.sgd(0.0), targets=targets, memory_rank=None
    )

    aim = np.float32(product(wanted))

    def gradient(params):
        loss = lambda p: jnp.sum((lora.product(p[PATH]) - aim) ** 2)  # noqa: E731
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
        u = np.asarray(params[PATH].u, np.float32)
        return np.linalg.norm(u.T @ np.asarray(wanted.u)) ** 2 / 2

    with_master, state = train(resync=False)
    without, _ = train(resync=True)
    assert state.inner.inner_states["directions"].inner_state[0].mu[PATH].u.dtype == (
        jnp.float32
    )
    assert with_master[PATH].u.dtype == jnp.bfloat16
    assert orthonormality(state.master[PATH].u) < 5e-6
    assert orthonormality(with_master[PATH].u) < 1e-2
    assert alignment(with_master) > alignment(without) + 0.3
    assert float(state.drift) < 1e-4


@pytest.mark.slow
def test_low_precision_holds_where_the_compiler_keeps_to_it():
    # By default XLA may drop the rounding between operations it fuses, and with it what
    # these tests are about.
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_allow_excess_precision=false"
    here = pathlib.Path(__file__).parent
    names = ("eblora", "eblora_drift", "stiefel")
    files = [here / f"test_{name}.py" for name in names]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-qk", "bfloat16", "-m", "not slow", *files],
        env=os.environ | {"XLA_FLAGS": flags},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-2000:]
    assert "passed" in found.stdout


def test_new_factors_count_only_after_begin_task():
    targets = chosen()
    old = start(targets, dtype=jnp.bfloat16)
    new = start(targets, seed=1, dtype=jnp.bfloat16)
    tx = lora.eblora(optax.sgd(1e-3), targets=targets, memory_rank=None)
    state = tx.init(old)
    grads = jax.tree.map(lambda x: 0 * np.asarray(x), new)

    @jax.jit
    def next_params(state):
        updates, state = tx.update(grads, state, new)
        return optax.apply_updates(new, updates), state

    stale, state_after = next_params(state)
    assert distance(stale, old) < 0.01 < 0.1 < distance(stale, new)
    with pytest.warns(UserWarning, match="begin_task"):
        optax_cl.end_task(state_after, stale, optax_cl.Statistics(jnp.ones([]), {}))
    synced, _ = next_params(optax_cl.begin_task(state, new))
    assert distance(synced, new) < 0.01


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
        (lora.Start({"kernel": good.u}, {PATH: good}), r"tx\.init\(start\.adapters\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            tx.init(adapters)
    plain = lora.LoRA(good.v, good.u.T)
    for params, where in [({PATH: plain}, PATH), ({"all": {PATH: plain}}, "all/")]:
        with pytest.raises(ValueError, match=f"has a LoRA at `{where}.*to_spectral"):
            tx.init(params)
    tx.init(plain)  # of which kernel, nobody can tell
    with pytest.raises(ValueError, match="`params` is None"):
        tx.update({PATH: good}, tx.init({PATH: good}))
    state = tx.init({PATH: good})
    for grads, params, match in [
        (
            {PATH: good, "head": good.u},
            None,
            "`the optimizer state` must have the tree",
        ),
        ({}, None, "`the optimizer state` must have the tree"),
        ({PATH: good}, {PATH: good.u}, "`params` must have the tree structure"),
        ({PATH: good}, {PATH: good._replace(u=good.v)}, r"`params` .*kernel/u`"),
    ]:
        with pytest.raises(ValueError, match=match):
            tx.update(grads, state, grads if params is None else params)
    full = chosen(fan_in=2, rank=2)
    with pytest.raises(ValueError, match="no room"):
        lora.eblora(optax.sgd(0.1), targets=full, memory_rank=1).init(start(full))
