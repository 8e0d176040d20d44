"""Task boundaries for Flax NNX, whose optimizer keeps its state in variables.

``collect``, ``end_task`` and ``begin_task`` as in ``optax_cl``, on an ``nnx.Optimizer``
and its model. A linen ``TrainState`` needs no face of its own: use the functions of
``optax_cl`` on ``state.opt_state`` and ``state.params``, and ``state.replace``.
"""

from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
from flax import nnx

from optax_cl._core import tasks


def classification(
    model: nnx.Module,
    logits: Callable[[Any, Any], chex.Array],
    labels: Callable[[Any], chex.Array],
    *,
    wrt: Any = nnx.Param,
) -> tasks.Task:
    """A ``Task`` for an NNX model with categorical outputs.

    The model's structure is taken once; its arrays are read anew at every ``collect``,
    so one task serves all boundaries. The functions run in evaluation mode
    (``model.eval()``: no dropout, fixed batch statistics); ``model`` itself is left as
    it is.

    Args:
      model: The model.
      logits: ``(model, batch) -> [B, C]`` or ``[B, items, C]``.
      labels: ``batch -> [B]`` or ``[B, items]``, integers.
      wrt: Which variables are parameters, as given to ``nnx.Optimizer``.

    Returns:
      A ``Task`` for the functions of this module.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl, optax_cl.flax
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> tx = optax_cl.decoupled_adamw(0.1, modifiers=[optax_cl.ewc(1.0)])
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> task = optax_cl.flax.classification(
      ...     model, lambda model, batch: model(batch[0]), lambda batch: batch[1])
      >>> batches = [(jnp.eye(2), jnp.array([0, 1]))]
      >>> stats = optax_cl.flax.collect(
      ...     optimizer, model, batches, task=task, key=jax.random.key(0))
      >>> optax_cl.flax.end_task(optimizer, model, stats)
      >>> optax_cl.flax.begin_task(optimizer, model)
    """
    graphdef, _, _ = nnx.split(model, wrt, ...)

    def evaluate(arrays, batch):
        copy = nnx.merge(graphdef, *arrays)
        copy.eval()
        return logits(copy, batch)

    return tasks.classification(evaluate, labels)


def collect(
    optimizer: nnx.Optimizer,
    model: nnx.Module,
    batches: Iterable[chex.ArrayTree],
    *,
    task: tasks.Task,
    key: chex.PRNGKey,
) -> tasks.Statistics:
    """``optax_cl.collect`` on an ``nnx.Optimizer`` and its model.

    Args:
      optimizer: The optimizer.
      model: The model at the end of the task.
      batches: As in ``optax_cl.collect``.
      task: From ``optax_cl.flax.classification``; or a ``Task`` whose functions take
        ``(params, rest)`` in place of ``params``, the two parts of
        ``nnx.split(model, optimizer.wrt, ...)`` as plain arrays.
      key: For labels sampled from the model.

    Returns:
      ``Statistics`` for ``end_task``.

    Raises:
      ValueError: As ``optax_cl.collect``.
    """
    params, rest = _arrays(optimizer, model)
    return tasks.collect(
        nnx.as_pure(optimizer.opt_state),
        params,
        batches,
        task=task,
        key=key,
        frozen=rest,
    )


def end_task(
    optimizer: nnx.Optimizer,
    model: nnx.Module,
    statistics: tasks.Statistics,
    *,
    moments: str = "keep",
) -> None:
    """``optax_cl.end_task``; the optimizer is updated in place.

    Args:
      optimizer: The optimizer.
      model: The model at the end of the task.
      statistics: From ``collect``.
      moments: ``"keep"``, ``"reset"`` or ``"project"``.

    Raises:
      ValueError: As ``optax_cl.end_task``.
    """
    params, _ = _arrays(optimizer, model)
    state = nnx.as_pure(optimizer.opt_state)
    _write(optimizer, tasks.end_task(state, params, statistics, moments=moments))


def begin_task(
    optimizer: nnx.Optimizer, model: nnx.Module, *, reset_nu_max: bool = False
) -> None:
    """``optax_cl.begin_task``; the optimizer is updated in place.

    Args:
      optimizer: The optimizer.
      model: The model with which the task begins.
      reset_nu_max: Whether AMSGrad's running maxima are set to zero.
    """
    params, _ = _arrays(optimizer, model)
    state = nnx.as_pure(optimizer.opt_state)
    _write(optimizer, tasks.begin_task(state, params, reset_nu_max=reset_nu_max))


def _arrays(optimizer: nnx.Optimizer, model: nnx.Module) -> tuple[Any, Any]:
    _, params, rest = nnx.split(model, optimizer.wrt, ...)
    # Random states are typed keys that evaluation does not use, but merging needs them.
    return nnx.as_pure(params), nnx.as_pure(rest)


def _write(optimizer: nnx.Optimizer, new_state: Any) -> None:
    """Puts new leaves into the variables of the old structure."""
    is_variable = lambda n: isinstance(n, nnx.Variable)  # noqa: E731
    old = jax.tree.leaves(optimizer.opt_state, is_leaf=is_variable)
    # A variable over a hole (an unprotected leaf) has no array: it keeps its hole.
    filled = [v for v in old if jax.tree.leaves(nnx.as_pure(v))]
    for variable, leaf in zip(filled, jax.tree.leaves(new_state), strict=True):
        variable.set_value(leaf)
