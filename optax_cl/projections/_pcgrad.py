"""PCGrad: add up the gradients of tasks, each without its conflicts with the others."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cl._core import boundaries, checks, surgery


class PcgradState(NamedTuple):
    """State of :func:`pcgrad`."""

    count: chex.Array  # int32 [], updates so far; of it the orders are drawn


def pcgrad(
    *, reduce: str = "sum", seed: chex.Numeric = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradients of past tasks, and takes off what conflicts, pair by pair.

    Of :math:`T = K + 1` gradients, :math:`g_0` on the current batch and :math:`g_k` of
    the mean loss on the memory of task k, each starts as :math:`\tilde g_i = g_i` and
    meets the others in random order:

    .. math::
        \tilde g_i \leftarrow \tilde g_i - \frac{\min(\langle\tilde g_i, g_j\rangle,
        0)}{\|g_j\|^2}\, g_j \quad (j \ne i), \qquad \tilde g = \sum_i \tilde g_i .

    It is replay, mitigated: without conflicts the sum of all gradients. Then no
    :math:`\|\tilde g_i\|` exceeds :math:`\|g_i\|`, and of two gradients neither part
    opposes the other gradient. Of three or more a part may still do so: ``gem`` solves
    for all at once.

    The update takes the keyword-only extra arguments ``memory_updates`` and
    ``memory_mask`` of ``gem``, under the same rules: compute them anew at each step,
    and leave the current task out of the mask. A memory whose gradient is zero, not
    finite, or too small or too large to square (lengths of about 1e-17 and 1e19) takes
    no part. A current gradient that is not finite, or too large to square, comes back
    as it was, without the memories; one too small to square is added to theirs, and
    its conflicts with them stay.

    **Placement.** ``pre``, before the moments: what comes out is a gradient. In
    ``optax_cl.chain`` the raw gradient is that of the current batch alone; the default
    ``second_moment="max"`` then renormalises what the memories add.

    Under ``optax.masked`` and ``optax.partition`` inner products run over the visible
    leaves; pass ``memory_updates`` whole. Under ``optax.MultiSteps`` the gradient is
    the mean over micro-steps, but the memories' are those of the *last* one alone. With
    several devices give all gradients as global means.

    **Memory and cost.** Four bytes of state. K backward passes a step and K trees like
    the parameters; (K + 1)(K + 2) inner products at most, one sum of the trees, and T
    loops of T steps on vectors of T numbers: projections happen in coordinates of the
    gradients' span, so no T^2 trees are touched.

    Args:
      reduce: ``"sum"`` over the gradients, or their ``"mean"``.
      seed: For the orders: an integer of 64 bits, or a traced one.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``PcgradState``.

    Raises:
      ValueError: At build time for an unknown ``reduce`` or a ``seed`` out of range; at
        update for missing or mismatched ``memory_updates`` or ``memory_mask``.
      TypeError: For a ``seed`` that is no integer; if ``memory_mask`` is not boolean,
        or a leaf is not a real floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl.projections import pcgrad
      >>> tx = pcgrad()
      >>> g, past = jnp.array([1.0, 0.0]), jnp.array([[-1.0, 1.0]])
      >>> out, _ = tx.update(
      ...     g, tx.init(g), memory_updates=past, memory_mask=jnp.array([True]))
      >>> print(out.round(4))  # [.5, .5] and [0, 1]
      [0.5 1.5]

    References:
      Yu et al, `Gradient Surgery for Multi-Task Learning
      <https://arxiv.org/abs/2001.06782>`_, 2020

    Differs from the authors' code: it draws an order for each gradient at each step,
    as the paper says; the code shuffles and does not use what it shuffled.
    """
    checks.check_choice("reduce", reduce, ("sum", "mean"))
    _check_seed(seed)

    def init_fn(params):
        del params
        return PcgradState(jnp.zeros([], jnp.int32))

    def update_fn(
        updates,
        state,
        params=None,
        *,
        memory_updates=None,
        memory_mask=None,
        **extra_args,
    ):
        del params, extra_args
        memories, mask = surgery.check_memories(
            "pcgrad", updates, memory_updates, memory_mask
        )
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        routed = surgery.sum_without_conflicts(
            updates, memories, mask, key, mean=reduce == "mean"
        )
        return routed, PcgradState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_seed(seed):
    is_array = isinstance(seed, jax.Array | np.ndarray)
    if is_array and seed.ndim == 0 and jnp.issubdtype(seed.dtype, jnp.integer):
        return
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"`seed` must be an integer; got {seed!r}.")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"`seed` must be from -2**63 to 2**63 - 1; got {seed}.")


boundaries.register_modifier(PcgradState)
