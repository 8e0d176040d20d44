"""OGD: steps orthogonal to the gradients of what the network said of past tasks."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks, per_example, places, statistics, tasks, trees

# Of a direction's length, what has to be left beside the others; less is rounding.
_TOLERANCE = 1e-5


class OgdState(NamedTuple):
    """State of :func:`ogd`."""

    # Like params, float32 [capacity, samples, *shape]; over the whole tree orthonormal
    # or zero. MaskedNode at leaves that are not floating point.
    directions: chex.ArrayTree
    tasks: chex.Array  # int32 [], tasks stored
    rules: Any  # OgdRules, static


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class OgdRules:
    """What a boundary must know; part of the state's structure, without leaves."""

    capacity: int
    samples: int
    overflow: str


def ogd(
    capacity: int, *, samples: int = 100, overflow: str = "error"
) -> optax.GradientTransformationExtraArgs:
    r"""Takes out of the update what would change the logits of stored examples.

    At a boundary the gradients of the *true class's logit*, :math:`\nabla_\theta
    f_\theta(x)_y`, at ``samples`` examples of the task are stored, made orthonormal to
    each other and to those of all tasks before. With :math:`v_i` all that is stored,

    .. math:: \tilde u = u - \sum_i \langle u, v_i\rangle\, v_i ,

    inner products over the whole tree. Gradients of logits, not of the loss, which
    vanish where the task is learnt and with them their directions.

    **What holds.** :math:`\langle\tilde u, v_i\rangle = 0` to rounding. So the stored
    logits stay as they were to first order in the step. For a model that is linear in
    its parameters they stay *exactly*, whatever the number of steps; for others they
    drift with the second order, and less with small learning rates. An update that is
    not finite stays bit for bit as it is.

    **Placement.** The update that reaches the parameters is what must be orthogonal:
    behind the moments and weight decay, on either side of the learning rate. Before the
    moments it is the published form, made for SGD; behind it Adam's division turns the
    step back into the stored directions.

    **Memory.** ``capacity * samples`` trees like params, in float32; a model of 1e5
    parameters with 100 examples of 5 tasks takes 200 MB. **Work per step.** Two reads
    of what is stored, used or not; and a copy of it, as much again, by a jitted step to
    which the optimizer state is not donated (``donate_argnums``). **At a boundary** one
    backward pass for each stored example, about ``8 samples^2 (capacity + 1)`` FLOPs a
    parameter, and room for some four times the task's directions.

    Args:
      capacity: Tasks that fit.
      samples: Examples stored of each task: the first of those that ``collect`` is
        given, so let these be a random draw. Fewer than ``samples`` are fine.
      overflow: What a task too many does: ``"error"`` makes ``end_task`` raise, outside
        jit; ``"drop"`` leaves it unprotected.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``OgdState``. Before the first
      boundary it changes nothing.

    Raises:
      ValueError: For arguments out of range; by ``collect`` for a task without
        ``outputs`` or ``labels``; by ``end_task`` when full; at trace time for updates
        of other shapes than the state was made for.
      TypeError: At ``init`` for complex parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl
      >>> from optax_cl.projections import ogd
      >>> task = optax_cl.classification(lambda w, b: b[0] @ w, lambda b: b[1])
      >>> tx = optax.chain(
      ...     optax.scale_by_adam(), ogd(2, samples=3), optax.scale(-0.1))
      >>> w = jnp.zeros((3, 2))
      >>> state = tx.init(w)
      >>> x, y = jnp.array([[1.0, 1.0, 0.0]]), jnp.array([0])
      >>> stats = optax_cl.collect(state, w, [(x, y)], task=task, key=jax.random.key(0))
      >>> state = optax_cl.end_task(state, w, stats)
      >>> updates, state = tx.update(jnp.ones((3, 2)), state, w)
      >>> print((x @ updates).round(3) + 0.0)  # the logit of class 0 can't change
      [[ 0.  -0.2]]

    References:
      Farajtabar et al, `Orthogonal Gradient Descent for Continual Learning
      <https://arxiv.org/abs/1910.07104>`_, 2020

    Differs from the paper:
      1. It may stand behind the moments of any optimizer; theirs is for SGD.
      2. Of their variants only the one they found best, the true class's logit. Where
         an example has several labels, the sum of their logits counts as one.
      3. A direction that adds less than 1e-5 of its length to those stored is left out,
         as is one that is not finite.
    """
    checks.check_positive_int("capacity", capacity)
    checks.check_positive_int("samples", samples)
    checks.check_choice("overflow", overflow, ("error", "drop"))
    rules = OgdRules(capacity, samples, overflow)

    def init_fn(params):
        return OgdState(
            directions=_empty(params, (capacity, samples)),
            tasks=jnp.zeros([], jnp.int32),
            rules=rules,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        trees.check_fits("updates", updates, _shapes(state))
        return _off(_bank(state), updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _empty(params: chex.ArrayTree, lead: tuple[int, ...]) -> chex.ArrayTree:
    """Zeros ``[*lead, *shape]`` for each leaf that can be differentiated."""

    def zeros(path, p):
        checks.check_real("a direction of the logits", path, p)
        dtype = jnp.result_type(p)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return optax.MaskedNode()
        # Made out of p, and so sharded as p is.
        like = jnp.zeros_like(p, dtype=trees.importance_dtype(dtype))
        return jnp.broadcast_to(like, (*lead, *like.shape))

    return jax.tree_util.tree_map_with_path(zeros, params)


def _bank(state: OgdState) -> chex.ArrayTree:
    """All directions, one behind the other: ``[capacity * samples, *shape]``."""
    rows = state.rules.capacity * state.rules.samples
    return jax.tree.map(lambda d: d.reshape(rows, *d.shape[2:]), state.directions)


def _shapes(state: OgdState) -> chex.ArrayTree:
    """What an update must look like."""
    return jax.tree.map(
        lambda d: jax.ShapeDtypeStruct(d.shape[2:], d.dtype), state.directions
    )


# --- Rows: trees with a leading axis, vectors of the space of all parameters ----------


def _coefficients(rows: chex.ArrayTree, tree: chex.ArrayTree) -> chex.Array:
    """``<row, v>`` for every row ``[n, *shape]`` and every v ``[*m, *shape]``."""

    def leaf(r, v):
        last = tuple(range(v.ndim - r.ndim + 1, v.ndim))
        axes = (tuple(range(1, r.ndim)), last)
        return jnp.tensordot(r, v.astype(r.dtype), axes, precision="highest")

    return sum(jax.tree.leaves(jax.tree.map(leaf, rows, tree)))


def _combine(rows: chex.ArrayTree, coefficients: chex.Array) -> chex.ArrayTree:
    """``sum_n c_n row_n``, with ``c`` of shape ``[n, *m]``."""

    def leaf(r):
        c = coefficients.astype(r.dtype)
        return jnp.tensordot(c, r, (0, 0), precision="highest")

    return jax.tree.map(leaf, rows)


def _off(bank: chex.ArrayTree, updates: chex.ArrayTree) -> chex.ArrayTree:
    """Updates without their part in the span of the bank, in their own dtypes."""
    bank = trees.align_structure("the directions of `ogd`", bank, updates)
    leaves, structure = jax.tree.flatten(updates, is_leaf=trees.is_hole)
    stored = jax.tree.leaves(bank, is_leaf=trees.is_hole)
    pairs = list(zip(leaves, stored, strict=True))
    # A leaf that either side lacks takes no part.
    shared = [i for i, pair in enumerate(pairs) if not any(map(trees.is_hole, pair))]
    if not shared:
        return updates
    rows, vectors = [stored[i] for i in shared], [leaves[i] for i in shared]
    found = _coefficients(rows, vectors)
    # One number that is not finite would spread over all leaves.
    found = jnp.where(jnp.all(jnp.isfinite(found)), found, 0)
    inside = _combine(rows, found)
    new = list(leaves)
    for i, u, part in zip(shared, vectors, inside, strict=True):
        new[i] = (u - part).astype(jnp.result_type(u))
    return structure.unflatten(new)


def _lengths(rows: chex.ArrayTree) -> chex.Array:
    """The length of every row, ``[n]``."""
    squares = [jnp.sum(r**2, tuple(range(1, r.ndim))) for r in jax.tree.leaves(rows)]
    return jnp.sqrt(sum(squares))


def _scaled(rows: chex.ArrayTree, factors: chex.Array) -> chex.ArrayTree:
    """Every row times its factor; zero where that is zero, whatever the row."""

    def leaf(r):
        f = jnp.expand_dims(factors, tuple(range(1, r.ndim))).astype(r.dtype)
        return jnp.where(f == 0, 0, f * r)

    return jax.tree.map(leaf, rows)


def _unit(rows: chex.ArrayTree, least: chex.Numeric) -> chex.ArrayTree:
    """Rows of length one; zero for those not longer than ``least``."""
    lengths = _lengths(rows)
    usable = (lengths > least) & jnp.isfinite(lengths)
    return _scaled(rows, jnp.where(usable, 1 / jnp.where(usable, lengths, 1), 0))


def _new_directions(bank: chex.ArrayTree, rows: chex.ArrayTree) -> chex.ArrayTree:
    """The rows made orthonormal to the bank and among themselves; zero if nothing."""

    def off(basis, x):
        return jax.tree.map(jnp.subtract, x, _combine(basis, _coefficients(basis, x)))

    # By their largest entry first, so that squares neither overflow nor vanish.
    peaks = [
        jnp.max(jnp.abs(r), tuple(range(1, r.ndim)), initial=0)
        for r in jax.tree.leaves(rows)
    ]
    if not peaks:
        return rows
    peak = jnp.stack(peaks).max(0)
    usable = (peak > 0) & jnp.isfinite(peak)
    rows = _scaled(rows, jnp.where(usable, 1 / jnp.where(usable, peak, 1), 0))
    rows = _unit(rows, 0)
    # And once more at the end: what a pass leaves is rounding of the length before it.
    rows = off(bank, rows)
    found = jax.tree.map(jnp.zeros_like, rows)

    def step(i, found):
        row = jax.tree.map(lambda r: r[i][None], rows)
        row = _unit(off(found, off(found, row)), _TOLERANCE)
        # A short rest carries the most of what rounding left in the bank.
        row = _unit(off(bank, row), 0)
        return jax.tree.map(lambda f, r: f.at[i].set(r[0]), found, row)

    return jax.lax.fori_loop(0, peak.shape[0], step, found)


# --- Task boundary -------------------------------------------------------------------


class _LogitGradients(NamedTuple):
    """Of the first examples of a task, as far as they were seen."""

    rows: chex.ArrayTree  # like params, [samples, *shape]
    seen: chex.Array  # int32 [], rows in use


@functools.cache
def _pass(samples: int) -> tasks.Pass:
    def init(state, params):
        del state
        return _LogitGradients(_empty(params, (samples,)), jnp.zeros([], jnp.int32))

    def fill(found, data):
        outputs = tasks.require(data.task, "outputs", "`ogd`")
        labels = tasks.require(data.task, "labels", "`ogd`")
        shape = statistics.result_shape("outputs", outputs, data)
        if len(shape) < 2:
            raise ValueError(
                "`ogd` stores gradients of the true class's logit, so `task.outputs` "
                f"must give logits [B, ..., C]; got shape {shape}."
            )

        def gradient(example):
            def logit(params):
                logits = outputs(params, per_example.lead(example))
                chosen = labels(per_example.lead(example))[..., None]
                picked = jnp.take_along_axis(logits, chosen, axis=-1)
                # An index of -1 would pick the last class.
                return jnp.sum(jnp.where(chosen >= 0, picked, 0))

            return jax.grad(logit)(data.params)

        first = min(samples, len(data.weights))
        rows = jax.vmap(gradient)(jax.tree.map(lambda x: x[:first], data.batch))
        real = data.weights[:first] > 0
        place = found.seen + jnp.cumsum(real) - 1
        place = jnp.where(real, place, samples)  # padding is dropped, as is too much
        return jax.tree.map(
            lambda s, r: s.at[place].set(r.astype(s.dtype), mode="drop"),
            found.rows,
            rows,
        )

    def step(found, data):
        rows = jax.lax.cond(
            found.seen < samples,
            lambda found: fill(found, data),
            lambda found: found.rows,
            found,
        )
        seen = found.seen + jnp.sum(data.weights > 0)
        return _LogitGradients(rows, jnp.minimum(seen, samples))

    name = f"logit_gradients({samples})"
    return tasks.Pass(name, init, step, lambda found, *_: found.rows, shared=True)


def _passes(state):
    return (_pass(state.rules.samples),)


def _end_task(state, params, results):
    del params
    rows = results[_pass(state.rules.samples).name]
    add = _add_task
    for _ in range(jnp.ndim(state.tasks)):  # states of several seeds, stacked in one
        add = jax.vmap(add)
    return add(state, trees.align_structure("rows", rows, state.directions))


@jax.jit  # a boundary is mostly called outside jit, where the loop would compile anew
def _add_task(state, rows):
    new = _new_directions(_bank(state), rows)
    # A task too many has no place, and its row is dropped.
    directions = jax.tree.map(
        lambda d, n: d.at[state.tasks].set(n, mode="drop"), state.directions, new
    )
    stored = jnp.minimum(state.tasks + 1, state.rules.capacity)
    return state._replace(directions=directions, tasks=stored)


def _check(state):
    if state.rules.overflow == "error":
        places.check_left(state.tasks, state.rules.capacity, "`overflow='drop'`")


def _grow(state, capacity):
    return state._replace(
        directions=places.add(state.directions, state.tasks, capacity),
        rules=dataclasses.replace(state.rules, capacity=capacity),
    )


tasks.register_boundary(
    OgdState,
    tasks.Boundary(
        passes=_passes,
        end_task=_end_task,
        like=lambda state: state.directions,
        usage=lambda state: (state.tasks, state.rules.capacity),
        check=_check,
        grow=_grow,
    ),
)
