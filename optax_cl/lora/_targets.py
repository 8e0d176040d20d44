"""Which kernels get adapters, how each is read as a matrix, and its rank and scale."""

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks
from optax_cl._core.matrices import (
    MatrixView,
    ViewRule,
    from_matrix,
    matrix_shape,
    to_matrix,
    view_rule,
)


class Target(NamedTuple):
    """One kernel that gets an adapter."""

    view: MatrixView
    shape: tuple[int, ...]  # of the leaf
    rank: int
    scale: float

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """``[*batch, in, out]``."""
        return matrix_shape(self.view, self.shape)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Targets(Mapping[str, Target]):
    """The kernels that get adapters: ``{path: Target}``, hashable and leafless."""

    entries: tuple[tuple[str, Target], ...]

    def __getitem__(self, path: str) -> Target:
        return dict(self.entries)[path]

    def __iter__(self) -> Iterator[str]:
        return (path for path, _ in self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def targets(
    params: chex.ArrayTree,
    ranks: Mapping[str, int],
    *,
    alpha: float,
    rslora: bool = False,
    matrices: ViewRule | None = None,
) -> Targets:
    """Chooses the kernels that get adapters.

    Args:
      params: The parameters of the model; only shapes and dtypes are read.
      ranks: Pattern to rank. Patterns are regular expressions searched in the leaf's
        path (``layers/0/q/kernel``); the first that matches decides.
      alpha: The update is scaled by ``alpha / rank``.
      rslora: Scale by ``alpha / sqrt(rank)`` instead, which keeps the size of the
        update the same over ranks.
      matrices: How leaves are read as matrices, from ``optax_cl.matrix_views``; the
        default reads dense kernels ``[in, out]`` and convolutions ``HWIO``, and
        refuses embeddings. ``stacked=`` names kernels of scanned layers, each of which
        gets an adapter of its own.

    Returns:
      ``Targets``. Static: make it once, outside jit.

    Raises:
      ValueError: If a pattern matches no kernel or is no regular expression, a rank
        exceeds the smaller side of its kernel, or ``alpha`` is not positive.
      TypeError: If a rank is no integer, or a kernel is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import lora
      >>> params = {"hidden": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
      >>> for path, target in lora.targets(params, {"kernel": 2}, alpha=4.0).items():
      ...     print(path, target.rank, target.scale)
      hidden/kernel 2 2.0

    References:
      Hu et al, `LoRA: Low-Rank Adaptation of Large Language Models
      <https://arxiv.org/abs/2106.09685>`_, 2021

      Kalajdzievski, `A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA
      <https://arxiv.org/abs/2312.03732>`_, 2023
    """
    checks.check_number("alpha", alpha, low=0.0, open_low=True)
    matrices = view_rule(matrices)
    if not isinstance(ranks, Mapping) or not ranks:
        raise ValueError(
            f"`ranks` must map patterns to ranks, as {{'kernel': 8}}; got {ranks!r}."
        )
    for pattern, rank in ranks.items():
        checks.check_positive_int(f"ranks[{pattern!r}]", rank)
        checks.check_pattern("ranks", pattern)
    leaves = _leaves(params)
    matched = set()
    entries = []
    for path, leaf in leaves.items():
        pattern = next((p for p in ranks if re.search(p, path)), None)
        if pattern is None:
            continue
        try:
            view = matrices(path, jnp.shape(leaf))
        except ValueError as error:
            raise ValueError(
                f"`ranks` chooses `{path}` by {pattern!r}, but {error} Narrow the "
                "pattern, or pass such a rule as `targets(..., matrices=...)`."
            ) from error
        if view is None:  # a bias, say: a pattern for a layer may well match it
            continue
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"`ranks` chooses `{path}`, which holds {jnp.result_type(leaf)}; "
                "adapters need real floating-point kernels. Narrow the pattern."
            )
        matched.add(pattern)
        rank = int(ranks[pattern])
        shape = jnp.shape(leaf)
        *_, fan_in, fan_out = matrix_shape(view, shape)
        if rank > min(fan_in, fan_out):
            raise ValueError(
                f"`ranks` gives `{path}` rank {rank}, but as a matrix it is "
                f"{fan_in}x{fan_out}: no update of it has a rank over "
                f"{min(fan_in, fan_out)}. Give it a pattern of its own with a smaller "
                "rank, before the one that matched."
            )
        scale = float(alpha) / (math.sqrt(rank) if rslora else rank)
        entries.append((path, Target(view, shape, rank, scale)))
    for pattern in ranks:
        if pattern not in matched:
            raise ValueError(
                f"`ranks` has the pattern {pattern!r}, which chooses no kernel"
                f"{_why_none(pattern, list(ranks), leaves)}"
            )
    return Targets(tuple(sorted(entries)))


def kernels(targets: Targets, params: chex.ArrayTree) -> dict[str, chex.Array]:
    """The targeted kernels as matrices, ``{path: [*batch, in, out]}``."""
    check_targets(targets)
    leaves = _leaves(params)
    for path, target in targets.items():
        if path not in leaves or jnp.shape(leaves[path]) != target.shape:
            got = jnp.shape(leaves[path]) if path in leaves else "no such leaf"
            raise ValueError(
                f"`params` must be the parameters that `targets` were chosen from: at "
                f"`{path}` expected shape {target.shape}, got {got}."
            )
    return {path: to_matrix(leaves[path], t.view) for path, t in targets.items()}


def replace_kernels(
    targets: Targets, params: chex.ArrayTree, matrices: Mapping[str, chex.Array]
) -> chex.ArrayTree:
    """``params`` with the given matrices ``[*batch, in, out]`` for its kernels."""

    def one(path, leaf):
        name = checks.path_str(path)
        if name not in matrices:
            return leaf
        target = targets[name]
        return from_matrix(matrices[name], target.view, target.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def check_targets(targets: Any) -> None:
    """Raises unless ``targets`` is what the function of that name makes."""
    if not isinstance(targets, Targets):
        raise TypeError(
            "`targets` must be made by `lora.targets(params, ranks, alpha=...)`; got "
            f"{type(targets).__name__}."
        )


def _why_none(
    pattern: str, patterns: list[str], leaves: Mapping[str, chex.Array]
) -> str:
    """The rest of the sentence on a pattern that chooses no kernel."""
    found = [path for path in leaves if re.search(pattern, path)]
    if not found:
        # Near in spelling first; the others in their order make up the number.
        near = difflib.get_close_matches(pattern, leaves, n=6, cutoff=0.3)
        shown = list(dict.fromkeys([*near, *leaves]))[:6]
        more = f" and {len(leaves) - 6} more" if len(leaves) > 6 else ""
        return f": no path matches it. There are {', '.join(shown) or 'none'}{more}."
    path = found[0]
    before = next(p for p in patterns if re.search(p, path))
    if before != pattern:
        return (
            f": `{path}` matches it, but is taken by {before!r} before it. Put the "
            "narrower pattern first."
        )
    return (
        f": `{path}` of shape {jnp.shape(leaves[path])} matches it, but is not read as "
        "a matrix."
    )


def _leaves(params: chex.ArrayTree) -> dict[str, Any]:
    return {
        checks.path_str(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
