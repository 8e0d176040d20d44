"""How a method takes part in task boundaries, and how its states are found.

A method registers one ``Boundary`` for its state class. States are found wherever they
stand: inside ``chain``, ``masked``, ``partition``, ``MultiSteps``, ``apply_if_finite``
and ``inject_hyperparams``.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks
from optax_cl._core.task_functions import Task


class PassInput(NamedTuple):
    """What one step of a pass over the task's data may read."""

    state: Any  # the method's state; None for shared passes
    params: chex.ArrayTree  # trainable leaves; MaskedNode where hidden
    batch: chex.ArrayTree  # [B, ...]
    weights: chex.Array  # float32 [B], 0 for padding, else 1
    key: chex.PRNGKey
    task: Task  # its functions take `params` as given here, and `frozen=`
    earlier: dict[str, Any]  # results of this method's earlier passes
    frozen: Any = None  # what `collect` got as `frozen`


class Pass(NamedTuple):
    """One streaming pass over a task's data, as three pure functions.

    Attributes:
      name: Names the result; two states that ask for a shared pass of the same name
        get the same result, computed once.
      init: ``(state, params) -> accumulator``.
      step: ``(accumulator, PassInput) -> accumulator``, jitted.
      finish: ``(accumulator, state, earlier) -> result``, jitted.
      shared: Whether the pass reads nothing of the state.

    The functions must be the same objects from call to call (module level, or made by
    a cached factory), since compilation is keyed by them.
    """

    name: str
    init: Callable[[Any, chex.ArrayTree], Any]
    step: Callable[[Any, PassInput], Any]
    finish: Callable[[Any, Any, dict[str, Any]], Any] = lambda acc, state, earlier: acc
    shared: bool = False


class Boundary(NamedTuple):
    """How one state class takes part in task boundaries.

    Attributes:
      passes: ``state -> (Pass, ...)``, in order; a later one may read the results of
        those before it.
      end_task: ``(state, params, results) -> state``, pure; same structure and shapes.
      begin_task: ``(state, params) -> state``, pure; same structure and shapes.
      like: ``state -> tree`` like params, with holes where the method hides leaves.
      usage: ``state -> (tasks stored, capacity or None)``; None for averages that are
        no memory of tasks.
      check: ``state -> None``; raises, outside jit, if another task will not fit.
      grow: ``(state, capacity) -> state`` with more room; None if nothing can grow.
      project: ``(state, tree) -> tree``, takes the protected subspace out of a tree
        like params; None for methods without one.
    """

    passes: Callable[[Any], tuple[Pass, ...]] = lambda state: ()
    end_task: Callable[[Any, Any, dict[str, Any]], Any] = lambda state, p, results: (
        state
    )
    begin_task: Callable[[Any, Any], Any] = lambda state, params: state
    like: Callable[[Any], Any] | None = None
    usage: Callable[[Any], tuple[Any, int | None]] | None = None
    check: Callable[[Any], None] = lambda state: None
    grow: Callable[[Any, int], Any] | None = None
    project: Callable[[Any, chex.ArrayTree], chex.ArrayTree] | None = None


_BOUNDARIES: dict[type, Boundary] = {}
# State class -> (fields of first moments, fields of other accumulators).
_MOMENTS: dict[type, tuple[tuple[str, ...], tuple[str, ...]]] = {
    optax.EmaState: (("ema",), ()),
    optax.FactoredState: ((), ("v_row", "v_col", "v")),
    optax.ScaleByAdaDeltaState: ((), ("e_g", "e_x")),
    optax.ScaleByAdamState: (("mu",), ("nu",)),
    optax.ScaleByAmsgradState: (("mu",), ("nu", "nu_max")),
    optax.ScaleByBeliefState: (("mu",), ("nu",)),
    optax.ScaleByLionState: (("mu",), ()),
    optax.ScaleByNovogradState: (("mu",), ("nu",)),
    optax.ScaleByRmsState: ((), ("nu",)),
    optax.ScaleByRssState: ((), ("sum_of_squares",)),
    optax.ScaleByRStdDevState: ((), ("mu", "nu")),  # its mean centres, and never steps
    optax.TraceState: (("trace",), ()),
    optax.contrib.MuonState: (("mu",), ()),
}


# State classes of links that stand before the moments, or nowhere.
_MODIFIERS: set[type] = set()


def register_boundary(state_class: type, boundary: Boundary) -> None:
    """Makes states of a class take part in task boundaries.

    Args:
      state_class: A NamedTuple, found by its exact class.
      boundary: What such a state does there. A second registration replaces the first.

    Raises:
      TypeError: If ``state_class`` is no NamedTuple, or ``boundary`` no ``Boundary``.
    """
    _check_state_class(state_class)
    if not isinstance(boundary, Boundary):
        raise TypeError(
            "`boundary` must be a `Boundary`; got "
            f"{boundary!r}. Write `Boundary(end_task=...)`."
        )
    _BOUNDARIES[state_class] = boundary


def register_moments(
    state_class: type, first: tuple[str, ...], other: tuple[str, ...] = ()
) -> None:
    """Tells the moments policies which fields of a state are moments.

    Args:
      state_class: A NamedTuple.
      first: Fields that average gradients (reset, and projected).
      other: Fields that average something else (reset only).

    Raises:
      TypeError: If ``state_class`` is no NamedTuple.
      ValueError: If it has no field of such a name.
    """
    _check_state_class(state_class)
    missing = sorted({*first, *other} - {*state_class._fields})
    if missing:
        raise ValueError(
            f"{state_class.__name__} has no field {', '.join(missing)}; its fields "
            f"are {', '.join(state_class._fields)}. Pass names as a tuple: "
            "`first=('mu',)`."
        )
    _MOMENTS[state_class] = (first, other)


def register_modifier(state_class: type) -> None:
    """Tells that what a state belongs to takes gradients only, never updates.

    Args:
      state_class: A NamedTuple.

    Raises:
      TypeError: If ``state_class`` is no NamedTuple.
    """
    _check_state_class(state_class)
    _MODIFIERS.add(state_class)


def _check_state_class(state_class: Any) -> None:
    if not (isinstance(state_class, type) and hasattr(state_class, "_fields")):
        raise TypeError(
            f"`state_class` must be a NamedTuple class; got {state_class!r}."
        )


# --- Finding states ------------------------------------------------------------------


def of(state: Any) -> Boundary:
    """What a registered state does at a boundary."""
    return _BOUNDARIES[type(state)]


def registered(node: Any) -> bool:
    """Whether ``node`` is a state that takes part in boundaries."""
    return type(node) in _BOUNDARIES


def map_states(function, tree, wanted=registered):
    """Applies ``function`` to wanted states, outer ones before what they hold."""

    def visit(node):
        if not wanted(node):
            return node
        node = function(node)
        return type(node)(*(map_states(function, field, wanted) for field in node))

    return jax.tree.map(visit, tree, is_leaf=wanted)


def find_with_path(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Registered states with their paths, outer ones before what they hold."""
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=registered):
        if registered(node):
            here = prefix + jax.tree_util.keystr(path)
            yield here, node
            for name, field in zip(node._fields, node, strict=True):
                yield from find_with_path(field, f"{here}.{name}")


def find(tree: Any) -> Iterator[Any]:
    """Registered states, in the order in which ``map_states`` visits them."""
    return (state for _, state in find_with_path(tree))


def has_moments(node: Any) -> bool:
    """Whether ``node`` is a state with registered moments."""
    return type(node) in _MOMENTS


def has_first_moments(tree: Any) -> bool:
    """Whether a state, or one inside it, has moments that average gradients."""
    return any(first for first, _ in _moments(tree))


def has_second_moments(tree: Any) -> bool:
    """Whether a state, or one inside it, has moments that are no average gradient."""
    return any(other for _, other in _moments(tree))


def _moments(tree: Any) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The fields of every state with moments."""
    found = []

    def visit(state):
        found.append(_MOMENTS[type(state)])
        return state

    map_states(visit, tree, has_moments)
    return found


# What the first two have accumulated is dropped at every boundary; the others hold
# numbers, several where states of seeds are stacked.
_WITHOUT_AVERAGES = (
    optax.MultiStepsState,
    optax.ApplyEvery,
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
    optax.contrib.ReduceLROnPlateauState,
)


def _may_be_average(leaf: Any) -> bool:
    inexact = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    return inexact and jnp.ndim(leaf) > 0


def _is_state(node: Any) -> bool:
    """Whether this is a state of anybody's, and not a NamedTuple of parameters."""
    named = hasattr(node, "_fields") and type(node).__name__.endswith("State")
    return named or registered(node) or _is_known(node)


def _is_known(node: Any) -> bool:
    return has_moments(node) or isinstance(node, _WITHOUT_AVERAGES)


def _is_unknown(node: Any) -> bool:
    of_optax = type(node).__module__.startswith("optax.")
    return of_optax and _is_state(node) and not _is_known(node)


def warn_of_unknown_moments(tree: Any, policy: str) -> None:
    """Warns of Optax's states with arrays that may be averages, and are not named."""
    found: set[str] = set()

    def visit(state):
        for field in state:
            for leaf in jax.tree.leaves(field, is_leaf=_is_state):
                if not _is_state(leaf) and _may_be_average(leaf):
                    found.add(type(state).__name__)
        return state

    map_states(visit, tree, _is_unknown)
    if found:
        names = ", ".join(f"`{name}`" for name in sorted(found))
        checks.warn(
            f"{policy} leaves {names} as it is: nothing says which of its fields are "
            "averages. If some are, name them once, with "
            "`optax_cl.boundaries.register_moments(StateClass, first=(...), "
            "other=(...))`."
        )


def has_modifier(tree: Any) -> bool:
    """Whether a state of a link that takes gradients only stands in ``tree``."""

    def is_modifier(node):
        return type(node) in _MODIFIERS

    return any(map(is_modifier, jax.tree.leaves(tree, is_leaf=is_modifier)))


def map_moments(function, tree, reset_count=False):
    """Applies ``function`` to every registered moment, wherever it stands."""

    def visit(state):
        first, other = _MOMENTS[type(state)]
        new = {f: function(getattr(state, f)) for f in first + other}
        if reset_count and "count" in state._fields:
            # A map, since the count may be held by a variable, as NNX has it.
            new["count"] = jax.tree.map(jnp.zeros_like, state.count)
        return state._replace(**new)

    return map_states(visit, tree, has_moments)


def project_moments(function, tree):
    """Applies ``function`` to every first moment; no largest step grows by that.

    A projection puts some of a moment on coordinates that had none. Where the second
    moment is zero or nearly so (an input that training never showed) the step there
    would have no bound. So ``nu`` is raised to what keeps every ratio of the moments
    within the largest that the leaf had.
    """

    def raised(nu, new, old):
        if new is old or jnp.shape(nu) != jnp.shape(old):
            return nu
        size, moved = (jnp.abs(m).astype(jnp.float32) for m in (old, new))
        root = jnp.sqrt(nu.astype(jnp.float32))
        ratio = jnp.where(root > 0, size / jnp.where(root > 0, root, 1), 0)
        largest = jnp.max(ratio, initial=0)
        least = jnp.where(largest > 0, moved / jnp.where(largest > 0, largest, 1), 0)
        return jnp.maximum(nu, jnp.square(least).astype(nu.dtype))

    def visit(state):
        first, other = _MOMENTS[type(state)]
        new = {f: function(getattr(state, f)) for f in first}
        if first and "nu" in other:
            old = getattr(state, first[0])
            new["nu"] = jax.tree.map(raised, state.nu, new[first[0]], old)
        return state._replace(**new)

    return map_states(visit, tree, has_moments)


def drop_accumulated(tree):
    """Empties what Optax's wrappers have accumulated for an unfinished update."""
    fields = {
        optax.MultiStepsState: ("mini_step", "acc_grads"),
        optax.ApplyEvery: ("count", "grad_acc"),
    }

    def drop(state):
        zero = {f: getattr(state, f) for f in fields[type(state)]}
        return state._replace(**jax.tree.map(jnp.zeros_like, zero))

    return map_states(drop, tree, lambda n: type(n) in fields)
