"""Protected subspaces of a task's gradients: bases and the curvature in them."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import (
    checks,
    decompositions,
    growth,
    layer_inputs,
    linalg,
    statistics,
    tasks,
    trees,
)
from optax_cl._core.matrices import MatrixView, ViewRule, to_matrix

OVERSAMPLE = 8  # extra columns of the randomized sketch


def map_matrices(
    views: ViewRule,
    function: Callable[[chex.Array, MatrixView], Any],
    tree: chex.ArrayTree,
) -> chex.ArrayTree:
    """Maps over floating-point leaves with a matrix view; ``MaskedNode`` elsewhere.

    A complex one is refused.
    """

    def one(path, leaf):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            return optax.MaskedNode()
        view = views(checks.path_str(path), jnp.shape(leaf))
        if view is None:
            return optax.MaskedNode()
        checks.check_real("a protected subspace", path, leaf)
        return function(leaf, view)

    return jax.tree_util.tree_map_with_path(one, tree)


def map_others(views: ViewRule, tree: chex.ArrayTree) -> chex.ArrayTree:
    """The floating-point leaves without a matrix view; ``MaskedNode`` elsewhere."""

    def one(path, leaf):
        inexact = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        seen = inexact and views(checks.path_str(path), jnp.shape(leaf)) is None
        return leaf if seen else optax.MaskedNode()

    return jax.tree_util.tree_map_with_path(one, tree)


def _as_matrix(
    views: ViewRule, path: Any, leaf: chex.Array, basis: chex.Array
) -> chex.Array:
    """A leaf that has a basis, and so was a matrix at ``init``, as that matrix."""
    view = views(checks.path_str(path), leaf.shape)
    if view is None:
        raise ValueError(
            f"the leaf `{checks.path_str(path)}` has a basis, but `matrices` says that "
            "it is no matrix. The optimizer state was made under other settings, or "
            "for other parameters."
        )
    matrix = to_matrix(leaf, view)
    if matrix.shape[:-1] != basis.shape[:-1]:
        raise ValueError(
            f"the leaf `{checks.path_str(path)}` of shape {leaf.shape} has a fan-in of "
            f"{matrix.shape[-2]} (after the axes {matrix.shape[:-2]} of a stack), but "
            f"its basis is of shape {basis.shape}. The optimizer state was made for "
            "other parameters."
        )
    return matrix


def coefficients(
    views: ViewRule, basis: chex.ArrayTree, tree: chex.ArrayTree
) -> chex.ArrayTree:
    """``U^T G`` at every protected leaf of ``tree``; ``MaskedNode`` elsewhere.

    Args:
      views: Which leaves are matrices.
      basis: U, ``[*batch, in, r]``, or ``MaskedNode``, at the leaves of ``tree``; may
        have more leaves than ``tree``, where ``tree`` is masked.
      tree: Updates or parameters.

    Returns:
      A tree of ``[*batch, r, out]``, float32 or wider.
    """
    basis = trees.align_structure("basis", basis, tree)

    def one(path, leaf, u):
        if trees.is_masked(u):
            return u
        return linalg.coefficients(u, _as_matrix(views, path, leaf, u))

    return jax.tree_util.tree_map_with_path(one, tree, basis)


def rotate_curvature(old_basis, new_basis, old, task):
    """``(U_new^T U_old)^2 Lambda + Lambda_task``, squares elementwise."""

    def one(u_old, u_new, lam, lam_task):
        mixing = linalg.coefficients(u_new, u_old) ** 2
        return linalg.lift(mixing, lam) + lam_task

    return jax.tree.map(one, old_basis, new_basis, old, task)


def _sketch_width(basis: chex.Array) -> int:
    return min(basis.shape[-1] + OVERSAMPLE, basis.shape[-2])


def sketch_matrix(basis: chex.Array) -> chex.Array:
    """The orthonormal columns that a Gram matrix is multiplied by for its sketch.

    One fixed draw: any matrix in general position does, and a boundary must not depend
    on anything but its data. Orthonormal, since a normal draw that is square or nearly
    so may be ill-conditioned, and the sketch of a Gram matrix of low rank then has no
    Cholesky factor.

    Args:
      basis: ``[*batch, in, r]``; only its shape and dtype are read.

    Returns:
      ``[*batch, in, min(r + OVERSAMPLE, in)]``.
    """
    shape = (*basis.shape[:-1], _sketch_width(basis))
    draw = jax.random.normal(jax.random.key(0), shape, basis.dtype)
    return decompositions.qr(draw)[0]


@functools.cache
def basis_pass(
    views: ViewRule, statistic: str, memory: str, svd: str, labels: str
) -> tasks.Pass:
    """The pass that finds the basis of a task's batch gradients, or of layer inputs.

    Each batch enters with the gradient of its *summed* loss, so that a ragged last
    batch weighs as its items do; its mean over few items would be mostly noise, and
    count as much as a full batch. Each input enters by itself. A leaf whose columns are
    all zero, or not finite, keeps its basis.

    Its result is ``{"basis": U, "energy": e, "usable": bool [*batch]}`` for a state
    that has ``basis``, ``energy`` and ``threshold``; see ``protect``. Of a basis that
    grows, ``"share"`` is the task's part of every energy, and ``"left_out"``, int32
    ``[*batch]``, the columns that did not fit.
    """
    columns = _inputs if statistic == "inputs" else _gradients

    def init(state, params):
        basis = trees.align_structure("basis", state.basis, params)

        def one(u):
            *batch, fan_in, _ = u.shape
            width = fan_in if svd == "exact" else _sketch_width(u)
            return {
                "sum": jnp.zeros((*batch, fan_in, width), u.dtype),
                "trace": jnp.zeros(batch, u.dtype),
            }

        return jax.tree.map(one, basis)

    def step(acc, data):
        def one(u, matrix, a):
            if trees.is_masked(u):
                return u
            if svd == "exact":
                product = linalg.gram(matrix)
            else:
                inner = jnp.swapaxes(
                    linalg.coefficients(sketch_matrix(u), matrix), -1, -2
                )
                product = linalg.lift(matrix, inner)
            return {
                "sum": a["sum"] + product,
                "trace": a["trace"] + jnp.sum(matrix**2, axis=(-2, -1)),
            }

        basis = trees.align_structure("basis", data.state.basis, data.params)
        found = columns(views, basis, data, labels)
        return jax.tree.map(one, basis, found, acc, is_leaf=trees.is_masked)

    def finish(acc, state, earlier):
        del earlier

        def one(u, e, a):
            usable = (a["trace"] > 0) & jnp.isfinite(a["trace"])
            trace = jnp.where(usable, a["trace"], 1.0)[..., None, None]
            normalised = jnp.where(usable[..., None, None], a["sum"] / trace, 0.0)
            of_growth = {}
            if memory == "grow":
                grown, share = _grown(u, normalised, state.threshold)
                basis, energy = grown.memory, e + share
                of_growth = {
                    "share": jnp.where(usable[..., None], share, 0),
                    "left_out": grown.left_out,
                }
            else:
                basis, energy = _merged(u, e, normalised, state.threshold)
            usable &= jnp.all(jnp.isfinite(basis), axis=(-2, -1))
            # Of an input that was always zero every direction has none. Rounding there
            # would be a routed gradient without a raw one: a whole step of Adam.
            alive = jnp.any(a["sum"] != 0, axis=-1)
            if memory != "last":
                alive |= jnp.any(u != 0, axis=-1)
            basis = linalg.drop_rows(basis, alive)
            energy *= jnp.any(basis != 0, axis=-2)
            return {
                "basis": jnp.where(usable[..., None, None], basis, u),
                "energy": jnp.where(usable[..., None], energy, e),
                "usable": usable,
                **of_growth,
            }

        # Leaves that this pass did not see (hidden by a mask) do not occur: a state's
        # own mask decides which leaves it holds, and how it writes that.
        acc = trees.align_structure("accumulator", acc, state.basis)
        merged = jax.tree.map(one, state.basis, state.energy, acc)
        split = lambda name: jax.tree.map(  # noqa: E731
            lambda u, m: m[name], state.basis, merged
        )
        names = ["basis", "energy", "usable"]
        if memory == "grow":
            names += ["share", "left_out"]
        return {name: split(name) for name in names}

    def _merged(u, e, normalised, threshold):
        if memory == "last":
            u, e = jnp.zeros_like(u), jnp.zeros_like(e)
        if svd == "exact":
            basis, energy = linalg.merge_gram(u, e, normalised)
        else:
            factor = linalg.nystrom_factor(normalised, sketch_matrix(u))
            basis, energy = linalg.merge_factor(u, e, factor)
        total = jnp.sum(e, axis=-1) + 1.0
        return linalg.keep_energy(basis, energy, total, threshold)

    return tasks.Pass("basis", init, step, finish)


def _grown(u, normalised, threshold):
    """What has grown, and the energy that each column has of the task."""
    count = jnp.sum(jnp.any(u != 0, axis=-2), axis=-1, dtype=jnp.int32)
    # Rounding turns weak eigenvectors of the same inputs a little off their basis. What
    # is new of them holds no energy, and would take room for good.
    grown = growth.grow(
        u, count, growth.factor(normalised), threshold, growth.rounding(u)
    )
    share = jnp.sum(grown.memory * linalg.lift(normalised, grown.memory), axis=-2)
    return grown, share


def _gradients(views, basis, data, labels):
    """The gradient of a batch's summed loss at every protected leaf, as a matrix."""
    gradient, items = batch_gradient(data, labels)

    def one(path, g, u):
        if trees.is_masked(u):
            return u
        return items * _as_matrix(views, path, g, u).astype(u.dtype)

    return jax.tree_util.tree_map_with_path(one, gradient, basis)


def _inputs(views, basis, data, labels):
    """The inputs of every protected kernel, ``[*batch, in, n]``."""
    del labels
    function = tasks.require(data.task, "layer_inputs", "a basis of layer inputs")
    inputs = layer_inputs.by_path(function(data.params, data.batch))

    def one(path, p, u):
        if trees.is_masked(u):
            return u
        shape = _as_matrix(views, path, p, u).shape
        name = checks.path_str(path)
        rows, _ = layer_inputs.weighted_rows(inputs, name, data.weights, shape)
        return rows.mT.astype(u.dtype)

    return jax.tree_util.tree_map_with_path(one, data.params, basis)


@functools.cache
def curvature_pass(views: ViewRule, labels: str) -> tasks.Pass:
    """The pass that finds the curvature in the basis that ``basis_pass`` just found.

    With g_b the gradient of the mean over the n_b items of batch b, and labels drawn
    from the model, ``E[n_b (U^T g_b)^2]`` is the Fisher along each direction: scores of
    different items are independent with mean zero, so the square of their mean is the
    mean square over n_b. No per-example gradient is needed. Batches are averaged with
    weights n_b, which makes it the Fisher of the data set, however it was cut. Where
    gradients are not finite nothing is added.
    """

    def init(state, params):
        return {
            "sum": trees.zeros_like(state.curvature),
            "items": jnp.zeros([], jnp.float32),
        }

    def step(acc, data):
        gradient, items = batch_gradient(data, labels)
        coeffs = coefficients(views, data.earlier["basis"]["basis"], gradient)
        coeffs = trees.align_structure("coefficients", coeffs, acc["sum"])
        total = jax.tree.map(lambda s, c: s + (items * c) ** 2, acc["sum"], coeffs)
        return {"sum": total, "items": acc["items"] + items}

    def finish(acc, state, earlier):
        del state, earlier
        return jax.tree.map(
            lambda s: jnp.where(jnp.isfinite(s), s / acc["items"], 0.0), acc["sum"]
        )

    return tasks.Pass("curvature", init, step, finish)


def batch_gradient(
    data: tasks.PassInput, labels: str
) -> tuple[chex.ArrayTree, chex.Array]:
    """Gradient of a batch's mean loss, and the number of items it averages over.

    Args:
      data: One step of a pass; padded examples have weight 0.
      labels: ``"sampled"``: minus the log-probability of labels drawn from the model;
        ``"empirical"``: ``task.loss``.

    Returns:
      The gradient, like the trainable parameters, and the item count (float32).
    """
    task = data.task
    if labels == "empirical":
        loss = tasks.require(task, "loss", "a basis of empirical gradients")
        statistics.check_loss(loss, data)
        count = data.weights.sum()

        def objective(params):
            return jnp.sum(data.weights * loss(params, data.batch)) / count

        return jax.grad(objective)(data.params), count
    method = "a basis of gradients with sampled labels"
    outputs = tasks.require(task, "outputs", method)(data.params, data.batch)
    drawn = tasks.require(task, "sample_label", method)(outputs, data.key)
    log_prob = tasks.require(task, "log_prob", method)
    shape = statistics.result_shape("log_prob", log_prob, data, drawn)
    items = 1
    for n in shape[1:]:
        items *= n
    count = data.weights.sum() * items

    def negative_mean(params):
        lp = log_prob(params, data.batch, drawn).reshape(shape[0], items).sum(axis=1)
        return -jnp.sum(data.weights * lp) / count

    return jax.grad(negative_mean)(data.params), count
