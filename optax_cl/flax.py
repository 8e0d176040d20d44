"""Task boundaries for Flax NNX, whose optimizer keeps its state in variables.

``collect``, ``end_task`` and ``begin_task`` as in ``optax_cl``, on an ``nnx.Optimizer``
and its model; ``pure`` and ``edit`` for all else that reads or changes a state; and the
adapters of ``nnx.LoRA`` modules as those of ``optax_cl.lora``.
A linen ``TrainState`` needs no face of its own: use the functions of
``optax_cl`` on ``state.opt_state`` and ``state.params``, and ``state.replace``.
"""

from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
import optax

from optax_cl import lora
from optax_cl._core import checks, tasks
from optax_cl._core.matrices import MatrixView

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        "`optax_cl.flax` needs Flax: pip install 'optax-cl[flax]'."
    ) from error


def classification(
    model: nnx.Module,
    logits: Callable[[Any, Any], chex.Array],
    labels: Callable[[Any], chex.Array],
    *,
    wrt: Any = nnx.Param,
) -> tasks.Task:
    """A ``Task`` for an NNX model with categorical outputs.

    The model's structure is taken once; its arrays are read anew at every ``collect``,
    so one task serves all boundaries. The functions run in evaluation mode
    (``model.eval()``: no dropout, fixed batch statistics); ``model`` itself is left as
    it is.

    Args:
      model: The model.
      logits: ``(model, batch) -> [B, C]`` or ``[B, items, C]``.
      labels: ``batch -> [B]`` or ``[B, items]``, integers.
      wrt: Which variables are parameters, as given to ``nnx.Optimizer``.

    Returns:
      A ``Task`` for the functions of this module.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl, optax_cl.flax
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> tx = optax_cl.decoupled_adamw(0.1, modifiers=[optax_cl.ewc(1.0)])
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> task = optax_cl.flax.classification(
      ...     model, lambda model, batch: model(batch[0]), lambda batch: batch[1])
      >>> batches = [(jnp.eye(2), jnp.array([0, 1]))]
      >>> stats = optax_cl.flax.collect(
      ...     optimizer, model, batches, task=task, key=jax.random.key(0))
      >>> optax_cl.flax.end_task(optimizer, model, stats)
      >>> optax_cl.flax.begin_task(optimizer, model)
    """
    graphdef, _, _ = nnx.split(model, wrt, ...)

    def evaluate(arrays, batch):
        copy = nnx.merge(graphdef, *arrays)
        copy.eval()
        return logits(copy, batch)

    return tasks.classification(evaluate, labels)


def collect(
    optimizer: nnx.Optimizer,
    model: nnx.Module,
    batches: Iterable[chex.ArrayTree],
    *,
    task: tasks.Task,
    key: chex.PRNGKey,
) -> tasks.Statistics:
    """``optax_cl.collect`` on an ``nnx.Optimizer`` and its model.

    Args:
      optimizer: The optimizer.
      model: The model at the end of the task.
      batches: As in ``optax_cl.collect``.
      task: From ``optax_cl.flax.classification``; or a ``Task`` whose functions take
        ``(params, rest)`` in place of ``params``, the two parts of
        ``nnx.split(model, optimizer.wrt, ...)`` as plain arrays.
      key: For labels sampled from the model.

    Returns:
      ``Statistics`` for ``end_task``.

    Raises:
      TypeError: If the functions of ``task`` take ``params`` alone.
      ValueError: As ``optax_cl.collect``.
    """
    params, rest = _arrays(optimizer, model)
    try:
        return tasks.collect(
            nnx.as_pure(optimizer.opt_state),
            params,
            batches,
            task=task,
            key=key,
            frozen=rest,
        )
    except Exception as error:
        if _takes_params(task, params, batches):
            raise TypeError(
                "`task` has functions of `params` alone, as `optax_cl.classification` "
                f"makes them; here they get {_PAIR}"
            ) from error
        error.add_note(f"The functions of `task` get {_PAIR}")
        raise


_PAIR = (
    "the pair `(params, rest)` of `nnx.split(model, optimizer.wrt, ...)`. "
    "`optax_cl.flax.classification(model, ...)` makes a task of such functions."
)


def _takes_params(task: Any, params: Any, batches: Any) -> bool:
    """Whether a task's functions are of ``params`` alone, as far as can be tried."""
    if not isinstance(batches, list | tuple) or not isinstance(task, tasks.Task):
        return False
    function = task.outputs or task.loss
    if function is None:
        return False
    try:
        jax.eval_shape(function, params, batches[0])
    except Exception:
        return False
    return True


def end_task(
    optimizer: nnx.Optimizer,
    model: nnx.Module,
    statistics: tasks.Statistics,
    *,
    moments: str = "keep",
) -> None:
    """``optax_cl.end_task``; the optimizer is updated in place.

    Args:
      optimizer: The optimizer.
      model: The model at the end of the task.
      statistics: From ``collect``.
      moments: ``"keep"``, ``"reset"`` or ``"project"``.

    Raises:
      ValueError: As ``optax_cl.end_task``.
    """
    params, _ = _arrays(optimizer, model)
    state = nnx.as_pure(optimizer.opt_state)
    _write(optimizer, tasks.end_task(state, params, statistics, moments=moments))


def begin_task(
    optimizer: nnx.Optimizer, model: nnx.Module, *, reset_nu_max: bool = False
) -> None:
    """``optax_cl.begin_task``; the optimizer is updated in place.

    Args:
      optimizer: The optimizer.
      model: The model with which the task begins.
      reset_nu_max: Whether AMSGrad's running maxima are set to zero.
    """
    params, _ = _arrays(optimizer, model)
    state = nnx.as_pure(optimizer.opt_state)
    _write(optimizer, tasks.begin_task(state, params, reset_nu_max=reset_nu_max))


def pure(
    optimizer: nnx.Optimizer, model: nnx.Module
) -> tuple[optax.OptState, optax.Params]:
    """The optimizer's state and the model's parameters, as plain trees of arrays.

    For all that reads them: ``optax_cl.describe``, ``optax_cl.ewc_loss``,
    ``isolation.packnet_params``, a schema.

    Args:
      optimizer: The optimizer.
      model: Its model.

    Returns:
      ``(opt_state, params)``. The arrays are the optimizer's and the model's own.

    Raises:
      TypeError: If ``optimizer`` is no ``nnx.Optimizer``.

    Example:
      >>> import optax_cl, optax_cl.flax
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> tx = optax_cl.decoupled_adamw(0.1, modifiers=[optax_cl.ewc(1.0)])
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> print(optax_cl.ewc_loss(*optax_cl.flax.pure(optimizer, model)))
      0.0
    """
    params, _ = _arrays(optimizer, model)
    return nnx.as_pure(optimizer.opt_state), params


def edit(
    optimizer: nnx.Optimizer,
    model: nnx.Module,
    function: Callable[
        [optax.OptState, optax.Params], tuple[optax.OptState, optax.Params]
    ],
) -> None:
    """Puts an edited state and edited parameters in place, inside ``nnx.jit`` too.

    Args:
      optimizer: The optimizer.
      model: Its model.
      function: ``(opt_state, params) -> (opt_state, params)``, of plain trees as
        :func:`pure` gives them, with the leaves that they have: such as
        ``lambda s, p: isolation.packnet_prune(s, p, 0.5)``, or
        ``lambda s, p: (optax_cl.reset_state(s), p)``.

    Raises:
      TypeError: If ``optimizer`` is no ``nnx.Optimizer``.
      ValueError: If the function gives no pair, or trees with other leaves.

    Example:
      >>> import optax, optax_cl.flax
      >>> from flax import nnx
      >>> from optax_cl import isolation
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> tx = optax.chain(optax.adamw(0.1), isolation.packnet())
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> optax_cl.flax.edit(
      ...     optimizer, model, lambda s, p: isolation.packnet_prune(s, p, 0.5))
      >>> print(int((model.kernel[...] == 0).sum()))
      4
    """
    old = pure(optimizer, model)
    new = function(*old)
    if _leaf_paths(new) != _leaf_paths(old):
        raise ValueError(
            "`function` must give the pair `(opt_state, params)`, each with the leaves "
            f"it had, {checks.paths_str(old)}; got {checks.paths_str(new)}."
        )
    _write(optimizer, new[0])
    nnx.update(model, new[1])


def _leaf_paths(tree: Any) -> list[Any]:
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def lora_from_nnx(
    model: nnx.Module,
) -> tuple[lora.Targets, chex.ArrayTree, lora.Adapters]:
    """The adapters of ``nnx.LoRA`` modules in the form of ``optax_cl.lora``.

    ``nnx.LoRA`` and ``nnx.LoRALinear`` compute ``x @ kernel + x @ lora_a @ lora_b``,
    without a factor ``alpha / rank``: the targets have scale 1. Everything of
    ``optax_cl.lora`` that takes targets, parameters and adapters then works, and
    ``lora_to_nnx`` writes the result back. To train in place with
    ``nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)`` neither is needed.

    Args:
      model: With at least one such module, around or beside a kernel ``[in, out]``;
        under ``nnx.vmap`` with the same leading axes on kernel and factors.

    Returns:
      Targets, the other parameters as a plain dictionary, and ``{path: LoRA}`` by the
      path of the kernel. The arrays are the model's own.

    Raises:
      ValueError: If there is no such module, or one has no kernel that its factors fit.

    Example:
      >>> import jax.numpy as jnp, optax_cl.flax
      >>> from flax import nnx
      >>> from optax_cl import lora
      >>> model = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))
      >>> targets, params, adapters = optax_cl.flax.lora_from_nnx(model)
      >>> print(list(adapters), targets["kernel"].scale, sorted(params))
      ['kernel'] 1.0 ['bias', 'kernel']

      After training, fold the adapters in and start anew:

      >>> params = lora.merge(targets, params, adapters)
      >>> zero = {p: x._replace(b=jnp.zeros_like(x.b)) for p, x in adapters.items()}
      >>> optax_cl.flax.lora_to_nnx(model, zero, params)
    """
    found = _lora_modules(model)
    own = {id(v) for module, _ in found.values() for v in _lora_variables(module)}
    params = nnx.to_pure_dict(
        nnx.state(model, lambda _, v: isinstance(v, nnx.Param) and id(v) not in own)
    )
    entries, adapters = [], {}
    for path, (module, kernel) in found.items():
        a, b = (variable[...] for variable in _lora_variables(module))
        axes = tuple(range(kernel.ndim))
        if a.shape[:-1] != kernel.shape[:-1] or b.shape != (
            *a.shape[:-2],
            a.shape[-1],
            kernel.shape[-1],
        ):
            raise ValueError(
                f"the nnx.LoRA at `{path}` has factors of shapes {a.shape} and "
                f"{b.shape}, which don't fit its kernel of shape {kernel.shape}; "
                "expected a kernel [*batch, in, out]."
            )
        view = MatrixView(axes[-2:-1], axes[-1:], axes[:-2])
        entries.append((path, lora.Target(view, kernel.shape, a.shape[-1], 1.0)))
        adapters[path] = lora.LoRA(a, b)
    return lora.Targets(tuple(sorted(entries))), params, adapters


def lora_to_nnx(
    model: nnx.Module,
    adapters: lora.Adapters,
    params: chex.ArrayTree | None = None,
) -> None:
    """Writes adapters, and parameters if given, into the model of ``lora_from_nnx``.

    Call ``begin_task`` afterwards if an optimizer holds copies of what was written.

    Args:
      model: The model; changed in place.
      adapters: ``{path: LoRA}`` for all of its adapters, with scale 1 and of the ranks
        that the model has; convert ``Spectral`` by ``lora.to_lora``.
      params: The other parameters, with the structure that ``lora_from_nnx`` gives;
        None leaves them.

    Raises:
      ValueError: If paths or shapes are others than the model's.
    """
    found = _lora_modules(model)
    if set(adapters) != set(found):
        raise ValueError(
            f"`adapters` must have the model's paths {sorted(found)}; got "
            f"{sorted(adapters)}."
        )
    own = {p: lora.LoRA(*_lora_variables(m)) for p, (m, _) in found.items()}
    shapes = {path: lora.LoRA(x.a[...], x.b[...]) for path, x in own.items()}
    checks.check_same_shapes("adapters", dict(adapters), shapes, "the model's")
    if params is not None:
        _, old, _ = lora_from_nnx(model)
        checks.check_same_shapes("params", params, old, "the model's")
        nnx.update(model, params)
    for path, pair in own.items():
        for variable, new in zip(pair, adapters[path], strict=True):
            variable.set_value(new.astype(variable[...].dtype))


def _lora_modules(model: nnx.Module) -> dict[str, tuple[nnx.LoRA, nnx.Variable]]:
    """Every LoRA module and the kernel it adapts, by the kernel's path."""
    found, inner = {}, set()
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.LoRALinear):
            inner.add(id(node.lora))
            found[_joined(path, "kernel")] = node.lora, node.kernel
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.LoRA) and id(node) not in inner:
            kernel = getattr(node.base_module, "kernel", None)
            if not isinstance(kernel, nnx.Variable):
                raise ValueError(
                    f"the nnx.LoRA at `{_joined(path)}` wraps no module with a kernel "
                    f"(its base_module is {type(node.base_module).__name__}): what it "
                    "adds can't be merged. Give it `base_module=`, or use "
                    "nnx.LoRALinear."
                )
            found[_joined(path, "base_module", "kernel")] = node, kernel
    if not found:
        raise ValueError(
            "`model` holds no nnx.LoRA or nnx.LoRALinear. For other models choose "
            "kernels with `optax_cl.lora.targets(params, ...)`."
        )
    return found


def _lora_variables(module: nnx.LoRA) -> tuple[nnx.Variable, nnx.Variable]:
    return module.lora_a, module.lora_b


def _joined(path: tuple[Any, ...], *names: str) -> str:
    return "/".join(map(str, (*path, *names))) or "<root>"


def _arrays(optimizer: nnx.Optimizer, model: nnx.Module) -> tuple[Any, Any]:
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            "`optimizer` must be an nnx.Optimizer, with its model behind it; got "
            f"{type(optimizer).__name__}. States and parameters of their own go to "
            "the functions of `optax_cl`."
        )
    _, params, rest = nnx.split(model, optimizer.wrt, ...)
    # Random states are typed keys that evaluation does not use, but merging needs them.
    return nnx.as_pure(params), nnx.as_pure(rest)


def _write(optimizer: nnx.Optimizer, new_state: Any) -> None:
    """Puts new leaves into the variables of the old structure."""
    is_variable = lambda n: isinstance(n, nnx.Variable)  # noqa: E731
    old = jax.tree.leaves(optimizer.opt_state, is_leaf=is_variable)
    # A variable over a hole (an unprotected leaf) has no array: it keeps its hole.
    filled = [v for v in old if jax.tree.leaves(nnx.as_pure(v))]
    for variable, leaf in zip(filled, jax.tree.leaves(new_state), strict=True):
        variable.set_value(leaf)
    structure = jax.tree.structure(new_state)
    if structure != jax.tree.structure(nnx.as_pure(optimizer.opt_state)):
        # A static setting is another, such as a capacity.
        optimizer.opt_state = nnx.data(structure.unflatten(filled))
