r"""MAS: a quadratic pull, weighted by how the outputs react to each parameter."""

from typing import NamedTuple

import chex
import optax

from optax_cl._core import checks, importance, quadratic, sensitivity, tasks


class MasState(NamedTuple):
    """State of ``mas``."""

    count: chex.Array  # int32 [], steps done (for a schedule)
    strength: chex.Array  # float32 [], lambda at the next step
    memory: importance.ImportanceMemory  # importance and anchors


def mas(
    strength: optax.ScalarOrSchedule,
    *,
    anchors: str = "latest",
    accumulate: str = "sum",
    decay: chex.Numeric | None = None,
    ema_init: str = "zero",
    capacity: int | None = None,
    overflow: str = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""Memory aware synapses: a quadratic penalty that needs no labels.

    At a boundary ``collect`` measures how strongly the squared length of the network's
    outputs :math:`f` reacts to each parameter,

    .. math:: \Omega_k = \frac1N \sum_x
       \Big| \nabla_\theta \lVert f_\theta(x) \rVert_2^2 \Big| ,

    ``end_task`` adds it up over tasks, and from then on the penalty and what is added
    to the updates are

    .. math::
      \lambda \big\langle \textstyle\sum_k \Omega_k, (\theta - \theta^*)^2 \big\rangle,
      \qquad g \leftarrow g + 2\lambda \textstyle\sum_k \Omega_k\,(\theta - \theta^*),

    with :math:`\theta^*` the newest solution. Before the first boundary, and with
    strength 0, updates pass unchanged.

    **No labels.** Of the task only ``outputs`` is called, and any inputs serve: those
    that the network will see later, say. ``optax_cl.Task(outputs=...)`` is enough.
    Give what is used at test time: evaluation mode, the active head only. All axes but
    the first belong to an example; a sequence's items are summed over.

    **Scale.** Outputs a times as large have importances a² times as large; no
    strength carries over from another network. There is no factor one half in the
    penalty, as published: ``ewc`` with the same importance has twice the strength.

    **Anchors and accumulation** are those of ``ewc``. ``anchors="latest"``, the
    default, is the published form; ``"merged"`` and ``"separate"`` keep each task's
    importance around that task's own solution, another objective.

    **Placement.** As ``ewc``, which has the figures: before the moments, a penalty in
    the loss; after them, decoupled; never behind the learning rate.

    **Memory.** Two float32 trees like params (``"separate"``: two for each of
    ``capacity`` tasks). **Work per step.** One read of both. **At a boundary** one
    forward and one backward pass an example, with up to 256 MB of per-example gradients
    at a time, or those of one example if the model is larger.

    Args:
      strength: Lambda, at least 0: a number, a scalar array or tracer, or a schedule
        over steps.
      anchors: ``"latest"``, ``"merged"`` or ``"separate"``.
      accumulate: ``"sum"``, ``"decay"`` or ``"ema"``, as in ``ewc``.
      decay: Factor on past tasks for ``"decay"`` (in [0, 1]) and ``"ema"`` (in [0, 1)).
      ema_init: ``"zero"``, ``"first"`` or ``"debias"``.
      capacity: Tasks that fit, for ``"separate"`` only.
      overflow: What ``"separate"`` does with one task too many: ``"error"`` or
        ``"merge"``.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``MasState``; its update needs
      ``params``.

    Raises:
      TypeError: By ``collect``, for outputs that are not real floating-point numbers.
      ValueError: For an argument out of range or without meaning beside the others; at
        trace time without ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl
      >>> from optax_cl.penalties import mas
      >>> task = optax_cl.Task(outputs=lambda w, x: x @ w)  # no labels anywhere
      >>> tx = optax_cl.chain(mas(1.0), optax.sgd(0.1))
      >>> params = jnp.array([[1.0], [1.0]])
      >>> state = tx.init(params)
      >>> inputs = [jnp.array([[1.0, 0.0], [-1.0, 0.0]])]  # use the first row only
      >>> stats = optax_cl.collect(
      ...     state, params, inputs, task=task, key=jax.random.key(0))
      >>> state = optax_cl.end_task(state, params, stats)
      >>> print(state[0].memory.importance.ravel())  # |2 f x|
      [2. 0.]

    References:
      Aljundi et al, `Memory Aware Synapses: Learning what (not) to forget
      <https://arxiv.org/abs/1711.09601>`_, 2018

    Differs from the paper:
      1. Nothing in the definition; code that takes the absolute value of a batch's
         summed gradient computes a lower bound, equal for batches of one example only.
      2. An importance that is not finite counts as zero.
    """
    checks.check_choice("anchors", anchors, importance.ANCHORS)
    rules = importance.make_rules(
        anchors, accumulate, decay, ema_init, capacity, overflow
    )
    checks.check_number("strength", strength, low=0.0, schedule=True)

    def init_fn(params):
        return MasState(**quadratic.start(params, strength, rules, decay))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        return quadratic.add_pull(
            "mas", updates, state, params, strength, decay, factor=2.0
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mas_loss(opt_state: optax.OptState, params: optax.Params) -> chex.Array:
    r"""The penalty's value, for logging: what ``mas`` adds is its gradient.

    :math:`\lambda \langle \sum_k\Omega_k, (\theta - \theta^*)^2\rangle`, with the
    strength of the coming step, summed over all MAS states in ``opt_state``.

    Args:
      opt_state: Any optimizer state that holds a ``MasState``, at any depth.
      params: Where to evaluate.

    Returns:
      A float32 scalar, at least 0.

    Raises:
      ValueError: If there is no ``MasState``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_cl.penalties import mas, mas_loss
      >>> params = jnp.ones(3)
      >>> print(mas_loss(optax.chain(mas(1.0), optax.sgd(0.1)).init(params), params))
      0.0
    """
    return quadratic.value(opt_state, params, MasState, "`mas`", factor=2.0)


def _end_task(state, params, results):
    memory = importance.consolidate(
        state.memory, results[sensitivity.PASS.name], params
    )
    return state._replace(memory=memory)


tasks.register_boundary(
    MasState,
    quadratic.boundary(passes=lambda state: (sensitivity.PASS,), end_task=_end_task),
)
