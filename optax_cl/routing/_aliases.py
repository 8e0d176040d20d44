"""One-call optimizers that put every link in its place."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from optax_cl._core import boundaries, checks
from optax_cl.routing import _adam, _capture


def decoupled_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    modifiers: Sequence[optax.GradientTransformation] = (),
    post: Sequence[optax.GradientTransformation] = (),
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    nesterov: bool = False,
    first_moment: str = "routed",
    second_moment: str = "max",
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with modifiers in front of the moments and constraints behind them.

    Equal to ``chain(*modifiers, scale_by_decoupled_adam(...), add_decayed_weights(...),
    *post, scale_by_learning_rate(learning_rate))`` with one capture around it. Weight
    decay stands before ``post``, so that a constraint there also holds for the decay.
    Links in ``post`` get updates that point along the gradient, of Adam's size: an
    ``ewc`` there pulls towards its anchor, in units of steps.

    Args:
      learning_rate: A number or an Optax schedule.
      modifiers: From the raw to the routed gradient, in order.
      post: On the update, in order.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the denominator outside the root.
      eps_root: Added inside the root.
      mu_dtype: Dtype of the first moment.
      weight_decay: Decoupled weight decay, at least 0; unlike ``optax.adamw`` the
        default is 0, since decay forgets.
      mask: Which leaves decay, as in ``optax.adamw``.
      nesterov: Nesterov momentum.
      first_moment: As in ``scale_by_decoupled_adam``.
      second_moment: As in ``scale_by_decoupled_adam``.

    Returns:
      A ``GradientTransformationExtraArgs``. Without modifiers and post links it is
      ``optax.adamw``.

    Raises:
      TypeError: If ``modifiers`` or ``post`` hold something else.
      ValueError: For hyper-parameters out of range; at ``init`` for an optimizer among
        the modifiers, and for a link in ``post`` that takes gradients only
        (``mix_replay``).

    Example:
      >>> import jax.numpy as jnp, optax, optax_cl
      >>> tx = optax_cl.decoupled_adamw(0.1, modifiers=[optax_cl.ewc(10.0)])
      >>> w = jnp.ones(2)
      >>> updates, state = tx.update(w, tx.init(w), w)
      >>> print(updates.round(3))
      [-0.1 -0.1]
    """
    links = adamw_links(
        learning_rate,
        modifiers,
        post,
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
        weight_decay=weight_decay,
        mask=mask,
        nesterov=nesterov,
        first_moment=first_moment,
        second_moment=second_moment,
    )
    tx = _capture.chain(*links)

    def init_fn(params):
        state: Any = tx.init(params)
        for i, inner in enumerate(state[: len(modifiers)]):
            if boundaries.has_second_moments(inner):
                raise ValueError(
                    f"`modifiers[{i}]` holds a second moment: it is an optimizer, "
                    "whose steps would be taken for gradients. Leave it out, since "
                    "`decoupled_adamw` is the optimizer already; or chain the links "
                    "yourself with `optax_cl.chain`."
                )
        for i, inner in enumerate(state[len(modifiers) + 2 :][: len(post)]):
            if boundaries.has_modifier(inner):
                raise ValueError(
                    f"`post[{i}]` mixes gradients, and `post` gets updates, which have "
                    "another size. Pass it in `modifiers`."
                )
        return state

    return optax.GradientTransformationExtraArgs(init_fn, tx.update)


def adamw_links(
    learning_rate: optax.ScalarOrSchedule,
    modifiers: Sequence[optax.GradientTransformation],
    post: Sequence[optax.GradientTransformation],
    *,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    **adam: Any,
) -> list[optax.GradientTransformation]:
    """The links of ``decoupled_adamw`` in their order, without a capture."""
    for name, links in (("modifiers", modifiers), ("post", post)):
        if isinstance(links, optax.GradientTransformation):
            raise TypeError(
                f"`{name}` must be a sequence; wrap the one link in a list."
            )
        for i, link in enumerate(links):
            _capture.check_transformation(f"{name}[{i}]", link)
    checks.check_number("learning_rate", learning_rate, low=0.0, schedule=True)
    checks.check_number("weight_decay", weight_decay, low=0.0)
    return [
        *modifiers,
        _adam.scale_by_decoupled_adam(**adam),
        optax.add_decayed_weights(weight_decay, mask),
        *post,
        optax.scale_by_learning_rate(learning_rate),
    ]


def multi_steps(
    inner: optax.GradientTransformation,
    every_k_schedule: int | Callable[[Any], Any],
    **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    """``optax.MultiSteps`` as a transformation that passes extra arguments on.

    ``optax.MultiSteps(...).gradient_transformation()`` is not of the type that receives
    extra arguments, so inside ``optax.chain`` it loses ``reference_updates`` and the
    like. They arrive as they are at each micro-step (they are not accumulated); what
    counts is their value at the micro-step that emits. The capture belongs inside:
    ``multi_steps(optax_cl.chain(...), 4)``; then the raw gradient is the accumulated
    one. A gradient that is not finite would stay in the accumulator for good: pass
    ``should_skip_update_fn=optax.skip_not_finite``, which leaves it out.

    A task boundary belongs between updates: ``end_task`` and ``begin_task`` (and
    ``reset_state``) drop the micro-steps of an update that is not complete, whose
    gradient is the old task's.

    Args:
      inner: The optimizer to accumulate for.
      every_k_schedule: Micro-steps per step, or a schedule of them.
      **kwargs: Passed on to ``optax.MultiSteps``.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``optax.MultiStepsState``.

    Raises:
      TypeError: If ``inner`` is not a gradient transformation, or
        ``every_k_schedule`` neither integer nor schedule.
      ValueError: If ``every_k_schedule`` is below 1; at trace time if
        ``raw_updates`` is bound outside: it would be the raw gradient of one
        micro-batch beside a routed one accumulated over all of them.

    Example:
      >>> import jax.numpy as jnp, optax_cl
      >>> tx = optax_cl.multi_steps(optax_cl.decoupled_adamw(0.1), 2)
      >>> w = jnp.ones(1)
      >>> updates, state = tx.update(w, tx.init(w), w)
      >>> print(updates + 0.0)  # the first of two micro-steps
      [0.]
    """
    _capture.check_transformation("inner", inner)
    if not callable(every_k_schedule):
        checks.check_positive_int("every_k_schedule", every_k_schedule)
    accumulate = optax.MultiSteps(inner, every_k_schedule, **kwargs)

    def update_fn(updates, state, params=None, **extra_args):
        if extra_args.get("raw_updates") is not None:
            raise ValueError(
                "`raw_updates` is bound outside `multi_steps`, where it is the "
                "gradient of one micro-batch. Put the capture inside: "
                "`multi_steps(optax_cl.chain(...), k)`."
            )
        return accumulate.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(accumulate.init, update_fn)
