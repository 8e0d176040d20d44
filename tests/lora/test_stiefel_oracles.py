"""The geometry of orthonormal columns against float64 NumPy, SciPy and pymanopt.

Compiling is most of what such a test costs, so that every function is compiled once,
for one shape.
"""

import functools
import sys

import jax
import numpy as np
import pytest
import scipy.linalg

from optax_cl.lora import stiefel

pytestmark = pytest.mark.usefixtures("x64")

D, R, P = 9, 3, 2

# Runs little, so that code which is quick to make is quicker than quick code.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
tangent_project = jit(stiefel.tangent_project, static_argnames="metric")
riemannian_gradient = jit(stiefel.riemannian_gradient, static_argnames="metric")
transport = jit(stiefel.transport)
retract = jit(stiefel.retract, static_argnames="method")
polar = jit(stiefel.polar, static_argnames="method")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def point(seed, d=D, r=R, off=None):
    y = draw(seed, d, r)
    if off is not None:
        y = y - off @ (off.T @ y)
    return np.linalg.qr(y)[0]


def tangent_basis(x, memory):
    """Orthonormal basis of the tangent space, ``[d r, dim]``, from its definition."""
    d, r = x.shape
    units = np.eye(d * r).reshape(d * r, d, r)
    constraints = [(x.T @ z + z.T @ x).ravel() for z in units]
    if memory is not None:
        constraints = [
            np.concatenate([c, (memory.T @ z).ravel()])
            for c, z in zip(constraints, units, strict=True)
        ]
    return scipy.linalg.null_space(np.array(constraints).T)


@pytest.fixture(params=[False, True], ids=["free", "memory"])
def memory(request):
    return point(7, D, P) if request.param else None


def test_euclidean_projection_is_that_on_the_solutions_of_the_constraints(memory):
    x, z = point(0, off=memory), draw(1, D, R)
    basis = tangent_basis(x, memory)
    expected = (basis @ (basis.T @ z.ravel())).reshape(D, R)
    for function in (tangent_project, riemannian_gradient):
        np.testing.assert_allclose(function(x, z, memory=memory), expected, atol=1e-12)


def test_canonical_gradient_represents_the_derivative_in_its_metric(memory):
    x, g = point(0, off=memory), draw(1, D, R)
    basis = tangent_basis(x, memory)
    metric = np.kron(np.eye(D) - x @ x.T / 2, np.eye(R))
    solved = np.linalg.solve(basis.T @ metric @ basis, basis.T @ g.ravel())
    found = riemannian_gradient(x, g, metric="canonical", memory=memory)
    np.testing.assert_allclose(found, (basis @ solved).reshape(D, R), atol=1e-12)


@pytest.mark.parametrize("method", stiefel.POLARS)
@pytest.mark.parametrize("condition", [1.0, 5.0, 1e3, 1e6])
def test_polar_is_that_of_scipy_of_what_is_off_the_memory(method, condition):
    memory, v = point(7, D, P), point(1, R, R)
    u = point(0, off=memory)
    left = 3 * (u * np.logspace(0, -np.log10(condition), R)) @ v.T
    y = left + memory @ draw(2, P, R)
    found = polar(y, method=method, memory=memory)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found.T @ found, np.eye(R), atol=1e-14)
    np.testing.assert_allclose(memory.T @ found, 0, atol=1e-15)
    # A Gram matrix sees directions below the root of rounding only through its shift:
    # orthonormality stays exact, nearness ends at about that root.
    exact = method == "svd" or condition < 10
    tolerance = 1e-14 * condition * 10 if exact else 1e-6
    np.testing.assert_allclose(found, scipy.linalg.polar(left)[0], atol=tolerance)


@pytest.mark.parametrize("condition", [2.0, 1e5])
def test_qr_is_householders_with_a_positive_diagonal(condition):
    x = point(0)
    y = (point(1) * np.logspace(0, -np.log10(condition), R)) @ point(2, R, R)
    q, r = np.linalg.qr(y)
    found = retract(x, y - x, method="qr")
    np.testing.assert_allclose(
        found, q * np.sign(np.diagonal(r)), atol=1e-13 * condition
    )
    assert (np.diagonal(np.asarray(found).T @ y) > 0).all()


def generator(x, xi):
    """The skew d x d matrix W with ``W x = xi``."""
    half = xi - x @ (x.T @ xi) / 2
    return half @ x.T - x @ half.T


@pytest.mark.parametrize("size", [0.1, 1.0, 50.0])
def test_cayley_is_the_dense_transform(size):
    x = point(0)
    xi = size * np.asarray(tangent_project(x, draw(1, D, R)))
    w, eye = generator(x, xi), np.eye(D)
    np.testing.assert_allclose(w @ x, xi, atol=1e-12)
    expected = np.linalg.solve(eye - w / 2, (eye + w / 2) @ x)
    found = retract(x, xi, method="cayley")
    np.testing.assert_allclose(found, expected, atol=1e-11)


def test_cayley_follows_the_tangent_part_alone():
    x, z = point(0), draw(1, D, R)
    a = retract(x, z, method="cayley")
    b = retract(x, tangent_project(x, z), method="cayley")
    np.testing.assert_allclose(a, b, atol=1e-12)


def canonical_geodesic(x, xi):
    return scipy.linalg.expm(generator(x, xi)) @ x


def embedded_geodesic(x, xi):
    a, r = x.T @ xi, x.shape[1]
    block = np.block([[a, -xi.T @ xi], [np.eye(r), a]])
    both = np.hstack([x, xi]) @ scipy.linalg.expm(block)[:, :r]
    return both @ scipy.linalg.expm(-a)


def straight_line(x, xi):
    return x + xi


@pytest.mark.parametrize(
    ("method", "curve", "ratio"),
    [
        *((m, straight_line, 4) for m in stiefel.RETRACTIONS),
        ("polar", embedded_geodesic, 8),
        ("newton_schulz", embedded_geodesic, 8),
        ("polar", canonical_geodesic, 4),
        ("cayley", canonical_geodesic, 8),
        ("cayley", embedded_geodesic, 4),
        ("qr", canonical_geodesic, 4),
        ("qr", embedded_geodesic, 4),
    ],
)
def test_halving_the_step_divides_the_distance_to_a_curve(method, curve, ratio):
    x = point(0)
    xi = np.asarray(tangent_project(x, draw(1, D, R)))
    distances = [
        np.linalg.norm(retract(x, t * xi, method=method) - curve(x, t * xi))
        for t in (2e-3, 1e-3)
    ]
    assert distances[0] / distances[1] == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize(
    ("a", "b"), [("polar", "qr"), ("polar", "cayley"), ("qr", "cayley")]
)
def test_retractions_differ_in_second_order(a, b):
    x = point(0)
    xi = np.asarray(tangent_project(x, draw(1, D, R)))
    gaps = [
        np.linalg.norm(retract(x, t * xi, method=a) - retract(x, t * xi, method=b))
        for t in (2e-3, 1e-3)
    ]
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.02)


def test_random_points_have_the_moments_of_the_haar_measure():
    # E x x^T = (r / d) I and E x = 0, over the sphere-like orbit of any rotation.
    sample = jit(stiefel.random, static_argnums=1)
    x = np.asarray(sample(jax.random.key(0), (4000, 4, 2)))
    np.testing.assert_allclose(x.mean(0), 0, atol=0.03)
    second = np.einsum("nir,njr->ij", x, x) / len(x)
    np.testing.assert_allclose(second, np.eye(4) / 2, atol=0.03)


@pytest.fixture(scope="module")
def pymanopt():
    with pytest.MonkeyPatch.context() as patch:
        # It imports whatever it might differentiate with. That takes seconds, and
        # where it finds JAX it turns on 64 bits, for all tests that come after.
        for name in ("autograd", "jax", "tensorflow", "torch"):
            patch.setitem(sys.modules, name, None)
        return pytest.importorskip("pymanopt.manifolds").Stiefel


def test_pymanopt_agrees_on_tangent_vectors(pymanopt):
    x, z = point(0), draw(10, D, R)
    manifold = pymanopt(D, R)
    for found, expected in (
        (tangent_project(x, z), manifold.projection(x, z)),
        (riemannian_gradient(x, z), manifold.euclidean_to_riemannian_gradient(x, z)),
        (transport(x, z), manifold.transport(x, x, z)),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "theirs"), [("polar", "polar"), ("newton_schulz", "polar"), ("qr", "qr")]
)
def test_pymanopt_agrees_on_retractions(pymanopt, method, theirs):
    x, z = point(0), draw(10, D, R)
    manifold = pymanopt(D, R, retraction=theirs)
    xi = manifold.projection(x, z)
    found = retract(x, xi, method=method)
    np.testing.assert_allclose(found, manifold.retraction(x, xi), atol=1e-12)
