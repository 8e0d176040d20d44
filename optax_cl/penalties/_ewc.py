r"""EWC: a quadratic pull towards past solutions, weighted by the Fisher."""

import chex
import optax

from optax_cl._core import checks, ewc_state, importance, quadratic, statistics


def ewc(
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
    r"""Elastic weight consolidation: adds the gradient of a quadratic penalty.

    With the diagonal Fisher :math:`F_j` and the solution :math:`\theta^*_j` of each
    finished task j, the penalty and what is added to the updates are

    .. math::
      \frac{\lambda}{2} \sum_j \big\langle F_j, (\theta - \theta^*_j)^2 \big\rangle,
      \qquad g \leftarrow g + \lambda \sum_j F_j\,(\theta - \theta^*_j).

    Before the first boundary, and with strength 0, updates pass unchanged. At a
    boundary ``collect`` estimates the Fisher on the finished task's data and
    ``end_task`` adds it to the memory.

    **Anchors.** ``"merged"`` is the sum above, exactly, in constant memory: it keeps
    :math:`S_0 = \sum_j F_j` and the mean anchor :math:`\bar\theta = \sum_j F_j
    \theta^*_j / S_0`, since the pull equals :math:`S_0(\theta - \bar\theta)`, which is
    exactly zero at a single anchor and does not cancel near it (where :math:`S_0` is
    zero the mean is the latest solution). ``"separate"`` keeps each task, at K times
    the memory and work; same updates up to rounding. ``"latest"`` anchors
    :math:`S_0` at the newest solution only (Huszar; Schwarz), another objective: its
    pull differs by :math:`S_0(\bar\theta - \theta^*_K)`.

    **Accumulation over tasks** (:math:`\gamma` = ``decay``):

    ============  ======================================  ==============================
    accumulate    importance after task k                 importance in the penalty
    ============  ======================================  ==============================
    ``"sum"``     :math:`S_k = S_{k-1} + F_k`             :math:`S_k`
    ``"decay"``   :math:`S_k = \gamma S_{k-1} + F_k`      :math:`\gamma S_k` (Schwarz)
    ``"ema"``     :math:`S_k = \gamma S_{k-1} +           :math:`S_k`; ``"debias"``:
                  (1-\gamma) F_k`                         :math:`S_k / (1-\gamma^k)`
    ============  ======================================  ==============================

    ``ema_init="zero"`` starts at zero: :math:`(1-\gamma)` times the sum of ``"decay"``,
    so strength :math:`\gamma\lambda/(1-\gamma)` trains as ``"decay"`` with
    :math:`\lambda` does. ``"first"`` starts at :math:`F_1`, whose weight is then
    :math:`1/(1-\gamma)` times that of the others; ``"debias"`` makes the weights sum to
    one. ``decay=1`` is the plain sum for ``"decay"``; an average would never learn, and
    it is refused. Online EWC as published is ``anchors="latest",
    accumulate="decay"``; with other anchors each task's term decays in the same way.

    **Placement** decides how large a pull becomes a step. Raw gradient 0.01, pull 0.1
    (ten times larger), both constant, first step of Adam in learning rates:

    ====================================================================  ==============
    place                                                                 step
    ====================================================================  ==============
    before the moments, ``second_moment="routed"``, or ``optax.adam``     1.0
    before the moments, ``second_moment="max"`` (the default)             1.0
    before the moments, ``second_moment="raw"``                           11.0
    after the moments, before the learning rate                           1.1
    ====================================================================  ==============

    In all of them updates point along the gradient, uphill. Behind a learning rate they
    point downhill, and what is added there pushes *away* from the anchor, faster the
    farther: never ``optax.chain(optax.adam(1e-3), ewc(1.0))``, but ``optax.chain(
    ewc(1.0), optax.adam(1e-3))``. A transformation sees numbers, not what made them, so
    nothing can raise here; for a penalty behind the rate there is ``ewc_proximal``.

    *Before the moments* is the published form, a penalty in the loss; Adam divides it
    by :math:`\sqrt\nu`, and with ``"routed"`` or ``"max"`` a large pull also shrinks
    the steps of later gradients. With ``"raw"`` the denominator knows nothing of the
    pull, and steps have no bound. *After the moments* (as AdamW does with decay) the
    pull is taken as it is: stable if learning rate times strength times the largest
    importance stays below 2. Put it outside ``optax_cl.chain`` (in front of it), and
    the raw gradient includes the pull, as in shared routing. For a step that is stable
    whatever the strength, see ``ewc_proximal``.

    **Choosing a strength.** It depends on the estimator and on nothing else more: the
    Fisher shrinks as the network grows confident, and good values span 1e0 to 1e9. Do
    not carry one over from code with another estimator, or without the factor one half
    (twice the strength here). With the loss a mean over examples, the Bayesian value is
    the number of old examples over that of new ones: ``weight_by_count=True`` and
    strength ``1 / num_new``.

    **Memory.** Two float32 trees like params (``"separate"``: two for each of
    ``capacity`` tasks), whatever the dtype of the parameters; the difference to the
    anchor is taken in float32 as well. **Work per step.** One read of both.

    **Several devices.** Give updates that are averaged already; the pull is then the
    same everywhere. With loss scaling, put ``ewc`` after the unscaling.

    Args:
      strength: Lambda, at least 0: a number, a scalar array or tracer, or a schedule
        over steps.
      anchors: ``"merged"``, ``"separate"`` or ``"latest"``.
      accumulate: ``"sum"``, ``"decay"`` or ``"ema"``.
      decay: Factor on past tasks for ``"decay"`` (in [0, 1]) and ``"ema"`` (in [0, 1)).
      ema_init: ``"zero"``, ``"first"`` or ``"debias"``.
      estimator: Of the Fisher: ``"exact"``, ``"sampled"``, ``"empirical"``,
        ``"predicted"`` or ``"batched"``; see ``fisher_diagonal``.
      capacity: Tasks that fit, for ``"separate"`` only. A static size: with
        ``optax.inject_hyperparams`` list it in ``static_args``.
      overflow: What ``"separate"`` does with one task too many: ``"error"`` (raised by
        ``collect`` and ``end_task``; inside jit, where it can't be known, they refuse
        at trace time whether full or not) or ``"merge"`` (the two oldest become one,
        exactly as far as gradients go).
      weight_by_count: Whether each Fisher is multiplied by the number of labels it was
        averaged over.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``EwcState``; its update needs
      ``params``.

    Raises:
      ValueError: For an argument out of range or without meaning beside the others; at
        trace time without ``params``.

    Warns:
      UserWarning: With ``estimator="batched"``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl
      >>> from optax_cl.penalties import ewc
      >>> task = optax_cl.classification(lambda p, b: b[0] @ p, lambda b: b[1])
      >>> tx = optax_cl.chain(ewc(10.0), optax.sgd(0.1))
      >>> params = jnp.zeros((2, 2))
      >>> state = tx.init(params)
      >>> batches = [(jnp.array([[1.0, 0.0]]), jnp.array([0]))]  # uses the first row
      >>> stats = optax_cl.collect(
      ...     state, params, batches, task=task, key=jax.random.key(0))
      >>> state = optax_cl.end_task(state, params, stats)
      >>> for _ in range(100):  # the next task pulls everything towards 1
      ...     updates, state = tx.update(params - 1.0, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(2))  # 1 / (1 + 10 * 0.25) where there is importance
      [[0.29 0.29]
       [1.   1.  ]]

    References:
      Kirkpatrick et al, `Overcoming catastrophic forgetting in neural networks
      <https://arxiv.org/abs/1612.00796>`_, 2017

      Huszar, `On Quadratic Penalties in Elastic Weight Consolidation
      <https://arxiv.org/abs/1712.03847>`_, 2017

      Schwarz et al, `Progress & Compress <https://arxiv.org/abs/1805.06370>`_, 2018

    Differs from the paper:
      1. The first paper leaves the estimator open; the default is the exact Fisher.
      2. Merged anchors keep a mean instead of all solutions (same gradient).
      3. ``"ema"``, often called online EWC, is not the rule of Schwarz et al.; Fishers
         are not normalised per task.
      4. An importance that is not finite counts as zero.
    """
    fisher = statistics.make_rules(estimator, weight_by_count)
    checks.check_choice("anchors", anchors, importance.ANCHORS)
    rules = importance.make_rules(
        anchors, accumulate, decay, ema_init, capacity, overflow
    )
    checks.check_number("strength", strength, low=0.0, schedule=True)

    def init_fn(params):
        return ewc_state.init(params, strength, rules, decay, fisher)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        return quadratic.add_pull("ewc", updates, state, params, strength, decay)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ewc_loss(opt_state: optax.OptState, params: optax.Params) -> chex.Array:
    r"""The penalty's value, for logging: what ``ewc`` adds is its gradient.

    :math:`\frac\lambda2 \sum_j \langle F_j, (\theta - \theta^*_j)^2\rangle`, with the
    strength of the coming step, summed over all EWC states in ``opt_state``. Exact for
    merged anchors too, in value as in gradient.

    Args:
      opt_state: Any optimizer state that holds an ``EwcState``, at any depth.
      params: Where to evaluate.

    Returns:
      A float32 scalar, at least 0.

    Raises:
      ValueError: If there is no ``EwcState``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_cl.penalties import ewc, ewc_loss
      >>> params = jnp.ones(3)
      >>> print(ewc_loss(optax.chain(ewc(1.0), optax.sgd(0.1)).init(params), params))
      0.0
    """
    made_by = "`ewc` or `ewc_proximal`"
    return quadratic.value(opt_state, params, ewc_state.EwcState, made_by)
