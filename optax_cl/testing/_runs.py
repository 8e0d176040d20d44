"""Ways of running it over tasks, all of which must give the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_cl
from optax_cl.testing import _streams as streams
from optax_cl.testing._streams import (
    Collect,
    ExtraArgs,
    assert_close,
    collect_synthetic,
    no_extra_args,
    outputs,
)


def check_tasks(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
    collect: Collect = collect_synthetic,
    num_tasks: int = 3,
) -> None:
    """Three tasks, one compilation, donated buffers, finite numbers.

    Parameters and state are donated to every jitted step, and the state to every jitted
    boundary; its structure, shapes and dtypes never change, and the step is traced
    once. (Boundaries that must run outside ``jit`` say so with a ``ValueError``; they
    are called plainly then.)

    Args:
      tx: The transformation, an optimizer: updates are added to the parameters.
      params: The parameters to begin with.
      extra_args: ``updates -> extra arguments`` that it needs.
      collect: ``(opt_state, params) -> Statistics``.
      num_tasks: How many tasks.
    """
    traces = 0

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        nonlocal traces
        traces += 1
        updates, state = tx.update(grads, state, params, **extra_args(grads))
        return optax.apply_updates(params, updates), state

    @functools.partial(jax.jit, donate_argnums=0)
    def boundary(state, params, statistics):
        state = optax_cl.end_task(state, params, statistics)
        return optax_cl.begin_task(state, params)

    # Copies, since the caller's arrays would be donated too.
    params = jax.tree.map(lambda p: jnp.array(p, copy=True), params)
    state = tx.init(params)
    expected = jax.eval_shape(tx.init, params)
    for task in range(num_tasks):
        for grads, _ in streams.stream(params, task):
            params, state = step(params, state, grads)
            streams.assert_same_types(state, expected, "the state after a step")
        statistics = collect(state, params)
        try:
            state = boundary(state, params, statistics)
        except ValueError as error:
            if "outside `jit`" not in str(error):
                raise
            state = optax_cl.end_task(state, params, statistics)
            state = optax_cl.begin_task(state, params)
        streams.assert_same_types(state, expected, "the state after a boundary")
    if traces != 1:
        raise AssertionError(
            f"the step was traced {traces} times in {num_tasks} tasks; once would do."
        )
    for leaf in jax.tree.leaves((params, state)):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.all(np.isfinite(leaf)):
            raise AssertionError(f"not all numbers are finite: {(params, state)}")


def check_jit_and_scan(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
    collect: Collect = collect_synthetic,
    rtol: float = 1e-5,
) -> None:
    """Op by op, under ``jax.jit`` and in ``jax.lax.scan`` it gives the same.

    Args:
      tx: The transformation.
      params: The parameters that the stream is about.
      extra_args: ``updates -> extra arguments`` that it needs.
      collect: ``(opt_state, params) -> Statistics``.
      rtol: Relative tolerance; fusion rounds differently.
    """
    expected = outputs(tx, params, extra_args, collect, jit=True)
    eager = outputs(tx, params, extra_args, collect)
    assert_close(eager, expected, rtol, "op by op")

    @jax.jit
    def scanned(state, stream):
        def body(state, data):
            grads, params = data
            return streams.plain(tx, extra_args)(grads, params, state)[::-1]

        return jax.lax.scan(body, state, stream)

    state, found = tx.init(params), []
    for task in range(2):
        if task:
            state = streams.boundary(state, params, collect)
        state, updates = scanned(state, streams.stack(streams.stream(params, task)))
        found += [
            jax.tree.map(lambda u, i=i: u[i], updates) for i in range(streams.STEPS)
        ]
    assert_close(found, expected, rtol, "in a scan")


def check_vmap(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
    collect: Collect = collect_synthetic,
    rtol: float = 1e-5,
) -> None:
    """``jax.vmap`` over two seeds with memories of their own equals two runs.

    Args:
      tx: The transformation.
      params: The parameters that the streams are about.
      extra_args: ``updates -> extra arguments`` that it needs.
      collect: ``(opt_state, params) -> Statistics``.
      rtol: Relative tolerance; batched products round differently.
    """
    single = streams.jitted(tx, extra_args)
    rows = []
    for seed in range(2):
        other = jax.tree.map(lambda p, s=seed: p + s, params)
        state = streams.boundary(tx.init(other), other, collect)
        rows.append((*streams.stream(other, 1 + seed)[0], state))
    expected = streams.stack([single(*row)[0] for row in rows])
    updates, _ = jax.jit(jax.vmap(streams.plain(tx, extra_args)))(*streams.stack(rows))
    assert_close(updates, expected, rtol, "under vmap")
