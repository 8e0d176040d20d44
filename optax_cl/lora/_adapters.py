r"""Low-rank adapters as plain trees beside the parameters they adapt.

The parameters stay as they are and are not trained; the adapters are a dictionary from
the path of a kernel to a small named tuple. A kernel W ``[in, out]`` is used as

.. math:: W + c\,A B \qquad\text{or}\qquad W + c\,V \operatorname{diag}(s)\,U^\top

with :math:`c` the scale (``alpha / rank``). Papers that write ``y = W x`` have the
transposes: their A is ``a.T`` here, their B is ``b.T``.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_cl._core.linalg import PRECISION
from optax_cl.lora._targets import Targets, check_targets, kernels, replace_kernels


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
