"""The two parametrisations of an adapter turned into each other, and labels."""

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import decompositions
from optax_cl._core.linalg import PRECISION
from optax_cl.lora._adapters import (
    Adapters,
    LoRA,
    Spectral,
    is_adapter,
    product_factors,
)


def to_lora(adapters: Adapters) -> Adapters:
    """Every ``Spectral`` as the ``LoRA`` of the same update: ``a = v diag(s)``.

    Nothing is lost: the product is the same, bit for bit. ``LoRA`` passes unchanged.

    Args:
      adapters: ``{path: LoRA or Spectral}``, or any tree of adapters.

    Returns:
      The same tree with ``LoRA`` only, in the dtypes that came.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import lora
      >>> spectral = lora.Spectral(s=jnp.array(2.0), u=jnp.eye(3, 1), v=jnp.eye(2, 1))
      >>> print(lora.to_lora({"kernel": spectral})["kernel"].a)
      [[2.]
       [0.]]
    """
    return jax.tree.map(_to_lora, adapters, is_leaf=is_adapter)


def to_spectral(adapters: Adapters) -> Adapters:
    r"""Every ``LoRA`` as the ``Spectral`` of the same update, with orthonormal sides.

    A thin singular value decomposition that never forms the ``[in, out]`` product: with
    :math:`A = Q_A R_A` and :math:`B^\top = Q_B R_B`,

    .. math::
      R_A R_B^\top = X \operatorname{diag}(s)\, Y^\top, \qquad
      A B = (Q_A X) \operatorname{diag}(s)\, (Q_B Y)^\top.

    Nothing of the update is lost (it is equal to rounding); how it was divided between
    a and b is. The form with one scalar s exists only where all singular values are
    equal, so s comes as ``[*batch, r]``: sorted, largest first, not negative. Each
    column of v has its largest entry (the first of equals) positive, which settles the
    signs. A zero update has s = 0 and orthonormal u and v all the same. ``Spectral``
    passes unchanged.

    **Cost.** O((in + out) r^2 + r^3) for each kernel. Not meant to be differentiated:
    where singular values coincide, the derivative does not exist.

    Args:
      adapters: ``{path: LoRA or Spectral}``, or any tree of adapters.

    Returns:
      The same tree with ``Spectral`` only, in float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import lora
      >>> adapter = lora.LoRA(a=jnp.array([[3.0], [4.0]]), b=jnp.array([[0.0, 2.0]]))
      >>> spectral = lora.to_spectral({"kernel": adapter})["kernel"]
      >>> print(spectral.s, spectral.v.ravel())
      [10.] [0.6 0.8]
    """
    return jax.tree.map(_to_spectral, adapters, is_leaf=is_adapter)


def labels(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Labels for ``optax.partition`` that train a tree's adapters and nothing else.

    ``optax.masked`` alone would not do: it passes what it does not transform on as it
    came, so that raw gradients would be added to the frozen leaves.

    Args:
      tree: A tree with adapters in it, such as ``{"params": params, "adapters":
        adapters}``.

    Returns:
      The same structure, with ``"adapter"`` for every array inside an adapter and
      ``"frozen"`` for every other leaf.

    Raises:
      ValueError: If there is no adapter in the tree.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_cl import lora
      >>> adapters = {"kernel": lora.LoRA(a=jnp.ones((3, 1)), b=jnp.zeros((1, 2)))}
      >>> tree = {"params": {"kernel": jnp.ones((3, 2))}, "adapters": adapters}
      >>> lora.labels(tree)
      {'adapters': {'kernel': LoRA(a='adapter', b='adapter')},
       'params': {'kernel': 'frozen'}}
      >>> tx = optax.partition(
      ...     {"adapter": optax.adam(1e-3), "frozen": optax.set_to_zero()}, lora.labels)
      >>> state = tx.init(tree)
    """
    nodes = jax.tree.leaves(tree, is_leaf=is_adapter)
    if not any(is_adapter(node) for node in nodes):
        raise ValueError(
            "`labels` found no LoRA or Spectral in the tree; give it a tree that holds "
            'the adapters, as {"params": params, "adapters": adapters}.'
        )

    def one(node):
        if is_adapter(node):
            return jax.tree.map(lambda _: "adapter", node)
        return "frozen"

    return jax.tree.map(one, tree, is_leaf=is_adapter)


def _to_lora(adapter):
    _check(adapter)
    return LoRA(*product_factors(adapter))


def _to_spectral(adapter):
    _check(adapter)
    if isinstance(adapter, Spectral):
        return adapter
    wide = jnp.promote_types(jnp.result_type(*adapter), jnp.float32)
    q_a, r_a = decompositions.qr(adapter.a.astype(wide))
    q_b, r_b = decompositions.qr(jnp.swapaxes(adapter.b, -1, -2).astype(wide))
    core = jnp.matmul(r_a, jnp.swapaxes(r_b, -1, -2), precision=PRECISION)
    x, s, yt = decompositions.svd(core)
    v = jnp.matmul(q_a, x, precision=PRECISION)
    u = jnp.matmul(q_b, jnp.swapaxes(yt, -1, -2), precision=PRECISION)
    largest = jnp.argmax(jnp.abs(v), axis=-2, keepdims=True)
    sign = jnp.where(jnp.take_along_axis(v, largest, axis=-2) < 0, -1.0, 1.0)
    sign = sign.astype(wide)
    return Spectral(s=s, u=u * sign, v=v * sign)


def _check(adapter):
    if not is_adapter(adapter):
        raise TypeError(
            "`adapters` must hold LoRA or Spectral only; got "
            f"{type(adapter).__name__}. Is it the parameters?"
        )
