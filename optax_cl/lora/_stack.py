"""One adapter per task, stacked along a leading axis and chosen by a task id."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_cl._core import checks
from optax_cl.lora._adapters import Adapters


def stack(adapters: Adapters, capacity: int) -> Adapters:
    """Room for the adapters of several tasks: zeros with a leading axis of tasks.

    An empty slot is a zero update, so that ``select`` gives the base model there. The
    size never changes: two tasks or ``capacity``, one compilation.

    **Memory.** ``capacity`` times that of the adapters.

    Args:
      adapters: Adapters of one task; only shapes and dtypes are read.
      capacity: K, the number of tasks that fit.

    Returns:
      Adapters whose arrays have the shapes ``[K, ...]``.

    Raises:
      ValueError: If ``capacity`` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_cl import lora
      >>> kernel, x = jnp.ones((3, 2)), jnp.ones((4, 3))
      >>> first = {"kernel": lora.LoRA(a=jnp.ones((3, 1)), b=jnp.ones((1, 2)))}
      >>> tasks = lora.store(lora.stack(first, capacity=5), 0, first)
      >>> def model(x, task):
      ...     adapters = lora.select(tasks, task)
      ...     return lora.dense(x, kernel, adapters["kernel"], 1.0)
      >>> print(jax.jit(model)(x[0], 0), jax.jit(model)(x[0], 1))
      [6. 6.] [3. 3.]

      A batch of examples from several tasks:

      >>> print(jax.vmap(model)(x, jnp.array([0, 1, 0, 4]))[:, 0])
      [6. 3. 6. 3.]
    """
    checks.check_positive_int("capacity", capacity)
    return jax.tree.map(
        lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.result_type(x)), adapters
    )


def store(stacked: Adapters, index: chex.Numeric, adapters: Adapters) -> Adapters:
    """Puts the adapters of one task into its slot.

    To train task k, train ``select(stacked, k)`` as a tree of its own and store the
    result: the other slots stay bitwise as they are. An optimizer on the stacked tree
    would move them, by momentum and weight decay, though their gradients are zero.

    Args:
      stacked: From ``stack``.
      index: The task, a Python integer or an integer array without axes (a tracer,
        say). An array out of ``[0, K)`` stores nothing; its value can't be judged at
        trace time.
      adapters: The adapters of that task.

    Returns:
      The new stack; what is stored has the dtypes of the stack.

    Raises:
      ValueError: If the adapters don't have the structure and shapes of a slot, or a
        Python index is out of range.
      TypeError: If ``index`` is no integer.
    """
    capacity = _check_index(stacked, index)
    slot = jax.tree.map(lambda x: x[0], stacked)
    checks.check_same_shapes("adapters", adapters, slot, "one slot of `stacked`")
    safe, valid = _in_range(index, capacity)

    def put(room, new):
        return room.at[safe].set(jnp.where(valid, new.astype(room.dtype), room[safe]))

    return jax.tree.map(put, stacked, adapters)


def select(stacked: Adapters, index: chex.Numeric) -> Adapters:
    """The adapters of one task; of no task (a zero update) where there is none.

    For a batch of examples from several tasks, ``jax.vmap`` the model over examples and
    task ids, with ``dense`` in the model (see ``stack``): the frozen kernels then stay
    one matrix product for the whole batch, and only the factors are gathered, ``[B, in,
    r]``. Merging under such a ``vmap`` would form a kernel for every example.

    Args:
      stacked: From ``stack``.
      index: The task, a Python integer or an integer array without axes (a tracer,
        say). An array out of ``[0, K)``, such as the -1 of ``route``, gives zeros: the
        base model. (Plain indexing would give the last task instead, in silence.)

    Returns:
      Adapters of one task.

    Raises:
      ValueError: If a Python index is out of range, or ``index`` has axes.
      TypeError: If ``index`` is no integer.
    """
    safe, valid = _in_range(index, _check_index(stacked, index))
    # Not a product with `valid`: a slot that holds inf or NaN must not leak either.
    return jax.tree.map(
        lambda room: jnp.where(valid, room[safe], jnp.zeros_like(room[0])), stacked
    )


def _in_range(index, capacity) -> tuple[jax.Array, jax.Array]:
    index = jnp.asarray(index, jnp.int32)
    valid = (index >= 0) & (index < capacity)
    return jnp.where(valid, index, 0), valid


def _check_index(stacked: Adapters, index: Any) -> int:
    """Raises for an index that is wrong on its face; returns the capacity."""
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(stacked)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "`stacked` must come from `stack`, with one leading axis of tasks; its "
            f"leading axes are {sorted(sizes)}."
        )
    ((capacity,),) = sizes
    if isinstance(index, bool | np.bool_) or not jnp.issubdtype(
        jnp.result_type(index), jnp.integer
    ):
        raise TypeError(f"`index` must be an integer task id; got {index!r}.")
    if jnp.ndim(index):
        raise ValueError(
            f"`index` must be one task id; got shape {jnp.shape(index)}. For a batch "
            "of them, `jax.vmap` the model over examples and ids."
        )
    if checks.is_concrete_number(index) and not 0 <= index < capacity:
        raise ValueError(
            f"`index` must be in [0, {capacity}), the capacity of `stacked`; got "
            f"{index}."
        )
    return capacity
