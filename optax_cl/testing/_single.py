"""Properties of one update, seen by tracing it."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl.testing._streams import (
    ExtraArgs,
    abstract_cast,
    abstract_update,
    assert_same_types,
    no_extra_args,
)


def check_accepts_extra_args(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
) -> None:
    """It is of the type that receives extra arguments, and ignores unknown ones.

    Args:
      tx: The transformation.
      params: Any parameters.
      extra_args: ``updates -> extra arguments`` that it needs.
    """
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        raise AssertionError(
            "the transformation is no GradientTransformationExtraArgs: inside a chain "
            f"it would lose extra arguments. Got {type(tx).__name__}."
        )

    def update(params):
        known = extra_args(params) | {"an_unknown_argument": params}
        return tx.update(params, tx.init(params), params, **known)

    jax.eval_shape(update, params)


def check_update_dtypes(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
) -> None:
    """Updates have the shapes and dtypes of bfloat16, float16 and float32 parameters.

    Args:
      tx: The transformation.
      params: Any parameters; they are cast.
      extra_args: ``updates -> extra arguments`` that it needs.
    """
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        cast = abstract_cast(params, dtype)
        _, updates, _ = abstract_update(tx, cast, extra_args)
        assert_same_types(updates, cast, f"updates of {jnp.dtype(dtype)} parameters")


def check_state_is_stable(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
) -> None:
    """An update keeps the state's structure, shapes and dtypes, whatever the dtype.

    So ``jax.lax.cond`` and ``jax.lax.scan`` take it. It is traced for parameters in
    bfloat16, float16, float32, and (in 64-bit mode) float64.

    Args:
      tx: The transformation.
      params: Any parameters; they are cast.
      extra_args: ``updates -> extra arguments`` that it needs.
    """

    def init(params):
        state = tx.init(params)
        for leaf in jax.tree.leaves(state):
            # While it is traced: its abstract form would be an array's.
            if not isinstance(leaf, jax.Array):
                raise AssertionError(f"{what} holds {leaf!r}, which is no array.")

    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            cast = abstract_cast(params, dtype)
            what = f"the state of {jnp.dtype(dtype)} parameters"
            jax.eval_shape(init, cast)
            state, _, new = abstract_update(tx, cast, extra_args)
            assert_same_types(new, state, what)


def check_map_params(tx: optax.GradientTransformation, params: optax.Params) -> None:
    """``optax.tree.map_params`` with the identity returns the state.

    It calls ``init`` with a placeholder that has no leaves: an ``init`` that indexes
    leaves or reads values breaks there.

    Args:
      tx: The transformation.
      params: Any parameters.
    """
    state = tx.init(params)
    mapped = optax.tree.map_params(tx.init, lambda leaf: leaf, state)
    assert_same_types(mapped, state, "the state mapped by optax.tree.map_params")
    chex.assert_trees_all_equal(mapped, state)


def check_empty_tree(
    tx: optax.GradientTransformation, *, extra_args: ExtraArgs = no_extra_args
) -> None:
    """A tree without leaves gives an update without leaves.

    Args:
      tx: The transformation.
      extra_args: ``updates -> extra arguments`` that it needs.
    """
    empty: dict[str, Any] = {}
    updates, _ = tx.update(empty, tx.init(empty), empty, **extra_args(empty))
    if jax.tree.leaves(updates):
        raise AssertionError(f"an empty tree became {updates}.")
