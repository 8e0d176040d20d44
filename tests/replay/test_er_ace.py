"""ER-ACE's loss against NumPy, its invariants, the wrong forms, faults, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cl.replay import classes_in, er_ace_loss
from tests.arrays import normal

C = 6
LABELS = np.array([4, 2, 2, 4])
PRESENT = np.isin(np.arange(C), [2, 4])
SEEN = np.isin(np.arange(C), [0, 2, 4])


def oracle(z, labels, kept):
    """Losses, and the gradient of their sum, row by row in float64."""
    z, kept = np.float64(z), np.broadcast_to(kept, z.shape)
    losses, grad = np.zeros(labels.shape), np.zeros(z.shape)
    for row in np.ndindex(labels.shape):
        classes = sorted({*np.flatnonzero(kept[row]), labels[row]})
        exponentials = np.exp(z[row][classes] - z[row][classes].max())
        p = exponentials / exponentials.sum()
        losses[row] = -np.log(p[classes.index(labels[row])])
        grad[row][classes] = p
        grad[(*row, labels[row])] -= 1
    return losses, grad


def value_and_grad(logits, labels, **kwargs):
    def total(z, labels):
        losses = er_ace_loss(z, labels, **kwargs)
        return losses.sum(), losses

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, losses), grad = run(logits, labels)
    return np.asarray(losses), np.asarray(grad)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("own_masks", [False, True])
def test_value_and_gradient_are_those_of_the_formula(x64, shape, own_masks):
    rng = np.random.default_rng(0)
    z = normal(0, *shape, C, dtype=np.float64) * 3
    labels = rng.integers(0, C, shape)
    present = rng.random((*shape, C) if own_masks else C) < 0.5
    losses, grad = value_and_grad(z, labels, present=present)
    expected = oracle(z, labels, present)
    assert losses.shape == shape
    np.testing.assert_allclose(losses, expected[0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(grad, expected[1], atol=1e-14)


def test_with_all_classes_present_it_is_cross_entropy():
    z = normal(0, 4, C)
    losses, grad = value_and_grad(z, LABELS, present=np.ones(C, bool))

    def plain(z):
        losses = optax.softmax_cross_entropy_with_integer_labels(z, jnp.asarray(LABELS))
        return losses.sum(), losses

    (_, expected), slope = jax.jit(jax.value_and_grad(plain, has_aux=True))(z)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, slope, atol=1e-7)


def test_absent_classes_are_not_pushed_down_as_cross_entropy_would():
    z = normal(0, 4, C)
    _, grad = value_and_grad(z, LABELS, present=PRESENT)
    _, pushed = value_and_grad(z, LABELS, present=np.ones(C, bool))
    assert (grad[:, ~PRESENT] == 0).all()
    assert (pushed[:, ~PRESENT] > 0).all()
    assert (np.abs(grad[:, PRESENT]) > 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
def test_what_masked_logits_hold_changes_nothing(value):
    z = normal(0, 4, C)
    clean = value_and_grad(z, LABELS, present=PRESENT)
    odd = value_and_grad(
        z + jnp.where(PRESENT[None], 0, value), LABELS, present=PRESENT
    )
    for a, b in zip(clean, odd, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (odd[1][:, ~PRESENT] == 0).all()


@pytest.mark.parametrize("present", [[2], []])
def test_a_class_by_itself_has_no_loss_and_no_gradient(present):
    # With none masked in, the example's own class is what is left.
    labels = np.array([2, 2])
    mask = np.isin(np.arange(C), present)
    losses, grad = value_and_grad(normal(0, 2, C) * 100, labels, present=mask)
    assert (losses == 0).all() and (grad == 0).all()


def test_kept_unseen_classes_are_a_set_not_those_above_the_largest_label():
    z = normal(0, 4, C)
    losses, grad = value_and_grad(z, LABELS, present=PRESENT, seen=SEEN, unseen="keep")
    expected = oracle(z, LABELS, PRESENT | ~SEEN)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-6)
    np.testing.assert_allclose(grad, expected[1], atol=1e-7)
    assert (grad[:, 0] == 0).all()  # seen and absent
    # By number, classes 1 and 3 would be taken for old ones, and masked.
    assert (grad[:, [1, 3, 5]] > 0).all()
    by_number = PRESENT | (np.arange(C) >= 4)
    assert not np.allclose(losses, oracle(z, LABELS, by_number)[0])


def test_masking_unseen_classes_does_not_ask_what_was_seen():
    z = normal(0, 4, C)
    with_seen = er_ace_loss(z, LABELS, present=PRESENT, seen=SEEN, unseen="mask")
    without = er_ace_loss(z, LABELS, present=PRESENT)
    np.testing.assert_array_equal(with_seen, without)


def test_masks_may_be_traced_and_mapped_over():
    z = normal(0, 3, 4, C)
    labels = jnp.array([[0, 1, 1, 0], [2, 2, 2, 2], [5, 0, 3, 3]])

    @jax.jit
    def losses(z, labels):
        present = jax.vmap(functools.partial(classes_in, num_classes=C))(labels)
        return jax.vmap(lambda *a: er_ace_loss(a[0], a[1], present=a[2]))(
            z, labels, present
        )

    for i in range(3):
        kept = np.isin(np.arange(C), labels[i])
        expected = oracle(z[i], np.asarray(labels[i]), kept)[0]
        np.testing.assert_allclose(losses(z, labels)[i], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    z = (10 * normal(0, 4, C)).astype(dtype)
    losses, grad = value_and_grad(z, LABELS, present=PRESENT)
    wide, _ = value_and_grad(z.astype(jnp.float32), LABELS, present=PRESENT)
    assert losses.dtype == jnp.float32 and grad.dtype == dtype
    np.testing.assert_array_equal(losses, wide)


def test_huge_and_infinite_logits_have_a_defined_loss_and_gradient():
    some = [np.inf, -np.inf, 3e38, -3e38, 0.0, 1.0]
    z = jnp.array([np.roll(some, i) for i in range(C)], jnp.float32)
    labels = np.zeros(C, np.int32)
    for present in (np.ones(C, bool), PRESENT):
        losses, grad = value_and_grad(z, labels, present=present)
        assert not np.isnan(losses).any() and (losses >= 0).all()
        assert not np.isnan(grad).any()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_labels_of_eight_bits_are_told_from_those_of_256_more(dtype):
    z, labels = normal(0, 2, 300), np.array([3, 44])
    present = np.isin(np.arange(300), labels)
    small = labels.astype(dtype)
    np.testing.assert_array_equal(classes_in(small, 300), present)
    losses, grad = value_and_grad(z, small, present=present)
    expected = oracle(z, labels, present)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-6)
    np.testing.assert_allclose(grad, expected[1], atol=1e-7)


def test_a_label_that_is_no_class_is_infinite_under_jit_and_spares_the_others():
    z = normal(0, 4, C)
    labels = np.array([4, -1, C, 2])
    losses, grad = value_and_grad(z, labels, present=PRESENT)
    np.testing.assert_array_equal(np.isinf(losses), [False, True, True, False])
    assert (grad[1:3] == 0).all()
    expected = oracle(z[::3], labels[::3], PRESENT)
    np.testing.assert_allclose(losses[::3], expected[0], rtol=1e-6)
    np.testing.assert_allclose(grad[::3], expected[1], atol=1e-7)


def test_a_label_that_is_no_class_is_named_where_it_is_known():
    z = normal(0, 4, C)
    for labels, came in (([0, -1, 2, 3], "-1 to 3"), ([0, 1, 6, 3], "0 to 6")):
        with pytest.raises(ValueError, match=f"`labels` .*0 to 5; got {came}.*weight"):
            er_ace_loss(z, np.array(labels), present=PRESENT)
        with pytest.raises(ValueError, match=f"`labels` .*0 to 5; got {came}"):
            classes_in(np.array(labels), C)


def test_an_empty_buffer_adds_nothing_with_its_weights():
    # Zeros with weight 0, before any class was seen.
    weights, labels = np.zeros(4, np.float32), np.zeros(4, np.int32)

    def term(z):
        losses = er_ace_loss(z, labels, present=np.zeros(C, bool))
        return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), 1)

    value, grad = jax.jit(jax.value_and_grad(term))(normal(0, 4, C))
    assert value == 0 and (np.asarray(grad) == 0).all()


def test_classes_in_are_those_that_occur_and_count():
    labels = np.array([[4, 2, 2], [0, 5, 4]])
    np.testing.assert_array_equal(
        classes_in(labels, C), np.isin(np.arange(C), [0, 2, 4, 5])
    )
    where = np.array([[True, False, False], [False, True, True]])
    found = jax.jit(lambda a, w: classes_in(a, C, w))(labels, where)
    np.testing.assert_array_equal(found, np.isin(np.arange(C), [4, 5]))
    assert not classes_in(np.zeros(0, np.int32), C).any()
    # Under jit a label that is no class is nothing; counted from the end, -1 were 5.
    odd = jax.jit(lambda a: classes_in(a, C))(np.array([-1, C, 1]))
    np.testing.assert_array_equal(odd, np.arange(C) == 1)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r'`unseen="keep"` needs `seen`.*got None', {"unseen": "keep"}),
        (ValueError, r"`unseen` must be one of 'mask', 'keep'", {"unseen": "both"}),
        (TypeError, r"`present` .*boolean mask of the 6.*got None", {"present": None}),
        (TypeError, r"`present` .*got int32", {"present": np.array([2, 4], "i4")}),
        (ValueError, r"`present` .*\(6,\).*got \(4,\)", {"present": PRESENT[:4]}),
        (TypeError, r"`seen` .*float32", {"seen": np.ones(C, "f"), "unseen": "keep"}),
        (TypeError, r"`labels` .*got dtype float32", {"labels": np.zeros(4, "f")}),
        (
            ValueError,
            r"`labels` .*\(4,\).*got shape \(4, 1\)",
            {"labels": LABELS[:, None]},
        ),
        (TypeError, r"`logits` .*got int32", {"logits": np.zeros((4, C), "i4")}),
        (TypeError, r"`logits` must be an array; got NoneType", {"logits": None}),
        (TypeError, r"`labels` must be an array; got NoneType", {"labels": None}),
    ],
)
def test_bad_input_is_named(error, message, arguments):
    given = {"logits": jnp.zeros((4, C)), "labels": LABELS, "present": PRESENT}
    with pytest.raises(error, match=message):
        er_ace_loss(**{**given, **arguments})


def test_bad_input_of_classes_in_is_named():
    with pytest.raises(TypeError, match=r"`labels` .*integers.*got float32"):
        classes_in(np.zeros(4, "f"), C)
    with pytest.raises(TypeError, match=r"`labels` must be an array; got dict"):
        classes_in({"y": LABELS}, C)
    with pytest.raises(TypeError, match=r"`num_classes` must be a Python integer"):
        classes_in(LABELS, jnp.int32(C))
    with pytest.raises(TypeError, match=r"`where` must be boolean; got float32"):
        classes_in(LABELS, C, np.ones(4, "f"))
    with pytest.raises(ValueError, match=r"`where` .*\(4,\); got \(3,\)"):
        classes_in(LABELS, C, np.ones(3, bool))
