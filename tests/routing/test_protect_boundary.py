"""What a boundary stores of a task: bases, anchors and curvature, against oracles."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from tests.arrays import distance, normal
from tests.routing.helpers import (
    IN,
    KEY,
    OUT,
    TASK,
    boundary,
    make_batches,
    make_params,
    projector,
    protected,
)

# Oracles in float64


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gradient_sum(params, batch):
    x, w = (np.asarray(a, np.float64) for a in (batch["x"], params["w"]))
    p = softmax(x @ w + np.asarray(params["b"], np.float64))
    return x.T @ (p - np.eye(OUT)[np.asarray(batch["y"])])


def merged(u, e, params, batches, rank):
    gram = sum(g @ g.T for g in (gradient_sum(params, b) for b in batches))
    total = (u * e) @ u.T + gram / np.trace(gram)
    values, vectors = np.linalg.eigh(total)
    return vectors[:, ::-1][:, :rank], values[::-1][:rank]


# Bases


@pytest.mark.parametrize("memory", ["all", "last"])
@pytest.mark.parametrize("sizes", [(5, 5, 5), (5, 5, 2)])
def test_basis_against_float64_eigenvectors_over_three_tasks(memory, sizes):
    tx = protected(memory=memory, labels="empirical")
    state = tx.init(make_params())
    u, e = np.zeros((IN, 2)), np.zeros(2)
    for task in range(3):
        params, batches = make_params(task), make_batches(10 + task, sizes)
        state = boundary(state, params, batches)
        if memory == "last":
            u, e = 0 * u, 0 * e
        u, e = merged(u, e, params, batches, 2)
        np.testing.assert_allclose(projector(state.basis["w"]), projector(u), atol=1e-4)
        np.testing.assert_allclose(state.energy["w"], e, rtol=1e-4)
    assert state.tasks == 3
    basis = np.asarray(state.basis["w"])
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-5)


def test_every_task_has_equal_say():
    # The second task's gradients are a thousand times larger; the first is still kept.
    tx = protected(labels="empirical")
    params = make_params()
    first = make_batches(0, scale=[1, 0, 0, 0, 0, 0])
    second = make_batches(1, scale=[0, 1e3, 0, 0, 0, 0])
    state = boundary(boundary(tx.init(params), params, first), params, second)
    np.testing.assert_allclose(
        np.diag(projector(state.basis["w"])), [1, 1, 0, 0, 0, 0], atol=1e-5
    )
    last = boundary(
        boundary(
            protected(memory="last", labels="empirical").init(params), params, first
        ),
        params,
        second,
    )
    np.testing.assert_allclose(
        np.diag(projector(last.basis["w"])), [0, 1, 0, 0, 0, 0], atol=1e-5
    )


def test_a_batch_of_one_example_does_not_weigh_as_a_full_one():
    # Gradients are summed over a batch's items: how the data were cut does not decide.
    params = make_params()
    full = make_batches(0, (30,) * 4, scale=[1, 1, 0, 0, 0, 0])
    odd = make_batches(1, (1,), scale=[0, 0, 3, 0, 0, 0])
    state = boundary(protected().init(params), params, full + odd)
    np.testing.assert_allclose(
        np.diag(projector(state.basis["w"])), [1, 1, 0, 0, 0, 0], atol=0.05
    )


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
def test_randomized_is_close_to_exact_on_a_decaying_spectrum(labels):
    n, r = 24, 3
    task = optax_cl.classification(lambda w, b: b["x"] @ w, lambda b: b["y"])
    w = normal(0, n, 4)
    rng = np.random.default_rng(0)
    batches = [
        {
            "x": np.float32(rng.normal(size=(8, n)) * 0.5 ** np.arange(n)),
            "y": np.int32(rng.integers(0, 4, 8)),
        }
        for _ in range(4)
    ]
    found = []
    for svd in ("exact", "randomized"):
        tx = optax_cl.protect(
            r, optax_cl.scale_by_decoupled_adam(), svd=svd, labels=labels
        )
        found.append(boundary(tx.init(w), w, batches, task=task))
    np.testing.assert_allclose(
        projector(found[1].basis), projector(found[0].basis), atol=2e-3
    )
    np.testing.assert_allclose(found[1].energy, found[0].energy, rtol=2e-3)


@pytest.mark.parametrize("directions", [1, 2])
def test_randomized_survives_gradients_of_low_rank_in_a_small_matrix(directions):
    # The sketch is then as wide as the matrix, and its core singular.
    params = make_params()
    scale = [1.0] * directions + [0.0] * (IN - directions)
    tx = protected(4, svd="randomized", labels="empirical")
    state = boundary(tx.init(params), params, make_batches(0, scale=scale))
    np.testing.assert_allclose(
        np.diag(projector(state.basis["w"])), np.sign(scale), atol=1e-4
    )
    assert (np.asarray(state.energy["w"]) > 0).sum() == directions


def test_threshold_drops_columns_that_are_not_needed():
    params = make_params()
    batches = make_batches(0, scale=[1, 0.3, 0.1, 0.01, 0, 0])
    ranks = []
    for threshold in (0.5, 0.99, 1.0):
        tx = protected(4, threshold=threshold, labels="empirical")
        state = boundary(tx.init(params), params, batches)
        energy = np.asarray(state.energy["w"])
        kept = int((energy > 0).sum())
        assert np.all(np.asarray(state.basis["w"])[:, kept:] == 0)
        if threshold < 1:
            assert energy.sum() >= threshold > energy[: kept - 1].sum()
        ranks.append(kept)
    assert ranks == [1, 2, 4]


# Faults in the data


def poisoned(kind):
    batches = make_batches(5)
    if kind == "zero":
        return [b | {"x": 0 * b["x"]} for b in batches]
    batches[1]["x"][0, 0] = float(kind)
    return batches[:2]


def poisoned_boundary(state, params, kind):
    if kind == "zero":
        return boundary(state, params, poisoned(kind))
    with pytest.warns(UserWarning, match="`collect`.*not finite"):
        return boundary(state, params, poisoned(kind))


@pytest.mark.parametrize("kind", ["zero", "nan", "inf"])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_task_without_a_usable_gradient_leaves_the_basis_alone(kind, svd):
    tx = protected(3, rule=optax_cl.balance(), threshold=0.6, svd=svd)
    params = make_params()
    empty = poisoned_boundary(tx.init(params), params, kind)
    np.testing.assert_array_equal(empty.basis["w"], 0.0)
    np.testing.assert_array_equal(empty.curvature["w"], 0.0)
    state = boundary(tx.init(params), params, make_batches(0))
    after = poisoned_boundary(state, params, kind)
    np.testing.assert_array_equal(after.basis["w"], state.basis["w"])
    np.testing.assert_array_equal(after.energy["w"], state.energy["w"])
    assert after.tasks == 2
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))


# Anchor and curvature


def test_anchor_is_the_parameters_in_the_new_basis():
    tx = protected(rule=optax_cl.ratchet())
    state = tx.init(make_params())
    for task in range(3):
        params = make_params(task)
        state = boundary(state, params, make_batches(task))
        np.testing.assert_allclose(
            state.anchor["w"],
            np.asarray(state.basis["w"]).T @ np.asarray(params["w"]),
            rtol=1e-4,
            atol=1e-5,
        )


def exact_fisher(params, batches, basis):
    """Fisher of the mean loss over items along u_k (x) e_o, in float64."""
    x = np.concatenate(
        [np.asarray(b["x"], np.float64).reshape(-1, IN) for b in batches]
    )
    p = softmax(x @ np.asarray(params["w"], np.float64))
    squares = (x @ np.asarray(basis, np.float64)) ** 2
    return squares.T @ (p * (1 - p)) / len(x)


@pytest.mark.parametrize("items", [1, 3])
def test_curvature_is_the_exact_fisher_in_expectation(items):
    # Ragged, and inputs of different size, so that weights of batches matter.
    params = make_params()
    params["w"] = np.asarray(params["w"]) / 2
    rng = np.random.default_rng(3)
    batches = []
    for n, size in ((4, 0.5), (4, 0.5), (1, 2.0)):
        shape = (n,) if items == 1 else (n, items)
        batches.append(
            {
                "x": np.float32(size * rng.normal(size=(*shape, IN))),
                "y": np.zeros(shape, np.int32),
            }
        )
    task = TASK if items == 1 else ITEMS_TASK
    state = protected(rule=optax_cl.spring()).init(params)

    @jax.jit
    def with_every_key(keys):
        new = jax.lax.map(lambda key: boundary(state, params, batches, key, task), keys)
        return new.curvature["w"], new.basis["w"]

    curvatures, bases = with_every_key(jax.random.split(KEY, 120))
    expected = [exact_fisher(params, batches, basis) for basis in np.asarray(bases)]
    errors = np.asarray(curvatures) - expected
    z = errors.mean(0) / (errors.std(0, ddof=1) / np.sqrt(len(errors)))
    assert np.max(np.abs(z)) < 4.0
    # The test can see an error of a fifth.
    assert np.all(errors.std(0) / np.sqrt(len(errors)) < 0.15 * expected[-1].max())


ITEMS_TASK = optax_cl.classification(
    lambda params, batch: jnp.einsum("bti,io->bto", batch["x"], params["w"]),
    lambda batch: batch["y"],
)


def test_curvature_sums_over_tasks_and_turns_with_the_basis():
    tx = protected(rule=optax_cl.spring())
    params = make_params()
    one = boundary(tx.init(params), params, make_batches(0))
    stats = optax_cl.collect(one, params, make_batches(1), task=TASK, key=KEY)
    two = optax_cl.end_task(one, params, stats)
    (task_curvature,) = [
        v["w"] for k, v in stats.results.items() if k.startswith("curvature")
    ]
    new, old = (np.float64(state.basis["w"]) for state in (two, one))
    mixing = (new.T @ old) ** 2
    np.testing.assert_allclose(
        two.curvature["w"],
        mixing @ np.asarray(one.curvature["w"]) + np.asarray(task_curvature),
        rtol=1e-4,
    )


def test_last_task_only_forgets_the_curvature_too():
    params = make_params()
    tx = protected(rule=optax_cl.spring(), memory="last")
    second = make_batches(1)
    state = boundary(boundary(tx.init(params), params, make_batches(0)), params, second)
    fresh = boundary(tx.init(params), params, second)
    np.testing.assert_allclose(state.curvature["w"], fresh.curvature["w"], rtol=1e-4)


def test_boundary_restarts_the_averaged_coefficients():
    tx = protected(rule=optax_cl.balance())
    params = make_params()
    state = boundary(tx.init(params), params, make_batches(0))
    _, state = jax.jit(tx.update)(params, state, params)
    assert state.mean_weight > 0
    state = boundary(state, params, make_batches(1))
    assert state.mean_weight == 0 and not np.any(state.mean["w"])


def test_injected_numbers_take_effect_at_the_next_step():
    def make(mean_decay, threshold):
        return optax_cl.protect(
            2,
            optax_cl.attenuate(optax_cl.balance()),
            optax_cl.scale_by_decoupled_adam(),
            mean_decay=mean_decay,
            threshold=threshold,
            matrices=optax_cl.matrix_views(skip="b"),
        )

    params = make_params()
    tx = optax.inject_hyperparams(make)(mean_decay=0.9, threshold=1.0)
    state = boundary(tx.init(params), params, make_batches(0))
    assert np.linalg.matrix_rank(np.asarray(state.inner_state.basis["w"])) == 2
    state.hyperparams.update(mean_decay=jnp.float32(0.5), threshold=jnp.float32(0.1))
    _, state = jax.jit(tx.update)(params, state, params)
    assert state.inner_state.mean_weight == 0.5
    state = boundary(state, params, make_batches(1))
    assert np.linalg.matrix_rank(np.asarray(state.inner_state.basis["w"])) == 1


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_basis_that_is_kept_keeps_its_curvature(value):
    tx = protected(memory="last", rule=optax_cl.balance())
    params = make_params()
    state = boundary(tx.init(params), params, make_batches(0))
    bad = [{**b, "x": jnp.full_like(b["x"], value)} for b in make_batches(1)]
    with contextlib.ExitStack() as stack:
        if value != 0:
            stack.enter_context(pytest.warns(UserWarning, match="not finite"))
        after = boundary(state, params, bad)
    assert distance(after.basis, state.basis) == 0
    assert distance(after.curvature, state.curvature) == 0
    assert np.all(np.asarray(state.curvature["w"]) > 0)


@pytest.mark.parametrize(
    ("memory", "svd"),
    [
        ("all", "exact"),
        ("last", "exact"),
        ("grow", "exact"),
        ("all", "randomized"),
        ("last", "randomized"),
    ],
)
def test_an_input_that_was_always_zero_has_exactly_none_of_any_direction(memory, svd):
    # Rounding there would be a routed gradient where there is no raw one, of which Adam
    # makes steps as long as any.
    tx = protected(5, rule=0.5, memory=memory, svd=svd)
    params = make_params()
    state = tx.init(params)
    for seed, scale in ((0, [3, 1, 0, 0, 2, 1]), (1, [1, 0, 0, 5, 1, 1])):
        state = boundary(state, params, make_batches(seed, scale=scale))
        u = np.asarray(state.basis["w"])
        dead = np.array(scale) == 0
        if seed and memory != "last":
            dead &= np.arange(IN) == 2
        assert not u[dead].any() and u[~dead].any(1).all()
        used = u[:, u.any(0)]
        np.testing.assert_allclose(used.T @ used, np.eye(used.shape[1]), atol=1e-5)
