"""What holds for every matrix of orthonormal columns, in the precision of training."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cl.lora import stiefel
from tests.lora.stiefel_points import (
    MEMORY,
    OFF,
    ORTHONORMAL,
    SEEDS,
    SHARED,
    SIZES,
    D,
    N,
    R,
    assert_point,
    draw,
    every_method,
    every_metric,
    every_polar,
    examples,
    inner,
    inside,
    norm,
    numpy_polar,
    off,
    orthonormal,
    orthonormality,
    point,
    polar,
    quick_jit,
    retract,
    riemannian_gradient,
    tangent,
    tangent_project,
    transport,
)

# --- tangent vectors ---


@every_metric
@examples(SEEDS, SIZES)
def test_tangent_vectors_are_tangent_and_off_the_memory(metric, seed, size):
    x, z = point(seed), np.float32(size * draw((seed, 1)))
    xi = np.asarray(tangent_project(x, z, metric=metric, memory=MEMORY))
    assert np.abs(x.mT @ xi + xi.mT @ x).max() <= 1e-5 * size
    assert inside(xi) <= 1e-6 * size


@examples(SEEDS)
def test_the_euclidean_map_is_an_orthogonal_projection(seed):
    x, a, b = point(seed), np.float32(draw((seed, 1))), np.float32(draw((seed, 2)))
    project = functools.partial(tangent_project, x, memory=MEMORY)
    once = project(a)
    np.testing.assert_allclose(project(once), once, atol=1e-5)
    # Self-adjoint: <a, P b> = <P a, b>.
    np.testing.assert_allclose(inner(a, project(b)), inner(once, b), atol=1e-4)


@examples(SEEDS)
def test_the_canonical_map_doubles_rotations_so_that_it_is_no_projection(seed):
    x, skew = point(seed), draw((seed, 1), N, R, R)
    rotation = x @ np.float32(skew - skew.mT)
    across = tangent(seed, x)
    across = across - x @ (x.mT @ across)
    project = functools.partial(tangent_project, x, metric="canonical", memory=MEMORY)
    np.testing.assert_allclose(
        project(rotation + across), 2 * rotation + across, atol=1e-5
    )
    single = tangent_project(x, rotation + across, memory=MEMORY)
    np.testing.assert_allclose(single, rotation + across, atol=1e-5)


def test_twice_the_canonical_map_differs_from_once_by_a_quarter():
    x, z = orthonormal(0, 256, 8), np.float32(draw(1, 256, 8))
    once = {m: tangent_project(x, z, metric=m) for m in stiefel.METRICS}
    change = {
        m: norm(tangent_project(x, once[m], metric=m) - once[m]) / norm(once[m])
        for m in stiefel.METRICS
    }
    # The rotation is doubled again, and nothing else changes.
    skew = (x.T @ z - z.T @ x) / 2
    expected = norm(2 * skew) / norm(once["canonical"])
    assert expected > 0.2
    assert change["canonical"] == pytest.approx(expected, rel=1e-3)
    assert change["euclidean"] < 1e-6


@every_metric
@examples(SEEDS)
def test_weight_decay_and_any_symmetric_factor_map_to_zero(metric, seed):
    x, a = point(seed), np.float32(draw((seed, 1), N, R, R))
    project = functools.partial(tangent_project, x, metric=metric, memory=MEMORY)
    np.testing.assert_allclose(project(0.1 * x), 0, atol=1e-6)
    np.testing.assert_allclose(project(x @ (a + a.mT)), 0, atol=2e-5)
    assert norm(project(x @ a)).min() > 1e-3


@examples(SEEDS)
def test_transport_gives_tangent_vectors_of_the_new_point_and_lengthens_none(seed):
    old, new = point(seed), point((seed, 9))
    z = tangent(seed, old)
    carried = np.asarray(transport(new, z, memory=MEMORY))
    assert np.abs(new.mT @ carried + carried.mT @ new).max() <= 1e-5
    assert inside(carried) <= OFF
    assert (norm(carried) <= norm(z) * (1 + 1e-6)).all()


# --- retractions ---


@every_method
@examples(SEEDS, SIZES)
def test_a_step_of_any_size_ends_on_the_manifold_and_off_the_memory(method, seed, size):
    x = point(seed)
    xi = tangent(seed, x, size)
    assert_point(retract(x, xi, method=method, memory=MEMORY))


@every_method
@examples(SEEDS)
def test_no_step_is_no_change(method, seed):
    x = point(seed)
    still = retract(x, np.zeros_like(x), method=method, memory=MEMORY)
    np.testing.assert_allclose(still, x, atol=1e-6)


@every_method
@examples(SEEDS)
def test_columns_of_zeros_in_the_memory_do_no_harm(method, seed):
    x = point(seed)
    xi = tangent(seed, x)
    found = retract(x, xi, method=method, memory=MEMORY)
    other = retract(x, xi, method=method, memory=MEMORY[..., [3, 0, 1, 2]])
    np.testing.assert_allclose(other, found, atol=1e-6)


def test_a_memory_may_be_shared_by_a_stack():
    x, z = point(0), np.float32(draw(1))
    expected = tangent_project(x, z, memory=np.broadcast_to(SHARED, MEMORY.shape))
    for memory in (SHARED, SHARED[None]):
        found = tangent_project(x, z, memory=memory)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def project_once_before(y):
    return numpy_polar(off(y))


def project_after(y):
    return off(numpy_polar(y))


@pytest.mark.parametrize("method", ["polar", "newton_schulz", "qr"])
def test_a_step_into_the_memory_leaves_nothing_there(method):
    x = point(0)
    into = 1e4 * MEMORY @ np.float32(draw(1, N, 4, R))
    xi = tangent(2, x) + into
    found = retract(x, xi, method=method, memory=MEMORY)
    assert_point(found)
    # Each wrong form loses one of the two: what one projection leaves is a share of
    # what was there, and a projection afterwards shortens columns.
    assert inside(project_once_before(x + xi)) > 100 * OFF
    assert orthonormality(project_after(x + xi)).min() > 0.1


@every_method
@every_metric
def test_a_small_step_against_the_gradient_descends_by_its_length(method, metric):
    x, target = point(0), np.float32(draw(1))
    g = x - target  # of |x - target|^2 / 2
    rho = riemannian_gradient(x, g, metric=metric, memory=MEMORY)
    t = np.float32(1e-3)
    moved = retract(x, -t * rho, method=method, memory=MEMORY)
    descent = norm(x - target) ** 2 / 2 - norm(moved - target) ** 2 / 2
    assert (descent > 0).all()
    np.testing.assert_allclose(descent, t * inner(g, rho), rtol=0.05)


@pytest.mark.parametrize("method", ["polar", "newton_schulz"])
@examples(SEEDS)
def test_polar_is_nearer_than_any_other_point(method, seed):
    x, xi = point(seed), np.float32(draw((seed, 1)))
    y = off(x + xi)
    found = np.asarray(retract(x, xi, method=method, memory=MEMORY))
    reach = norm(found - y)
    turn = np.linalg.qr(np.eye(R) + 0.01 * draw((seed, 2), N, R, R))[0]
    others = [
        retract(x, xi, method="qr", memory=MEMORY),
        retract(found, tangent(seed, found, 0.01), method="polar", memory=MEMORY),
        found @ np.float32(turn),
        point((seed, 3)),
    ]
    for other in others:
        assert (reach <= norm(other - y) + 1e-6).all()


def rotations(seed):
    return np.float32(np.linalg.qr(draw(seed, N, R, R))[0])


@every_method
def test_a_rotation_of_the_columns_commutes_with_all_but_qr(method):
    x, turn = point(0), rotations(3)
    xi = tangent(0, x)
    found = retract(x @ turn, xi @ turn, method=method, memory=MEMORY)
    expected = retract(x, xi, method=method, memory=MEMORY) @ turn
    if method == "qr":
        assert np.abs(found - expected).max((-2, -1)).min() > 0.01
    else:
        np.testing.assert_allclose(found, expected, atol=2e-6)


@every_method
def test_a_change_of_gauge_leaves_the_product_after_a_step_alone(method):
    g = np.float32(draw(2, N, D, D))  # of a loss linear in s u v^T

    def product_after_a_step(s, u, v):
        def step(x, gradient):
            xi = tangent_project(x, -0.3 * gradient, memory=MEMORY)
            return np.asarray(retract(x, xi, method=method, memory=MEMORY))

        return s * step(u, s * g @ v) @ step(v, s * g.mT @ u).mT

    u, v, turn, s = point(0), point(1), rotations(3), np.float32(0.7)
    expected = product_after_a_step(s, u, v)
    flipped = product_after_a_step(-s, -u, v)
    turned = product_after_a_step(s, u @ turn, v @ turn)
    if method == "qr":
        assert np.abs(turned - expected).max() > 0.01
    else:
        np.testing.assert_allclose(flipped, expected, atol=5e-6)
        np.testing.assert_allclose(turned, expected, atol=5e-6)


# --- many steps ---

# Pulls x towards the leading eigenvectors of a matrix: f = - tr(x^T H x) / 2.
HESSIAN = (lambda h: np.float32(h @ h.mT / D))(draw(5, N, D, D))
ADAM = optax.adam(0.01)


@functools.partial(jax.jit, static_argnames="method")
def three_thousand_adam_steps(x, method=None):
    """Every point on the way, ``[steps, N, D, R]``; None takes steps as they are."""

    def step(carry, _):
        x, state = carry
        g = stiefel.riemannian_gradient(x, -jnp.asarray(HESSIAN) @ x, memory=MEMORY)
        updates, state = ADAM.update(g, state)
        xi = stiefel.tangent_project(x, updates, memory=MEMORY)
        if method is None:
            x = x + xi
        else:
            x = stiefel.retract(x, xi, method=method, memory=MEMORY)
        return (x, state), x

    return jax.lax.scan(step, (x, ADAM.init(x)), length=3000)[1]


@every_method
def test_errors_do_not_build_up_over_three_thousand_adam_steps(method):
    path = np.asarray(three_thousand_adam_steps(point(0), method))
    assert orthonormality(path).max() <= 1e-6
    assert inside(path) <= OFF
    # They did move, and to where the objective is least.
    x = path[-1]
    allowed = np.eye(D) - MEMORY @ MEMORY.mT
    values = np.linalg.eigvalsh(allowed @ HESSIAN @ allowed)[:, -R:].sum(-1)
    np.testing.assert_allclose(inner(x, HESSIAN @ x), values, rtol=0.02)


def test_tangent_steps_without_a_retraction_diverge():
    x = np.asarray(three_thousand_adam_steps(point(0)))[-1]
    assert not (np.abs(x).max() < 1e6)


def muon(y):
    """Five steps of the quintic that the Muon optimizer orthogonalizes with."""
    y = y / norm(y)[:, None, None]
    for _ in range(5):
        gram = y.mT @ y
        y = 3.4445 * y + y @ (-4.775 * gram + 2.0315 * gram @ gram)
    return y


def test_the_quintic_of_muon_is_no_retraction():
    # It stops at singular values between 0.68 and 1.13, which is an error of 0.53 at
    # the worst: that of a point which takes no step.
    x = point(0)
    assert orthonormality(muon(x)).max() == pytest.approx(0.53, abs=0.01)
    found = retract(x, np.zeros_like(x), method="polar", memory=MEMORY)
    assert orthonormality(found).max() <= ORTHONORMAL
    steep = orthonormal(1, 1, 40, 20) * np.logspace(0, -1, 20)
    values = np.linalg.svd(muon(steep), compute_uv=False)
    assert values.min() < 0.75
    assert values.max() > 1.1


# --- precision ---


def test_bfloat16_is_the_float32_result_rounded():
    x, xi = (jnp.asarray(a, jnp.bfloat16) for a in (point(0), 0.1 * draw(1)))
    in_bfloat16 = quick_jit(stiefel.retract, static_argnames="method")
    found = in_bfloat16(x, xi, method="polar", memory=MEMORY)
    assert found.dtype == jnp.bfloat16
    wide = retract(np.float32(x), np.float32(xi), method="polar", memory=MEMORY)
    np.testing.assert_allclose(
        np.float32(found), np.asarray(wide), rtol=2.0**-8, atol=1e-6
    )
    # The error of what is stored, outside jit: inside, the rounding may be left out.
    assert 5e-4 < orthonormality(np.float32(found)).max() < 6e-3


@every_polar
def test_polar_comes_as_near_as_its_documentation_says(method):
    near = {
        "eigh": {1: 3e-7, 1e1: 2e-6, 1e2: 6e-5, 1e3: 3e-3, 1e4: 2e-2},
        "svd": {1: 1e-6, 1e1: 1e-6, 1e2: 1e-5, 1e3: 1e-4, 1e4: 1e-3},
    }
    u = np.linalg.qr(off(draw(0), SHARED))[0]
    v = np.float64(rotations(1))
    for condition, tolerance in near.get(method, near["eigh"]).items():
        y = np.float32((u * np.logspace(0, -np.log10(condition), R)) @ v.mT)
        found = polar(y, method=method, memory=SHARED)
        assert_point(found, SHARED)
        expected = numpy_polar(np.float64(y))
        np.testing.assert_allclose(found, expected, atol=tolerance)


# --- arguments, devices ---

MISFITS = [
    ("wide", dict(x=(3, 9)), ValueError, r"`x` must be tall.*got shape \(3, 9\)"),
    ("vector", dict(x=(9,)), ValueError, "`x` must be tall"),
    ("columns", dict(memory=(9, 7)), ValueError, r"`memory`.*p \+ r <= d.*\(9, 7\)"),
    ("rows", dict(memory=(8, 2)), ValueError, r"`memory`.*\(8, 2\).*\(9, 3\)"),
    ("stack", dict(memory=(2, 9, 2)), ValueError, r"leading axes of `memory`"),
    (
        "axes",
        dict(x=(3, 9, 3), z=(3, 9, 3), memory=(2, 9, 2)),
        ValueError,
        r"leading axes of `memory`.*\(2, 9, 2\).*\(3, 9, 3\)",
    ),
    ("other", dict(z=(9, 2)), ValueError, r"`(z|xi)` must have the shape.*\(9, 2\)"),
    ("whole", dict(dtype=np.int32), TypeError, "`x` must be real and floating.*int32"),
    ("complex", dict(dtype=np.complex64), TypeError, "`x` must be.*complex64"),
    ("whole_z", dict(z_dtype=np.int32), TypeError, "`(z|xi)` must be real.*int32"),
    (
        "complex_memory",
        dict(memory_dtype=np.complex64),
        TypeError,
        "`memory` must be real.*complex64",
    ),
]


@pytest.mark.parametrize(
    "function", [stiefel.tangent_project, stiefel.riemannian_gradient, stiefel.retract]
)
@pytest.mark.parametrize(
    ("given", "error", "words"),
    [pytest.param(*rest, id=name) for name, *rest in MISFITS],
)
def test_what_does_not_fit_is_named(function, given, error, words):
    x = np.ones(given.get("x", (9, 3)), given.get("dtype", np.float32))
    z = np.ones(given.get("z", x.shape), given.get("z_dtype", np.float32))
    memory = np.zeros(
        given.get("memory", (9, 2)), given.get("memory_dtype", np.float32)
    )
    with pytest.raises(error, match=words):
        function(x, z, memory=memory)


def test_an_unknown_choice_is_told_the_known_ones():
    x = orthonormal(0, D, R)
    with pytest.raises(ValueError, match=r"`method`.*polar.*newton_schulz.*qr.*cayley"):
        stiefel.retract(x, x, method="exp")
    with pytest.raises(ValueError, match=r"`metric`.*euclidean.*canonical"):
        stiefel.tangent_project(x, x, metric="flat")
    with pytest.raises(ValueError, match=r"`method`.*eigh.*newton_schulz.*svd"):
        stiefel.polar(x, method="qr")


def test_random_points_must_be_tall_and_floating():
    with pytest.raises(ValueError, match=r"`shape`.*\(3, 9\)"):
        stiefel.random(jax.random.key(0), (3, 9))
    with pytest.raises(TypeError, match=r"`dtype`.*int32"):
        stiefel.random(jax.random.key(0), (9, 3), dtype=jnp.int32)


@pytest.mark.parametrize(
    "memory",
    [
        pytest.param(None, marks=pytest.mark.slow, id="free"),
        pytest.param(MEMORY, id="memory"),
    ],
)
@every_method
def test_retractions_lower_for_every_platform(method, memory):
    platforms = ("cpu", "cuda", "tpu")
    step = jax.jit(functools.partial(stiefel.retract, method=method, memory=memory))
    exported = jax.export.export(step, platforms=platforms)(point(0), point(1))
    assert exported.platforms == platforms
    assert exported.out_avals[0].shape == (N, D, R)
