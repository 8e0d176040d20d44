"""Parameters of a Llama-family decoder from files of two other programs.

Both store a linear layer as ``[out, in]``, one tensor per layer; here a kernel is
``[layers, in, out]``. They differ in the rotation. Hugging Face's files turn coordinate
``j`` of a head with ``j + head_dim / 2``, as the model here does; llama.cpp's converter
reorders the rows of q and k, so that the two stand side by side. Reading GGUF undoes
that.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.data import DataError
from experiments.models import gguf
from experiments.models._llama_config import KERNELS, LlamaConfig, abstract_params

_GGUF_NAMES = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "norm_attention": "blk.{}.attn_norm.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "o": "blk.{}.attn_output.weight",
    "norm_hidden": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
}
_HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "norm_attention": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "norm_hidden": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}


def from_gguf(
    file: gguf.GGUF, *, source: str = "the GGUF file", dtype: Any = jnp.float32
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Sizes and parameters from a GGUF file of the architecture ``llama``.

    Args:
      file: What ``gguf.read`` returned.
      source: The file's name, for messages.
      dtype: Dtype of the parameters; what is stored in fewer bits is dequantised in
        float32 first.

    Returns:
      The sizes and the parameters, NumPy arrays.

    Raises:
      DataError: If the file is of another architecture or variant, or a tensor is
        missing, too many, of the wrong shape or not finite.
    """
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise DataError(
            f"{source} holds a model of the architecture {architecture!r}, expected "
            "'llama'."
        )

    def entry(key: str) -> Any:
        return _entry(metadata, f"llama.{key}", source)

    embedding = file.tensors.get(_GGUF_NAMES["embed"])
    if embedding is None:
        raise DataError(f"{source} lacks the tensor `{_GGUF_NAMES['embed']}`.")
    if (scaling := metadata.get("llama.rope.scaling.type", "none")) != "none":
        raise DataError(
            f"{source} scales its rotary positions ({scaling!r}); only plain ones are "
            "read."
        )
    heads = entry("attention.head_count")
    config = _config(
        source,
        vocabulary=embedding.shape[0],
        layers=entry("block_count"),
        width=entry("embedding_length"),
        heads=heads,
        kv_heads=metadata.get("llama.attention.head_count_kv", heads),
        hidden=entry("feed_forward_length"),
        context=entry("context_length"),
        rope_theta=_shortest(metadata.get("llama.rope.freq_base", 10_000.0)),
        norm_eps=_shortest(entry("attention.layer_norm_rms_epsilon")),
    )
    rotated = metadata.get("llama.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise DataError(
            f"{source} rotates {rotated} of {config.head_dim} coordinates of a head; "
            "only models that rotate all are supported."
        )

    def get(name: str) -> np.ndarray:
        weights = gguf.dequantize(file.tensors[name])
        for part, heads in (("attn_q.", config.heads), ("attn_k.", config.kv_heads)):
            if part in name:
                return _half_split(weights, heads)
        return weights

    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    return config, _params(config, _GGUF_NAMES, shapes, get, source, dtype)


def from_safetensors(
    folder: str | os.PathLike[str], *, dtype: Any = jnp.float32
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Sizes and parameters from a folder in the layout of Hugging Face.

    Args:
      folder: Holds ``config.json`` and one or more ``*.safetensors``: those that
        ``model.safetensors.index.json`` names, or all if there is no such file.
      dtype: Dtype of the parameters.

    Returns:
      The sizes and the parameters, NumPy arrays.

    Raises:
      DataError: If a file is missing or damaged, the model is of another type or
        variant, or a tensor is missing, too many, of the wrong shape or not finite.
    """
    folder = Path(folder)
    config, tied = _hf_config(folder / "config.json")
    tensors = _open_safetensors(folder)
    shapes = {name: read().shape for name, read in tensors.items()}
    # Old checkpoints store the rotary frequencies, and some the tied head once more.
    for name in [name for name in shapes if name.endswith("rotary_emb.inv_freq")]:
        del shapes[name]
    if "lm_head.weight" in shapes:
        embedding = tensors.get(_HF_NAMES["embed"], lambda: np.empty(0))()
        if not np.array_equal(tensors["lm_head.weight"](), embedding):
            raise DataError(
                f"{folder} has a head of its own, `lm_head.weight`; only models whose "
                "head is tied to the embedding are supported."
            )
        del shapes["lm_head.weight"]
    elif not tied:
        raise DataError(
            f"{folder / 'config.json'} says tie_word_embeddings = False, and there is "
            "no `lm_head.weight`; only models whose head is tied to the embedding are "
            "supported."
        )

    def get(name: str) -> np.ndarray:
        return tensors[name]()

    return config, _params(config, _HF_NAMES, shapes, get, str(folder), dtype)


def _params(
    config: LlamaConfig,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    get: Callable[[str], np.ndarray],
    source: str,
    dtype: Any,
) -> dict[str, Any]:
    """Stacks the layers and transposes the kernels, after checking what there is."""
    wanted = abstract_params(config, dtype)
    stored = {
        names["embed"]: wanted["embed"]["embedding"].shape,
        names["norm"]: wanted["norm"]["scale"].shape,
    }
    for part, node in wanted["layers"].items():
        (leaf,) = node.values()
        for layer in range(config.layers):
            stored[names[part].format(layer)] = leaf.shape[:0:-1]
    _check_tensors(stored, shapes, source)

    def read(name: str) -> np.ndarray:
        weights = get(name)
        if not np.isfinite(weights).all():
            raise DataError(f"{source} is damaged: `{name}` holds NaN or infinity.")
        return weights

    def stack(part: str, leaf: Any) -> np.ndarray:
        out = np.empty(leaf.shape, leaf.dtype)
        for layer in range(config.layers):
            out[layer] = read(names[part].format(layer)).T
        return out

    layers = {}
    for part, node in wanted["layers"].items():
        kind = "kernel" if part in KERNELS else "scale"
        layers[part] = {kind: stack(part, node[kind])}
    return {
        "embed": {"embedding": read(names["embed"]).astype(dtype)},
        "layers": layers,
        "norm": {"scale": read(names["norm"]).astype(dtype)},
    }


def _check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    source: str,
) -> None:
    if missing := [name for name in expected if name not in found]:
        raise DataError(
            f"{source} lacks {len(missing)} of {len(expected)} tensors, the first is "
            f"`{missing[0]}`."
        )
    if extra := [name for name in found if name not in expected]:
        raise DataError(
            f"{source} holds {len(extra)} tensors that this model has no place for, "
            f"the first is `{extra[0]}`: it is another variant (biases, an untied "
            "head, scaled rotations)."
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise DataError(
                f"{source}: the tensor `{name}` has the shape {tuple(found[name])}, "
                f"expected {shape} for the sizes that the file itself states."
            )


def _half_split(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows ``[heads, (j, half), in]`` of llama.cpp to ``[heads, (half, j), in]``."""
    rows, width = weights.shape
    pairs = weights.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def _shortest(x: float) -> float:
    """1e-5 for the float32 nearest to it, which a file stores."""
    return float(str(np.float32(x)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from error
    if not isinstance(stated, dict):
        raise DataError(f"{path} must hold entries by name; got {stated!r}.")
    return stated


def _hf_config(path: Path) -> tuple[LlamaConfig, bool]:
    """The sizes, and whether the head may be tied to the embedding."""
    stated = _read_json(path)
    rope = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    supported = {
        "model_type": (stated.get("model_type"), "llama"),
        "hidden_act": (stated.get("hidden_act", "silu"), "silu"),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for key, (found, expected) in supported.items():
        if found != expected:
            raise DataError(f"{path} says {key} = {found!r}, expected {expected!r}.")

    def entry(key: str) -> Any:
        return _entry(stated, key, str(path))

    heads = entry("num_attention_heads")
    theta = rope.get("rope_theta", stated.get("rope_theta", 10_000.0))
    config = _config(
        str(path),
        vocabulary=entry("vocab_size"),
        layers=entry("num_hidden_layers"),
        width=entry("hidden_size"),
        heads=heads,
        kv_heads=stated.get("num_key_value_heads") or heads,
        hidden=entry("intermediate_size"),
        context=entry("max_position_embeddings"),
        rope_theta=theta,
        norm_eps=entry("rms_norm_eps"),
    )
    if (stated.get("head_dim") or config.head_dim) != config.head_dim:
        raise DataError(
            f"{path} says head_dim = {stated['head_dim']}; only hidden_size / "
            f"num_attention_heads = {config.head_dim} is supported."
        )
    return config, stated.get("tie_word_embeddings") is not False


def _open_safetensors(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Name to a function that reads the tensor."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            "Reading safetensors needs the package `safetensors`: "
            "`pip install 'optax-cl[experiments]'`."
        ) from error
    files = _files(folder)
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    for path in files:
        try:
            opened = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise DataError(
                f"{path} is truncated or no safetensors file ({error}). Fetch it again."
            ) from error
        for name in opened.keys():
            if name in tensors:
                raise DataError(f"{folder} holds the tensor `{name}` twice.")
            tensors[name] = lambda opened=opened, name=name: opened.get_tensor(name)
    return tensors


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise DataError(f"{folder} holds no file *.safetensors.")
        return files
    names = sorted(set(_entry(_read_json(index), "weight_map", str(index)).values()))
    for name in names:
        if not (folder / name).is_file():
            raise DataError(
                f"{folder} lacks the file `{name}`, which {index.name} names. Fetch it."
            )
    return [folder / name for name in names]


def _config(source: str, **sizes: Any) -> LlamaConfig:
    try:
        return LlamaConfig(**sizes)
    except (TypeError, ValueError) as error:
        raise DataError(f"{source} states impossible sizes: {error}") from error


def _entry(entries: Mapping[str, Any], key: str, source: str) -> Any:
    if key not in entries:
        raise DataError(f"{source} is damaged: it lacks the entry `{key}`.")
    return entries[key]
