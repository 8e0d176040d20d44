"""The start of a frozen input side: the strongest new directions off the memory."""

import jax
import numpy as np
import pytest

import optax_cl
from optax_cl import lora

RNG = np.random.default_rng(0)
IN, OUT, R = 10, 6, 2
PARAMS = {"kernel": np.zeros((IN, OUT), np.float32)}
TARGETS = lora.targets(PARAMS, {"kernel": R}, alpha=2.0 * R)
# Compiled as one function: quicker than its operations one by one.
frozen_a_init = jax.jit(lora.frozen_a_init)


def draw(*shape):
    return np.float32(RNG.normal(size=shape))


def orthonormal(p, d=IN):
    return np.float32(np.linalg.qr(RNG.normal(size=(d, p)))[0])


def strongest_off(memory, f, r=R):
    """Oracle: the leading left singular vectors of (I - M M^T) F, in 64 bits."""
    m, f = np.float64(memory), np.float64(f)
    return np.linalg.svd(f - m @ (m.T @ f))[0][:, :r]


def assert_same_columns_up_to_signs(found, expected, atol=1e-5):
    found = np.asarray(found)
    signs = np.sign(np.sum(found * expected, axis=0))
    np.testing.assert_allclose(found * signs, expected, atol=atol)


def test_the_start_reads_the_strongest_gradient_directions_off_the_memory():
    memory, gradient = orthonormal(3), draw(IN, OUT)
    adapters = frozen_a_init(TARGETS, {"kernel": gradient}, {"kernel": memory})
    a, b = map(np.asarray, adapters["kernel"])
    assert_same_columns_up_to_signs(a, strongest_off(memory, gradient))
    np.testing.assert_allclose(a.T @ a, np.eye(R), atol=1e-6)
    np.testing.assert_allclose(memory.T @ a, 0, atol=1e-6)
    assert b.shape == (R, OUT)
    assert not b.any()


def test_the_start_from_input_covariances_is_that_of_inflora():
    memory = orthonormal(3)
    batches = [{"x": draw(8, IN)}, {"x": draw(5, IN)}]
    covariances = lora.input_covariances(
        TARGETS, lambda params, batch: {"kernel": batch["x"]}, PARAMS, batches
    )
    x = np.concatenate([np.float64(b["x"]) for b in batches])
    np.testing.assert_allclose(covariances["kernel"], x.T @ x / 13, rtol=1e-4)
    adapters = frozen_a_init(TARGETS, covariances, {"kernel": memory}, scale=3**-0.5)
    expected = strongest_off(memory, x.T @ x) / np.sqrt(3)
    assert_same_columns_up_to_signs(adapters["kernel"].a, expected, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("rank", [0, 1])
def test_missing_directions_are_filled_up_off_the_memory(rank, scale):
    memory = orthonormal(7)
    # All but `rank` directions of it are protected.
    gradient = np.float32(scale) * (draw(IN, rank) @ draw(rank, OUT))
    gradient += np.float32(scale) * (memory @ draw(7, OUT))
    adapters = frozen_a_init(TARGETS, {"kernel": gradient}, {"kernel": memory})
    a = np.asarray(adapters["kernel"].a)
    np.testing.assert_allclose(a.T @ a, np.eye(R), atol=1e-6)
    np.testing.assert_allclose(memory.T @ a, 0, atol=1e-6)
    if rank:
        expected = strongest_off(memory, gradient / scale, 1)
        assert_same_columns_up_to_signs(a[:, :1], expected, atol=1e-4)


def test_a_gradient_inside_the_memory_starts_elsewhere():
    memory = orthonormal(4)
    gradient = memory @ draw(4, OUT)
    adapters = frozen_a_init(TARGETS, {"kernel": gradient}, {"kernel": memory})
    a = np.asarray(adapters["kernel"].a)
    np.testing.assert_allclose(a.T @ a, np.eye(R), atol=1e-6)
    np.testing.assert_allclose(memory.T @ a, 0, atol=1e-6)


def test_stacked_layers_start_one_by_one():
    params = {"layers": {"kernel": np.zeros((3, IN, OUT), np.float32)}}
    views = optax_cl.matrix_views(stacked="layers")
    targets = lora.targets(params, {"kernel": R}, alpha=1.0, matrices=views)
    memory = np.stack([orthonormal(2) for _ in range(3)])
    gradient = draw(3, IN, OUT)
    gradient[1] = memory[1] @ draw(2, OUT)
    adapters = frozen_a_init(
        targets, {"layers/kernel": gradient}, {"layers/kernel": memory}
    )
    a, b = map(np.asarray, adapters["layers/kernel"])
    assert b.shape == (3, R, OUT)
    for i in (0, 2):
        assert_same_columns_up_to_signs(a[i], strongest_off(memory[i], gradient[i]))
    np.testing.assert_allclose(memory.mT @ a, 0, atol=1e-6)


def test_what_the_start_can_not_use_is_named():
    good, memory = {"kernel": draw(IN, OUT)}, {"kernel": orthonormal(2)}
    broken = {"kernel": good["kernel"].copy()}
    broken["kernel"][0, 0] = np.nan
    with pytest.raises(ValueError, match="at `kernel` `matrices` is not finite"):
        lora.frozen_a_init(TARGETS, broken)
    a = np.asarray(frozen_a_init(TARGETS, broken, memory)["kernel"].a)
    np.testing.assert_allclose(a.T @ a, np.eye(R), atol=1e-6)
    with pytest.raises(ValueError, match="none for `kernel`"):
        lora.frozen_a_init(TARGETS, {})
    with pytest.raises(ValueError, match=r"`matrices`.*shape \(4, 4\)"):
        lora.frozen_a_init(TARGETS, {"kernel": np.eye(4, dtype=np.float32)})
    with pytest.raises(ValueError, match=r"`memory`.*shape \(4, 4\)"):
        lora.frozen_a_init(TARGETS, good, {"kernel": np.eye(4, dtype=np.float32)})
    with pytest.raises(ValueError, match=r"holds 9 of the 10.*no 2 left"):
        lora.frozen_a_init(TARGETS, good, {"kernel": orthonormal(9)})


def test_a_start_from_nothing_is_named_outside_jit_and_orthonormal_inside():
    nothing = {"kernel": np.zeros((IN, OUT), np.float32)}
    with pytest.raises(ValueError, match="at `kernel` `matrices` holds zero"):
        lora.frozen_a_init(TARGETS, nothing)
    a = np.asarray(frozen_a_init(TARGETS, nothing)["kernel"].a)
    np.testing.assert_allclose(a.T @ a, np.eye(R), atol=1e-5)
