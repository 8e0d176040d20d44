r"""Importance as attenuation: important coordinates learn more slowly."""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from optax_cl._core import checks, ewc_state, importance, statistics, tasks

NORMALIZE = ("leaf_max", "none")


class RescaleByImportanceState(NamedTuple):
    """State of ``rescale_by_importance``."""

    count: chex.Array  # int32 [], steps done (for a schedule)
    memory: importance.ImportanceMemory  # importance, no anchors
    fisher: Any  # statistics.FisherRules, static


def rescale_by_importance(
    strength: optax.ScalarOrSchedule,
    *,
    normalize: str = "leaf_max",
    accumulate: str = "sum",
    decay: chex.Numeric | None = None,
    ema_init: str = "zero",
    estimator: str = "exact",
    weight_by_count: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Attenuates each coordinate of the gradient by its importance to past tasks.

    .. math:: \tilde g = \operatorname{clip}(1 - \lambda\Omega,\, 0,\, 1)\, g,
       \qquad \Omega = S / \max_{\text{leaf}} S \;\text{ or }\; \Omega = S,

    with :math:`S` the Fishers of past tasks accumulated as in ``ewc``. Unlike a
    penalty it has no anchor: it slows learning down and never pulls back. Before the
    first boundary, with strength 0, and in a leaf without any importance, the gradient
    passes unchanged.

    With ``"leaf_max"`` the most important coordinate of each leaf is attenuated by
    :math:`\lambda` and most others hardly, since Fishers are very uneven; a common
    factor in S (``weight_by_count`` with one task, ``"debias"``) then cancels. With
    ``"none"`` the strength has to fit the size of the Fisher.

    **Placement.** A modifier, before the moments, inside ``optax_cl.chain`` with
    ``scale_by_decoupled_adam``: the second moment reads the raw gradient, and a
    coordinate attenuated by c takes c times the step (0.50 for c = 0.5, under ``"max"``
    and ``"raw"``). Before plain Adam it is *cancelled* (step 1.00 for any c > 0), since
    Adam is invariant to the scale of a coordinate. After the moments it acts on the
    step itself (0.50). It is diagonal, so no placement leaks into other coordinates.

    **Memory.** One float32 tree like params. **Work per step.** One read of it, two
    with ``"leaf_max"``.

    Args:
      strength: Lambda, at least 0: a number, scalar array, or schedule over steps.
      normalize: ``"leaf_max"`` or ``"none"``.
      accumulate: ``"sum"``, ``"decay"`` or ``"ema"``, as in ``ewc``.
      decay: Factor on past tasks for ``"decay"`` and ``"ema"``.
      ema_init: ``"zero"``, ``"first"`` or ``"debias"``.
      estimator: Of the Fisher; see ``fisher_diagonal``.
      weight_by_count: Whether each Fisher is multiplied by its number of labels.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``RescaleByImportanceState``.

    Raises:
      ValueError: For an argument out of range or without meaning beside the others.

    Warns:
      UserWarning: With ``estimator="batched"``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl
      >>> from optax_cl.penalties import rescale_by_importance
      >>> task = optax_cl.classification(lambda p, b: b[0] @ p, lambda b: b[1])
      >>> tx = optax_cl.chain(
      ...     rescale_by_importance(0.5), optax_cl.scale_by_decoupled_adam())
      >>> params = jnp.zeros((2, 2))
      >>> state = tx.init(params)
      >>> batches = [(jnp.array([[1.0, 0.0]]), jnp.array([0]))]  # uses the first row
      >>> stats = optax_cl.collect(
      ...     state, params, batches, task=task, key=jax.random.key(0))
      >>> state = optax_cl.end_task(state, params, stats)
      >>> print(tx.update(jnp.ones((2, 2)), state, params)[0].round(2))
      [[0.5 0.5]
       [1.  1. ]]

    References:
      `Hidden Failure Modes of Gradient Modification under Adam in Continual Learning
      <https://arxiv.org/abs/2604.22407v1>`_, 2026: a preprint since reported withdrawn;
      cited for the form of the rescaling only.

    Differs from the paper:
      1. The importance is a Fisher of one's choice, accumulated over all past tasks.
      2. A leaf whose importance is zero passes unchanged; dividing by its maximum would
         give NaN.
    """
    fisher = statistics.make_rules(estimator, weight_by_count)
    rules = importance.make_rules(None, accumulate, decay, ema_init, None, "error")
    checks.check_choice("normalize", normalize, NORMALIZE)
    checks.check_number("strength", strength, low=0.0, schedule=True)

    def init_fn(params):
        return RescaleByImportanceState(
            count=jnp.zeros([], jnp.int32),
            memory=importance.init(params, rules, decay),
            fisher=fisher,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        importance.check_updates(state.memory, updates)
        memory = state.memory._replace(decay=importance.decay_array(decay))
        now = importance.value_at(strength, state.count)
        scale = importance.read_scale(memory)

        def attenuate(u, f):
            omega = scale * f
            if normalize == "leaf_max":
                largest = jnp.max(f, initial=0.0)
                omega = f / jnp.where(largest > 0, largest, 1)
            return (jnp.clip(1 - now * omega, 0, 1) * u).astype(u.dtype)

        updates = importance.map_updates(attenuate, updates, memory.importance)
        return updates, RescaleByImportanceState(
            count=optax.safe_increment(state.count), memory=memory, fisher=state.fisher
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


tasks.register_boundary(RescaleByImportanceState, ewc_state.fisher_boundary())
