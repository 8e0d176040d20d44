"""Logits in losses: what they must be, and a softmax over some of the classes."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import task_functions


def as_array(name: str, value: Any) -> jax.Array:
    """``value`` as an array, or an error that names it."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{name}` must be an array; got {type(value).__name__}. If the network "
            "returns more than its logits, give them alone."
        ) from error


def check_logits(name: str, logits: Any) -> jax.Array:
    """An array of logits ``[..., C]`` in float32 at least, or an error."""
    logits = as_array(name, logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must be real floating-point logits; got {logits.dtype} of shape "
            f"{logits.shape}. Give the network's outputs before the softmax."
        )
    if not logits.shape or not logits.shape[-1]:
        raise ValueError(
            f"`{name}` must have shape [..., C], at least one class on the last axis; "
            f"got shape {logits.shape}."
        )
    # `promote_types` knows no eight bits.
    return logits.astype(jnp.float32) if logits.dtype.itemsize < 4 else logits


def check_partner(name: str, partner: Any, logits: jax.Array) -> jax.Array:
    """Logits of the shape of ``logits``, as constants, or an error."""
    partner = check_logits(name, partner)
    if partner.shape != logits.shape:
        raise ValueError(
            f"`{name}` must have the shape of `logits`, {logits.shape}; got "
            f"{partner.shape}. Nothing is broadcast. Where a head has grown, give both "
            "the outputs they share, as in `logits[..., :old_width]`."
        )
    return jax.lax.stop_gradient(partner)


def class_mask(name: str, mask: Any, logits: jax.Array) -> jax.Array:
    """A mask of classes in the shape of ``logits``, or an error."""
    shape, classes = logits.shape, logits.shape[-1]
    given = None if mask is None else jnp.asarray(mask)
    if given is None or given.dtype != bool:
        came = "None" if given is None else f"{given.dtype} of shape {given.shape}"
        raise TypeError(
            f"`{name}` must be a boolean mask of the {classes} classes; got {came}. "
            f"Numbers of classes make one with `jnp.zeros({classes}, "
            "bool).at[jnp.array([0, 1])].set(True)`, zeros and ones with "
            "`.astype(bool)`."
        )
    # A mask of some leading axes would be matched with the wrong ones of them.
    fits = given.shape == (classes,) or (
        given.ndim == len(shape)
        and all(g in (1, s) for g, s in zip(given.shape[:-1], shape, strict=False))
        and given.shape[-1] == classes
    )
    if not fits:
        raise ValueError(
            f"`{name}` must have shape ({classes},), one entry per class, or that of "
            f"`logits`, {shape}; got {given.shape}. Give it an axis of length one for "
            "each axis along which it is the same."
        )
    return jnp.broadcast_to(given, shape)


def one_hot(labels: jax.Array, num_classes: int) -> jax.Array:
    """Which class each label is, bool ``[..., C]``; none for what is no class."""
    # Classes are numbered in the dtype of the labels, and in eight bits 256 would be 0.
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)
    return jax.nn.one_hot(labels, num_classes, dtype=bool)


_NO_CLASS = (
    "`labels` must be classes from 0 to {last}; got {low} to {high}. No label stands "
    "for 'ignore': give such examples any class, and their losses weight 0."
)


def check_label_values(labels: chex.Array, num_classes: int) -> None:
    """Raises for labels of a loss that are no class, where values are known."""
    task_functions.check_classes(labels, num_classes, _NO_CLASS)


def finite(logits: jax.Array) -> jax.Array:
    """Infinite logits as the largest finite number, of either sign; NaN stays."""
    largest = jnp.finfo(logits.dtype).max
    return jax.lax.clamp(-largest, logits, largest)


def surprisal(
    logits: jax.Array, mask: jax.Array, temperature: chex.Numeric = 1.0
) -> jax.Array:
    r"""Minus the logarithm of the softmax over the classes in ``mask``; 0 elsewhere.

    Other classes take no part in value or gradient, whatever they hold. Where the mask
    is empty all is 0.
    """
    z = finite(logits)
    lowest = jnp.finfo(z.dtype).min
    top = jnp.max(z, axis=-1, keepdims=True, where=mask, initial=lowest)
    # Differences first: they can't overflow upwards, however small the temperature.
    z = jnp.where(mask, z - jax.lax.stop_gradient(top), 0) / temperature
    total = jnp.sum(jnp.exp(z), axis=-1, keepdims=True, where=mask)
    some = jnp.any(mask, axis=-1, keepdims=True)
    # The slope of a logarithm of 0 would be NaN on the way back, if not at its end.
    return jnp.where(mask, jnp.log(jnp.where(some, total, 1)) - z, 0)
