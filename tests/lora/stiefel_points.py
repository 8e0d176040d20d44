"""Stacks of points, tangents and a memory, and the geometry compiled once for them.

Every function is compiled once, for one stack of matrices: examples vary the values.
"""

import functools

import hypothesis
import jax
import jax.export
import numpy as np
import pytest
from hypothesis import strategies as st

from optax_cl.lora import stiefel

N, D, R = 6, 12, 3
ORTHONORMAL, OFF = 5e-6, 1e-6

tangent_project = jax.jit(stiefel.tangent_project, static_argnames="metric")
riemannian_gradient = jax.jit(stiefel.riemannian_gradient, static_argnames="metric")
transport = jax.jit(stiefel.transport)
retract = jax.jit(stiefel.retract, static_argnames="method")
# Where little runs, code that is quick to make is quicker than quick code.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
polar = quick_jit(stiefel.polar, static_argnames="method")

every_metric = pytest.mark.parametrize("metric", stiefel.METRICS)
every_method = pytest.mark.parametrize("method", stiefel.RETRACTIONS)
every_polar = pytest.mark.parametrize("method", stiefel.POLARS)
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.floats(-6, 6).map(lambda exponent: 10.0**exponent)


def examples(*strategies):
    """Hypothesis' draws, a few of them; they come last of a test's arguments."""

    def decorate(test):
        return hypothesis.settings(max_examples=20)(hypothesis.given(*strategies)(test))

    return decorate


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape or (N, D, R))


def orthonormal(seed, *shape):
    return np.float32(np.linalg.qr(draw(seed, *shape))[0])


# For each point two directions that are taken, and columns that wait for others.
MEMORY = np.zeros((N, D, 4), np.float32)
MEMORY[..., [0, 2]] = orthonormal(99, N, D, 2)
SHARED = MEMORY[0]


def off(z, memory=MEMORY):
    return z - memory @ (memory.mT @ z)


def point(seed):
    return np.float32(np.linalg.qr(off(draw(seed)))[0])


def tangent(seed, x, size=1.0):
    z = np.float32(size * draw((seed, 1)))
    return np.asarray(tangent_project(x, z, memory=MEMORY))


def orthonormality(x):
    x = np.asarray(x, np.float64)
    return np.abs(x.mT @ x - np.eye(x.shape[-1])).max((-2, -1))


def inside(x, memory=MEMORY):
    return np.abs(np.float64(memory.mT) @ np.asarray(x, np.float64)).max()


def assert_point(x, memory=MEMORY):
    assert orthonormality(x).max() <= ORTHONORMAL
    assert inside(x, memory) <= OFF


def norm(z):
    return np.sqrt(np.sum(np.float64(z) ** 2, axis=(-2, -1)))


def inner(a, b):
    return np.sum(np.float64(a) * np.float64(b), axis=(-2, -1))


def numpy_polar(y):
    u, _, vt = np.linalg.svd(y, full_matrices=False)
    return u @ vt
