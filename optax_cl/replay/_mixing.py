"""Replay mixing: the gradient on a replay batch blended into the current one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cl._core import boundaries, checks, surgery, trees


class MixReplayState(NamedTuple):
    """State of :func:`mix_replay`."""

    count: Any  # [], int32; None unless `rho` is a schedule


boundaries.register_modifier(MixReplayState)


def mix_replay(
    rho: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    r"""Blends the gradient on a replay batch into the current gradient.

    .. math:: \tilde g = (1 - \rho)\, g + \rho\, g_{\text{replay}}

    The update takes two keyword-only extra arguments. ``replay_updates``, a tree like
    the updates, is the gradient of the mean loss on a batch from the memory at the
    current parameters. ``replay_weight``, optional, is a scalar in ``[0, 1]`` that
    multiplies :math:`\rho`: 0 says that there is nothing to replay yet, and the
    gradient passes bit for bit, whatever ``replay_updates`` holds.

    **Placement.** ``pre``: a modifier, before the moments. In ``optax_cl.chain`` the
    raw gradient is captured in front of it, so it is that of the current batch alone,
    and the second moment does not see the replay batch unless it is told to
    (``second_moment="max"`` or ``"routed"``). There is no ``post`` place: the mix is of
    gradients, and adding one to an update mixes units (``decoupled_adamw`` refuses it
    there). Behind a learning rate (``optax.chain(optax.sgd(0.1), mix_replay(0.25))``)
    updates point downhill and the replay gradient uphill: the step *increases* the loss
    on the memory, and nothing here can see it. It protects nothing exactly; how
    much of an old task is kept is a matter of :math:`\rho` and of the memory.

    Under ``optax.masked`` and ``optax.partition`` pass ``replay_updates`` whole. Under
    ``optax.MultiSteps`` the gradient is the mean over micro-steps, but the replay
    gradient is that of the *last* micro-step alone: give it a batch large enough.

    Args:
      rho: Share of the replay gradient in ``[0, 1]``, or an Optax schedule of it. May
        be a tracer. What a schedule returns is not checked.

    Returns:
      A transformation with state :class:`MixReplayState`.

    Raises:
      ValueError: At build time for ``rho`` outside ``[0, 1]``; at update for missing or
        mismatched ``replay_updates``, or a ``replay_weight`` outside ``[0, 1]``.
      TypeError: If ``rho`` is neither a number nor a schedule, or a leaf of the updates
        is not a real floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import replay
      >>> tx = replay.mix_replay(0.25)
      >>> grads, memory = jnp.array([1., 0.]), jnp.array([0., 1.])
      >>> state = tx.init(grads)
      >>> print(tx.update(grads, state, replay_updates=memory)[0])
      [0.75 0.25]
      >>> print(tx.update(grads, state, replay_updates=memory, replay_weight=0)[0])
      [1. 0.]

    References:
      Chaudhry et al, `On Tiny Episodic Memories in Continual Learning
      <https://arxiv.org/abs/1902.10486>`_, 2019

    Differs from the paper:
      1. The paper takes one mean over the joined batches, which is :math:`\rho = b' /
         (b + b')` for a batch of :math:`b` and a replay batch of :math:`b'`.
    """
    checks.check_number("rho", rho, low=0.0, high=1.0, schedule=True)
    scheduled = callable(rho)

    def init_fn(params):
        del params
        return MixReplayState(jnp.zeros([], jnp.int32) if scheduled else None)

    def update_fn(
        updates,
        state,
        params=None,
        *,
        replay_updates=None,
        replay_weight=1.0,
        **extra_args,
    ):
        del params, extra_args
        if replay_updates is None:
            raise ValueError(
                "`mix_replay` needs `replay_updates`, the gradient on a batch from the "
                "memory. Call `tx.update(grads, state, params, replay_updates=...)`; "
                "while the memory is empty pass `optax.tree.zeros_like(grads)` and "
                "`replay_weight=0`."
            )
        replayed = trees.align("replay_updates", replay_updates, updates)
        surgery.check_floating("updates", updates)
        share = (rho(state.count) if scheduled else rho) * _weight(replay_weight)
        if scheduled:
            state = MixReplayState(optax.safe_increment(state.count))
        return _mix(share, updates, replayed), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _weight(replay_weight):
    if isinstance(replay_weight, bool | np.bool_):
        replay_weight = float(replay_weight)
    checks.check_number("replay_weight", replay_weight, low=0.0, high=1.0)
    return jnp.asarray(replay_weight, jnp.float32)


def _mix(share, updates, replayed):
    def mix(g, r):
        g = jnp.asarray(g)
        wide = jnp.promote_types(g.dtype, jnp.float32)
        mixed = (1 - share) * g.astype(wide) + share * jnp.asarray(r, wide)
        # A select: what an empty memory gives for a gradient may be NaN.
        return jnp.where(share == 0, g, mixed.astype(g.dtype))

    return jax.tree.map(mix, updates, replayed)
