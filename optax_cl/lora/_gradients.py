"""Mean gradients of the targeted kernels, streamed over data, and how two conflict."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks, trees
from optax_cl._core.matrices import to_matrix
from optax_cl._core.streaming import check_batches, check_stacked, padded_batches
from optax_cl._core.task_functions import (
    Task,
    check_classes,
    check_labels,
    require,
)
from optax_cl.lora._checks import check_finite
from optax_cl.lora._targets import Targets, kernels

Loss = Callable[[Any, Any], chex.Array]


class Conflict(NamedTuple):
    """How far two sets of gradients point the same way."""

    cosine: dict[str, Any]  # {path: [*batch]}, of each matrix; 0 where one is zero
    overall: chex.Array  # [], of all matrices together


def mean_gradients(
    targets: Targets,
    loss: Loss | Task,
    params: chex.ArrayTree,
    batches: Iterable[chex.ArrayTree] | chex.ArrayTree,
    *,
    stacked: bool = False,
) -> dict[str, Any]:
    r"""The mean gradient of the targeted kernels over a few batches of data.

    .. math:: G = \frac1N \sum_{i=1}^{N} \nabla_W\, \ell_i

    Every example weighs the same, in a ragged last batch too. For the reference of
    past tasks (:func:`slice_init`) draw equally many examples of each task and chain
    their batches: the mean over examples is then the mean over tasks.

    Only the targeted kernels are differentiated. Each batch is one jitted step that
    donates the sums; a ragged last batch is padded and masked, so nothing is compiled
    for it. With ``stacked`` all batches are one scan, which also works inside jit.

    Args:
      targets: The kernels, from :func:`targets`.
      loss: ``(params, batch) -> [B]``, the loss of each example, as ``Task.loss``; or a
        ``Task`` that has one, whose labels are then judged as ``optax_cl.collect``
        judges them. Keep the function: one not seen before is compiled anew.
      params: Parameters of the model.
      batches: Trees of arrays with a leading axis of examples.
      stacked: Whether ``batches`` is one tree of arrays ``[batches, B, ...]`` instead.

    Returns:
      ``{path: [*batch, in, out]}`` in float32 (float64 for float64 kernels). The
      gradient of one batch is taken in the dtype of the kernel, sums are not.

    Raises:
      TypeError: If labels of a ``Task`` are no integers.
      ValueError: If there is no batch, a batch is malformed, ``loss`` does not return
        one number an example, a label of a ``Task`` is no class (where its value is
        known), or, outside jit, a gradient (with its path) or a loss is not finite.

    Cost. Time: one forward and backward pass a batch. Memory beside the parameters and
    activations: the sums, one float32 copy of the targeted kernels, updated in place;
    a kernel's gradient is added to its sum as soon as the backward pass has it, which
    for layers in one scan is a further copy, at its end. For less, call it for a part
    of the targets at a time.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import lora
      >>> params = {"kernel": jnp.zeros((2, 2))}
      >>> chosen = lora.targets(params, {"kernel": 1}, alpha=1.0)
      >>> loss = lambda p, x: (x @ p["kernel"]).sum(axis=1)
      >>> batches = [jnp.array([[3.0, 0.0], [0.0, 3.0]]), jnp.array([[0.0, 3.0]])]
      >>> print(lora.mean_gradients(chosen, loss, params, batches)["kernel"])
      [[1. 1.]
       [2. 2.]]
    """
    task = loss if isinstance(loss, Task) else Task(loss=loss)
    loss = require(task, "loss", "`mean_gradients`")
    if stacked:
        check_stacked(batches)
        _check_stacked_labels(task, params, batches)
        means, finite = _scan(loss, targets, params, batches)
    else:
        check_batches(batches, 1)
        means, finite = _loop(task, targets, params, batches)
    check_finite("the mean gradient", means)
    if not isinstance(finite, jax.core.Tracer) and not finite:
        raise ValueError(
            "`loss` is not finite for some example of `batches`, though the gradient "
            "is. Does a label stand for 'ignore'? Leave such examples out; a `Task` in "
            "place of its `loss` tells which labels are no class."
        )
    return means


def conflict(
    gradients: Mapping[str, chex.Array], reference: Mapping[str, chex.Array]
) -> Conflict:
    """Cosines between two sets of gradients, matrix by matrix and over all.

    A negative cosine is a conflict: to first order, a step that helps one task harms
    the other. The matrices are scaled before they are squared, so that gradients of
    any size are told apart from zero in float32.

    Args:
      gradients: ``{path: [*batch, in, out]}``, from :func:`mean_gradients`.
      reference: The same for other data.

    Returns:
      ``Conflict``. A matrix that is not finite counts as zero, and the cosine with zero
      is 0.

    Raises:
      ValueError: If paths or shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import lora
      >>> g, r = {"w": jnp.array([[1.0, 0.0]])}, {"w": jnp.array([[-1.0, 1.0]])}
      >>> print(lora.conflict(g, r).cosine["w"].round(3))
      -0.707
    """
    gradients, reference = dict(gradients), dict(reference)
    checks.check_same_shapes("reference", reference, gradients, "`gradients`")
    parts = {path: _products(g, reference[path]) for path, g in gradients.items()}
    return Conflict({path: _cosine(p) for path, p in parts.items()}, _overall(parts))


def check_gradients(
    name: str, targets: Targets, gradients: Mapping[str, chex.Array]
) -> None:
    """Raises unless there is a finite gradient of the right shape for every target."""
    if not isinstance(gradients, Mapping) or set(gradients) != set(targets):
        got = sorted(gradients) if isinstance(gradients, Mapping) else type(gradients)
        raise ValueError(
            f"`{name}` must map the paths of `targets`, {sorted(targets)}, to "
            f"matrices, as `mean_gradients` returns them; got {got}."
        )
    for path, target in targets.items():
        if jnp.shape(gradients[path]) != target.matrix_shape:
            raise ValueError(
                f"`{name}` must hold matrices [*batch, in, out]; at `{path}` expected "
                f"{target.matrix_shape}, got {jnp.shape(gradients[path])}."
            )
    check_finite(f"`{name}`", gradients)


class _Sums(NamedTuple):
    """What is summed up over batches."""

    gradients: dict[str, Any]  # {path: [*batch, in, out]}
    examples: chex.Array  # float32 []
    finite: chex.Array  # bool [], whether all losses were


def _nothing(targets, params):
    return _Sums(
        gradients={
            path: jnp.zeros(
                targets[path].matrix_shape, trees.importance_dtype(kernel.dtype)
            )
            for path, kernel in kernels(targets, params).items()
        },
        examples=jnp.zeros([], jnp.float32),
        finite=jnp.ones([], bool),
    )


def _loop(task, targets, params, batches):
    sums, num_classes = None, None
    for batch, weights in padded_batches(batches):
        if sums is None:
            sums = _nothing(targets, params)
            num_classes = _num_classes(task, params, batch)
        if num_classes is not None:
            check_classes(task.labels(batch), num_classes)
        sums = _step(task.loss, targets, sums, params, batch, weights)
    if sums is None:
        raise ValueError(
            "`batches` is empty, so there is no gradient to average. Is it an iterator "
            "that was gone through before?"
        )
    return _finish(sums.gradients, sums.examples), sums.finite


@functools.partial(jax.jit, static_argnums=0)
def _scan(loss, targets, params, batches):
    weights = jnp.ones(jax.tree.leaves(batches)[0].shape[1], jnp.float32)

    def step(sums, batch):
        return _add(loss, targets, sums, params, batch, weights), None

    sums, _ = jax.lax.scan(step, _nothing(targets, params), batches)
    return _mean(sums.gradients, sums.examples), sums.finite


def _check_stacked_labels(task, params, batches):
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batches)
    num_classes = _num_classes(task, params, first)
    if num_classes is not None:
        check_classes(jax.vmap(task.labels)(batches), num_classes)


def _num_classes(task: Task, params: Any, batch: Any) -> int | None:
    """How many classes the labels number; None for a task without labels."""
    if task.labels is None or task.outputs is None:
        return None
    logits = jax.eval_shape(task.outputs, params, batch)
    check_labels(jax.eval_shape(task.labels, batch), logits)
    return logits.shape[-1]


def _add(loss, targets, sums, params, batch, weights):
    """The sums after one more batch."""
    chosen, put_back = _chosen(targets, params)
    n = weights.sum()

    def mean_loss(chosen):
        losses = loss(put_back(chosen), batch)
        if jnp.shape(losses) != weights.shape:
            raise ValueError(
                f"`loss` must return the loss of each example, of shape "
                f"{weights.shape}; got {jnp.shape(losses)}. Do not take the mean."
            )
        # The mean of a batch, not its sum, which could overflow in half precision.
        return jnp.sum(losses * weights) / n, jnp.all(jnp.isfinite(losses))

    gradients, finite = jax.grad(mean_loss, has_aux=True)(chosen)
    new = {
        path: acc + n * to_matrix(gradients[path], targets[path].view).astype(acc.dtype)
        for path, acc in sums.gradients.items()
    }
    return _Sums(new, sums.examples + n, sums.finite & finite)


def _chosen(targets, params):
    """The targeted leaves by path, and how to put others in their place."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [checks.path_str(path) for path, _ in leaves]
    chosen = {
        path: leaf
        for path, (_, leaf) in zip(paths, leaves, strict=True)
        if path in targets
    }

    def put_back(chosen):
        return treedef.unflatten(
            chosen.get(path, leaf)
            for path, (_, leaf) in zip(paths, leaves, strict=True)
        )

    return chosen, put_back


_step = jax.jit(_add, static_argnums=0, donate_argnums=2)


def _mean(gradients, examples):
    return {path: acc / examples.astype(acc.dtype) for path, acc in gradients.items()}


_finish = jax.jit(_mean, donate_argnums=0)


class _Products(NamedTuple):
    """Inner products of two matrices whose largest entries were brought to one."""

    g_top: chex.Array  # [*batch], what g was divided by; 0 if it is not finite
    r_top: chex.Array  # [*batch]
    gg: chex.Array  # [*batch]
    rr: chex.Array  # [*batch]
    gr: chex.Array  # [*batch]


@jax.jit
def _products(g, r):
    (g, g_top), (r, r_top) = _scaled(g), _scaled(r)

    def dot(x, y):
        return jnp.sum(x * y, axis=(-2, -1))

    return _Products(g_top, r_top, dot(g, g), dot(r, r), dot(g, r))


def _scaled(x):
    x = jnp.asarray(x, trees.importance_dtype(jnp.result_type(x)))
    top = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    usable = jnp.isfinite(top) & (top > 0)
    scaled = jnp.where(usable, x / jnp.where(usable, top, 1.0), 0.0)
    return scaled, jnp.where(usable, top, 0.0)[..., 0, 0]


@jax.jit
def _overall(parts):
    """The cosine of all matrices as one vector, from the products of each."""
    rows = [_Products(*(jnp.ravel(x) for x in p)) for p in parts.values()]
    p = _Products(*(jnp.concatenate(column) for column in zip(*rows, strict=True)))

    def relative(tops):
        top = jnp.max(tops)
        return tops / jnp.where(top > 0, top, 1.0)

    g, r = relative(p.g_top), relative(p.r_top)
    gg, rr, gr = jnp.sum(g * g * p.gg), jnp.sum(r * r * p.rr), jnp.sum(g * r * p.gr)
    return _cosine(p._replace(gg=gg, rr=rr, gr=gr))


@jax.jit
def _cosine(p):
    lengths = jnp.sqrt(p.gg) * jnp.sqrt(p.rr)
    defined = lengths > 0
    return jnp.where(defined, p.gr / jnp.where(defined, lengths, 1.0), 0.0)
