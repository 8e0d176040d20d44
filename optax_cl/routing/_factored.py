"""Adafactor's factored second moment with separate gradients."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks, tasks, trees
from optax_cl.routing import _adam, _capture


class ScaleByDecoupledFactoredRmsState(NamedTuple):
    """State of ``scale_by_decoupled_factored_rms``.

    At a leaf whose two largest axes are both long enough, ``row`` and ``col`` hold the
    means over either axis and ``full`` has one entry; elsewhere it is the reverse.
    """

    count: chex.Array  # int32 [], number of updates done
    row: optax.Updates  # mean square over the largest axis; or [1]
    col: optax.Updates  # mean square over the second largest axis; or [1]
    full: optax.Updates  # mean square, like params; or [1]


def scale_by_decoupled_factored_rms(
    decay_rate: jax.typing.ArrayLike = 0.8,
    epsilon: jax.typing.ArrayLike = 1e-30,
    *,
    min_dim_size_to_factor: int = 128,
    second_moment: str = "max",
) -> optax.GradientTransformationExtraArgs:
    r"""Adafactor's scaling, its second moment read from the raw gradient.

    With :math:`b_t` elementwise :math:`\max(g_t^2, \tilde g_t^2)`, :math:`g_t^2` or
    :math:`\tilde g_t^2` (as in ``scale_by_decoupled_adam``), the factored moments are
    averages of the row and column means of :math:`b_t + \epsilon`, with decay
    :math:`1 - t^{-\text{decay\_rate}}`, and

    .. math:: u = \tilde g \Big/ \sqrt{\frac{r\, c^T}{\mathrm{mean}(r)}}

    The maximum is taken before the means. Since a mean over rows mixes coordinates, a
    step of Adam's size is not guaranteed here under any setting: chain
    ``optax.clip_by_block_rms`` and momentum *behind* this link, on its result.

    **Placement.** As ``scale_by_decoupled_adam``, the learning rate and
    ``optax.scale_by_param_block_rms`` behind it.

    **Cost.** State in + out instead of in x out for factored leaves. Leaves with a
    second-largest axis shorter than ``min_dim_size_to_factor`` are not factored.

    Args:
      decay_rate: Exponent of the decay schedule, in (0, 1].
      epsilon: Added to squares.
      min_dim_size_to_factor: Shortest axis that is factored.
      second_moment: ``"max"``, ``"raw"`` or ``"routed"``.

    Returns:
      A ``GradientTransformationExtraArgs``; equal to ``optax.scale_by_factored_rms``
      when ``raw_updates`` equals the updates.

    Raises:
      ValueError: As ``scale_by_decoupled_adam``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_cl
      >>> tx = optax_cl.chain(optax.scale(0.5),
      ...                     optax_cl.scale_by_decoupled_factored_rms())
      >>> grads = jnp.array([1.0, -2.0])
      >>> print(tx.update(grads, tx.init(grads))[0].round(3))
      [ 0.5 -0.5]

    References:
      Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018
    """
    checks.check_number("decay_rate", decay_rate, low=0.0, high=1.0, open_low=True)
    checks.check_number("epsilon", epsilon, low=0.0)
    checks.check_positive_int("min_dim_size_to_factor", min_dim_size_to_factor)
    checks.check_choice("second_moment", second_moment, _adam.SECOND_MOMENTS)

    def init_fn(params):
        def shapes(p):
            axes = _factored_axes(p.shape, min_dim_size_to_factor)
            if axes is None:
                return (1,), (1,), p.shape
            short, long = axes
            return _without(p.shape, long), _without(p.shape, short), (1,)

        def part(i):
            return jax.tree.map(lambda p: jnp.zeros(shapes(p)[i], p.dtype), params)

        return ScaleByDecoupledFactoredRmsState(
            jnp.zeros([], jnp.int32), part(0), part(1), part(2)
        )

    def update_fn(updates, state, params=None, *, raw_updates=None, **extra_args):
        del params, extra_args
        trees.check_fits("updates", updates, state.full, shapes=False)
        if second_moment != "routed":
            raw_updates = _capture.require_raw(
                "scale_by_decoupled_factored_rms", raw_updates, updates
            )
        squares = _adam.second_moment_input(
            second_moment, updates, raw_updates, lambda g: g**2
        )
        count = optax.safe_increment(state.count)
        decay = 1.0 - jnp.asarray(count, jnp.float32) ** -jnp.asarray(decay_rate)

        def average(old, new):
            return (decay * old + (1.0 - decay) * new).astype(old.dtype)

        def one(g, square, row, col, full):
            square = square + epsilon
            axes = _factored_axes(g.shape, min_dim_size_to_factor)
            if axes is None:
                full = average(full, square)
                return _Leaf((g * _inverse_root(full)).astype(g.dtype), row, col, full)
            short, long = axes
            row = average(row, jnp.mean(square, axis=long))
            col = average(col, jnp.mean(square, axis=short))
            # `row` has lost the long axis, so the short one may have moved forward.
            mean = jnp.mean(row, axis=short - (short > long), keepdims=True)
            share = row / jnp.where(mean > 0, mean, 1)
            update = (
                g
                * jnp.expand_dims(_inverse_root(share), long)
                * jnp.expand_dims(_inverse_root(col), short)
            )
            return _Leaf(update.astype(g.dtype), row, col, full)

        leaves = jax.tree.map(one, updates, squares, state.row, state.col, state.full)

        def part(i):
            return jax.tree.map(
                lambda leaf: leaf[i], leaves, is_leaf=lambda n: isinstance(n, _Leaf)
            )

        return part(0), ScaleByDecoupledFactoredRmsState(
            count, part(1), part(2), part(3)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _inverse_root(x):
    # Zero where `epsilon` and small squares underflow, as they do in float16.
    return jnp.where(x > 0, x, 1) ** -0.5


class _Leaf(NamedTuple):
    update: Any
    row: Any
    col: Any
    full: Any


def _factored_axes(shape: tuple[int, ...], least: int) -> tuple[int, int] | None:
    """The second largest and the largest axis, or None if the former is too short."""
    if len(shape) < 2:
        return None
    order = sorted(range(len(shape)), key=lambda a: shape[a])
    short, long = order[-2:]
    return (short, long) if shape[short] >= least else None


def _without(shape, axis):
    return shape[:axis] + shape[axis + 1 :]


tasks.register_moments(ScaleByDecoupledFactoredRmsState, (), ("row", "col", "full"))
