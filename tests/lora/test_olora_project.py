"""O-LoRA as a projection, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl import lora
from tests.arrays import distance
from tests.lora.olora_tasks import (
    HERE,
    HISTORY,
    IN,
    KEY,
    OUT,
    RNG,
    R,
    adapters,
    factor,
    remembering,
)


def test_the_update_loses_its_part_in_the_span_of_all_old_rows():
    tx = lora.olora_project(capacity=3)
    state = remembering(tx, HISTORY[:2])
    gradient = adapters()
    updates, _ = tx.update(gradient, state)
    rows = np.concatenate([np.float64(factor(t)) for t in HISTORY[:2]], axis=1)
    q, _ = np.linalg.qr(rows)
    expected = np.float64(factor(gradient)) - q @ (q.T @ np.float64(factor(gradient)))
    np.testing.assert_allclose(factor(updates), expected, atol=2e-6)
    np.testing.assert_array_equal(updates["layer/kernel"].b, gradient["layer/kernel"].b)


def test_begin_task_refuses_a_start_that_was_not_projected():
    state = remembering(lora.olora_project(capacity=3), HISTORY[:2])
    with pytest.raises(ValueError, match=r"layer/kernel/a` must be .*project_start"):
        optax_cl.begin_task(state, HERE)
    optax_cl.begin_task(state, lora.project_start(HERE, state))
    optax_cl.begin_task(state, HISTORY[1])  # which goes on, not yet merged


def test_what_is_left_of_a_start_inside_the_old_rows_is_orthogonal_to_them():
    state = remembering(lora.olora_project(capacity=3), HISTORY[:2])
    inside = factor(HISTORY[0]) + factor(HISTORY[1])
    inside = {"layer/kernel": HERE["layer/kernel"]._replace(a=inside)}
    mostly = jax.tree.map(lambda x, y: x + 1e-4 * y, inside, HERE)
    left = np.float64(factor(lora.project_start(mostly, state)))
    rows = np.concatenate([np.float64(factor(t)) for t in HISTORY[:2]], axis=1)
    q, _ = np.linalg.qr(rows)
    assert np.linalg.norm(left, axis=0).max() < 1e-2  # of a length of about 4
    assert (np.abs(q.T @ left) / np.linalg.norm(left, axis=0)).max() < 1e-5


def test_from_a_projected_start_the_overlap_stays_zero_under_adam():
    tx = optax.chain(
        optax.adamw(1e-2, weight_decay=0.1), lora.olora_project(capacity=3)
    )
    state = remembering(tx, HISTORY[:2])
    start = lora.project_start(HERE, state)
    q = np.linalg.qr(np.concatenate([factor(t) for t in HISTORY[:2]], axis=-1))[0]

    def step(carry, key):
        tree, state = carry
        keys = dict(zip("ab", jax.random.split(key), strict=True))
        scale = np.logspace(-3, 0, IN, dtype=np.float32)[:, None]
        gradient = {
            "layer/kernel": lora.LoRA(
                scale * jax.random.normal(keys["a"], (IN, R)),
                jax.random.normal(keys["b"], (R, OUT)),
            )
        }
        updates, state = tx.update(gradient, state, tree)
        tree = optax.apply_updates(tree, updates)
        return (tree, state), jnp.abs(q.T @ factor(tree)).max()

    def run(tree):
        return jax.lax.scan(step, (tree, state), jax.random.split(KEY, 1000))

    run = jax.jit(run)
    (end, _), worst = run(start)
    assert np.max(worst) < 5e-6
    assert distance(end["layer/kernel"].a, start["layer/kernel"].a) > 0.1
    # A start that is not projected keeps what it overlaps with, decay aside.
    _, overlap = run(HERE)
    assert np.max(overlap) > 0.1


def test_before_the_moments_it_leaks():
    def leak(*links):
        tx = optax.chain(*links)
        state = remembering(tx, HISTORY[:1])
        q = np.linalg.qr(factor(HISTORY[0]))[0]

        def step(state, key):
            scale = np.logspace(-2, 0, IN, dtype=np.float32)[:, None]
            g = optax.tree.zeros_like(HERE)
            drawn = scale * jax.random.normal(key, (IN, R))
            g = {"layer/kernel": g["layer/kernel"]._replace(a=drawn)}
            updates, state = tx.update(g, state, HERE)
            u = factor(updates)
            return state, jnp.linalg.norm(q.T @ u) / jnp.linalg.norm(u)

        return np.mean(jax.lax.scan(step, state, jax.random.split(KEY, 100))[1])

    adam, project = optax.scale_by_adam(), lora.olora_project(capacity=1)
    assert leak(project, adam) > 0.2
    assert leak(adam, project) < 1e-6


def test_dependent_rows_count_once_whatever_their_size():
    first = adapters()
    a = factor(first)
    # The same three rows again, tiny and mixed, and one new direction.
    again = np.float32(1e-7 * a @ RNG.normal(size=(R, R)))
    again[:, 0] = 1e-7 * RNG.normal(size=IN)
    second = {"layer/kernel": first["layer/kernel"]._replace(a=again)}
    state = remembering(lora.olora_project(capacity=4), [first, second])
    basis = np.asarray(factor(state.basis))
    used = np.any(basis != 0, axis=0)
    assert used.sum() == R + 1
    np.testing.assert_allclose(basis[:, used].T @ basis[:, used], np.eye(4), atol=2e-6)
    inside = basis @ (basis.T @ again)
    np.testing.assert_allclose(inside, again, atol=1e-12)


def test_rows_that_are_all_zero_protect_nothing():
    nothing = jax.tree.map(np.zeros_like, HERE)
    tx = lora.olora_project(capacity=2)
    state = remembering(tx, [nothing, HISTORY[0]])
    updates, _ = tx.update(adapters(), state)
    assert np.abs(factor(HISTORY[0]).T @ np.asarray(factor(updates))).max() < 1e-5
    assert np.any(np.asarray(factor(state.basis)) != 0, axis=0).sum() == R


def test_a_start_without_room_is_refused_outside_jit_and_zero_inside():
    tx = lora.olora_project(capacity=4)
    history = [adapters() for _ in range(4)]  # 12 rows of 12 inputs
    state = remembering(tx, history)
    with pytest.raises(
        ValueError, match=r"span 12 of the 12 inputs of `layer/kernel/a`"
    ):
        lora.project_start(HERE, state)
    start = jax.jit(lora.project_start)(HERE, state)
    assert np.abs(factor(start)).max() < 1e-5


def test_stacked_layers_are_each_projected_off_their_own_past():
    old = adapters(batch=(2,))
    tx = lora.olora_project(capacity=2)
    state = remembering(tx, [old])
    start = factor(jax.jit(lora.project_start)(adapters(batch=(2,)), state))
    rows, start = factor(old).mT, np.asarray(start)
    assert np.abs(rows @ start).max() < 1e-5
    assert np.abs(rows[::-1] @ start).max() > 0.1  # but of one another's


def test_in_bfloat16_rounding_of_the_factor_itself_leaves_an_overlap():
    tx = lora.olora_project(capacity=2)
    state = remembering(tx, HISTORY[:1])
    bfloat16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), HERE)
    exact = lora.project_start(HERE, state)
    rounded = lora.project_start(bfloat16, state)
    q = np.asarray(factor(state.basis))
    size = np.linalg.norm(np.asarray(factor(exact)))
    left = lambda t: np.linalg.norm(q.T @ np.float32(factor(t))) / size  # noqa: E731
    assert left(exact) < 1e-6
    assert 1e-4 < left(rounded) < 1e-2
