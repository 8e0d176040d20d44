"""A reservoir: a uniform sample of a stream, in arrays of fixed size."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks

# The last stream position that can be counted: one less than the largest int32, since
# a position is drawn from `position + 1` values.
_LAST_POSITION = 2**31 - 2


class Reservoir(NamedTuple):
    """A buffer of at most ``capacity`` items; an ordinary pytree."""

    items: chex.ArrayTree  # each leaf [capacity, ...]; zeros where nothing is stored
    seen: chex.Array  # [], int32: how many items were offered so far


def reservoir_init(capacity: int, example: chex.ArrayTree) -> Reservoir:
    """An empty reservoir for items that look like ``example``.

    Args:
      capacity: Number of items kept, a Python integer.
      example: One item, without a batch axis: any tree of arrays (inputs, labels,
        logits, task numbers), or of ``jax.ShapeDtypeStruct``. Only shapes and dtypes
        are read.

    Returns:
      A :class:`Reservoir` with leaves ``[capacity, *example_shape]``.

    Raises:
      TypeError: If ``capacity`` is not a Python integer.
      ValueError: If ``capacity`` is below 1, or ``example`` holds no array.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import replay
      >>> buffer = replay.reservoir_init(100, {"x": jnp.zeros([28, 28]), "y": 0})
      >>> print(buffer.items["x"].shape, buffer.items["y"].dtype, buffer.seen)
      (100, 28, 28) int32 0
    """
    checks.check_positive_int("capacity", capacity)
    if not jax.tree.leaves(example):
        raise ValueError(
            "`example` must hold at least one array, the shape and dtype of one item; "
            f"got {example!r}."
        )
    items = jax.tree.map(
        lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.result_type(x)), example
    )
    return Reservoir(items=items, seen=jnp.zeros([], jnp.int32))


def reservoir_add(
    buffer: Reservoir,
    batch: chex.ArrayTree,
    key: chex.PRNGKey,
    mask: chex.Array | None = None,
) -> Reservoir:
    r"""Offers a batch of items to the reservoir.

    The item at position :math:`n` of the stream (from 0) goes to slot :math:`n` while
    there is room, :math:`n < M`. Later it draws :math:`r` uniformly from :math:`\{0,
    \dots, n\}`, itself included, and replaces slot :math:`r` if :math:`r < M`. After
    :math:`n` items each is present with probability exactly :math:`M/n`, and all
    subsets are equally likely. The result is that of adding the items one by one: where
    two want one slot, the later one gets it.

    The sample is uniform over the *stream*, so it has the stream's imbalance of classes
    and tasks. For equal shares keep one reservoir per class; the second example does it
    with ``jax.vmap`` over the mask.

    Add a batch after the step that used it, before augmentation. Under ``jax.jit``
    donate the buffer, and the arrays are updated in place; the cost is that of the
    batch, not of the capacity.

    Args:
      buffer: The reservoir.
      batch: A tree like the items, each leaf ``[batch_size, ...]``.
      key: A PRNG key, another one for each call.
      mask: Optional, ``[batch_size]``, bool: which entries are items. The others (the
        padding of a ragged last batch) are neither stored nor counted.

    Returns:
      A reservoir of the same structure, shapes and dtypes. ``seen`` stops at 2^31 - 2
      items; from then on, new items are kept with the probability of that one.

    Raises:
      ValueError: If structures or shapes don't match.
      TypeError: If a dtype differs from the buffer's, the mask is not boolean, or
        ``key`` is no key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_cl import replay
      >>> add = jax.jit(replay.reservoir_add, donate_argnums=0)
      >>> buffer = replay.reservoir_init(3, jnp.zeros([], jnp.int32))
      >>> for step, key in enumerate(jax.random.split(jax.random.key(0), 10)):
      ...   buffer = add(buffer, 4 * step + jnp.arange(4), key)
      >>> print(buffer.seen)  # of 0 ... 39, three are kept
      40

      Three slots for each of two classes, whatever the stream's shares:

      >>> buffers = replay.reservoir_init(3, jnp.zeros([], jnp.int32))
      >>> buffers = jax.tree.map(lambda x: jnp.stack([x, x]), buffers)
      >>> labels = jnp.array([0, 1, 1, 1, 1, 1, 1, 1])
      >>> buffers = jax.vmap(replay.reservoir_add, in_axes=(0, None, 0, 0))(
      ...     buffers, labels, jax.random.split(jax.random.key(1), 2),
      ...     labels[None] == jnp.arange(2)[:, None])
      >>> print(buffers.seen, buffers.items[1])
      [1 7] [1 1 1]

    References:
      Vitter, `Random Sampling with a Reservoir
      <https://dl.acm.org/doi/10.1145/3147.3165>`_, 1985
    """
    checks.check_key("key", key)
    batch = jax.tree.map(jnp.asarray, batch)
    size = _check_batch(buffer, batch)
    if mask is None:
        mask = jnp.ones([size], bool)
    mask = _check_mask(mask, size)
    capacity = _capacity(buffer)

    offset = jnp.cumsum(mask, dtype=jnp.int32) - mask
    position = buffer.seen + jnp.minimum(offset, _LAST_POSITION - buffer.seen)
    drawn = jax.random.randint(key, [size], 0, position + 1, jnp.int32)
    slot = jnp.where(position < capacity, position, drawn)
    slot = jnp.where(mask, slot, capacity)

    # A scatter in which two items share a slot has no defined winner. A stable sort by
    # slot keeps stream order among rivals; the last of each run is the one to write.
    order = jnp.argsort(slot, stable=True)
    slot = slot[order]
    wins = jnp.concatenate([slot[1:] != slot[:-1], jnp.ones([1], bool)])
    # The others write behind the end, where `mode="drop"` discards them; each to its
    # own place, so that all indices are unique indeed.
    target = jnp.where(wins & (slot < capacity), slot, capacity + jnp.arange(size))
    items = jax.tree.map(
        lambda kept, new: kept.at[target].set(
            new[order], mode="drop", unique_indices=True
        ),
        buffer.items,
        batch,
    )
    added = jnp.sum(mask, dtype=jnp.int32)
    seen = buffer.seen + jnp.minimum(added, _LAST_POSITION - buffer.seen)
    return Reservoir(items=items, seen=seen)


def reservoir_sample(
    buffer: Reservoir, key: chex.PRNGKey, batch_size: int
) -> tuple[chex.ArrayTree, chex.Array]:
    """Draws a batch of stored items, uniformly and with replacement.

    With replacement, so that the batch has one shape however full the buffer is. An
    empty buffer gives zeros with weights 0: use the weights in the loss, as in
    ``sum(weights * losses) / maximum(sum(weights), 1)``, and nothing is NaN.

    Args:
      buffer: The reservoir.
      key: A PRNG key, another one for each call.
      batch_size: Number of items, a Python integer.

    Returns:
      The batch, each leaf ``[batch_size, ...]``, and ``weights``, ``[batch_size]`` in
      float32: all 1, or all 0 while the buffer is empty.

    Raises:
      TypeError: If ``batch_size`` is not a Python integer.
      ValueError: If ``batch_size`` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_cl import replay
      >>> buffer = replay.reservoir_init(3, jnp.zeros([2]))
      >>> batch, weights = replay.reservoir_sample(buffer, jax.random.key(0), 4)
      >>> print(batch.shape, weights)
      (4, 2) [0. 0. 0. 0.]
    """
    checks.check_positive_int("batch_size", batch_size)
    checks.check_key("key", key)
    filled = jnp.minimum(buffer.seen, _capacity(buffer))
    slots = jax.random.randint(key, [batch_size], 0, jnp.maximum(filled, 1), jnp.int32)
    batch = jax.tree.map(lambda x: x[slots], buffer.items)
    return batch, jnp.full([batch_size], filled > 0, jnp.float32)


def _capacity(buffer: Reservoir) -> int:
    return jax.tree.leaves(buffer.items)[0].shape[0]


def _check_batch(buffer: Reservoir, batch: chex.ArrayTree) -> int:
    """Raises unless ``batch`` fits; returns the batch size."""
    sizes = {x.shape[0] if x.ndim else None for x in jax.tree.leaves(batch)}
    size = sizes.pop() if len(sizes) == 1 else None
    if not size:
        shapes = [x.shape for x in jax.tree.leaves(batch)]
        raise ValueError(
            "`batch` must have one common leading batch axis of at least 1; got shapes "
            f"{shapes}. For a single item add an axis: `x[None]`."
        )
    expected = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), buffer.items
    )
    checks.check_same_shapes(
        "batch", batch, expected, "the buffer's items with a leading batch axis"
    )

    def check_dtype(path, x, like):
        if x.dtype != like.dtype:
            raise TypeError(
                f"`batch` must have the dtypes of the buffer's items; at "
                f"`{checks.path_str(path)}` got {x.dtype}, expected {like.dtype}. Cast "
                "it, or build the buffer with another `example`."
            )

    jax.tree_util.tree_map_with_path(check_dtype, batch, expected)
    return size


def _check_mask(mask: chex.Array, size: int) -> chex.Array:
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(
            f"`mask` must be boolean; got {mask.dtype}. Pass `weights > 0` for weights."
        )
    if mask.shape != (size,):
        raise ValueError(
            f"`mask` must have shape {(size,)}, one entry per item of the batch; got "
            f"{mask.shape}."
        )
    return mask
