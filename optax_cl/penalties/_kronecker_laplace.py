r"""Kronecker-factored Laplace: a pull weighted by a whole matrix per kernel side."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import (
    checks,
    importance,
    kronecker,
    places,
    statistics,
    subspaces,
    tasks,
    trees,
)
from optax_cl._core.matrices import (
    ViewRule,
    from_matrix,
    matrix_shape,
    to_matrix,
    view_rule,
)

ACCUMULATE = ("nearest", "pi", "separate")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class KroneckerRules:
    """How the factors come about and add up: a static node in the state."""

    views: ViewRule
    accumulate: str
    capacity: int | None
    overflow: str
    fisher: statistics.FisherRules


class KroneckerLaplaceState(NamedTuple):
    """State of ``kronecker_laplace``. Trees like params, ``MaskedNode`` for holes."""

    count: chex.Array  # int32 [], steps done (for a schedule)
    strength: chex.Array  # float32 [], lambda at the next step
    tasks: chex.Array  # int32 [], tasks consolidated
    stored: chex.Array  # int32 [], places in use ("separate")
    left: chex.ArrayTree  # L, float32 [*batch, in, in]; "separate": [K, ...]
    right: chex.ArrayTree  # R, float32 [*batch, out, out], trace one; likewise
    diagonal: chex.ArrayTree  # Fisher of leaves that are no matrices, float32
    anchor: chex.ArrayTree  # the newest solution, float32
    rules: Any  # KroneckerRules, static


def kronecker_laplace(
    strength: optax.ScalarOrSchedule,
    *,
    accumulate: str = "nearest",
    estimator: str = "exact",
    matrices: ViewRule | None = None,
    capacity: int | None = None,
    overflow: str = "error",
    weight_by_count: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of a quadratic penalty with a Kronecker-factored Fisher.

    The diagonal Fisher of ``ewc`` takes parameters for independent. Here a kernel, read
    as a matrix W ``[in, out]``, has two factors, of its scores :math:`G = \nabla_W \log
    p(y \mid x)`,

    .. math:: L = \mathbb{E}[G G^\top], \qquad
       R = \mathbb{E}[G^\top G] / \mathbb{E}\|G\|^2 ,

    and with :math:`X = W - W^*`, :math:`W^*` the newest solution, the penalty and what
    is added to the updates are

    .. math:: \frac\lambda2 \operatorname{tr}(X^\top L X R), \qquad
       g \leftarrow g + \lambda\, L X R .

    Directions of inputs that a task never showed are free, whatever the axes: a
    penalty that turns with the inputs, as the diagonal one does not. Leaves that are no
    matrices (biases, scales, embeddings) have the diagonal Fisher, as in ``ewc``.
    Before the first boundary, and with strength 0, updates pass unchanged if the
    parameters are finite.

    **Over tasks** Fishers add up, and a sum of products is no product:

    ``"nearest"``
      The Kronecker product nearest to what is held plus the task's, in the Frobenius
      norm: exact where two tasks share a factor. Of tasks that have neither inputs nor
      outputs in common (a head and a set of inputs each) it keeps the strongest alone:
      take ``"separate"``.
    ``"pi"``
      Factors are added, balanced by their traces; known from other code. It keeps
      cross terms: of two equal tasks it makes four times one, not twice.
    ``"separate"``
      The sum itself, task by task; needs ``capacity``.

    **Placement.** As ``ewc``, which has the figures: before the moments, a penalty in
    the loss; after them, decoupled; never behind the learning rate.

    **Scale.** :math:`L \otimes R` has the trace of the layer's Fisher, so a strength of
    ``ewc`` is where to begin; the largest eigenvalue, which bounds the learning rate
    behind the moments, is larger than the largest entry of a diagonal.

    **Memory.** ``in² + out²`` numbers a kernel (``"separate"``: for each of
    ``capacity`` tasks), a float32 copy of the parameters, and one more of the leaves
    that are no matrices; leave wide kernels to the diagonal with
    ``matrices=matrix_views(skip=...)``. **Work per step.** ``2 in out (in + out)``
    FLOPs a kernel, times ``capacity`` if there is one. **At a boundary** one backward
    pass an example (``"exact"``: one a class) and as many FLOPs again for the factors;
    up to 256 MB of factors of examples at a time, or those of one example.

    Args:
      strength: Lambda, at least 0: a number, a scalar array or tracer, or a schedule
        over steps.
      accumulate: ``"nearest"``, ``"pi"`` or ``"separate"``.
      estimator: Of the Fisher: ``"exact"``, ``"sampled"``, ``"empirical"`` or
        ``"predicted"``; see ``fisher_diagonal``.
      matrices: ``matrix_views(...)``: which leaves are matrices, and how. None is
        ``matrix_views(embeddings="skip")``.
      capacity: Tasks that fit, for ``"separate"`` only.
      overflow: What ``"separate"`` does with one task too many: ``"error"`` (raised by
        ``collect`` and ``end_task``; inside jit, where it can't be known, they refuse
        at trace time whether full or not) or ``"merge"`` (the two oldest become the
        nearest product).
      weight_by_count: Whether each Fisher is multiplied by the number of labels it was
        averaged over.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``KroneckerLaplaceState``; its
      update needs ``params``.

    Raises:
      ValueError: For an argument out of range or without meaning beside the others; at
        ``init`` for a leaf whose sides can't be told; at trace time without ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl
      >>> from optax_cl.penalties import kronecker_laplace
      >>> task = optax_cl.classification(lambda p, b: b[0] @ p, lambda b: b[1])
      >>> tx = kronecker_laplace(1.0)
      >>> params = jnp.zeros((2, 2))
      >>> state = tx.init(params)
      >>> batches = [(jnp.array([[1.0, 1.0]]), jnp.array([0]))]  # uses the sum of both
      >>> stats = optax_cl.collect(
      ...     state, params, batches, task=task, key=jax.random.key(0))
      >>> state = optax_cl.end_task(state, params, stats)
      >>> zero, x = jnp.zeros((2, 2)), jnp.array([[1.0, 0.0], [-1.0, 0.0]])
      >>> print(tx.update(zero, state, x)[0])  # the sum of both stays: no pull
      [[0. 0.]
       [0. 0.]]
      >>> print(tx.update(zero, state, jnp.abs(x))[0].round(2))
      [[ 0.5 -0.5]
       [ 0.5 -0.5]]

    References:
      Ritter et al, `Online Structured Laplace Approximations For Overcoming
      Catastrophic Forgetting <https://arxiv.org/abs/1805.07810>`_, 2018

      Martens & Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature <https://arxiv.org/abs/1503.05671>`_, 2015

      Morwani et al, `A New Perspective on Shampoo's Preconditioner
      <https://arxiv.org/abs/2406.17748>`_, 2024 (the factors used here)

    Differs from the paper:
      1. Theirs are K-FAC's factors, of layer inputs and of gradients before the
         activation, taken for independent of each other. These need neither, and are
         the same where they are independent and an example has one position.
      2. A bias is no further row of its kernel, and has the diagonal Fisher.
      3. Tasks add up to one product; theirs keeps a running sum of each factor.
      4. Factors that are not finite count as zero.
    """
    fisher = statistics.make_rules(estimator, weight_by_count)
    if estimator == "batched":
        raise ValueError(
            "`estimator='batched'` has no scores of examples. Use 'exact', 'sampled' "
            "or 'empirical'."
        )
    checks.check_choice("accumulate", accumulate, ACCUMULATE)
    if accumulate == "separate":
        if capacity is None:
            raise ValueError(
                "`accumulate='separate'` needs `capacity`, the number of tasks that "
                "fit."
            )
        checks.check_positive_int("capacity", capacity)
    elif capacity is not None:
        raise ValueError(
            f"`capacity` has no meaning with `accumulate={accumulate!r}`, whose memory "
            f"does not grow with the tasks; got {capacity!r}."
        )
    checks.check_choice("overflow", overflow, importance.OVERFLOWS)
    checks.check_number("strength", strength, low=0.0, schedule=True)
    views = view_rule(matrices, embeddings="skip")
    rules = KroneckerRules(views, accumulate, capacity, overflow, fisher)

    def init_fn(params):
        def square(side):
            def one(p, view):
                *batch, n, m = matrix_shape(view, jnp.shape(p))
                size = (n, m)[side]
                shape = (*batch, size, size)
                if capacity is not None:
                    shape = (capacity, *shape)
                return jnp.zeros(shape, trees.importance_dtype(jnp.result_type(p)))

            return subspaces.map_matrices(views, one, params)

        plain = importance.make_rules(None, "sum", None, "zero", None, "error")
        anchor = importance.init(params, plain, None).importance
        count = jnp.zeros([], jnp.int32)
        return KroneckerLaplaceState(
            count=count,
            strength=jnp.array(importance.value_at(strength, count), jnp.float32),
            tasks=jnp.zeros([], jnp.int32),
            stored=jnp.zeros([], jnp.int32),
            left=square(0),
            right=square(1),
            diagonal=subspaces.map_others(views, trees.copy(anchor)),
            anchor=anchor,
            rules=rules,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.check_params("kronecker_laplace", params)
        trees.check_fits("updates", updates, state.anchor)
        params = trees.align("params", params, updates)
        now = importance.value_at(strength, state.count)
        pulls = _pulls(state, params)

        def add(u, pull):
            return u if trees.is_hole(pull) else (u + now * pull).astype(u.dtype)

        updates = jax.tree.map(add, updates, pulls, is_leaf=trees.is_hole)
        count = optax.safe_increment(state.count)
        following = importance.value_at(strength, count)
        return updates, state._replace(
            count=count, strength=jnp.asarray(following, state.strength.dtype)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def kronecker_laplace_loss(
    opt_state: optax.OptState, params: optax.Params
) -> chex.Array:
    r"""The penalty's value, for logging; ``kronecker_laplace`` adds its gradient.

    :math:`\frac\lambda2 \operatorname{tr}(X^\top L X R)`, over all kernels, and half
    the weighted squares of other leaves, with the strength of the coming step, summed
    over all states of the method in ``opt_state``.

    Args:
      opt_state: Any optimizer state that holds a ``KroneckerLaplaceState``.
      params: Where to evaluate.

    Returns:
      A float32 scalar, at least 0 but for rounding.

    Raises:
      ValueError: If there is no ``KroneckerLaplaceState``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl.penalties import kronecker_laplace, kronecker_laplace_loss
      >>> params = jnp.ones((3, 2))
      >>> print(kronecker_laplace_loss(kronecker_laplace(1.0).init(params), params))
      0.0
    """

    def wanted(node):
        return isinstance(node, KroneckerLaplaceState)

    states = [s for s in jax.tree.leaves(opt_state, is_leaf=wanted) if wanted(s)]
    if not states:
        raise ValueError(
            "`opt_state` holds no KroneckerLaplaceState. Is `kronecker_laplace` in the "
            "chain?"
        )

    def one(state):
        at = _aligned(params, state)
        away = jax.tree.map(lambda p, a: jnp.asarray(p, a.dtype) - a, at, state.anchor)
        return state.strength / 2 * trees.vdot(away, _pulls(state, at))

    return sum(map(one, states), start=jnp.zeros([], jnp.float32))


def _aligned(params, state):
    params = trees.align_structure("params", params, state.anchor)
    trees.check_fits("params", params, state.anchor)
    return params


def _pulls(state, params):
    """``L X R``, or F x, at every leaf that has a memory; a hole elsewhere."""
    memory = (state.left, state.right, state.diagonal, state.anchor)
    aligned = [trees.align_structure("the memory", m, params) for m in memory]

    def one(path, p, left, right, diagonal, anchor):
        if trees.is_hole(p) or trees.is_hole(anchor):
            return p if trees.is_hole(p) else anchor
        away = jnp.asarray(p, anchor.dtype) - anchor
        if trees.is_hole(left):
            return diagonal * away
        view = state.rules.views(checks.path_str(path), p.shape)
        x = to_matrix(away, view)
        if state.rules.capacity is None:
            pull = kronecker.pull(left, x, right)
        else:
            pull = kronecker.pull(left, x[None], right).sum(0)
        return from_matrix(pull, view, p.shape)

    return jax.tree_util.tree_map_with_path(
        one, params, *aligned, is_leaf=trees.is_hole
    )


# --- Task boundary -------------------------------------------------------------------


def _passes(state):
    rules = state.rules
    return (kronecker.factor_pass(rules.views, rules.fisher.estimator),)


def _end_task(state, params, results):
    (found,) = results.values()
    # The state may have one hole for a subtree, the pass has one for each leaf.
    trees_found = {
        name: trees.align_structure(name, found[name], getattr(state, name))
        for name in ("left", "right", "diagonal")
    }
    newest = _newest(state)
    for name, tree in trees_found.items():
        checks.check_same_shapes(
            "statistics", tree, newest[name], "those of the parameters of this state"
        )
    found = {**trees_found, "num_items": found["num_items"]}
    return _consolidated(state, _aligned(params, state), found)


def _newest(state):
    """What one task leaves, as shapes."""
    bank = state.rules.capacity is not None

    def of_one(tree):
        return jax.tree.map(lambda x: x[0], tree) if bank else tree

    return jax.eval_shape(
        lambda: {
            "left": of_one(state.left),
            "right": of_one(state.right),
            "diagonal": state.diagonal,
        }
    )


@jax.jit  # a boundary is mostly called outside jit, and this is many small operations
def _consolidated(state, params, found):
    rules = state.rules
    scale = found["num_items"] if rules.fisher.weight_by_count else 1.0

    def join(old_left, old_right, left, right):
        old, new = (old_left, old_right), (scale * left, right)
        # What is not finite protects nothing, rather than spoil all later steps.
        new = kronecker.where_finite(new, jax.tree.map(jnp.zeros_like, new))
        if rules.accumulate == "separate":
            return _stored(state.stored, old, new, rules)
        merge = kronecker.pi_sum if rules.accumulate == "pi" else kronecker.nearest_sum
        return merge(old, new)

    joined = jax.tree.map(join, state.left, state.right, found["left"], found["right"])
    left, right = (
        jax.tree.map(lambda like, pair, i=i: pair[i], state.left, joined)
        for i in (0, 1)
    )
    diagonal = jax.tree.map(
        lambda old, new: old + scale * jnp.where(jnp.isfinite(new), new, 0),
        state.diagonal,
        found["diagonal"],
    )
    anchor = jax.tree.map(
        lambda old, p: jnp.where(jnp.isfinite(p), p, old).astype(old.dtype),
        state.anchor,
        params,
    )
    return state._replace(
        tasks=optax.safe_increment(state.tasks),
        stored=jnp.minimum(state.stored + 1, rules.capacity or 1),
        left=left,
        right=right,
        diagonal=diagonal,
        anchor=anchor,
    )


def _stored(stored, old, new, rules):
    """Banks of factors with those of a task, behind the others."""
    slot = jnp.minimum(stored, rules.capacity - 1)
    placed = jax.tree.map(lambda bank, x: bank.at[slot].set(x), old, new)
    if rules.overflow == "error":
        return placed
    rows = jax.tree.map(lambda bank, x: jnp.concatenate([bank, x[None]]), old, new)
    first, second = (jax.tree.map(lambda x, i=i: x[i], rows) for i in (0, 1))
    merged = kronecker.nearest_sum(first, second)
    return jax.tree.map(
        lambda place, m, row: jnp.where(
            stored >= rules.capacity, jnp.concatenate([m[None], row[2:]]), place
        ),
        placed,
        merged,
        rows,
    )


def _check(state):
    if state.rules.accumulate == "separate" and state.rules.overflow == "error":
        instead = "`overflow='merge'` or `accumulate='nearest'`"
        places.check_left(state.stored, state.rules.capacity, instead)


def _usage(state):
    capacity = state.rules.capacity
    return (state.tasks if capacity is None else state.stored), capacity


def _grow(state, capacity):
    if state.rules.capacity is None:
        return state
    return state._replace(
        left=places.add(state.left, state.stored, capacity),
        right=places.add(state.right, state.stored, capacity),
        rules=dataclasses.replace(state.rules, capacity=capacity),
    )


tasks.register_boundary(
    KroneckerLaplaceState,
    tasks.Boundary(
        passes=_passes,
        end_task=_end_task,
        like=lambda state: state.anchor,
        usage=_usage,
        check=_check,
        grow=_grow,
    ),
)
