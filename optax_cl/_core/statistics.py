r"""Diagonal Fisher estimates, streamed over a task's data in bounded memory.

With the score :math:`s(x, y) = \nabla_\theta \log p_\theta(y \mid x)` of one example,
each estimator averages elementwise squares of scores at the end-of-task parameters:

===============  =================================================================
``"exact"``      :math:`\frac1N\sum_x\sum_c p(c\mid x)\,s(x,c)^2`, the Fisher itself
``"sampled"``    one label drawn from the model for each item; unbiased for exact
``"empirical"``  the data's labels; not an estimate of the Fisher in general
``"predicted"``  the most likely label; biased, more so where the model is uncertain
``"batched"``    squares of *batch* gradients; legacy, depends on the batch size
===============  =================================================================

**Labels per example.** Where an example has several labels (the tokens of a sequence),
the score of the example is the sum over its items, and the average is over *items*:

.. math:: F = \frac{1}{\#\text{items}} \sum_x \Big(\sum_{t} s(x, y_t)\Big)^2 ,

which has the units of the Hessian of the mean loss over items. With one label per
example it is the table above.

**What "batched" computes.** If the scores of single examples have mean :math:`m` and
variance :math:`s^2`, squaring gradients of the *mean* loss over batches of size b and
averaging over batches gives :math:`s^2/b + m^2` where the other estimators give
:math:`s^2 + m^2`: near an optimum about b times too little, so that a strength tuned
for it fits nothing else. It is kept to compare with results obtained that way. (Two
more forms are in use and not offered: squares of gradients of the summed loss over the
number of examples, :math:`s^2 + b m^2`, and over the number of batches, :math:`b s^2 +
b^2 m^2`.)
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks, per_example, tasks, trees

ESTIMATORS = ("exact", "sampled", "empirical", "predicted", "batched")


class Fisher(NamedTuple):
    """A diagonal Fisher estimate and what it was averaged over."""

    diagonal: chex.ArrayTree  # like params, float32, >= 0; MaskedNode where hidden
    num_items: chex.Array  # float32 [], labels: examples times labels per example
    num_examples: chex.Array  # float32 []


class _Sums(NamedTuple):
    squares: chex.ArrayTree  # like params, float32
    terms: chex.Array  # float32 [], what the sum is divided by
    num_items: chex.Array  # float32 []
    num_examples: chex.Array  # float32 []


def check_estimator(estimator: str) -> None:
    """Raises for an unknown estimator, and warns of the legacy one."""
    checks.check_choice("estimator", estimator, ESTIMATORS)
    if estimator == "batched":
        checks.warn(
            "`estimator='batched'` squares gradients of whole batches: its value "
            "depends on the batch size (variance/b + mean^2) and is not an estimate of "
            "the Fisher. Use 'exact', 'sampled' or 'empirical' unless you compare with "
            "results obtained this way."
        )


@functools.cache
def fisher_pass(estimator: str) -> tasks.Pass:
    """The shared pass over a task's data that computes a diagonal Fisher.

    Args:
      estimator: One of ``ESTIMATORS``; see the module for what each computes and
        ``fisher_diagonal`` for what it needs of the task.

    Returns:
      A ``Pass`` whose result is a ``Fisher``; the same object for the same estimator,
      so that all methods that ask for it share one computation and one compilation.
    """
    checks.check_choice("estimator", estimator, ESTIMATORS)

    def add(sums, data):
        if estimator == "batched":
            return _add_batched(sums, data)
        squares, items = add_scores(estimator, data, _squares, sums.squares)
        return _advance(sums, squares, data.weights, items=items)

    def init(state, params):
        del state
        # Distinct arrays: the accumulator is donated, and a buffer can be given once.
        terms, num_items, num_examples = (jnp.zeros([], jnp.float32) for _ in range(3))

        squares = per_example.zeros("a diagonal Fisher", params)
        return _Sums(squares, terms, num_items, num_examples)

    def finish(sums, state, earlier):
        del state, earlier
        terms = jnp.maximum(sums.terms, 1.0)
        diagonal = jax.tree.map(lambda s: s / terms, sums.squares)
        return Fisher(diagonal, sums.num_items, sums.num_examples)

    return tasks.Pass(f"fisher/{estimator}", init, add, finish, shared=True)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FisherRules:
    """Which Fisher a method wants at a boundary: a static node in its state."""

    estimator: str = "exact"
    weight_by_count: bool = False


def make_rules(estimator: str, weight_by_count: bool) -> FisherRules:
    """Checks the arguments of a method whose importance is a Fisher."""
    check_estimator(estimator)
    if not isinstance(weight_by_count, bool):
        raise TypeError(f"`weight_by_count` must be a bool; got {weight_by_count!r}.")
    return FisherRules(estimator, weight_by_count)


class _Request(NamedTuple):
    """An optimizer state of nothing but the wish for a Fisher."""

    params: chex.ArrayTree
    # Optax's type of a state is a tree of arrays; a static node needs `Any` in it.
    fisher: Any  # FisherRules


tasks.register_boundary(
    _Request,
    tasks.Boundary(
        passes=lambda state: (fisher_pass(state.fisher.estimator),),
        like=lambda state: state.params,
    ),
)


def fisher_diagonal(
    params: optax.Params,
    batches: Iterable[chex.ArrayTree],
    *,
    task: tasks.Task,
    key: chex.PRNGKey,
    estimator: str = "exact",
) -> Fisher:
    r"""Diagonal of the Fisher information over a data set, at ``params``.

    ``"exact"`` is :math:`F = \frac1N \sum_x \sum_c p_\theta(c\mid x)\,
    \big(\nabla_\theta \log p_\theta(c\mid x)\big)^2`; the module
    ``optax_cl._core.statistics`` has the table of all five and the rule for sequences.

    Batch sizes do not matter (but for ``"batched"``): squares are taken example by
    example, and a ragged last batch is masked. Give the task's functions in evaluation
    mode and, with several heads, the active head only: a log-softmax over all heads
    spreads importance over heads that were never trained.

    **Cost.** Per example one backward pass (``"exact"``: one per class). Memory: the
    result, and up to 256 MB of per-example gradients at a time, or those of one example
    if the model is larger.

    Args:
      params: Where to evaluate; leaves that are not floating point are hidden.
      batches: Trees of arrays with a leading axis of examples.
      task: ``"exact"`` needs ``outputs``, logits ``[B, C]`` of one label per example;
        ``"sampled"`` needs ``outputs``, ``sample_label`` and ``log_prob``;
        ``"predicted"`` needs ``outputs`` ``[B, ..., C]`` and ``log_prob``;
        ``"empirical"`` and ``"batched"`` need ``loss``, the negative log-likelihood of
        an example, averaged over its items; how many it has is seen from the shape of
        ``log_prob`` (one if ``outputs``, ``sample_label`` or ``log_prob`` is missing).
      key: For ``"sampled"``; the others ignore it.
      estimator: ``"exact"``, ``"sampled"``, ``"empirical"``, ``"predicted"`` or
        ``"batched"``.

    Returns:
      A ``Fisher``: ``diagonal`` like params (float32, non-negative), ``num_items`` and
      ``num_examples``.

    Raises:
      ValueError: For an unknown estimator, a function the task does not have, outputs
        of a wrong shape, or no batches.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_cl._core import tasks
      >>> from optax_cl.penalties import fisher_diagonal
      >>> task = tasks.classification(lambda p, b: b[0] @ p, lambda b: b[1])
      >>> batches = [(jnp.array([[1.0, 2.0]]), jnp.array([0]))]
      >>> fisher = fisher_diagonal(
      ...     jnp.zeros((2, 2)), batches, task=task, key=jax.random.key(0))
      >>> print(fisher.diagonal)  # x^2 p (1 - p)
      [[0.25 0.25]
       [1.   1.  ]]

    References:
      van de Ven, `On the Computation of the Fisher Information in Continual Learning
      <https://arxiv.org/abs/2502.11756>`_, 2025

      Kunstner et al, `Limitations of the Empirical Fisher Approximation
      <https://arxiv.org/abs/1905.12558>`_, 2019
    """
    check_estimator(estimator)
    request = _Request(params, FisherRules(estimator))
    stats = tasks.collect(request, params, batches, task=task, key=key)
    return stats.results[fisher_pass(estimator).name]


# --- One batch -----------------------------------------------------------------------


def add_scores(
    estimator: str,
    data: tasks.PassInput,
    of_score: Callable[[Any], Any],
    total: Any,
) -> tuple[Any, int]:
    """Adds what is wanted of the scores of a batch, in the mean over labels.

    Args:
      estimator: ``"exact"``, ``"sampled"``, ``"empirical"`` or ``"predicted"``: which
        labels.
      data: One step of a pass.
      of_score: ``score -> tree``, quadratic in the score, a tree like the parameters.
      total: The sum so far, a tree like that.

    Returns:
      The sum with that of each example added, and how many labels an example has.
    """
    if estimator == "exact":
        return _add_exact(data, of_score, total), 1
    return _add_labelled(estimator, data, of_score, total)


def _add_exact(data, of_score, total):
    outputs = tasks.require(data.task, "outputs", "the Fisher estimator 'exact'")
    _check_classes("exact", data)
    shape = result_shape("outputs", outputs, data)
    if len(shape) != 2:
        raise ValueError(
            "the Fisher estimator 'exact' sums over the classes of one label per "
            f"example, so `task.outputs` must give logits [B, C]; got shape {shape}. "
            "Use 'sampled' or 'empirical'."
        )

    def one(example):
        def logits(params):
            return outputs(params, per_example.lead(example))[0].astype(jnp.float32)

        z, pull_back = jax.vjp(logits, data.params)
        p = jax.nn.softmax(z)

        # The score of class c is J^T (e_c - p): one backward pass a class, one forward
        # pass in all, and nothing of size classes times parameters.
        def add_class(total, c):
            (score,) = pull_back(jax.nn.one_hot(c, z.size, dtype=z.dtype) - p)
            return jax.tree.map(lambda t, v: t + p[c] * v, total, of_score(score)), None

        zeros = jax.tree.map(jnp.zeros_like, total)
        return jax.lax.scan(add_class, zeros, jnp.arange(z.size))[0]

    return per_example.sum_over_examples(one, data.batch, data.weights, total, copies=2)


def _add_labelled(estimator, data, of_score, total):
    method = f"the Fisher estimator {estimator!r}"
    if estimator == "empirical":
        loss = tasks.require(data.task, "loss", method)
        check_loss(loss, data)
        items = _items(data)

        def log_prob(params, example):
            return -items * loss(params, per_example.lead(example)).sum()

        rows = data.batch
    else:
        of_label = tasks.require(data.task, "log_prob", method)
        outputs_of = tasks.require(data.task, "outputs", method)
        outputs = outputs_of(data.params, data.batch)
        if estimator == "predicted":
            _check_classes(estimator, data)
            if outputs.ndim < 2:
                raise ValueError(
                    "the Fisher estimator 'predicted' takes the most likely class, so "
                    "`task.outputs` must give logits [B, ..., C]; got shape "
                    f"{outputs.shape}."
                )
            labels = jnp.argmax(outputs, axis=-1)
        else:
            labels = tasks.require(data.task, "sample_label", method)(outputs, data.key)
        items = math.prod(result_shape("log_prob", of_label, data, labels)[1:])

        def log_prob(params, row):
            example, label = row
            return of_label(
                params, per_example.lead(example), per_example.lead(label)
            ).sum()

        rows = (data.batch, labels)

    def one(row):
        return of_score(jax.grad(log_prob)(data.params, row))

    return per_example.sum_over_examples(one, rows, data.weights, total), items


def _add_batched(sums: _Sums, data: tasks.PassInput) -> _Sums:
    loss = tasks.require(data.task, "loss", "the Fisher estimator 'batched'")
    check_loss(loss, data)
    count = data.weights.sum()

    def mean_loss(params):
        losses = loss(params, data.batch)
        return jnp.sum(losses * data.weights) / jnp.maximum(count, 1.0)

    squares = jax.tree.map(
        jnp.add, sums.squares, _squares(jax.grad(mean_loss)(data.params))
    )
    new = _advance(sums, squares, data.weights, items=_items(data))
    return new._replace(terms=sums.terms + 1.0)


def _advance(sums: _Sums, squares: Any, weights: chex.Array, items: int) -> _Sums:
    count = weights.sum()
    return _Sums(
        squares=squares,
        terms=sums.terms + items * count,
        num_items=sums.num_items + items * count,
        num_examples=sums.num_examples + count,
    )


def _labels(data: tasks.PassInput) -> jax.ShapeDtypeStruct | None:
    """What a label of this batch looks like; None if the task does not say."""
    outputs, sample = data.task.outputs, data.task.sample_label
    if outputs is None or sample is None:
        return None
    return jax.eval_shape(lambda: sample(outputs(data.params, data.batch), data.key))


def _items(data: tasks.PassInput) -> int:
    """Labels per example, as ``log_prob`` counts them."""
    labels = _labels(data)
    if labels is None or data.task.log_prob is None:
        return 1
    return math.prod(result_shape("log_prob", data.task.log_prob, data, labels)[1:])


def _check_classes(estimator: str, data: tasks.PassInput) -> None:
    labels = _labels(data)
    if labels is not None and not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"the Fisher estimator {estimator!r} goes over classes, but "
            f"`task.sample_label` gives labels of dtype {labels.dtype}. Use 'sampled' "
            "or 'empirical'."
        )


def check_loss(loss: Callable[..., Any], data: tasks.PassInput) -> None:
    """Raises unless the loss of a batch is one number per example."""
    if len(shape := result_shape("loss", loss, data)) != 1:
        raise ValueError(
            "`task.loss` must give one number per example, shape [B]; got shape "
            f"{shape}. Take the mean over an example's items."
        )


def result_shape(
    name: str, function: Callable[..., Any], data: tasks.PassInput, *args: Any
) -> tuple[int, ...]:
    """The shape of what a task's function gives, refused without its examples' axis."""
    result = jax.eval_shape(function, data.params, data.batch, *args)
    if not isinstance(result, jax.ShapeDtypeStruct):
        raise TypeError(
            f"`task.{name}` must give one array, [{data.weights.size}, ...] for this "
            f"batch; got {type(result).__name__} with {checks.paths_str(result)}. "
            "Leave out what else the network returns."
        )
    shape = result.shape
    if shape[:1] != data.weights.shape:
        raise ValueError(
            f"`task.{name}` must keep the axis of examples: its result must have shape "
            f"[{data.weights.size}, ...] for this batch; got {shape}. Is there a mean "
            "over the batch in it, or did `batches` get one batch instead of a list?"
        )
    return shape


def _squares(score: Any) -> Any:
    """Elementwise squares, float32 or wider."""

    def square(s):
        return jnp.square(s.astype(trees.importance_dtype(s.dtype)))

    return jax.tree.map(square, score)
