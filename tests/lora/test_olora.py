"""O-LoRA as a penalty, against float64 NumPy, and what both of its forms share."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl import lora
from tests.lora.olora_tasks import (
    HERE,
    HISTORY,
    IN,
    OUT,
    R,
    adapters,
    boundary,
    factor,
    oracle,
    pull,
    remembering,
)

# --- The penalty ---------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["l1", "fro"])
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_value_and_pull_are_those_of_the_sum_over_all_past_tasks(penalty, num_tasks):
    tx = lora.olora(0.5, capacity=3, penalty=penalty)
    state = remembering(tx, HISTORY[:num_tasks])
    value, gradient = oracle(HISTORY[:num_tasks], HERE, penalty)
    np.testing.assert_allclose(lora.olora_loss(state, HERE), 0.5 * value, rtol=1e-5)
    np.testing.assert_allclose(
        factor(pull(tx, state, HERE)), 0.5 * gradient, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("penalty", ["l1", "fro"])
def test_the_pull_is_the_gradient_of_the_loss_in_64_bits(x64, penalty):
    history = [adapters(jnp.float64) for _ in range(2)]
    here = adapters(jnp.float64)
    tx = lora.olora(0.3, capacity=2, penalty=penalty)
    state = remembering(tx, history)
    assert factor(state.rows).dtype == jnp.float64
    found = pull(tx, state, here)
    # The state keeps the strength in float32.
    by_jax = jax.jit(jax.grad(lora.olora_loss, argnums=1))(state, here)
    chex.assert_trees_all_close(found, by_jax, rtol=1e-6, atol=1e-9)
    _, by_hand = oracle(history, here, penalty)
    np.testing.assert_allclose(factor(found), 0.3 * by_hand, rtol=1e-12)


def test_the_penalty_is_zero_exactly_where_rows_are_orthogonal():
    eye, b = np.eye(IN, dtype=np.float32), np.ones((R, OUT), np.float32)
    make = lambda a: {"layer/kernel": lora.LoRA(a, b)}  # noqa: E731
    old, orthogonal = make(eye[:, :R]), make(7 * eye[:, R : 2 * R])
    touching = make(factor(orthogonal) + np.float32(1e-3) * eye[:, :R])
    for penalty in ("l1", "fro"):
        tx = lora.olora(1.0, capacity=2, penalty=penalty)
        state = remembering(tx, [old])
        assert lora.olora_loss(state, orthogonal) == 0.0
        chex.assert_trees_all_equal(
            pull(tx, state, orthogonal), optax.tree.zeros_like(orthogonal)
        )
        assert lora.olora_loss(state, touching) > 0.0
        assert np.any(np.asarray(factor(pull(tx, state, touching))))


def test_only_the_input_side_is_pulled_and_only_it_is_read():
    tx = lora.olora(2.0, capacity=2)
    state = remembering(tx, HISTORY[:1])
    assert not np.any(np.asarray(pull(tx, state, HERE)["layer/kernel"].b))
    other = {
        "layer/kernel": HERE["layer/kernel"]._replace(b=np.zeros((R, OUT), np.float32))
    }
    assert lora.olora_loss(state, other) == lora.olora_loss(state, HERE)
    chex.assert_trees_all_equal(pull(tx, state, other), pull(tx, state, HERE))


def test_in_the_first_task_the_strength_does_not_matter():
    gradient = adapters()
    for penalty in ("l1", "fro"):
        tx = lora.olora(1e6, capacity=2, penalty=penalty)
        updates, _ = tx.update(gradient, tx.init(HERE), HERE)
        chex.assert_trees_all_equal(updates, gradient)
        assert lora.olora_loss(tx.init(HERE), HERE) == 0.0


def test_it_is_a_penalty_and_leaves_the_gradient_its_part_along_old_rows():
    # "O-LoRA projects gradients" is said of it; a projection would make this zero.
    tx = lora.olora(0.5, capacity=2, penalty="fro")
    state = remembering(tx, HISTORY[:1])
    gradient = adapters()
    updates, _ = tx.update(gradient, state, HERE)
    old = factor(HISTORY[0])
    pulled = np.asarray(factor(pull(tx, state, HERE)))
    without = old.T @ (np.asarray(factor(updates)) - pulled)
    np.testing.assert_allclose(without, old.T @ factor(gradient), rtol=1e-4, atol=1e-4)
    assert np.abs(without).max() > 0.1


def test_a_schedule_sets_the_strength_of_every_step():
    tx = lora.olora(lambda count: 1.0 + count, capacity=2, penalty="fro")
    state = remembering(tx, HISTORY[:1])
    value, gradient = oracle(HISTORY[:1], HERE, "fro")
    for step in range(3):
        expected = (1.0 + step) * value
        np.testing.assert_allclose(lora.olora_loss(state, HERE), expected, rtol=1e-5)
        updates, state = tx.update(optax.tree.zeros_like(HERE), state, HERE)
        np.testing.assert_allclose(
            factor(updates), (1.0 + step) * gradient, rtol=1e-4, atol=1e-4
        )


def test_adapters_in_bfloat16_are_remembered_in_float32():
    history = [adapters(jnp.bfloat16) for _ in range(2)]
    here = adapters(jnp.bfloat16)
    tx = lora.olora(0.5, capacity=2, penalty="fro")
    state = remembering(tx, history)
    assert factor(state.rows).dtype == jnp.float32
    updates = pull(tx, state, here)
    assert factor(updates).dtype == jnp.bfloat16
    _, gradient = oracle(history, here, "fro")
    # Off by the one rounding of the result, not by those of the products.
    np.testing.assert_allclose(factor(updates), 0.5 * gradient, rtol=2**-8)


@pytest.mark.parametrize("penalty", ["l1", "fro"])
def test_stacked_layers_are_each_compared_with_their_own_past(penalty):
    old, here = adapters(batch=(4,)), adapters(batch=(4,))
    tx = lora.olora(1.0, capacity=2, penalty=penalty)
    state = remembering(tx, [old])
    layer = lambda tree, i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
    found, total = np.asarray(factor(pull(tx, state, here))), 0.0
    for i in range(4):
        value, gradient = oracle([layer(old, i)], layer(here, i), penalty)
        np.testing.assert_allclose(found[i], gradient, rtol=1e-4, atol=1e-4)
        total += value
    np.testing.assert_allclose(lora.olora_loss(state, here), total, rtol=1e-5)


def test_two_penalties_in_one_chain_add_up():
    tx = optax.chain(lora.olora(1.0, capacity=1), lora.olora(2.0, capacity=1))
    state = remembering(tx, HISTORY[:1])
    value, gradient = oracle(HISTORY[:1], HERE, "l1")
    np.testing.assert_allclose(lora.olora_loss(state, HERE), 3 * value, rtol=1e-5)
    np.testing.assert_allclose(
        factor(pull(tx, state, HERE)), 3 * gradient, rtol=1e-4, atol=1e-4
    )


def test_under_adam_a_penalty_alone_moves_a_learning_rate_a_step():
    # And so the strength counts relative to the task's gradient only.
    for strength in (1e-3, 10.0):
        tx = optax.chain(lora.olora(strength, capacity=1), optax.adam(0.01, eps=1e-20))
        state = remembering(tx, HISTORY[:1])
        step = factor(pull(tx, state, HERE))
        np.testing.assert_allclose(np.abs(step), 0.01, rtol=1e-3)


def test_l1_ends_in_a_band_as_wide_as_a_step_and_fro_fades():
    def overlap(penalty):
        tx = optax.chain(lora.olora(1.0, capacity=1, penalty=penalty), optax.sgd(1e-2))
        state = remembering(tx, HISTORY[:1])

        def step(carry, _):
            tree, state = carry
            updates, state = tx.update(optax.tree.zeros_like(tree), state, tree)
            return (optax.apply_updates(tree, updates), state), None

        (tree, _), _ = jax.lax.scan(step, (HERE, state), length=500)
        return np.abs(factor(HISTORY[0]).T @ np.asarray(factor(tree))).max()

    assert 1e-3 < overlap("l1") < 1.0
    assert overlap("fro") < 1e-4


# --- The memory of rows --------------------------------------------------------------


def test_the_memory_shares_no_buffer_with_the_adapters():
    tx = lora.olora(1.0, capacity=1)
    tree = jax.tree.map(jnp.copy, HERE)
    state = boundary(tx.init(tree), tree)
    step = jax.jit(lambda t, s: tx.update(t, s, t), donate_argnums=(0, 1))
    step(tree, state)  # a shared buffer would be refused


def test_rows_stand_in_the_order_of_tasks_with_zeros_behind():
    state = remembering(lora.olora(1.0, capacity=4), HISTORY[:2])
    rows = np.asarray(factor(state.rows))
    chex.assert_shape(rows, (IN, 4 * R))
    expected = np.concatenate([factor(t) for t in HISTORY[:2]], axis=-1)
    np.testing.assert_array_equal(rows[:, : 2 * R], expected)
    assert not rows[:, 2 * R :].any()
    assert state.tasks == 2


def test_a_full_memory_raises_or_forgets_the_oldest():
    full = remembering(lora.olora(1.0, capacity=2), HISTORY[:2])
    with pytest.raises(ValueError, match=r"all 2 places.*optax_cl\.grow"):
        boundary(full, HERE)
    state = remembering(lora.olora(1.0, capacity=2, overflow="oldest"), HISTORY)
    expected = np.concatenate([factor(t) for t in HISTORY[1:]], axis=-1)
    np.testing.assert_array_equal(factor(state.rows), expected)
    assert state.tasks == 2


def test_inside_jit_a_full_memory_can_only_forget():
    def two(tx):
        return jax.jit(lambda s: boundary(boundary(s, HISTORY[0]), HISTORY[1]))(
            tx.init(HERE)
        )

    with pytest.raises(ValueError, match="overflow='oldest'"):
        two(lora.olora(1.0, capacity=1))
    state = two(lora.olora(1.0, capacity=1, overflow="oldest"))
    np.testing.assert_array_equal(factor(state.rows), factor(HISTORY[1]))


@pytest.mark.parametrize(
    "make", [lora.olora_project, lambda **kw: lora.olora(1.0, **kw)]
)
def test_a_memory_grows_and_keeps_what_it_does(make):
    tx = make(capacity=2)
    state = remembering(tx, HISTORY[:2])
    (row,) = optax_cl.describe(state)
    assert (row.tasks, row.capacity, row.left) == (2, 2, 0)
    grown = optax_cl.grow(state, 3)
    gradient = adapters()
    before, _ = tx.update(gradient, state, HERE)
    after, _ = tx.update(gradient, grown, HERE)
    chex.assert_trees_all_close(before, after, rtol=1e-5, atol=1e-5)
    assert boundary(grown, HISTORY[2]).tasks == 3


def test_rows_that_are_not_finite_protect_nothing():
    broken = {
        "layer/kernel": HERE["layer/kernel"]._replace(
            a=np.full((IN, R), np.nan, np.float32)
        )
    }
    for tx in (lora.olora(1.0, capacity=2), lora.olora_project(capacity=2)):
        with pytest.warns(UserWarning, match="`params` are not finite at"):
            state = remembering(tx, [broken])
        gradient = adapters()
        updates, _ = tx.update(gradient, state, HERE)
        chex.assert_trees_all_equal(updates, gradient)


# --- Bad input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: lora.olora(-1.0, capacity=1), ValueError, "strength"),
        (lambda: lora.olora("x", capacity=1), TypeError, "strength"),
        (lambda: lora.olora(1.0, capacity=0), ValueError, "capacity"),
        (lambda: lora.olora(1.0, capacity=1.5), TypeError, "capacity"),
        (lambda: lora.olora(1.0, capacity=1, penalty="l2"), ValueError, "'l1', 'fro'"),
        (lambda: lora.olora(1.0, capacity=1, overflow="x"), ValueError, "overflow"),
        (lambda: lora.olora(1.0, capacity=1, factors="("), ValueError, "factors"),
        (lambda: lora.olora_project(capacity=1, factors=3), ValueError, "factors"),
    ],
)
def test_arguments_out_of_range_are_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    "tx", [lora.olora(1.0, capacity=1), lora.olora_project(capacity=1)]
)
def test_a_tree_without_input_side_factors_is_refused(tx):
    spectral = lora.Spectral(jnp.ones(()), jnp.ones((OUT, R)), jnp.ones((IN, R)))
    with pytest.raises(ValueError, match=r"no input-side factor.*`kernel/s`"):
        tx.init({"kernel": spectral})
    with pytest.raises(ValueError, match=r"`a`.*its shape is \(3,\)"):
        tx.init({"a": jnp.ones(3)})
    with pytest.raises(TypeError, match=r"`a`.*it holds int32"):
        tx.init({"a": jnp.ones((3, 2), jnp.int32)})


@pytest.mark.parametrize(
    "tx", [lora.olora(1.0, capacity=3), lora.olora_project(capacity=3)]
)
@pytest.mark.parametrize(("fan_in", "rank"), [(IN, R - 1), (IN + 1, R)])
def test_adapters_of_another_shape_are_refused_at_the_boundary(tx, fan_in, rank):
    state = tx.init(HERE)
    a, b = jnp.ones((fan_in, rank)), jnp.ones((rank, OUT))
    other = {"layer/kernel": lora.LoRA(a, b)}
    match = rf"kernel/a` expected shape \(12, 3\), got \({fan_in}, {rank}\)"
    for call in (optax_cl.begin_task, jax.jit(optax_cl.begin_task), boundary):
        with pytest.raises(ValueError, match=match):
            call(state, other)
    seeds = jax.tree.map(lambda x: np.stack([x, x]), HERE)
    optax_cl.begin_task(jax.vmap(tx.init)(seeds), seeds)


def test_what_reads_a_memory_says_which_method_is_missing():
    state = optax.adam(0.1).init(HERE)
    with pytest.raises(ValueError, match="`olora` in the chain"):
        lora.olora_loss(state, HERE)
    with pytest.raises(ValueError, match="`olora_project` in the chain"):
        lora.project_start(HERE, state)
    tx = lora.olora(1.0, capacity=1)
    with pytest.raises(ValueError, match="`params` is None"):
        tx.update(HERE, tx.init(HERE))


def test_other_input_side_factors_can_be_named():
    ones = np.ones((IN, R), np.float32)
    spectral = lora.Spectral(ones[0, 0], ones[:OUT], ones)
    tx = lora.olora_project(capacity=1, factors="/v$")
    state = remembering(tx, [{"kernel": spectral}])
    updates, _ = tx.update({"kernel": spectral}, state)
    assert np.abs(updates["kernel"].v).max() < 1e-6
    chex.assert_trees_all_equal(updates["kernel"].u, spectral.u)


def test_it_finds_the_factors_of_flax_adapters():
    nnx = pytest.importorskip("flax.nnx")
    layer = nnx.LoRA(IN, R, OUT, rngs=nnx.Rngs(0))
    params = nnx.as_pure(nnx.state(layer, nnx.LoRAParam))
    state = remembering(lora.olora(1.0, capacity=2, penalty="fro"), [params])
    a = np.asarray(params["lora_a"])
    np.testing.assert_array_equal(np.asarray(state.rows["lora_a"])[:, :R], a)
    overlap = np.sum((a.T @ a) ** 2)
    np.testing.assert_allclose(lora.olora_loss(state, params), overlap, rtol=1e-5)


# --- Over tasks ----------------------------------------------------------------------


def test_two_tasks_or_twenty_are_one_compilation():
    tx = optax.chain(
        lora.olora(0.1, capacity=2, overflow="oldest"),
        optax.adam(1e-2),
        lora.olora_project(capacity=2, overflow="oldest"),
    )
    traces = []

    @jax.jit
    def step(tree, state):
        traces.append(None)
        updates, state = tx.update(tree, state, tree)
        return optax.apply_updates(tree, updates), state

    end = jax.jit(boundary, donate_argnums=0)
    state = tx.init(HERE)
    for _ in range(20):
        _, state = step(HERE, state)
        state = end(state, adapters())
        state = optax_cl.begin_task(state, lora.project_start(HERE, state))
    assert len(traces) == 1
    assert end._cache_size() == 1
