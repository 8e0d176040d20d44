"""DER's loss against NumPy, its invariants, the wrong forms, faults, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl import replay
from optax_cl.replay import der_loss
from tests.arrays import normal

C = 5


def value_and_grad(logits, stored, **kwargs):
    def total(z):
        losses = der_loss(z, stored, **kwargs)
        return losses.sum(), losses

    (_, losses), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
    return np.asarray(losses), np.asarray(grad)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_gradient_are_those_of_the_formula(x64, shape, reduction):
    z, stored = (normal(s, *shape, C, dtype=np.float64) for s in (0, 1))
    losses, grad = value_and_grad(z, stored, reduction=reduction)
    gap = np.asarray(z) - np.asarray(stored)
    scale = C if reduction == "mean" else 1
    expected = np.linalg.norm(gap, axis=-1) ** 2 / scale
    assert losses.shape == shape
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    np.testing.assert_allclose(grad, 2 * gap / scale, rtol=1e-12)


def test_a_mean_over_classes_needs_their_number_times_the_strength_of_a_sum():
    z, stored = normal(0, 4, C), normal(1, 4, C)
    mean, total = der_loss(z, stored), der_loss(z, stored, reduction="sum")
    np.testing.assert_allclose(C * mean, total, rtol=1e-6)
    assert not np.allclose(mean, total)  # so that the two can't be mistaken


def test_at_the_stored_logits_loss_and_gradient_are_zero():
    z = normal(0, 4, C)
    losses, grad = value_and_grad(z, z)
    assert (losses == 0).all() and (grad == 0).all()


def test_a_constant_on_all_logits_counts_though_a_softmax_does_not_see_it():
    z = normal(0, 4, C)
    np.testing.assert_allclose(der_loss(z + 2.0, z), 4.0, rtol=1e-5)
    np.testing.assert_allclose(jax.nn.softmax(z + 2.0), jax.nn.softmax(z), rtol=1e-5)


def test_nothing_flows_to_the_stored_logits():
    z = normal(0, 4, C)
    grad = jax.grad(lambda s: der_loss(z, s).sum())(normal(1, 4, C))
    assert (np.asarray(grad) == 0).all()


def test_rows_may_be_mapped_over():
    z, stored = normal(0, 4, C), normal(1, 4, C)
    np.testing.assert_allclose(
        jax.vmap(der_loss)(z, stored), der_loss(z, stored), rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    # In half precision their difference is 0.
    z, stored = jnp.full((1, C), 256.0, dtype), jnp.full((1, C), 256.1, jnp.float32)
    losses, grad = value_and_grad(z, stored)
    np.testing.assert_allclose(losses, 0.01, rtol=1e-2)
    assert losses.dtype == jnp.float32 and grad.dtype == dtype
    # With both in half precision, the squares are too large for float16.
    losses, grad = value_and_grad(z, z + 512)
    np.testing.assert_array_equal(losses, 512.0**2)
    assert losses.dtype == jnp.float32 and grad.dtype == dtype


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_logits_may_be_stored_in_eight_bits(dtype):
    z, stored = normal(0, 4, C), normal(1, 4, C).astype(dtype)
    expected = der_loss(z, stored.astype(jnp.float32))
    np.testing.assert_array_equal(der_loss(z, stored), expected)


def test_infinite_logits_give_no_nan():
    some = np.array([np.inf, -np.inf, 3e38, -3e38, 0.0], np.float32)
    z, stored = (jnp.asarray(a.reshape(-1, 1)) for a in np.meshgrid(some, some))
    losses, grad = value_and_grad(z, stored)
    assert not np.isnan(losses).any() and not np.isnan(grad).any()
    assert (losses[np.asarray(z == stored)[:, 0]] == 0).all()


def test_an_empty_buffer_adds_nothing_with_its_weights():
    buffer = replay.reservoir_init(3, {"z": jnp.zeros(C)})
    items, weights = replay.reservoir_sample(buffer, jax.random.key(0), 4)

    def term(z):
        losses = der_loss(z, items["z"])
        return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), 1)

    value, grad = jax.value_and_grad(term)(normal(0, 4, C))
    assert value == 0 and (np.asarray(grad) == 0).all()


def test_bad_input_is_named():
    z = jnp.zeros((4, C))
    with pytest.raises(ValueError, match=r"`stored_logits` .*\(4, 5\); got \(4, 3\)"):
        der_loss(z, z[:, :3])
    # Broadcast, this would hold every example to one.
    with pytest.raises(ValueError, match=r"`stored_logits` .*got \(5,\)"):
        der_loss(z, z[0])
    with pytest.raises(ValueError, match=r"`reduction` must be one of 'mean', 'sum'"):
        der_loss(z, z, reduction="none")
    with pytest.raises(TypeError, match=r"`stored_logits` .*got int32"):
        der_loss(z, jnp.zeros((4, C), jnp.int32))
    with pytest.raises(TypeError, match=r"`logits` .*got complex64"):
        der_loss(z.astype(jnp.complex64), z)
