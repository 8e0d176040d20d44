"""Bases against float64 oracles, and their behaviour where there is nothing to find."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl._core import linalg
from tests.arrays import normal, orthonormal

# Compiled as one function: quicker than their operations one by one.
merge_gram, merge_factor = jax.jit(linalg.merge_gram), jax.jit(linalg.merge_factor)
nystrom_factor, keep_energy = (
    jax.jit(linalg.nystrom_factor),
    jax.jit(linalg.keep_energy),
)


def psd(seed, n, spectrum):
    q = np.asarray(orthonormal(seed, n, n), np.float64)[:, : len(spectrum)]
    return (q * np.asarray(spectrum)) @ q.T


def projector(u):
    u = np.asarray(u, np.float64)
    return u @ np.swapaxes(u, -1, -2)


def leading(matrix, r):
    values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
    return vectors[:, ::-1][:, :r], values[::-1][:r]


def test_products_against_numpy_with_a_batch_axis():
    u, g = normal(0, 3, 8, 2), normal(1, 3, 8, 5)
    c = linalg.coefficients(u, g)
    np.testing.assert_allclose(c, np.einsum("bir,bio->bro", u, g), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        linalg.lift(u, c), np.einsum("bir,bro->bio", u, c), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        linalg.gram(g), np.einsum("bio,bjo->bij", g, g), rtol=1e-5, atol=1e-5
    )


def test_coefficients_of_bfloat16_are_float32():
    assert (
        linalg.coefficients(normal(0, 4, 2), normal(1, 4, 3).astype(jnp.bfloat16)).dtype
        == jnp.float32
    )


def test_merged_gram_against_float64_eigenvectors():
    old, new = psd(0, 8, [1.0, 0.5, 0.2]), psd(1, 8, [0.8, 0.4, 0.1])
    u, e = leading(old, 3)
    basis, energy = merge_gram(*map(np.float32, (u, e, new)))
    expected, values = leading(u * e @ u.T + new, 3)
    np.testing.assert_allclose(projector(basis), projector(expected), atol=1e-5)
    np.testing.assert_allclose(energy, values, rtol=1e-5)


def test_merged_factor_is_the_merged_gram():
    u, e = orthonormal(0, 8, 3), np.float32([1.0, 0.5, 0.2])
    factor = np.asarray(normal(1, 8, 4))
    a = merge_factor(u, e, factor)
    b = merge_gram(u, e, factor @ factor.T)
    np.testing.assert_allclose(projector(a[0]), projector(b[0]), atol=1e-5)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-5)


def test_columns_without_energy_are_zero_and_the_others_orthonormal():
    basis, energy = merge_gram(
        np.zeros((8, 4), np.float32),
        np.zeros(4, np.float32),
        np.float32(psd(0, 8, [3.0, 1.0])),
    )
    basis, energy = np.asarray(basis), np.asarray(energy)
    np.testing.assert_allclose(basis.T @ basis, np.diag([1.0, 1, 0, 0]), atol=1e-6)
    np.testing.assert_array_equal(energy[2:], 0.0)


@pytest.mark.parametrize("merge", [merge_gram, merge_factor])
def test_nothing_stored_and_nothing_new_gives_an_empty_basis(merge):
    empty = np.zeros((4, 4), np.float32)
    basis, energy = merge(empty[:, :2], empty[0, :2], empty)
    np.testing.assert_array_equal(basis, 0.0)
    np.testing.assert_array_equal(energy, 0.0)


def sketched(matrix, width, seed=7):
    n = matrix.shape[-1]
    test = orthonormal(seed, n, width)
    return nystrom_factor(np.float32(matrix @ np.asarray(test)), test)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("width", [6, 16])
def test_nystrom_factor_is_exact_for_low_rank(rank, width):
    a = psd(0, 16, [1.0, 0.3, 0.1][:rank])
    f = np.asarray(sketched(a, width), np.float64)
    np.testing.assert_allclose(f @ f.T, a, atol=2e-5)


def test_nystrom_factor_is_close_on_a_decaying_spectrum():
    a = psd(0, 32, 0.5 ** np.arange(32))
    f = np.asarray(sketched(a, 12), np.float64)
    # Twelve columns leave 2^-12 at best; a sketch comes within the tail beyond six.
    assert np.linalg.norm(f @ f.T - a, 2) < 2.0**-5


def test_nystrom_factor_of_zero_is_zero():
    np.testing.assert_array_equal(sketched(np.zeros((8, 8)), 4), 0.0)


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [(1.0, 4), (0.99, 4), (0.9, 3), (0.7, 2), (0.5, 1), (0.01, 1)],
)
def test_threshold_keeps_the_fewest_columns_that_reach_it(threshold, kept):
    energy, eye = np.float32([0.5, 0.25, 0.15, 0.1]), np.eye(4, dtype=np.float32)
    basis, e = keep_energy(eye, energy, np.float32(1.0), threshold)
    assert (np.asarray(e) > 0).sum() == kept
    assert np.any(np.asarray(basis) != 0, axis=0).sum() == kept


def test_threshold_counts_the_energy_that_no_column_holds():
    # Two columns hold .6 of a total of 1: both are kept to come as near .7 as they can.
    eye, energy = np.eye(2, dtype=np.float32), np.float32([0.4, 0.2])
    _, e = keep_energy(eye, energy, np.float32(1.0), 0.7)
    assert (np.asarray(e) > 0).sum() == 2


def test_stacked_bases_are_the_single_ones():
    grams = np.float32([psd(s, 6, [1.0, 0.5, 0.2]) for s in (0, 1)])
    zero = np.zeros((2, 6, 2), np.float32), np.zeros((2, 2), np.float32)
    basis, energy = map(np.asarray, merge_gram(*zero, grams))
    for i in range(2):
        single, e = merge_gram(zero[0][i], zero[1][i], grams[i])
        np.testing.assert_allclose(projector(basis[i]), projector(single), atol=1e-6)
        np.testing.assert_allclose(energy[i], e, rtol=1e-6)


def test_projection_is_done_in_full_matrix_precision():
    # Reduced precision would leave a thousandth of what it should remove; ask the
    # program, since the CPU computes in full precision whatever it is told.
    text = (
        jax.jit(linalg.coefficients)
        .lower(jnp.zeros((8, 2)), jnp.zeros((8, 3)))
        .as_text()
    )
    assert "HIGHEST" in text


def test_a_threshold_of_zero_keeps_no_column_in_a_fused_program():
    """Energies squared in the same loop: their running sum must not lose to them."""

    @jax.jit
    def kept(singular):
        energy = singular**2
        total = jnp.sum(energy, axis=-1)
        basis = jnp.eye(8)
        return linalg.keep_energy(basis, energy, total, jnp.float32(0.0))[1]

    for seed in range(20):
        singular = jax.random.uniform(jax.random.key(seed), (8,))
        assert not kept(singular).any()


def test_rows_are_dropped_and_columns_that_were_mostly_there_go():
    basis = np.zeros((2, 4, 3), np.float32)
    basis[0] = np.eye(4, 3)
    basis[1] = [[1, 0, 0], [0, 0.8, 0.2], [0, 0.6, 0], [0, 0, 0.98]]
    alive = np.array([[True] * 4, [True, True, False, False]])
    found = linalg.drop_rows(basis, alive)
    np.testing.assert_array_equal(found[0], basis[0])  # bit for bit
    expected = np.zeros((4, 3))
    expected[0, 0] = expected[1, 1] = 1.0
    np.testing.assert_allclose(found[1], expected, atol=1e-6)
