"""O-LoRA: penalise reading where the adapters of past tasks read."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks, importance, linalg, tasks, trees
from optax_cl.lora import _factors, _rows

PENALTIES = ("l1", "fro")


class OloraState(NamedTuple):
    """State of :func:`olora`."""

    count: chex.Array  # int32 [], steps done (for schedules)
    strength: chex.Array  # float32 [], lambda at the next step
    tasks: chex.Array  # int32 [], tasks stored
    rows: Any  # [*batch, in, capacity * r] at every `a`, at least float32; unused: zero
    rules: Any  # RowRules, static


def olora(
    strength: optax.ScalarOrSchedule,
    *,
    capacity: int,
    penalty: str = "l1",
    overflow: str = "error",
    factors: str = _factors.FACTORS,
) -> optax.GradientTransformationExtraArgs:
    r"""O-LoRA: penalises the overlap of an adapter's rows with those of past tasks.

    With :math:`a_j` ``[in, r]`` the input-side factors of finished tasks and M ``[in,
    K r]`` all of them side by side, the penalty on the factor :math:`a` being trained,
    and what is added to its updates, are

    .. math::
      \lambda \sum_{kl} |M^T a|_{kl}, \quad g \leftarrow g + \lambda M\,
      \operatorname{sign}(M^T a)
      \qquad\text{or}\qquad
      \lambda \|M^T a\|_F^2, \quad g \leftarrow g + 2 \lambda M M^T a

    for ``"l1"`` and ``"fro"``, with sign(0) = 0. The sum runs over *all* finished
    tasks. Nothing else is touched: not ``b``, not magnitudes, not other parameters.
    Before the first boundary updates pass unchanged, whatever the strength.

    This is a regulariser, not a projection: gradients keep their component along old
    rows, and the overlap that remains is a balance of two forces. Even where it is
    zero, the layer's output is unchanged for inputs in the span of old rows only, not
    for the inputs of old tasks. :func:`olora_project` holds the overlap at zero.

    ``end_task`` stores a copy of ``a``. Then merge the adapters into the kernels (their
    sum is what O-LoRA computes at inference, without a task id), start new ones, and
    clear the moments with ``optax_cl.reset_state``.

    **Placement.** Before the moments it is the published form, a term of the loss. Adam
    divides by :math:`\sqrt\nu`, so that a penalty gradient alone moves ``a`` by one
    learning rate a step, whatever the strength: it is the strength *relative to the
    task's gradient* that counts. ``"l1"`` does not fade near orthogonality, hence the
    overlap ends by chattering in a band as wide as a step; ``"fro"`` fades, and leaves
    a larger overlap the smaller the strength. It adds to the gradient, so with
    decoupled moments leave ``second_moment`` at ``"max"`` or use ``"routed"``; under
    ``"raw"`` the denominator does not know of the penalty, and a step has no bound (a
    pull of ten times the gradient: 11 learning rates in the first step, else 1).

    **Memory.** ``capacity`` copies of every ``a`` in float32. **Work per step.** Two
    products of ``[in, K r]`` with ``[in, r]``, however many tasks are stored.

    Args:
      strength: Lambda (lambda_1 of the paper), at least 0: a number, a scalar array or
        tracer, or a schedule over steps.
      capacity: Tasks that fit. A static size: with ``optax.inject_hyperparams`` list
        it in ``static_args``.
      penalty: ``"l1"``, the released code's, or ``"fro"``, squared entries.
      overflow: With one task too many: ``"error"`` (raised by ``collect`` and
        ``end_task``, which then must run outside jit) or ``"oldest"`` (which is
        forgotten). ``optax_cl.grow`` makes room.
      factors: Regular expression, searched in a leaf's path: which leaves ``[*batch,
        in, r]`` are input-side factors.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``OloraState``; its update needs
      ``params``, the adapters.

    Raises:
      TypeError: For arguments of the wrong type, or a factor that is not floating
        point.
      ValueError: For an argument out of range; at ``init`` if no leaf is a factor or
        one is a vector; at trace time without ``params``; in ``begin_task`` and
        ``end_task`` for factors of another shape.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl
      >>> from optax_cl import lora
      >>> tx = optax.chain(lora.olora(0.5, capacity=3, penalty="fro"), optax.sgd(0.1))
      >>> first = {"kernel": lora.LoRA(a=jnp.eye(3)[:, :1], b=jnp.zeros((1, 2)))}
      >>> state = tx.init(first)
      >>> statistics = optax_cl.collect(  # it needs no data
      ...     state, first, [], task=optax_cl.Task(), key=jax.random.key(0))
      >>> state = optax_cl.end_task(state, first, statistics)
      >>> second = {"kernel": lora.LoRA(a=jnp.ones((3, 1)), b=jnp.zeros((1, 2)))}
      >>> print(lora.olora_loss(state, second))
      0.5
      >>> gradient = jax.tree.map(jnp.zeros_like, second)
      >>> updates, state = tx.update(gradient, state, second)
      >>> print(updates["kernel"].a[:, 0] + 0.0)  # only the old row is pushed back
      [-0.1  0.   0. ]

    References:
      Wang et al, `Orthogonal Subspace Learning for Language Model Continual Learning
      <https://arxiv.org/abs/2310.14152>`_, 2023

    Differs from the paper:
      1. Its text squares the entries (``"fro"``), its code takes their absolute values;
         the default is the code's.
      2. The code's second term, norms of the new factors (weight 0 by default there),
         is left to the user's loss.
      3. Only the input-side factors of past tasks are stored; their adapters may be
         merged.
    """
    checks.check_number("strength", strength, low=0.0, schedule=True)
    checks.check_choice("penalty", penalty, PENALTIES)
    rules = _rows.make_rules(capacity, overflow, penalty)
    checks.check_pattern("factors", factors)

    def init_fn(params):
        count = jnp.zeros([], jnp.int32)
        now = importance.value_at(strength, count)
        return OloraState(
            count=count,
            strength=jnp.array(now, jnp.float32, copy=True),
            tasks=jnp.zeros([], jnp.int32),
            rows=_rows.empty("olora", factors, params, rules),
            rules=rules,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.check_params("olora", params)
        params = trees.align("params", params, updates)
        now = importance.value_at(strength, state.count)

        def add(u, rows, a):
            return (u + now * _pull(penalty, rows, a)).astype(u.dtype)

        updates = importance.map_updates(add, updates, state.rows, params)
        count = optax.safe_increment(state.count)
        later = importance.value_at(strength, count)
        strength_now = jnp.asarray(later, state.strength.dtype)
        return updates, state._replace(count=count, strength=strength_now)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def olora_loss(opt_state: optax.OptState, adapters: chex.ArrayTree) -> chex.Array:
    r"""The value of O-LoRA's penalty: what ``olora`` adds is its gradient.

    With the strength of the coming step, summed over all ``olora`` states. For logging;
    add it to the loss *or* chain ``olora`` before the moments, not both: the two are
    the same.

    Args:
      opt_state: Any optimizer state that holds an ``OloraState``, at any depth.
      adapters: The tree that the optimizer was made for.

    Returns:
      A float32 scalar (or wider), at least 0, differentiable in ``adapters``.

    Raises:
      ValueError: If there is no ``OloraState``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import lora
      >>> adapters = {"kernel": lora.LoRA(a=jnp.ones((4, 2)), b=jnp.zeros((2, 3)))}
      >>> print(lora.olora_loss(lora.olora(0.5, capacity=2).init(adapters), adapters))
      0.0
    """

    def value(state):
        def leaf(rows, a):
            overlap = linalg.coefficients(rows, a)
            size = jnp.abs(overlap) if state.rules.penalty == "l1" else overlap**2
            return jnp.sum(size)

        here = trees.align_structure("adapters", adapters, state.rows)
        parts = jax.tree.leaves(jax.tree.map(leaf, state.rows, here))
        return state.strength * sum(parts, start=jnp.zeros([], jnp.float32))

    values = [value(state) for state in _rows.states(opt_state, OloraState, "olora")]
    return sum(values, start=jnp.zeros([], jnp.float32))


def _pull(penalty: str, rows: chex.Array, a: chex.Array) -> chex.Array:
    """The gradient of ``sum |M^T a|`` or of ``sum (M^T a)^2`` in a."""
    overlap = linalg.coefficients(rows, a)
    return linalg.lift(rows, jnp.sign(overlap) if penalty == "l1" else 2 * overlap)


tasks.register_boundary(OloraState, _rows.boundary(lambda state: state))
