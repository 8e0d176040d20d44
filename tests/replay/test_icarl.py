"""iCaRL: the loss and the classifier, in float64 NumPy and as identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optax_cl.replay import icarl_loss, nearest_mean
from tests.arrays import normal

SEEDS = st.integers(0, 2**31 - 1)
OLD, SEEN = np.array([1, 1, 0, 0, 0], bool), np.array([1, 1, 1, 1, 0], bool)
LABELS = np.array([0, 3, 2])

# The loss


@jax.jit
def value_and_gradient(z, teacher, labels=LABELS, old=OLD, seen=SEEN):
    def total(z):
        losses = icarl_loss(z, labels, teacher_logits=teacher, old=old, seen=seen)
        return losses.sum(), losses

    return jax.grad(total, has_aux=True)(z)


def logits(seed):
    z = np.random.default_rng(seed).normal(size=(2, 3, 5)) * 3
    return np.float32(z)


@given(SEEDS)
def test_the_loss_is_the_papers_sum_of_binary_cross_entropies(seed):
    z, teacher = logits(seed)
    p, q = (1 / (1 + np.exp(-np.float64(a))) for a in (z, teacher))
    targets = np.where(OLD, q, np.eye(5)[LABELS])
    terms = targets * np.log(p) + (1 - targets) * np.log(1 - p)
    gradient, losses = value_and_gradient(z, teacher)
    np.testing.assert_allclose(losses, -terms[:, :4].sum(1), rtol=1e-5)
    expected = np.where(SEEN, p - targets, 0)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_old_outputs_are_right_as_they_are_and_classes_to_come_are_left_alone():
    z, _ = logits(0)
    gradient, _ = value_and_gradient(z, z)
    np.testing.assert_allclose(gradient[:, :2], 0, atol=1e-7)
    assert not gradient[:, 4].any() and (abs(gradient[:, 2:4]) > 1e-3).all()


def test_the_label_of_an_exemplar_is_what_the_teacher_says_of_it():
    # A target of one for its class would be another method.
    z, teacher = logits(1)
    same, _ = value_and_gradient(z, teacher, np.array([1, 3, 2]))
    gradient, _ = value_and_gradient(z, teacher)
    np.testing.assert_array_equal(same, gradient)


def test_nothing_of_a_class_to_come_reaches_the_loss():
    z, teacher = logits(2)
    expected = value_and_gradient(z, teacher)
    for bad in (np.nan, np.inf):
        z[:, 4], teacher[:, 4] = bad, bad
        jax.tree.map(
            np.testing.assert_array_equal, value_and_gradient(z, teacher), expected
        )


def test_in_the_first_task_the_teacher_is_not_read():
    z, _ = logits(3)
    nothing = np.zeros(5, bool)
    gradient, losses = value_and_gradient(z, np.full_like(z, np.nan), LABELS, nothing)
    assert np.isfinite(losses).all() and np.isfinite(gradient).all()


def test_without_seen_classes_to_come_learn_to_say_no():
    z, teacher = logits(4)
    gradient, _ = value_and_gradient(z, teacher, LABELS, OLD, np.ones(5, bool))
    whole = jax.grad(
        lambda z: icarl_loss(z, LABELS, teacher_logits=teacher, old=OLD).sum()
    )(z)
    np.testing.assert_allclose(whole, gradient, atol=1e-6)
    assert (whole[:, 4] > 0).all()


@pytest.mark.parametrize("size", [100.0, 1e30, np.inf])
def test_large_logits_have_finite_gradients(size):
    z = np.full((3, 5), size, np.float32)
    z[:, [0, 3]] *= -1
    gradient, losses = value_and_gradient(z, -z)
    assert np.isfinite(gradient).all() and not np.isnan(losses).any()
    if np.isfinite(size):  # an infinite one counts as the largest number, and stays
        np.testing.assert_allclose(gradient[:, :2], [[-1, 1]] * 3, atol=1e-6)


def test_half_precision_computes_in_float32():
    z, teacher = (jnp.asarray(a, jnp.bfloat16) for a in logits(5))
    gradient, losses = value_and_gradient(z, teacher)
    assert losses.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    _, wide = value_and_gradient(*(a.astype(jnp.float32) for a in (z, teacher)))
    np.testing.assert_allclose(losses, wide, rtol=1e-6)


def test_inside_jit_a_label_that_is_no_class_shows():
    z, teacher = logits(6)
    gradient, losses = value_and_gradient(z, teacher, np.array([0, 7, -1]))
    assert np.isinf(losses[1:]).all() and np.isfinite(losses[0])
    assert not gradient[1:].any()


# The classifier


def by_means(features, exemplars, labels, classes):
    """Distances in float64."""
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    phi = unit(np.float64(exemplars))
    means = unit(np.array([phi[labels == c].mean(0) for c in range(classes)]))
    gaps = unit(np.float64(features))[:, None] - means[None]
    return np.linalg.norm(gaps, axis=-1).argmin(1)


classify = jax.jit(nearest_mean, static_argnums=3)


@given(SEEDS)
def test_it_is_the_nearest_mean_of_unit_features(seed):
    rng = np.random.default_rng(seed)
    features, exemplars = rng.normal(size=(20, 4)), rng.normal(size=(9, 4))
    lengths = 10.0 ** rng.uniform(-25, 25, size=(29, 1))
    labels = np.arange(9) % 3
    expected = by_means(features, exemplars, labels, 3)
    found = classify(
        np.float32(features * lengths[:20]),
        np.float32(exemplars * lengths[20:]),
        labels,
        3,
    )
    np.testing.assert_array_equal(found, expected)


def test_neither_features_nor_means_may_keep_their_lengths():
    # A long exemplar would pull its mean to itself; a mean of spread-out features is
    # short, and a product with it small.
    exemplars = np.float32([[1, 0], [0, 100], [1, 1.2], [0.9, 1.2]])
    labels, x = np.array([0, 0, 1, 1]), np.float32([[1, 0.9]])
    assert classify(x, exemplars, labels, 2)[0] == 0
    raw = np.array([exemplars[:2].mean(0), exemplars[2:].mean(0)])
    raw /= np.linalg.norm(raw, axis=1, keepdims=True)
    assert (x @ raw.T).argmax() == 1
    phi = exemplars / np.linalg.norm(exemplars, axis=1, keepdims=True)
    short = np.array([phi[:2].mean(0), phi[2:].mean(0)])
    assert (x @ short.T).argmax() == 1


def test_unused_slots_and_classes_without_exemplars_take_no_part():
    features, exemplars = normal(0, 6, 3), normal(1, 4, 3)
    labels = np.array([0, 2, 0, 2])
    expected = 2 * by_means(features, exemplars, labels // 2, 2)
    padded = np.concatenate([exemplars, np.full((3, 3), np.nan), features])
    where = np.arange(len(padded)) < 4
    found = classify(features, padded, np.r_[labels, np.ones(9, int)], 3, where)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_what_has_no_direction_says_nothing(bad):
    features, exemplars = np.float32([[1, 0], [0, 1]]), np.float32([[1, 0], [0, 1]])
    labels = np.array([1, 2])
    spoilt = np.concatenate([exemplars, np.full((2, 2), bad, np.float32)])
    found = classify(features, spoilt, np.r_[labels, 1, 2], 3)
    np.testing.assert_array_equal(found, [1, 2])
    alone = classify(np.full((1, 2), bad, np.float32), exemplars, labels, 3)
    np.testing.assert_array_equal(alone, [1])


def test_mistakes_are_named():
    z, teacher = logits(0)
    give = {"teacher_logits": teacher, "old": OLD}
    with pytest.raises(ValueError, match="`teacher_logits` must have the shape"):
        icarl_loss(z, LABELS, **{**give, "teacher_logits": teacher[:, :4]})
    with pytest.raises(TypeError, match="`old` must be a boolean mask"):
        icarl_loss(z, LABELS, **{**give, "old": np.array([0, 1])})
    with pytest.raises(TypeError, match="`seen` must be a boolean mask"):
        icarl_loss(z, LABELS, **give, seen=3)
    with pytest.raises(ValueError, match="classes from 0 to 4; got 0 to 9"):
        icarl_loss(z, np.array([0, 9, 1]), **give)
    with pytest.raises(TypeError, match="one-hot"):
        icarl_loss(z, np.eye(5, dtype=np.float32)[LABELS], **give)
    x, y = np.ones((3, 2), np.float32), np.zeros(3, int)
    with pytest.raises(ValueError, match=r"`features` must be .*\(2,\)"):
        nearest_mean(x[0], x, y, 2)
    with pytest.raises(TypeError, match="`exemplars` must be real"):
        nearest_mean(x, x.astype(int), y, 2)
    with pytest.raises(ValueError, match=r"`\[M\]`; got \(3, 2\) and \(2,\)"):
        nearest_mean(x, x, y[:2], 2)
    with pytest.raises(TypeError, match="`labels` must be integers"):
        nearest_mean(x, x, y * 1.0, 2)
    with pytest.raises(ValueError, match="classes from 0 to 1"):
        nearest_mean(x, x, y + 2, 2)
    with pytest.raises(TypeError, match="`where` must be boolean"):
        nearest_mean(x, x, y, 2, y)
    with pytest.raises(ValueError, match=r"`where`.*\(3,\); got \(2,\)"):
        nearest_mean(x, x, y, 2, np.ones(2, bool))
    with pytest.raises(TypeError, match="`num_classes`"):
        nearest_mean(x, x, y, 2.0)
