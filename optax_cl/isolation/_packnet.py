"""PackNet: tasks share one network, each on weights of its own and those before."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cl._core import boundaries, checks, tasks, trees
from optax_cl._core.matrices import (
    ViewRule,
    from_matrix,
    to_matrix,
    tree_views,
    view_rule,
)

_MOST_TASKS = 255  # what an owner of eight bits can name


class PacknetState(NamedTuple):
    """State of :func:`packnet`."""

    # Like params, uint8: the task that a weight belongs to, from 1, or 0 if it is free.
    # MaskedNode at leaves that are not floating point.
    owner: chex.ArrayTree
    task: chex.Array  # uint8 [], the current task, from 1
    rules: Any  # PacknetRules, static


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PacknetRules:
    """What pruning must know; part of the state's structure, without leaves."""

    matrices: ViewRule


def packnet(
    *, matrices: ViewRule | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Lets a step move the current task's weights only.

    With the owner :math:`o_i \in \{0, 1, 2, \dots\}` of every weight, 0 for free ones,
    and the current task k,

    .. math:: \tilde u_i = u_i\ [o_i = k] .

    All weights belong to the first task until ``packnet_prune`` frees some; they are
    then zero. ``end_task`` gives the free ones to the next task, which reads all
    weights and trains those. The loop for each task:

        train
        opt_state, params = packnet_prune(opt_state, params, 0.5)
        train a little more                     # the rest makes up for what went
        opt_state = optax_cl.end_task(opt_state, params, statistics)

    **What holds.** ``packnet_params(opt_state, params, task)``, what a task's inputs
    are to be computed with, never changes after the task, to the bit (but for the sign
    of a zero). Owners partition the weights, and free ones are zero. Biases, scales and
    all that is no matrix belong to the first task and are fixed after it. What is no
    parameter is not seen: keep batch statistics for each task, or fix them after the
    first.

    **Placement.** Last: whatever comes behind it moves weights of other tasks, weight
    decay and momentum included. (A mask on gradients, before them, would not do.)
    Moments of weights that changed hands are of another task; ``end_task(...,
    moments="reset")`` clears them.

    **Memory.** One byte a parameter. **Work per step.** One read of it.
    ``packnet_prune`` sorts every kernel.

    Args:
      matrices: ``matrix_views(...)``: which leaves are kernels, to be shared out among
        tasks; stacked ones are pruned each by itself. None is ``matrix_views()``, which
        refuses embeddings.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``PacknetState``.

    Raises:
      ValueError: At ``init`` for an embedding without a decision; by ``end_task``,
        outside jit, after 255 tasks; at trace time for updates of other shapes than the
        state was made for. (It warns if no weight is free for another task.)
      TypeError: At ``init`` for complex parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl
      >>> from optax_cl import isolation
      >>> tx = optax.chain(optax.sgd(0.1), isolation.packnet())
      >>> params = {"kernel": jnp.array([[3.0, -1.0], [2.0, 4.0]])}
      >>> state = tx.init(params)
      >>> state, params = isolation.packnet_prune(state, params, 0.5)
      >>> print(params["kernel"])
      [[3. 0.]
       [0. 4.]]
      >>> statistics = optax_cl.collect(  # of nothing: it reads no data
      ...     state, params, [jnp.ones(1)], task=optax_cl.Task(), key=jax.random.key(0))
      >>> state = optax_cl.end_task(state, params, statistics)
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params["kernel"])
      [[ 3.  -0.1]
       [-0.1  4. ]]
      >>> print(isolation.packnet_params(state, params, 1)["kernel"])
      [[3. 0.]
       [0. 4.]]

    References:
      Mallya and Lazebnik, `PackNet: Adding Multiple Tasks to a Single Network by
      Iterative Pruning <https://arxiv.org/abs/1711.05769>`_, 2018

    Differs from the authors' code:
      1. It masks the update, not the gradient, so that weight decay and momentum need
         not be zero.
      2. It prunes exactly the number of weights that was asked for, ties included.
    """
    rules = PacknetRules(view_rule(matrices))

    def init_fn(params):
        tree_views(rules.matrices, params)  # refuses what it can't tell

        def first(path, p):
            checks.check_real("an owner", path, p)
            if not jnp.issubdtype(jnp.result_type(p), jnp.inexact):
                return optax.MaskedNode()
            return jnp.ones_like(p, dtype=jnp.uint8)

        owner = jax.tree_util.tree_map_with_path(first, params)
        return PacknetState(owner, jnp.ones([], jnp.uint8), rules)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        trees.check_fits("updates", updates, state.owner)

        def hold(u, owner):
            return jnp.where(owner == state.task, u, jnp.zeros_like(u))

        return _map(hold, updates, state.owner), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def packnet_prune(
    opt_state: optax.OptState, params: optax.Params, fraction: chex.Numeric
) -> tuple[optax.OptState, optax.Params]:
    r"""Frees the weights of the current task that are smallest, kernel by kernel.

    Of the n weights that the task owns in a kernel, the ``round(fraction * n)`` of
    smallest :math:`|w|` become zero and free. Pure; jittable, ``fraction`` traced.
    That number is Python's where ``fraction`` and n are known. Inside ``jit``, and for
    an array, the product is taken in float32: one that ends in about a half may be
    rounded the other way, and of more than 2^24 weights it may be off by a few.

    Args:
      opt_state: Any optimizer state with a ``PacknetState``, at any depth.
      params: The parameters after the task's training.
      fraction: Share to free, in [0, 1]. The authors' 0.5 to 0.75 a task.

    Returns:
      The optimizer state and the parameters with the pruned weights zero.

    Raises:
      ValueError: If there is no ``PacknetState`` or more than one, for a fraction out
        of range, or parameters that do not fit.
    """
    checks.check_number("fraction", fraction, low=0.0, high=1.0)
    state = _find(opt_state)
    params_seen = trees.align_structure("params", params, state.owner)
    trees.check_fits("params", params_seen, state.owner)

    def prune(path, owner, p):
        view = state.rules.matrices(checks.path_str(path), p.shape)
        if view is None:
            return owner
        mine = to_matrix(owner, view) == state.task
        size = jnp.abs(to_matrix(p, view))
        # The task's own before all others, whatever number they hold; equals by their
        # order, so that the count is exact, ties or not.
        keys = [x.reshape(*x.shape[:-2], -1) for x in (size, ~mine)]
        rank = jnp.argsort(jnp.lexsort(keys, axis=-1), axis=-1).reshape(size.shape)
        share = _share(fraction, jnp.sum(mine, axis=(-2, -1), keepdims=True))
        freed = from_matrix(mine & (rank < share), view, p.shape)
        return jnp.where(freed, jnp.uint8(0), owner)

    owner = jax.tree_util.tree_map_with_path(prune, state.owner, params_seen)
    params = _map(_zero_where_free, params, owner)
    opt_state = boundaries.map_states(
        lambda s: s._replace(owner=owner), opt_state, _is_packnet
    )
    return opt_state, params


def packnet_params(
    opt_state: optax.OptState, params: optax.Params, task: chex.Numeric
) -> optax.Params:
    """The parameters that a task's inputs are computed with.

    Args:
      opt_state: Any optimizer state with a ``PacknetState``, at any depth.
      params: The parameters, at that task or any later one.
      task: From 1 to 255, in the order of training; may be traced, for a task id
        inside jit, where no number is refused: from one past the last on all weights
        that have an owner are read, and below 1 none.

    Returns:
      The parameters with the weights of later tasks, and free ones, zero.

    Raises:
      ValueError: If there is no ``PacknetState`` or more than one, for a task out of
        range, or parameters that do not fit.
      TypeError: For a task that is no integer.
    """
    checks.check_number("task", task, low=1, high=_MOST_TASKS)
    if not jnp.issubdtype(jnp.result_type(task), jnp.integer):
        raise TypeError(f"`task` must be an integer, from 1; got {task!r}.")
    state = _find(opt_state)
    trees.check_fits("params", params, state.owner)
    # Beside eight bits a Python integer would become one of eight bits.
    task = jnp.asarray(task, jnp.int32)

    def of_task(p, owner):
        return jnp.where((owner > 0) & (owner <= task), p, jnp.zeros_like(p))

    return _map(of_task, params, state.owner)


def _share(fraction, count):
    """``round(fraction * count)``, int32, as exactly as what is known allows."""
    known = checks.is_concrete_number(fraction) and not isinstance(
        count, jax.core.Tracer
    )
    if known and count.is_fully_addressable:  # not one of several processes
        share = np.round(float(fraction) * np.asarray(count))
    else:
        share = jnp.round(jnp.asarray(fraction, jnp.float32) * count)
    return share.astype(jnp.int32)


def _zero_where_free(p, owner):
    return jnp.where(owner > 0, p, jnp.zeros_like(p))


def _map(function: Callable[..., Any], tree: Any, owner: Any) -> Any:
    """Maps over leaves that have owners; the others pass unchanged."""
    owner = trees.align_structure("owner", owner, tree)
    return jax.tree.map(
        lambda x, o: x if trees.is_hole(x) or trees.is_hole(o) else function(x, o),
        tree,
        owner,
        is_leaf=trees.is_hole,
    )


def _is_packnet(node: Any) -> bool:
    return isinstance(node, PacknetState)


def _find(opt_state: optax.OptState) -> PacknetState:
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_packnet)]
    found = [s for s in found if _is_packnet(s)]
    if len(found) != 1:
        raise ValueError(
            f"`opt_state` must hold one PacknetState; found {len(found)}. Put one "
            "`packnet()` last in the chain, behind `optax.partition` if there is one."
        )
    return found[0]


# --- Task boundary -------------------------------------------------------------------


def _end_task(state, params, results):
    del params, results
    free = jnp.array(False)
    for owner in jax.tree.leaves(state.owner):
        free |= jnp.any(owner == 0)
    if not isinstance(free, jax.core.Tracer) and not free:
        checks.warn(
            "`packnet` has no weight free for another task, which would learn nothing. "
            "Call `opt_state, params = packnet_prune(opt_state, params, fraction)` "
            "before `end_task`. If this was the last task, all is well."
        )
    # A task too many, which only `jit` lets pass, spoils the one before it and no more.
    task = jnp.minimum(state.task, _MOST_TASKS - 1) + jnp.uint8(1)

    def take(owner):
        # The states of several seeds may be stacked in one: their axes are the first.
        new = jnp.expand_dims(task, tuple(range(task.ndim, owner.ndim)))
        return jnp.where(owner == 0, new, owner)

    return state._replace(owner=jax.tree.map(take, state.owner), task=task)


def _check(state):
    if isinstance(state.task, jax.core.Tracer):
        return
    if np.max(np.asarray(state.task)) >= _MOST_TASKS:  # inside jit, too
        raise ValueError(
            f"`packnet` can tell {_MOST_TASKS} tasks apart, and this is the last: it "
            "can be used, but not ended."
        )


tasks.register_boundary(
    PacknetState,
    tasks.Boundary(
        end_task=_end_task,
        like=lambda state: state.owner,
        usage=lambda state: (state.task - 1, None),
        check=_check,
    ),
)
