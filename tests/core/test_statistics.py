import warnings

import chex
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cl._core import per_example, statistics, streaming, tasks
from optax_cl._core.statistics import fisher_diagonal

KEY = jax.random.key(7)
LINEAR = tasks.classification(lambda p, b: b["x"] @ p["w"], lambda b: b["y"])
MLP = tasks.classification(
    lambda p, b: jnp.tanh(b["x"] @ p["u"]) @ p["w"], lambda b: b["y"]
)


def data_and_params(n=23, d=4, c=3, hidden=None, seed=0):
    rng = np.random.default_rng(seed)
    data = {
        "x": rng.normal(size=(n, d)).astype(np.float32),
        "y": rng.integers(0, c, n),
    }
    shapes = {"w": (d, c)} if hidden is None else {"u": (d, hidden), "w": (hidden, c)}
    params = {k: np.float32(rng.normal(size=s)) for k, s in shapes.items()}
    return data, params


def batches_of(data, size):
    n = len(jax.tree.leaves(data)[0])
    rows = [slice(i, i + size) for i in range(0, n, size)]
    return [jax.tree.map(lambda x, r=r: x[r], data) for r in rows]


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def linear_scores(data, params, labels):
    """Scores of softmax regression, [N, d, C], in float64."""
    x, w = np.float64(data["x"]), np.float64(params["w"])
    p = softmax(x @ w)
    return x[:, :, None] * (np.eye(w.shape[1])[labels] - p)[:, None, :]


def fisher(params, batches, task=LINEAR, estimator="exact", key=KEY):
    return fisher_diagonal(params, batches, task=task, key=key, estimator=estimator)


# --- Values --------------------------------------------------------------------------


def test_exact_is_the_closed_form_of_softmax_regression():
    data, params = data_and_params()
    x, w = np.float64(data["x"]), np.float64(params["w"])
    p = softmax(x @ w)
    expected = np.einsum("na,nc->ac", x**2, p * (1 - p)) / len(x)
    got = fisher(params, batches_of(data, 10))
    np.testing.assert_allclose(got.diagonal["w"], expected, rtol=1e-5)
    assert got.num_items == got.num_examples == len(x)


def test_exact_is_the_hessian_diagonal_of_the_mean_loss_of_a_linear_model():
    data, params = data_and_params()
    hessian = jax.hessian(lambda w: LINEAR.loss({"w": w}, data).mean())
    expected = np.einsum("acac->ac", jax.jit(hessian)(params["w"]))
    got = fisher(params, [data]).diagonal["w"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)


def test_exact_sums_over_classes_in_a_network_too():
    data, params = data_and_params(hidden=5)

    def log_softmax(p):
        outputs = MLP.outputs(p, data)
        return jax.nn.log_softmax(outputs), outputs

    jac, outputs = jax.jit(jax.jacrev(log_softmax, has_aux=True))(params)
    p = softmax(np.float64(outputs))
    expected = jax.tree.map(
        lambda j: np.einsum("nc,ncij->ij", p, np.float64(j) ** 2) / len(p), jac
    )
    got = fisher(params, batches_of(data, 7), MLP).diagonal
    chex.assert_trees_all_close(got, jax.tree.map(np.float32, expected), rtol=1e-4)


@pytest.mark.parametrize("estimator", ["empirical", "predicted"])
def test_single_label_estimators_average_squares_of_single_scores(estimator):
    data, params = data_and_params()
    z = data["x"] @ np.asarray(params["w"])
    labels = data["y"] if estimator == "empirical" else z.argmax(1)
    scores = linear_scores(data, params, labels)
    got = fisher(params, batches_of(data, 5), estimator=estimator).diagonal["w"]
    np.testing.assert_allclose(got, (scores**2).mean(0), rtol=1e-4)
    # The square of a batch's summed gradient is something else.
    assert not np.allclose(got, scores.sum(0) ** 2 / len(z), rtol=0.2)


def test_sampled_is_unbiased_for_exact():
    one, params = data_and_params(n=1)
    n = 4000
    data = jax.tree.map(lambda x: np.repeat(x, n, axis=0), one)
    got = fisher(params, [data], estimator="sampled").diagonal["w"]
    squares = np.stack([linear_scores(one, params, [c])[0] ** 2 for c in range(3)])
    p = softmax(one["x"] @ np.asarray(params["w"]))[0]
    mean = np.einsum("c,cij->ij", p, squares)
    std = np.sqrt((np.einsum("c,cij->ij", p, squares**2) - mean**2) / n)
    assert np.abs((got - mean) / std).max() < 4.5
    np.testing.assert_allclose(fisher(params, [one]).diagonal["w"], mean, rtol=1e-4)


def test_empirical_is_exact_in_expectation_only_if_labels_come_from_the_model():
    one, params = data_and_params(n=1)
    n = 4000
    z = np.asarray(one["x"] @ np.asarray(params["w"]))
    drawn = jax.random.categorical(KEY, np.repeat(z, n, axis=0))
    data = {"x": np.repeat(one["x"], n, axis=0), "y": np.asarray(drawn)}
    exact = fisher(params, [one]).diagonal["w"]
    from_model = fisher(params, [data], estimator="empirical").diagonal["w"]
    np.testing.assert_allclose(from_model, exact, rtol=0.2)
    unlikely = {**data, "y": np.full(n, z.argmin())}
    other = fisher(params, [unlikely], estimator="empirical").diagonal["w"]
    assert not np.allclose(other, exact, rtol=0.5)


def test_sampled_draws_anew_for_another_key():
    data, params = data_and_params()
    a, b = (
        fisher(params, [data], estimator="sampled", key=jax.random.key(i)).diagonal["w"]
        for i in (0, 1)
    )
    assert not np.allclose(a, b)


# Logits are data, and the parameters a bias of zero: scores in logit space.
LOGITS = tasks.classification(lambda p, b: b + p, lambda b: jnp.zeros(len(b), int))


@pytest.mark.parametrize(
    ("scale", "ratio_of_means", "mean_of_ratios"),
    [(0.1, 0.94, 0.94), (1, 0.61, 0.59), (3, 0.44, 0.30), (10, 0.40, 0.11)],
)
def test_predicted_underweights_by_the_known_ratio(
    scale, ratio_of_means, mean_of_ratios
):
    z = np.random.default_rng(0).normal(size=(20_000, 5)) * scale
    params = np.zeros((1, 5), np.float32)
    totals = [
        np.sum(fisher(params, [np.float32(z)], LOGITS, estimator).diagonal)
        for estimator in ("predicted", "exact")
    ]
    assert totals[0] / totals[1] == pytest.approx(ratio_of_means, abs=0.015)
    p = softmax(z)
    predicted = ((np.eye(5)[z.argmax(1)] - p) ** 2).sum(1)
    exact = (p * (1 - p)).sum(1)
    assert (predicted / exact).mean() == pytest.approx(mean_of_ratios, abs=0.015)


def test_what_squaring_a_batch_gradient_computes():
    # A loss linear in the parameters has the data, negated, for scores.
    n, b, mean, var = 4000, 8, 0.5, 1.0
    scores = np.random.default_rng(0).normal(mean, var**0.5, size=(n, 3))
    task = tasks.Task(loss=lambda p, s: -(s @ p))
    params = np.zeros(3, np.float32)
    batches = batches_of(np.float32(scores), b)
    per_example = fisher(params, batches, task, "empirical").diagonal
    with pytest.warns(UserWarning, match="batch size") as told:
        per_batch = fisher(params, batches, task, "batched").diagonal
    assert told[0].filename == __file__
    np.testing.assert_allclose(per_example, var + mean**2, rtol=0.15)
    np.testing.assert_allclose(per_batch, var / b + mean**2, rtol=0.25)
    # The two forms that are not offered: summed losses, over examples or batches.
    sums = scores.reshape(-1, b, 3).sum(1)
    np.testing.assert_allclose(per_batch, (sums**2).mean(0) / b**2, rtol=1e-3)
    np.testing.assert_allclose((sums**2).sum(0) / n, var + b * mean**2, rtol=0.25)
    np.testing.assert_allclose(
        (sums**2).sum(0) / (n / b), b * var + b**2 * mean**2, rtol=0.25
    )


# --- Sequences -----------------------------------------------------------------------


def sequence_data(n=6, t=4):
    rng = np.random.default_rng(1)
    data = {
        "x": rng.normal(size=(n, t, 2)).astype(np.float32),
        "y": rng.integers(0, 3, (n, t)),
    }
    return data, {"w": np.float32(rng.normal(size=(2, 3)))}


@pytest.mark.parametrize("estimator", ["empirical", "predicted"])
def test_scores_of_a_sequence_are_summed_before_squaring(estimator):
    data, params = sequence_data()
    z = data["x"] @ np.asarray(params["w"])
    labels = data["y"] if estimator == "empirical" else z.argmax(-1)
    delta = np.eye(3)[labels] - softmax(np.float64(z))
    scores = np.einsum("nta,ntc->ntac", data["x"], delta)
    expected = (scores.sum(1) ** 2).sum(0) / labels.size
    got = fisher(params, batches_of(data, 4), estimator=estimator)
    np.testing.assert_allclose(got.diagonal["w"], expected, rtol=1e-4)
    assert got.num_items == labels.size
    assert got.num_examples == len(labels)
    assert not np.allclose(expected, (scores**2).sum((0, 1)) / labels.size, rtol=0.2)


def test_sampled_sequences_have_the_units_of_the_hessian_of_the_mean_loss():
    data, params = sequence_data(n=2)
    many = jax.tree.map(lambda x: np.tile(x, (2000,) + (1,) * (x.ndim - 1)), data)
    x = np.float64(data["x"]).reshape(-1, 2)
    p = softmax(x @ np.float64(params["w"]))
    hessian = np.einsum("na,nc->ac", x**2, p * (1 - p)) / len(x)
    got = fisher(params, [many], estimator="sampled").diagonal["w"]
    np.testing.assert_allclose(got, hessian, rtol=0.15)


def test_vector_labels_of_a_gaussian_model_are_one_item_each():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(9, 2)), rng.normal(size=(9, 4, 3))
    params = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)

    def predict(p, batch):
        return jnp.broadcast_to((batch[0] @ p)[:, None], (len(batch[0]), 4, 3))

    def log_prob(p, batch, labels):
        return -0.5 * jnp.sum((predict(p, batch) - labels) ** 2, axis=(1, 2))

    task = tasks.Task(
        loss=lambda p, batch: -log_prob(p, batch, batch[1]),
        outputs=predict,
        log_prob=log_prob,
        sample_label=lambda z, key: z + jax.random.normal(key, z.shape),
    )
    batch = (np.float32(x), np.float32(y))
    error = (y - (x @ np.float64(params))[:, None]).sum(1)
    expected = (np.einsum("na,nc->nac", x, error) ** 2).mean(0)
    got = fisher(params, [batch], task, "empirical")
    np.testing.assert_allclose(got.diagonal, expected, rtol=1e-4)
    assert got.num_items == got.num_examples == 9
    many = jax.tree.map(lambda v: np.tile(v, (400,) + (1,) * (v.ndim - 1)), batch)
    sampled = fisher(params, [many], task, "sampled").diagonal
    hessian = np.repeat(4 * (x**2).mean(0)[:, None], 3, axis=1)
    np.testing.assert_allclose(sampled, hessian, rtol=0.15)


# --- Invariances ---------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical", "predicted"])
def test_batch_size_order_and_duplication_do_not_matter(estimator):
    data, params = data_and_params(hidden=5)
    # Labels drawn without chance, so that the same ones come for every batching.
    task = MLP._replace(sample_label=lambda outputs, key: outputs.argmin(-1))
    whole = fisher(params, [data], task, estimator).diagonal
    for size in (1, 7):
        got = fisher(params, batches_of(data, size), task, estimator).diagonal
        chex.assert_trees_all_close(got, whole, rtol=1e-5)
    backwards = jax.tree.map(lambda x: x[::-1], data)
    chex.assert_trees_all_close(
        fisher(params, [backwards, data], task, estimator).diagonal, whole, rtol=1e-5
    )


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("chunk", [1, 7])
def test_a_batch_is_worked_off_in_chunks_with_the_same_result(
    estimator, chunk, monkeypatch
):
    data, params = data_and_params()
    expected = fisher(params, [data], estimator=estimator).diagonal
    copies = 2 if estimator == "exact" else 1
    monkeypatch.setattr(per_example, "_CHUNK_NUMBERS", chunk * copies * 12)
    statistics.fisher_pass.cache_clear()
    try:
        got = fisher(params, batches_of(data, 20), estimator=estimator).diagonal
    finally:
        statistics.fisher_pass.cache_clear()
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_no_array_holds_a_gradient_for_every_example(estimator, monkeypatch):
    batch, params = 64, {"w": jnp.ones((30, 20))}
    monkeypatch.setattr(per_example, "_CHUNK_NUMBERS", 4 * 600)
    data = {"x": np.ones((batch, 30), np.float32), "y": np.zeros(batch, int)}
    statistics.fisher_pass.cache_clear()
    try:
        p = statistics.fisher_pass(estimator)
    finally:
        statistics.fisher_pass.cache_clear()

    def step(params, data):
        given = tasks.PassInput(None, params, data, jnp.ones(batch), KEY, LINEAR, {})
        return p.step(p.init(None, params), given)

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval.size for v in eqn.outvars)
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from sizes(inner)

    largest = max(sizes(jax.make_jaxpr(step)(params, data).jaxpr))
    assert 600 < largest <= 4 * 600


def test_ragged_batches_and_later_tasks_compile_nothing_new():
    data, params = data_and_params(n=24)
    fisher(params, batches_of(data, 8))
    compiled = streaming._step._cache_size()
    fisher(jax.tree.map(np.cos, params), batches_of(data, 8))
    fisher(params, batches_of(jax.tree.map(lambda x: x[:19], data), 8))
    assert streaming._step._cache_size() == compiled
    assert statistics.fisher_pass("exact") is statistics.fisher_pass("exact")


# --- Trees and dtypes ----------------------------------------------------------------


@pytest.mark.parametrize("estimator", statistics.ESTIMATORS)
def test_results_are_float32_and_not_negative_for_bfloat16_params(estimator):
    data, params = data_and_params()
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = fisher(half, batches_of(data, 10), estimator=estimator).diagonal["w"]
    assert got.dtype == jnp.float32
    assert (got >= 0).all() and got.max() > 0
    if estimator == "exact":
        full = fisher(params, [data]).diagonal["w"]
        np.testing.assert_allclose(got, full, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical", "predicted"])
def test_leaves_that_cannot_be_differentiated_and_none_are_hidden(estimator):
    data, params = data_and_params()
    mixed = {**params, "steps": jnp.array(3), "nothing": None}
    got = fisher(mixed, [data], estimator=estimator).diagonal
    plain = fisher(params, [data], estimator=estimator).diagonal
    assert isinstance(got["steps"], optax.MaskedNode)
    assert got["nothing"] is None
    chex.assert_trees_all_close(got["w"], plain["w"], rtol=1e-6)


def test_a_task_without_outputs_has_one_label_per_example():
    data, params = data_and_params()
    bare = tasks.Task(loss=LINEAR.loss)
    chex.assert_trees_all_close(
        fisher(params, [data], bare, "empirical"),
        fisher(params, [data], estimator="empirical"),
        rtol=1e-6,
    )


def test_the_active_head_alone_leaves_other_heads_without_importance():
    rng = np.random.default_rng(0)
    data = {
        "x": rng.normal(size=(9, 4)).astype(np.float32),
        "y": rng.integers(0, 2, 9),
    }
    params = {f"head{i}": jnp.array(rng.normal(size=(4, 2))) for i in (0, 1)}
    active = tasks.classification(lambda p, b: b["x"] @ p["head0"], lambda b: b["y"])
    all_heads = tasks.classification(
        lambda p, b: b["x"] @ jnp.concatenate([p["head0"], p["head1"]], axis=1),
        lambda b: b["y"],
    )
    right = fisher(params, [data], active).diagonal
    wrong = fisher(params, [data], all_heads).diagonal
    assert (right["head1"] == 0).all()
    assert (wrong["head1"] > 0).all()
    assert not np.allclose(right["head0"], wrong["head0"], rtol=0.1)


# --- Bad input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "missing"),
    [
        ("exact", "outputs"),
        ("sampled", "sample_label"),
        ("sampled", "log_prob"),
        ("predicted", "outputs"),
        ("empirical", "loss"),
    ],
)
def test_a_missing_function_is_named_with_the_estimator(estimator, missing):
    data, params = data_and_params()
    task = LINEAR._replace(**{missing: None})
    with pytest.raises(ValueError, match=rf"task\.{missing}.*{estimator}"):
        fisher(params, [data], task, estimator)


def test_exact_refuses_several_labels_per_example():
    data, params = sequence_data()
    with pytest.raises(ValueError, match=r"\[B, C\]; got shape \(6, 4, 3\)"):
        fisher(params, [data])


def test_predicted_refuses_outputs_without_classes():
    data, params = data_and_params()
    task = LINEAR._replace(outputs=lambda p, b: (b["x"] @ p["w"])[:, 0])
    with pytest.raises(ValueError, match="most likely class"):
        fisher(params, [data], task, "predicted")


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_functions_that_lose_the_axis_of_examples_are_refused(estimator):
    data, params = data_and_params()
    task = LINEAR._replace(
        loss=lambda p, b: LINEAR.loss(p, b).mean(),
        outputs=lambda p, b: (
            LINEAR.outputs(p, b) if estimator == "sampled" else LINEAR.outputs(p, b)[:2]
        ),
        log_prob=lambda p, b, y: LINEAR.log_prob(p, b, y).mean(),
    )
    with pytest.raises(ValueError, match="axis of examples"):
        fisher(params, [data], task, estimator)


def test_a_loss_per_item_is_refused():
    data, params = sequence_data()
    task = LINEAR._replace(loss=lambda p, b: -LINEAR.log_prob(p, b, b["y"]))
    with pytest.raises(ValueError, match="one number per example"):
        fisher(params, [data], task, "empirical")


@pytest.mark.parametrize("estimator", ["exact", "predicted"])
def test_estimators_over_classes_refuse_labels_that_are_no_classes(estimator):
    data, params = data_and_params()
    task = LINEAR._replace(sample_label=lambda outputs, key: outputs + 1.0)
    with pytest.raises(ValueError, match=rf"{estimator}.*labels of dtype float32"):
        fisher(params, [data], task, estimator)


def test_an_unknown_estimator_and_no_data_are_refused():
    data, params = data_and_params()
    with pytest.raises(ValueError, match="`estimator` must be one of 'exact'"):
        fisher(params, [data], estimator="true")
    with pytest.raises(ValueError, match="yielded nothing"):
        fisher(params, [])
