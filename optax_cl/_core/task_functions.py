"""What a task is to the methods: pure functions of a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np


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
        multiplies, ``[B, ..., in]``, in the structure of params (None elsewhere). Of a
        convolution they are patches, flattened as its kernel ``HWIO`` is: ``(H, W, I)``
        (``jax.lax.conv_general_dilated_patches`` gives ``(I, H, W)``).
      labels: ``batch -> [B]`` or ``[B, items]``, the data's labels as integers that
        number the last axis of ``outputs``. ``collect`` refuses others, wherever it can
        see their values.
    """

    loss: Callable[..., chex.Array] | None = None
    outputs: Callable[..., chex.Array] | None = None
    log_prob: Callable[..., chex.Array] | None = None
    sample_label: Callable[..., chex.Array] | None = None
    layer_inputs: Callable[..., chex.ArrayTree] | None = None
    labels: Callable[..., chex.Array] | None = None


def classification(
    logits: Callable[[Any, Any], chex.Array], labels: Callable[[Any], chex.Array]
) -> Task:
    """A ``Task`` for a network with categorical outputs (classes, or next tokens).

    A label is a class, from 0 to C - 1. There is no label for "ignore" (-1 and -100
    elsewhere): leave such examples out of the batches, or write a ``Task`` of your own
    whose ``loss`` and ``log_prob`` weigh the items. ``collect`` refuses other labels
    where it sees their values; inside ``jit``, where they are not known, their loss is
    NaN, and it adds nothing to a gradient.

    Args:
      logits: ``(params, batch) -> [B, C]``, or ``[B, items, C]`` for several labels an
        example; in evaluation mode. C is at least 2: with one logit the softmax is 1
        whatever the parameters. A network with one, for yes or no, has the two logits
        ``jnp.concatenate([jnp.zeros_like(z), z], axis=-1)``.
      labels: ``batch -> [B]`` or ``[B, items]``, integers.

    Returns:
      A ``Task`` whose loss is the mean cross-entropy over an example's items. Build it
      once and keep it: ``collect`` compiles anew for functions it has not seen.

    Raises:
      TypeError: When a function of the task is traced, for labels that are no integers.
      ValueError: Then too, for logits of a single class or without an axis of classes,
        and for labels of another shape than ``[B]`` or ``[B, items]``.

    Example:
      >>> import jax.numpy as jnp, optax_cl
      >>> task = optax_cl.classification(
      ...     lambda params, batch: batch["x"] @ params["w"], lambda batch: batch["y"])
      >>> batch = {"x": jnp.eye(2), "y": jnp.array([0, 1])}
      >>> print(task.loss({"w": jnp.zeros((2, 2))}, batch).round(3))
      [0.693 0.693]
    """

    def outputs(params, batch):
        z = logits(params, batch)
        if z.ndim < 2 or z.shape[-1] < 2:
            raise ValueError(
                "`logits` must give [B, C] or [B, items, C] with at least two classes; "
                f"got shape {z.shape}. The probability of a single class is 1 whatever "
                "the parameters: it has no loss and no importance. Give two logits "
                "(0 and z), or use `optax_cl.regression`, or an `optax_cl.Task` with a "
                "Bernoulli `log_prob` and `sample_label`."
            )
        return z

    def log_prob(params, batch, chosen):
        log_probs = jax.nn.log_softmax(outputs(params, batch).astype(jnp.float32))
        check_labels(chosen, log_probs)
        picked = jnp.take_along_axis(log_probs, chosen[..., None], axis=-1)[..., 0]
        # An index of -1 would pick the last class.
        known = (chosen >= 0) & (chosen < log_probs.shape[-1])
        return jnp.where(known, picked, jnp.nan)

    def loss(params, batch):
        lp = log_prob(params, batch, labels(batch))
        return -lp.reshape(lp.shape[0], -1).mean(axis=1)

    return Task(
        loss=loss,
        outputs=outputs,
        log_prob=log_prob,
        sample_label=lambda outputs, key: jax.random.categorical(key, _wide(outputs)),
        labels=labels,
    )


def check_labels(labels: chex.Array, logits: Any) -> None:
    """Raises unless ``labels`` has one integer for each row of ``logits``."""
    shape, dtype = jnp.shape(labels), jnp.result_type(labels)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"`labels` must give integers from 0 to {logits.shape[-1] - 1}, one for "
            f"each row of `logits`; got dtype {dtype} and shape {shape}. Turn one-hot "
            "labels into classes with `jnp.argmax(labels, axis=-1)`, floats with "
            "`labels.astype(int)`."
        )
    if shape != logits.shape[:-1]:
        raise ValueError(
            f"`labels` must give shape {logits.shape[:-1]}, one label for each row of "
            f"`logits`, which are of shape {logits.shape}; got shape {shape}. Take an "
            "axis of length one off with `labels[..., 0]`."
        )


_NO_CLASS = (
    "`task.labels` must give classes from 0 to {last}, which number the last axis of "
    "`task.outputs`; got {low} to {high}. No label stands for 'ignore': leave such "
    "examples out of `batches`, or write an `optax_cl.Task` whose `loss` and "
    "`log_prob` weigh the items."
)


def check_classes(
    labels: chex.Array, num_classes: int, message: str = _NO_CLASS
) -> None:
    """Raises for labels that are no class; silent where values are not known.

    Args:
      labels: Integers of any shape.
      num_classes: Classes there are.
      message: Of the error, with ``{last}``, ``{low}`` and ``{high}`` in it.
    """
    if isinstance(labels, jax.core.Tracer):
        return
    # A process sees its own part of an array that is spread over several.
    shards = labels.addressable_shards if isinstance(labels, jax.Array) else ()
    for part in [s.data for s in shards] or [labels]:
        values = np.asarray(part)
        low, high = values.min(initial=0), values.max(initial=0)
        if low < 0 or high >= num_classes:
            raise ValueError(message.format(last=num_classes - 1, low=low, high=high))


def regression(
    predictions: Callable[[Any, Any], chex.Array],
    targets: Callable[[Any], chex.Array],
) -> Task:
    r"""A ``Task`` for least squares: a Gaussian likelihood of unit variance.

    The loss of an example is :math:`\frac12 \|f(x) - y\|^2`, so that the Fisher of
    ``log_prob`` is its Gauss-Newton matrix. Scaling the loss scales the curvature.

    Args:
      predictions: ``(params, batch) -> [B, ...]``, in evaluation mode.
      targets: ``batch -> [B, ...]``, of the same shape.

    Returns:
      A ``Task``. Build it once and keep it, as with ``classification``.

    Raises:
      ValueError: When the loss is traced, for predictions and targets of two shapes:
        ``[B, 1]`` and ``[B]`` would make ``[B, B]`` errors.

    Example:
      >>> import jax.numpy as jnp, optax_cl
      >>> task = optax_cl.regression(lambda w, batch: batch[0] @ w, lambda b: b[1])
      >>> print(task.loss(jnp.zeros((2, 1)), (jnp.eye(2), jnp.array([[2.0], [0.0]]))))
      [2. 0.]
    """

    def log_prob(params, batch, values):
        made = predictions(params, batch)
        if jnp.shape(made) != jnp.shape(values):
            raise ValueError(
                "`predictions` and `targets` must give one shape; got "
                f"{jnp.shape(made)} and {jnp.shape(values)}. Take an axis of length "
                "one off with `predictions[..., 0]`, or add it with "
                "`targets[..., None]`."
            )
        error = (made - values).astype(jnp.float32)
        return -0.5 * (error.reshape(error.shape[0], -1) ** 2).sum(axis=1)

    def sample(outputs, key):
        mean = _wide(outputs)
        return mean + jax.random.normal(key, mean.shape, mean.dtype)

    return Task(
        loss=lambda params, batch: -log_prob(params, batch, targets(batch)),
        outputs=predictions,
        log_prob=log_prob,
        sample_label=sample,
    )


def _wide(outputs: chex.Array) -> chex.Array:
    """In float32 at least: noise of half precision has ties, and hardly a tail."""
    return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))


def require(task: Task, name: str, method: str) -> Callable[..., Any]:
    """The function ``name`` of ``task``, or an error naming who needs it."""
    function = getattr(task, name)
    if function is None:
        raise ValueError(
            f"`task.{name}` is None, but {method} needs it. Give it to "
            "`optax_cl.Task(...)`, or build the task with `optax_cl.classification`."
        )
    return function
