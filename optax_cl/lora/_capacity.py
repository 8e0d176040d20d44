"""How many columns a memory of gradients may have, and how it fills up and grows.

For methods that keep a ``GradientMemory`` beside adapters, whose own columns need room
next to those of the memory.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_cl._core import checks, growth
from optax_cl.lora import _memory
from optax_cl.lora._targets import Targets
from optax_cl.lora._targets import check_targets as check_targets

# One number, or pairs of a path and a number.
Ranks = int | tuple[tuple[str, int], ...]


def hashable_ranks(memory_rank: Any, targets: Targets) -> Any:
    """``memory_rank`` checked, as static ``Ranks``; None stays None."""
    if not isinstance(memory_rank, Mapping):
        if memory_rank is not None:
            checks.check_positive_int("memory_rank", memory_rank)
            memory_rank = int(memory_rank)  # NumPy has integers that are no `int`
        return memory_rank
    if set(memory_rank) != set(targets):
        raise ValueError(
            "`memory_rank` must be one number or have one for each path of `targets`, "
            f"{sorted(targets)}; got {sorted(memory_rank)}."
        )
    for path, rank in memory_rank.items():
        checks.check_positive_int(f"memory_rank[{path!r}]", rank)
    return tuple(sorted((path, int(rank)) for path, rank in memory_rank.items()))


def columns(targets: Targets, ranks: Ranks, path: str) -> int:
    """Columns of a new memory: what was asked for, or all that there is room for."""
    room = _room(targets, path)
    if room < 1:
        target = targets[path]
        raise ValueError(
            f"the adapter at `{path}` has rank {target.rank} and fan-in "
            f"{target.matrix_shape[-2]}: there is no room for a memory beside it. "
            "Lower the rank, or pass `memory_rank=None`."
        )
    return min(ranks if isinstance(ranks, int) else dict(ranks)[path], room)


def _room(targets: Targets, path: str) -> int:
    """Columns that a memory may have, so that the adapter keeps a place beside it."""
    target = targets[path]
    return target.matrix_shape[-2] - target.rank


def empty(
    targets: Targets, ranks: Ranks, tree_of: Callable[[Callable[[str], Any]], Any]
) -> _memory.GradientMemory:
    """A memory without columns in use.

    Args:
      targets: The adapted kernels.
      ranks: Columns to make, from ``hashable_ranks``.
      tree_of: Makes a tree like the adapters of a function of a kernel's path, called
        where the method has a restricted factor; ``MaskedNode`` elsewhere.

    Returns:
      Zeros; see ``GradientMemory`` for shapes.
    """

    def basis(path):
        *batch, fan_in, _ = targets[path].matrix_shape
        shape = (*batch, fan_in, columns(targets, ranks, path))
        return jnp.zeros(shape, jnp.float32)

    def count(path):
        return jnp.zeros(targets[path].matrix_shape[:-2], jnp.int32)

    return _memory.GradientMemory(tree_of(basis), tree_of(count))


def consolidate(
    method: str,
    memory: _memory.GradientMemory,
    matrices: Mapping[str, chex.Array],
    threshold: chex.Numeric,
    rules: Any,
) -> _memory.GradientMemory:
    """The memory with what it misses of a task's matrices, by path of the kernel.

    Args:
      method: What keeps the memory, as it is built.
      memory: As it is.
      matrices: Of the task, by path.
      threshold: As in ``grow_memory``.
      rules: The state's, with ``targets``, ``statistic`` and ``overflow``.

    Raises:
      ValueError: Where they don't all fit, with overflow ``"error"``.
    """
    bases, counts = [], []
    for path, basis, count in _entries(memory):
        # All statistics but the mean gradient are factors of a sum.
        floor = 0.0 if rules.statistic == "mean" else growth.rounding(basis)
        grown = growth.grow(basis, count, matrices[path], threshold, floor)
        if rules.overflow == "error":
            room = _room(rules.targets, path)
            growth.check_fits(method, path, basis.shape[-1], room, grown.left_out)
        bases.append(grown.memory)
        counts.append(grown.count)
    structure = jax.tree.structure(memory.basis)
    return _memory.GradientMemory(
        basis=structure.unflatten(bases), count=structure.unflatten(counts)
    )


def _entries(
    memory: _memory.GradientMemory,
) -> Iterator[tuple[str, chex.Array, chex.Array]]:
    """Path of the kernel, basis and count of every restricted factor."""
    bases = jax.tree_util.tree_leaves_with_path(memory.basis)
    for (path, basis), count in zip(bases, jax.tree.leaves(memory.count), strict=True):
        yield path[-2].key, basis, count


def usage(memory: _memory.GradientMemory) -> tuple[int, int]:
    """Columns, in use and in all, of the basis with the least room."""
    rows = [
        (int(np.max(count)), basis.shape[-1]) for _, basis, count in _entries(memory)
    ]
    return min(rows, key=lambda row: row[1] - row[0], default=(0, 0))


def grow(
    memory: _memory.GradientMemory, targets: Targets, capacity: int
) -> _memory.GradientMemory:
    """The memory with room for ``capacity`` columns, where the adapter leaves it."""

    def pad(path, basis):
        width = max(basis.shape[-1], min(capacity, _room(targets, path)))
        widths = [(0, 0)] * (basis.ndim - 1) + [(0, width - basis.shape[-1])]
        return jnp.pad(basis, widths)

    bases = jax.tree.leaves(memory.basis)
    wider = [pad(path, basis) for path, basis, _ in _entries(memory)]
    added = [x.shape[-1] - u.shape[-1] for x, u in zip(wider, bases, strict=True)]
    if not any(added) and all(u.shape[-1] < capacity for u in bases):
        raise ValueError(
            f"`capacity` is {capacity}, but no memory has room for more columns beside "
            "its adapter: all have their fan-in less the adapter's rank."
        )
    return memory._replace(basis=jax.tree.structure(memory.basis).unflatten(wider))
