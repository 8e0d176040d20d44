"""Inside the wrappers of Optax it does what it does alone."""

import functools
import inspect
from collections.abc import Callable, Sequence

import chex
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


def check_masks(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
    collect: Collect = collect_synthetic,
    rtol: float = 1e-5,
) -> None:
    """None leaves, ``optax.masked`` and ``optax.partition`` agree, boundaries too.

    What it does to the leaves that it sees must not depend on how the last one is
    hidden: None in its place, masked (whose updates pass unchanged), or given to
    another optimizer. Extra arguments come whole, hidden leaves included.

    Args:
      tx: The transformation.
      params: At least two leaves; the last is hidden.
      extra_args: ``updates -> extra arguments`` that it needs.
      collect: ``(opt_state, params) -> Statistics``; the hidden leaf is zero.
      rtol: Relative tolerance.
    """
    leaves, structure = jax.tree.flatten(params)
    if len(leaves) < 2:
        raise ValueError("`params` needs two leaves or more, since one is hidden.")

    def replace_last(tree, last):
        return jax.tree.unflatten(structure, [*jax.tree.leaves(tree)[:-1], last])

    params = replace_last(params, jnp.zeros_like(leaves[-1]))
    seen = jax.tree.unflatten(structure, [True] * (len(leaves) - 1) + [False])
    # The stream moves all parameters; the hidden leaf has to stay at zero.
    hold = functools.partial(jax.tree.map, lambda s, p: p if s else 0 * p, seen)

    def with_none(grads, params, state):
        short = replace_last(grads, None)
        known = extra_args(short)
        return tx.update(short, state, replace_last(params, None), **known)

    without = replace_last(params, None)
    expected = streams.run(
        with_none, tx.init(without), params, collect, at=lambda p: without
    )

    masked = optax.masked(tx, seen)
    found = outputs(masked, params, extra_args, collect, hold=hold)
    grads = [g for task in range(2) for g, _ in streams.stream(params, task)]
    for updates, g in zip(found, grads, strict=True):
        chex.assert_trees_all_equal(
            jax.tree.leaves(updates)[-1],
            jax.tree.leaves(g)[-1],
        )
    assert_close([replace_last(u, None) for u in found], expected, rtol, "masked")

    labels = jax.tree.map(lambda s: "seen" if s else "hidden", seen)
    parted = optax.partition({"seen": tx, "hidden": optax.sgd(1.0)}, labels)
    found = outputs(parted, params, extra_args, collect, hold=hold)
    assert_close([replace_last(u, None) for u in found], expected, rtol, "partition")


def check_multi_steps(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
    collect: Collect = collect_synthetic,
    rtol: float = 1e-5,
) -> None:
    """Two equal micro-steps in ``optax_cl.multi_steps`` make one step.

    Args:
      tx: The transformation.
      params: The parameters that the stream is about.
      extra_args: ``updates -> extra arguments`` that it needs.
      collect: ``(opt_state, params) -> Statistics``.
      rtol: Relative tolerance.
    """
    twice = optax_cl.multi_steps(tx, 2)
    micro = streams.jitted(twice, extra_args)

    def step(grads, params, state):
        first, state = micro(grads, params, state)
        if any(np.asarray(u).any() for u in jax.tree.leaves(first)):
            raise AssertionError(f"a micro-step that emits nothing gave {first}.")
        return micro(grads, params, state)

    expected = outputs(tx, params, extra_args, collect, jit=True)
    found = streams.run(step, twice.init(params), params, collect)
    assert_close(found, expected, rtol, "inside multi_steps")


def check_apply_if_finite(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
    collect: Collect = collect_synthetic,
    rtol: float = 1e-5,
) -> None:
    """Inside ``optax.apply_if_finite`` it is the same, and a NaN leaves no trace.

    Args:
      tx: The transformation.
      params: The parameters that the stream is about.
      extra_args: ``updates -> extra arguments`` that it needs.
      collect: ``(opt_state, params) -> Statistics``.
      rtol: Relative tolerance.
    """
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=3)
    update = streams.jitted(guarded, extra_args)

    def step(grads, params, state):
        broken = jax.tree.map(lambda g: np.full(g.shape, np.nan, g.dtype), grads)
        skipped, state = update(broken, params, state)
        if any(np.asarray(u).any() for u in jax.tree.leaves(skipped)):
            raise AssertionError(f"a gradient of NaN became the update {skipped}.")
        return update(grads, params, state)

    expected = outputs(tx, params, extra_args, collect, jit=True)
    found = streams.run(step, guarded.init(params), params, collect)
    assert_close(found, expected, rtol, "inside apply_if_finite")


def check_inject_hyperparams(
    make_tx: Callable[..., optax.GradientTransformation],
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
    collect: Collect = collect_synthetic,
    rtol: float = 2e-4,
) -> None:
    """Inside ``optax.inject_hyperparams`` it is the same; hyper-parameters are traced.

    Args:
      make_tx: Makes the transformation; its numeric defaults are injected.
      params: The parameters that the stream is about.
      extra_args: ``updates -> extra arguments`` that it needs.
      collect: ``(opt_state, params) -> Statistics``.
      rtol: Relative tolerance; ``1 - b2`` is rounded to float32 when injected.
    """
    tx, injected = streams.made(make_tx), optax.inject_hyperparams(make_tx)()
    expected = outputs(tx, params, extra_args, collect, jit=True)
    found = outputs(injected, params, extra_args, collect, jit=True)
    assert_close(found, expected, rtol, "inside inject_hyperparams")


def check_schedules(
    make_tx: Callable[..., optax.GradientTransformation],
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
    collect: Collect = collect_synthetic,
    rtol: float = 1e-5,
) -> None:
    """Where ``optax.ScalarOrSchedule`` is annotated, a constant schedule is the number.

    Args:
      make_tx: Makes the transformation; its annotations and defaults are read.
      params: The parameters that the stream is about.
      extra_args: ``updates -> extra arguments`` that it needs.
      collect: ``(opt_state, params) -> Statistics``.
      rtol: Relative tolerance.
    """
    numbers = {
        name: parameter.default
        for name, parameter in inspect.signature(make_tx).parameters.items()
        if parameter.annotation == optax.ScalarOrSchedule
    }
    if not numbers:
        return
    schedules = {name: optax.constant_schedule(n) for name, n in numbers.items()}
    tx, scheduled = streams.made(make_tx), make_tx(**schedules)
    streams.abstract_update(scheduled, params, extra_args)
    expected = outputs(tx, params, extra_args, collect)
    found = outputs(scheduled, params, extra_args, collect)
    assert_close(found, expected, rtol, f"with schedules for {list(numbers)}")


def check_explicit_raw(
    links: Sequence[optax.GradientTransformation],
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
    collect: Collect = collect_synthetic,
) -> None:
    """Plain ``optax.chain`` with ``raw_updates`` given equals ``optax_cl.chain``.

    Args:
      links: The links of the chain.
      params: The parameters that the stream is about.
      extra_args: ``updates -> extra arguments`` that they need.
      collect: ``(opt_state, params) -> Statistics``.
    """
    captured, plain = optax_cl.chain(*links), optax.chain(*links)

    def with_raw(grads, params, state):
        known = extra_args(grads)
        return plain.update(grads, state, params, raw_updates=grads, **known)

    expected = outputs(captured, params, extra_args, collect)
    found = streams.run(with_raw, plain.init(params), params, collect)
    chex.assert_trees_all_equal(found, expected)
