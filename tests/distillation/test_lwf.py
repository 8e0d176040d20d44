"""LwF's loss against NumPy, its invariants, the wrong forms, faults, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from optax_cl.distillation import confidence_weights, lwf_loss
from tests.arrays import normal

C = 5
OLD = np.array([True, False, True, True, False])


def softmax(z, temperature, old):
    """Float64, row by row, with zeros for classes that are not old."""
    z = np.float64(z)
    out = np.zeros_like(z)
    for row in np.ndindex(z.shape[:-1]):
        classes = np.flatnonzero(np.broadcast_to(old, z.shape)[row])
        if len(classes):
            out[(*row, classes)] = special.softmax(z[row][classes] / temperature)
    return out


def oracle(z, teacher, temperature=2.0, old=OLD):
    """Losses, and the gradient of their sum."""
    p, q = softmax(z, temperature, old), softmax(teacher, temperature, old)
    return -special.xlogy(q, np.where(p > 0, p, 1)).sum(-1), (p - q) / temperature


def value_and_grad(logits, *args, **kwargs):
    def total(z):
        losses = lwf_loss(z, *args, **kwargs)
        return losses.sum(), losses

    (_, losses), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
    return np.asarray(losses), np.asarray(grad)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.0])
def test_value_and_gradient_are_those_of_the_formula(x64, shape, temperature):
    z, teacher = (normal(s, *shape, C, dtype=np.float64) * 3 for s in (0, 1))
    losses, grad = value_and_grad(z, teacher, temperature=temperature, old=OLD)
    expected = oracle(z, teacher, temperature)
    assert losses.shape == shape
    np.testing.assert_allclose(losses, expected[0], rtol=1e-12)
    np.testing.assert_allclose(grad, expected[1], atol=1e-14)


def test_without_a_mask_all_classes_are_old():
    z, teacher = normal(0, 4, C), normal(1, 4, C)
    losses, grad = value_and_grad(z, teacher)
    expected = oracle(z, teacher, old=np.ones(C, bool))
    np.testing.assert_allclose(losses, expected[0], rtol=1e-6)
    np.testing.assert_allclose(grad, expected[1], atol=1e-7)


def test_each_example_may_have_old_classes_of_its_own():
    z, teacher = normal(0, 2, 3, C), normal(1, 2, 3, C)
    for shape in [(2, 3, C), (2, 1, C), (1, 3, C)]:
        old = np.random.default_rng(0).random(shape) < 0.6
        losses, grad = value_and_grad(z, teacher, old=old)
        expected = oracle(z, teacher, old=old)
        np.testing.assert_allclose(losses, expected[0], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(grad, expected[1], atol=1e-7)
        assert (grad[~np.broadcast_to(old, z.shape)] == 0).all()


def test_at_the_teacher_the_gradient_is_zero_and_the_loss_its_entropy():
    teacher = normal(1, 4, C)
    losses, grad = value_and_grad(teacher, teacher, old=OLD)
    q = softmax(teacher, 2.0, OLD)
    np.testing.assert_allclose(losses, special.entr(q).sum(-1), rtol=1e-6)
    np.testing.assert_allclose(grad, 0, atol=1e-7)


def test_it_is_the_divergence_plus_what_does_not_depend_on_the_student():
    teacher = normal(1, 4, C)
    entropy, _ = value_and_grad(teacher, teacher, old=OLD)
    for seed in (2, 3):
        z = normal(seed, 4, C)
        p, q = softmax(z, 2.0, OLD), softmax(teacher, 2.0, OLD)
        kl = special.rel_entr(q, p).sum(-1)
        losses, _ = value_and_grad(z, teacher, old=OLD)
        np.testing.assert_allclose(losses - entropy, kl, atol=2e-6)


def test_new_classes_do_not_count_where_a_padded_teacher_would_fight_them():
    def padded(z, teacher):  # zeros for new classes in q, all of them in p
        q = jnp.asarray(softmax(teacher, 2.0, OLD), jnp.float32)
        return -jnp.sum(q * jax.nn.log_softmax(z / 2.0), -1)

    z, teacher = normal(0, 4, C), normal(1, 4, C)
    learnt = z + 6.0 * ~OLD[None]
    for loss, same in ((lambda *a: lwf_loss(*a, old=OLD), True), (padded, False)):
        before, after = loss(z, teacher), loss(learnt, teacher)
        assert np.allclose(before, after, rtol=1e-6) == same
        pushed = jax.grad(lambda z, f=loss: f(z, teacher).sum())(z)[:, ~OLD]
        assert (np.asarray(pushed) == 0).all() == same


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
def test_what_new_logits_hold_changes_nothing(value):
    z, teacher = normal(0, 4, C), normal(1, 4, C)
    clean = value_and_grad(z, teacher, old=OLD)
    put = jnp.where(OLD[None], 0, value)
    for args in ((z + put, teacher), (z, teacher + put)):
        losses, grad = value_and_grad(*args, old=OLD)
        np.testing.assert_array_equal(losses, clean[0])
        np.testing.assert_array_equal(grad, clean[1])
        assert (grad[:, ~OLD] == 0).all()


def test_the_gradient_shrinks_with_the_temperature_unless_it_is_scaled(x64):
    z, teacher = (normal(s, 4, C, dtype=np.float64) for s in (0, 1))
    plain = value_and_grad(z, teacher, temperature=1e4, old=OLD)
    scaled = value_and_grad(z, teacher, temperature=1e4, old=OLD, scale_t2=True)
    for a, b in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(1e8 * a, b, rtol=1e-12, atol=1e-11)
    # The limit of T^2 times the gradient: centred differences, over their number.
    gap = np.asarray(z - teacher)[:, OLD]
    limit = (gap - gap.mean(1, keepdims=True)) / OLD.sum()
    np.testing.assert_allclose(scaled[1][:, OLD], limit, atol=1e-3)
    assert np.abs(plain[1]).max() < 1e-6


@pytest.mark.parametrize(
    "temperature", [jnp.float16(300), jnp.bfloat16(2.3), jnp.int32(10**5), 10**5]
)
def test_the_temperature_is_squared_in_the_dtype_of_the_losses(temperature):
    args = normal(0, 4, C), normal(1, 4, C)
    same = float(temperature)
    losses, grad = value_and_grad(*args, temperature=temperature, scale_t2=True)
    expected = value_and_grad(*args, temperature=same, scale_t2=True)
    plain, _ = value_and_grad(*args, temperature=same)
    np.testing.assert_allclose(losses, same**2 * np.float64(plain), rtol=1e-6)
    np.testing.assert_array_equal(grad, expected[1])


def test_nothing_flows_to_the_teacher():
    z, teacher = normal(0, 4, C), normal(1, 4, C)
    grad = jax.grad(lambda t: lwf_loss(z, t, old=OLD).sum())(teacher)
    assert (np.asarray(grad) == 0).all()


@pytest.mark.parametrize("classes", [[], [2]])
def test_no_old_class_or_one_gives_zero(classes):
    old = np.isin(np.arange(C), classes)
    losses, grad = value_and_grad(normal(0, 4, C), normal(1, 4, C), old=old)
    assert (losses == 0).all() and not np.signbit(losses).any()
    np.testing.assert_allclose(grad, 0, atol=1e-7)


def test_without_an_old_class_no_nan_is_met_on_the_way():
    # Operation by operation, since compiled ones show their results only.
    with jax.debug_nans(True):
        jax.grad(lambda z: lwf_loss(z, normal(1, C), old=~OLD & OLD))(normal(0, C))


def test_masks_and_temperatures_may_be_traced_and_mapped_over():
    z, teacher = normal(0, 4, C), normal(1, 4, C)
    heads = jnp.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    temperatures = jnp.array([1.0, 2.0, 4.0])

    @jax.jit
    def losses(heads, temperatures):
        return jax.vmap(lambda old, t: lwf_loss(z, teacher, temperature=t, old=old))(
            heads, temperatures
        )

    expected = [
        oracle(z, teacher, float(t), np.asarray(h))[0]
        for h, t in zip(heads, temperatures, strict=True)
    ]
    np.testing.assert_allclose(losses(heads, temperatures), expected, rtol=1e-6)
    rows = jax.vmap(lambda a, b: lwf_loss(a, b, old=heads[1]))(z, teacher)
    np.testing.assert_allclose(rows, lwf_loss(z, teacher, old=heads[1]), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    z, teacher = ((10 * normal(s, 4, C)).astype(dtype) for s in (0, 1))
    losses, grad = value_and_grad(z, teacher, old=OLD)
    wide, _ = value_and_grad(
        z.astype(jnp.float32), teacher.astype(jnp.float32), old=OLD
    )
    assert losses.dtype == jnp.float32 and grad.dtype == dtype
    np.testing.assert_array_equal(losses, wide)


@pytest.mark.parametrize("temperature", [1e-30, 0.5, 2.0])
def test_huge_and_infinite_logits_have_a_defined_loss_and_gradient(temperature):
    rows = np.array(
        [
            [np.inf, 0, 1, 2, 3],
            [-np.inf, 0, 1, 2, 3],
            [np.inf, np.inf, -np.inf, 0, 1],
            [-np.inf] * 5,
            [3e38, -3e38, 0, 1e5, -1e5],
        ],
        np.float32,
    )
    z, teacher = jnp.array(rows.repeat(5, 0)), jnp.array(np.tile(rows, (5, 1)))
    losses, grad = value_and_grad(z, teacher, temperature=temperature)
    assert not np.isnan(losses).any() and (losses >= 0).all()
    assert not np.isnan(grad).any()
    assert (grad[np.isinf(z)] == 0).all()


def test_nan_is_passed_on_and_stays_in_its_example():
    z = normal(0, 3, C).at[1, 0].set(jnp.nan)
    losses, grad = value_and_grad(z, normal(1, 3, C), old=OLD)
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False])
    assert not np.isnan(grad[[0, 2]]).any()
    # Nor is a teacher that diverged a loss of zero.
    teacher = normal(1, 3, C).at[1, 0].set(jnp.nan)
    losses, grad = value_and_grad(normal(0, 3, C), teacher, old=OLD)
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False])
    assert not np.isnan(grad[[0, 2]]).any()
    np.testing.assert_array_equal(
        confidence_weights(teacher, threshold=0.0, old=OLD), [1, 0, 1]
    )


def test_confidence_is_the_largest_probability_of_an_old_class():
    teacher = normal(1, 40, C) * 2
    top = softmax(teacher, 1.0, OLD).max(-1)
    for threshold in (0.6, 0.9):
        weights = confidence_weights(teacher, threshold=threshold, old=OLD)
        np.testing.assert_array_equal(weights, top >= threshold)
        assert 0 < weights.sum() < 40 and weights.dtype == jnp.float32
    # Class 1 is not old, whatever the teacher thinks of it.
    sure = jnp.zeros((1, C)).at[0, 1].set(50.0)
    assert confidence_weights(sure, threshold=0.9, old=OLD) == 0
    assert confidence_weights(sure, threshold=0.9) == 1


def test_a_threshold_of_zero_is_lwf_and_no_old_class_is_no_confidence():
    teacher = normal(1, 8, C)
    assert confidence_weights(teacher, threshold=0.0, old=OLD).all()
    none = np.zeros(C, bool)
    assert not confidence_weights(teacher, threshold=0.1, old=none).any()
    assert confidence_weights(teacher, threshold=0.0, old=none).all()


def test_the_filtered_mean_is_over_what_is_kept():
    z, teacher = normal(0, 8, C), normal(1, 8, C) * 2

    def filtered(z, threshold):
        w = confidence_weights(teacher, threshold=threshold, old=OLD)
        losses = lwf_loss(z, teacher, old=OLD)
        return jnp.sum(w * losses) / jnp.maximum(jnp.sum(w), 1), jnp.mean(w * losses)

    kept = softmax(teacher, 1.0, OLD).max(-1) >= 0.7
    assert 0 < kept.sum() < 8
    right, wrong = filtered(z, 0.7)
    alone = lwf_loss(z[kept], teacher[kept], old=OLD).mean()
    np.testing.assert_allclose(right, alone, rtol=1e-6)
    assert abs(wrong - alone) > 0.1 * alone  # a mean over all weakens the loss
    # Nothing kept: zero, with a zero gradient.
    none, grad = jax.value_and_grad(lambda z: filtered(z, 1.0)[0])(z)
    assert none == 0 and (np.asarray(grad) == 0).all()


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"`teacher_logits` .*\(4, 5\); got \(4, 3\)", {"t": (4, 3)}),
        (ValueError, r"`teacher_logits` .*got \(5,\).*broadcast", {"t": (5,)}),
        (ValueError, r"`logits` .*\[..., C\].*got shape \(\)", {"z": (), "t": ()}),
        (ValueError, r"`logits` .*at least one class.*\(4, 0\)", {"z": (4, 0)}),
        (ValueError, r"`temperature` .*got 0", {"temperature": 0}),
        (ValueError, r"`temperature` .*got inf", {"temperature": np.inf}),
        (TypeError, r"`temperature` must be a number", {"temperature": "2"}),
        (TypeError, r"`old` .*boolean mask of the 5.*got int32", {"old": [0, 2]}),
        (TypeError, r"`old` .*got float32.*astype\(bool\)", {"old": np.ones(5, "f")}),
        (ValueError, r"`old` .*\(5,\).*got \(4,\)", {"old": np.ones(4, bool)}),
        (ValueError, r"`old` .*got \(4, 1\)", {"old": np.ones((4, 1), bool)}),
        (ValueError, r"`old` .*got \(3, 5\)", {"old": np.ones((3, 5), bool)}),
        # Five sequences of five tokens: which axis would this be along?
        (ValueError, r"got \(5, 5\)", {"z": (5, 5, 5), "old": np.ones((5, 5), bool)}),
    ],
)
def test_bad_input_is_named(error, message, arguments):
    z = jnp.zeros(arguments.pop("z", (4, C)))
    teacher = jnp.zeros(arguments.pop("t", z.shape))
    with pytest.raises(error, match=message):
        lwf_loss(z, teacher, **arguments)


def test_logits_that_are_not_real_numbers_are_refused():
    z = jnp.zeros((4, C))
    for wrong, came in ((None, "NoneType"), ((z, z[0]), "tuple")):
        with pytest.raises(TypeError, match=f"`logits` must be.*; got {came}.*alone"):
            lwf_loss(wrong, z)
        with pytest.raises(TypeError, match=f"`teacher_logits` must be.*; got {came}"):
            lwf_loss(z, wrong)
    for wrong in (z.astype(jnp.int32), z.astype(jnp.complex64)):
        with pytest.raises(TypeError, match="`logits` must be real floating"):
            lwf_loss(wrong, z)
        with pytest.raises(TypeError, match="`teacher_logits` must be real floating"):
            lwf_loss(z, wrong)
        with pytest.raises(TypeError, match="`teacher_logits` must be real floating"):
            confidence_weights(wrong, threshold=0.5)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, np.nan])
def test_a_threshold_outside_zero_to_one_is_refused(threshold):
    with pytest.raises(ValueError, match=r"`threshold` .*\[0, 1\]"):
        confidence_weights(jnp.zeros((4, C)), threshold=threshold)
