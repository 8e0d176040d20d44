"""Progressive networks: a column for every task, which reads those before it."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cl._core import checks, tasks, trees

# Axes of a leaf that are shared out among columns, of its inputs and of its outputs.
Axes = tuple[int | None, int | None]

_MOST_COLUMNS = 254  # a task of eight bits can name them, and one beyond the last
_BY_RANK: dict[int, Axes] = {0: (None, None), 1: (None, 0), 2: (0, 1), 4: (2, 3)}
# With several heads a bias has two axes; rows of an embedding are tokens.
_UNSURE = re.compile(r"embed|(^|/)(bias|scale)$", re.IGNORECASE)


class ProgressiveState(NamedTuple):
    """State of :func:`progressive`."""

    task: chex.Array  # uint8 [], the current task and so the column in training, from 1
    columns: chex.Array  # uint8 [], how many there are


def progressive(
    columns: int, *, inputs: str, axes: Mapping[str, Axes] | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Trains one column of a wide network for every task; it reads the earlier ones.

    A layer of K columns is one layer K times as wide, its units in K equal blocks. With
    :math:`h_j` the hidden units of column j, and :math:`W_{jk}` the block of the kernel
    from column j to column k,

    .. math::
        h_k^{(l)} = f\Bigl(\sum_{j \le k} W_{jk}^{(l)\top} h_j^{(l-1)} + b_k\Bigr),
        \qquad W_{jk} = 0 \ \text{ for } j > k .

    In task k the blocks :math:`W_{1k}, \dots, W_{kk}` and :math:`b_k` learn, and
    nothing else moves. ``end_task`` goes on to the next column. The model is an
    ordinary one; task k reads block k of its outputs:

        logits = model(x).reshape(len(x), columns, -1)[:, task - 1]

    **What holds.** Once the blocks that must be zero are so, the outputs of a column
    never change after its task has ended, to the bit, as long as the units of later
    columns are finite. The first update sets these blocks to zero, if it is of the
    parameters' dtype and they are finite: bfloat16 updates take float32 parameters
    there in three steps at most, float16 ones may never (the smallest are out of their
    range), and what is infinite becomes NaN and stays so.
    For that, units of different columns may meet in kernels only: a norm must take each
    column by itself (``GroupNorm`` with as many groups as columns), and attention each
    column's heads. Flattening an image mixes them; the page on isolation has the way
    round it. Batch statistics are no parameters and go on moving.

    **Placement.** Last: whatever comes behind it moves other columns, weight decay and
    momentum included. Adam's count has seen the tasks before; ``end_task(...,
    moments="reset")`` lets the new column start as the first did.

    **Memory.** Two bytes. **Work per step.** One read of the updates and the
    parameters. The model computes all columns in every task, and about half of each
    kernel is zero: nothing is compiled anew from task to task.

    Args:
      columns: K, from 1 to 254.
      inputs: Pattern (a regular expression, searched in a leaf's path) of kernels that
        read the network's input, which is common to all columns.
      axes: Pattern to the two axes ``(in, out)`` that are shared out among columns, for
        leaves other than these: kernels ``[in, out]`` and ``[H, W, in, out]``, biases
        and scales ``[out]``. None is an axis common to all columns; ``(None, None)``, a
        leaf that the first task alone trains. Of attention, ``[in, heads, dim]`` is
        ``(0, 1)`` and ``[heads, dim, out]`` is ``(0, 2)``; of scanned layers, ``[L, in,
        out]`` is ``(1, 2)``.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``ProgressiveState``. Its
      ``update`` needs ``params``, to set to zero what a later column would feed into
      an earlier one.

    Raises:
      TypeError: For ``columns`` that is no integer; at ``init`` for complex parameters.
      ValueError: For ``columns`` out of range or a pattern that is no regular
        expression; at ``init`` for one that matches nothing, for a leaf whose axes
        can't be told, or an axis that is no multiple of ``columns``; at trace time
        without ``params``, or for updates that do not fit them. (``end_task`` warns
        after the last column.)

    Example:
      >>> import jax.numpy as jnp, optax, optax_cl
      >>> from optax_cl import isolation
      >>> tx = optax.chain(
      ...     optax.sgd(0.1), isolation.progressive(2, inputs="first"))
      >>> params = {"first": jnp.ones((1, 2)), "second": jnp.ones((2, 2))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params["second"])
      [[0.9 1. ]
       [0.  1. ]]

    References:
      Rusu et al, `Progressive Neural Networks <https://arxiv.org/abs/1606.04671>`_,
      2016

    Differs from the paper:
      1. All columns are there from the start, of one width, so that shapes stay.
      2. Lateral connections are linear; the paper puts a small hidden layer on them.
      3. Every column reads the same input of a layer, own and lateral, with one kernel,
         whose initializer takes all of it for its fan-in.
    """
    checks.check_positive_int("columns", columns)
    if columns > _MOST_COLUMNS:
        raise ValueError(f"`columns` must be at most {_MOST_COLUMNS}; got {columns}.")
    by_pattern = [("inputs", inputs), *(("axes", p) for p in axes or {})]
    for name, pattern in by_pattern:
        checks.check_pattern(name, pattern)
    axes = dict(axes or {})

    def axes_of(path, leaf):
        """What is shared out of a leaf; None if it can't be trained."""
        checks.check_real("a column", path, leaf)
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            return None
        path, shape = checks.path_str(path), jnp.shape(leaf)
        pair = _axes_of(path, shape, inputs, axes)
        _check_divides(columns, pair, path, shape)
        return pair

    def init_fn(params):
        leaves = jax.tree_util.tree_leaves_with_path(params)
        paths = [checks.path_str(path) for path, _ in leaves]
        for name, pattern in by_pattern:
            if paths and not any(re.search(pattern, path) for path in paths):
                raise ValueError(
                    f"`{name}` has the pattern {pattern!r}, which matches no leaf; "
                    f"there are {', '.join(paths)}."
                )
        for path, leaf in leaves:
            axes_of(path, leaf)  # refuses what it can't share out
        return ProgressiveState(jnp.ones([], jnp.uint8), jnp.uint8(columns))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.check_params("progressive", params)
        trees.check_fits("updates", updates, params)
        params = trees.align_structure("params", params, updates)

        def hold(path, u, p):
            pair = None if trees.is_hole(u) else axes_of(path, p)
            if pair is None:
                return u
            owner = _owner(columns, pair, u.shape)
            others = jnp.where(owner == 0, -p.astype(u.dtype), jnp.zeros_like(u))
            return jnp.where(owner == state.task, u, others)

        updates = jax.tree_util.tree_map_with_path(
            hold, updates, params, is_leaf=trees.is_hole
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _axes_of(path: str, shape: tuple, inputs: str, axes: Mapping[str, Axes]) -> Axes:
    """Which axes of a leaf are shared out among columns."""
    for pattern, pair in axes.items():
        if re.search(pattern, path):
            return _checked(pair, path, shape)
    rank = len(shape)
    from_inputs = re.search(inputs, path) is not None
    unsure = _UNSURE.search(path) and rank > 1 and not (from_inputs and rank == 2)
    if rank not in _BY_RANK or unsure:
        raise ValueError(
            f"can't tell which axes of the leaf `{path}` of shape {shape} are shared "
            f"out among columns. Name them: `axes={{r'{re.escape(path)}': (in, out)}}`,"
            " None for an axis common to all columns."
        )
    fan_in, fan_out = _BY_RANK[rank]
    return (None if from_inputs else fan_in), fan_out


def _owner(columns: int, axes: Axes, shape: tuple) -> chex.Array:
    """The task that trains each entry of a leaf, from 1, or 0 where it must be zero."""

    def block(axis):
        if axis is None:
            return jnp.ones(shape, jnp.uint8)
        index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return (index // max(shape[axis] // columns, 1) + 1).astype(jnp.uint8)

    reads, feeds = map(block, axes)
    return jnp.where(reads <= feeds, feeds, jnp.uint8(0))


def _check_divides(columns: int, axes: Axes, path: str, shape: tuple) -> None:
    for axis in axes:
        if axis is not None and shape[axis] % columns:
            raise ValueError(
                f"`columns` must divide the axes they are blocks of; axis {axis} of "
                f"`{path}`, of shape {shape}, is no multiple of {columns}. Change the "
                "width; or, if this leaf reads the input, name it in `inputs`."
            )


def _checked(axes: Any, path: str, shape: tuple) -> Axes:
    def is_axis(a):
        whole = isinstance(a, int | np.integer) and not isinstance(a, bool)
        return whole and 0 <= a < len(shape)

    match axes:
        case (None, None):
            return axes
        # What reads single columns and feeds all would let old ones change.
        case (fan_in, fan_out) if is_axis(fan_out) and fan_in != fan_out:
            if fan_in is None or is_axis(fan_in):
                return fan_in, fan_out
    raise ValueError(
        f"`axes` gives the leaf `{path}` of shape {shape} {axes!r}; expected two "
        f"different axes (in, out) from 0 to {len(shape) - 1}, the first or both of "
        "which may be None."
    )


# --- Task boundary -------------------------------------------------------------------


def _end_task(state, params, results):
    del params, results
    known = not isinstance(state.task, jax.core.Tracer)
    # Read into NumPy: inside jit an operation on the arrays would be traced.
    if known and np.any(np.asarray(state.task) >= np.asarray(state.columns)):
        checks.warn(
            f"`progressive` has {np.max(np.asarray(state.columns))} columns, and a "
            "task has trained the last; another would learn nothing. If this was the "
            "last task, all is well; else begin with more columns."
        )
    return state._replace(task=jnp.minimum(state.task, _MOST_COLUMNS) + jnp.uint8(1))


tasks.register_boundary(
    ProgressiveState,
    tasks.Boundary(
        end_task=_end_task,
        # There may be more tasks than columns, which learnt nothing.
        usage=lambda state: (
            np.minimum(np.asarray(state.task) - 1, np.asarray(state.columns)),
            int(np.max(np.asarray(state.columns))),
        ),
    ),
)
