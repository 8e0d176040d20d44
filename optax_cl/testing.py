"""The contract that every gradient transformation here keeps, as checks.

One function for one property, each raising ``AssertionError`` (or letting the error of
the transformation through) where it does not hold; ``check_contract`` runs them all.
They are public so that a transformation written elsewhere can be held to the same
contract, in one line of its test:

    optax_cl.testing.check_contract(lambda strength=0.5: my_optimizer(strength), params)

All checks feed one *stream*: gradients and parameters drawn once from a fixed key, the
same for every way of running the transformation, with a task boundary in its middle.
So two runs see equal input whatever they return, and a rule that is discontinuous at
the anchor can't blow rounding up.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

import optax_cl

ExtraArgs = Callable[[chex.ArrayTree], dict[str, Any]]
Collect = Callable[[optax.OptState, optax.Params], optax_cl.Statistics]

OBJECTIVES = ("parabola", "rosenbrock", "matrix", "mixed")

_STEPS = 2  # of the stream, before a boundary and after it
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
        key = jax.random.fold_in(jax.random.key(11), number)
        inputs = [
            jax.random.normal(jax.random.fold_in(key, i), (size, _NUM_CLASSES, p.size))
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


def check_contract(
    make_tx: Callable[..., optax.GradientTransformation],
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
    agreeing_extra_args: ExtraArgs | None = None,
    collect: Collect = collect_synthetic,
    links: Callable[..., Sequence[optax.GradientTransformation]] | None = None,
    converges: bool = True,
) -> None:
    """Runs every check of this module.

    Args:
      make_tx: Makes a complete optimizer, learning rate included, around the
        transformation in question: what it returns is added to parameters. Its
        arguments with numeric defaults are the hyper-parameters to inject; those
        annotated ``optax.ScalarOrSchedule`` are also given a schedule.
      params: A small tree of float32 arrays with two leaves or more; the last of them
        is the one that the checks of masks hide.
      extra_args: ``updates -> extra arguments`` of the update.
      agreeing_extra_args: The same for the check of convergence, where memory should
        not contradict the objective; ``extra_args`` if None.
      collect: ``(opt_state, params) -> Statistics`` at a task boundary. The checks of
        masks set the hidden leaf to zero and expect that it then takes no part.
      links: As ``make_tx``, but the links of a chain in which nothing captures; without
        it, that plain and capturing chains agree is not checked.
      converges: Whether the optimizer is meant to find the minimum of an objective.

    Raises:
      AssertionError: If a property does not hold.

    Example:
      >>> import jax.numpy as jnp, optax, optax_cl
      >>> from optax_cl import testing
      >>> def make(strength: optax.ScalarOrSchedule = 3.0):
      ...   return optax_cl.chain(optax_cl.ewc(strength), optax.sgd(0.1))
      >>> testing.check_contract(
      ...     make, {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, converges=False)
    """
    tx = make_tx()
    check_accepts_extra_args(tx, params, extra_args=extra_args)
    check_update_dtypes(tx, params, extra_args=extra_args)
    check_state_is_stable(tx, params, extra_args=extra_args)
    check_map_params(tx, params)
    check_empty_tree(tx, extra_args=extra_args)
    streamed = {"extra_args": extra_args, "collect": collect}
    check_tasks(tx, params, **streamed)
    check_jit_and_scan(tx, params, **streamed)
    check_vmap(tx, params, **streamed)
    check_masks(tx, params, **streamed)
    check_multi_steps(tx, params, **streamed)
    check_apply_if_finite(tx, params, **streamed)
    check_inject_hyperparams(make_tx, params, **streamed)
    check_schedules(make_tx, params, **streamed)
    if links is not None:
        check_explicit_raw(links(), params, **streamed)
    if converges:
        agreeing = extra_args if agreeing_extra_args is None else agreeing_extra_args
        check_converges(tx, extra_args=agreeing)


# --- Properties of one update, seen by tracing it ------------------------------------


def check_accepts_extra_args(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
) -> None:
    """It is of the type that receives extra arguments, and ignores unknown ones.

    Args:
      tx: The transformation.
      params: Any parameters.
      extra_args: ``updates -> extra arguments`` that it needs.
    """
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        raise AssertionError(
            "the transformation is no GradientTransformationExtraArgs: inside a chain "
            f"it would lose extra arguments. Got {type(tx).__name__}."
        )

    def update(updates, state, params):
        known = extra_args(updates)
        return tx.update(updates, state, params, **known, an_unknown_argument=params)

    jax.eval_shape(update, params, tx.init(params), params)


def check_update_dtypes(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
) -> None:
    """Updates have the shapes and dtypes of bfloat16, float16 and float32 parameters.

    Args:
      tx: The transformation.
      params: Any parameters; they are cast.
      extra_args: ``updates -> extra arguments`` that it needs.
    """
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        cast = optax.tree.cast(params, dtype)
        updates, _ = _abstract_update(tx, cast, extra_args)
        _assert_same_types(updates, cast, f"updates of {jnp.dtype(dtype)} parameters")


def check_state_is_stable(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
) -> None:
    """An update keeps the state's structure, shapes and dtypes, whatever the dtype.

    It traces ``jax.lax.cond`` between the old and the new state, for parameters in
    bfloat16, float16, float32, and (in 64-bit mode) float64.

    Args:
      tx: The transformation.
      params: Any parameters; they are cast.
      extra_args: ``updates -> extra arguments`` that it needs.
    """

    def either(flag, updates, state, params):
        def new():
            return tx.update(updates, state, params, **extra_args(updates))[1]

        return jax.lax.cond(flag, new, lambda: state)

    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            cast = optax.tree.cast(params, dtype)
            state = tx.init(cast)
            what = f"the state of {jnp.dtype(dtype)} parameters"
            for leaf in jax.tree.leaves(state):
                if not isinstance(leaf, jax.Array):
                    raise AssertionError(f"{what} holds {leaf!r}, which is no array.")
            _, new = _abstract_update(tx, cast, extra_args)
            _assert_same_types(new, state, what)
            jax.eval_shape(either, jnp.array(True), cast, state, cast)


def check_map_params(tx: optax.GradientTransformation, params: optax.Params) -> None:
    """``optax.tree.map_params`` with the identity returns the state.

    It calls ``init`` with a placeholder that has no leaves: an ``init`` that indexes
    leaves or reads values breaks there.

    Args:
      tx: The transformation.
      params: Any parameters.
    """
    state = tx.init(params)
    mapped = optax.tree.map_params(tx.init, lambda leaf: leaf, state)
    _assert_same_types(mapped, state, "the state mapped by optax.tree.map_params")
    chex.assert_trees_all_equal(mapped, state)


def check_empty_tree(
    tx: optax.GradientTransformation, *, extra_args: ExtraArgs = no_extra_args
) -> None:
    """A tree without leaves gives an update without leaves.

    Args:
      tx: The transformation.
      extra_args: ``updates -> extra arguments`` that it needs.
    """
    empty: dict[str, Any] = {}
    updates, _ = tx.update(empty, tx.init(empty), empty, **extra_args(empty))
    if jax.tree.leaves(updates):
        raise AssertionError(f"an empty tree became {updates}.")


# --- Ways of running it over tasks ---------------------------------------------------


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
        for grads, _ in _stream(params, task):
            params, state = step(params, state, grads)
            _assert_same_types(state, expected, "the state after a step")
        statistics = collect(state, params)
        try:
            state = boundary(state, params, statistics)
        except ValueError as error:
            if "outside `jit`" not in str(error):
                raise
            state = optax_cl.end_task(state, params, statistics)
            state = optax_cl.begin_task(state, params)
        _assert_same_types(state, expected, "the state after a boundary")
    if traces != 1:
        raise AssertionError(
            f"the step was traced {traces} times in {num_tasks} tasks; once would do."
        )
    for leaf in jax.tree.leaves((params, state)):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not jnp.all(jnp.isfinite(leaf)):
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
    expected = _run(_jitted(tx, extra_args), tx.init(params), params, collect)
    eager = _run(_plain(tx, extra_args), tx.init(params), params, collect)
    _assert_close(eager, expected, rtol, "op by op")

    @jax.jit
    def scanned(state, stream):
        def body(state, data):
            grads, params = data
            return _plain(tx, extra_args)(grads, params, state)[::-1]

        return jax.lax.scan(body, state, stream)

    state, outputs = tx.init(params), []
    for task in range(2):
        if task:
            state = _boundary(state, params, collect)
        state, updates = scanned(state, _stack(_stream(params, task)))
        outputs += [jax.tree.map(lambda u, i=i: u[i], updates) for i in range(_STEPS)]
    _assert_close(outputs, expected, rtol, "in a scan")


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
    single = _jitted(tx, extra_args)
    rows = []
    for seed in range(2):
        other = jax.tree.map(lambda p, s=seed: p + s, params)
        state = _boundary(tx.init(other), other, collect)
        rows.append((*_stream(other, 1 + seed)[0], state))
    expected = _stack([single(*row)[0] for row in rows])
    updates, _ = jax.jit(jax.vmap(_plain(tx, extra_args)))(*_stack(rows))
    _assert_close(updates, expected, rtol, "under vmap")


# --- Inside the wrappers of Optax ----------------------------------------------------


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
    expected = _run(with_none, tx.init(without), params, collect, at=lambda p: without)

    masked = optax.masked(tx, seen)
    found = _run(_plain(masked, extra_args), masked.init(params), params, collect, hold)
    grads = [g for task in range(2) for g, _ in _stream(params, task)]
    for updates, g in zip(found, grads, strict=True):
        chex.assert_trees_all_equal(
            jax.tree.leaves(updates)[-1],
            jax.tree.leaves(g)[-1],
        )
    _assert_close([replace_last(u, None) for u in found], expected, rtol, "masked")

    labels = jax.tree.map(lambda s: "seen" if s else "hidden", seen)
    parted = optax.partition({"seen": tx, "hidden": optax.sgd(1.0)}, labels)
    found = _run(_plain(parted, extra_args), parted.init(params), params, collect, hold)
    _assert_close([replace_last(u, None) for u in found], expected, rtol, "partition")


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
    micro = _jitted(twice, extra_args)

    def step(grads, params, state):
        first, state = micro(grads, params, state)
        if any(jnp.any(u != 0) for u in jax.tree.leaves(first)):
            raise AssertionError(f"a micro-step that emits nothing gave {first}.")
        return micro(grads, params, state)

    expected = _run(_jitted(tx, extra_args), tx.init(params), params, collect)
    found = _run(step, twice.init(params), params, collect)
    _assert_close(found, expected, rtol, "inside multi_steps")


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
    update = _jitted(guarded, extra_args)

    def step(grads, params, state):
        broken = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grads)
        skipped, state = update(broken, params, state)
        if any(jnp.any(u != 0) for u in jax.tree.leaves(skipped)):
            raise AssertionError(f"a gradient of NaN became the update {skipped}.")
        return update(grads, params, state)

    expected = _run(_jitted(tx, extra_args), tx.init(params), params, collect)
    found = _run(step, guarded.init(params), params, collect)
    _assert_close(found, expected, rtol, "inside apply_if_finite")


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
    tx, injected = make_tx(), optax.inject_hyperparams(make_tx)()
    expected = _run(_plain(tx, extra_args), tx.init(params), params, collect)
    found = _run(_jitted(injected, extra_args), injected.init(params), params, collect)
    _assert_close(found, expected, rtol, "inside inject_hyperparams")


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
    tx, scheduled = make_tx(), make_tx(**schedules)
    _abstract_update(scheduled, params, extra_args)
    expected = _run(_plain(tx, extra_args), tx.init(params), params, collect)
    found = _run(_plain(scheduled, extra_args), scheduled.init(params), params, collect)
    _assert_close(found, expected, rtol, f"with schedules for {list(numbers)}")


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

    expected = _run(
        _plain(captured, extra_args), captured.init(params), params, collect
    )
    found = _run(with_raw, plain.init(params), params, collect)
    chex.assert_trees_all_equal(found, expected)


# --- Convergence ---------------------------------------------------------------------


def check_converges(
    tx: optax.GradientTransformation,
    objective: str = "mixed",
    *,
    extra_args: ExtraArgs = no_extra_args,
    num_steps: int = 3000,
    atol: float = 0.02,
) -> None:
    r"""It finds the minimum of a small objective, in one ``jax.lax.scan``.

    ``"parabola"``: :math:`\|x - (1, -1, 1)\|^2`. ``"rosenbrock"``: :math:`(1-x)^2 +
    100\,(y-x^2)^2`. ``"matrix"``: :math:`\|AX - B\|^2` for a well-conditioned A.
    ``"mixed"``: all three at once, in a tree of a tuple and a dict.

    Args:
      tx: The optimizer, without finished tasks.
      objective: One of ``OBJECTIVES``.
      extra_args: ``updates -> extra arguments`` that it needs; they should not
        contradict the objective.
      num_steps: Length of the scan.
      atol: Largest distance of any entry from the minimum.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {OBJECTIVES}; got {objective!r}.")
    start, target, loss = _objective(objective)

    def body(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params, **extra_args(grads))
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params):
        return jax.lax.scan(body, (params, tx.init(params)), length=num_steps)[0][0]

    chex.assert_trees_all_close(run(start), target, rtol=0, atol=atol)


def _objective(name):
    a = jnp.array([[2.0, 0.5, 0.0], [0.5, 1.5, 0.0], [0.0, 0.5, 1.0]])
    solution = jnp.array([[1.0, -0.5], [0.5, 1.0], [-1.0, 0.0]])
    corner = jnp.array([1.0, -1.0, 1.0])

    def parabola(x):
        return jnp.sum((x - corner) ** 2)

    def rosenbrock(x):
        return (1.0 - x[0]) ** 2 + 100.0 * (x[1] - x[0] ** 2) ** 2

    def matrix(x):
        return jnp.sum((a @ (x - solution)) ** 2)

    def mixed(tree):
        (x, y), z = tree["vectors"], tree["matrix"]
        return parabola(x) + rosenbrock(y) + matrix(z)

    parts = {
        "parabola": (jnp.zeros(3), corner, parabola),
        "rosenbrock": (jnp.array([0.0, 0.5]), jnp.ones(2), rosenbrock),
        "matrix": (jnp.zeros((3, 2)), solution, matrix),
    }
    if name != "mixed":
        return parts[name]
    start, target = (
        {
            "vectors": (parts["parabola"][i], parts["rosenbrock"][i]),
            "matrix": parts["matrix"][i],
        }
        for i in (0, 1)
    )
    return start, target, mixed


# --- The stream ----------------------------------------------------------------------


def _stream(params, task):
    """Gradients and parameters of a task's steps, as drawn once for all runs."""
    key = jax.random.fold_in(jax.random.key(1), task)
    return [
        (
            _noise(params, jax.random.fold_in(key, 2 * step)),
            jax.tree.map(
                lambda p, n: p + 0.1 * n,
                params,
                _noise(params, jax.random.fold_in(key, 2 * step + 1)),
            ),
        )
        for step in range(_STEPS)
    ]


def _noise(tree, key):
    """Normal numbers; those of a leaf depend on its place and shape only."""
    leaves, structure = jax.tree.flatten(tree)
    drawn = [
        jax.random.normal(jax.random.fold_in(key, i), x.shape).astype(x.dtype)
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


def _run(update, state, params, collect, hold=lambda p: p, at=lambda p: p):
    """Updates of every step of two tasks with a boundary between them.

    ``hold`` is applied to the parameters of every step, ``at`` gives those of the
    boundary.
    """
    outputs = []
    for task in range(2):
        if task:
            state = _boundary(state, at(params), collect)
        for grads, here in _stream(params, task):
            updates, state = update(grads, hold(here), state)
            outputs.append(updates)
    return outputs


def _boundary(state, params, collect):
    state = optax_cl.end_task(state, params, collect(state, params))
    return optax_cl.begin_task(state, params)


def _plain(tx, extra_args):
    def update(grads, params, state):
        return tx.update(grads, state, params, **extra_args(grads))

    return update


@functools.lru_cache(maxsize=4)
def _jitted(tx, extra_args):
    return jax.jit(_plain(tx, extra_args))


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _abstract_update(tx, params, extra_args):
    return jax.eval_shape(_plain(tx, extra_args), params, params, tx.init(params))


def _assert_same_types(tree, like, what):
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


def _assert_close(found, expected, rtol, what):
    try:
        chex.assert_trees_all_close(found, expected, rtol=rtol, atol=rtol * 0.1)
    except AssertionError as error:
        raise AssertionError(f"{what} it gives other updates: {error}") from error
