import jax
import numpy as np
import pytest

from optax_cl import lora
from tests.arrays import distance, normal, orthonormal
from tests.lora.helpers import PATH, chosen
from tests.lora.stiefel_points import orthonormality

# Compiled as one function: quicker than its operations one by one.
eblora_init = jax.jit(lora.eblora_init)


def product(adapter):
    s, u, v = map(np.float64, adapter)
    return s * v @ u.T


def test_the_start_and_the_first_move_of_its_magnitude_descend():
    targets = chosen(12, 10)
    kernel, wanted = np.asarray(normal(1, 12, 10)), np.asarray(normal(2, 12, 10))
    loss = lambda w: np.sum((w - wanted) ** 2) / 2  # noqa: E731
    adapter = lora.eblora_init(targets, {PATH: kernel - wanted}, magnitude=1e-2)[PATH]
    assert float(adapter.s) < 0
    here = loss(kernel + product(adapter))
    assert here < loss(kernel)
    assert loss(kernel + 1.1 * product(adapter)) < here
    # To first order by the sum of the leading singular values.
    values = np.linalg.svd(np.float64(kernel - wanted), compute_uv=False)
    np.testing.assert_allclose(
        here - loss(kernel), -1e-2 * values[:2].sum() + 1e-4, rtol=1e-3
    )


def test_a_negative_magnitude_means_its_absolute_value():
    targets = chosen(12, 10)
    gradients = {PATH: normal(1, 12, 10)}
    one = lora.eblora_init(targets, gradients, magnitude=0.3)
    other = lora.eblora_init(targets, gradients, magnitude=-0.3)
    assert distance(one, other) == 0 and float(one[PATH].s) < 0


def test_starts_are_the_leading_directions_off_the_memory():
    targets = chosen(12, 10)
    # Two columns of it are not taken yet.
    memory = np.concatenate([orthonormal(5, 12, 4), np.zeros((12, 2))], axis=1)
    memory = np.float32(memory)
    gradient = normal(1, 12, 10)
    adapter = eblora_init(targets, {PATH: gradient}, {PATH: memory})[PATH]
    m, g = np.asarray(memory, np.float64), np.asarray(gradient, np.float64)
    left, _, right = np.linalg.svd(g - m @ (m.T @ g))
    expected = -0.02 * left[:, :2] @ right[:2]
    np.testing.assert_allclose(product(adapter), expected, atol=1e-6)
    assert np.abs(m.T @ np.asarray(adapter.v, np.float64)).max() < 1e-6


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_directions_are_filled_in_off_the_memory(rank):
    targets = chosen(12, 10, 3)
    memory = orthonormal(5, 12, 9)
    # Nothing of it is off the memory, or one direction.
    inside = np.asarray(memory)[:, :1]
    gradient = np.tile(normal(1, 12, 1) if rank else inside, (1, 10))
    adapter = eblora_init(targets, {PATH: gradient}, {PATH: memory})[PATH]
    assert orthonormality(adapter.u) < 5e-6
    assert orthonormality(adapter.v) < 5e-6
    assert np.abs(np.asarray(memory).T @ np.asarray(adapter.v)).max() < 2e-6


@pytest.mark.parametrize(
    ("value", "match"), [(np.nan, "not finite"), (0.0, "has no directions")]
)
def test_useless_gradients_raise_outside_jit_and_fill_in_inside(value, match):
    targets = chosen(12, 10)
    bad = {PATH: np.full((12, 10), value, np.float32)}
    with pytest.raises(ValueError, match=match) as error:
        lora.eblora_init(targets, bad)
    assert match in str(error.value) and PATH in str(error.value)
    assert orthonormality(eblora_init(targets, bad)[PATH].v) < 5e-6


def test_magnitudes_follow_the_depth():
    params = {
        f"layers/{i}": {"kernel": np.zeros((4, 3)), "gate_kernel": np.zeros((4, 3))}
        for i in (2, 4, 10)
    }
    several = lora.targets(params, {"kernel": 1}, alpha=1.0)
    ones = {path: np.ones((4, 3), np.float32) for path in several}
    start = lora.eblora_init(several, ones, magnitude=(0.002, 0.010))
    found = {path: round(-float(a.s), 6) for path, a in start.items()}
    assert found == {
        f"layers/{i}/{name}": s
        for i, s in ((2, 0.002), (4, 0.004), (10, 0.010))
        for name in ("kernel", "gate_kernel")
    }
    stack = chosen(4, 3, 1, stack=(3,))
    start = lora.eblora_init(
        stack, {PATH: np.ones((3, 4, 3), np.float32)}, magnitude=(0.0, 0.4)
    )
    np.testing.assert_allclose(-np.asarray(start[PATH].s), [0.0, 0.2, 0.4], atol=1e-7)
    one = chosen(4, 3, 1)
    start = lora.eblora_init(
        one, {PATH: np.ones((4, 3), np.float32)}, magnitude=(0.1, 0.4)
    )
    np.testing.assert_allclose(-np.asarray(start[PATH].s), 0.1, atol=1e-7)


def test_errors_of_starts_name_what_does_not_fit():
    targets = chosen(12, 10)
    ones = {PATH: np.ones((12, 10))}
    with pytest.raises(ValueError, match=r"layer/kernel.*nothing"):
        lora.eblora_init(targets, {})
    with pytest.raises(ValueError, match="expected shape"):
        lora.eblora_init(targets, {PATH: np.ones((10, 12))})
    with pytest.raises(ValueError, match="leaves no room"):
        lora.eblora_init(targets, ones, {PATH: np.zeros((12, 11))})
    params = {"a": np.zeros((12, 10)), "b": np.zeros((12, 10))}
    two = lora.targets(params, {"a|b": 2}, alpha=1.0)
    with pytest.raises(ValueError, match="no whole number"):
        lora.eblora_init(two, {k: ones[PATH] for k in two}, magnitude=(0.1, 0.2))
