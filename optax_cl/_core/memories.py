"""Looking at and editing the memories and moments inside an optimizer state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cl._core import boundaries, checks, trees


def reset_state(
    opt_state: optax.OptState, mask: chex.ArrayTree | None = None
) -> optax.OptState:
    """Sets the optimizer's own averages to zero; memories of tasks stay.

    Reached are the averages of this library, and of Optax's momentum, Adam (AdamW,
    NAdam, LAMB), AMSGrad, AdaBelief, Adadelta, Adafactor, Adagrad, Lion, Muon, Novograd
    and RMSProp. Those of Optax's other optimizers (Adan, SM3, most of
    ``optax.contrib``) stay as they are, with a warning, and so do those of anybody
    else's, without one, unless ``optax_cl.boundaries.register_moments`` names them.
    Zero is not where Adagrad (0.1) and Yogi (1e-6) start: their first steps are longer
    then than a new state's.

    So is what ``optax.MultiSteps`` or ``apply_every`` has accumulated for an unfinished
    update, but not under a mask, where the other entries of that update go on.

    Args:
      opt_state: The optimizer state.
      mask: Which entries: a tree like params of booleans, one per leaf or arrays that
        broadcast to the leaf; None means all, step counts included. A masked reset
        keeps the counts, which all leaves share: Adam takes its new averages for old
        ones, and its steps there are long for some hundred steps (3 learning rates at
        once, 6.5 after ten, with betas .9 and .999 and a constant gradient).

    Returns:
      The new optimizer state, same structure and shapes.

    Raises:
      ValueError: If ``mask`` does not fit the averages; those of a factored second
        moment are reset leaf by leaf only.
    """
    boundaries.warn_of_unknown_moments(opt_state, "a reset")
    if mask is None:
        opt_state = boundaries.drop_accumulated(opt_state)
        return boundaries.map_moments(trees.zeros_like, opt_state, reset_count=True)

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

    return boundaries.map_moments(reset, opt_state)


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

    result = boundaries.map_states(
        visit, opt_state, lambda n: isinstance(n, state_class)
    )
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
    # Tasks stored, or columns in use where a basis grows: what fills up, of the leaf
    # with the least room and of all states that are stacked in one.
    tasks: int | None
    capacity: int | None  # tasks, or columns, that fit; None if unlimited

    @property
    def left(self) -> int | None:
        """How many more tasks, or columns, fit; None if unlimited."""
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
    for path, state in boundaries.find_with_path(opt_state):
        boundary = boundaries.of(state)
        if boundary.usage is None:  # an average, not a memory of tasks
            continue
        tasks, capacity = boundary.usage(state)
        rows.append(
            MemoryDescription(
                method=_method(state),
                path=path,
                bytes=_own_bytes(state),
                # The states of several seeds may be stacked in one.
                tasks=None if tasks is None else int(np.max(tasks)),
                capacity=capacity,
            )
        )
    return tuple(rows)


def grow(
    opt_state: optax.OptState, capacity: int, *, path: str | None = None
) -> optax.OptState:
    """Enlarges the memories that have a fixed capacity, outside jit.

    Shapes change: the next train step compiles anew, and checkpoints of the old
    capacity no longer restore into the new state.

    Args:
      opt_state: The optimizer state.
      capacity: The new number of tasks, or columns, that fit.
      path: Which memory, by the path that ``describe`` gives it; None means all, which
        makes sense where all of them count the same, tasks or columns.

    Returns:
      The enlarged optimizer state.

    Raises:
      ValueError: If nothing there can grow, or not at ``path``; a capacity would
        shrink, or a fan-in has no room for so many columns.
    """
    checks.check_positive_int("capacity", capacity)
    places = [here for here, _ in boundaries.find_with_path(opt_state)]
    visited, grown = iter(places), []

    def enlarge(state):
        here = next(visited)
        boundary = boundaries.of(state)
        if boundary.grow is None or path not in (None, here):
            return state
        _, old = boundary.usage(state) if boundary.usage else (None, None)
        if old is None:
            return state
        if capacity < old:
            raise ValueError(
                f"`capacity` can't shrink: got {capacity}, and that of the "
                f"`{_method(state)}` at `{here}` is {old}. Enlarge a single memory by "
                "`path=`, as `optax_cl.describe` gives it."
            )
        grown.append(here)
        return boundary.grow(state, capacity)

    result = boundaries.map_states(enlarge, opt_state)
    if not grown:
        raise ValueError(
            "`opt_state` holds no memory with a capacity that can grow"
            + (f" at `path={path!r}`; it has {places}." if path else ".")
        )
    return result


def _method(state: Any) -> str:
    return type(state).__name__.removesuffix("State")


def _own_bytes(state: Any) -> int:
    """Bytes of a state without the memories and the moments inside it."""

    def foreign(node):
        return boundaries.registered(node) or boundaries.has_moments(node)

    nodes = jax.tree.leaves(tuple(state), is_leaf=foreign)
    return sum(_bytes(n) for n in nodes if not foreign(n))


def _bytes(tree: Any) -> int:
    return sum(
        int(np.prod(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if hasattr(x, "dtype") and not jnp.issubdtype(x.dtype, jax.dtypes.extended)
    )
