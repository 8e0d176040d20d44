"""iCaRL: a sigmoid for every class, the old ones taught, and the nearest class mean."""

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks, linalg, task_functions
from optax_cl._core import logits as logits_lib


def icarl_loss(
    logits: chex.Array,
    labels: chex.Array,
    *,
    teacher_logits: chex.Array,
    old: chex.Array,
    seen: chex.Array | None = None,
) -> chex.Array:
    r"""Sigmoid cross-entropy, on labels for new classes and the teacher for old ones.

    With logits :math:`z`, the teacher's :math:`\hat z`, the old classes :math:`O` and
    those seen so far :math:`S \supseteq O`, one number per example:

    .. math::
      \ell = -\sum_{c \in S} t_c \log \sigma(z_c) + (1 - t_c) \log \sigma(-z_c), \qquad
      t_c = \begin{cases} \sigma(\hat z_c) & c \in O \\ [c = y] & c \notin O .
      \end{cases}

    The gradient is :math:`\sigma(z_c) - t_c`, zero to rounding for old classes where
    :math:`z = \hat z`, and exactly zero for classes that are still to come. None goes
    to the teacher. It is for the new task's examples and the exemplars of old classes
    alike, in one mean: what is remembered are the old *outputs* on both.

    **The teacher** is the network with the parameters that the last task ended with, on
    the same (augmented) inputs.

    **Placement.** In the loss: its gradient is part of the raw gradient, and nothing is
    left to route. Exemplars are chosen by :func:`herding`, and classes told by
    :func:`nearest_mean` of the exemplars' features, not by the logits.

    **Memory** is the teacher's parameters or logits and the exemplars, **time** that of
    a cross-entropy, and a forward pass of the teacher.

    Args:
      logits: ``[..., C]``. Any real floating-point dtype; arithmetic is in float32 at
        least.
      labels: ``[...]``, integers from 0 to C - 1.
      teacher_logits: ``[..., C]``; in the first task anything, as there is no old
        class.
      old: Bool, ``[C]`` or like ``logits`` (axes of length one are repeated): classes
        of earlier tasks. May be a tracer.
      seen: Bool, like ``old``: classes so far, the current task's included. None takes
        all C, so that classes to come learn to say no.

    Returns:
      The losses, ``[...]``, in float32 at least. Infinite logits count as the largest
      finite number, NaN gives NaN. A label that is no class is an error where its value
      is known; inside ``jit`` its loss is infinite and has no gradient.

    Raises:
      ValueError: For shapes that don't fit or labels that are no classes.
      TypeError: For logits, labels or masks of the wrong kind.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_cl import replay
      >>> teacher, old = jnp.array([[2.0, -2.0, 0.0]]), jnp.array([True, True, False])
      >>> def loss(z):
      ...   return replay.icarl_loss(
      ...       z, jnp.array([2]), teacher_logits=teacher, old=old).mean()
      >>> print(jax.grad(loss)(teacher))  # old outputs are right as they are
      [[ 0.   0.  -0.5]]

    References:
      Rebuffi et al, `iCaRL: Incremental Classifier and Representation Learning
      <https://arxiv.org/abs/1611.07725>`_, 2017

    Differs from the authors' code: a sum over classes, as in the paper; the code takes
    their mean, and a learning rate of 2.
    """
    z = logits_lib.check_logits("logits", logits)
    teacher = logits_lib.check_partner("teacher_logits", teacher_logits, z)
    labels = logits_lib.as_array("labels", labels)
    task_functions.check_labels(labels, z)
    logits_lib.check_label_values(labels, z.shape[-1])
    own = logits_lib.one_hot(labels, z.shape[-1])
    old = logits_lib.class_mask("old", old, z)
    kept = old if seen is None else old | logits_lib.class_mask("seen", seen, z)
    kept = jnp.ones_like(old) if seen is None else kept
    targets = jnp.where(old, jax.nn.sigmoid(logits_lib.finite(teacher)), own)
    # Of the others nothing must come through, NaN neither.
    z = jnp.where(kept, logits_lib.finite(z), 0)
    # Minus log sigma(z) is softplus(-z), and what t takes off that of -z is linear.
    losses = jnp.where(kept, jax.nn.softplus(z) - targets * z, 0)
    # No probability for what is no class.
    return jnp.where(jnp.any(own, axis=-1), jnp.sum(losses, axis=-1), jnp.inf)


def nearest_mean(
    features: chex.Array,
    exemplars: chex.Array,
    labels: chex.Array,
    num_classes: int,
    where: chex.Array | None = None,
) -> chex.Array:
    r"""The class whose exemplars' mean feature is nearest.

    With all features at length one, and the mean of each class at length one again,

    .. math:: \hat y(x) = \operatorname{argmin}_c \|\phi(x) - \mu_c\|, \qquad
       \mu_c \propto \sum_{i:\, y_i = c} \phi(x_i) .

    No weight of a last layer takes part, which favours the classes learnt last.

    Args:
      features: ``[N, d]``, to be classified.
      exemplars: ``[M, d]``, features of the exemplars by the network *as it is now*.
      labels: ``[M]``, integers from 0 to ``num_classes - 1``.
      num_classes: C, a Python integer.
      where: Bool ``[M]``: which exemplars count, in a store of fixed size. A class
        without any is never chosen.

    Returns:
      Classes, int32 ``[N]``; of equals the first. A feature that is zero or not finite
      has no direction: such an exemplar takes no part, such an input gets the first
      class that has exemplars. Without any exemplar all get class 0. Jittable; one
      product of ``[N, d]`` with ``[d, C]``.

    Raises:
      ValueError: For shapes that don't fit, or (where values are known) labels that are
        no classes.
      TypeError: For features that are not real and floating, labels that are no
        integers, ``where`` that is not boolean, ``num_classes`` that is no integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl.replay import nearest_mean
      >>> exemplars = jnp.array([[1.0, 0.0], [9.0, 1.0], [0.0, 1.0]])
      >>> print(nearest_mean(
      ...     jnp.array([[5.0, 4.0], [1.0, 2.0]]), exemplars, jnp.array([0, 0, 1]), 2))
      [0 1]

    References:
      Rebuffi et al, `iCaRL <https://arxiv.org/abs/1611.07725>`_, 2017

    Differs from the authors' code: it averages each exemplar with its mirror image.
    """
    checks.check_positive_int("num_classes", num_classes)
    features = _check_features("features", features)
    exemplars = _check_features("exemplars", exemplars)
    labels = logits_lib.as_array("labels", labels)
    if exemplars.shape[1] != features.shape[1] or labels.shape != exemplars.shape[:1]:
        raise ValueError(
            "`exemplars` must be `[M, d]` with the d of `features`, and `labels` "
            f"`[M]`; got {exemplars.shape} and {labels.shape} beside features of shape "
            f"{features.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"`labels` must be integers; got {labels.dtype}.")
    logits_lib.check_label_values(labels, num_classes)
    if where is None:
        where = jnp.ones(labels.shape, bool)
    where = logits_lib.as_array("where", where)
    if where.dtype != bool:
        raise TypeError(f"`where` must be boolean; got {where.dtype}.")
    if where.shape != labels.shape:
        raise ValueError(
            f"`where` must have the shape of `labels`, {labels.shape}; got "
            f"{where.shape}."
        )
    units = _units(exemplars)
    own = logits_lib.one_hot(labels, num_classes) & where[:, None]
    own &= jnp.any(units != 0, axis=1, keepdims=True)
    means = _units(linalg.coefficients(own.astype(units.dtype), units))
    near = jnp.matmul(_units(features), means.mT, precision=linalg.PRECISION)
    near = jnp.where(jnp.any(own, axis=0)[None], near, -jnp.inf)
    return jnp.argmax(near, axis=1).astype(jnp.int32)


def _check_features(name: str, features: chex.Array) -> jax.Array:
    features = logits_lib.as_array(name, features)
    if features.ndim != 2:
        raise ValueError(f"`{name}` must be `[N, d]`; got shape {features.shape}.")
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be real and floating; got {features.dtype}.")
    return features.astype(jnp.promote_types(features.dtype, jnp.float32))


def _units(x: jax.Array) -> jax.Array:
    """Rows at length one; zero for those that are zero or not finite."""
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    usable = (largest > 0) & jnp.isfinite(largest)
    # By the largest entry first, so that squares neither overflow nor vanish.
    x = jnp.where(usable, x, 0) / jnp.where(usable, largest, 1)
    length = jnp.linalg.norm(x, axis=1, keepdims=True)
    return x / jnp.where(usable, length, 1)
