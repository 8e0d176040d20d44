"""Passes over a task's data: batch by batch from the host, or in one scan."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cl._core import checks, trees
from optax_cl._core.boundaries import Pass, PassInput
from optax_cl._core.task_functions import Task, check_classes, check_labels

Jobs = tuple[tuple[str, Pass], ...]  # name of the result, and the pass


class Fixed(NamedTuple):
    """What stays the same during a pass."""

    states: dict[str, Any]  # by job; None for shared passes
    earlier: dict[str, dict[str, Any]]  # by job: results of its method's earlier passes
    trainable: chex.ArrayTree  # parameters; MaskedNode where hidden
    hidden: chex.ArrayTree  # the other parameters
    frozen: Any


def result_name(p: Pass, index: int) -> str:
    """What the result of a pass is called, for the state of that index."""
    return p.name if p.shared else f"{p.name}[{index}]"


def check_batches(batches: Any, depth: int) -> None:
    """Raises unless ``batches`` are several, and can be gone through so many times."""
    whole = isinstance(batches, Mapping | np.ndarray | jax.Array)
    if whole or not isinstance(batches, Iterable):
        raise TypeError(
            f"`batches` must be a list of batches; got {type(batches).__name__}. For "
            "one batch write `[batch]`; for arrays [batches, B, ...] pass "
            "`stacked=True`."
        )
    if isinstance(batches, list | tuple):
        # One batch (inputs, labels) is easily given for a list of batches.
        for i, batch in enumerate(batches):
            if _kind(batch) != _kind(batches[0]):
                raise ValueError(
                    "`batches` must be a list of batches of one kind, but batches[0] "
                    f"is {_shapes(batches[0])} and batches[{i}] is {_shapes(batch)}. "
                    "If this is one batch, write `[batch]`."
                )
    if depth > 1 and iter(batches) is batches:
        raise ValueError(
            "`batches` is an iterator, which can be gone through once, but the methods "
            f"in the optimizer need {depth} passes. Pass a list of batches."
        )


def _kind(batch: Any) -> Any:
    leaves, structure = jax.tree.flatten(batch)
    return structure, [np.ndim(x) for x in leaves]


def _shapes(batch: Any) -> str:
    named = [
        f"{checks.path_str(path)}: {np.shape(x)}"
        for path, x in jax.tree_util.tree_leaves_with_path(batch)
    ]
    return "{" + ", ".join(named) + "}"


def check_stacked(batches: Any) -> None:
    """Raises unless ``batches`` are arrays ``[batches, B, ...]``."""
    leaves = jax.tree_util.tree_leaves_with_path(batches)
    shapes = {checks.path_str(path): np.shape(x) for path, x in leaves}
    leading = {shape[:2] for shape in shapes.values()}
    if len(leading) != 1 or any(len(two) < 2 or 0 in two for two in leading):
        raise ValueError(
            "with `stacked=True`, `batches` must be one tree of arrays with two "
            "common, non-empty leading axes [batches, B, ...]; got leaves of shapes "
            f"{shapes}. For a list of batches leave `stacked` out."
        )


def padded_batches(batches: Iterable[Any]) -> Iterator[tuple[Any, np.ndarray]]:
    """Batches of one size, the last padded with its first row, and their weights."""
    size = 0
    for batch in batches:
        leaves = jax.tree.leaves(batch)
        sizes = {x.shape[0] if np.ndim(x) else 0 for x in leaves}
        if len(sizes) != 1 or 0 in sizes:
            shapes = [np.shape(x) for x in leaves]
            raise ValueError(
                "a batch must be a tree of arrays with one common, non-empty leading "
                f"axis; got leaves of shapes {shapes}."
            )
        (n,) = sizes
        size = max(n, size)
        weights = np.ones([size], np.float32)
        if n < size:
            weights[n:] = 0.0
            rows = np.where(np.arange(size) < n, np.arange(size), 0)
            batch = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        yield batch, weights


def split_trainable(params, parts, states):
    """Leaves that some method reads and that can be differentiated, and the others."""

    def differentiable(x):
        return jnp.issubdtype(jnp.result_type(x), jnp.inexact)

    def aligned(state, like):
        # A mask may have hidden a whole subtree by one node.
        try:
            return trees.align_structure("a memory", like, params)
        except ValueError as error:
            raise ValueError(
                "`params` must be the parameters that the optimizer state was made "
                f"for: got {checks.paths_str(params)}, and {type(state).__name__} has "
                f"{checks.paths_str(like)}. An `nnx.Optimizer` and its model go to "
                "`optax_cl.flax.collect`."
            ) from error

    reads = [
        aligned(s, b.like(s))
        for b, s in zip(parts, states, strict=True)
        if b.like is not None
    ]

    def visit(p, *nodes):
        wanted = not nodes or any(not trees.is_hole(n) for n in nodes)
        return p if wanted and differentiable(p) else optax.MaskedNode()

    trainable = jax.tree.map(visit, params, *reads)
    hidden = jax.tree.map(
        lambda p, t: p if trees.is_masked(t) else optax.MaskedNode(), params, trainable
    )
    return trainable, hidden


def _join(trainable, hidden):
    return jax.tree.map(
        lambda t, h: h if trees.is_masked(t) else t,
        trainable,
        hidden,
        is_leaf=trees.is_masked,
    )


def _bind(task: Task, fixed: Fixed) -> Task:
    """The task's functions of the trainable leaves alone.

    A pass may give another ``frozen``, to differentiate with respect to it: the memory
    of an adapter method lives on the weights under the adapters.
    """

    def bind(name, function):
        def bound(trainable, batch, *args, frozen=fixed.frozen):
            params = _join(trainable, fixed.hidden)
            both = params if frozen is None else (params, frozen)
            try:
                return function(both, batch, *args)
            except Exception as error:
                given = "params" if frozen is None else "(params, frozen)"
                error.add_note(
                    f"`task.{name}` raised this, called by `collect` with `{given}` of "
                    f"shapes {_shapes(both)} and a batch of shapes {_shapes(batch)}."
                )
                raise

        return bound

    with_params = {
        name: None if getattr(task, name) is None else bind(name, getattr(task, name))
        for name in ("loss", "outputs", "log_prob", "layer_inputs")
    }
    return task._replace(**with_params)


def _labels(
    task: Task, fixed: Fixed, batch: Any
) -> tuple[Callable[..., Any] | None, int]:
    """``task.labels`` and the number of classes; None where nothing can be judged.

    Raises for labels of another kind. Only the first of several passes looks at them.
    """
    labels, outputs = task.labels, _bind(task, fixed).outputs
    if any(fixed.earlier.values()) or labels is None or outputs is None:
        return None, 0
    logits = jax.eval_shape(outputs, fixed.trainable, batch)
    if logits.ndim < 2 or logits.shape[:1] != jax.tree.leaves(batch)[0].shape[:1]:
        return None, 0  # the passes will tell what they need
    check_labels(jax.eval_shape(labels, batch), logits)
    return labels, logits.shape[-1]


def _start(jobs: Jobs, fixed: Fixed) -> dict[str, Any]:
    return {name: p.init(fixed.states[name], fixed.trainable) for name, p in jobs}


def _own(accs: Any, fixed: Fixed) -> Any:
    """The accumulators, copied where they are someone else's arrays: they are donated.

    A method of the user's own may start from an array of its state, or twice from one.
    """
    taken = {id(x) for x in jax.tree.leaves(fixed)}

    def own(x):
        if id(x) in taken:
            return jnp.array(x, copy=True)
        taken.add(id(x))
        return x

    return jax.tree.map(own, accs)


def _add(jobs, task, accs, fixed, batch, weights, key):
    """Every job's accumulator after one more batch; ``task`` is bound."""
    new = {}
    for name, p in jobs:
        data = PassInput(
            state=fixed.states[name],
            params=fixed.trainable,
            batch=batch,
            weights=weights,
            key=key,
            task=task,
            earlier=fixed.earlier[name],
            frozen=fixed.frozen,
        )
        new[name] = p.step(accs[name], data)
    return new


def _results(jobs, accs, fixed):
    """Every job's result, and whether what it came from is finite."""
    results = {
        name: p.finish(accs[name], fixed.states[name], fixed.earlier[name])
        for name, p in jobs
    }
    return results, checks.all_finite(accs)


_finish = jax.jit(_results, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _step(jobs, task, accs, num_examples, fixed, batch, weights, key):
    accs = _add(jobs, _bind(task, fixed), accs, fixed, batch, weights, key)
    return accs, num_examples + weights.sum()


def loop(
    jobs: Jobs, task: Task, fixed: Fixed, batches: Iterable[Any], key: chex.PRNGKey
) -> tuple[dict[str, Any], chex.ArrayTree, chex.Array]:
    """One pass from the host, each batch one jitted call.

    Returns:
      The jobs' results by name, whether the sums they come from are finite, and the
      number of examples.

    Raises:
      ValueError: If there is no batch, or a label is no class.
    """
    accs = _own(_start(jobs, fixed), fixed)
    count, num_examples = 0, jnp.zeros([], jnp.float32)
    labels, num_classes = None, 0
    for batch, weights in padded_batches(batches):
        if count == 0:
            labels, num_classes = _labels(task, fixed, batch)
        if labels is not None:
            check_classes(labels(batch), num_classes)
        step_key = jax.random.fold_in(key, count)
        accs, num_examples = _step(
            jobs, task, accs, num_examples, fixed, batch, weights, step_key
        )
        count += 1
    if count == 0:
        second = any(fixed.earlier.values())
        raise ValueError(
            "`batches` yielded nothing"
            + (" in the second pass" if second else "")
            + ". Give `collect` a non-empty list of batches of the finished task."
        )
    results, finite = _finish(jobs, accs, fixed)
    return results, finite, num_examples


def scan(
    jobs: Jobs, task: Task, fixed: Fixed, batches: chex.ArrayTree, key: chex.PRNGKey
) -> tuple[dict[str, Any], chex.ArrayTree, chex.Array]:
    """The same pass over stacked batches, as one scan with the same keys."""
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batches)
    labels, num_classes = _labels(task, fixed, first)
    if labels is not None:
        check_classes(jax.vmap(labels)(batches), num_classes)
    return _scan(jobs, task, fixed, batches, key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan(jobs, task, fixed, batches, key):
    count, size = jax.tree.leaves(batches)[0].shape[:2]
    weights = jnp.ones([size], jnp.float32)
    bound = _bind(task, fixed)

    def step(accs, item):
        index, batch = item
        step_key = jax.random.fold_in(key, index)
        return _add(jobs, bound, accs, fixed, batch, weights, step_key), None

    accs, _ = jax.lax.scan(step, _start(jobs, fixed), (jnp.arange(count), batches))
    results, finite = _results(jobs, accs, fixed)
    return results, finite, jnp.full([], count * size, jnp.float32)
