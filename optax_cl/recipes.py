"""Ready-made optimizers: one call for each method, every link in its place.

A recipe is AdamW with one method against forgetting, in the place that our studies or
the method's guarantee speak for. It captures the raw gradient once, so it stands alone
or behind a clip in ``optax.chain``, and its task boundaries are those of any chain:
``collect``, ``end_task``, ``begin_task``. Each is equal to the links that its docstring
writes out; for other places and settings write those.

Further keyword arguments are those of ``decoupled_adamw`` (``b1``, ``b2``, ``eps``,
``eps_root``, ``mu_dtype``, ``weight_decay``, ``mask``, ``nesterov``).
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax

from optax_cl import penalties, projections, replay, routing
from optax_cl._core.matrices import ViewRule
from optax_cl.routing import _aliases

__all__ = [
    "agem_adamw",
    "ewc_adamw",
    "projected_adamw",
    "protected_adamw",
    "replay_adamw",
]

_ADAMW = ("b1", "b2", "eps", "eps_root", "mu_dtype", "weight_decay", "mask", "nesterov")
_Recipe = TypeVar("_Recipe", bound=Callable[..., optax.GradientTransformation])


def _with_adamw(recipe: _Recipe) -> _Recipe:
    """Names the arguments behind ``**adamw`` in the recipe's signature.

    ``optax.inject_hyperparams`` reads it, and can't pass on what has no name.
    """
    own = inspect.signature(recipe)
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    adamw = inspect.signature(routing.decoupled_adamw).parameters
    both = own.replace(parameters=[*named, *(adamw[name] for name in _ADAMW)])
    setattr(recipe, "__signature__", both)  # noqa: B010, no type has that attribute
    return recipe


@_with_adamw
def replay_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule = 0.5,
    **adamw: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW on a mix of the current gradient and one of old examples.

    .. math:: \tilde g = (1 - \rho)\, g + \rho\, g_{\text{replay}}

    feeds both moments. The update takes ``replay_updates``, the gradient on a batch of
    the memory, and ``replay_weight``, 0 while there is none (see ``mix_replay``); a
    memory is ``reservoir_init``.

    Where old data may be kept it was worth three times the best rule without, and the
    shared second moment ended below the raw one (``domain_stream``).

    **Placement.** Alone, or behind a clip. **Memory and cost:** those of
    ``optax.adamw`` and your buffer; one more backward pass a step. **Boundaries:**
    nothing is stored.

    Args:
      learning_rate: A number or an Optax schedule.
      rho: Share of the replayed gradient, in [0, 1]; a number or a schedule.
      **adamw: See the module.

    Returns:
      ``decoupled_adamw(learning_rate, modifiers=[mix_replay(rho)],
      second_moment="routed", **adamw)``.

    Raises:
      ValueError: For numbers out of range; at trace time without ``replay_updates``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import recipes
      >>> tx = recipes.replay_adamw(0.1)
      >>> w = jnp.ones(2)
      >>> updates, state = tx.update(w, tx.init(w), w, replay_updates=-3 * w)
      >>> print(updates.round(3))
      [0.1 0.1]

    References:
      Chaudhry et al., `On Tiny Episodic Memories in Continual Learning
      <https://arxiv.org/abs/1902.10486>`_, 2019
    """
    return routing.decoupled_adamw(
        learning_rate,
        modifiers=[replay.mix_replay(rho)],
        second_moment="routed",
        **adamw,
    )


@_with_adamw
def agem_adamw(
    learning_rate: optax.ScalarOrSchedule, **adamw: Any
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW on a gradient that does not oppose one of old examples.

    A-GEM before the moments, as published: where the gradient g and the reference r
    have :math:`\langle g, r\rangle < 0`, the part of g along r is taken away. The
    update takes ``reference_updates``, the gradient r on a batch of the memory, zero
    while there is none.

    No step is safe by that: most of Adam's directions still oppose r. Behind the
    moments none does, ``decoupled_adamw(learning_rate, post=[agem()])``, and less is
    gained, in ``domain_stream`` and in ``classic_digits``.

    **Placement.** Alone, or behind a clip. **Memory and cost:** those of
    ``optax.adamw`` and your buffer; one more backward pass a step. **Boundaries:**
    nothing is stored.

    Args:
      learning_rate: A number or an Optax schedule.
      **adamw: See the module.

    Returns:
      ``decoupled_adamw(learning_rate, modifiers=[agem()], **adamw)``.

    Raises:
      ValueError: For numbers out of range; at trace time without
        ``reference_updates``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import recipes
      >>> tx = recipes.agem_adamw(0.1)
      >>> w = jnp.ones(2)
      >>> old = jnp.array([1.0, -3.0])
      >>> updates, state = tx.update(w, tx.init(w), w, reference_updates=old)
      >>> print(updates.round(3))  # of [1.2, 0.4], which is orthogonal to `old`
      [-0.1   -0.04]

    References:
      Chaudhry et al., `Efficient Lifelong Learning with A-GEM
      <https://arxiv.org/abs/1812.00420>`_, 2019
    """
    modifiers = [projections.agem()]
    return routing.decoupled_adamw(learning_rate, modifiers=modifiers, **adamw)


@_with_adamw
def ewc_adamw(
    learning_rate: optax.ScalarOrSchedule,
    strength: optax.ScalarOrSchedule,
    **adamw: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with the pull of elastic weight consolidation in front of the moments.

    .. math:: \tilde g = g + \lambda \sum_k F_k (\theta - \theta_k^*)

    with the exact Fisher, merged over tasks in constant memory (see ``ewc``). There is
    no good strength for every network: sweep it, from 1e0 to 1e9.

    **Placement.** Alone, or behind a clip. **Memory and cost:** two float32 trees like
    the parameters, read once a step. **Boundaries:** ``collect`` takes a backward pass
    for each class of each example.

    Args:
      learning_rate: A number or an Optax schedule.
      strength: Lambda, at least 0; a number or a schedule.
      **adamw: See the module.

    Returns:
      ``decoupled_adamw(learning_rate, modifiers=[ewc(strength)], **adamw)``.

    Raises:
      ValueError: For numbers out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import recipes
      >>> tx = recipes.ewc_adamw(0.1, strength=100.0)
      >>> w = jnp.ones(2)
      >>> updates, state = tx.update(w, tx.init(w), w)
      >>> print(updates.round(3))  # AdamW's, until a task has ended
      [-0.1 -0.1]

    References:
      Kirkpatrick et al., `Overcoming catastrophic forgetting in neural networks
      <https://arxiv.org/abs/1612.00796>`_, 2017
    """
    return routing.decoupled_adamw(
        learning_rate, modifiers=[penalties.ewc(strength)], **adamw
    )


@_with_adamw
def protected_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    strength: optax.ScalarOrSchedule | routing.Rule | None = None,
    *,
    matrices: ViewRule | None = None,
    **adamw: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW that slows moves inside a subspace that old tasks need.

    .. math:: \tilde g = g + U (C' - C), \qquad C = U^T g

    with a basis U of ``rank`` columns for each kernel, which ``end_task`` grows, and
    C' what ``strength`` leaves of C. The second moment reads the larger of both
    gradients, so Adam neither undoes the attenuation nor steps without bound.

    **Placement.** Alone, or behind a clip. **Memory and cost:** ``rank`` (in + 1)
    numbers a kernel and what a rule stores; about 6 rank in out FLOPs a kernel and
    step. **Boundaries:** ``collect`` takes one backward pass a batch, two for a rule
    that reads curvature, and a decomposition a kernel.

    Args:
      learning_rate: A number or an Optax schedule.
      rank: Columns of each basis, at most the smallest fan-in.
      strength: A number, a schedule or a rule, as in ``attenuate``; None is
        ``balance(1)``. Classifiers that fit their data do better with
        ``ratchet(0.75)`` (``regime_map``).
      matrices: How leaves are read as matrices, as in ``protect``.
      **adamw: See the module.

    Returns:
      ``protect(rank, attenuate(strength), scale_by_decoupled_adam(...),
      add_decayed_weights(...), scale_by_learning_rate(learning_rate))``.

    Raises:
      TypeError, ValueError: As ``protect``, ``attenuate`` and ``decoupled_adamw``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import recipes
      >>> tx = recipes.protected_adamw(0.1, rank=2)
      >>> w = jnp.ones((3, 2))
      >>> state = tx.init(w)
      >>> state.basis.shape
      (3, 2)

    References:
      See ``protect`` and ``attenuate``.
    """
    modifier = routing.attenuate(strength)
    links = _aliases.adamw_links(learning_rate, [modifier], [], **adamw)
    return routing.protect(rank, *links, matrices=matrices)


@_with_adamw
def projected_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    threshold: jax.typing.ArrayLike = 1.0,
    matrices: ViewRule | None = None,
    **adamw: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW whose steps have no part inside a subspace that old tasks need.

    .. math:: \Delta = u - U U^T u

    behind the moments and the decay, where it is exact: nothing after it but the
    learning rate. Strict, so every column costs learning: take a small rank, or a
    ``threshold`` below 1.

    **Placement.** Alone, or behind a clip. **Memory and cost:** ``rank`` (in + 1)
    numbers a kernel; about 4 rank in out FLOPs a kernel and step. **Boundaries:**
    ``collect`` takes one backward pass a batch and a decomposition a kernel.

    Args:
      learning_rate: A number or an Optax schedule.
      rank: Columns of each basis, at most the smallest fan-in.
      threshold: Share of the energy that the kept columns hold, as in ``protect``.
      matrices: How leaves are read as matrices, as in ``protect``.
      **adamw: See the module.

    Returns:
      ``protect(rank, scale_by_decoupled_adam(...), add_decayed_weights(...),
      project(), scale_by_learning_rate(learning_rate), threshold=threshold)``.

    Raises:
      TypeError, ValueError: As ``protect`` and ``decoupled_adamw``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import recipes
      >>> tx = recipes.projected_adamw(0.1, rank=1, weight_decay=0.01)
      >>> w = jnp.ones((3, 2))
      >>> state = tx.init(w)
      >>> state = state._replace(basis=jnp.eye(3, 1))
      >>> updates, state = tx.update(w, state, w)
      >>> print(updates[0])
      [0. 0.]

    References:
      See ``protect`` and ``project``.
    """
    links = _aliases.adamw_links(learning_rate, [], [routing.project()], **adamw)
    return routing.protect(rank, *links, matrices=matrices, threshold=threshold)
