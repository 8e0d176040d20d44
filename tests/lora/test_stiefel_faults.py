"""Matrices without an answer of their own, and their neighbours in a stack."""

import functools

import jax
import jax.export
import numpy as np
import pytest

from optax_cl.lora import stiefel
from tests.lora.stiefel_points import (
    MEMORY,
    SHARED,
    N,
    assert_point,
    draw,
    every_method,
    every_polar,
    numpy_polar,
    off,
    point,
    polar,
    quick_jit,
    retract,
    tangent,
)


def with_entry(value):
    return lambda y: np.where(np.arange(y.size).reshape(y.shape) == 1, value, y)


BAD = {
    "zero": np.zeros_like,
    "deficient": lambda y: y[:, [0, 1, 0]],
    "nan": with_entry(np.nan),
    "inf": with_entry(np.inf),
    "huge": lambda y: 1e38 * np.sign(y),
    "small": lambda y: 1e-30 * y,  # and its Gram matrix is zero
    "tiny": lambda y: 1e-38 * y,  # and below the smallest normal float
}
every_bad = pytest.mark.parametrize("kind", BAD)


def spoil_one(y, kind):
    y = np.array(y, np.float32)
    y[2] = BAD[kind](y[2])
    return y


def assert_only_one_differs(found, expected, memory=MEMORY):
    others = np.arange(N) != 2
    np.testing.assert_array_equal(np.asarray(found)[others], expected[others])
    assert_point(found, memory)


@every_bad
@every_method
def test_a_bad_step_leaves_the_others_of_its_stack_bitwise_alone(method, kind):
    x = point(0)
    xi = tangent(0, x)
    # Of the sum, since that is what a retraction has to make sense of.
    bad = spoil_one(x + xi, kind)[2] - x[2]
    found = retract(
        x,
        np.where(np.arange(N)[:, None, None] == 2, bad, xi),
        method=method,
        memory=MEMORY,
    )
    expected = np.asarray(retract(x, xi, method=method, memory=MEMORY))
    assert_only_one_differs(found, expected)
    if kind in ("nan", "inf"):
        np.testing.assert_allclose(found[2], x[2], atol=1e-6)


@every_bad
@every_polar
def test_a_bad_matrix_leaves_the_others_of_its_stack_bitwise_alone(method, kind):
    y = np.float32(draw(0))
    expected = np.asarray(polar(y, method=method, memory=SHARED))
    bad = spoil_one(y, kind)
    found = polar(bad, method=method, memory=SHARED)
    assert_only_one_differs(found, expected, SHARED)
    np.testing.assert_array_equal(found, polar(bad, method=method, memory=SHARED))
    if kind in ("huge", "small"):
        same = numpy_polar(off(np.sign(y[2]) if kind == "huge" else y[2], SHARED))
        np.testing.assert_allclose(found[2], same, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        "newton_schulz",
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in stiefel.RETRACTIONS
            if m != "newton_schulz"
        ),
    ],
)
def test_vmap_gives_what_a_stack_gives(method):
    function = functools.partial(stiefel.retract, method=method)
    mapped = quick_jit(jax.vmap(lambda x, xi, memory: function(x, xi, memory=memory)))
    x = point(0)
    xi = tangent(0, x)
    expected = np.asarray(retract(x, xi, method=method, memory=MEMORY))
    found = np.asarray(mapped(x, xi, MEMORY))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for kind in BAD:
        bad = spoil_one(xi, kind)
        assert_only_one_differs(mapped(x, bad, MEMORY), found)
