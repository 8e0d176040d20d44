"""Task boundaries: three calls that work for any chain.

At the end of a task: ``collect`` streams over the task's data and computes the
statistics that the methods in the optimizer state ask for; ``end_task`` folds them into
that state. At the start of the next: ``begin_task`` re-syncs whatever depends on the
parameters. A method takes part by registering one ``Boundary`` for its state class;
states are found inside ``chain``, ``masked``, ``partition``, ``MultiSteps``,
``apply_if_finite`` and ``inject_hyperparams``, wherever they stand.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cl._core import checks, trees


class Task(NamedTuple):
    """What a method may need to know of a task: pure functions of a batch.

    A batch is any tree of arrays with a leading axis of B examples. Give the functions
    in *evaluation mode*: no dropout, fixed batch statistics, active head only. None
    means "not available"; a method that needs it says so. ``classification`` makes all
    of them out of two.

    Attributes:
      loss: ``(params, batch) -> [B]``, the training loss of each example.
      outputs: ``(params, batch) -> [B, ...]``, what the network computes (logits).
      log_prob: ``(params, batch, labels) -> [B]`` or ``[B, items]``, log-probability
        of each label; ``items`` are labels of one example (the tokens of a sequence).
      sample_label: ``(outputs, key) -> labels``, drawn from the model's distribution.
      layer_inputs: ``(params, batch) -> tree``, for each kernel the inputs it
        multiplies, ``[B, ..., in]``, in the structure of params (None elsewhere).
    """

    loss: Callable[..., chex.Array] | None = None
    outputs: Callable[..., chex.Array] | None = None
    log_prob: Callable[..., chex.Array] | None = None
    sample_label: Callable[..., chex.Array] | None = None
    layer_inputs: Callable[..., chex.ArrayTree] | None = None


def classification(
    logits: Callable[[Any, Any], chex.Array], labels: Callable[[Any], chex.Array]
) -> Task:
    """A ``Task`` for a network with categorical outputs (classes, or next tokens).

    Args:
      logits: ``(params, batch) -> [B, C]``, or ``[B, items, C]`` for several labels an
        example; in evaluation mode.
      labels: ``batch -> [B]`` or ``[B, items]``, integers.

    Returns:
      A ``Task`` whose loss is the mean cross-entropy over an example's items. Build it
      once and keep it: ``collect`` compiles anew for functions it has not seen.

    Example:
      >>> import jax.numpy as jnp, optax_cl
      >>> task = optax_cl.classification(
      ...     lambda params, batch: batch["x"] @ params["w"], lambda batch: batch["y"])
      >>> batch = {"x": jnp.eye(2), "y": jnp.array([0, 1])}
      >>> print(task.loss({"w": jnp.zeros((2, 2))}, batch).round(3))
      [0.693 0.693]
    """

    def log_prob(params, batch, chosen):
        log_probs = jax.nn.log_softmax(logits(params, batch).astype(jnp.float32))
        return jnp.take_along_axis(log_probs, chosen[..., None], axis=-1)[..., 0]

    def loss(params, batch):
        lp = log_prob(params, batch, labels(batch))
        return -lp.reshape(lp.shape[0], -1).mean(axis=1)

    return Task(
        loss=loss,
        outputs=logits,
        log_prob=log_prob,
        sample_label=lambda outputs, key: jax.random.categorical(key, outputs),
    )


def regression(
    predictions: Callable[[Any, Any], chex.Array],
    targets: Callable[[Any], chex.Array],
) -> Task:
    r"""A ``Task`` for least squares: a Gaussian likelihood of unit variance.

    The loss of an example is :math:`\frac12 \|f(x) - y\|^2`, so that the Fisher of
    ``log_prob`` is its Gauss-Newton matrix. Scaling the loss scales the curvature.

    Args:
      predictions: ``(params, batch) -> [B, ...]``, in evaluation mode.
      targets: ``batch -> [B, ...]``.

    Returns:
      A ``Task``. Build it once and keep it, as with ``classification``.

    Example:
      >>> import jax.numpy as jnp, optax_cl
      >>> task = optax_cl.regression(lambda w, batch: batch[0] @ w, lambda b: b[1])
      >>> print(task.loss(jnp.zeros((2, 1)), (jnp.eye(2), jnp.array([[2.0], [0.0]]))))
      [2. 0.]
    """

    def log_prob(params, batch, values):
        error = (predictions(params, batch) - values).astype(jnp.float32)
        return -0.5 * (error.reshape(error.shape[0], -1) ** 2).sum(axis=1)

    def sample(outputs, key):
        return outputs + jax.random.normal(key, outputs.shape, outputs.dtype)

    return Task(
        loss=lambda params, batch: -log_prob(params, batch, targets(batch)),
        outputs=predictions,
        log_prob=log_prob,
        sample_label=sample,
    )


def require(task: Task, name: str, method: str) -> Callable[..., Any]:
    """The function ``name`` of ``task``, or an error naming who needs it."""
    function = getattr(task, name)
    if function is None:
        raise ValueError(
            f"`task.{name}` is None, but {method} needs it. Give it to "
            "`optax_cl.Task(...)`, or build the task with `optax_cl.classification`."
        )
    return function


class PassInput(NamedTuple):
    """What one step of a pass over the task's data may read."""

    state: Any  # the method's state; None for shared passes
    params: chex.ArrayTree  # trainable leaves; MaskedNode where hidden
    batch: chex.ArrayTree  # [B, ...]
    weights: chex.Array  # float32 [B], 0 for padding, else 1
    key: chex.PRNGKey
    task: Task  # its functions take `params` as given here, and `frozen=`
    earlier: dict[str, Any]  # results of this method's earlier passes
    frozen: Any = None  # what `collect` got as `frozen`


class Pass(NamedTuple):
    """One streaming pass over a task's data, as three pure functions.

    Attributes:
      name: Names the result; two states that ask for a shared pass of the same name
        get the same result, computed once.
      init: ``(state, params) -> accumulator``.
      step: ``(accumulator, PassInput) -> accumulator``, jitted.
      finish: ``(accumulator, state, earlier) -> result``, jitted.
      shared: Whether the pass reads nothing of the state.

    The functions must be the same objects from call to call (module level, or made by
    a cached factory), since compilation is keyed by them.
    """

    name: str
    init: Callable[[Any, chex.ArrayTree], Any]
    step: Callable[[Any, PassInput], Any]
    finish: Callable[[Any, Any, dict[str, Any]], Any] = lambda acc, state, earlier: acc
    shared: bool = False


class Boundary(NamedTuple):
    """How one state class takes part in task boundaries.

    Attributes:
      passes: ``state -> (Pass, ...)``, in order; a later one may read the results of
        those before it.
      end_task: ``(state, params, results) -> state``, pure; same structure and shapes.
      begin_task: ``(state, params) -> state``, pure; same structure and shapes.
      like: ``state -> tree`` like params, with holes where the method hides leaves.
      usage: ``state -> (tasks stored, capacity or None)``; None for averages that are
        no memory of tasks.
      check: ``state -> None``; raises, outside jit, if another task will not fit.
      grow: ``(state, capacity) -> state`` with more room; None if nothing can grow.
      project: ``(state, tree) -> tree``, takes the protected subspace out of a tree
        like params; None for methods without one.
    """

    passes: Callable[[Any], tuple[Pass, ...]] = lambda state: ()
    end_task: Callable[[Any, Any, dict[str, Any]], Any] = lambda state, p, results: (
        state
    )
    begin_task: Callable[[Any, Any], Any] = lambda state, params: state
    like: Callable[[Any], Any] | None = None
    usage: Callable[[Any], tuple[Any, int | None]] | None = None
    check: Callable[[Any], None] = lambda state: None
    grow: Callable[[Any, int], Any] | None = None
    project: Callable[[Any, chex.ArrayTree], chex.ArrayTree] | None = None


_BOUNDARIES: dict[type, Boundary] = {}
# State class -> (fields of first moments, fields of other accumulators).
_MOMENTS: dict[type, tuple[tuple[str, ...], tuple[str, ...]]] = {
    optax.ScaleByAdamState: (("mu",), ("nu",)),
    optax.ScaleByAmsgradState: (("mu",), ("nu", "nu_max")),
    optax.ScaleByLionState: (("mu",), ()),
    optax.ScaleByRmsState: ((), ("nu",)),
    optax.TraceState: (("trace",), ()),
    optax.EmaState: (("ema",), ()),
}

MOMENT_POLICIES = ("keep", "reset", "project")


def register_boundary(state_class: type, boundary: Boundary) -> None:
    """Makes states of ``state_class`` (a NamedTuple) take part in task boundaries."""
    _BOUNDARIES[state_class] = boundary


def register_moments(
    state_class: type, first: tuple[str, ...], other: tuple[str, ...] = ()
) -> None:
    """Tells the moments policies which fields of a state are moments.

    Args:
      state_class: A NamedTuple.
      first: Fields that average gradients (reset, and projected).
      other: Fields that average something else (reset only).
    """
    _MOMENTS[state_class] = (first, other)


class Statistics(NamedTuple):
    """What ``collect`` computed; hand it to ``end_task`` as it is."""

    num_examples: chex.Array  # float32 [], examples seen in one pass
    results: dict[str, Any]  # by pass name, with the state's index where not shared


def collect(
    opt_state: optax.OptState,
    params: optax.Params,
    batches: Iterable[chex.ArrayTree],
    *,
    task: Task,
    key: chex.PRNGKey,
    frozen: chex.ArrayTree | None = None,
) -> Statistics:
    """Streams over a finished task's data and computes what the methods ask for.

    Each method in ``opt_state`` names its passes (a Fisher estimate, a Gram of
    gradients, the curvature in a basis just found); equal ones are computed once. Every
    batch is one jitted step; a ragged last batch is padded and masked, so nothing is
    compiled for it. Only leaves that some method reads are differentiated.

    Args:
      opt_state: Any optimizer state. Without a method that needs data, no batch is
        read.
      params: The parameters at the end of the task.
      batches: Batches of the task just finished: trees of arrays with one leading axis.
        A list, or another iterable that can be gone through as often as the methods
        have dependent passes (at most twice at present).
      task: Pure functions of the task in evaluation mode; see ``Task``.
      key: For labels sampled from the model.
      frozen: Other arrays that the functions of ``task`` read (batch statistics, frozen
        weights). If given, they get ``(params, frozen)`` where they otherwise get
        ``params``. Arrays they merely close over would be compiled in, and a change of
        them would compile anew.

    Returns:
      ``Statistics`` for ``end_task``.

    Raises:
      ValueError: If ``batches`` is empty, or an exhausted iterator in a second pass; if
        a function of ``task`` is missing, with the method that needs it; if leading
        axes disagree.

    Cost. One pass per dependency level; see each method for the work of a step.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl
      >>> task = optax_cl.classification(lambda p, b: b[0] @ p, lambda b: b[1])
      >>> tx = optax_cl.chain(optax_cl.ewc(1.0), optax_cl.scale_by_decoupled_adam())
      >>> params = jnp.zeros((2, 2))
      >>> opt_state = tx.init(params)
      >>> batches = [(jnp.eye(2), jnp.array([0, 1]))]
      >>> stats = optax_cl.collect(
      ...     opt_state, params, batches, task=task, key=jax.random.key(0))
      >>> opt_state = optax_cl.end_task(opt_state, params, stats)
    """
    states = list(_find(opt_state))
    boundaries = [_BOUNDARIES[type(s)] for s in states]
    plans = [b.passes(s) for b, s in zip(boundaries, states, strict=True)]
    for state, boundary in zip(states, boundaries, strict=True):
        boundary.check(state)
    depth = max((len(plan) for plan in plans), default=0)
    results: dict[str, Any] = {}
    if depth == 0:
        return Statistics(jnp.zeros([], jnp.float32), results)
    batches = _reiterable(batches, depth)
    trainable, hidden = _split_trainable(params, boundaries, states)
    num_examples = jnp.zeros([], jnp.float32)
    for level in range(depth):
        jobs: dict[str, tuple[Pass, int]] = {}
        for index, plan in enumerate(plans):
            if level < len(plan):
                name = _result_name(plan[level], index)
                if name not in results:
                    jobs[name] = (plan[level], index)
        if not jobs:
            continue
        selected = {
            name: None if p.shared else states[i] for name, (p, i) in jobs.items()
        }
        earlier = {
            name: {q.name: results[_result_name(q, i)] for q in plans[i][:level]}
            for name, (_, i) in jobs.items()
        }
        static = tuple((name, p) for name, (p, _) in jobs.items())
        accs = {name: p.init(selected[name], trainable) for name, p in static}
        count = 0
        num_examples = jnp.zeros([], jnp.float32)
        for batch, weights in _padded(batches):
            accs, num_examples = _step(
                static,
                task,
                accs,
                num_examples,
                selected,
                earlier,
                trainable,
                hidden,
                frozen,
                batch,
                weights,
                jax.random.fold_in(jax.random.fold_in(key, level), count),
            )
            count += 1
        if count == 0:
            raise ValueError(
                "`batches` yielded nothing"
                + (" in the second pass" if level else "")
                + ". Give `collect` a non-empty list of batches of the finished task."
            )
        results |= _finish(static, accs, selected, earlier)
    return Statistics(num_examples, results)


def end_task(
    opt_state: optax.OptState,
    params: optax.Params,
    statistics: Statistics,
    *,
    moments: str = "keep",
) -> optax.OptState:
    """Consolidates the finished task in every memory of ``opt_state``. Pure.

    Memories first, then the moments policy. Structure, shapes and dtypes stay, so a
    train step compiled before the boundary serves after it. May be jitted, with the
    state donated.

    Args:
      opt_state: The optimizer state at the end of the task.
      params: The parameters at the end of the task.
      statistics: What ``collect`` returned for this state and task.
      moments: What happens to the optimizer's own averages: ``"keep"`` (default, as
        the published methods do); ``"reset"`` (to zero, count included: the second
        moment forgets the old task's scale); ``"project"`` (first moments lose their
        component in the protected subspace *just consolidated*, so that stale momentum
        does not push into it).

    Returns:
      The new optimizer state.

    Raises:
      ValueError: For an unknown policy, for ``"project"`` without a protected
        subspace, for statistics that were not collected for this state, or (outside
        jit) if a memory with ``overflow="error"`` is full.
    """
    checks.check_choice("moments", moments, MOMENT_POLICIES)
    index = -1
    projected = False

    def consolidate(state):
        nonlocal index, projected
        index += 1
        boundary = _BOUNDARIES[type(state)]
        boundary.check(state)
        results = {}
        for p in boundary.passes(state):
            name = _result_name(p, index)
            if name not in statistics.results:
                raise ValueError(
                    f"`statistics` hold nothing for {type(state).__name__} "
                    f"({name!r} is missing; there are "
                    f"{sorted(statistics.results)}). Call `collect` with the same "
                    "optimizer state first."
                )
            results[p.name] = statistics.results[name]
        state = boundary.end_task(state, params, results)
        if moments == "project" and boundary.project is not None:
            projected = True
            state = _map_moments(
                functools.partial(boundary.project, state), state, first_only=True
            )
        return state

    opt_state = _map_states(consolidate, opt_state)
    if moments == "reset":
        return reset_state(opt_state)
    if moments == "project" and not projected:
        raise ValueError(
            "`moments='project'` needs a protected subspace, but the optimizer holds "
            "none. Use `optax_cl.protect(...)`, or `moments='reset'` or `'keep'`."
        )
    return opt_state


def begin_task(
    opt_state: optax.OptState, params: optax.Params, *, reset_nu_max: bool = False
) -> optax.OptState:
    """Re-syncs what depends on the parameters at the start of a task. Pure.

    Call it before the first step of a task, and after any change of the parameters made
    outside the optimizer (a merge, a re-initialisation, pruning): master copies and
    path starts are taken anew.

    Args:
      opt_state: The optimizer state.
      params: The parameters with which the task begins.
      reset_nu_max: Whether AMSGrad's running maxima are set to zero.

    Returns:
      The new optimizer state, same structure and shapes.
    """
    opt_state = _map_states(
        lambda s: _BOUNDARIES[type(s)].begin_task(s, params), opt_state
    )
    if reset_nu_max:
        opt_state = _map_states(
            lambda s: s._replace(nu_max=trees.zeros_like(s.nu_max)),
            opt_state,
            lambda n: hasattr(n, "nu_max"),
        )
    return opt_state


def reset_state(
    opt_state: optax.OptState, mask: chex.ArrayTree | None = None
) -> optax.OptState:
    """Sets the optimizer's own averages to zero; memories of tasks stay.

    Args:
      opt_state: The optimizer state.
      mask: Which entries: a tree like params of booleans, one per leaf or arrays that
        broadcast to the leaf; None means all, step counts included (a masked reset
        keeps the counts, which are shared by all leaves).

    Returns:
      The new optimizer state, same structure and shapes.

    Raises:
      ValueError: If ``mask`` does not fit the averages; those of a factored second
        moment are reset leaf by leaf only.
    """
    if mask is None:
        return _map_moments(trees.zeros_like, opt_state, reset_count=True)

    def zero(path, x, m):
        sizes = zip(np.shape(m)[::-1], x.shape[::-1], strict=False)
        if np.ndim(m) > x.ndim or any(a not in (1, b) for a, b in sizes):
            raise ValueError(
                f"`mask` must broadcast to what it resets; at `{checks.path_str(path)}`"
                f" got shape {np.shape(m)} for an average of shape {x.shape}. Pass one "
                "boolean for the leaf."
            )
        return jnp.where(m, 0, x).astype(x.dtype)

    def reset(tree):
        aligned = trees.align_structure("mask", mask, tree)
        return jax.tree_util.tree_map_with_path(zero, tree, aligned)

    return _map_moments(reset, opt_state)


def map_states(
    function: Callable[[Any], Any], opt_state: optax.OptState, state_class: type
) -> optax.OptState:
    """Applies ``function`` to every state of a class, wherever it stands in a chain.

    Args:
      function: ``state -> state``.
      opt_state: Any optimizer state.
      state_class: The NamedTuple class to look for, subclasses included.

    Returns:
      The optimizer state with the results in place.

    Raises:
      ValueError: If no state of that class is there.
    """
    found = False

    def visit(state):
        nonlocal found
        found = True
        return function(state)

    result = _map_states(visit, opt_state, lambda n: isinstance(n, state_class))
    if not found:
        raise ValueError(
            f"`opt_state` holds no {state_class.__name__}. Is the method in the chain?"
        )
    return result


class MemoryDescription(NamedTuple):
    """One memory in an optimizer state, as ``describe`` reports it."""

    method: str  # name of the state class
    path: str  # where it stands in the optimizer state
    bytes: int  # of its own arrays, without memories and moments inside it
    tasks: int | None  # tasks stored
    capacity: int | None  # tasks that fit; None if unlimited

    @property
    def left(self) -> int | None:
        """How many more tasks fit; None if unlimited."""
        if self.capacity is None or self.tasks is None:
            return None
        return self.capacity - self.tasks


def describe(opt_state: optax.OptState) -> tuple[MemoryDescription, ...]:
    """Tells which memories an optimizer state holds, outside jit.

    Args:
      opt_state: Any optimizer state.

    Returns:
      One ``MemoryDescription`` for each memory, in the order of the chain.
    """
    rows = []
    for path, state in _find_with_path(opt_state):
        boundary = _BOUNDARIES[type(state)]
        if boundary.usage is None:  # an average, not a memory of tasks
            continue
        tasks, capacity = boundary.usage(state)
        rows.append(
            MemoryDescription(
                method=type(state).__name__.removesuffix("State"),
                path=path,
                bytes=_own_bytes(state),
                tasks=None if tasks is None else int(tasks),
                capacity=capacity,
            )
        )
    return tuple(rows)


def grow(opt_state: optax.OptState, capacity: int) -> optax.OptState:
    """Enlarges the memories that have a fixed capacity for tasks, outside jit.

    Shapes change: the next train step compiles anew, and checkpoints of the old
    capacity no longer restore into the new state.

    Args:
      opt_state: The optimizer state.
      capacity: The new number of tasks that fit.

    Returns:
      The enlarged optimizer state.

    Raises:
      ValueError: If nothing there can grow, or a capacity would shrink.
    """
    checks.check_positive_int("capacity", capacity)
    grown = False

    def enlarge(state):
        nonlocal grown
        boundary = _BOUNDARIES[type(state)]
        if boundary.grow is None:
            return state
        _, old = boundary.usage(state) if boundary.usage else (None, None)
        if old is None:
            return state
        if capacity < old:
            raise ValueError(f"`capacity` can't shrink: got {capacity}, it is {old}.")
        grown = True
        return boundary.grow(state, capacity)

    result = _map_states(enlarge, opt_state)
    if not grown:
        raise ValueError("`opt_state` holds no memory with a capacity that can grow.")
    return result


# --- Finding states ------------------------------------------------------------------


def _registered(node: Any) -> bool:
    return type(node) in _BOUNDARIES


def _map_states(function, tree, wanted=_registered):
    """Applies ``function`` to wanted states, outer ones before what they hold."""

    def visit(node):
        if not wanted(node):
            return node
        node = function(node)
        return type(node)(*(_map_states(function, field, wanted) for field in node))

    return jax.tree.map(visit, tree, is_leaf=wanted)


def _find_with_path(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_registered):
        if _registered(node):
            here = prefix + jax.tree_util.keystr(path)
            yield here, node
            for name, field in zip(node._fields, node, strict=True):
                yield from _find_with_path(field, f"{here}.{name}")


def _find(tree: Any) -> Iterator[Any]:
    return (state for _, state in _find_with_path(tree))


def _own_bytes(state: Any) -> int:
    """Bytes of a state without the memories and the moments inside it."""

    def foreign(node):
        return _registered(node) or type(node) in _MOMENTS

    nodes = jax.tree.leaves(tuple(state), is_leaf=foreign)
    return sum(_bytes(n) for n in nodes if not foreign(n))


def _map_moments(function, tree, first_only=False, reset_count=False):
    def visit(state):
        first, other = _MOMENTS[type(state)]
        fields = first if first_only else first + other
        new = {f: function(getattr(state, f)) for f in fields}
        if reset_count and "count" in state._fields:
            new["count"] = jnp.zeros_like(state.count)
        return state._replace(**new)

    return _map_states(visit, tree, lambda n: type(n) in _MOMENTS)


def _bytes(tree: Any) -> int:
    return sum(
        int(np.prod(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if hasattr(x, "dtype") and not jnp.issubdtype(x.dtype, jax.dtypes.extended)
    )


# --- Streaming over data -------------------------------------------------------------


def _result_name(p: Pass, index: int) -> str:
    return p.name if p.shared else f"{p.name}[{index}]"


def _reiterable(batches: Any, depth: int) -> Iterable[Any]:
    if depth > 1 and iter(batches) is batches:
        raise ValueError(
            "`batches` is an iterator, which can be gone through once, but the methods "
            f"in the optimizer need {depth} passes. Pass a list of batches."
        )
    return batches


def _padded(batches: Iterable[Any]) -> Iterator[tuple[Any, np.ndarray]]:
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


def _split_trainable(params, boundaries, states):
    """Leaves that some method reads and that can be differentiated, and the others."""

    def differentiable(x):
        return jnp.issubdtype(jnp.result_type(x), jnp.inexact)

    # A mask may have hidden a whole subtree by one node.
    reads = [
        trees.align_structure("a memory", b.like(s), params)
        for b, s in zip(boundaries, states, strict=True)
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


def _bind(task: Task, hidden: Any, frozen: Any) -> Task:
    """The task's functions of the trainable leaves alone.

    A pass may give another ``frozen``, to differentiate with respect to it: the memory
    of an adapter method lives on the weights under the adapters.
    """

    def bind(function):
        def bound(trainable, *args, frozen=frozen):
            params = _join(trainable, hidden)
            return function(params if frozen is None else (params, frozen), *args)

        return bound

    with_params = {
        name: None if getattr(task, name) is None else bind(getattr(task, name))
        for name in ("loss", "outputs", "log_prob", "layer_inputs")
    }
    return task._replace(**with_params)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _step(
    jobs,
    task,
    accs,
    num_examples,
    states,
    earlier,
    trainable,
    hidden,
    frozen,
    batch,
    weights,
    key,
):
    task = _bind(task, hidden, frozen)
    new = {}
    for name, p in jobs:
        data = PassInput(
            state=states[name],
            params=trainable,
            batch=batch,
            weights=weights,
            key=key,
            task=task,
            earlier=earlier[name],
            frozen=frozen,
        )
        new[name] = p.step(accs[name], data)
    return new, num_examples + weights.sum()


@functools.partial(jax.jit, static_argnums=0)
def _finish(jobs, accs, states, earlier):
    return {name: p.finish(accs[name], states[name], earlier[name]) for name, p in jobs}
