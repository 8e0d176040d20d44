"""Memories with a fixed number of places for tasks: whether one is left, and more."""

import chex
import jax
import jax.numpy as jnp
import numpy as np


def check_left(taken: chex.Array, capacity: int, instead: str) -> None:
    """Raises if another task does not fit, or if that cannot be known.

    Args:
      taken: Places taken, int32 ``[]``, or ``[seeds]`` in stacked states.
      capacity: Places there are.
      instead: What to build the method with, so that a task too many does not raise.
    """
    if isinstance(taken, jax.core.Tracer):
        raise ValueError(
            "`overflow='error'` cannot be checked inside a transformed function, where "
            "the number of stored tasks is not known. Call `collect` and `end_task` "
            f"outside `jit`, or build the method with {instead}."
        )
    if np.max(np.asarray(taken)) >= capacity:
        raise ValueError(
            f"all {capacity} places for tasks are taken (`capacity={capacity}`, "
            "`overflow='error'`). Enlarge the state with `optax_cl.grow(opt_state, "
            f"capacity)`, or build the method with {instead}."
        )


def add(tree: chex.ArrayTree, taken: chex.Array, capacity: int) -> chex.ArrayTree:
    """Arrays ``[places, ...]`` with ``capacity`` places, the new ones zero.

    Args:
      tree: What is stored. States of several seeds may be stacked in one.
      taken: As in ``check_left``: its axes are those of the stack.
      capacity: Places there shall be.
    """
    axis = jnp.ndim(taken)

    def pad(x):
        more = [(0, 0)] * x.ndim
        more[axis] = (0, capacity - x.shape[axis])
        return jnp.pad(x, more)

    return jax.tree.map(pad, tree)
