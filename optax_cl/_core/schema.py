"""What a checkpoint must agree on beside its arrays: version and static settings."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

SCHEMA_VERSION = 1  # of the states of this library; raised when a state's fields change


def schema(opt_state: optax.OptState) -> dict[str, Any]:
    """Describes an optimizer state, to be stored beside its checkpoint.

    Array checkpoints hold neither the static settings of the memories (which Fisher,
    which rank rule) nor the version of their layout; restored into an optimizer with
    other settings but equal shapes, they would be taken without a word.

    Args:
      opt_state: Any optimizer state, concrete or abstract.

    Returns:
      A dictionary that survives JSON: ``version``, ``leaves`` (path to shape and dtype)
      and ``settings`` (path to fields) of the static nodes.

    Example:
      >>> import jax.numpy as jnp, optax_cl
      >>> tx = optax_cl.ewc(1.0, estimator="sampled")
      >>> saved = optax_cl.schema(tx.init(jnp.zeros(2)))
      >>> optax_cl.check_schema(tx.init(jnp.zeros(2)), saved)
    """
    leaves = {
        _key(path): [list(np.shape(leaf)), str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
    }
    settings = {
        _key(path): {f.name: _plain(getattr(n, f.name)) for f in dataclasses.fields(n)}
        for path, n in jax.tree_util.tree_leaves_with_path(
            opt_state, is_leaf=dataclasses.is_dataclass
        )
        if dataclasses.is_dataclass(n)
    }
    return {"version": SCHEMA_VERSION, "leaves": leaves, "settings": settings}


def check_schema(opt_state: optax.OptState, saved: dict[str, Any]) -> None:
    """Raises unless a checkpoint's schema is that of ``opt_state``.

    Call it with the stored dictionary before restoring the arrays.

    Args:
      opt_state: The state into which the checkpoint will be restored.
      saved: What ``schema`` returned when it was saved, after JSON or not.

    Raises:
      ValueError: Naming the version, or the first leaf or setting that differs.
    """
    if saved.get("version") != SCHEMA_VERSION:
        raise ValueError(
            f"the checkpoint has schema version {saved.get('version')!r}, this library "
            f"reads {SCHEMA_VERSION}. Restore it with the version that wrote it."
        )
    here = schema(opt_state)
    for kind in ("leaves", "settings"):
        for path in sorted(here[kind].keys() | saved[kind].keys()):
            ours, theirs = here[kind].get(path), saved[kind].get(path)
            if ours != theirs:
                raise ValueError(
                    f"the checkpoint does not fit this optimizer: at `{path}` it holds "
                    f"{theirs if theirs is not None else 'nothing'}, expected "
                    f"{ours if ours is not None else 'nothing'}. Build the optimizer "
                    "with the settings of the run that saved it."
                )


def _key(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _plain(value: Any) -> Any:
    """A setting as JSON would give it back."""
    if dataclasses.is_dataclass(value):
        return {
            f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if isinstance(value, tuple | list | frozenset):
        items = sorted(value) if isinstance(value, frozenset) else value
        return [_plain(v) for v in items]
    if isinstance(value, np.generic):  # a size may be a NumPy integer
        return value.item()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return getattr(value, "__qualname__", repr(type(value)))
