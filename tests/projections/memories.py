"""Gradients of memories that are hard in one way, and what is right for them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from hypothesis import strategies as st

from optax_cl.projections import gem

SEEDS = st.integers(0, 2**31 - 1)
K, SHAPES = 5, {"dense": {"kernel": (4, 3), "bias": (3,)}, "gain": ()}
ALL = np.ones(K, bool)


def is_shape(node):
    return isinstance(node, tuple)


def tree_of(vector):
    """Vectors, ``[..., 16]``, as a tree of float32 leaves."""
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=is_shape)
    ends = np.cumsum([int(np.prod(shape)) for shape in leaves])
    parts = np.split(np.float32(vector), ends[:-1], axis=-1)
    lead = np.shape(vector)[:-1]
    return jax.tree.unflatten(
        structure,
        [
            jnp.asarray(p.reshape(lead + shape))
            for p, shape in zip(parts, leaves, strict=True)
        ],
    )


def flat(tree, lead=0):
    return np.concatenate(
        [np.float64(x).reshape(*np.shape(x)[:lead], -1) for x in jax.tree.leaves(tree)],
        axis=-1,
    )


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@functools.partial(jax.jit, static_argnames="sign")
def route(g, memories, mask=ALL, margin=0.0, sign="gradient"):
    tx = gem(margin=jnp.asarray(margin), sign=sign)
    return tx.update(g, tx.init(g), memory_updates=memories, memory_mask=mask)[0]


def problem(seed, kind="plain"):
    """A gradient and memories as float32 numbers, in float64 arrays."""
    rng = np.random.default_rng(seed)
    g, common = rng.normal(size=(2, 16))
    rows = rng.normal(size=(K, 16))
    if kind == "all opposed":
        rows -= 0.7 * g
    elif kind == "equal":
        rows = (rows - 0.3 * g)[[0, 1, 1, 0, 2]]
    elif kind == "dependent":
        # In whole numbers, so that they still are in float32.
        rows = rng.integers(-3, 4, (K, 2)) @ rng.integers(-4, 5, (2, 16)) * 1.0
    elif kind == "nearly parallel":
        rows = common - 0.5 * g + 1e-3 * rows
    elif kind == "zero rows":
        rows = (rows - 0.3 * g) * np.array([1, 0, 1, 0, 1])[:, None]
    elif kind == "scales":
        rows = (rows - 0.3 * g) * np.array([1e-8, 1e4, 1, 1e-8, 1e4])[:, None]
    return np.float64(np.float32(g)), np.float64(np.float32(rows))


KINDS = [
    "plain",
    "all opposed",
    "equal",
    "dependent",
    "nearly parallel",
    "zero rows",
    "scales",
]


def routed(g, rows, mask=ALL, **kwargs):
    return flat(route(tree_of(g), tree_of(rows), mask, **kwargs))


def unit(rows):
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def by_nnls(g, rows):
    """The dual in float64, without a ridge."""
    directions = unit(rows)
    return g + directions.T @ scipy.optimize.nnls(directions.T, -g)[0]


def by_active_sets(g, rows, margin):
    """The same with a floor on the duals: every active set is tried."""
    gram, dots = rows @ rows.T, rows @ g
    if (dots >= 0).all():
        return g
    found = []
    for free in itertools.product([False, True], repeat=len(rows)):
        free = np.array(free)
        v = np.full(len(rows), float(margin))
        right = -(dots + gram @ (v * ~free))[free]
        v[free] = np.linalg.solve(gram[np.ix_(free, free)], right)
        slopes = gram @ v + dots
        if (v >= margin - 1e-9).all() and (slopes >= -1e-9)[~free].all():
            found.append(v)
    (v,) = found
    return g + rows.T @ v
