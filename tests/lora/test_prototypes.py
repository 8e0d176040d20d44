"""Routing without a task id: running prototypes and the distances to them."""

import chex
import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from optax_cl import lora

# Compiled as one function: quicker than their operations one by one.
init = jax.jit(lora.prototypes_init, static_argnames=("tasks", "dim", "classes"))
add, route = jax.jit(lora.prototypes_add), jax.jit(lora.route)
nearest_mean, mahalanobis = jax.jit(lora.nearest_mean), jax.jit(lora.mahalanobis)


def clusters(seed=0, per=40, tasks=3, classes=2, dim=5, apart=3.0):
    """Gaussian clusters of a common, lopsided covariance: features, tasks, labels."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) / 2
    means = apart * rng.normal(size=(tasks, classes, dim))
    task = np.repeat(np.arange(tasks), classes * per)
    label = np.tile(np.repeat(np.arange(classes), per), tasks)
    x = means[task, label] + rng.normal(size=(len(task), dim)) @ mix
    order = rng.permutation(len(task))
    return x[order].astype(np.float32), task[order], label[order]


def fitted(x, task, label=None, batch=None, tasks=3, classes=2):
    prototypes = init(tasks, x.shape[1], classes=classes)
    for i in range(0, len(x), batch or len(x)):
        part = slice(i, i + (batch or len(x)))
        prototypes = add(
            prototypes,
            x[part],
            task[part],
            None if label is None else label[part],
        )
    return prototypes


def oracle(x, task, label, tasks=3, classes=2):
    """Means, counts and pooled scatter in float64, from all data at once."""
    x = x.astype(np.float64)
    mean = np.zeros((tasks, classes, x.shape[1]))
    count = np.zeros((tasks, classes), int)
    scatter = np.zeros((x.shape[1], x.shape[1]))
    for t in range(tasks):
        for c in range(classes):
            rows = x[(task == t) & (label == c)]
            count[t, c] = len(rows)
            if len(rows):
                mean[t, c] = rows.mean(0)
                scatter += (rows - mean[t, c]).T @ (rows - mean[t, c])
    return mean, count, scatter


# Statistics


@pytest.mark.parametrize("batch", [8, 240])
def test_streaming_equals_all_at_once(batch):
    x, task, label = clusters()
    prototypes = fitted(x, task, label, batch)
    mean, count, scatter = oracle(x, task, label)
    np.testing.assert_array_equal(prototypes.count, count)
    np.testing.assert_allclose(prototypes.mean, mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(prototypes.scatter, scatter, rtol=1e-4, atol=1e-3)


def test_a_large_offset_does_not_drown_the_covariance():
    # Sums of squares minus the square of sums would leave nothing here in float32.
    x, task, label = clusters(apart=0.1)
    x = (x + 4096.0).astype(np.float32)
    prototypes = fitted(x, task, label, 30)
    _, _, scatter = oracle(x, task, label)
    error = np.abs(prototypes.scatter - scatter).max()
    assert error < 1e-3 * np.abs(scatter).max()


def test_one_task_id_for_a_whole_batch():
    x, _, _ = clusters()
    one = add(init(3, 5), x, 1)
    each = add(init(3, 5), x, np.full(len(x), 1))
    chex.assert_trees_all_equal(one, each)
    np.testing.assert_array_equal(np.asarray(one.count)[:, 0], [0, len(x), 0])


@pytest.mark.parametrize(
    ("ids", "kind"), [(-1, "task"), (3, "task"), (-1, "label"), (2, "label")]
)
def test_examples_out_of_range_are_left_out(ids, kind):
    x, task, label = clusters(per=5)
    where = np.arange(len(x)) % 3 == 0
    padded = {"task": task.copy(), "label": label.copy()}
    padded[kind][where] = ids
    got = fitted(np.where(where[:, None], 1e9, x), padded["task"], padded["label"])
    expected = fitted(x[~where], task[~where], label[~where])
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_examples_that_are_not_finite_are_left_out(bad):
    x, task, label = clusters(per=5)
    spoilt = x.copy()
    spoilt[::3, 2] = bad
    keep = np.arange(len(x)) % 3 != 0
    expected = fitted(x[keep], task[keep], label[keep])
    chex.assert_trees_all_close(fitted(spoilt, task, label), expected, atol=1e-5)


def test_adding_compiles_once_for_all_tasks():
    once = jax.jit(chex.assert_max_traces(lora.prototypes_add, 1))
    prototypes = init(4, 5)
    for task in range(4):
        new = once(prototypes, np.ones((6, 5), np.float32), np.int32(task))
        chex.assert_trees_all_equal_shapes_and_dtypes(new, prototypes)
        prototypes = new
    np.testing.assert_array_equal(prototypes.count, 6)


# Distances


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_mahalanobis_distances_are_those_of_the_formula(shrinkage):
    x, task, label = clusters()
    router = mahalanobis(fitted(x, task, label), shrinkage)
    got = route(router, x).distances
    mean, _, scatter = oracle(x, task, label)
    covariance = scatter / len(x)
    shrunk = (1 - shrinkage) * covariance
    shrunk += shrinkage * np.trace(covariance) / 5 * np.eye(5)
    apart = x[:, None, None, :].astype(np.float64) - mean
    squared = np.einsum("btci,ij,btcj->btc", apart, np.linalg.inv(shrunk), apart)
    np.testing.assert_allclose(got, squared.min(-1), rtol=2e-3, atol=1e-3)


def test_euclidean_distances_and_weights_are_those_of_the_formula():
    x, task, label = clusters(apart=0.5)
    routes = route(nearest_mean(fitted(x, task, label)), x, temperature=2.0)
    mean, _, _ = oracle(x, task, label)
    apart = x[:, None, None, :].astype(np.float64) - mean
    squared = (apart**2).sum(-1).min(-1)
    weights = np.exp(-squared / 4) / np.exp(-squared / 4).sum(-1, keepdims=True)
    np.testing.assert_allclose(routes.distances, squared, rtol=1e-4)
    np.testing.assert_allclose(routes.weights, weights, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(routes.task, squared.argmin(-1))
    assert routes.task.dtype == np.int32


def test_small_distances_far_from_the_origin_are_kept():
    # |x|^2 - 2 x m + |m|^2 is off by whole units here in float32.
    x = np.float32([[4096.0, 0.0], [-4096.0, 0.0]])
    prototypes = fitted(x, np.arange(2), tasks=2, classes=1)
    routes = route(nearest_mean(prototypes), np.float32([[4096.0, 0.25]]))
    assert float(np.asarray(routes.distances)[0, 0]) == 0.0625


@pytest.mark.parametrize("shrinkage", [0.1, 0.5])
def test_mahalanobis_agrees_with_the_lda_of_scikit_learn(shrinkage):
    x, task, label = clusters(apart=0.4)
    test, _, _ = clusters(seed=5, apart=0.4)
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    lda.fit(x.astype(np.float64), 2 * task + label)
    # A task for every class, so that weights are comparable with its probabilities.
    prototypes = fitted(x, 2 * task + label, tasks=6, classes=1)
    routes = route(mahalanobis(prototypes, shrinkage), test)
    probabilities = lda.predict_proba(test.astype(np.float64))
    np.testing.assert_allclose(routes.weights, probabilities, atol=2e-3)
    second, first = np.sort(probabilities, -1)[:, -2:].T
    sure = first - second > 0.01
    assert sure.mean() > 0.8
    assert (np.asarray(routes.task) == lda.predict(test))[sure].all()


# Routing


@pytest.mark.parametrize("make", [nearest_mean, mahalanobis])
def test_ids_are_recovered_on_separable_data(make):
    x, task, label = clusters(apart=8.0)
    router = make(fitted(x, task, label, 30))
    fresh, fresh_task, _ = clusters(apart=8.0)
    routes = route(router, fresh)
    np.testing.assert_array_equal(routes.task, fresh_task)


def test_one_hot_prototypes_recover_their_ids():
    eye = np.eye(5, dtype=np.float32)
    prototypes = fitted(eye, np.arange(5), tasks=5, classes=1)
    for router in (nearest_mean(prototypes), mahalanobis(prototypes)):
        routes = route(router, 3 * eye)
        np.testing.assert_array_equal(routes.task, np.arange(5))


def test_mahalanobis_discounts_the_direction_that_all_classes_share():
    # Nearer to the wrong mean, along a direction that says nothing.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2)).astype(np.float32) * [10.0, 0.1]
    task = np.arange(400) % 2
    x[:, 1] += task
    x[:, 0] += 3 * task
    prototypes = fitted(x.astype(np.float32), task, tasks=2, classes=1)
    point = np.float32([[4.0, 0.0]])
    assert int(route(nearest_mean(prototypes), point).task[0]) == 1
    assert int(route(mahalanobis(prototypes, 1e-4), point).task[0]) == 0


@pytest.mark.parametrize("make", [nearest_mean, mahalanobis])
def test_empty_tasks_and_classes_never_win(make):
    # The mean of an empty cell is stored as zero, where this input lies.
    x, task, label = clusters(apart=0.0)
    prototypes = fitted(x + 50.0, task, label, tasks=7, classes=4)
    routes = route(make(prototypes), np.zeros((3, 5), np.float32))
    assert (np.asarray(routes.task) < 3).all()
    weights = np.asarray(routes.weights)
    np.testing.assert_array_equal(weights[:, 3:], 0.0)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("make", [nearest_mean, mahalanobis])
def test_without_prototypes_inputs_go_nowhere(make):
    routes = route(make(init(3, 2)), np.ones((4, 2), np.float32))
    np.testing.assert_array_equal(routes.task, -1)
    np.testing.assert_array_equal(routes.weights, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_input_that_is_not_finite_goes_nowhere(bad):
    x, task, label = clusters()
    router = mahalanobis(fitted(x, task, label))
    spoilt = x.copy()
    spoilt[1, 0] = bad
    routes = route(router, spoilt)
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(routes.task) == -1), [1])
    assert not np.isnan(routes.weights).any()


@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_fewer_examples_than_features_give_no_nan(shrinkage):
    x, task, label = clusters(per=2, dim=64)
    router = mahalanobis(fitted(x, task, label), shrinkage)
    routes = route(router, x)
    assert np.isfinite(routes.distances).all()
    np.testing.assert_array_equal(routes.task, task)


def test_one_example_a_class_routes_by_the_nearest_mean():
    x = np.eye(4, dtype=np.float32)[:3]
    prototypes = fitted(x, np.arange(3), classes=1)
    near, far = (route(make(prototypes), x) for make in (nearest_mean, mahalanobis))
    chex.assert_trees_all_close(near, far, atol=1e-6)


def test_vmap_over_seeds_equals_one_by_one():
    data = [clusters(seed) for seed in (0, 1)]

    def run(x, task, label):
        return route(mahalanobis(fitted(x, task, label)), x).weights

    together = jax.jit(jax.vmap(run))(*(np.stack(x) for x in zip(*data, strict=True)))
    for i, one in enumerate(data):
        np.testing.assert_allclose(np.asarray(together)[i], run(*one), atol=1e-4)


def test_routes_pick_the_adapters_of_a_mixed_batch():
    ones = np.ones((3, 2), np.float32)
    adapter = {"w": lora.LoRA(ones[:2, :1], ones[:1])}
    at = np.float32([[-5.0, -5.0], [5.0, 5.0], [np.nan, 0.0]])
    prototypes = fitted(at[:2], np.arange(2), classes=1)
    ids = route(nearest_mean(prototypes), at).task

    @jax.jit
    def layer(x, ids):
        stacked = lora.store(lora.stack(adapter, 3), 1, adapter)

        def one(x, task):
            return lora.dense(x, 0 * ones[:2], lora.select(stacked, task)["w"], 1.0)

        return jax.vmap(one)(x, ids)

    np.testing.assert_array_equal(np.asarray(layer(ones, ids))[:, 0], [0.0, 2.0, 0.0])


def test_digits_of_three_input_shifts_are_routed():
    # Tasks: the digits as they are, upside down, and transposed; features: pixels.
    images = load_digits().images.astype(np.float32) / 16
    labels = load_digits().target
    views = [images, images[:, ::-1], images.transpose(0, 2, 1)]
    prototypes = init(3, 64, classes=10)
    for task, view in enumerate(views):
        prototypes = add(prototypes, view[:1000].reshape(-1, 64), task, labels[:1000])

    def share(router):
        right = [
            np.mean(np.asarray(route(router, view[1000:].reshape(-1, 64)).task) == task)
            for task, view in enumerate(views)
        ]
        return float(np.mean(right))

    # With one mean for each task in place of ten: .84 and .89.
    assert share(nearest_mean(prototypes)) > 0.9
    assert share(mahalanobis(prototypes)) > 0.92


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p: lora.prototypes_init(0, 2), ValueError, "`tasks`"),
        (lambda p: lora.prototypes_init(2, 2.0), TypeError, "`dim`"),
        (lambda p: lora.prototypes_init(2, 2, classes=0), ValueError, "`classes`"),
        (
            lambda p: lora.prototypes_add(p, np.ones((4, 3)), 0),
            ValueError,
            r"\[B, 2\].*got \(4, 3\)",
        ),
        (
            lambda p: lora.prototypes_add(p, np.ones(2), 0),
            ValueError,
            r"\[B, 2\].*got \(2,\)",
        ),
        (
            lambda p: lora.prototypes_add(p, np.ones((4, 2)), 3),
            ValueError,
            r"`task` must be in \[0, 3\)",
        ),
        (
            lambda p: lora.prototypes_add(p, np.ones((4, 2)), 1.0),
            TypeError,
            "`task` must hold integers",
        ),
        (
            lambda p: lora.prototypes_add(p, np.ones((4, 2)), 0, np.zeros(3, int)),
            ValueError,
            r"`labels`.*got shape \(3,\)",
        ),
        (lambda p: lora.mahalanobis(p, 1.5), ValueError, "`shrinkage`"),
        (
            lambda p: lora.route(nearest_mean(p), np.ones((1, 2)), temperature=0.0),
            ValueError,
            "`temperature`",
        ),
        (
            lambda p: lora.route(nearest_mean(p), np.ones((1, 3))),
            ValueError,
            r"\[B, 2\].*got \(1, 3\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call(init(3, 2))
