"""Kronecker factors against sums over examples and classes in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl import penalties
from optax_cl._core import kronecker
from optax_cl.penalties import kronecker_laplace
from tests.arrays import distance, normal, orthonormal

KEY = jax.random.key(0)
IN, HIDDEN, OUT = 5, 4, 3


def logits(params, batch):
    h = jnp.tanh(batch["x"] @ params["first"] + params["bias"][None])
    return h @ params["second"]


TASK = optax_cl.classification(logits, lambda batch: batch["y"])
# Of a single kernel there are closed forms.
LINEAR = optax_cl.classification(lambda w, b: b["x"] @ w, lambda b: b["y"])


def make_params(seed=0):
    return {
        "bias": normal(seed + 1, HIDDEN),
        "first": normal(seed + 2, IN, HIDDEN) / 2,
        "second": normal(seed + 3, HIDDEN, OUT),
    }


def make_batches(seed, *sizes, scale=1.0):
    rng = np.random.default_rng(seed)
    return [
        {
            "x": np.float32(scale * rng.normal(size=(n, IN))),
            "y": np.int32(rng.integers(0, OUT, n)),
        }
        for n in sizes
    ]


def boundary(state, params, batches, task=TASK):
    found = optax_cl.collect(state, params, batches, task=task, key=KEY)
    return optax_cl.end_task(state, params, found)


def after(params, batches, task=TASK, **settings):
    tx = kronecker_laplace(1.0, **settings)
    return boundary(tx.init(params), params, batches, task)


@functools.partial(jax.jit, static_argnums=0)
def pull_at(tx, params, state):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return tx.update(zeros, state, params)[0]


def linear_scores(w, batches):
    """``(p, G)`` of each example and class, in float64."""
    found = []
    for x in np.concatenate([b["x"] for b in batches]).astype(np.float64):
        z = np.exp(x @ np.float64(w))
        p = z / z.sum()
        found += [(p[c], np.outer(x, np.eye(len(p))[c] - p)) for c in range(len(p))]
    return found


def linear_factors(w, batches):
    scores, n = linear_scores(w, batches), sum(len(b["x"]) for b in batches)
    left = sum(p * g @ g.T for p, g in scores) / n
    right = sum(p * g.T @ g for p, g in scores)
    return left, right / np.trace(right)


# --- The factors ---------------------------------------------------------------------


def test_factors_are_the_mean_grams_of_scores_whatever_the_batches():
    w = normal(0, IN, OUT)
    for sizes in ((7,), (4, 3), (1, 5, 1)):
        rows = make_batches(1, 7)[0]
        cuts = np.cumsum((0, *sizes))
        batches = [
            {k: v[a:b] for k, v in rows.items()} for a, b in itertools.pairwise(cuts)
        ]
        state = after(w, batches, LINEAR)
        left, right = linear_factors(w, batches)
        np.testing.assert_allclose(state.left, left, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.right, right, rtol=1e-4, atol=1e-6)


def test_of_one_example_the_product_is_the_fisher_itself():
    w, batches = normal(0, IN, OUT), make_batches(2, 1)
    state = after(w, batches, LINEAR)
    fisher = sum(
        p * np.outer(g.ravel(), g.ravel()) for p, g in linear_scores(w, batches)
    )
    np.testing.assert_allclose(np.kron(state.left, state.right), fisher, atol=1e-5)


@pytest.mark.parametrize("estimator", ["exact", "empirical", "predicted"])
def test_the_trace_is_that_of_the_diagonal_fisher(estimator):
    params, batches = make_params(), make_batches(3, 6, 5)
    state = after(params, batches, estimator=estimator)
    diagonal = penalties.fisher_diagonal(
        params, batches, task=TASK, key=KEY, estimator=estimator
    ).diagonal
    for name in ("first", "second"):
        total = np.trace(state.left[name]) * np.trace(state.right[name])
        np.testing.assert_allclose(total, diagonal[name].sum(), rtol=1e-5)
    # What is no matrix has the diagonal itself.
    np.testing.assert_allclose(state.diagonal["bias"], diagonal["bias"], rtol=1e-5)
    assert isinstance(state.diagonal["first"], optax.MaskedNode)
    assert isinstance(state.left["bias"], optax.MaskedNode)


def test_sampled_labels_are_those_of_the_model():
    w, (batch,) = normal(0, IN, OUT) / 4, make_batches(4, 4)
    many = {k: np.tile(v, (400, *[1] * (v.ndim - 1))) for k, v in batch.items()}
    state = after(w, [many], LINEAR, estimator="sampled")
    left, right = linear_factors(w, [batch])
    np.testing.assert_allclose(state.left, left, atol=0.1 * np.abs(left).max())
    np.testing.assert_allclose(state.right, right, atol=0.05)


def test_where_inputs_and_errors_are_independent_it_is_kfac():
    # Every input meets every label equally often, and all have the same logits.
    x = np.asarray(orthonormal(0, IN, 3)) * np.float32([2, 1, 0.5])
    batch = {"x": np.concatenate([x.T, -x.T]), "y": np.zeros(6, np.int32)}
    state = after(np.zeros((IN, OUT), np.float32), [batch], LINEAR)
    a = np.float64(batch["x"]).T @ batch["x"] / 6
    g = np.eye(OUT) / OUT - 1 / OUT**2
    expected = np.kron(a, g)
    np.testing.assert_allclose(np.kron(state.left, state.right), expected, atol=1e-6)


def test_layers_of_a_stack_and_convolutions_are_read_as_matrices():
    views = optax_cl.matrix_views(stacked="w")
    w = normal(0, 2, IN, IN) / 2

    def stacked(params, batch):
        return jnp.tanh(batch["x"] @ params["w"][0]) @ params["w"][1]

    task = optax_cl.classification(stacked, lambda b: b["y"])
    batches = make_batches(5, 6)
    state = after({"w": w}, batches, task, matrices=views)
    assert state.left["w"].shape == state.right["w"].shape == (2, IN, IN)

    def apart(params, batch):
        return jnp.tanh(batch["x"] @ params["a"]) @ params["b"]

    task = optax_cl.classification(apart, lambda b: b["y"])
    single = after({"a": w[0], "b": w[1]}, batches, task)
    for i, name in enumerate("ab"):
        assert distance(state.left["w"][i], single.left[name]) < 1e-6
        assert distance(state.right["w"][i], single.right[name]) < 1e-6
    # A convolution of one pixel is a dense layer.
    kernel = normal(1, IN, OUT)

    def convolved(kernel, batch):
        image = batch["x"][:, None, None]
        numbers = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "VALID", dimension_numbers=numbers
        )
        return out[:, 0, 0]

    task = optax_cl.classification(convolved, lambda b: b["y"])
    conv = after(kernel[None, None], batches, task)
    dense = after(kernel, batches, LINEAR)
    assert distance(conv.left, dense.left) < 1e-6
    assert distance(conv.right, dense.right) < 1e-6


# --- Sums over tasks -----------------------------------------------------------------


def semidefinite(rng, n, rank, *batch):
    half = rng.normal(size=(*batch, n, rank))
    return half @ half.mT


def best_product(*pairs):
    """The leading singular vectors of the rearranged sum, in float64."""
    (n, m) = (len(x) for x in pairs[0])
    rearranged = sum(np.outer(a.ravel(), b.ravel()) for a, b in pairs)
    u, s, vt = np.linalg.svd(rearranged)
    return np.kron(s[0] * u[:, 0].reshape(n, n), vt[0].reshape(m, m))


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e12, 1e25])
@pytest.mark.parametrize("weight", [1e-6, 0.7, 1.0, 30.0])
def test_the_sum_is_the_nearest_product(scale, weight):
    rng = np.random.default_rng(0)
    shapes = ((4, 3), (4, 1))
    pairs = [
        (
            scale * weight**i * semidefinite(rng, 4, rank, 2),
            semidefinite(rng, 3, small, 2),
        )
        for i, (rank, small) in enumerate(shapes)
    ]
    found = jax.jit(kronecker.nearest_sum)(
        *(tuple(map(np.float32, pair)) for pair in pairs)
    )
    np.testing.assert_allclose(np.trace(found[1], axis1=-2, axis2=-1), 1, rtol=1e-5)
    for i in range(2):
        wanted = best_product(*((a[i], b[i]) for a, b in pairs))
        got = np.kron(np.float64(found[0][i]), np.float64(found[1][i]))
        np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())
        assert np.linalg.eigvalsh(got).min() > -1e-5 * np.abs(got).max()


def test_equal_tasks_count_twice_by_the_nearest_product_and_four_times_by_pi():
    rng = np.random.default_rng(1)
    a, b = (np.float32(semidefinite(rng, n, n)) for n in (4, 3))
    b /= np.trace(b)
    for add, times in ((kronecker.nearest_sum, 2), (kronecker.pi_sum, 4)):
        found = np.kron(*add((a, b), (a, b)))
        np.testing.assert_allclose(found, times * np.kron(a, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("add", [kronecker.nearest_sum, kronecker.pi_sum])
def test_a_sum_too_large_to_hold_leaves_what_was_there(add):
    big = np.float32(3e38) * np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)
    for found, kept in zip(add(big, big), big, strict=True):
        np.testing.assert_allclose(found, kept, rtol=1e-6)
    tiny = 1e-20 * np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32) / 2
    huge = 1e20 * np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32) / 2
    for first, second in ((tiny, huge), (huge, tiny)):
        left, right = add(first, second)
        np.testing.assert_allclose(left, huge[0], rtol=1e-5)
        np.testing.assert_allclose(right, huge[1], rtol=1e-5)


def test_of_two_tasks_of_one_weight_and_nothing_in_common_one_is_kept():
    first = np.diag(np.float32([1, 0, 0])), np.diag(np.float32([0.5, 0.5, 0, 0]))
    second = np.diag(np.float32([0, 0, 1])), np.diag(np.float32([0, 0, 0.5, 0.5]))
    found = np.kron(*kronecker.nearest_sum(first, second))
    kept = [np.abs(found - np.kron(*pair)).max() for pair in (first, second)]
    assert min(kept) < 1e-6


def test_pi_is_the_published_balance():
    rng = np.random.default_rng(2)
    (a0, a1), (g0, g1) = (
        [semidefinite(rng, n, n), 9 * semidefinite(rng, n, 1)] for n in (4, 3)
    )
    pi = np.sqrt(np.trace(g0) * np.trace(a1) / (np.trace(g1) * np.trace(a0)))
    expected = np.kron(a0 + a1 / pi, g0 + pi * g1)
    pairs = [tuple(map(np.float32, pair)) for pair in ((a0, g0), (a1, g1))]
    found = np.kron(*kronecker.pi_sum(*pairs))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("add", [kronecker.nearest_sum, kronecker.pi_sum])
def test_a_pair_of_zeros_adds_nothing(add):
    rng = np.random.default_rng(3)
    pair = tuple(np.float32(semidefinite(rng, n, n)) for n in (4, 3))
    zero = tuple(map(np.zeros_like, pair))
    for found in (add(pair, zero), add(zero, pair)):
        np.testing.assert_allclose(np.kron(*found), np.kron(*pair), rtol=1e-5)
    assert distance(add(zero, zero), zero) == 0


def test_separate_factors_pull_as_the_sum_of_all_tasks_does():
    tx = kronecker_laplace(2.0, accumulate="separate", capacity=3)
    w, expected = normal(0, IN, OUT), 0
    state, fishers = tx.init(w), []
    for task in range(3):
        batches = make_batches(10 + task, 6, scale=1 + task)
        state = boundary(state, w, batches, LINEAR)
        fishers.append(linear_factors(w, batches))
    away = np.float64(normal(9, IN, OUT))
    expected = 2 * sum(left @ away @ right for left, right in fishers)
    found = pull_at(tx, w + np.float32(away), state)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    merged = kronecker_laplace(2.0)
    state = merged.init(w)
    for task in range(3):
        state = boundary(state, w, make_batches(10 + task, 6, scale=1 + task), LINEAR)
    near = pull_at(merged, w + np.float32(away), state)
    size = np.linalg.norm(expected)
    assert 1e-3 * size < np.linalg.norm(near - expected) < 0.2 * size


def test_a_full_bank_raises_and_grows():
    w, batches = normal(0, IN, OUT), make_batches(0, 4)
    tx = kronecker_laplace(1.0, accumulate="separate", capacity=1)
    state = boundary(tx.init(w), w, batches, LINEAR)
    with pytest.raises(ValueError, match=r"all 1 places.*`overflow='merge'`"):
        boundary(state, w, batches, LINEAR)
    grown = boundary(optax_cl.grow(state, 2), w, batches, LINEAR)
    (row,) = optax_cl.describe(grown)
    assert (row.tasks, row.capacity) == (2, 2)
    np.testing.assert_array_equal(grown.left[0], grown.left[1])


def test_a_full_bank_is_told_of_inside_jit_too():
    w, batches = normal(0, IN, OUT), make_batches(0, 4)
    state = kronecker_laplace(1.0, accumulate="separate", capacity=1).init(w)
    found = optax_cl.collect(state, w, batches, task=LINEAR, key=KEY)

    # The state is known there, and its count can be checked.
    @jax.jit
    def end(params):
        return optax_cl.end_task(state, params, found)

    state = end(w)
    with pytest.raises(ValueError, match="all 1 places"):
        jax.jit(lambda params: optax_cl.end_task(state, params, found))(w)


def test_a_full_bank_merges_its_two_oldest_tasks():
    w, tasks = normal(0, IN, OUT), [make_batches(10 + i, 6) for i in range(4)]
    tx = kronecker_laplace(1.0, accumulate="separate", capacity=2, overflow="merge")
    state, end = tx.init(w), jax.jit(optax_cl.end_task)
    pairs = []
    for batches in tasks:
        found = optax_cl.collect(state, w, batches, task=LINEAR, key=KEY)
        state = end(state, w, found)
        pairs.append(linear_factors(w, batches))
    first = kronecker.nearest_sum(*(tuple(map(np.float32, p)) for p in pairs[:2]))
    first = kronecker.nearest_sum(first, tuple(map(np.float32, pairs[2])))
    for found, one, other in zip(
        (state.left, state.right), first, pairs[3], strict=True
    ):
        np.testing.assert_allclose(found[0], one, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[1], other, rtol=1e-4, atol=1e-5)
    assert (state.tasks, state.stored) == (4, 2)


# --- The penalty ---------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", ["nearest", "separate"])
def test_the_pull_is_the_gradient_of_the_loss_and_zero_at_the_anchor(accumulate):
    capacity = 2 if accumulate == "separate" else None
    tx = kronecker_laplace(3.0, accumulate=accumulate, capacity=capacity)
    params = make_params()
    state = tx.init(params)
    for task in range(2):
        params = make_params(10 * task)
        state = boundary(state, params, make_batches(task, 5))
    assert penalties.kronecker_laplace_loss(state, params) == 0
    assert (
        distance(pull_at(tx, params, state), jax.tree.map(jnp.zeros_like, params)) == 0
    )
    there = make_params(99)
    value, gradient = jax.value_and_grad(
        lambda p: penalties.kronecker_laplace_loss(state, p)
    )(there)
    assert value > 0
    found = pull_at(tx, there, state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        found,
        gradient,
    )


def test_it_turns_with_the_inputs_as_a_diagonal_does_not():
    turn = np.asarray(orthonormal(7, IN, IN))
    w, away, (batch,) = normal(0, IN, OUT), normal(1, IN, OUT), make_batches(6, 9)
    turned = {**batch, "x": np.float32(batch["x"] @ turn)}

    def value(make, loss, w, away, batch):
        state = boundary(make(1.0).init(w), w, [batch], LINEAR)
        return float(loss(state, w + away))

    for make, loss, same in (
        (kronecker_laplace, penalties.kronecker_laplace_loss, True),
        (optax_cl.ewc, optax_cl.ewc_loss, False),
    ):
        plain = value(make, loss, w, away, batch)
        other = value(make, loss, turn.T @ w, turn.T @ away, turned)
        assert (abs(other / plain - 1) < 1e-4) == same


def test_directions_of_inputs_never_shown_are_free():
    seen = np.asarray(orthonormal(3, IN, 2))
    (batch,) = make_batches(1, 8)
    batch["x"] = np.float32(batch["x"][:, :2] @ seen.T)
    w = normal(0, IN, OUT)
    tx = kronecker_laplace(1.0)
    state = boundary(tx.init(w), w, [batch], LINEAR)
    free = np.eye(IN) - seen @ seen.T
    away = normal(5, IN, OUT)
    pulled = pull_at(tx, w + np.float32(free @ away), state)
    assert np.abs(pulled).max() < 1e-5 < np.abs(pull_at(tx, w + away, state)).max()


def test_weighting_by_count_multiplies_by_the_labels_seen():
    params, batches = make_params(), make_batches(3, 6, 5)
    plain, weighted = (after(params, batches, weight_by_count=w) for w in (False, True))
    np.testing.assert_allclose(
        weighted.left["first"], 11 * plain.left["first"], rtol=1e-5
    )
    np.testing.assert_allclose(
        weighted.diagonal["bias"], 11 * plain.diagonal["bias"], rtol=1e-5
    )


def test_what_is_not_finite_protects_nothing_and_spoils_nothing():
    w, batches = normal(0, IN, OUT), make_batches(0, 4)
    tx = kronecker_laplace(1.0)
    state = boundary(tx.init(w), w, batches, LINEAR)
    bad = [{**batches[0], "x": np.full((4, IN), np.inf, np.float32)}]
    broken = w.at[0, 0].set(np.nan)
    with pytest.warns(UserWarning, match="not finite"):
        unchanged = boundary(state, w, bad, LINEAR)
    with pytest.warns(UserWarning, match="not finite"):
        lost = boundary(state, broken, batches, LINEAR)
    for found in (unchanged, lost):
        assert distance(found.left, state.left) < 1e-6
        assert distance(found.right, state.right) < 1e-6
    np.testing.assert_array_equal(lost.anchor, w)


def test_leaves_hidden_by_a_mask_are_left_alone():
    params, batches = make_params(), make_batches(3, 6)
    tx = optax.masked(
        kronecker_laplace(1.0), {"bias": False, "first": True, "second": False}
    )
    state = boundary(tx.init(params), params, batches)
    whole = after(params, batches)
    there = make_params(9)
    found = pull_at(tx, there, state)
    assert not found["second"].any() and not found["bias"].any()
    expected = pull_at(kronecker_laplace(1.0), there, whole)["first"]
    np.testing.assert_allclose(found["first"], expected, rtol=1e-5)


def test_what_another_method_reads_of_a_leaf_it_is_hidden_from_is_left_alone():
    # `other` has three axes: which of them are the fan-in, nobody said.
    params = {"w": normal(0, IN, OUT), "other": {"odd": normal(1, 2, 3, OUT)}}
    hidden = {"w": True, "other": False}
    tx = optax.chain(optax_cl.ewc(1.0), optax.masked(kronecker_laplace(1.0), hidden))

    def logits(p, batch):
        return batch["x"] @ p["w"] + p["other"]["odd"].sum((0, 1))[None]

    task = optax_cl.classification(logits, lambda b: b["y"])
    state = boundary(tx.init(params), params, make_batches(3, 6), task)
    memory = state[1].inner_state
    assert np.trace(memory.left["w"]) > 0
    assert jax.tree.leaves(memory.left["other"]) == []
    pulled = pull_at(tx, jax.tree.map(lambda x: x + 1, params), state)
    assert np.all(np.isfinite(pulled["w"]))


def test_a_task_that_is_not_finite_changes_no_diagonal():
    params = make_params()
    tx = kronecker_laplace(1.0)
    state = boundary(tx.init(params), params, make_batches(0, 4))
    bad = [{**batch, "x": batch["x"] * np.nan} for batch in make_batches(1, 4)]
    with pytest.warns(UserWarning, match="not finite"):
        found = boundary(state, params, bad)
    np.testing.assert_array_equal(found.diagonal["bias"], state.diagonal["bias"])


def test_a_schedule_counts_steps_from_zero():
    w = normal(0, IN, OUT)
    tx = kronecker_laplace(lambda count: count)
    state = boundary(tx.init(w), w, make_batches(0, 4), LINEAR)
    zeros, away = jnp.zeros_like(w), w + 1
    first, state = tx.update(zeros, state, away)
    np.testing.assert_array_equal(first, zeros)
    assert (state.strength, state.count) == (1, 1)
    second, state = tx.update(zeros, state, away)
    third, state = tx.update(zeros, state, away)
    assert np.abs(second).max() > 0
    np.testing.assert_allclose(third, 2 * second, rtol=1e-6)


def test_parameters_of_other_shapes_are_named():
    w, batches = {"w": normal(0, IN, OUT)}, make_batches(0, 4)
    task = optax_cl.classification(lambda p, b: b["x"] @ p["w"], lambda b: b["y"])
    state = kronecker_laplace(1.0).init(w)
    found = optax_cl.collect(state, w, batches, task=task, key=KEY)
    for shape in ((OUT,), (2, IN, OUT), (OUT, IN)):
        wrong = {"w": np.ones(shape, np.float32)}
        with pytest.raises(ValueError, match=r"`params`.*at `w` got"):
            optax_cl.end_task(state, wrong, found)
        with pytest.raises(ValueError, match=r"`params`.*at `w` got"):
            penalties.kronecker_laplace_loss(state, wrong)
    smaller = {"w": normal(0, IN, OUT - 1)}
    with pytest.raises(ValueError, match=r"`statistics`.*at `w` got"):
        optax_cl.end_task(kronecker_laplace(1.0).init(smaller), smaller, found)
    hole = {**w, "none": None}
    assert (
        penalties.kronecker_laplace_loss(kronecker_laplace(1.0).init(hole), hole) == 0
    )


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="`accumulate`"):
        kronecker_laplace(1.0, accumulate="sum")
    with pytest.raises(ValueError, match="needs `capacity`"):
        kronecker_laplace(1.0, accumulate="separate")
    with pytest.raises(ValueError, match="`capacity` has no meaning"):
        kronecker_laplace(1.0, capacity=3)
    with pytest.raises(ValueError, match="`strength`"):
        kronecker_laplace(-1.0)
    with (
        pytest.warns(UserWarning, match="whole batches"),
        pytest.raises(ValueError, match="no scores of examples"),
    ):
        kronecker_laplace(1.0, estimator="batched")
    tx = kronecker_laplace(1.0)
    params = make_params()
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"`kronecker_laplace` .* parameters"):
        tx.update(params, state)
    wrong = {**params, "first": jnp.zeros((IN, HIDDEN + 1))}
    with pytest.raises(ValueError, match=r"at `first` got \(5, 5\)"):
        tx.update(wrong, state, wrong)
    with pytest.raises(ValueError, match="can't tell the fan-in side of the leaf `w`"):
        tx.init({"w": jnp.zeros((2, 3, 4))})
    with pytest.raises(ValueError, match="no KroneckerLaplaceState"):
        penalties.kronecker_laplace_loss(optax.EmptyState(), params)
