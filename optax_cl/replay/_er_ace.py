"""ER-ACE: new examples don't push down the logits of classes that are not there."""

import chex
import jax.numpy as jnp

from optax_cl._core import checks, task_functions
from optax_cl._core import logits as logits_lib


def er_ace_loss(
    logits: chex.Array,
    labels: chex.Array,
    *,
    present: chex.Array,
    seen: chex.Array | None = None,
    unseen: str = "mask",
) -> chex.Array:
    r"""Cross-entropy over some of the classes, one number per example.

    .. math::
      \ell = -\log \frac{e^{z_y}}{\sum_{c \in K} e^{z_c}}, \qquad
      K = \text{present} \cup \{y\} \;
      (\cup\; \text{unseen, with } \texttt{unseen="keep"})

    ER-ACE is the sum of two means, which treat old classes differently: on the incoming
    batch only the classes *present in it* compete, so that new examples do not push the
    logits of absent old classes down; on the batch from the memory all classes seen so
    far do::

        seen = seen | replay.classes_in(labels, C)
        present = replay.classes_in(labels, C)
        loss = (er_ace_loss(logits, labels, present=present).mean()
                + er_ace_loss(old_logits, old_labels, present=seen).mean())

    The gradient of a logit outside :math:`K` is exactly zero, whatever it holds. With a
    single class present the loss is 0. With all classes present it is
    ``optax.softmax_cross_entropy_with_integer_labels``, and the sum above experience
    replay.

    **Placement.** In the loss: the gradient of the first term is the raw gradient of
    the current batch. The second may be given to ``mix_replay`` instead.

    **Memory** is the buffer's, **time** that of two cross-entropies.

    Args:
      logits: ``[..., C]``. Any real floating-point dtype; arithmetic is in float32 at
        least.
      labels: ``[...]``, integers from 0 to C - 1.
      present: Bool, ``[C]`` or like ``logits`` (axes of length one are repeated): the
        classes that compete; those of the whole batch, see :func:`classes_in`. The
        class of an example itself always does. May be a tracer.
      seen: Bool, like ``present``: classes seen so far, the current batch's included.
        Needed for ``unseen="keep"``.
      unseen: Classes that are still to come. ``"mask"`` leaves them alone. With
        ``"keep"`` they compete too, and are pushed down, as in the published code.

    Returns:
      The losses, ``[...]``, in float32 at least. Infinite logits count as the largest
      finite number, NaN gives NaN. A label that is no class is an error where its value
      is known; inside ``jit`` its loss is infinite and has no gradient.

    Raises:
      ValueError: For shapes that don't fit, labels that are no classes, an unknown
        policy, or ``unseen="keep"`` without ``seen``.
      TypeError: For logits, labels or masks of the wrong kind.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_cl import replay
      >>> labels = jnp.array([2, 3])
      >>> present = replay.classes_in(labels, 4)
      >>> def loss(z):
      ...   return replay.er_ace_loss(z, labels, present=present).mean()
      >>> print(jax.grad(loss)(jnp.zeros((2, 4))))
      [[ 0.    0.   -0.25  0.25]
       [ 0.    0.    0.25 -0.25]]

    References:
      Caccia et al, `New Insights on Reducing Abrupt Representation Change in Online
      Continual Learning <https://arxiv.org/abs/2104.05025>`_, 2022

    Differs from the paper:
      1. Logits are left out exactly, not set to a large negative number.
      2. The published code tells unseen classes by their number, above the largest
         label so far, and leaves that label itself unmasked too; ``seen`` is a set.
    """
    checks.check_choice("unseen", unseen, ("mask", "keep"))
    z = logits_lib.check_logits("logits", logits)
    labels = logits_lib.as_array("labels", labels)
    task_functions.check_labels(labels, z)
    logits_lib.check_label_values(labels, z.shape[-1])
    own = logits_lib.one_hot(labels, z.shape[-1])
    kept = own | logits_lib.class_mask("present", present, z)
    if unseen == "keep":
        if seen is None:
            raise ValueError(
                '`unseen="keep"` needs `seen`, a boolean mask of the classes seen so '
                "far; got None. Start with `jnp.zeros(num_classes, bool)`, and at each "
                "step `seen = seen | replay.classes_in(labels, num_classes)`."
            )
        kept |= ~logits_lib.class_mask("seen", seen, z)
    losses = jnp.sum(logits_lib.surprisal(z, kept), axis=-1, where=own)
    # No probability for what is no class.
    return jnp.where(jnp.any(own, axis=-1), losses, jnp.inf)


def classes_in(
    labels: chex.Array, num_classes: int, where: chex.Array | None = None
) -> chex.Array:
    """Which classes occur among labels.

    Under ``shard_map`` and ``pmap`` this is of the device's own labels; over the axis
    ``"d"`` it is ``jax.lax.psum(classes_in(labels, C), "d") > 0``.

    Args:
      labels: Integers from 0 to ``num_classes - 1``, of any shape. Inside ``jit``
        others are nothing; where values are known they are an error.
      num_classes: C, a Python integer.
      where: Optional, bool, of the shape of ``labels``: which entries count (not the
        padding of a ragged batch).

    Returns:
      A mask ``[C]``, bool.

    Raises:
      TypeError: If labels are no integers, ``where`` is not boolean or ``num_classes``
        no Python integer.
      ValueError: If labels are no classes, or ``where`` is of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import replay
      >>> print(replay.classes_in(jnp.array([2, 0, 2]), 4))
      [ True False  True False]
    """
    checks.check_positive_int("num_classes", num_classes)
    labels = logits_lib.as_array("labels", labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"`labels` must be integers from 0 to {num_classes - 1}; got "
            f"{labels.dtype} of shape {labels.shape}. Turn one-hot labels into classes "
            "with `jnp.argmax(labels, axis=-1)`."
        )
    logits_lib.check_label_values(labels, num_classes)
    found = logits_lib.one_hot(labels.reshape(-1), num_classes)
    if where is None:
        return jnp.any(found, axis=0)
    where = jnp.asarray(where)
    if where.dtype != bool:
        raise TypeError(
            f"`where` must be boolean; got {where.dtype}. Pass `weights > 0` for "
            "weights."
        )
    if where.shape != labels.shape:
        raise ValueError(
            f"`where` must have the shape of `labels`, {labels.shape}; got "
            f"{where.shape}."
        )
    return jnp.any(found & where.reshape(-1, 1), axis=0)
