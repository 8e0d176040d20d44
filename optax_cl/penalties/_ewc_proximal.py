r"""EWC as an implicit step, stable whatever the strength."""

import chex
import jax.numpy as jnp
import optax

from optax_cl._core import (
    checks,
    ewc_state,
    importance,
    quadratic,
    statistics,
    trees,
)


def ewc_proximal(
    learning_rate: optax.ScalarOrSchedule,
    strength: optax.ScalarOrSchedule,
    *,
    anchors: str = "merged",
    accumulate: str = "sum",
    decay: chex.Numeric | None = None,
    ema_init: str = "zero",
    estimator: str = "exact",
    capacity: int | None = None,
    overflow: str = "error",
    weight_by_count: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""EWC whose pull is evaluated at the end of the step, not at its start.

    With the update u that arrives (learning rate included), :math:`S_0=\sum_j F_j` and
    :math:`S_1=\sum_j F_j\theta^*_j`, the parameters become the minimiser of
    :math:`\frac{1}{2\eta}\|\theta' - (\theta+u)\|^2 + \frac\lambda2\sum_j\langle F_j,
    (\theta'-\theta^*_j)^2\rangle`,

    .. math:: \theta' = \frac{\theta + u + \eta\lambda S_1}{1 + \eta\lambda S_0} .

    Each coordinate moves to a weighted mean of where the optimizer wants it and of the
    anchors, so no strength makes it diverge, where the explicit step needs
    :math:`\eta\lambda\max F < 2`. As :math:`\eta\to 0` it equals ``ewc`` placed after
    the moments; on plain SGD with learning rate and strength 1, and an importance of
    4, ten explicit steps grow a displacement 1 to 59049, ten implicit ones shrink it
    to 1e-7. Fixed points are those of ``optax.sgd`` on the penalised loss.

    **Placement.** Last, after the learning rate: it turns the final update into
    another. ``learning_rate`` must be the one before it in the chain (a schedule is
    read at this method's own step count). Anything behind it (another scale) breaks the
    formula, and so does ``post`` of ``decoupled_adamw``, which the rate comes after:
    chain it behind ``decoupled_adamw``. Moments never see the pull; with Adam in front
    the metric of the proximal step is still the plain one (decoupled, as AdamW's
    decay).

    **Memory, state, boundaries and the meaning of all other arguments** are those of
    ``ewc``, of which this is another way to take the step.

    Args:
      learning_rate: Eta, at least 0: a number, scalar array, or schedule.
      strength: Lambda, at least 0, likewise.
      anchors: See ``ewc``, as for all that follow.
      accumulate: ``"sum"``, ``"decay"`` or ``"ema"``.
      decay: Factor on past tasks for ``"decay"`` and ``"ema"``.
      ema_init: ``"zero"``, ``"first"`` or ``"debias"``.
      estimator: Of the Fisher.
      capacity: Tasks that fit, for ``"separate"`` only.
      overflow: ``"error"`` or ``"merge"``.
      weight_by_count: Whether each Fisher is multiplied by its number of labels.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``EwcState``; its update needs
      ``params``.

    Raises:
      ValueError: As ``ewc``.

    Warns:
      UserWarning: With ``estimator="batched"``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_cl.penalties import ewc_proximal
      >>> tx = optax.chain(optax.sgd(0.1), ewc_proximal(0.1, 1e6))
      >>> params = jnp.ones(2)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> print(updates)  # no task yet: the plain step
      [-0.1 -0.1]

    References:
      Kirkpatrick et al, `Overcoming catastrophic forgetting in neural networks
      <https://arxiv.org/abs/1612.00796>`_, 2017

      Parikh and Boyd, `Proximal Algorithms
      <https://web.stanford.edu/~boyd/papers/prox_algs.html>`_, 2014

    Differs from the paper:
      1. The papers on EWC step explicitly; the objective is theirs.
    """
    fisher = statistics.make_rules(estimator, weight_by_count)
    checks.check_choice("anchors", anchors, importance.ANCHORS)
    rules = importance.make_rules(
        anchors, accumulate, decay, ema_init, capacity, overflow
    )
    checks.check_number("learning_rate", learning_rate, low=0.0, schedule=True)
    checks.check_number("strength", strength, low=0.0, schedule=True)

    def init_fn(params):
        return ewc_state.init(params, strength, rules, decay, fisher)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.check_params("ewc_proximal", params)
        importance.check_updates(state.memory, updates)
        params = trees.align("params", params, updates)
        eta = importance.value_at(learning_rate, state.count)
        now = importance.value_at(strength, state.count)
        new_state = quadratic.advance(state, strength, decay)
        memory = new_state.memory
        scale = eta * now * importance.read_scale(memory)

        # theta' - theta = u - pull(theta + u) / (1 / scale + S0): the formula above,
        # written so that it is u exactly where there is no importance, and that no
        # product overflows. At least `tiny`, since there 0 / 0 would be NaN.
        def step(u, f, a, p):
            target = jnp.asarray(p, f.dtype) + u
            pull = importance.leaf_pull(memory.rules, f, a, target)
            total = importance.leaf_total(memory.rules, f)
            slack = jnp.maximum(
                1 / jnp.asarray(scale, f.dtype), jnp.finfo(f.dtype).tiny
            )
            return (u - pull / (slack + total)).astype(u.dtype)

        updates = importance.map_updates(
            step, updates, memory.importance, memory.anchor, params
        )
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
