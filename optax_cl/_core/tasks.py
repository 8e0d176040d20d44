"""Task boundaries: three calls that work for any chain.

At the end of a task: ``collect`` streams over the task's data and computes the
statistics that the methods in the optimizer state ask for; ``end_task`` folds them into
that state. At the start of the next: ``begin_task`` re-syncs whatever depends on the
parameters. How a method takes part stands in ``boundaries``, and what a task is in
``task_functions``; the names of both, and of ``memories``, can be had from here.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import boundaries, checks, streaming, trees
from optax_cl._core.boundaries import Boundary as Boundary
from optax_cl._core.boundaries import Pass as Pass
from optax_cl._core.boundaries import PassInput as PassInput
from optax_cl._core.boundaries import map_moments as map_moments
from optax_cl._core.boundaries import register_boundary as register_boundary
from optax_cl._core.boundaries import register_moments as register_moments
from optax_cl._core.memories import MemoryDescription as MemoryDescription
from optax_cl._core.memories import describe as describe
from optax_cl._core.memories import grow as grow
from optax_cl._core.memories import map_states as map_states
from optax_cl._core.memories import reset_state as reset_state
from optax_cl._core.task_functions import Task as Task
from optax_cl._core.task_functions import classification as classification
from optax_cl._core.task_functions import regression as regression
from optax_cl._core.task_functions import require as require

MOMENT_POLICIES = ("keep", "reset", "project")


class Statistics(NamedTuple):
    """What ``collect`` computed; hand it to ``end_task`` as it is."""

    num_examples: chex.Array  # float32 [], examples seen in one pass
    results: dict[str, Any]  # by pass name, with the state's index where not shared


def collect(
    opt_state: optax.OptState,
    params: optax.Params,
    batches: Iterable[chex.ArrayTree] | chex.ArrayTree,
    *,
    task: Task,
    key: chex.PRNGKey,
    frozen: chex.ArrayTree | None = None,
    stacked: bool = False,
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
        have dependent passes (at most twice at present). With ``stacked``, one tree of
        arrays ``[batches, B, ...]``.
      task: Pure functions of the task in evaluation mode; see ``Task``.
      key: For labels sampled from the model.
      frozen: Other arrays that the functions of ``task`` read (batch statistics, frozen
        weights). If given, they get ``(params, frozen)`` where they otherwise get
        ``params``. Arrays they merely close over would be compiled in, and a change of
        them would compile anew.
      stacked: Whether ``batches`` are stacked. Each pass is then one ``jax.lax.scan``,
        which computes the same in a single call, and may stand inside ``jit``, ``vmap``
        or ``scan`` (where a list of tracers would be unrolled into as many copies of a
        backward pass).

    Returns:
      ``Statistics`` for ``end_task``.

    Raises:
      TypeError: If an argument is of another kind: a transformation, one batch, a seed.
      ValueError: If ``batches`` is empty, or an exhausted iterator in a second pass; if
        a function of ``task`` is missing, with the method that needs it; if leading
        axes disagree; if a memory with ``overflow="error"`` is full, or is not known to
        have room because this is being traced.

    Warns (``UserWarning``), outside jit, if the sums over the data are not finite.

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
    _check_state("collect", opt_state, params)
    if not isinstance(task, Task):
        raise TypeError(
            "`task` must be an `optax_cl.Task`, such as `optax_cl.classification` and "
            f"`optax_cl.regression` make; got {task!r} of type {type(task).__name__}."
        )
    checks.check_key("key", key)
    states = list(boundaries.find(opt_state))
    parts = [boundaries.of(s) for s in states]
    plans = [b.passes(s) for b, s in zip(parts, states, strict=True)]
    for state, boundary in zip(states, parts, strict=True):
        boundary.check(state)
    depth = max((len(plan) for plan in plans), default=0)
    results: dict[str, Any] = {}
    if depth == 0:
        return Statistics(jnp.zeros([], jnp.float32), results)
    if stacked:
        streaming.check_stacked(batches)
    else:
        streaming.check_batches(batches, depth)
    stream = streaming.scan if stacked else streaming.loop
    trainable, hidden = streaming.split_trainable(params, parts, states)
    num_examples = jnp.zeros([], jnp.float32)
    for level in range(depth):
        jobs: dict[str, tuple[Pass, int]] = {}
        for index, plan in enumerate(plans):
            if level < len(plan):
                name = streaming.result_name(plan[level], index)
                if name not in results:
                    jobs[name] = (plan[level], index)
        if not jobs:
            continue
        fixed = streaming.Fixed(
            states={n: None if p.shared else states[i] for n, (p, i) in jobs.items()},
            earlier={
                name: {
                    q.name: results[streaming.result_name(q, i)]
                    for q in plans[i][:level]
                }
                for name, (_, i) in jobs.items()
            },
            trainable=trainable,
            hidden=hidden,
            frozen=frozen,
        )
        named = tuple((name, p) for name, (p, _) in jobs.items())
        level_key = jax.random.fold_in(key, level)
        new, finite, num_examples = stream(named, task, fixed, batches, level_key)
        checks.warn_not_finite("What `collect` summed up is", finite)
        results |= new
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
    state donated. What is not finite enters no memory; outside jit, parameters that
    are not are warned of (``UserWarning``).

    Call it once a task: every call counts, and one more with the same statistics
    weighs the task twice. Under ``optax.MultiSteps`` or ``apply_every`` micro-steps of
    an unfinished update are dropped, whatever the policy: their gradient is the old
    task's, and would be half of the new task's first update.

    Args:
      opt_state: The optimizer state at the end of the task.
      params: The parameters at the end of the task.
      statistics: What ``collect`` returned for this state and task.
      moments: What happens to the optimizer's own averages: ``"keep"`` (default, as
        the published methods do); ``"reset"`` (to zero, count included: the second
        moment forgets the old task's scale); ``"project"`` (first moments lose their
        component in the protected subspace *just consolidated*, so that stale momentum
        does not push into it; where that would make a step larger than the leaf's
        largest, the second moment is raised. They must stand inside the owner of the
        subspace, as in ``protect(rank, scale_by_decoupled_adam(), project())``). Which
        averages: see ``reset_state``.

    Returns:
      The new optimizer state.

    Raises:
      TypeError: If an argument is of another kind, the transformation for its state.
      ValueError: For an unknown policy, for ``"project"`` without a protected
        subspace or with all moments outside its owner, for statistics that were not
        collected for this state, or (outside jit) if a memory with ``overflow="error"``
        is full.
    """
    checks.check_choice("moments", moments, MOMENT_POLICIES)
    _check_state("end_task", opt_state, params)
    if not isinstance(statistics, Statistics):
        raise TypeError(
            "`statistics` must be what `collect` returned for this state; got "
            f"{statistics!r} of type {type(statistics).__name__}."
        )
    finite = checks.all_finite(params) if any(boundaries.find(opt_state)) else ()
    checks.warn_not_finite("`params` are", finite)
    index = -1
    owners = projected = 0

    def consolidate(state):
        nonlocal index, owners
        index += 1
        boundary = boundaries.of(state)
        boundary.check(state)
        results = {}
        for p in boundary.passes(state):
            name = streaming.result_name(p, index)
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
            owners += 1

            def project(tree):
                nonlocal projected
                projected += 1
                return boundary.project(state, tree)

            return boundaries.project_moments(project, state)
        return state

    opt_state = boundaries.map_states(consolidate, opt_state)
    opt_state = boundaries.drop_accumulated(opt_state)
    if moments == "reset":
        return reset_state(opt_state)
    if moments == "project":
        boundaries.warn_of_unknown_moments(opt_state, "`moments='project'`")
    if moments == "project" and not owners:
        raise ValueError(
            "`moments='project'` needs a protected subspace, but the optimizer holds "
            "none. Use `optax_cl.protect(...)`, or `moments='reset'` or `'keep'`."
        )
    if (
        moments == "project"
        and not projected
        and boundaries.has_first_moments(opt_state)
    ):
        raise ValueError(
            "`moments='project'` reaches moments inside the owner of the subspace, but "
            "all moments stand outside it. Put them in: `optax_cl.protect(rank, "
            "scale_by_decoupled_adam(), project())`; or use `moments='reset'` or "
            "`'keep'`."
        )
    return opt_state


def begin_task(
    opt_state: optax.OptState, params: optax.Params, *, reset_nu_max: bool = False
) -> optax.OptState:
    """Re-syncs what depends on the parameters at the start of a task. Pure.

    Call it before the first step of a task, and after any change of the parameters made
    outside the optimizer (a merge, a re-initialisation, pruning): master copies and
    path starts are taken anew, and what ``optax.MultiSteps`` or ``apply_every`` has
    accumulated for an unfinished update, at other parameters, is dropped.

    Args:
      opt_state: The optimizer state.
      params: The parameters with which the task begins.
      reset_nu_max: Whether AMSGrad's running maxima are set to zero.

    Returns:
      The new optimizer state, same structure and shapes.
    """
    _check_state("begin_task", opt_state, params)
    opt_state = boundaries.map_states(
        lambda s: boundaries.of(s).begin_task(s, params), opt_state
    )
    opt_state = boundaries.drop_accumulated(opt_state)
    if reset_nu_max:
        opt_state = boundaries.map_states(
            lambda s: s._replace(nu_max=trees.zeros_like(s.nu_max)),
            opt_state,
            lambda n: hasattr(n, "nu_max"),
        )
    return opt_state


def _check_state(call: str, opt_state: Any, params: Any) -> None:
    """Raises for mix-ups in which no memory would be found, and nothing would happen.

    A state without any memory is legal: the calls are there for whatever is chained.
    """
    if any(map(_is_nnx_variable, jax.tree.leaves(opt_state, is_leaf=_is_nnx_variable))):
        raise ValueError(
            "`opt_state` holds the variables of an `nnx.Optimizer`, not arrays. Give "
            f"the optimizer and its model to `optax_cl.flax.{call}`; or convert the "
            "state and the parameters with `nnx.as_pure`."
        )
    if isinstance(opt_state, optax.GradientTransformation):
        raise TypeError(
            "`opt_state` must be the state that `tx.init(params)` made; got the "
            "transformation itself."
        )
    state = next(boundaries.find(params), None)
    if state is not None:
        raise ValueError(
            f"`params` holds an optimizer state, {type(state).__name__}. The order is "
            "`(opt_state, params, ...)`; parameters have no state among them."
        )


def _is_nnx_variable(node: Any) -> bool:
    """Whether ``node`` is what an ``nnx.Optimizer`` keeps its state in."""
    # By name, since Flax need not be there.
    return any(
        base.__name__ == "OptState" and base.__module__.startswith("flax.")
        for base in type(node).__mro__
    )
