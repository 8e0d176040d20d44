"""Argument checks, and the wording of their errors.

Every message names the argument, what came, what was expected and what to do. Checks
on hyper-parameters let arrays and tracers through, so that ``optax.inject_hyperparams``
and ``jax.vmap`` over hyper-parameters work; only Python and NumPy scalars are judged.
"""

import contextlib
import math
import numbers
import os
import re
import sys
import warnings
from collections.abc import Collection
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax


def is_concrete_number(value: Any) -> bool:
    """Whether ``value`` is a Python or NumPy scalar whose value can be judged now."""
    if isinstance(value, bool | np.bool_):
        return False
    return isinstance(value, numbers.Real | np.number) or (
        isinstance(value, np.ndarray) and value.ndim == 0
    )


def check_number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    schedule: bool = False,
) -> None:
    """Raises unless ``value`` is a finite number in the given interval.

    Arrays and tracers pass unjudged (their value is not known at trace time); callables
    pass if ``schedule`` is true.
    """
    if schedule and callable(value):
        return
    if not is_concrete_number(value):
        if isinstance(value, jax.Array):
            if value.ndim != 0:
                raise ValueError(
                    f"`{name}` must be a scalar; got an array of shape {value.shape}."
                )
            return
        wanted = "a number or an Optax schedule" if schedule else "a number"
        raise TypeError(
            f"`{name}` must be {wanted}; got {value!r} of type {type(value).__name__}."
        )
    v = float(value)
    below = v <= low if open_low else v < low
    above = v >= high if open_high else v > high
    if not math.isfinite(v) or below or above:
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        raise ValueError(
            f"`{name}` must be a finite number in {left}{low:g}, {high:g}{right}; got "
            f"{value!r}."
        )


def check_positive_int(name: str, value: Any) -> None:
    """Raises unless ``value`` is a positive Python integer (sizes are static)."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        hint = ""
        if isinstance(value, jax.Array):
            hint = " With `optax.inject_hyperparams` list it in `static_args`."
        raise TypeError(
            f"`{name}` must be a Python integer, since it fixes array shapes; got "
            f"{value!r} of type {type(value).__name__}.{hint}"
        )
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1; got {value}.")


def check_float_dtype(name: str, value: Any) -> None:
    """Raises unless ``value`` is None or a floating-point (or complex) dtype."""
    if value is None:
        return
    hint, floating = "", False
    if isinstance(value, jax.Array):
        hint = " With `optax.inject_hyperparams` list it in `static_args`."
    else:
        with contextlib.suppress(TypeError, ValueError):  # no dtype at all
            floating = jnp.issubdtype(jnp.dtype(value), jnp.inexact)
    if not floating:
        raise TypeError(
            f"`{name}` must be a floating-point dtype or None; got {value!r}.{hint}"
        )


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"`{name}` must be one of {listed}; got {value!r}.")


def check_pattern(name: str, pattern: Any) -> None:
    """Raises unless ``pattern`` is a regular expression."""
    try:
        re.search(pattern, "a/path")  # of bytes it can be compiled, and finds nothing
    except (re.error, TypeError) as error:
        raise ValueError(
            f"`{name}` must be a regular expression; got {pattern!r} ({error})."
        ) from error


def check_key(name: str, key: Any) -> None:
    """Raises unless ``key`` is a key of random numbers, of the new kind or the old."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and (
        jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == np.uint32
    ):
        return
    raise TypeError(
        f"`{name}` must be a PRNG key, such as `jax.random.key(0)`; got {key!r} of "
        f"type {type(key).__name__}."
    )


def check_params(method: str, params: Any) -> None:
    """Raises if a method that reads parameters was called without them."""
    if params is None:
        raise ValueError(
            f"`{method}` reads the parameters, but `params` is None. Call "
            "`tx.update(grads, state, params)`."
        )


def check_real(what: str, path: Any, leaf: Any) -> None:
    """Raises for a complex leaf, where squares of gradients would mean nothing."""
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{what} is of real parameters only; at `{path_str(path)}` got {dtype}. "
            "Leave such leaves out with `optax.masked`, or hold real and imaginary "
            "parts as two leaves."
        )


@jax.jit
def all_finite(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Whether each leaf is finite throughout; true for leaves of other types."""

    def one(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.array(True)
        return jnp.all(jnp.isfinite(leaf))

    return jax.tree.map(one, tree)


# Where a warning's line is not looked for.
_INSIDE = tuple(
    os.path.dirname(file) + os.sep
    for file in (os.path.dirname(__file__), jax.__file__, optax.__file__)
)


def warn(message: str) -> None:
    """Warns of the line that called into this library, through JAX or not."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def warn_not_finite(what: str, finite: chex.ArrayTree) -> None:
    """Warns of leaves that ``all_finite`` found wanting; silent while tracing."""
    flags = jax.tree_util.tree_leaves_with_path(finite)
    if any(isinstance(flag, jax.core.Tracer) for _, flag in flags):
        return
    paths = [path_str(path) for path, flag in flags if not flag]
    if paths:
        shown = ", ".join(f"`{p}`" for p in paths[:6])
        shown += ", ..." if len(paths) > 6 else ""
        warn(
            f"{what} not finite at {shown}. Memories leave out such entries, which "
            "then protect nothing of this task. Did training diverge?"
        )


def path_str(path: Any) -> str:
    """A leaf's path as users write it: ``dense/kernel``.

    An NNX variable shows up as an attribute ``value`` below its name, but only where
    the variable itself is in the tree; without it a leaf has one name everywhere.
    """
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/") or "<root>"


def check_same_shapes(name: str, tree: Any, reference: Any, expected: str) -> None:
    """Raises unless ``tree`` has the structure and leaf shapes of ``reference``."""
    if jax.tree.structure(tree) != jax.tree.structure(reference):
        raise ValueError(
            f"`{name}` must have the tree structure of {expected}; got "
            f"{paths_str(tree)} where {paths_str(reference)} was expected."
        )

    def check(path, leaf, ref):
        if jnp.shape(leaf) != jnp.shape(ref):
            raise ValueError(
                f"`{name}` must have the leaf shapes of {expected}; at "
                f"`{path_str(path)}` got {jnp.shape(leaf)}, expected {jnp.shape(ref)}."
            )

    jax.tree_util.tree_map_with_path(check, tree, reference)


def paths_str(tree: chex.ArrayTree) -> str:
    """How many leaves a tree has, and what the first of them are called."""
    paths = [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    shown = ", ".join(paths[:6]) + (", ..." if len(paths) > 6 else "")
    return f"{len(paths)} leaves ({shown})"
