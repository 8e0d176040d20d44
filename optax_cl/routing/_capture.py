"""Binding the raw gradient, so that links further down can read it."""

from typing import Any

import chex
import jax
import optax

from optax_cl._core import trees
from optax_cl.routing import _rules

RAW_UPDATES_MISSING = (
    "`{method}` needs the raw gradient beside the routed one, but `raw_updates` was "
    "not given. Build the chain with `optax_cl.chain(...)` (or wrap it in "
    "`optax_cl.capture_raw(...)`), which binds the gradient before any modifier; or, "
    "in a plain `optax.chain`, pass it yourself: "
    "`tx.update(grads, state, params, raw_updates=raw_grads)`."
)


def capture_raw(
    inner: optax.GradientTransformation, *, rebind: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Binds ``raw_updates`` to the updates that enter ``inner``.

    Whatever stands in front of the capture (a clip, loss scaling) belongs to the raw
    gradient; whatever stands inside it is a modifier, moments, or post-processing:

    .. math:: g \xrightarrow{\text{modifiers}} \tilde g
       \xrightarrow{\;\mu \leftarrow \tilde g,\;\nu \leftarrow g\;} u

    The wrapper has no state of its own: the state of the result is that of ``inner``.
    A capture that nobody reads is legal and free.

    **Placement.** Outermost, or directly inside ``optax.MultiSteps``, ``optax.masked``
    or ``optax.partition``: the raw gradient must be the one whose modification follows.

    Args:
      inner: The transformation whose links read ``raw_updates``.
      rebind: What to do when another ``raw_updates`` is already bound whose leaves are
        not, by identity, the updates arriving here. A silent rebinding would turn
        decoupled into shared routing, because the "raw" gradient would be one that has
        been modified already; so this raises unless ``rebind=True`` says it is meant
        (for instance, a clip between the two captures).

    Returns:
      A ``GradientTransformationExtraArgs`` with the state of ``inner``.

    Raises:
      TypeError: If ``inner`` is not a gradient transformation.
      ValueError: At trace time, for a capture inside a capture that would change what
        ``raw_updates`` means, unless ``rebind`` is true.

    Example:
      >>> import jax.numpy as jnp, optax, optax_cl
      >>> halve = optax.scale(0.5)
      >>> tx = optax_cl.capture_raw(
      ...     optax.chain(halve, optax_cl.scale_by_decoupled_adam()))
      >>> grads = jnp.array([1.0, -2.0])
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates.round(3))  # plain Adam would have cancelled the factor one half
      [ 0.5 -0.5]
    """
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def update_fn(updates, state, params=None, **extra_args):
        outer = extra_args.get("raw_updates")
        if outer is not None and not rebind:
            _check_same_leaves(outer, updates)
        extra_args["raw_updates"] = updates
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def chain(
    *links: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """``optax.chain`` whose links can read the gradient that entered it.

    Equal to ``capture_raw(optax.chain(*links))``: the same state, the same updates, and
    ``raw_updates`` bound to the chain's incoming updates. With links that do not read
    it, it is ``optax.chain``.

    Args:
      *links: Gradient transformations, in the order in which they are applied:
        modifiers, moments, weight decay, post-processing, learning rate.

    Returns:
      A ``GradientTransformationExtraArgs``; its state is the tuple of their states.

    Raises:
      TypeError: If a link is not a gradient transformation.
      ValueError: Without any link; at trace time as ``capture_raw``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_cl
      >>> tx = optax_cl.chain(
      ...     optax.scale(0.5),                       # a modifier
      ...     optax_cl.scale_by_decoupled_adam(),     # mu <- routed, nu <- raw
      ...     optax.scale_by_learning_rate(0.1))
      >>> params = jnp.array([1.0, 1.0])
      >>> updates, state = tx.update(jnp.array([1.0, -2.0]), tx.init(params), params)
      >>> print(updates.round(3))
      [-0.05  0.05]
    """
    check_links(links)
    return capture_raw(optax.chain(*links))


def check_links(links: tuple[Any, ...]) -> None:
    """Raises unless ``links`` are gradient transformations, at least one."""
    if not links:
        raise ValueError("`links` is empty; give at least one transformation.")
    for i, link in enumerate(links):
        check_transformation(f"links[{i}]", link)


def check_transformation(name: str, value: Any) -> None:
    """Raises unless ``value`` is a gradient transformation."""
    if isinstance(value, optax.GradientTransformation):
        return
    hint = "Was the function that makes it not called?"
    if isinstance(value, list | tuple):
        hint = "Pass links one by one: `chain(*links)`."
    if isinstance(value, _rules.Rule):
        hint = "A rule is read by a link: `attenuate(rule)`."
    raise TypeError(
        f"`{name}` must be an optax.GradientTransformation; got {value!r} of type "
        f"{type(value).__name__}. {hint}"
    )


def require_raw(
    method: str, raw_updates: chex.ArrayTree | None, updates: chex.ArrayTree
) -> chex.ArrayTree:
    """The raw gradient in the mask pattern of ``updates``, or an error saying why not.

    Args:
      method: The transformation that asks, for the message.
      raw_updates: What it was given.
      updates: The updates it works on.

    Returns:
      ``raw_updates``, aligned with ``updates``.
    """
    if raw_updates is None:
        raise ValueError(RAW_UPDATES_MISSING.format(method=method))
    return trees.align("raw_updates", raw_updates, updates)


def _check_same_leaves(outer: chex.ArrayTree, updates: chex.ArrayTree) -> None:
    try:
        aligned = trees.align_structure("raw_updates", outer, updates)
        same = jax.tree.structure(aligned) == jax.tree.structure(updates) and all(
            a is b
            for a, b in zip(
                jax.tree.leaves(aligned), jax.tree.leaves(updates), strict=True
            )
        )
    except ValueError:
        same = False
    if not same:
        raise ValueError(
            "`raw_updates` is bound already, to something else than the updates that "
            "arrive at this capture: capturing again would take an already modified "
            "gradient for the raw one, and decoupled routing would silently become "
            "shared routing. Keep one capture (`optax_cl.chain`, `protect` and "
            "`decoupled_adamw` each are one) and use plain `optax.chain` inside it; or "
            "pass `rebind=True` to `capture_raw` if a new raw gradient is meant. "
            "Around `optax.MultiSteps`, put the capture inside it."
        )
