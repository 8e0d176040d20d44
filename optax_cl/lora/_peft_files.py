"""The two files of a PEFT adapter: what they are called, read and judged."""

import json
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

# What would change the model in ways that two factors can't hold.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
# Starts that leave the base weights alone; files of the others fit other weights.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
}


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """The entries of a config, or an error for one that two factors can't hold."""
    _check_exists(path)
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is no JSON: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"`{path}` must have peft_type 'LORA'; got {got!r}.")
    numbers = {name: config.get(name) for name in ("r", "lora_alpha")}
    for pattern in ("rank_pattern", "alpha_pattern"):
        given = config.get(pattern) or {}
        try:
            numbers |= {f"{pattern}[{k}]": x for k, x in given.items() if re.compile(k)}
        except (AttributeError, re.error) as error:
            raise ValueError(
                f"`{path}` must give `{pattern}` as a map from regular expressions to "
                f"numbers; got {given!r} ({error})."
            ) from error
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"`{path}` must give `{name}`, above 0; got {value!r}.")
    asked = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        asked.append("bias")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        asked.append("init_lora_weights")
    if asked:
        shown = ", ".join(f"{name}={config[name]!r}" for name in asked)
        raise ValueError(
            f"`{path}` asks for {shown}, which two factors beside unchanged weights "
            "can't hold. Convert the adapter with PEFT first, or merge it there."
        )
    return config


def read_tensors(path: pathlib.Path, expected: set[str]) -> dict[str, np.ndarray]:
    """The tensors of a file by name, in float32, or an error unless they are these."""
    safetensors = import_safetensors()
    _check_exists(path)
    try:
        # The NumPy face of safetensors doesn't know bfloat16.
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"`{path}` is damaged or no safetensors file: {error}. Fetch it anew."
        ) from error
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"`{path}` holds `{name}` as {entry['dtype']}; expected one of "
                f"{', '.join(_DTYPES)}."
            )
        flat = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"]).astype(np.float32)
    missing, more = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or more:
        raise ValueError(
            f"`{path}` must hold the tensors of the targets, and no others: "
            f"{_counted(missing)} missing, {_counted(more)} not expected. Choose the "
            "targets that the file has, and give their module names by `names=`."
        )
    return tensors


def _check_exists(path: pathlib.Path) -> None:
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        hint = ""
        if path.name == TENSORS and pickled.is_file():
            hint = f" `{pickled.name}` is a pickle: save it with safetensors first."
        raise FileNotFoundError(f"there is no `{path}`.{hint}")


def _counted(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} ({shown})" if names else "none"


def check_tensor(
    name: str, tensor: np.ndarray, shape: tuple[int, ...], target: str
) -> None:
    """Raises unless a tensor has the shape that a target asks for, and is finite."""
    if tensor.shape != shape:
        raise ValueError(
            f"the tensor `{name}` must have shape {shape} to fit the target "
            f"`{target}`; got {tensor.shape}."
        )
    if not np.isfinite(tensor).all():
        raise ValueError(f"the tensor `{name}` holds numbers that are not finite.")


def import_safetensors() -> Any:
    """The package with its NumPy face, or an error naming the extra."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "PEFT files need safetensors: pip install 'optax-cl[peft]'."
        ) from error
    return safetensors
