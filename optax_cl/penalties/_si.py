r"""SI: a quadratic pull, weighted by what each parameter did for the loss."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks, importance, quadratic, tasks, trees

CLAMPS = ("increment", "cumulative", "none")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SiRules:
    """How a task's importance is added. A static node in the state."""

    clamp: str = "increment"


class SiState(NamedTuple):
    """State of ``si``."""

    count: chex.Array  # int32 [], steps done (for a schedule)
    strength: chex.Array  # float32 [], c at the next step
    memory: importance.ImportanceMemory  # importance; anchor = start of the task
    path: chex.ArrayTree  # like params, float32: - sum of gradient times change
    gradient: chex.ArrayTree  # like params, float32: raw, of the last step
    before: chex.ArrayTree  # like params, their dtype: parameters before that step
    damping: chex.Array  # float32 [], xi
    # Optax's type of a state is a tree of arrays; a static node needs `Any` in it.
    rules: Any  # SiRules


def si(
    strength: optax.ScalarOrSchedule,
    *,
    damping: chex.Numeric = 1e-3,
    clamp: str = "increment",
) -> optax.GradientTransformationExtraArgs:
    r"""Synaptic intelligence: importance learned along the path of training.

    Each step credits every parameter with what its change did for the loss; at a
    boundary the credit, over the squared distance gone, becomes importance:

    .. math::
      w \leftarrow w - g\,\Delta\theta, \qquad
      \Omega \leftarrow \Omega + \max\!\Big(0,
      \frac{w}{(\theta - \theta^*)^2 + \xi}\Big), \quad \theta^* \leftarrow \theta,
      \quad w \leftarrow 0,

    with :math:`g` the raw gradient of the data's loss and :math:`\Delta\theta` the
    change really made to the parameters. The penalty and what is added to the updates
    are

    .. math::
      c\,\big\langle \Omega, (\theta - \theta^*)^2 \big\rangle, \qquad
      g \leftarrow g + 2c\,\Omega\,(\theta - \theta^*).

    Before the first boundary, and with strength 0, updates pass unchanged. ``collect``
    reads no data for it. The gradient needs labels: unlike ``mas`` it is not label
    free.

    **The change is read off the parameters.** At each step the parameters tell what the
    last update has become, whatever stands behind ``si``: moments, learning rate,
    clipping, weight decay, projections, masks, rounding to bfloat16, a step that was
    skipped. ``end_task(opt_state, params, ...)`` closes the last step. So:

    - Give ``end_task`` the parameters that training ended with, not an average of them.
    - Call ``begin_task(opt_state, params)`` after any change of the parameters made
      outside the optimizer, as for all methods: it is not credited. The one step that
      was then still open is not either. Where there is no importance yet, the start of
      the path moves with the parameters; elsewhere the anchor is a past solution, and
      stays.

    **Placement.** A modifier, first in the chain. The gradient that counts is
    ``raw_updates`` where it is bound, so inside ``optax_cl.chain`` and
    ``decoupled_adamw`` the accounting is the same in any place before the learning
    rate; in a plain ``optax.chain`` it is what arrives, and a clip or another penalty
    in front would be taken for the data. As a penalty it is placed as ``ewc``, which
    has the figures: before the moments as published, after them decoupled, never behind
    the learning rate. With replay inside the chain the raw gradient is that of the new
    data. Put it inside ``multi_steps``, not around: there gradient and change are of
    one update.

    **Clamp.** Noise and momentum make some credits negative. ``"increment"`` counts
    those of a task as zero; ``"cumulative"`` lets them lower what earlier tasks gave,
    down to zero; with ``"none"`` importances may be negative, where the penalty pushes
    *away* from the anchor without bound.

    **Damping** keeps a parameter that hardly moved from dividing by zero; it has the
    units of a squared parameter. Much larger than the squared distances gone it makes
    the importance :math:`w/\xi`. With a converged quadratic loss of curvature h the
    importance is h/2 for small damping, so that strength 1 continues the old loss.

    **Memory.** Five trees like params: importance, anchor, path and last gradient in
    float32, the last parameters in their own dtype. A wrapper around the whole
    optimizer would need three, for it sees gradient and update together; but what
    follows a wrapper escapes its accounting without a word, and it can't be a modifier
    of ``decoupled_adamw``. **Work per step.** Seven trees are read, params and
    gradients among them, and four written; XLA on the CPU makes a loop of each result,
    and reads twelve.

    **Several devices.** Give updates that are averaged already. With loss scaling,
    unscale in front of the capture, since the raw gradient counts.

    Args:
      strength: c, at least 0: a number, a scalar array or tracer, or a schedule over
        steps.
      damping: Xi, above 0.
      clamp: ``"increment"``, ``"cumulative"`` or ``"none"``.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``SiState``; its update needs
      ``params``, and reads ``raw_updates``.

    Raises:
      ValueError: For an argument out of range; at trace time without ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl
      >>> from optax_cl.penalties import si
      >>> tx = optax_cl.chain(si(1.0), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 3.0])
      >>> state = tx.init(params)
      >>> curvature = jnp.array([2.0, 0.0])  # the loss is half of it times theta^2
      >>> for _ in range(100):
      ...     updates, state = tx.update(curvature * params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> stats = optax_cl.collect(
      ...     state, params, [], task=optax_cl.Task(), key=jax.random.key(0))
      >>> state = optax_cl.end_task(state, params, stats)
      >>> print(state[0].memory.importance.round(2))  # 1 + 1/9: steps are not small
      [1.11 0.  ]

    References:
      Zenke et al, `Continual Learning Through Synaptic Intelligence
      <https://arxiv.org/abs/1703.04200>`_, 2017

    Differs from the paper:
      1. What is negative of a task's importance counts as zero; the paper does not say,
         and its authors' code clamps the sum over tasks (``clamp="cumulative"``).
      2. The default of ``damping`` is that of the authors' split streams; for permuted
         MNIST they take 0.1.
      3. What is not finite, of a gradient, a parameter or a credit, counts as zero.
    """
    checks.check_number("strength", strength, low=0.0, schedule=True)
    checks.check_number("damping", damping, low=0.0, open_low=True)
    checks.check_choice("clamp", clamp, CLAMPS)
    # Only the newest solution: the path starts where the anchor is.
    rules = importance.make_rules("latest", "sum", None, "zero", None, "error")

    def damping_array():
        # A copy: the state may be donated, the caller's array must outlive it.
        return jnp.array(damping, dtype=jnp.result_type(float), copy=True)

    def init_fn(params):
        fields = quadratic.start(params, strength, rules)
        empty = fields["memory"].importance
        params = trees.align_structure("params", params, empty)
        anchor = jax.tree.map(
            lambda f, p: jnp.where(jnp.isfinite(p), p, 0).astype(f.dtype), empty, params
        )
        fields["memory"] = fields["memory"]._replace(anchor=anchor)
        return SiState(
            **fields,
            path=trees.zeros_like(empty),
            gradient=trees.zeros_like(empty),
            before=jax.tree.map(lambda f, p: _finite_or(p, 0), empty, params),
            damping=damping_array(),
            rules=SiRules(clamp),
        )

    def update_fn(updates, state, params=None, *, raw_updates=None, **extra_args):
        del extra_args
        raw = updates
        if raw_updates is not None:
            raw = trees.align("raw_updates", raw_updates, updates)
        updates, state = quadratic.add_pull(
            "si", updates, state, params, strength, factor=2.0
        )
        raw = trees.align_structure("updates", raw, state.path)
        at = trees.align_structure("params", params, raw)
        return updates, _open_step(_close_step(state, at), raw, at)._replace(
            damping=damping_array()
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def si_loss(opt_state: optax.OptState, params: optax.Params) -> chex.Array:
    r"""The penalty's value, for logging: what ``si`` adds is its gradient.

    :math:`c \langle \Omega, (\theta - \theta^*)^2\rangle`, with the strength of the
    coming step, summed over all SI states in ``opt_state``.

    Args:
      opt_state: Any optimizer state that holds an ``SiState``, at any depth.
      params: Where to evaluate.

    Returns:
      A float32 scalar; negative only with ``clamp="none"``.

    Raises:
      ValueError: If there is no ``SiState``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_cl.penalties import si, si_loss
      >>> params = jnp.ones(3)
      >>> print(si_loss(optax.chain(si(1.0), optax.sgd(0.1)).init(params), params))
      0.0
    """
    return quadratic.value(opt_state, params, SiState, "`si`", factor=2.0)


# --- Steps and boundaries ------------------------------------------------------------


def _close_step(state: SiState, params: chex.ArrayTree) -> SiState:
    """Credits the last step, now that the parameters tell what became of it."""

    def credit(w, g, old, p):
        if trees.is_hole(p):
            return w
        change = jnp.asarray(p, w.dtype) - jnp.asarray(old, w.dtype)
        new = w - g * change
        return jnp.where(jnp.isfinite(new), new, w)

    path = jax.tree.map(credit, state.path, state.gradient, state.before, params)
    return state._replace(path=path)


def _open_step(
    state: SiState, gradient: chex.ArrayTree, params: chex.ArrayTree
) -> SiState:
    """Notes where a step begins, and with which gradient."""

    def note(old, g, p):
        if trees.is_hole(g):  # the step before is still open there
            return old
        g = jnp.asarray(g, old.dtype)
        return jnp.where(jnp.isfinite(g) & jnp.isfinite(p), g, 0)

    return state._replace(
        gradient=jax.tree.map(note, state.gradient, gradient, params),
        before=jax.tree.map(
            lambda old, p: old if trees.is_hole(p) else _finite_or(p, old),
            state.before,
            params,
        ),
    )


def _finite_or(p: Any, other: Any) -> chex.Array:
    """A copy of ``p``, with ``other`` where it is not finite."""
    dtype = jnp.result_type(p)
    return jnp.where(jnp.isfinite(p), p, other).astype(dtype)


def _fit(state: SiState, params: chex.ArrayTree) -> chex.ArrayTree:
    """The parameters that the state is about."""
    params = trees.align_structure("params", params, state.path)
    expected = "what the optimizer state was made for"
    checks.check_same_shapes("params", params, state.path, expected)
    return params


def _end_task(state, params, results):
    del results
    params = _fit(state, params)
    state = _close_step(state, params)

    def importance_of(w, f, start, p):
        # The states of several seeds may be stacked in one: their axes are the first.
        axes = range(state.damping.ndim, w.ndim)
        damping = jnp.expand_dims(state.damping, tuple(axes))
        new = w / (jnp.square(jnp.asarray(p, w.dtype) - start) + damping)
        if state.rules.clamp == "increment":
            return jnp.maximum(new, 0)
        if state.rules.clamp == "cumulative":
            return jnp.maximum(new, -f)  # and so the sum is at least 0
        return new

    memory = state.memory
    new = jax.tree.map(
        importance_of, state.path, memory.importance, memory.anchor, params
    )
    state = state._replace(
        memory=importance.consolidate(memory, new, params),
        path=trees.zeros_like(state.path),
    )
    return _open_step(state, trees.zeros_like(state.gradient), params)


def _begin_task(state, params):
    params = _fit(state, params)

    # What was done to the parameters since the last step began is no part of the path:
    # where the anchor is but its start, it moves along.
    def move(f, start, old, p):
        moved = start + (jnp.asarray(p, f.dtype) - jnp.asarray(old, f.dtype))
        return jnp.where((f == 0) & jnp.isfinite(moved), moved, start)

    memory = state.memory
    anchor = jax.tree.map(move, memory.importance, memory.anchor, state.before, params)
    state = state._replace(memory=memory._replace(anchor=anchor))
    return _open_step(state, trees.zeros_like(state.gradient), params)


tasks.register_boundary(
    SiState, quadratic.boundary(end_task=_end_task, begin_task=_begin_task)
)
