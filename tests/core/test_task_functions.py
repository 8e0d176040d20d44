"""Tasks made of a network's outputs: what they refuse, and where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_cl

KEY = jax.random.key(0)
X = np.eye(4, dtype=np.float32)
PARAMS = {"w": np.arange(12, dtype=np.float32).reshape(4, 3) / 10}
Y = np.int32([0, 1, 2, 0])


def labels_with(bad, at):
    labels = Y.copy()
    labels[at] = bad
    return labels


def logits(params, batch):
    return batch[0] @ params["w"]


TASK = optax_cl.classification(logits, lambda batch: batch[1])


def ewc(estimator):
    return optax_cl.ewc(1.0, estimator=estimator)


def balance(estimator):
    del estimator
    return optax_cl.protect(2, optax_cl.attenuate())


def collect(batches, task=TASK, tx=None, **kwargs):
    tx = ewc("exact") if tx is None else tx
    state = tx.init(PARAMS)
    return optax_cl.collect(state, PARAMS, batches, task=task, key=KEY, **kwargs)


# --- Regression ----------------------------------------------------------------------


@pytest.mark.parametrize(("made", "wanted"), [((4, 1), (4,)), ((4,), (4, 1))])
def test_predictions_and_targets_of_two_shapes_are_not_broadcast(made, wanted):
    task = optax_cl.regression(lambda p, b: p.reshape(made), lambda b: b)
    with (
        jax.numpy_rank_promotion("allow"),
        pytest.raises(
            ValueError, match=r"`predictions` and `targets`.*4.*4.*\[\.\.\.,"
        ),
    ):
        jax.jit(task.loss)(np.zeros(4), np.ones(wanted))


def test_regression_sums_over_the_outputs_of_one_shape():
    task = optax_cl.regression(lambda p, b: p, lambda b: b)
    zeros = np.zeros((4, 2, 3), np.float32)
    loss = task.loss(zeros, zeros + 1)
    np.testing.assert_array_equal(loss, np.full(4, 3.0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_labels_drawn_around_half_precision_outputs_have_unit_variance(dtype):
    task = optax_cl.regression(lambda p, b: p, lambda b: b)
    outputs = np.full((1000, 1), 4 / jnp.finfo(dtype).eps, dtype)  # the next is 4 off

    @jax.jit
    def squared_errors(outputs):
        return -2 * task.log_prob(outputs, None, task.sample_label(outputs, KEY))

    assert np.mean(squared_errors(outputs)) == pytest.approx(1.0, abs=0.1)


# --- Classification ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_labels_are_drawn_from_the_distribution_of_half_precision_logits(dtype):
    # Half of the probability on one class, the rest even over 999. Noise in the logits'
    # own precision has ties, and no tail: it draws that class in 99 of 100 cases.
    z = np.zeros((4000, 1000), dtype)
    z[:, 0] = np.log(999.0)
    drawn = np.asarray(jax.jit(TASK.sample_label)(z, KEY))
    odds = np.exp(np.float64(z[0, 0]))
    first = odds / (odds + 999)
    assert np.mean(drawn == 0) == pytest.approx(first, abs=0.03)
    assert np.mean(drawn[drawn > 0] < 500) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("shape", [(4, 1), (4,), (4, 2, 1)])
@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_a_single_logit_is_refused_for_it_has_no_importance(shape, estimator):
    task = optax_cl.classification(
        lambda p, b: jnp.sum(p["w"]) * jnp.ones(shape), lambda b: b[1]
    )
    with pytest.raises(ValueError, match=r"`logits` must give.*two.*`optax_cl\.regres"):
        collect([(X, Y)], task, ewc(estimator))


def test_two_logits_out_of_one_are_a_bernoulli():
    z = np.array([-1.0, 0.0, 2.0])
    task = optax_cl.classification(
        lambda p, b: jnp.concatenate([jnp.zeros_like(p), p], axis=-1), lambda b: b
    )
    loss = jax.jit(task.loss)(np.float32(z[:, None]), np.int32([0, 1, 1]))
    expected = np.log1p(np.exp(np.where([False, True, True], -z, z)))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


BAD = [9, 3, -1, -100]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("make", [ewc, balance])
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_collect_refuses_labels_that_are_no_class(make, estimator, bad):
    batches = [(X, Y), (X, labels_with(bad, at=2))]
    with pytest.raises(ValueError, match=rf"`task\.labels`.* from 0 to 2.*{bad}"):
        collect(batches, tx=make(estimator))
    with pytest.raises(ValueError, match=r"`task\.labels`"):
        collect(jax.tree.map(lambda *x: np.stack(x), *batches), stacked=True)
    with pytest.raises(ValueError, match=r"`task\.labels`"):
        collect([jax.tree.map(jnp.asarray, batch) for batch in batches])


@pytest.mark.parametrize("bad", BAD)
def test_where_labels_are_not_known_one_that_is_no_class_has_no_loss(bad):
    y = labels_with(bad, at=2)
    loss = jax.jit(TASK.loss)(PARAMS, (X, y))
    np.testing.assert_array_equal(np.isnan(loss), [False, False, True, False])
    # An index of -1 would take it for the last class.
    grads = jax.jit(jax.grad(lambda p: TASK.loss(p, (X, y))[2]))(PARAMS)
    np.testing.assert_array_equal(grads["w"], 0.0)
    statistics = jax.jit(
        lambda batches: collect(batches, tx=ewc("exact"), stacked=True)
    )((X[None], y[None]))
    assert statistics.num_examples == 4


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (
            np.eye(3, dtype=np.float32)[Y],
            TypeError,
            r"integers.*float32.*\(4, 3\).*argmax",
        ),
        (Y.astype(np.float32), TypeError, "integers.*float32.*astype"),
        (Y > 0, TypeError, "integers.*bool"),
        (Y[:, None], ValueError, r"shape \(4,\).*got shape \(4, 1\).*\[\.\.\., 0\]"),
        (np.eye(3, dtype=np.int32)[Y], ValueError, r"shape \(4,\).*\(4, 3\)"),
    ],
)
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_labels_of_another_kind_are_named(labels, error, message, estimator):
    with pytest.raises(error, match="`labels` must give " + message):
        collect([(X, labels)], tx=ewc(estimator))
    with pytest.raises(error, match="`labels` must give " + message):
        jax.jit(TASK.loss)(PARAMS, (X, labels))


def test_every_class_and_every_kind_of_integer_is_a_label():
    for dtype in (np.uint8, np.int16, np.int32):
        y = np.array([0, 1, 2, 0], dtype)
        assert collect([(X, y), (X[:3], y[:3])]).num_examples == 7
    items = optax_cl.classification(
        lambda p, b: b[0] @ p["w"] + jnp.zeros((1, 2, 1)), lambda b: b[1]
    )
    batch = np.ones((4, 2, 4), np.float32), np.zeros((4, 2), np.int32)
    assert collect([batch], items, ewc("empirical")).num_examples == 4


def test_a_task_of_ones_own_has_its_labels_judged_if_it_tells_them():
    own = TASK._replace(labels=None)
    assert collect([(X, labels_with(9, at=0))], own).num_examples == 4
    with pytest.raises(ValueError, match=r"`task\.labels`"):
        collect(
            [(X, labels_with(9, at=0))], own._replace(labels=lambda batch: batch[1])
        )
