"""Adapters as files in the layout of Hugging Face PEFT: a config and its tensors."""

import collections
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cl.lora import _peft_files as files
from optax_cl.lora._adapters import Adapters, LoRA, check_adapters
from optax_cl.lora._convert import to_lora
from optax_cl.lora._targets import Target, Targets

_PREFIX = "base_model.model."
_LAYERS = ("layers", "layer", "blocks", "block", "h")


def save_peft(
    directory: str | os.PathLike[str],
    targets: Targets,
    adapters: Adapters,
    *,
    initial: Adapters | None = None,
    names: Callable[[str], str] | None = None,
    base_model: str | None = None,
) -> None:
    """Writes adapters as Hugging Face PEFT does, for ``PeftModel.from_pretrained``.

    Two files: ``adapter_config.json``, and ``adapter_model.safetensors`` with
    ``lora_A.weight`` ``[r, in]`` and ``lora_B.weight`` ``[out, r]`` for every module,
    which are the transposes of ``a`` and ``b``. Every layer of a stacked kernel becomes
    a module of its own. Ranks and scales that differ between kernels go into
    ``rank_pattern`` and ``alpha_pattern``; the file always says ``use_rslora: false``,
    with the alphas that give the same scales. ``Spectral`` is written as the ``LoRA``
    of the same update.

    **Starts that changed the weights** (``pissa_init``, ``loram_init``,
    ``lora_ga_init``, ``slice_init``). A file is read on top of the base model, to which
    what was trained is :math:`A B - A_0 B_0`. Give the adapters as they started by
    ``initial=``; the file then holds :math:`[A, A_0]` and :math:`[B; -B_0]`, of twice
    the rank and the same scale. Nothing in adapters tells how they started: without
    ``initial`` such a file is right only on the absorbed weights, ``start.params``.

    Needs safetensors: ``pip install 'optax-cl[peft]'``.

    Args:
      directory: Made if it is not there; older files of these names are replaced.
      targets: The kernels that ``adapters`` belong to.
      adapters: ``{path: LoRA or Spectral}``.
      initial: ``start.adapters`` of a start that changed the weights; None for others.
      names: From the path of a kernel to the name of its module in the PyTorch model,
        with one ``{}`` for each stacked axis: ``"layers/q/kernel"`` to
        ``"model.layers.{}.self_attn.q_proj"``. By default the path with dots, without
        ``params`` at its head and ``kernel`` or ``weight`` at its end, and with ``{}``
        behind the part called ``layers``, ``blocks`` or ``h``.
      base_model: Name or path of the base model, for the config.

    Raises:
      ValueError: If the adapters don't fit, two kernels get one name, or a kernel is a
        convolution or an embedding table.
      ImportError: Without safetensors.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from optax_cl import lora
      >>> params = {"layers": {"0": {"q_proj": {"kernel": jnp.ones((4, 3))}}}}
      >>> targets = lora.targets(params, {"q_proj": 2}, alpha=4.0)
      >>> start = lora.lora_init(targets, params, jax.random.key(0))
      >>> directory = tempfile.mkdtemp()
      >>> lora.save_peft(directory, targets, start.adapters)
      >>> again = lora.load_peft(directory, targets)["layers/0/q_proj/kernel"]
      >>> print(jnp.array_equal(again.a, start.adapters["layers/0/q_proj/kernel"].a))
      True
    """
    safetensors = files.import_safetensors()
    check_adapters(targets, adapters)
    adapters = to_lora(adapters)
    if initial is not None:
        check_adapters(targets, initial, "initial")
        adapters = _less(adapters, to_lora(initial))
    tensors, ranks, alphas = {}, {}, {}
    for module, path, index in _modules(targets, names):
        a, b = (np.asarray(jax.device_get(x))[index] for x in adapters[path])
        tensors[_key(module, "A")] = np.ascontiguousarray(a.T)
        tensors[_key(module, "B")] = np.ascontiguousarray(b.T)
        ranks[module] = a.shape[-1]
        alphas[module] = _alpha(targets[path].scale, a.shape[-1])
    rank, alpha = _most_common(ranks), _most_common(alphas)
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(ranks),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
    }
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(
        tensors, folder / files.TENSORS, metadata={"format": "pt"}
    )
    (folder / files.CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _less(adapters: Adapters, initial: Adapters) -> Adapters:
    """Adapters whose products are those of the first less those of the second."""

    def one(new: LoRA, old: LoRA) -> LoRA:
        return LoRA(
            a=jnp.concatenate([new.a, old.a], axis=-1),
            b=jnp.concatenate([new.b, -old.b], axis=-2),
        )

    return {path: one(new, initial[path]) for path, new in adapters.items()}


def load_peft(
    directory: str | os.PathLike[str],
    targets: Targets,
    *,
    names: Callable[[str], str] | None = None,
) -> Adapters:
    """Reads adapters that Hugging Face PEFT or ``save_peft`` wrote.

    Where the scale in the file differs from the target's (another alpha, or
    rank-stabilised scaling), ``b`` is multiplied by their ratio, so that the update is
    that of the file whatever ``alpha`` the targets were made with. Ranks must agree.

    Needs safetensors: ``pip install 'optax-cl[peft]'``.

    Args:
      directory: With ``adapter_config.json`` and ``adapter_model.safetensors``.
      targets: The kernels that the file has adapters for, all of them.
      names: As for ``save_peft``.

    Returns:
      ``{path: LoRA}`` in float32.

    Raises:
      FileNotFoundError: If one of the two files is not there.
      ValueError: If a file is damaged, a tensor is missing, superfluous, of another
        shape or not finite, or the config asks for what two factors can't hold (DoRA,
        trained biases, whole modules, starts that change the base weights).
      ImportError: Without safetensors.
    """
    folder = pathlib.Path(directory)
    config = files.read_config(folder / files.CONFIG)
    modules = list(_modules(targets, names))
    expected = {_key(module, factor) for module, *_ in modules for factor in "AB"}
    tensors = files.read_tensors(folder / files.TENSORS, expected)
    loaded: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for module, path, _ in modules:
        rank = _look_up(config, "rank_pattern", "r", module)
        alpha = _look_up(config, "alpha_pattern", "lora_alpha", module)
        *_, fan_in, fan_out = targets[path].matrix_shape
        if rank != targets[path].rank:
            raise ValueError(
                f"`{folder / files.CONFIG}` gives the module `{module}` rank {rank}, "
                f"but the target `{path}` has rank {targets[path].rank}. Make the "
                "targets with the ranks of the file."
            )
        shapes = {_key(module, "A"): (rank, fan_in), _key(module, "B"): (fan_out, rank)}
        for name, shape in shapes.items():
            files.check_tensor(name, tensors[name], shape, path)
        a, b = (tensors[name] for name in shapes)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        ratio = scale / targets[path].scale
        loaded.setdefault(path, []).append((a.T, np.float32(ratio) * b.T))
    return {path: _stacked(targets[path], layers) for path, layers in loaded.items()}


def _modules(
    targets: Targets, names: Callable[[str], str] | None
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Module name, path and index into the stacked axes, for every matrix."""
    seen: dict[str, str] = {}
    for path, target in targets.items():
        _check_dense(path, target)
        batch = target.matrix_shape[:-2]
        template = _default_name(path, len(batch)) if names is None else names(path)
        if not isinstance(template, str) or template.count("{}") != len(batch):
            raise ValueError(
                f"`names` must give `{path}` a module name with {len(batch)} `{{}}`, "
                f"one for each of its stacked axes; got {template!r}."
            )
        for index in np.ndindex(*batch):
            module = template.format(*index)
            if module in seen:
                raise ValueError(
                    f"`names` gives `{seen[module]}` and `{path}` the same module "
                    f"`{module}`; every kernel needs one of its own."
                )
            seen[module] = path
            yield module, path, index


def _check_dense(path: str, target: Target) -> None:
    view = target.view
    table = re.search("embed", path, re.IGNORECASE) and max(view.fan_in) > max(
        view.fan_out
    )
    if table or len(view.fan_in) > 2:
        kind = "an embedding table" if table else "a convolution"
        raise ValueError(
            f"the target `{path}` of shape {target.shape} is read as {kind}, which "
            "PEFT keeps in another layout; files hold dense kernels only. Choose "
            "targets without it."
        )


def _default_name(path: str, stacked: int) -> str:
    parts = path.split("/")
    if parts[-1] in ("kernel", "weight", "w") and len(parts) > 1:
        parts = parts[:-1]
    if parts[0] == "params" and len(parts) > 1:
        parts = parts[1:]
    if stacked:
        places = [i for i, part in enumerate(parts) if part in _LAYERS]
        if stacked > 1 or len(places) != 1:
            raise ValueError(
                f"can't tell where the number of the layer goes in the module name of "
                f"`{path}`. Say it by `names=`: a function from a path to a name with "
                "`{}` for each stacked axis, such as 'model.layers.{}.self_attn.q_proj'"
                "."
            )
        parts.insert(places[0] + 1, "{}")
    return ".".join(parts)


def _key(module: str, factor: str) -> str:
    return f"{_PREFIX}{module}.lora_{factor}.weight"


def _alpha(scale: float, rank: int) -> float | int:
    """``alpha`` with ``alpha / rank == scale``, whole where that is exact."""
    alpha = scale * rank
    return round(alpha) if round(alpha) / rank == scale else alpha


def _most_common(values: dict[str, Any]) -> Any:
    return collections.Counter(values.values()).most_common(1)[0][0]


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """The values that differ from the default, under keys as PEFT reads them."""

    def key(module):
        # PEFT matches keys at the end of a name, so that `head` also means `lm.head`.
        shared = any(other.endswith("." + module) for other in values)
        return "^" + module if shared else module

    return {key(m): value for m, value in values.items() if value != default}


def _look_up(config: dict[str, Any], pattern: str, default: str, module: str) -> Any:
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return config[default]


def _stacked(target: Target, layers: list[tuple[np.ndarray, np.ndarray]]) -> LoRA:
    batch = target.matrix_shape[:-2]
    a, b = (np.stack(x).reshape(*batch, *x[0].shape) for x in zip(*layers, strict=True))
    return LoRA(jnp.asarray(a), jnp.asarray(b))
