"""Spectral adapters in a tree: what a leaf is, checks, and stacks of equal shapes."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_cl._core import checks, trees
from optax_cl.lora import _checks
from optax_cl.lora._adapters import Spectral, is_adapter
from optax_cl.lora._targets import Target, Targets

# A leaf that is a stack of so many matrices (scanned layers, say) goes by itself: to
# copy it beside others would cost more than it saves.
_STACK = 16


@dataclasses.dataclass(frozen=True)
class Role:
    """What a leaf is: a field of the adapter of some kernel, or neither."""

    path: str | None
    field: str | None


def spectral(tree: Any) -> Iterator[tuple[str, Spectral]]:
    """The ``Spectral`` adapters in a tree, with the paths of their kernels."""
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_spectral):
        if _is_spectral(node):
            yield _kernel_path(path), node


def _is_spectral(node):
    return isinstance(node, Spectral)


def _kernel_path(path):
    key = getattr(path[-1], "key", None) if path else None
    if not isinstance(key, str):
        raise ValueError(
            "a `Spectral` adapter must stand in a dictionary under the path of its "
            f"kernel; found one at `{checks.path_str(path)}`."
        )
    return key


def roles(tree: Any) -> Any:
    """A tree like ``tree`` with a ``Role`` for every leaf."""

    def visit(path, node):
        if not _is_spectral(node):
            return Role(None, None)
        name = _kernel_path(path)
        return Spectral(
            *(
                jax.tree.map(lambda _, f=field: Role(name, f), leaf)
                for field, leaf in node._asdict().items()
            )
        )

    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=_is_spectral)


def map_roles(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``function(role, leaf, *others)`` at every leaf of ``tree``."""
    return jax.tree.map(function, roles(tree), tree, *rest)


def shapes(target: Target, field: str) -> tuple[tuple[int, ...], ...]:
    """The shapes that a field of the adapter of a kernel may have."""
    *batch, fan_in, fan_out = target.matrix_shape
    if field == "s":
        return (*batch,), (*batch, target.rank)
    return ((*batch, fan_out if field == "u" else fan_in, target.rank),)


def check_fit(targets: Targets, params: Any) -> None:
    """Raises unless every ``Spectral`` adapter has the shapes of its target.

    A tree may have none (a mask hides them, say), but then no kernel or ``LoRA`` may
    stand where one belongs: they would be trained as if there was no method.
    """
    _checks.check_not_start(params)
    found = list(spectral(params))
    if not found:
        _check_no_other(targets, params)
    for path, adapter in found:
        if path not in targets:
            raise ValueError(
                f"`params` has a `Spectral` adapter at `{path}`, which is none of "
                f"`targets`, {sorted(targets)}."
            )
        for field, leaf in adapter._asdict().items():
            if trees.is_hole(leaf):
                continue
            expected = shapes(targets[path], field)
            _checks.check_shape(f"{path}/{field}", leaf, *expected, seeds=False)
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise TypeError(
                    f"`{path}/{field}` must be real and floating; got dtype "
                    f"{jnp.result_type(leaf)}."
                )


def _check_no_other(targets: Targets, params: Any) -> None:
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_adapter)
    for path, node in nodes:
        name = checks.path_str(path)
        if is_adapter(node):
            # It stands under the path of its kernel, at any depth.
            if path and getattr(path[-1], "key", None) in targets:
                raise ValueError(
                    f"`params` has a LoRA at `{name}`, but this method trains "
                    "`Spectral` adapters, as `lora.eblora_init` makes them; or convert "
                    "by `lora.to_spectral`."
                )
        elif name in targets and jnp.shape(node) == targets[name].shape:
            raise ValueError(
                f"`params` must be the adapters, but at `{name}` there is the kernel "
                "itself. Make adapters with `lora.eblora_init(targets, gradients)`."
            )


def check_orthonormal(params: Any) -> None:
    """Raises if a factor whose values are known is off the manifold."""
    for path, adapter in spectral(params):
        for field in ("u", "v"):
            _checks.check_orthonormal(f"{path}/{field}", getattr(adapter, field))


class Factors(NamedTuple):
    """The leaves of a tree, and which of them are factors of one kind."""

    structure: Any
    points: list[Any]
    memories: list[Any]
    groups: list[list[int]]  # of one shape, dtype and shape of memory; or one leaf


def factors_of(updates: Any, points: Any, bases: Any) -> Factors:
    """The factors among ``updates``, with their points and (not None) their bases."""
    structure = jax.tree.structure(updates)
    kinds = structure.flatten_up_to(roles(updates))
    leaves = structure.flatten_up_to(points)
    memories: list[Any] = [None] * len(leaves)
    if bases is not None:
        memories = structure.flatten_up_to(bases)
        memories = [None if trees.is_masked(m) else m for m in memories]
    groups: dict[Any, list[int]] = {}
    for i, (role, x, m) in enumerate(zip(kinds, leaves, memories, strict=True)):
        if role.field in ("u", "v"):
            kind = (x.shape, x.dtype, None if m is None else m.shape)
            if math.prod(x.shape[:-2]) >= _STACK:
                kind = (*kind, i)
            groups.setdefault(kind, []).append(i)
    return Factors(structure, leaves, memories, list(groups.values()))


def stack(members: list[Any]) -> Any:
    """Factors of a group in one array; a single one as it is, without a copy."""
    return members[0] if len(members) == 1 else jnp.stack(members)


def unstack(results: Any, count: int) -> list[Any]:
    """What became of each of the factors that ``stack`` had put in one array."""
    return [results] if count == 1 else list(results)


def on_factors(
    function: Callable[..., Any], factors: Factors, tree: Any, *, has_aux: bool = False
) -> Any:
    """``function(x, z, memory=M)`` at the factors in ``tree``; the rest as it is.

    Factors of one shape are stacked: one program for all layers, however many. With
    ``has_aux`` the function returns a pair, whose second entries come back in a list.
    """
    leaves = factors.structure.flatten_up_to(tree)
    aux = []
    for group in factors.groups:
        present = [i for i in group if not trees.is_hole(leaves[i])]
        if not present:
            continue
        x = stack([factors.points[i] for i in present])
        z = stack([leaves[i] for i in present])
        memory = None
        if factors.memories[present[0]] is not None:
            memory = stack([factors.memories[i] for i in present])
        results = function(x, z, memory=memory)
        if has_aux:
            results, beside = results
            aux.append(beside)
        for i, result in zip(present, unstack(results, len(present)), strict=True):
            leaves[i] = result
    mapped = factors.structure.unflatten(leaves)
    return (mapped, aux) if has_aux else mapped
