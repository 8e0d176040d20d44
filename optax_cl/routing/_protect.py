"""One owner for the memory of a protected subspace, which it lends to links inside."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cl._core import checks, growth, subspaces, tasks, trees
from optax_cl._core.matrices import ViewRule, matrix_shape, tree_views, view_rule
from optax_cl.routing import _capture, _subspace


class ProtectState(NamedTuple):
    """State of ``protect``. Trees like params, ``MaskedNode`` at unprotected leaves."""

    basis: chex.ArrayTree  # U, float32 [*batch, in, r], orthonormal or zero columns
    energy: chex.ArrayTree  # eigenvalues, float32 [*batch, r]
    # The next five are None if no link reads them.
    anchor: Any  # U^T W*, float32 [*batch, r, out]
    curvature: Any  # Lambda, float32 [*batch, r, out]
    mean: Any  # average of U^T g, float32 [*batch, r, out]
    mean_weight: Any  # float32 [], total weight of the average
    importance: Any  # lambda of SGP, float32 [*batch, r]
    threshold: chex.Array  # float32 [], share of the energy that a basis must hold
    mean_decay: chex.Array  # float32 [], decay of `mean`
    tasks: chex.Array  # int32 [], tasks consolidated
    settings: Any  # ProtectSettings: static, no leaves
    inner: optax.OptState  # state of the links


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ProtectSettings:
    """What a boundary must know; part of the state's structure, without leaves."""

    rank: int
    views: ViewRule
    statistic: str
    memory: str
    svd: str
    labels: str
    overflow: str


def protect(
    rank: int,
    *links: optax.GradientTransformation,
    matrices: ViewRule | None = None,
    statistic: str = "gradients",
    threshold: jax.typing.ArrayLike = 1.0,
    memory: str = "all",
    svd: str = "exact",
    labels: str = "sampled",
    overflow: str = "strongest",
    mean_decay: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Owns the basis of a protected subspace, and lends it to the links inside.

    For every kernel read as a matrix W ``[in, out]`` it keeps an orthonormal U
    ``[in, r]`` on the fan-in side: the leading eigenvectors of the finished tasks'
    gradient Gram matrices,

    .. math:: U_k \leftarrow \text{top-}r\left( U_{k-1} \mathrm{diag}(e_{k-1})
       U_{k-1}^T + \frac{\sum_b G_b G_b^T}{\mathrm{tr} \sum_b G_b G_b^T} \right)

    with one term for each batch b that ``collect`` reads, :math:`G_b` the gradient of
    its summed loss. With ``statistic="inputs"`` the columns of G are instead the inputs
    x that the kernel multiplied: an update off their span leaves the layer's output for
    them, :math:`x^T W`, as it was. With ``memory="grow"`` no column is ever given up:
    of :math:`(I - U U^T) G` the leading left singular vectors are added, as few as make
    U hold a share ``threshold`` of the task's energy (the rule of GPM), or as many as
    fit. Where G is zero or not finite, U stays; where parameters are not
    finite, all that is stored of their leaf. The wrapper captures the raw gradient (it
    is a ``capture_raw``) and binds the extra argument ``basis``; the links are applied
    in order, as in ``optax.chain``:

        tx = protect(32, attenuate(balance()), scale_by_decoupled_adam(), project())

    Only what some link declares is stored: the anchor :math:`U^T W^*` for rules that
    read the displacement; the curvature :math:`\Lambda` and the averaged coefficients
    for ``balance``; the importance of each column for ``project(scale=...)``, r numbers
    a matrix. At a boundary
    :math:`\Lambda \leftarrow (U_{new}^T U_{old})^{\circ 2} \Lambda + \Lambda_{task}`
    with :math:`\Lambda_{task} = \sum_b (U^T G_b)^2 / \sum_b n_b` over batches of
    :math:`n_b` items with labels sampled from the model: an unbiased Fisher, in Hessian
    units of the mean loss.

    **Placement.** ``attenuate`` before the moments acts on the gradient, after them on
    the update; ``project`` after them (and after weight decay) is the only placement
    that keeps the subspace exactly. Nothing here protects biases and embeddings.
    ``protect(2, attenuate(0.5), optax.adam(1e-3))`` is shared routing: Adam's both
    moments read the attenuated gradient, and on an axis-aligned direction its division
    cancels the attenuation. Use ``scale_by_decoupled_adam``.

    **Known methods.** With ``statistic="inputs"`` and ``project()``: GPM is
    ``memory="grow"`` and ``project()`` before plain SGD, SGP the same with
    ``project(scale=10)``, and Adam-NSCL ``project()`` after Adam's moments, with the
    kept null space told by ``threshold``. After the moments the guarantee holds for any
    optimizer.

    **Cost.** State, per matrix: r (in + 1), with an anchor r out more, with curvature
    and averages 2 r out more; a step adds about 6 r in out FLOPs. The boundary: one
    backward pass a batch, or of inputs a forward pass, one backward pass more if
    curvature is needed, and one eigendecomposition of an ``[in, in]`` matrix
    (``svd="exact"``; to grow, one SVD of such more) or one SVD of ``[in, 2r + 8]``
    (``"randomized"``); no ``[in, in]`` matrix lives in the state.

    Args:
      rank: Columns r of every basis; at most the smallest protected fan-in.
      *links: Gradient transformations that may read ``basis`` and ``raw_updates``.
      matrices: ``matrix_views(...)``: which leaves are matrices and which side is the
        fan-in. None is ``matrix_views()``, which refuses embeddings.
      statistic: What spans the subspace: ``"gradients"`` of batches, or the layers'
        ``"inputs"``, from ``Task.layer_inputs``.
      threshold: Share of the energy in (0, 1] that a basis must hold; columns beyond
        are zero (the rank rule). 1 fills all r columns, or takes all that there is;
        directions about a thousandth as strong as the strongest are rounding of its
        square, and stay free.
      memory: ``"all"`` merges tasks into the r strongest columns; ``"last"`` keeps the
        last task only; ``"grow"`` keeps every column and adds what a task misses.
      svd: ``"exact"`` or ``"randomized"``, for the task's Gram matrix.
      labels: ``"sampled"`` from the model, or ``"empirical"``: gradients of
        ``task.loss``. Empirical curvature has not Hessian units.
      overflow: When columns that grow do not fit: ``"strongest"`` keeps the strongest
        that do, and what is left out is not protected; ``"error"`` makes ``end_task``
        raise, outside ``jit``. ``optax_cl.describe`` tells the columns in use (of the
        kernel with the least room), ``optax_cl.grow`` gives more.
      mean_decay: Decay of the averaged coefficients, in [0, 1).

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``ProtectState``. Before the
      first boundary every basis is zero and nothing is protected.

    Raises:
      TypeError, ValueError: For arguments out of range; at ``init`` for a rank larger
        than a fan-in, an embedding without a decision, no matrix at all, or a scaled
        ``project`` without ``memory="grow"`` or beside one of another scale; at trace
        time as ``capture_raw``, and if ``params`` is None where a rule reads them.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl
      >>> tx = optax.chain(
      ...     optax_cl.protect(1, optax_cl.scale_by_decoupled_adam(),
      ...                      optax_cl.project()),
      ...     optax.scale_by_learning_rate(0.1))
      >>> task = optax_cl.classification(lambda w, b: b[0] @ w, lambda b: b[1])
      >>> w = jnp.zeros((3, 2))
      >>> x, y = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([0])
      >>> state = tx.init(w)
      >>> stats = optax_cl.collect(state, w, [(x, y)], task=task, key=jax.random.key(0))
      >>> state = optax_cl.end_task(state, w, stats)
      >>> updates, state = tx.update(jnp.ones((3, 2)), state, w)
      >>> print(x @ updates + 0.0)  # the first task's output can't change
      [[0. 0.]]

    References:
      Saha et al, `Gradient Projection Memory <https://arxiv.org/abs/2103.09762>`_, 2021
      (bases on the fan-in side; theirs span layer inputs)

      Wang et al, `Training Networks in Null Space <https://arxiv.org/abs/2103.07113>`_,
      2021 (projecting the update that Adam proposes)

      `arXiv:2604.22407v1 <https://arxiv.org/abs/2604.22407v1>`_, since reported
      withdrawn (bases of boundary gradients)

    **Differs from the papers.** (1) Bases accumulate over all finished tasks instead of
    being overwritten. (2) Gram matrices are normalised by their trace, so that every
    task has equal say. (3) Plain ``U U^T``; singular-value weights are an option of
    ``attenuate``. (4) Labels are sampled from the model.
    """
    checks.check_positive_int("rank", rank)
    checks.check_number("threshold", threshold, low=0.0, high=1.0, open_low=True)
    checks.check_number("mean_decay", mean_decay, low=0.0, high=1.0, open_high=True)
    checks.check_choice("statistic", statistic, ("gradients", "inputs"))
    checks.check_choice("memory", memory, ("all", "last", "grow"))
    checks.check_choice("svd", svd, ("exact", "randomized"))
    if memory == "grow" and svd == "randomized":
        raise ValueError(
            "`memory='grow'` adds columns until they hold a share of the energy, and "
            "`svd='randomized'` doesn't see all of it. Use `svd='exact'`."
        )
    checks.check_choice("labels", labels, ("sampled", "empirical"))
    checks.check_choice("overflow", overflow, growth.OVERFLOWS)
    if overflow == "error" and memory != "grow":
        raise ValueError(
            f"`overflow='error'` has nothing to refuse with `memory={memory!r}`, which "
            "always keeps the strongest columns. Use `memory='grow'`."
        )
    _capture.check_links(links)
    settings = ProtectSettings(
        rank=rank,
        views=view_rule(matrices),
        statistic=statistic,
        memory=memory,
        svd=svd,
        labels=labels,
        overflow=overflow,
    )
    inner = optax.chain(*links)
    captured = _capture.capture_raw(inner)

    def numbers():
        # Copies: a state may be donated, the caller's arrays must outlive it.
        return {
            "threshold": jnp.array(threshold, jnp.float32),
            "mean_decay": jnp.array(mean_decay, jnp.float32),
        }

    def init_fn(params):
        inner_state = inner.init(params)
        needs = {need for d in _declarations(inner_state) for need in d.needs}
        _check_scale(settings, inner_state)

        def zeros(shape_of):
            return subspaces.map_matrices(
                settings.views,
                lambda p, view: jnp.zeros(
                    shape_of(p, view), trees.importance_dtype(p.dtype)
                ),
                params,
            )

        def basis_shape(p, view):
            *batch, fan_in, _ = matrix_shape(view, p.shape)
            return (*batch, fan_in, rank)

        def energy_shape(p, view):
            return (*matrix_shape(view, p.shape)[:-2], rank)

        def coefficient_shape(p, view):
            *batch, _, fan_out = matrix_shape(view, p.shape)
            return (*batch, rank, fan_out)

        _check_ranks(settings, params)
        has_mean = "mean" in needs
        return ProtectState(
            basis=zeros(basis_shape),
            energy=zeros(energy_shape),
            anchor=zeros(coefficient_shape) if "displacement" in needs else None,
            curvature=zeros(coefficient_shape) if "curvature" in needs else None,
            mean=zeros(coefficient_shape) if has_mean else None,
            mean_weight=jnp.zeros([], jnp.float32) if has_mean else None,
            importance=zeros(energy_shape) if "importance" in needs else None,
            **numbers(),
            tasks=jnp.zeros([], jnp.int32),
            settings=settings,
            inner=inner_state,
        )

    def coefficients(name, tree, state):
        trees.check_fits(name, tree, state.basis, shapes=False)
        found = subspaces.coefficients(settings.views, state.basis, tree)
        # None at a leaf that is not protected is for the links inside to judge.
        found = trees.align_structure(name, found, state.basis)
        for kept in (state.anchor, state.mean):
            if kept is not None:
                trees.check_fits(f"U^T {name}", found, kept)
        return found

    def update_fn(updates, state, params=None, **extra_args):
        state = state._replace(**numbers())  # they may have changed since `init`
        raw = coefficients("updates", updates, state)
        displacement = None
        if state.anchor is not None:
            checks.check_params("protect with a rule that reads the anchor", params)
            here = coefficients("params", params, state)
            displacement = jax.tree.map(jnp.subtract, here, state.anchor)
        corrected, weight, mean = None, state.mean_weight, state.mean
        if mean is not None:
            decay = state.mean_decay
            # One bad gradient would stay in the average, and shut its gate, until the
            # next boundary.
            mean = jax.tree.map(
                lambda m, c: (
                    decay * m + (1 - decay) * jnp.where(jnp.isfinite(c), c, 0.0)
                ),
                mean,
                raw,
            )
            weight = decay * weight + (1 - decay)
            corrected = jax.tree.map(lambda m: m / weight, mean)
        extra_args["basis"] = _subspace.Subspace(
            basis=state.basis,
            energy=state.energy,
            raw=raw,
            displacement=displacement,
            curvature=state.curvature,
            mean=corrected,
            importance=state.importance,
            views=settings.views,
        )
        updates, inner_state = captured.update(
            updates, state.inner, params, **extra_args
        )
        return updates, state._replace(mean=mean, mean_weight=weight, inner=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _declarations(state: Any) -> list[_subspace.Declaration]:
    """What links that read this owner declare; leafless nodes."""
    found = []

    def visit(node):
        if isinstance(node, _subspace.Declaration):
            found.append(node)
        return node

    # Links inside another owner read that one.
    jax.tree.map(
        visit,
        state,
        is_leaf=lambda n: isinstance(n, _subspace.Declaration | ProtectState),
    )
    return found


def _scale(state: Any) -> float | None:
    """The scale that a link declares, if one does."""
    scales = (d.scale for d in _declarations(state))
    return next((scale for scale in scales if scale is not None), None)


def _check_scale(settings: ProtectSettings, inner: Any) -> None:
    scales = {d.scale for d in _declarations(inner) if d.scale is not None}
    if len(scales) > 1:
        raise ValueError(
            f"`project` has different scales inside one `protect`: {sorted(scales)}. "
            "The owner stores one importance; put each in an owner of its own."
        )
    if scales and settings.memory != "grow":
        raise ValueError(
            f"`project(scale=...)` adds up what each column held of every task, and "
            f"`memory={settings.memory!r}` turns columns. Use `memory='grow'`."
        )


def _check_ranks(settings: ProtectSettings, params: chex.ArrayTree) -> None:
    views = tree_views(settings.views, params)
    if views and not any(views):
        raise ValueError(
            "`protect` finds no matrix among the parameters, so there is nothing to "
            "protect: leaves with fewer than two axes, and those that `matrices` "
            "skips, are left alone."
        )

    for (path, p), view in zip(
        jax.tree_util.tree_leaves_with_path(params), views, strict=True
    ):
        if view is None:
            continue
        fan_in = matrix_shape(view, jnp.shape(p))[-2]
        if settings.rank > fan_in:
            raise ValueError(
                f"`rank` is {settings.rank}, but the leaf `{checks.path_str(path)}` of "
                f"shape {jnp.shape(p)} has a fan-in of {fan_in}. Lower `rank`, or "
                "leave the leaf unprotected with "
                "`matrices=optax_cl.matrix_views(skip=...)`."
            )


# --- Task boundary -------------------------------------------------------------------


def _passes(state: ProtectState) -> tuple[tasks.Pass, ...]:
    settings = state.settings
    first = subspaces.basis_pass(
        settings.views,
        settings.statistic,
        settings.memory,
        settings.svd,
        settings.labels,
    )
    if state.curvature is None:
        return (first,)
    return first, subspaces.curvature_pass(settings.views, settings.labels)


def _end_task(state, params, results):
    if state.settings.overflow == "error":
        left_out = jax.tree_util.tree_leaves_with_path(results["basis"]["left_out"])
        bases = jax.tree.leaves(state.basis)
        for (path, columns), u in zip(left_out, bases, strict=True):
            name, (fan_in, rank) = checks.path_str(path), u.shape[-2:]
            growth.check_fits("protect", name, rank, fan_in, columns)
    params = trees.align_structure("params", params, state.basis)
    own, scale = state._replace(inner=()), _scale(state.inner)
    return _consolidated(scale, own, params, results)._replace(inner=state.inner)


# A boundary is mostly called outside jit, and this is many small operations.
@functools.partial(jax.jit, static_argnums=0)
def _consolidated(scale, state, params, results):
    new = results["basis"]
    anchor, curvature = state.anchor, state.curvature
    if anchor is not None:
        anchor = subspaces.coefficients(state.settings.views, new["basis"], params)
    if curvature is not None:
        task = results["curvature"]
        if state.settings.memory == "last":
            # Of a basis that was kept, so is what goes with it.
            curvature = jax.tree.map(
                lambda used, new, old: jnp.where(used[..., None, None], new, old),
                new["usable"],
                task,
                curvature,
            )
        else:
            curvature = subspaces.rotate_curvature(
                state.basis, new["basis"], curvature, task
            )
    importance = state.importance
    if importance is not None:
        importance = jax.tree.map(
            functools.partial(_more_important, scale), importance, new["share"]
        )
    consolidated = state._replace(
        importance=importance,
        basis=trees.copy(new["basis"]),
        energy=trees.copy(new["energy"]),
        anchor=anchor,
        curvature=curvature,
    )
    if anchor is not None:
        consolidated = _where_anchored(consolidated, state)
    return consolidated._replace(
        # Averages are coordinates in the old basis: they start anew.
        mean=None if state.mean is None else trees.zeros_like(state.mean),
        mean_weight=None if state.mean is None else jnp.zeros_like(state.mean_weight),
        tasks=optax.safe_increment(state.tasks),
    )


def _more_important(scale, importance, share):
    """``lambda`` after a task of which the columns hold the energies ``share``."""
    s = jnp.sqrt(jnp.maximum(share, 0))
    bottom = scale * s + jnp.max(s, axis=-1, keepdims=True)
    new = jnp.where(s > 0, (scale + 1) * s / jnp.where(s > 0, bottom, 1), 0)
    return jnp.minimum(importance + new, 1)


def _where_anchored(new: ProtectState, old: ProtectState) -> ProtectState:
    """``new``, but ``old`` at leaves whose anchor is not finite."""

    def pick(anchor, a, b):
        finite = jnp.all(jnp.isfinite(anchor), axis=(-2, -1))
        return jnp.where(jnp.expand_dims(finite, range(finite.ndim, a.ndim)), a, b)

    def choose(field: str) -> Any:
        before = getattr(old, field)
        if before is None:
            return None
        return jax.tree.map(pick, new.anchor, getattr(new, field), before)

    fields = ("basis", "energy", "anchor", "curvature", "importance")
    return new._replace(**{field: choose(field) for field in fields})


def _check(state):
    if state.settings.overflow == "error":
        growth.check_not_traced("protect", state.tasks)


def _usage(state):
    """Columns, not tasks, of the fullest basis that grows."""
    if state.settings.memory != "grow":
        return state.tasks, None
    used = [jnp.sum(jnp.any(u != 0, axis=-2), -1) for u in jax.tree.leaves(state.basis)]
    return max((int(np.max(u)) for u in used), default=0), state.settings.rank


def _grow(state, capacity):
    for path, u in jax.tree_util.tree_leaves_with_path(state.basis):
        if capacity > u.shape[-2]:
            raise ValueError(
                f"`capacity` is {capacity}, but the leaf `{checks.path_str(path)}` has "
                f"a fan-in of {u.shape[-2]}, and no more columns."
            )

    def pad(field, axis):
        def one(x):
            widths = [(0, 0)] * x.ndim
            widths[axis] = (0, capacity - x.shape[axis])
            return jnp.pad(x, widths)

        return jax.tree.map(one, getattr(state, field))

    columns = {field: pad(field, -1) for field in ("basis", "energy", "importance")}
    rows = {field: pad(field, -2) for field in ("anchor", "curvature", "mean")}
    settings = dataclasses.replace(state.settings, rank=capacity)
    return state._replace(**columns, **rows, settings=settings)


def _project_tree(state, tree):
    return _subspace.removed(state.settings.views, state.basis, tree)


tasks.register_boundary(
    ProtectState,
    tasks.Boundary(
        passes=_passes,
        end_task=_end_task,
        like=lambda state: state.basis,
        usage=_usage,
        check=_check,
        grow=_grow,
        project=_project_tree,
    ),
)
