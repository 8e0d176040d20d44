r"""Low-rank adapters as plain trees beside the parameters they adapt.

The parameters stay as they are and are not trained; the adapters are a dictionary from
the path of a kernel to a small named tuple. A kernel W ``[in, out]`` is used as

.. math:: W + c\,A B \qquad\text{or}\qquad W + c\,V \operatorname{diag}(s)\,U^\top

with :math:`c` the scale (``alpha / rank``). Papers that write ``y = W x`` have the
transposes: their A is ``a.T`` here, their B is ``b.T``.
"""

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
from optax_cl._core.linalg import PRECISION
from optax_cl._core.matrices import (
    MatrixView,
    ViewRule,
    from_matrix,
    matrix_shape,
    matrix_views,
    to_matrix,
)


class LoRA(NamedTuple):
    """A low-rank update ``a @ b`` of one kernel."""

    a: chex.Array  # [*batch, in, r], the input side
    b: chex.Array  # [*batch, r, out]


class Spectral(NamedTuple):
    """A low-rank update ``v diag(s) u^T`` of one kernel, in magnitude and directions.

    With orthonormal columns in ``u`` and ``v``, the entries of ``s`` are its singular
    values up to their sign.
    """

    s: chex.Array  # [*batch] one magnitude for all columns, or [*batch, r] one each
    u: chex.Array  # [*batch, out, r]
    v: chex.Array  # [*batch, in, r], the input side


Adapter = LoRA | Spectral
Adapters = dict[str, Any]  # {path of the kernel: Adapter}


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
    matrices = matrix_views() if matrices is None else matrices
    if not isinstance(ranks, Mapping) or not ranks:
        raise ValueError(
            f"`ranks` must map patterns to ranks, as {{'kernel': 8}}; got {ranks!r}."
        )
    for pattern, rank in ranks.items():
        checks.check_positive_int(f"ranks[{pattern!r}]", rank)
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"`ranks` must map regular expressions; got {pattern!r} ({error})."
            ) from error
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


def product(adapter: Adapter) -> chex.Array:
    """``a b`` or ``v diag(s) u^T``, ``[*batch, in, out]``, in float32 or wider."""
    left, right = product_factors(adapter)
    wide = jnp.promote_types(left.dtype, jnp.float32)
    return jnp.matmul(left.astype(wide), right.astype(wide), precision=PRECISION)


def merge(
    targets: Targets, params: chex.ArrayTree, adapters: Adapters
) -> chex.ArrayTree:
    """Adds the adapters to their kernels: ``W + scale * product``.

    Serves both ends: called in the loss, it applies the adapters to any model (at the
    price of one ``[in, out]`` array per kernel; ``dense`` avoids it where the model's
    code can be changed); called after a task, it folds them in.

    Args:
      targets: The kernels that ``adapters`` belong to.
      params: Parameters of the model.
      adapters: ``{path: LoRA or Spectral}``.

    Returns:
      Parameters of the same structure and dtypes; sums are taken in float32.

    Raises:
      ValueError: If the adapters do not fit the targets.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_cl import lora
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> chosen = lora.targets(params, {"kernel": 1}, alpha=2.0)
      >>> adapters = {"kernel": lora.LoRA(a=jnp.ones((3, 1)), b=jnp.ones((1, 2)))}
      >>> print(lora.merge(chosen, params, adapters)["kernel"][0])
      [3. 3.]
    """
    return _merged(targets, params, adapters, 1.0)


def unmerge(
    targets: Targets, params: chex.ArrayTree, adapters: Adapters
) -> chex.ArrayTree:
    """Takes merged adapters out again: ``W - scale * product``, to rounding."""
    return _merged(targets, params, adapters, -1.0)


def dense(
    x: chex.Array, kernel: chex.Array, adapter: Adapter | None, scale: chex.Numeric
) -> chex.Array:
    """``x @ kernel`` with its adapter, without ever forming the sum of the two.

    Args:
      x: ``[..., in]``.
      kernel: ``[in, out]``.
      adapter: ``LoRA``, ``Spectral`` or None.
      scale: ``targets[path].scale``.

    Returns:
      ``[..., out]``, of the dtype of ``x @ kernel``.

    Raises:
      ValueError: If the kernel is no matrix, or ``x`` or the adapter does not fit it.
      TypeError: If ``adapter`` is something else, all adapters say.
    """
    _check_dense(x, kernel, adapter)
    y = x @ kernel
    if adapter is None:
        return y
    left, right = product_factors(adapter)
    return y + (scale * ((x @ left.astype(x.dtype)) @ right.astype(x.dtype))).astype(
        y.dtype
    )


def count(adapters: Adapters) -> int:
    """How many numbers the adapters hold."""
    return sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(adapters))


def is_adapter(node: Any) -> bool:
    """Whether a node of a tree is an adapter."""
    return isinstance(node, LoRA | Spectral)


def check_targets(targets: Any) -> None:
    """Raises unless ``targets`` is what the function of that name makes."""
    if not isinstance(targets, Targets):
        raise TypeError(
            "`targets` must be made by `lora.targets(params, ranks, alpha=...)`; got "
            f"{type(targets).__name__}."
        )


def check_adapters(
    targets: Targets, adapters: Adapters, name: str = "adapters"
) -> None:
    """Raises unless there is one adapter of the right shape for every target."""
    check_targets(targets)
    if not isinstance(adapters, Mapping) or set(adapters) != set(targets):
        got = sorted(adapters) if isinstance(adapters, Mapping) else type(adapters)
        if hasattr(adapters, "adapters"):
            got = f"{type(adapters).__name__}, whose field `adapters` has them"
        raise ValueError(
            f"`{name}` must map the paths of `targets`, {sorted(targets)}, to "
            f"adapters; got {got}."
        )
    for path, target in targets.items():
        adapter = adapters[path]
        if not is_adapter(adapter):
            raise ValueError(
                f"`{name}` must hold LoRA or Spectral; at `{path}` got "
                f"{type(adapter).__name__}."
            )
        shapes = {name: jnp.shape(x) for name, x in adapter._asdict().items()}
        if not _fits(target.matrix_shape, shapes):
            raise ValueError(
                f"`{name}` at `{path}` must fit a kernel [*batch, in, out] = "
                f"{target.matrix_shape}; got {shapes}."
            )


def _fits(kernel: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    *batch, fan_in, fan_out = kernel
    left = shapes["a"] if "a" in shapes else shapes["v"]
    rank = left[-1] if left else 0
    if "a" in shapes:
        expected = {"a": (*batch, fan_in, rank), "b": (*batch, rank, fan_out)}
        return shapes == expected
    expected = {"u": (*batch, fan_out, rank), "v": (*batch, fan_in, rank)}
    return any(shapes == {"s": s, **expected} for s in (tuple(batch), (*batch, rank)))


def product_factors(adapter: Adapter) -> tuple[chex.Array, chex.Array]:
    """``[*batch, in, r]`` and ``[*batch, r, out]``, whose product is the update."""
    if isinstance(adapter, LoRA):
        return adapter.a, adapter.b
    s = adapter.s
    if s.ndim == adapter.v.ndim - 2:
        s = s[..., None]
    return adapter.v * s[..., None, :], jnp.swapaxes(adapter.u, -1, -2)


def _check_dense(x, kernel, adapter):
    if jnp.ndim(kernel) != 2:
        raise ValueError(
            f"`kernel` must be [in, out]; got shape {jnp.shape(kernel)}. Use `dense` "
            "inside a scan or a `jax.vmap` over stacked layers; other kernels take "
            "`lora.merge`."
        )
    fan_in = jnp.shape(kernel)[0]
    if jnp.shape(x)[-1:] != (fan_in,):
        raise ValueError(
            f"`x` must be [..., in] with in = {fan_in} for a kernel [in, out] = "
            f"{jnp.shape(kernel)}; got shape {jnp.shape(x)}. Is it the kernel of "
            "another layer?"
        )
    if adapter is None:
        return
    if not is_adapter(adapter):
        raise TypeError(
            "`adapter` must be a LoRA, a Spectral or None; got "
            f"{type(adapter).__name__}. Take `adapters[path]` with the path of the "
            "kernel."
        )
    shapes = {name: jnp.shape(leaf) for name, leaf in adapter._asdict().items()}
    if not _fits(jnp.shape(kernel), shapes):
        raise ValueError(
            f"`adapter` must fit a kernel [in, out] = {jnp.shape(kernel)}; got "
            f"{shapes}. Take `adapters[path]` with the path of that kernel."
        )


def _merged(targets, params, adapters, sign):
    check_adapters(targets, adapters)
    merged = {}
    for path, kernel in kernels(targets, params).items():
        update = sign * targets[path].scale * product(adapters[path])
        merged[path] = kernel.astype(jnp.result_type(kernel, update)) + update
    return replace_kernels(targets, params, merged)


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
