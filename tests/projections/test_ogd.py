import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl.projections import OgdState, ogd
from tests.arrays import distance, normal

KEY = jax.random.key(0)
IN, OUT = 7, 3


def logits(params, batch):
    return batch["x"] @ params["w"] + params["b"][None]


def labels_of(batch):
    return batch["y"]


TASK = optax_cl.classification(logits, labels_of)


def make_params(seed=0):
    return {"w": normal(seed, IN, OUT), "b": normal(seed + 1, OUT)}


def make_batches(seed, sizes=(2, 2)):
    rng = np.random.default_rng(seed)
    return [
        {
            "x": rng.normal(size=(n, IN)).astype(np.float32),
            "y": rng.integers(0, OUT, n).astype(np.int32),
        }
        for n in sizes
    ]


def boundary(state, params, batches, task=TASK):
    stats = optax_cl.collect(state, params, batches, task=task, key=KEY)
    return optax_cl.end_task(state, params, stats)


def flat(directions):
    """``[capacity * samples, numbers]`` in float64, in the order b, w."""
    leaves = [np.float64(d) for d in jax.tree.leaves(directions)]
    return np.concatenate([d.reshape(-1, d[0, 0].size) for d in leaves], axis=1)


def logit_gradients(batches):
    """Of the true class, written out for this model: ``[examples, numbers]``."""
    rows = []
    for batch in batches:
        for x, y in zip(np.float64(batch["x"]), batch["y"], strict=True):
            chosen = np.eye(OUT)[y]
            rows.append(np.concatenate([chosen, np.outer(x, chosen).ravel()]))
    return np.array(rows)


def projector(rows):
    u, s, _ = np.linalg.svd(rows.T, full_matrices=False)
    u = u[:, s > 1e-6 * s[0]]
    return u @ u.T


# --- What is stored ------------------------------------------------------------------


def test_directions_span_the_logit_gradients_of_three_tasks():
    state, rows = ogd(3, samples=4).init(make_params()), []
    for task in range(3):
        batches = make_batches(task)
        state = boundary(state, make_params(task), batches)
        rows.append(logit_gradients(batches))
        v = flat(state.directions)
        expected = projector(np.concatenate(rows))
        np.testing.assert_allclose(v.T @ v, expected, atol=1e-5)
        used = np.any(v != 0, axis=1)
        assert used.sum() == 4 * (task + 1) and used[: used.sum()].all()
        np.testing.assert_allclose(v @ v.T, np.diag(1.0 * used), atol=1e-6)
    assert state.tasks == 3


def test_a_task_that_is_learnt_has_directions_like_any_other():
    # Its loss has none left: with logits a hundred times larger probabilities are 1.
    batches = make_batches(0)
    rows = logit_gradients(batches)
    params = jax.tree.map(lambda p: 100 * p, make_params())
    state = boundary(ogd(1, samples=4).init(params), params, batches)
    v = flat(state.directions)
    np.testing.assert_allclose(v.T @ v, projector(rows), atol=1e-5)


def test_the_first_examples_are_stored_however_the_batches_are_cut():
    whole = make_batches(3, (7,))
    cut = [jax.tree.map(lambda x, r=r: x[r : r + 3], whole[0]) for r in (0, 3, 6)]
    init = ogd(1, samples=5).init(make_params())
    states = [boundary(init, make_params(), batches) for batches in (whole, cut)]
    assert distance(*[s.directions for s in states]) < 1e-6
    v, rows = flat(states[0].directions), logit_gradients(whole)[:5]
    np.testing.assert_allclose(v.T @ v, projector(rows), atol=1e-5)


def test_fewer_examples_than_places_leave_places_empty():
    state = ogd(2, samples=6).init(make_params())
    state = boundary(state, make_params(), make_batches(0, (2, 1)))
    used = np.any(flat(state.directions) != 0, axis=1)
    assert used.tolist() == [True] * 3 + [False] * 9


def test_padding_is_not_stored_in_the_place_of_an_example():
    batches = make_batches(12, (3, 2))
    state = boundary(ogd(1, samples=6).init(make_params()), make_params(), batches)
    v = flat(state.directions)
    np.testing.assert_allclose(v.T @ v, projector(logit_gradients(batches)), atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_what_is_stored_already_is_not_stored_again(scale):
    (batch,) = make_batches(4, (2,))
    twice = {"x": np.tile(batch["x"], (2, 1)), "y": np.tile(batch["y"], 2)}
    twice["x"][2:] *= np.float32(-2.0)
    task = optax_cl.Task(
        outputs=lambda p, b: scale * (b["x"] @ p["w"]), labels=lambda b: b["y"]
    )
    params = {"w": np.zeros((IN, OUT), np.float32)}
    state = boundary(ogd(2, samples=4).init(params), params, [twice], task)
    again = boundary(state, params, [twice], task)
    for found in (state, again):
        v = flat(found.directions)
        assert np.any(v != 0, axis=1).sum() == 2
        np.testing.assert_allclose(np.sum(v * v, axis=1)[:2], 1, rtol=1e-6)


def test_nearly_parallel_examples_are_told_apart_and_made_orthogonal():
    x = np.ones((4, IN), np.float32)
    x[:, :4] += np.float32(1e-3) * np.eye(4, dtype=np.float32)
    batches = [{"x": x, "y": np.zeros(4, np.int32)}]
    params = make_params()
    state = boundary(ogd(1, samples=4).init(params), params, batches)
    v = flat(state.directions)
    np.testing.assert_allclose(v @ v.T, np.eye(4), atol=1e-6)
    # Rounding of the inputs, of 6e-8, is a share of 6e-5 of what tells them apart.
    np.testing.assert_allclose(v.T @ v, projector(logit_gradients(batches)), atol=1e-3)


@pytest.mark.parametrize("apart", [3e-5, 3e-4, 3e-3])
def test_tasks_that_are_nearly_one_have_orthogonal_directions(apart):
    params, (batch,) = make_params(), make_batches(13, (4,))
    state = boundary(ogd(2, samples=4).init(params), params, [batch])
    x = batch["x"][[0, 0, 2, 3]] + np.float32(apart) * normal(14, 4, IN)
    y = batch["y"][[0, 0, 2, 3]]
    v = flat(boundary(state, params, [{"x": x, "y": y}]).directions)
    used = np.any(v != 0, axis=1)
    assert used[:5].all()
    np.testing.assert_allclose(v @ v.T, np.diag(1.0 * used), atol=1e-6)


def test_an_example_whose_gradient_is_not_finite_is_left_out():
    batches = make_batches(5, (4,))
    batches[0]["x"][1, 2] = np.nan
    params = make_params()
    with pytest.warns(UserWarning, match="not finite"):
        state = boundary(ogd(1, samples=4).init(params), params, batches)
    v, rows = flat(state.directions), logit_gradients(batches)[[0, 2, 3]]
    np.testing.assert_allclose(v.T @ v, projector(rows), atol=1e-5)


def test_labels_of_several_items_count_as_one_logit():
    task = optax_cl.classification(
        lambda p, b: jnp.stack([logits(p, b), 2 * logits(p, b)], 1), lambda b: b["y"]
    )
    (batch,) = make_batches(6, (3,))
    y = np.stack([batch["y"], (batch["y"] + 1) % OUT], 1)
    state = boundary(
        ogd(1, samples=3).init(make_params()), make_params(), [{**batch, "y": y}], task
    )
    parts = [logit_gradients([{"x": batch["x"], "y": y[:, i]}]) for i in (0, 1)]
    v, rows = flat(state.directions), parts[0] + 2 * parts[1]
    np.testing.assert_allclose(v.T @ v, projector(rows), atol=1e-5)


@pytest.mark.parametrize("label", [-1, OUT])
def test_a_label_that_is_no_class_stores_nothing_inside_jit(label):
    # Where its value is known it is refused.
    (batch,) = make_batches(10, (3,))
    batch["y"] = np.array([batch["y"][0], label, batch["y"][2]])
    params = make_params()

    @jax.jit
    def run(params, batches):
        state = ogd(1, samples=3, overflow="drop").init(params)
        stats = optax_cl.collect(
            state, params, batches, task=TASK, key=KEY, stacked=True
        )
        return optax_cl.end_task(state, params, stats)

    v = flat(run(params, jax.tree.map(lambda x: x[None], batch)).directions)
    kept = jax.tree.map(lambda x: x[[0, 2]], batch)
    np.testing.assert_allclose(v.T @ v, projector(logit_gradients([kept])), atol=1e-5)


@pytest.mark.parametrize(
    "params",
    [{}, {"steps": np.ones(2, np.int32)}, {"none": np.ones((0, 3), np.float32)}],
    ids=["no leaf", "integers", "no number"],
)
def test_without_numbers_to_protect_a_boundary_does_nothing(params):
    tx = ogd(1, samples=2)
    task = optax_cl.Task(outputs=lambda p, b: b["x"], labels=lambda b: b["y"])
    state = boundary(tx.init(params), params, make_batches(0, (2,)), task)
    assert state.tasks == 1
    chex.assert_trees_all_equal(tx.update(params, state)[0], params)


def test_two_groups_of_parameters_share_one_pass_and_protect_their_own():
    links = {name: optax.chain(ogd(1, samples=4), optax.scale(-1.0)) for name in "wb"}
    tx = optax.partition(links, {"w": "w", "b": "b"})
    params, batches = make_params(), make_batches(11)
    state = tx.init(params)
    stats = optax_cl.collect(state, params, batches, task=TASK, key=KEY)
    assert len(stats.results) == 1
    state = optax_cl.end_task(state, params, stats)
    new, _ = tx.update(make_params(12), state, params)
    rows = logit_gradients(batches)
    for name, part in (("b", rows[:, :OUT]), ("w", rows[:, OUT:])):
        u = np.float64(make_params(12)[name]).ravel()
        expected = projector(part) @ u - u
        np.testing.assert_allclose(np.ravel(new[name]), expected, atol=1e-5)


# --- What an update becomes ----------------------------------------------------------


@pytest.fixture(scope="module")
def stored():
    params = make_params()
    return boundary(ogd(2, samples=4).init(params), params, make_batches(7))


def test_an_update_loses_its_part_in_the_span_and_nothing_else(stored):
    updates = make_params(8)
    new, state = ogd(2, samples=4).update(updates, stored)
    assert state is stored
    u = np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(updates)])
    off = np.eye(len(u)) - projector(logit_gradients(make_batches(7)))
    found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(new)])
    np.testing.assert_allclose(found, off @ u, atol=1e-5)


def test_products_are_in_full_matrix_precision(stored):
    # Reduced precision would leave a thousandth of what it should remove; ask the
    # programs, since the CPU computes in full precision whatever it is told.
    dropping = ogd(2, samples=4, overflow="drop").init(make_params())
    stats = optax_cl.collect(stored, make_params(), make_batches(7), task=TASK, key=KEY)
    for program in (
        jax.jit(ogd(2, samples=4).update).lower(make_params(), stored),
        jax.jit(optax_cl.end_task).lower(dropping, make_params(), stats),
    ):
        products = re.findall("dot_general.*", program.as_text())
        assert products and all("HIGHEST" in product for product in products)


def test_an_empty_memory_changes_nothing():
    tx, updates = ogd(2, samples=4), make_params(8)
    new, _ = tx.update(updates, tx.init(updates))
    assert distance(new, updates) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("filled", [False, True])
def test_an_update_that_is_not_finite_stays_as_it_is(stored, value, filled):
    tx, updates = ogd(2, samples=4), make_params(8)
    updates["w"] = updates["w"].at[1, 1].set(value)
    new, _ = tx.update(updates, stored if filled else tx.init(updates))
    chex.assert_trees_all_equal(new, updates)


def test_half_precision_is_projected_in_float32(stored):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params(8))
    new, _ = ogd(2, samples=4).update(half, stored)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    expected, _ = ogd(2, samples=4).update(wide, stored)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.bfloat16
        assert distance(a, b.astype(jnp.bfloat16)) == 0


def test_hidden_and_integer_leaves_take_no_part():
    params = {**make_params(), "steps": np.zeros(2, np.int32)}
    tx = optax.masked(ogd(1, samples=4), {"w": True, "b": False, "steps": True})
    state = boundary(tx.init(params), params, make_batches(9))
    updates = {**make_params(1), "steps": np.ones(2, np.int32)}
    new, _ = tx.update(updates, state)
    assert distance(new["b"], updates["b"]) == 0
    assert new["steps"].dtype == np.int32 and distance(new["steps"], np.ones(2)) == 0
    # Of the kernel alone: the rows without the bias.
    rows = logit_gradients(make_batches(9))[:, OUT:]
    off = np.eye(IN * OUT) - projector(rows)
    expected = off @ np.float64(updates["w"]).ravel()
    np.testing.assert_allclose(np.ravel(new["w"]), expected, atol=1e-5)


def learn(tx, steps=60, tasks=3):
    """True logits of every task's stored examples, after it and at the end."""
    params = make_params()
    state = tx.init(params)

    @jax.jit
    def train(params, state, batch):
        def step(_, carry):
            params, state = carry
            grads = jax.grad(lambda p: TASK.loss(p, batch).mean())(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, step, (params, state))

    def said(params, batch):
        z = np.asarray(logits(params, batch))
        return np.take_along_axis(z, batch["y"][:, None], 1)

    data, after = [make_batches(20 + t, (4,))[0] for t in range(tasks)], []
    for batch in data:
        params, state = train(params, state, batch)
        after.append(said(params, batch))
        state = boundary(state, params, [batch])
    last = TASK.loss(params, data[-1]).mean()
    return after, [said(params, batch) for batch in data], last


def test_behind_adam_a_linear_model_never_changes_what_it_said():
    tx = optax.chain(
        optax.scale_by_adam(), ogd(3, samples=4), optax.scale_by_learning_rate(0.1)
    )
    after, end, last = learn(tx)
    assert distance(after, end) < 1e-4
    assert last < 0.1  # and it learnt the last task


def test_before_adam_it_does():
    tx = optax.chain(ogd(3, samples=4), optax.adam(0.1))
    after, end, _ = learn(tx)
    assert distance(after, end) > 0.5


# --- Room ----------------------------------------------------------------------------


def test_a_task_too_many_raises_is_dropped_or_finds_room_in_a_grown_state(stored):
    params = make_params()
    full = boundary(stored, params, make_batches(1))
    assert optax_cl.describe(full)[0].left == 0
    with pytest.raises(ValueError, match=r"all 2 places.*optax_cl.grow"):
        boundary(full, params, make_batches(2))

    grown = optax_cl.grow(full, 3)
    more = boundary(grown, params, make_batches(2))
    v = flat(more.directions)
    np.testing.assert_allclose(v @ v.T, np.eye(12), atol=1e-6)

    dropping = ogd(2, samples=4, overflow="drop").init(params)
    end_task = jax.jit(optax_cl.end_task)
    for seed in (7, 1, 2):
        stats = optax_cl.collect(
            dropping, params, make_batches(seed), task=TASK, key=KEY
        )
        dropping = end_task(dropping, params, stats)
    assert dropping.tasks == 2
    assert distance(dropping.directions, full.directions) < 1e-6


def test_overflow_that_cannot_be_seen_inside_jit_raises(stored):
    params = make_params()
    stats = optax_cl.collect(stored, params, make_batches(1), task=TASK, key=KEY)
    with pytest.raises(ValueError, match=r"outside `jit`.*overflow='drop'"):
        jax.jit(optax_cl.end_task)(stored, params, stats)


def test_seeds_stacked_in_one_state_have_their_own_directions():
    tx = ogd(2, samples=4)
    params = jax.tree.map(lambda *x: jnp.stack(x), make_params(0), make_params(5))
    state = jax.vmap(tx.init)(params)
    stats = [
        optax_cl.collect(
            tx.init(make_params(s)), make_params(s), make_batches(s), task=TASK, key=KEY
        )
        for s in (0, 5)
    ]
    single = [
        optax_cl.end_task(tx.init(make_params(s)), make_params(s), x)
        for s, x in zip((0, 5), stats, strict=True)
    ]
    both = jax.tree.map(lambda *x: jnp.stack(x), *single)
    updates, _ = jax.vmap(tx.update)(params, both)
    for i, alone in enumerate(single):
        mine = jax.tree.map(lambda x, i=i: x[i], (updates, params))
        expected, _ = tx.update(mine[1], alone)
        assert distance(mine[0], expected) < 1e-5
    assert isinstance(state, OgdState)
    # And the boundary needs no vmap.
    results = jax.tree.map(lambda *x: jnp.stack(x), *stats)
    together = optax_cl.end_task(state, params, results)
    assert distance(together.directions, both.directions) < 1e-6
    assert optax_cl.grow(both, 3).directions["w"].shape == (2, 3, 4, IN, OUT)


# --- Mistakes ------------------------------------------------------------------------


def test_mistakes_are_named(stored):
    for settings, name in (
        ({"capacity": 0}, "capacity"),
        ({"capacity": 1, "samples": 0}, "samples"),
        ({"capacity": 1, "overflow": "merge"}, "overflow"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
            ogd(**settings)
    with pytest.raises(TypeError, match="complex"):
        ogd(1).init({"w": np.zeros(2, np.complex64)})
    with pytest.raises(ValueError, match=r"at `w` got \(7, 2\), expected \(7, 3\)"):
        updates = {"w": np.zeros((IN, 2)), "b": np.zeros(OUT)}
        ogd(2, samples=4).update(updates, stored)
    with pytest.raises(ValueError, match=r"got None at `b`.*`optax.masked`"):
        ogd(2, samples=4).update({"w": np.zeros((IN, OUT)), "b": None}, stored)
    with pytest.raises(ValueError, match=r"`ogd`.*`task.outputs`.*got shape \(2,\)"):
        task = optax_cl.Task(outputs=lambda p, b: logits(p, b)[:, 0], labels=labels_of)
        boundary(ogd(1).init(make_params()), make_params(), make_batches(0), task)
    with pytest.raises(ValueError, match=r"`task.labels` is None"):
        task = optax_cl.Task(outputs=logits)
        boundary(ogd(1).init(make_params()), make_params(), make_batches(0), task)
