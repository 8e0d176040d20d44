import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl.editing import edit_kernel
from tests.arrays import distance, normal

IN, OUT = 8, 5


def problem(seed=0, n=1):
    """A kernel, keys, values and the second moment of correlated inputs."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(200, IN)) @ rng.normal(size=(IN, IN))
    arrays = (
        rng.normal(size=(IN, OUT)),
        rng.normal(size=(n, IN)),
        rng.normal(size=(n, OUT)),
        inputs.T @ inputs / 200,
    )
    return tuple(np.float32(a) for a in arrays)


def in_float64(w, k, v, c, damping=0.0, ridge=0.0):
    w, k, v, c = (np.float64(a) for a in (w, k, v, c))
    c = c + ridge * np.trace(c) / len(c) * np.eye(len(c))
    inverse = np.linalg.inv(c)
    middle = damping * np.eye(len(k)) + k @ inverse @ k.T
    size = np.sqrt(np.diag(middle))[:, None]  # or short keys are lost in float64, too
    answer = np.linalg.solve(middle / size / size.T, (v - k @ w) / size) / size
    return w + inverse @ k.T @ answer


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("damping", [0.0, 2.0])
def test_edits_against_the_closed_form_in_float64(n, damping):
    arrays = problem(1, n)
    found = edit_kernel(*arrays, damping=damping, ridge=0.0)
    np.testing.assert_allclose(found, in_float64(*arrays, damping), atol=1e-4)


def test_the_ridge_is_a_share_of_the_mean_diagonal():
    w, k, v, c = problem(21, 2)
    found = edit_kernel(w, k, v, c, ridge=0.1)
    np.testing.assert_allclose(found, in_float64(w, k, v, c, ridge=0.1), atol=1e-4)


@pytest.mark.parametrize("damping", [0.0, 2.0])
@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e20, 1e37])
def test_the_scale_of_the_second_moment_is_known_to_damping_alone(scale, damping):
    w, k, v, c = problem(22, 2)
    expected = edit_kernel(w, k, v, c, damping=damping)
    scaled, factor = c / np.abs(c).max() * scale, float(np.abs(c).max()) / scale
    found = edit_kernel(w, k, v, np.float32(scaled), damping=damping * factor)
    assert distance(found, expected) < 1e-4


@pytest.mark.parametrize("n", [1, 4])
def test_keys_are_answered_with_their_values_whatever_the_ridge(n):
    w, k, v, c = problem(2, n)
    for ridge in (1e-5, 1.0):
        edited = edit_kernel(w, k, v, c, ridge=ridge)
        np.testing.assert_allclose(k @ np.asarray(edited), v, atol=2e-5)
        change = np.asarray(edited) - w
        assert np.linalg.matrix_rank(change, tol=1e-4) == n


def test_few_inputs_of_any_scale_will_do_for_the_second_moment():
    w, k, v, _ = problem(19, 2)
    x = np.asarray(normal(20, 3, IN))  # of eight directions they show three
    edited = edit_kernel(w, k, v, x.T @ x)
    np.testing.assert_allclose(k @ np.asarray(edited), v, atol=1e-3)
    assert distance(edit_kernel(w, k, v, 2.0**20 * (x.T @ x)), edited) < 1e-5


def test_no_other_change_that_answers_them_costs_less():
    w, k, v, c = problem(3, 2)
    change = np.float64(edit_kernel(w, k, v, c, ridge=0.0)) - w
    cost = np.trace(change.T @ c @ change)
    off = np.eye(IN) - np.linalg.pinv(k) @ k  # directions that no key sees
    for seed in range(20):
        other = change + 0.1 * off @ np.asarray(normal(seed, IN, OUT))
        np.testing.assert_allclose(k @ (w + other), v, atol=1e-4)
        assert np.trace(other.T @ c @ other) > cost


def test_inputs_unrelated_to_the_key_are_answered_as_before():
    w, k, v, c = problem(4)
    edited = np.asarray(edit_kernel(w, k, v, c, ridge=0.0))
    direction = np.linalg.solve(np.float64(c), k[0])
    x = np.asarray(normal(5, 20, IN), np.float64)
    x -= np.outer(x @ direction, direction) / (direction @ direction)
    np.testing.assert_allclose(x @ edited, x @ w, atol=1e-4)
    # And others by their share along it.
    x = np.asarray(normal(6, 20, IN), np.float64)
    share = x @ direction / (k[0] @ direction)
    np.testing.assert_allclose(
        x @ (edited - w), np.outer(share, v[0] - k[0] @ w), atol=1e-4
    )


def test_damping_writes_a_share_of_a_single_edit():
    w, k, v, c = problem(7)
    s = float(k[0] @ np.linalg.solve(np.float64(c), k[0]))
    whole = np.asarray(edit_kernel(w, k, v, c, ridge=0.0)) - w
    for damping in (0.1, 1.0, 10.0):
        part = np.asarray(edit_kernel(w, k, v, c, damping=damping, ridge=0.0)) - w
        np.testing.assert_allclose(part, whole * s / (damping + s), atol=1e-5)


def test_damped_edits_are_those_of_the_other_form():
    w, k, v, c = (np.float64(a) for a in problem(8, 3))
    other = w + np.linalg.solve(2.0 * c + k.T @ k, k.T @ (v - k @ w))
    found = edit_kernel(*problem(8, 3), damping=2.0, ridge=0.0)
    np.testing.assert_allclose(found, other, atol=1e-4)


def test_what_is_known_already_changes_nothing():
    w, k, _, c = problem(9, 2)
    assert distance(edit_kernel(w, k, k @ w, c), w) < 1e-5


def test_a_fact_given_twice_counts_once_and_two_values_of_one_key_are_averaged():
    w, k, v, c = problem(10)
    once = edit_kernel(w, k, v, c)
    twice = edit_kernel(w, np.tile(k, (2, 1)), np.tile(v, (2, 1)), c)
    assert distance(once, twice) < 1e-4
    both = edit_kernel(w, np.tile(k, (2, 1)), np.concatenate([v, -v]), c)
    assert np.abs(k @ np.asarray(both)).max() < 1e-4


def test_keys_that_are_nearly_one_are_answered_each_with_its_value():
    # What tells them apart is lost in the rounding of products of keys.
    w, k, v, c = problem(15, 2)
    k[1] = k[0] + 1e-3 * k[1]
    edited = edit_kernel(w, k, v, c)
    np.testing.assert_allclose(k @ np.asarray(edited), v, atol=1e-3)


@pytest.mark.parametrize("damping", [0.0, 1e-14, 2.0])
def test_keys_of_any_length_are_answered(damping):
    w, k, v, c = problem(21, 3)
    scale = np.float32([1, 1e-8, 1e8])[:, None]
    k, v = k * scale, v * scale  # one is not to ask for more than the others
    edited = edit_kernel(w, k, v, c, damping=damping)
    expected = in_float64(w, k, v, c, damping, 1e-5)
    np.testing.assert_allclose(edited, expected, atol=1e-3)
    if not damping:
        answers = np.float64(k) @ np.float64(edited)
        np.testing.assert_allclose(answers / scale, v / scale, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_units_of_keys_and_values_do_not_matter(scale):
    w, k, v, c = problem(22, 2)
    edited = edit_kernel(w, k * np.float32(scale), v * np.float32(scale), c)
    np.testing.assert_allclose(edited, edit_kernel(w, k, v, c), atol=1e-4)


def test_more_keys_than_inputs_are_answered_in_the_least_squares_of_their_costs():
    w, k, v, c = problem(24, 2 * IN)
    # What it costs to answer one key alone with another by one.
    cost = 1 / np.sum(k.T * np.linalg.solve(np.float64(c), k.T), axis=0)
    weight = np.sqrt(cost)[:, None]
    expected = np.linalg.lstsq(weight * k, weight * v, rcond=None)[0]
    np.testing.assert_allclose(edit_kernel(w, k, v, c, ridge=0), expected, atol=1e-3)


def test_no_facts_change_nothing():
    w, k, v, c = problem(16)
    assert distance(edit_kernel(w, k[:0], v[:0], c), w) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kernels_keep_their_dtype_where_floats_are_wider(x64, dtype):
    w, k, v, c = problem(17, 2)
    settings = {"damping": np.float64(2.0), "ridge": np.float64(0.0)}
    edited = edit_kernel(w.astype(dtype), k, v, c, **settings)
    assert edited.dtype == dtype
    np.testing.assert_allclose(edited, in_float64(w, k, v, c, 2.0), atol=1e-4)


def test_layers_are_edited_at_once_and_inside_jit():
    stacked = [np.stack(a) for a in zip(problem(11, 2), problem(12, 2), strict=True)]
    together = jax.jit(jax.vmap(edit_kernel))(*stacked)
    for i, found in enumerate(together):
        assert distance(found, edit_kernel(*problem(11 + i, 2))) < 1e-5


def test_layers_of_a_stack_go_through_a_cpu_one_by_one_in_full_matrix_precision():
    # Ask the program: the CPU computes in full precision whatever it is told, and two
    # devices that decompose stacks may wait for each other for ever.
    stack = [np.stack([a, a]) for a in problem(18, 2)]
    traced = jax.jit(jax.vmap(edit_kernel)).trace(*stack)
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert {*re.findall(r'num_batch_dims = "(\d+)"', text)} == {"0"}
    products = re.findall("dot_general.*", text)
    assert products and all("HIGHEST" in product for product in products)


def test_half_precision_is_computed_in_float32():
    w, k, v, c = problem(13)
    half = jnp.asarray(w, jnp.bfloat16)
    edited = edit_kernel(half, k, v, c)
    assert edited.dtype == jnp.bfloat16
    expected = edit_kernel(np.float32(half), k, v, c).astype(jnp.bfloat16)
    assert distance(edited, expected) == 0


def test_mistakes_are_named():
    w, k, v, c = problem(14, 2)
    nan = c.copy()
    nan[0, 0] = np.nan
    zero, nothing = np.zeros_like(k), v.copy()
    nothing[0] = 0
    for arguments, error, message in (
        ((w[0], k, v, c), ValueError, r"`kernel` must be `\[in, out\]`.*jax.vmap"),
        ((w, k[:, :3], v, c), ValueError, r"`keys` must be of shape \(2, 8\)"),
        ((w, k, v[:1], c), ValueError, r"`values` must be of shape \(2, 5\)"),
        ((w, k, v, c[:3]), ValueError, r"`covariance` must be of shape \(8, 8\)"),
        ((w, np.int32(k), v, c), TypeError, "`keys` must be real and floating"),
        ((w, k, v, nan), ValueError, "`covariance` must be finite"),
        ((w + np.inf, k, v, c), ValueError, "`kernel` must be finite"),
        ((w, np.nan * k, v, c), ValueError, "`keys` must be finite"),
        ((w, k, np.nan * v, c), ValueError, "`values` must be finite"),
        ((w, 1e300 * np.float64(k), v, c), ValueError, "`keys` must be finite in f"),
        ((w, k, v.tolist(), c), TypeError, "`values` must be an array; got list"),
        ((w, k, v, None), TypeError, "`covariance` must be an array; got NoneType"),
        ((w, k, v, np.triu(c)), ValueError, "`covariance` must be symmetric"),
        ((w, k, v, -c), ValueError, "positive semi-definite"),
        ((w, k, v, 0 * c), ValueError, "and not zero"),
        ((w, zero, nothing, c), ValueError, "`keys` has zeros in row 1"),
        ((w, np.float32(1e-37) * k, v, c), ValueError, "zeros in row 0.* too small"),
        ((w, 1e-20 * k, 1e20 * v, c), ValueError, "would not be finite in float32"),
        ((jnp.float16(w), k, 1e6 * v, c), ValueError, "not be finite in float16"),
        ((w, k[0], v[0], c), ValueError, r"`keys` must be .*\(8,\).*`keys\[None\]`"),
    ):
        with pytest.raises(error, match=message):
            edit_kernel(*arguments)
    for wrong in (-1.0, jnp.float32(-1.0), jnp.float32(np.nan)):
        with pytest.raises(ValueError, match="`damping` must be a finite number"):
            edit_kernel(w, k, v, c, damping=wrong)
        with pytest.raises(ValueError, match="`ridge` must be a finite number"):
            edit_kernel(w, k, v, c, ridge=wrong)


def test_a_layer_that_cannot_be_edited_stays_as_it_was_inside_jit():
    w, k, v, c = problem(15, 2)
    nan = k.copy()
    nan[1, 3] = np.nan
    layers = [(w, k, v, c), (w, k, v, -c), (w, k, v, 0 * c), (w, nan, v, c)]
    stacked = [np.stack(arrays) for arrays in zip(*layers, strict=True)]
    edited, *others = jax.jit(jax.vmap(edit_kernel))(*stacked)
    assert distance(edited, edit_kernel(w, k, v, c)) < 1e-5
    assert [distance(other, w) for other in others] == [0, 0, 0]
    half = jnp.float16(w)
    beyond = jax.jit(edit_kernel)(half, k, 1e6 * v, c)
    assert beyond.dtype == jnp.float16 and distance(beyond, half) == 0
