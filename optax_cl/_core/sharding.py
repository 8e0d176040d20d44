"""Where the arrays of an optimizer state live when the parameters are sharded."""

from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optax_cl._core import checks


def state_sharding(
    tx: optax.GradientTransformation,
    params: optax.Params,
    shardings: Any,
    *,
    mesh: Mesh | None = None,
) -> optax.OptState:
    r"""The shardings of ``tx.init(params)``, given those of the parameters.

    A state holds more than copies of the parameters: banks with one entry for each
    task, bases, counts. A leaf of the state belongs to the parameter whose path ends
    its own (``0/mu/dense/kernel`` to ``dense/kernel``). With that parameter's shape
    ``[*shape]`` and spec ``P(*spec)``:

    ==================  ==========================  ====================================
    leaf of the state   for instance                sharding
    ==================  ==========================  ====================================
    ``[*shape]``        moments, importance         ``P(*spec)``
    ``[K, *shape]``     bank of K tasks             ``P(None, *spec)``
    ``[..., in, r]``    basis of ``[..., in, out]`` ``P(*spec[:-1], None)``
    anything else       counts, coefficients        replicated
    ==================  ==========================  ====================================

    The third row is read off the shapes: all axes but the last agree. A basis therefore
    follows the fan-in axis of a dense kernel, or of a stack of them; a basis whose
    kernel has several fan-in axes (convolutions), or another layout, is replicated.
    Every choice is only one of layout and never changes a result.

    Args:
      tx: Any gradient transformation.
      params: The parameters, or their ``jax.ShapeDtypeStruct``.
      shardings: A tree like ``params`` of ``NamedSharding``; or of ``PartitionSpec``,
        and then ``mesh`` is needed.
      mesh: The mesh of the specs.

    Returns:
      A tree like ``tx.init(params)`` of ``NamedSharding``, for ``jax.device_put``,
      ``in_shardings`` and ``out_shardings`` of ``jax.jit``, or the abstract target of a
      checkpoint.

    Raises:
      TypeError: If a leaf of ``shardings`` is neither of the two.
      ValueError: If the trees differ in structure, if a ``PartitionSpec`` comes without
        ``mesh`` or has more entries than its parameter has axes, or if there is neither
        a parameter nor a mesh.

    Example:
      >>> import jax, jax.numpy as jnp, optax_cl
      >>> from jax.sharding import PartitionSpec as P
      >>> from optax_cl._core.sharding import state_sharding
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> params = {"kernel": jnp.zeros((4, 3))}
      >>> tx = optax_cl.ewc(1.0, anchors="separate", capacity=5)
      >>> state = state_sharding(tx, params, {"kernel": P("model", None)}, mesh=mesh)
      >>> tuple(state.memory.importance["kernel"].spec), tuple(state.count.spec)
      ((None, 'model', None), ())
    """
    by_path, any_mesh = _by_path(params, shardings, mesh)
    replicated = NamedSharding(any_mesh, PartitionSpec())

    def place(path, leaf):
        for start in range(len(path) + 1):
            if path[start:] in by_path:
                shape, sharding = by_path[path[start:]]
                return _follow(leaf.shape, shape, sharding) or replicated
        return replicated

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))


def _by_path(params, shardings, mesh):
    """Shape and ``NamedSharding`` of every parameter, by its path; and the mesh."""
    if jax.tree.structure(params) != jax.tree.structure(shardings):
        raise ValueError(
            "`shardings` must have the tree structure of `params`; got "
            f"{jax.tree.structure(shardings)}, expected {jax.tree.structure(params)}."
        )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {}
    for (path, p), given in zip(leaves, jax.tree.leaves(shardings), strict=True):
        named = _named(checks.path_str(path), len(p.shape), given, mesh)
        found[path] = (tuple(p.shape), named)
        mesh = named.mesh if mesh is None else mesh
    if mesh is None:
        raise ValueError(
            "`params` has no leaf, so `shardings` names no mesh. Pass `mesh`."
        )
    return found, mesh


def _named(path: str, ndim: int, given: Any, mesh: Mesh | None) -> NamedSharding:
    if isinstance(given, PartitionSpec):
        if mesh is None:
            raise ValueError(
                f"`shardings` has a PartitionSpec at `{path}`, which names no devices. "
                "Pass `mesh`, or give NamedShardings."
            )
        given = NamedSharding(mesh, given)
    if not isinstance(given, NamedSharding):
        raise TypeError(
            f"`shardings` must hold jax.sharding.NamedSharding or PartitionSpec; at "
            f"`{path}` got {given!r} of type {type(given).__name__}."
        )
    if len(given.spec) > ndim:
        raise ValueError(
            f"`shardings` at `{path}` is {given.spec}, with more entries than the "
            f"parameter has axes ({ndim})."
        )
    return given


def _follow(leaf: tuple[int, ...], param: tuple[int, ...], sharding: NamedSharding):
    """The sharding of a state's leaf after that of its parameter; None if unrelated."""
    spec = (*sharding.spec, *[None] * (len(param) - len(sharding.spec)))
    if leaf == param:
        pass
    elif leaf[1:] == param and len(leaf) == len(param) + 1:
        spec = (None, *spec)
    elif len(leaf) == len(param) >= 2 and leaf[:-1] == param[:-1]:
        spec = (*spec[:-1], None)
    else:
        return None
    return NamedSharding(
        sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind
    )
