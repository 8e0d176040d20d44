"""LwF: the outputs for old classes are held to what they were, on new inputs."""

import chex
import jax.numpy as jnp

from optax_cl._core import checks
from optax_cl._core import logits as logits_lib


def lwf_loss(
    logits: chex.Array,
    teacher_logits: chex.Array,
    *,
    temperature: chex.Numeric = 2.0,
    old: chex.Array | None = None,
    scale_t2: bool = False,
) -> chex.Array:
    r"""Distillation loss of learning without forgetting, one number per example.

    With logits :math:`z`, the teacher's :math:`\hat z` and the old classes :math:`O`,

    .. math::
      \ell = -\sum_{c \in O} q_c \log p_c, \qquad
      p_c = \frac{e^{z_c / T}}{\sum_{k \in O} e^{z_k / T}}, \qquad
      q_c = \frac{e^{\hat z_c / T}}{\sum_{k \in O} e^{\hat z_k / T}}.

    Both sides are normalised over the old classes alone, so that what the new classes
    do is no error. The gradient is :math:`(p - q) / T` for old logits and exactly zero
    for the others; none goes to the teacher. At :math:`z = \hat z` the gradient is
    zero, but the loss is the entropy of :math:`q`: subtract the loss of
    ``(teacher_logits, teacher_logits)`` to log a divergence.

    The whole objective is the loss on the new task plus :math:`\lambda` times the mean
    of this one; :math:`\lambda = 1` and :math:`T = 2` are usual.

    **The teacher** is the network with the parameters that the last task ended with, on
    the inputs of the *new* task. Record its logits before training, one row per example
    of the data set; or keep a copy of the parameters and compute them at every step,
    which is the only way with augmentation, at the price of one forward pass.

    **Placement.** In the loss. Its gradient is then part of the raw gradient, and
    nothing is left to route. It protects nothing exactly, and only on the inputs it
    sees: the further these are from the old task's, the less it holds.

    **Memory** is the teacher's logits, **time** that of one cross-entropy; both are
    O(classes) per example.

    Args:
      logits: ``[..., C]``, of the network in training. Any real floating-point dtype;
        arithmetic is in float32 at least.
      teacher_logits: ``[..., C]``, the same shape.
      temperature: T, above 0. May be a tracer.
      old: Bool, ``[C]`` or like ``logits`` (axes of length one are repeated): the old
        classes. None takes all of them, as for an old head of its own. Without any old
        class, as in the first task, loss and gradient are 0. May be a tracer.
      scale_t2: Whether to multiply by :math:`T^2`, so that the gradient does not shrink
        with the temperature. Hinton et al do, learning without forgetting does not.

    Returns:
      The losses, ``[...]``, in float32 at least. Infinite logits count as the largest
      finite number, NaN gives NaN.

    Raises:
      ValueError: For shapes that don't fit or a temperature that is not above 0.
      TypeError: For logits that are not real floating-point arrays or a mask that is
        not boolean.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_cl import distillation
      >>> teacher = jnp.array([[2., 0., 0.], [0., 2., 7.]])
      >>> old = jnp.array([True, True, False])  # class 2 is new
      >>> def mean_loss(logits):
      ...   return distillation.lwf_loss(logits, teacher, old=old).mean()
      >>> print(jax.grad(mean_loss)(jnp.zeros((2, 3))).round(3))
      [[-0.058  0.058  0.   ]
       [ 0.058 -0.058  0.   ]]

    References:
      Li & Hoiem, `Learning without Forgetting <https://arxiv.org/abs/1606.09282>`_,
      2016

      Hinton et al, `Distilling the Knowledge in a Neural Network
      <https://arxiv.org/abs/1503.02531>`_, 2015

    Differs from the paper:
      1. The paper has one head per old task and a sum of their losses. With ``old``
         all old classes share one softmax; call it once per head, each with its own
         mask, for the paper's sum.
      2. The paper first trains the new head alone (a warm-up), a matter of the loop.
    """
    checks.check_number("temperature", temperature, low=0.0, open_low=True)
    z = logits_lib.check_logits("logits", logits)
    # Its square, in the dtype it came in, may be no number of that.
    temperature = jnp.asarray(temperature, z.dtype)
    teacher = logits_lib.check_partner("teacher_logits", teacher_logits, z)
    mask = _old(old, z)
    q = jnp.exp(-logits_lib.surprisal(teacher, mask, temperature))
    cross = logits_lib.surprisal(z, mask, temperature)
    # By a product, a class of no weight and no probability would be 0 times infinity.
    losses = jnp.sum(jnp.where(q == 0, 0, q * cross), axis=-1)
    return losses * temperature * temperature if scale_t2 else losses


def confidence_weights(
    teacher_logits: chex.Array,
    *,
    threshold: chex.Numeric,
    old: chex.Array | None = None,
) -> chex.Array:
    r"""Weight 1 for examples on which the teacher is sure, 0 for the others.

    .. math:: w = \mathbf 1\Big[\max_{c \in O} q_c \ge \tau\Big]

    with the teacher's softmax :math:`q` over the old classes, at temperature 1. On
    inputs unlike all it knows, the teacher's outputs are hardly worth keeping. Divide
    by the number of examples kept, or the filter weakens the loss on those that pass:
    ``sum(w * losses) / maximum(sum(w), 1)``, which is 0 where none does.

    Args:
      teacher_logits: ``[..., C]``, real floating-point.
      threshold: :math:`\tau` in ``[0, 1]``; 0 keeps every example. May be a tracer.
      old: As in :func:`lwf_loss`. Without any old class weights are 0, unless the
        threshold is 0.

    Returns:
      Weights ``[...]``, 0 or 1, in float32 at least. They have no gradient. NaN among
      the old logits gives 0.

    Raises:
      ValueError: For shapes that don't fit or a threshold outside ``[0, 1]``.
      TypeError: For logits that are not real floating-point arrays or a mask that is
        not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import distillation
      >>> teacher = jnp.array([[4., 0.], [0.1, 0.]])
      >>> weights = distillation.confidence_weights(teacher, threshold=0.9)
      >>> losses = distillation.lwf_loss(jnp.zeros((2, 2)), teacher)
      >>> print(weights, jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), 1))
      [1. 0.] 0.6931472
    """
    checks.check_number("threshold", threshold, low=0.0, high=1.0)
    teacher = logits_lib.check_logits("teacher_logits", teacher_logits)
    mask = _old(old, teacher)
    q = jnp.exp(-logits_lib.surprisal(teacher, mask))
    sure = jnp.max(q, axis=-1, where=mask, initial=0) >= threshold
    return sure.astype(teacher.dtype)


def _old(old, logits):
    if old is None:
        return jnp.ones(logits.shape, bool)
    return logits_lib.class_mask("old", old, logits)
