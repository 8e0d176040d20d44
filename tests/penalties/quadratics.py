"""Three noisy quadratics in a row, for methods that learn while training goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_cl
from optax_cl.penalties import SiState, si

RNG = np.random.default_rng(0)
SHAPES = {"a": (3, 2), "b": (4,)}
NOTHING = optax_cl.Statistics(jnp.zeros([]), {})
apply_updates = jax.jit(optax.apply_updates)


def draw(low=-1.0, high=1.0):
    return {k: RNG.uniform(low, high, s) for k, s in SHAPES.items()}


START = draw()
# Each task: curvatures and minimum of a quadratic.
TASKS = [(draw(0.5, 3.0), draw()) for _ in range(3)]
NOISE = [[draw(-0.5, 0.5) for _ in range(6)] for _ in TASKS]


def as_arrays(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def gradient(params, task, step):
    """Of the task's quadratic, with noise in it."""
    (h, m), noise = TASKS[task], NOISE[task][step]
    return jax.tree.map(
        lambda p, h, m, n: (h * (np.float64(p) - m) + n).astype(p.dtype),
        params,
        h,
        m,
        noise,
    )


def end_task(state, params):
    state = optax_cl.end_task(state, params, NOTHING)
    return optax_cl.begin_task(state, params)


def train(tx, *, tasks=3, dtype=jnp.float32, change=lambda p: p, spoil=()):
    """Trains on the quadratics; the state, and each task's steps as they were.

    ``change`` is made to the parameters after each step. Steps in ``spoil`` get NaN for
    a gradient.
    """
    params, history = as_arrays(START, dtype), []
    state = tx.init(params)
    update = jax.jit(tx.update)
    for task in range(tasks):
        history.append([])
        for step in range(len(NOISE[task])):
            grads = gradient(params, task, step)
            if step in spoil:
                grads = jax.tree.map(lambda g: np.full_like(g, np.nan), grads)
            updates, state = update(grads, state, params)
            old, params = params, change(apply_updates(params, updates))
            history[-1].append((grads, old, params))
        state = end_task(state, params)
    return find(state), params, history


def find(state):
    nodes = jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, SiState))
    return next(n for n in nodes if isinstance(n, SiState))


def moved_by(tree, by):
    return jax.tree.map(lambda p: p + by, tree)


def freeze(*names):
    hidden = {k: k in names for k in SHAPES}
    return optax.masked(optax.set_to_zero(), hidden)


def weighted(strength=0.3, **kwargs):
    return optax_cl.chain(si(strength, **kwargs), optax.sgd(0.05))


def largest_difference(a, b):
    return max(np.max(np.abs(a[k] - b[k])) / np.max(np.abs(b[k])) for k in b)
