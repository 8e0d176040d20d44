"""What a task is to the methods: pure functions of a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp


class Task(NamedTuple):
    """What a method may need to know of a task: pure functions of a batch.

    A batch is any tree of arrays with a leading axis of B examples. Give the functions
    in *evaluation mode*: no dropout, fixed batch statistics, active head only. None
    means "not available"; a method that needs it says so. ``classification`` makes all
    of them out of two.

    Attributes:
      loss: ``(params, batch) -> [B]``, the training loss of each example.
      outputs: ``(params, batch) -> [B, ...]``, what the network computes (logits).
      log_prob: ``(params, batch, labels) -> [B]`` or ``[B, items]``, log-probability
        of each label; ``items`` are labels of one example (the tokens of a sequence).
      sample_label: ``(outputs, key) -> labels``, drawn from the model's distribution.
      layer_inputs: ``(params, batch) -> tree``, for each kernel the inputs it
        multiplies, ``[B, ..., in]``, in the structure of params (None elsewhere).
    """

    loss: Callable[..., chex.Array] | None = None
    outputs: Callable[..., chex.Array] | None = None
    log_prob: Callable[..., chex.Array] | None = None
    sample_label: Callable[..., chex.Array] | None = None
    layer_inputs: Callable[..., chex.ArrayTree] | None = None


def classification(
    logits: Callable[[Any, Any], chex.Array], labels: Callable[[Any], chex.Array]
) -> Task:
    """A ``Task`` for a network with categorical outputs (classes, or next tokens).

    Args:
      logits: ``(params, batch) -> [B, C]``, or ``[B, items, C]`` for several labels an
        example; in evaluation mode.
      labels: ``batch -> [B]`` or ``[B, items]``, integers.

    Returns:
      A ``Task`` whose loss is the mean cross-entropy over an example's items. Build it
      once and keep it: ``collect`` compiles anew for functions it has not seen.

    Example:
      >>> import jax.numpy as jnp, optax_cl
      >>> task = optax_cl.classification(
      ...     lambda params, batch: batch["x"] @ params["w"], lambda batch: batch["y"])
      >>> batch = {"x": jnp.eye(2), "y": jnp.array([0, 1])}
      >>> print(task.loss({"w": jnp.zeros((2, 2))}, batch).round(3))
      [0.693 0.693]
    """

    def log_prob(params, batch, chosen):
        log_probs = jax.nn.log_softmax(logits(params, batch).astype(jnp.float32))
        return jnp.take_along_axis(log_probs, chosen[..., None], axis=-1)[..., 0]

    def loss(params, batch):
        lp = log_prob(params, batch, labels(batch))
        return -lp.reshape(lp.shape[0], -1).mean(axis=1)

    return Task(
        loss=loss,
        outputs=logits,
        log_prob=log_prob,
        sample_label=lambda outputs, key: jax.random.categorical(key, outputs),
    )


def regression(
    predictions: Callable[[Any, Any], chex.Array],
    targets: Callable[[Any], chex.Array],
) -> Task:
    r"""A ``Task`` for least squares: a Gaussian likelihood of unit variance.

    The loss of an example is :math:`\frac12 \|f(x) - y\|^2`, so that the Fisher of
    ``log_prob`` is its Gauss-Newton matrix. Scaling the loss scales the curvature.

    Args:
      predictions: ``(params, batch) -> [B, ...]``, in evaluation mode.
      targets: ``batch -> [B, ...]``.

    Returns:
      A ``Task``. Build it once and keep it, as with ``classification``.

    Example:
      >>> import jax.numpy as jnp, optax_cl
      >>> task = optax_cl.regression(lambda w, batch: batch[0] @ w, lambda b: b[1])
      >>> print(task.loss(jnp.zeros((2, 1)), (jnp.eye(2), jnp.array([[2.0], [0.0]]))))
      [2. 0.]
    """

    def log_prob(params, batch, values):
        error = (predictions(params, batch) - values).astype(jnp.float32)
        return -0.5 * (error.reshape(error.shape[0], -1) ** 2).sum(axis=1)

    def sample(outputs, key):
        return outputs + jax.random.normal(key, outputs.shape, outputs.dtype)

    return Task(
        loss=lambda params, batch: -log_prob(params, batch, targets(batch)),
        outputs=predictions,
        log_prob=log_prob,
        sample_label=sample,
    )


def require(task: Task, name: str, method: str) -> Callable[..., Any]:
    """The function ``name`` of ``task``, or an error naming who needs it."""
    function = getattr(task, name)
    if function is None:
        raise ValueError(
            f"`task.{name}` is None, but {method} needs it. Give it to "
            "`optax_cl.Task(...)`, or build the task with `optax_cl.classification`."
        )
    return function
