"""Gradients of a batch, and coefficients and curvature in a changing basis."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl._core import linalg, subspaces, tasks
from tests.arrays import normal, orthonormal

VIEWS = optax_cl.matrix_views(skip="free")
HOLE = optax.MaskedNode()


def test_only_matrices_have_coefficients():
    ones = np.ones((4, 3), np.float32)
    tree = {"w": normal(0, 4, 3), "b": ones[0], "free": ones}
    basis = {"w": orthonormal(0, 4, 2), "b": HOLE, "free": HOLE}
    found = subspaces.coefficients(VIEWS, basis, tree)
    expected = np.asarray(basis["w"]).T @ np.asarray(tree["w"])
    np.testing.assert_allclose(found["w"], expected, rtol=1e-5)
    assert found["b"] == found["free"] == HOLE
    masked = subspaces.coefficients(VIEWS, basis, {**tree, "w": HOLE})
    assert masked["w"] == HOLE


def test_curvature_turns_by_squared_cosines():
    old, new = orthonormal(0, 5, 2), orthonormal(1, 5, 2)
    curvature, task = np.abs(normal(0, 2, 2, 3))
    found = subspaces.rotate_curvature(old, new, curvature, task)
    c, f = np.asarray(new, np.float64), np.asarray(old, np.float64)
    expected = (c.T @ f) ** 2 @ np.asarray(curvature) + np.asarray(task)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_turning_within_a_span_keeps_an_even_curvature():
    old, turn = np.asarray(orthonormal(0, 5, 2)), np.asarray(orthonormal(1, 2, 2))
    new, even = old @ turn, np.full((2, 3), 0.7, np.float32)
    found = subspaces.rotate_curvature(old, new, even, 0 * even)
    np.testing.assert_allclose(found, 0.7, rtol=1e-5)
    flipped = subspaces.rotate_curvature(old, -old, normal(0, 2, 3), 0 * even)
    np.testing.assert_allclose(flipped, normal(0, 2, 3), rtol=1e-4, atol=1e-6)


# The gradient of a batch, padding and items


def logits(w, x):
    return x @ w


def data(x, w, weights, task):
    return tasks.PassInput(
        state=None,
        params=w,
        batch=x,
        weights=weights,
        key=jax.random.key(0),
        task=task,
        earlier={},
    )


@pytest.mark.parametrize("items", [1, 3])
@pytest.mark.parametrize("labels", ["sampled", "empirical"])
def test_padding_does_not_enter_and_items_are_counted(items, labels):
    middle = () if items == 1 else (items,)
    task = optax_cl.classification(logits, lambda x: jnp.zeros(x.shape[:-1], jnp.int32))
    # The same label in every draw, so that both modes have one oracle.
    task = task._replace(
        sample_label=lambda out, key: jnp.zeros(out.shape[:-1], jnp.int32)
    )
    x, w = normal(0, 4, *middle, 5), normal(1, 5, 3)
    weights = np.float32([1.0, 1.0, 1.0, 0.0])
    gradient, count = jax.jit(
        lambda *arrays: subspaces.batch_gradient(data(*arrays, task), labels)
    )(x, w, weights)
    flat = np.asarray(x, np.float64)[:3].reshape(-1, 5)
    z = flat @ np.asarray(w, np.float64)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    expected = flat.T @ (p - np.eye(3)[0]) / len(flat)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert count == (3 * items if labels == "sampled" else 3)


def test_passes_are_the_same_object_for_the_same_settings():
    # Compilation is keyed by them.
    again = optax_cl.matrix_views(skip="free")
    a = subspaces.basis_pass(VIEWS, "gradients", "all", "exact", "sampled")
    assert a is subspaces.basis_pass(again, "gradients", "all", "exact", "sampled")
    assert subspaces.curvature_pass(VIEWS, "sampled") is subspaces.curvature_pass(
        again, "sampled"
    )


@pytest.mark.parametrize(("fan_in", "rank"), [(8, 1), (8, 8), (16, 8), (24, 8)])
def test_every_gram_of_low_rank_has_a_sketch(fan_in, rank):
    # With a plain normal draw as wide as the matrix, more than half of these have no
    # Cholesky factor, and the basis is NaN.
    sketch_matrix = jax.jit(subspaces.sketch_matrix)
    omega = np.asarray(sketch_matrix(np.zeros((fan_in, rank), np.float32)))
    gram = omega.T @ omega
    np.testing.assert_allclose(gram, np.eye(omega.shape[1]), atol=1e-5)

    @jax.jit
    @jax.vmap
    def error(g):
        total = linalg.gram(g) / jnp.sum(g**2)
        factor = linalg.nystrom_factor(total @ omega, omega)
        return jnp.abs(linalg.gram(factor) - total).max()

    for directions in (1, 3, 6):
        grads = np.random.default_rng(directions).normal(size=(100, fan_in, directions))
        # Columns of zeros add nothing to a Gram; one shape is one compilation.
        grads = np.pad(np.float32(grads), [(0, 0), (0, 0), (0, 6 - directions)])
        assert np.max(error(grads)) < 1e-5


def test_stacked_matrices_are_sketched_alike():
    one = jax.jit(subspaces.sketch_matrix)(np.zeros((3, 9, 2), np.float32))
    assert one.shape == (3, 9, 9)
    one = np.asarray(one)
    np.testing.assert_allclose(
        one.mT @ one, np.broadcast_to(np.eye(9), (3, 9, 9)), atol=1e-5
    )
