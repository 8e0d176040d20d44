r"""Kronecker factors of the Fisher of a kernel, and of sums over tasks.

Of a kernel ``[in, out]`` with scores G the block of the Fisher is
:math:`\mathbb{E}[G_{ab} G_{a'b'}]`. Its factors here are

.. math:: L = \mathbb{E}[G G^\top], \qquad
   R = \mathbb{E}[G^\top G] / \mathbb{E}\|G\|^2 ,

``[in, in]`` and ``[out, out]``, the second of trace one: :math:`L \otimes R` is the
block where that is a Kronecker product at all, has its trace always, and turns with the
inputs and the outputs. It is one step, from the identity, of the power iteration that
finds the nearest product.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import linalg, statistics, subspaces, tasks, trees
from optax_cl._core.matrices import ViewRule, to_matrix
from optax_cl._core.orthonormal import unit_scale


@functools.cache
def factor_pass(views: ViewRule, estimator: str) -> tasks.Pass:
    """The pass that finds the factors of all kernels, and squares of other leaves.

    Its result is ``{"left": L, "right": R, "diagonal": F, "num_items": []}``: trees
    like the parameters, L and R ``[*batch, n, n]`` where ``views`` sees a matrix and F
    like the leaf where not; ``MaskedNode`` elsewhere, and at leaves that are hidden
    from the state, whose ``anchor`` has holes there.
    """

    def visible(state, tree):
        anchor = trees.align_structure("the anchor", state.anchor, tree)
        return jax.tree.map(
            lambda a, x: a if trees.is_hole(a) else x,
            anchor,
            tree,
            is_leaf=trees.is_hole,
        )

    def of_score(score):
        wide = jax.tree.map(lambda g: g.astype(trees.importance_dtype(g.dtype)), score)
        squares = jax.tree.map(jnp.square, wide)
        return {
            "left": subspaces.map_matrices(
                views, lambda g, view: linalg.gram(to_matrix(g, view)), wide
            ),
            "right": subspaces.map_matrices(
                views, lambda g, view: linalg.gram(to_matrix(g, view).mT), wide
            ),
            "diagonal": subspaces.map_others(views, squares),
        }

    def init(state, params):
        shapes = jax.eval_shape(of_score, visible(state, params))
        return {
            "sum": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            "num_items": jnp.zeros([], jnp.float32),
        }

    def step(acc, data):
        def of_visible(score):
            return of_score(visible(data.state, score))

        total, items = statistics.add_scores(estimator, data, of_visible, acc["sum"])
        return {
            "sum": total,
            "num_items": acc["num_items"] + items * data.weights.sum(),
        }

    def finish(acc, state, earlier):
        del state, earlier
        items = jnp.maximum(acc["num_items"], 1.0)
        mean = jax.tree.map(lambda s: s / items, acc["sum"])
        return {
            "left": mean["left"],
            "right": jax.tree.map(unit_trace, mean["right"]),
            "diagonal": mean["diagonal"],
            "num_items": acc["num_items"],
        }

    return tasks.Pass("kronecker_factors", init, step, finish)


def trace(matrix: chex.Array) -> chex.Array:
    """``[*batch, n, n] -> [*batch, 1, 1]``."""
    return jnp.trace(matrix, axis1=-2, axis2=-1)[..., None, None]


def unit_trace(matrix: chex.Array) -> chex.Array:
    """A matrix over its trace; zero stays zero."""
    total = trace(matrix)
    return jnp.where(total > 0, matrix / jnp.where(total > 0, total, 1), 0)


def pull(left: chex.Array, x: chex.Array, right: chex.Array) -> chex.Array:
    """``L X R`` of a matrix ``[*batch, in, out]``."""
    return linalg.lift(linalg.lift(left, x), right)


Pair = tuple[chex.Array, chex.Array]


def nearest_sum(first: Pair, second: Pair) -> Pair:
    r"""The Kronecker product nearest to a sum of two, in the Frobenius norm.

    Rearranged, a product is an outer product :math:`\mathrm{vec}(L)
    \mathrm{vec}(R)^\top`, and the sum has rank two: :math:`P Q^\top` with columns
    :math:`\mathrm{vec}(L_j)` and :math:`\mathrm{vec}(R_j)`. Its leading singular
    vectors are along :math:`P x`, x the leading eigenvector of
    :math:`(Q^\top Q)(P^\top P)`, and :math:`Q y` with :math:`y = (P^\top P) x`. Inner
    products of positive semi-definite matrices are at least zero, so x and y are, too,
    and what comes out is positive semi-definite again.

    Args:
      first: L, ``[*batch, in, in]``, and R, ``[*batch, out, out]``; both zero if there
        is nothing yet.
      second: Likewise.

    Returns:
      Such a pair, R of trace one; the first one where the sum is too large to hold.
    """
    (l0, r0), (l1, r1) = first, second
    (l0, a0), (l1, a1), (r0, b0), (r1, b1) = map(_direction, (l0, l1, r0, r1))
    # Over the larger of the two: powers of what is left do not overflow.
    top = jnp.maximum(a0 * b0, a1 * b1)
    w0, w1 = (_over(w, top) for w in (a0 * b0, a1 * b1))
    p = w0**2, w0 * w1 * _inner(l0, l1), w1**2  # P^T P, with columns w L
    q = _inner(r0, r1)  # Q^T Q is one on its diagonal
    a, b = p[0] + q * p[1], p[1] + q * p[2]
    c, d = q * p[0] + p[1], q * p[1] + p[2]
    value = (a + d + jnp.sqrt((a - d) ** 2 + 4 * b * c)) / 2
    # Of the two forms of the eigenvector the one that loses no digits.
    x0, x1 = jnp.where(a > d, value - d, b), jnp.where(a > d, c, value - a)
    x0 = jnp.where((x0 <= 0) & (x1 <= 0), 1, x0)  # a tie: both are as near
    y0, y1 = p[0] * x0 + p[1] * x1, p[1] * x0 + p[2] * x1
    left = top * (x0 * w0 * l0 + x1 * w1 * l1)
    right = _over(y0 * r0 + y1 * r1, x0 * y0 + x1 * y1)
    return where_finite((left * trace(right), unit_trace(right)), first)


def pi_sum(first: Pair, second: Pair) -> Pair:
    r"""Factors added with a balance of their traces, as K-FAC's damping has it.

    :math:`(L_0 + L_1 / \pi) \otimes (R_0 + \pi R_1)` with :math:`\pi^2 =
    \frac{\operatorname{tr} R_0 \operatorname{tr} L_1}{\operatorname{tr} R_1
    \operatorname{tr} L_0}`. It is the sum and two more terms, each factor of one task
    with the other one of the other: of two equal pairs it is four times, not twice, the
    one.

    Args:
      first: As in ``nearest_sum``.
      second: As there.

    Returns:
      As there.
    """
    (l0, r0), (l1, r1) = first, second
    none0, none1 = (trace(x) <= 0 for x in (l0, l1))
    root_l0, root_r0, root_l1, root_r1 = (jnp.sqrt(trace(x)) for x in (l0, r0, l1, r1))
    pi = _over(root_l1, root_l0) * _over(root_r0, root_r1)
    pi = jnp.where(pi > 0, pi, 1)
    left = jnp.where(none1, l0, jnp.where(none0, l1, l0 + l1 / pi))
    right = jnp.where(none1, r0, jnp.where(none0, r1, r0 + pi * r1))
    return where_finite((left * trace(right), unit_trace(right)), first)


def where_finite(pair: Pair, otherwise: Pair) -> Pair:
    """The pair, or the other one where the first has an entry that is not finite."""
    left, right = (jnp.all(jnp.isfinite(x), axis=(-2, -1), keepdims=True) for x in pair)
    left, right = (
        jnp.where(left & right, x, y) for x, y in zip(pair, otherwise, strict=True)
    )
    return left, right


def _direction(matrix):
    """A matrix of any scale over its norm, and the norm."""
    size = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True, initial=0)
    matrix = unit_scale(matrix)
    norm = jnp.sqrt(_inner(matrix, matrix))
    return _over(matrix, norm), size * norm


def _inner(a, b):
    return jnp.sum(a * b, axis=(-2, -1), keepdims=True)


def _over(a: Any, b: Any) -> chex.Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
