r"""Which task does an input belong to? Prototypes of frozen features answer.

Means of features for every task (and class), and one covariance that they share, are
kept running over the stream. An input goes to the task of the nearest mean.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks, decompositions
from optax_cl._core.linalg import PRECISION


class Prototypes(NamedTuple):
    """Running means of features, and their scatter around them."""

    mean: chex.Array  # [K, C, d], float32
    count: chex.Array  # [K, C], int32
    scatter: chex.Array  # [d, d], float32: sum of (x - mean)(x - mean)^T


class Router(NamedTuple):
    """Means in the coordinates in which distances are taken."""

    centre: chex.Array  # [d], float32
    whiten: chex.Array | None  # [d, d], float32; None for the identity
    mean: chex.Array  # [K, C, d], float32: whiten^T (mean - centre)
    filled: chex.Array  # [K, C], bool


class Routes(NamedTuple):
    """Where a batch of inputs goes."""

    task: chex.Array  # [B], int32; -1 where there is no task to go to
    weights: chex.Array  # [B, K], float32: sum to one, or all zero where task is -1
    distances: chex.Array  # [B, K], float32, squared; inf for tasks without examples


def prototypes_init(tasks: int, dim: int, *, classes: int = 1) -> Prototypes:
    """Room for the prototypes of several tasks, all empty.

    With ``classes=1`` there is one mean per task. Tasks whose features form several
    clusters want a mean for each: classes, or groups of a clustering.

    **Memory.** ``4 (tasks * classes * dim + dim^2)`` bytes, whatever the stream.

    Args:
      tasks: K, the number of tasks that fit.
      dim: d, the number of features.
      classes: C, the most classes that a task has.

    Returns:
      ``Prototypes``.

    Raises:
      ValueError: If a size is not positive.
      TypeError: If a size is no Python integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_cl import lora
      >>> features = jax.random.normal(jax.random.key(0), (8, 3))
      >>> prototypes = lora.prototypes_init(tasks=4, dim=3)
      >>> prototypes = lora.prototypes_add(prototypes, features, task=0)
      >>> prototypes = lora.prototypes_add(prototypes, features + 9.0, task=1)
      >>> router = lora.mahalanobis(prototypes)
      >>> print(lora.route(router, features[:2] + jnp.array([[0.0], [9.0]])).task)
      [0 1]
    """
    checks.check_positive_int("tasks", tasks)
    checks.check_positive_int("dim", dim)
    checks.check_positive_int("classes", classes)
    return Prototypes(
        mean=jnp.zeros((tasks, classes, dim), jnp.float32),
        count=jnp.zeros((tasks, classes), jnp.int32),
        scatter=jnp.zeros((dim, dim), jnp.float32),
    )


def prototypes_add(
    prototypes: Prototypes,
    features: chex.Array,
    task: chex.Numeric,
    labels: chex.Array | None = None,
) -> Prototypes:
    r"""Adds a batch of features to the running means and the scatter.

    Batches of n examples with mean m join N with mean M by the rule of Chan et al,
    which never subtracts large squares from each other:

    .. math::
      M \leftarrow M + \frac{n}{N+n}\,(m - M), \qquad
      S \leftarrow S + \sum_i (x_i - m)(x_i - m)^\top
        + \frac{N n}{N+n}\,(m - M)(m - M)^\top

    summed over tasks and classes. Batches of any sizes, in any order, give the same up
    to rounding. Take the features from the frozen backbone, without adapters: their
    means would move with the adapters otherwise.

    **Cost.** O(B d^2 + K C d^2).

    Args:
      prototypes: From ``prototypes_init``.
      features: ``[B, d]``.
      task: One integer, or one for each example, ``[B]``.
      labels: Class of each example, ``[B]``, integers; None puts all into class 0.

    Returns:
      New ``Prototypes``. Examples with a task or class out of range (pad a ragged batch
      with -1), or with a feature that is not finite, are left out.

    Raises:
      ValueError: If shapes don't fit, or a Python task id is out of range.
      TypeError: If ids are no integers.

    References:
      Chan, Golub and LeVeque, `Algorithms for Computing the Sample Variance
      <https://doi.org/10.1080/00031305.1983.10483115>`_, 1983
    """
    tasks, _, dim = prototypes.mean.shape
    _check_features(features, dim)
    if checks.is_concrete_number(task) and not 0 <= task < tasks:
        raise ValueError(f"`task` must be in [0, {tasks}), the capacity; got {task}.")
    task = _ids("task", task, features)
    labels = _ids("labels", 0 if labels is None else labels, features)
    return _added(prototypes, features, task, labels)


@jax.jit  # outside jit it would be forty small programs for each size of a batch
def _added(prototypes, features, task, labels):
    tasks, classes, dim = prototypes.mean.shape
    x = features.astype(jnp.float32)
    valid = jnp.isfinite(x).all(-1) & (task >= 0) & (task < tasks)
    valid &= (labels >= 0) & (labels < classes)
    x = jnp.where(valid[:, None], x, 0.0)
    cell = jnp.where(valid, task * classes + labels, 0)

    def sums(values):
        kept = jnp.where(valid.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
        return jax.ops.segment_sum(kept, cell, tasks * classes)

    mean = prototypes.mean.reshape(-1, dim)
    count = prototypes.count.reshape(-1)
    new = sums(jnp.ones_like(cell))
    some = jnp.maximum(new, 1).astype(jnp.float32)[:, None]
    batch_mean = sums(x) / some
    # The first pass rounds by the size of x, the second only by its spread.
    batch_mean += sums(x - batch_mean[cell]) / some
    total = jnp.maximum(count + new, 1)
    share = (new / total).astype(jnp.float32)[:, None]
    shift = jnp.where(new[:, None] > 0, batch_mean - mean, 0.0)
    apart = jnp.where(valid[:, None], x - batch_mean[cell], 0.0)
    between = shift * jnp.sqrt(count[:, None] * share)
    return Prototypes(
        mean=(mean + share * shift).reshape(prototypes.mean.shape),
        count=(count + new).reshape(prototypes.count.shape),
        scatter=prototypes.scatter + _gram(apart) + _gram(between),
    )


def nearest_mean(prototypes: Prototypes) -> Router:
    """Routes by the Euclidean distance to the means.

    For cosine distance give both functions features of unit length.

    Args:
      prototypes: From ``prototypes_add``.

    Returns:
      A ``Router`` for ``route``.
    """
    return _router(prototypes, None)


def mahalanobis(prototypes: Prototypes, shrinkage: chex.Numeric = 0.1) -> Router:
    r"""Routes by the distance in units of the covariance within classes.

    .. math::
      d^2(x, m) = (x - m)^\top \Sigma_\gamma^{-1} (x - m), \qquad
      \Sigma_\gamma = (1 - \gamma)\, \frac SN
        + \gamma\, \frac{\operatorname{tr} S}{N d}\, I

    which is linear discriminant analysis with equal priors: the best rule for Gaussian
    features of a common covariance. Directions along which all classes vary a lot
    count little. Few examples in many dimensions want more shrinkage; it may be 0,
    since directions of next to no variance count as having ``d eps`` of the largest.
    Without any scatter (one example a class) it is ``nearest_mean``.

    **Cost.** One eigendecomposition, O(d^3): make the router once after a task, not
    once a batch.

    Args:
      prototypes: From ``prototypes_add``.
      shrinkage: Gamma, in [0, 1]; a number, an array or a tracer.

    Returns:
      A ``Router`` for ``route``.

    Raises:
      ValueError: If ``shrinkage`` is out of range.

    References:
      Lee et al, `A Simple Unified Framework for Detecting Out-of-Distribution Samples
      and Adversarial Attacks <https://arxiv.org/abs/1807.03888>`_, 2018

      Ledoit and Wolf, `A well-conditioned estimator for large-dimensional covariance
      matrices <https://doi.org/10.1016/S0047-259X(03)00096-4>`_, 2004
    """
    checks.check_number("shrinkage", shrinkage, low=0.0, high=1.0)
    return _whitened(prototypes, shrinkage)


@jax.jit
def _whitened(prototypes, shrinkage):
    dim = prototypes.scatter.shape[-1]
    number = jnp.maximum(jnp.sum(prototypes.count), 1)
    values, vectors = decompositions.eigh(prototypes.scatter / number)
    values = jnp.maximum(values, 0.0)
    values = (1 - shrinkage) * values + shrinkage * jnp.mean(values)
    largest = jnp.max(values)
    # Below this an eigenvalue is rounding, and its inverse would drown the others.
    floored = jnp.maximum(values, dim * jnp.finfo(values.dtype).eps * largest)
    safe = jnp.where(largest > 0, floored, 1.0)
    return _router(prototypes, vectors / jnp.sqrt(safe)[None, :])


def route(
    router: Router, features: chex.Array, *, temperature: chex.Numeric = 1.0
) -> Routes:
    r"""Sends every input to the task of the nearest prototype.

    The distance to a task is that to the nearest of its classes; the soft weights are
    :math:`\operatorname{softmax}(-d^2 / 2\tau)` over tasks, which with ``mahalanobis``
    and :math:`\tau = 1` are the odds of the nearest Gaussians. Tasks and classes
    without examples never win. Feed ``task`` to ``select`` under ``jax.vmap``: an input
    that goes nowhere (-1: no prototype is stored, or its features are not finite) gets
    the base model there. For a whole batch from one task, sum ``distances`` over the
    batch and take the smallest.

    Report the share of right routes beside the accuracy: a wrong route is an error of
    another kind than forgetting.

    Args:
      router: From ``nearest_mean`` or ``mahalanobis``.
      features: ``[B, d]``, from the same backbone as the prototypes.
      temperature: Tau, above 0.

    Returns:
      ``Routes``.

    Raises:
      ValueError: If shapes don't fit or ``temperature`` is not positive.
    """
    checks.check_number("temperature", temperature, low=0.0, open_low=True)
    _check_features(features, router.centre.shape[0])
    return _routes(router, features, temperature)


@jax.jit  # or a call outside jit would compile its loop anew
def _routes(router, features, temperature):
    x = features.astype(jnp.float32) - router.centre[None, :]
    if router.whiten is not None:
        x = jnp.matmul(x, router.whiten, precision=PRECISION)

    # Not |x|^2 - 2 x m + |m|^2, which loses small distances between long vectors; one
    # mean at a time, so that no [B, K, C, d] array is formed.
    def to_mean(mean):
        return jnp.sum((x - mean[None, :]) ** 2, axis=-1)

    tasks, classes, dim = router.mean.shape
    squared = jax.lax.map(to_mean, router.mean.reshape(-1, dim))
    squared = squared.reshape(tasks, classes, -1)
    squared = jnp.where(router.filled[..., None], squared, jnp.inf)
    distances = jnp.min(squared, axis=1).T
    known = jnp.isfinite(x).all(-1) & router.filled.any()
    distances = jnp.where(known[:, None], distances, jnp.inf)
    nearest = jnp.argmin(distances, axis=-1).astype(jnp.int32)
    logits = jnp.where(known[:, None], -distances / (2 * temperature), 0.0)
    weights = jnp.where(known[:, None], jax.nn.softmax(logits, axis=-1), 0.0)
    return Routes(jnp.where(known, nearest, -1), weights, distances)


@jax.jit
def _router(prototypes: Prototypes, whiten: chex.Array | None) -> Router:
    filled = prototypes.count > 0
    centre = jnp.sum(jnp.where(filled[..., None], prototypes.mean, 0.0), axis=(0, 1))
    centre = centre / jnp.maximum(jnp.sum(filled), 1)
    mean = prototypes.mean - centre[None, None, :]
    if whiten is not None:
        mean = jnp.matmul(mean, whiten, precision=PRECISION)
    return Router(centre, whiten, mean, filled)


def _gram(rows: chex.Array) -> chex.Array:
    """Sum of ``x x^T`` over rows: ``[B, d] -> [d, d]``."""
    return jnp.matmul(rows.T, rows, precision=PRECISION)


def _check_features(features: Any, dim: int) -> None:
    if jnp.ndim(features) != 2 or jnp.shape(features)[1] != dim:
        raise ValueError(
            f"`features` must have shape [B, {dim}], one row for each example; got "
            f"{jnp.shape(features)}."
        )


def _ids(name: str, ids: Any, features: chex.Array) -> chex.Array:
    """Ids as int32, one for each example."""
    if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
        raise TypeError(f"`{name}` must hold integers; got {jnp.result_type(ids)}.")
    if jnp.ndim(ids) and jnp.shape(ids) != (features.shape[0],):
        raise ValueError(
            f"`{name}` must be one integer or one for each of the {features.shape[0]} "
            f"examples; got shape {jnp.shape(ids)}."
        )
    return jnp.broadcast_to(jnp.asarray(ids, jnp.int32), features.shape[:1])
