"""Leaves as matrices: which axes are the fan-in, and the way there and back."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks


class MatrixView(NamedTuple):
    """How one leaf is read as a matrix ``[*batch, in, out]``.

    Attributes:
      fan_in: Axes that together index the inputs; the protected side.
      fan_out: Axes that together index the outputs.
      batch: Axes that stack independent matrices (scanned layers).
    """

    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    batch: tuple[int, ...] = ()


# No kernels, however many axes they have: with several heads a bias is [heads, dim].
_VECTORS = re.compile(r"(^|/)(bias|scale)$")

ViewRule = Callable[[str, tuple[int, ...]], MatrixView | None]


@jax.tree_util.register_static
@dataclass(frozen=True)
class KernelViews:
    """The rule that ``matrix_views`` makes; equal settings compare equal."""

    layout: str
    embeddings: str
    stacked: str | None
    skip: str | None
    override: tuple[tuple[str, MatrixView], ...]

    def __call__(self, path: str, shape: tuple[int, ...]) -> MatrixView | None:
        """The view of the leaf at ``path``; None leaves it unprotected."""
        for pattern, view in self.override:
            if re.search(pattern, path):
                return _checked(view, path, shape)
        if len(shape) < 2 or _VECTORS.search(path):
            return None
        if self.skip and re.search(self.skip, path):
            return None
        if re.search("embed", path, re.IGNORECASE):
            if self.embeddings == "refuse":
                raise ValueError(
                    f"the leaf `{path}` of shape {shape} looks like an embedding "
                    "table, whose fan-in is the vocabulary: a basis there would hold "
                    "one row per token. Say what is meant: "
                    "`matrix_views(embeddings='skip')` leaves it unprotected, "
                    "`'features'` protects directions of its feature side."
                )
            if self.embeddings == "skip":
                return None
            last = len(shape) - 1
            return MatrixView(fan_in=(last,), fan_out=tuple(range(last)))
        stacked = self.stacked is not None and re.search(self.stacked, path)
        axes = tuple(range(1 if stacked else 0, len(shape)))
        if len(axes) < 2:
            return None
        if len(axes) not in (2, 4):
            raise ValueError(
                f"can't tell the fan-in side of the leaf `{path}` of shape {shape}: "
                f"{len(axes)} axes are neither a dense kernel (2) nor an image "
                "convolution (4). Name it: `matrix_views(override={r'"
                f"{re.escape(path)}': MatrixView(fan_in=..., fan_out=...)}})`, "
                "`stacked=` for scanned layers, or `skip=` to leave it unprotected."
            )
        if self.layout == "in_out":
            view = MatrixView(fan_in=axes[:-1], fan_out=axes[-1:])
        else:
            view = MatrixView(fan_in=axes[1:], fan_out=axes[:1])
        return view._replace(batch=(0,)) if stacked else view


def matrix_views(
    *,
    layout: str = "in_out",
    embeddings: str = "refuse",
    stacked: str | None = None,
    skip: str | None = None,
    override: dict[str, MatrixView] | None = None,
) -> KernelViews:
    """Says how the leaves of a model are read as matrices with a fan-in side.

    Dense kernels are ``[in, out]`` and image convolutions ``HWIO`` (flax, haiku);
    leaves with fewer than two axes, and those called ``bias`` or ``scale`` whatever
    their axes, are unprotected. Patterns are regular expressions searched in the leaf's
    path, ``layers/0/kernel``.

    Args:
      layout: ``"in_out"``, or ``"out_in"`` for Equinox weights (``OIHW`` convolutions).
      embeddings: For leaves with ``embed`` in their path: ``"refuse"`` raises,
        ``"skip"`` leaves them unprotected, ``"features"`` protects their last axis.
      stacked: Pattern of leaves whose first axis stacks layers (``nnx.scan``).
      skip: Pattern of leaves that stay unprotected.
      override: Pattern to ``MatrixView``, tried first; for attention kernels
        ``[in, heads, dim]`` it is ``MatrixView((0,), (1, 2))``.

    Returns:
      A rule for ``protect(..., matrices=...)``. ``optax.inject_hyperparams`` takes it
      for a schedule, unless it gets ``static_args=("matrices",)``.

    Raises:
      ValueError: For an unknown choice or a pattern that is no regular expression;
        later, in ``init``, for a leaf whose sides can't be told.

    Example:
      >>> from optax_cl import matrix_views
      >>> matrix_views()("dense/kernel", (3, 5))
      MatrixView(fan_in=(0,), fan_out=(1,), batch=())
      >>> matrix_views(layout="out_in")("conv/weight", (8, 3, 5, 5)).fan_in
      (1, 2, 3)
    """
    checks.check_choice("layout", layout, ("in_out", "out_in"))
    checks.check_choice("embeddings", embeddings, ("refuse", "skip", "features"))
    for name, pattern in [("stacked", stacked), ("skip", skip)] + [
        ("override", p) for p in override or {}
    ]:
        if pattern is not None:
            checks.check_pattern(name, pattern)
    return KernelViews(
        layout, embeddings, stacked, skip, tuple((override or {}).items())
    )


def view_rule(matrices: ViewRule | None, *, embeddings: str = "refuse") -> ViewRule:
    """The rule that was given as ``matrices``, or that of ``matrix_views``."""
    if matrices is None:
        return matrix_views(embeddings=embeddings)
    if not callable(matrices):
        raise TypeError(
            "`matrices` must be a rule, `optax_cl.matrix_views(...)` or a function of "
            f"a leaf's path and shape; got {matrices!r}."
        )
    return matrices


def tree_views(rule: ViewRule, tree: chex.ArrayTree) -> list[MatrixView | None]:
    """The views of a tree's leaves, in the order of its leaves."""
    return [
        rule(checks.path_str(path), jnp.shape(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def matrix_shape(view: MatrixView, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape ``[*batch, in, out]`` of a leaf under a view."""
    return (
        *(shape[a] for a in view.batch),
        math.prod(shape[a] for a in view.fan_in),
        math.prod(shape[a] for a in view.fan_out),
    )


def to_matrix(x: chex.Array, view: MatrixView) -> chex.Array:
    """A leaf as ``[*batch, in, out]``."""
    order = view.batch + view.fan_in + view.fan_out
    return jnp.transpose(x, order).reshape(matrix_shape(view, x.shape))


def from_matrix(
    matrix: chex.Array, view: MatrixView, shape: tuple[int, ...]
) -> chex.Array:
    """The inverse of ``to_matrix`` for a leaf of the given shape."""
    order = view.batch + view.fan_in + view.fan_out
    permuted = matrix.reshape(tuple(shape[a] for a in order))
    inverse = tuple(order.index(a) for a in range(len(order)))
    return jnp.transpose(permuted, inverse)


def _checked(view: Any, path: str, shape: tuple[int, ...]) -> MatrixView:
    axes = view.batch + view.fan_in + view.fan_out
    if sorted(axes) != list(range(len(shape))) or not view.fan_in or not view.fan_out:
        raise ValueError(
            f"`override` gives the leaf `{path}` of shape {shape} the view {view}, but "
            f"fan_in, fan_out and batch must share out its axes 0..{len(shape) - 1}, "
            "each once."
        )
    return view
