"""What all checks feed: a stream of gradients and parameters, a boundary in it."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_cl

ExtraArgs = Callable[[chex.ArrayTree], dict[str, Any]]
Collect = Callable[[optax.OptState, optax.Params], optax_cl.Statistics]

STEPS = 2  # of the stream, before a boundary and after it
_NUM_CLASSES = 3


def no_extra_args(updates: chex.ArrayTree) -> dict[str, Any]:
    """The extra arguments of a transformation that needs none."""
    del updates
    return {}


def collect_synthetic(
    opt_state: optax.OptState, params: optax.Params
) -> optax_cl.Statistics:
    """Statistics of a small made-up task, for parameters of any structure.

    The task is a linear classifier in all entries of ``params``, on two batches of
    fixed random inputs, the second one ragged. Parameters that are zero take no part,
    so hiding them with a mask changes nothing for the others.

    Args:
      opt_state: Any optimizer state.
      params: Any tree of floating-point arrays.

    Returns:
      What ``optax_cl.collect`` returns.

    Example:
      >>> import jax.numpy as jnp, optax_cl
      >>> from optax_cl.testing import collect_synthetic
      >>> params = {"w": jnp.ones((2, 3))}
      >>> statistics = collect_synthetic(optax_cl.ewc(1.0).init(params), params)
      >>> print(statistics.num_examples)
      7.0
    """
    batches = []
    for number, size in enumerate((4, 3)):
        inputs = [
            _normal((size, _NUM_CLASSES, p.size), jnp.float32, 11, number, i)
            for i, p in enumerate(jax.tree.leaves(params))
        ]
        batches.append({"inputs": inputs, "label": jnp.arange(size) % _NUM_CLASSES})
    key = jax.random.key(12)
    return optax_cl.collect(opt_state, params, batches, task=_TASK, key=key)


def _logits(params, batch):
    parts = [
        jnp.einsum("bcn,n->bc", x, p.reshape(-1).astype(jnp.float32))
        for x, p in zip(batch["inputs"], jax.tree.leaves(params), strict=True)
    ]
    return sum(parts[1:], start=parts[0])


_TASK = optax_cl.classification(_logits, lambda batch: batch["label"])


def stream(params, task):
    """Gradients and parameters of a task's steps, as drawn once for all runs."""
    return [
        (
            _noise(params, task, 2 * step),
            jax.tree.map(_move, params, _noise(params, task, 2 * step + 1)),
        )
        for step in range(STEPS)
    ]


def _noise(tree, *seed):
    """Normal numbers; those of a leaf depend on its place and shape only."""
    leaves, structure = jax.tree.flatten(tree)
    drawn = [_normal(x.shape, x.dtype, *seed, i) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, drawn)


def _move(p, noise):
    # In NumPy too, and in the dtype of the parameter.
    return jnp.asarray(np.asarray(p) + 0.1 * np.asarray(noise), p.dtype)


def _normal(shape, dtype, *seed):
    # From NumPy: JAX would compile a program for every shape.
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def run(update, state, params, collect, hold=lambda p: p, at=lambda p: p):
    """Updates of every step of two tasks with a boundary between them.

    ``hold`` is applied to the parameters of every step, ``at`` gives those of the
    boundary.
    """
    found = []
    for task in range(2):
        if task:
            state = boundary(state, at(params), collect)
        for grads, here in stream(params, task):
            updates, state = update(grads, hold(here), state)
            found.append(updates)
    return found


def outputs(tx, params, extra_args, collect, *, jit=False, hold=lambda p: p):
    """Updates of every step of a transformation run as it is."""
    update = (jitted if jit else plain)(tx, extra_args)
    return run(update, tx.init(params), params, collect, hold)


def boundary(state, params, collect):
    """The state after a boundary between two tasks."""
    state = optax_cl.end_task(state, params, collect(state, params))
    return optax_cl.begin_task(state, params)


def plain(tx, extra_args):
    """``(grads, params, state) -> (updates, state)``, with the extra arguments."""

    def update(grads, params, state):
        return tx.update(grads, state, params, **extra_args(grads))

    return update


@functools.lru_cache(maxsize=1)
def made(make_tx):
    """What ``make_tx()`` makes, the same for several checks: see ``jitted``."""
    return make_tx()


@functools.lru_cache(maxsize=4)
def jitted(tx, extra_args):
    """The same under ``jax.jit``, compiled once for several checks."""
    return jax.jit(plain(tx, extra_args))


def stack(trees):
    """Trees as one, stacked along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def abstract_cast(params, dtype):
    """Shapes of parameters, in another dtype."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), params)


def abstract_update(tx, params, extra_args):
    """Shapes and dtypes of the state, the updates and the new state."""
    return _with_init(tx, extra_args).eval_shape(params)


@functools.lru_cache(maxsize=1)
def _with_init(tx, extra_args):
    # Under `jax.jit`, which keeps what it traced for the next check.
    @jax.jit
    def update(params):
        state = tx.init(params)
        return state, *plain(tx, extra_args)(params, params, state)

    return update


def assert_same_types(tree, like, what):
    """Structure, shapes and dtypes agree, static nodes included."""
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise AssertionError(
            f"the structure of {what} is {jax.tree.structure(tree)}; expected "
            f"{jax.tree.structure(like)}."
        )

    def check(path, leaf, ref):
        found, wanted = ((x.shape, jnp.dtype(x.dtype)) for x in (leaf, ref))
        if found != wanted:
            raise AssertionError(
                f"{what}: at `{jax.tree_util.keystr(path)}` got shape and dtype "
                f"{found}, expected {wanted}."
            )

    jax.tree_util.tree_map_with_path(check, tree, like)


def assert_close(found, expected, rtol, what):
    """Updates agree; ``what`` names the way in which they were had."""
    try:
        chex.assert_trees_all_close(found, expected, rtol=rtol, atol=rtol * 0.1)
    except AssertionError as error:
        raise AssertionError(f"{what} it gives other updates: {error}") from error
