"""What the starts of adapters share: singular vectors, magnitude, absorption."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks, decompositions, trees
from optax_cl._core.linalg import PRECISION
from optax_cl.lora._adapters import Adapters, LoRA, product, unmerge
from optax_cl.lora._checks import check_each
from optax_cl.lora._targets import Target, Targets

# Which singular vectors the factors take: (of a, of b), as multiples of the rank.
# Papers name the factors of y = W x, whose A is a.T here and whose B is b.T; the names
# say where A and B start.
ORDERS = {"ArB2r": (0, 1), "A2rBr": (1, 0), "ArBr": (0, 0)}

# A full decomposition of a 1024 x 1024 matrix takes about a second on a CPU core.
_EXACT_UP_TO = 1024
_POWER_ITERATIONS = 4


class Start(NamedTuple):
    """Where the training of adapters starts.

    Merged, the two are the model as it was. Train ``adapters``, with an optimizer state
    of its own (``tx.init(start.adapters)``: moments of earlier factors mean nothing to
    new ones), and keep weight decay off them: they hold a share of the weights.
    """

    params: Any  # like params; the targeted kernels without the product of the adapters
    adapters: Adapters  # {path: LoRA}, in float32 or wider
    diagnostics: Any = None  # what the method has to say of its start


def absorb(
    targets: Targets, params: chex.ArrayTree, adapters: Adapters
) -> chex.ArrayTree:
    r"""Takes the product of fresh adapters out of the weights they are added to.

    .. math:: W_{\text{frozen}} = W - c\,A_0 B_0

    so that the model is unchanged when training starts. The difference is taken in
    float32 and stored in the dtype of the weights. Merged again at once, a float32
    kernel is back to a few units in the last place. A bfloat16 kernel is back to
    :math:`2^{-7} (|W| + c\,|A_0 B_0|)` entry by entry, since each of the two storings
    rounds by at most :math:`2^{-8}` of what it stores.

    Storing the weights and the *initial* factors is enough to continue a run: absorbed
    again by the same call, they give the same frozen weights, bit for bit::

        frozen = absorb(targets, params, initial)
        params = merge(targets, frozen, trained)

    Args:
      targets: The kernels that ``adapters`` belong to.
      params: Parameters of the model.
      adapters: The adapters before training, as in ``Start.adapters``.

    Returns:
      Parameters of the same structure and dtypes.

    Raises:
      ValueError: If the adapters do not fit the targets.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import lora
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> chosen = lora.targets(params, {"kernel": 1}, alpha=2.0)
      >>> initial = {"kernel": lora.LoRA(jnp.ones((4, 1)), jnp.ones((1, 4)))}
      >>> frozen = lora.absorb(chosen, params, initial)
      >>> print(frozen["kernel"][0], lora.merge(chosen, frozen, initial)["kernel"][0])
      [-1. -1. -1. -1.] [1. 1. 1. 1.]
    """
    return unmerge(targets, params, adapters)


def factor_dtype(kernel: chex.Array) -> Any:
    """The dtype of adapters: float32, or wider for wider kernels."""
    return trees.importance_dtype(kernel.dtype)


def singular_vectors(
    matrix: chex.Array, k: int, svd: str, key: chex.PRNGKey | None
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """The k leading singular triplets, with a fixed sign.

    The pair (u, v) of a triplet is free up to the sign of both. Here the entry of
    largest magnitude of the input side is positive.

    Args:
      matrix: ``[*batch, in, out]``, float32 or wider.
      k: How many, at most ``min(in, out)``.
      svd: ``"exact"``, ``"randomized"`` or ``"auto"``.
      key: For the random test matrix; None is a fixed one.

    Returns:
      ``[*batch, in, k]``, ``[*batch, k]`` and ``[*batch, k, out]``. Of a matrix that is
      zero or not finite: zeros between orthonormal vectors, never NaN.
    """
    top = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
    usable = jnp.isfinite(top) & (top > 0)
    scale = jnp.where(usable, top, 1.0)
    # Scaled to entries of at most one, so that products neither over- nor underflow.
    scaled = jnp.where(usable, matrix / scale, 0.0)
    smaller = min(matrix.shape[-2:])
    if svd == "randomized" or (svd == "auto" and smaller > _EXACT_UP_TO):
        left, s, right = _randomized(scaled, min(2 * k, smaller), key)
    else:
        left, s, right = decompositions.svd(scaled)
    left, s, right = left[..., :k], s[..., :k], right[..., :k, :]
    largest = jnp.argmax(jnp.abs(left), axis=-2, keepdims=True)
    sign = jnp.sign(jnp.take_along_axis(left, largest, axis=-2))
    return left * sign, s * scale[..., 0], jnp.swapaxes(sign, -1, -2) * right


@functools.partial(jax.jit, static_argnames=("rank", "order", "scaling", "svd"))
def gradient_adapter(
    kernel: chex.Array,
    gradient: chex.Array,
    *,
    rank: int,
    order: str,
    scaling: str,
    gamma: chex.Numeric = 1.0,
    svd: str,
    key: chex.PRNGKey | None,
) -> tuple[LoRA, chex.Array]:
    """Singular vectors of a gradient as an adapter; the singular values are not used.

    Args:
      kernel: ``[*batch, in, out]``.
      gradient: ``[*batch, in, out]``.
      rank: Of the adapter.
      order: One of ``ORDERS``.
      scaling: ``"loram"``, ``"stable"`` (with ``gamma``) or ``"none"``.
      gamma: Divides the magnitude under ``"stable"``.
      svd: See ``singular_vectors``.
      key: See ``singular_vectors``.

    Returns:
      The adapter, in float32 or wider; and bool ``[*batch]``, whether the gradient has
      as many directions, by the usual rule for a rank.
    """
    gradient = gradient.astype(factor_dtype(kernel))
    first_a, first_b = (rank * block for block in ORDERS[order])
    k = min(2 * rank, *gradient.shape[-2:])
    left, s, right = singular_vectors(gradient, k, svd, key)
    rounding = max(gradient.shape[-2:]) * jnp.finfo(s.dtype).eps
    last = (1 + max(ORDERS[order])) * rank - 1
    enough = s[..., last] > rounding * s[..., 0]
    vectors = LoRA(
        a=left[..., first_a : first_a + rank],
        b=right[..., first_b : first_b + rank, :],
    )
    if scaling == "loram":
        vectors = scale_like_kernel(vectors, kernel)
    elif scaling == "stable":
        beta = kernel.shape[-1] ** 0.25 / jnp.sqrt(gamma)
        vectors = jax.tree.map(lambda x: beta.astype(x.dtype) * x, vectors)
    return vectors, enough


def scale_like_kernel(factors: LoRA, kernel: chex.Array) -> LoRA:
    r"""Factors whose product has :math:`\rho` times the variance of the kernel.

    .. math::

        \beta = \left(\rho\,\frac{\operatorname{Var} W}{\operatorname{Var} AB}
        \right)^{1/4}, \qquad \rho = \frac{\log r}{\log \min(in, out)}

    with both factors scaled by :math:`\beta`, and the unbiased variance.
    """
    rank, smaller = factors.a.shape[-1], min(kernel.shape[-2:])
    rho = math.log(rank) / math.log(smaller)
    of_kernel = _variance(kernel.astype(factors.a.dtype))
    of_product = _variance(product(factors))
    ratio = of_kernel / jnp.where(of_product > 0, of_product, 1.0)
    beta = (rho * ratio) ** 0.25
    return LoRA(a=beta * factors.a, b=beta * factors.b)


def check_disjoint(targets: Targets, order: str, otherwise: str) -> None:
    """Raises if a rank leaves no room for two disjoint blocks of singular vectors."""
    blocks = 1 + max(ORDERS[order])
    for path, target in targets.items():
        *_, fan_in, fan_out = target.matrix_shape
        if blocks * target.rank > min(fan_in, fan_out):
            raise ValueError(
                f"`{path}` has rank {target.rank}, but two disjoint blocks of singular "
                f"vectors need 2 * rank <= min(in, out), and as a matrix it is "
                f"{fan_in}x{fan_out}. Give its pattern in `targets` a rank of at most "
                f"{min(fan_in, fan_out) // 2}, or say {otherwise}."
            )


def check_magnitude(targets: Targets, matrices: Mapping[str, chex.Array]) -> None:
    """Raises if the magnitude of a kernel would make its adapter zero for ever."""
    for path, target in targets.items():
        if target.rank == 1:
            raise ValueError(
                f"`{path}` has rank 1, whose magnitude log(rank) is 0: both factors "
                "would be zero, and their gradients too. Choose a rank of 2 or more, "
                "or a start scaled otherwise (`lora_ga_init`, `pissa_init`)."
            )
    check_each(
        matrices,
        _varies,
        "the kernel is constant (or NaN), so its variance gives no magnitude: both "
        "factors would be zero, and their gradients too. Initialise it, or leave it "
        "out of `targets`.",
    )


def gradient_adapters(
    targets: Targets,
    weights: Mapping[str, chex.Array],
    gradients: Mapping[str, chex.Array],
    *,
    order: str,
    **settings: Any,
) -> Adapters:
    """``gradient_adapter`` of every target.

    Warns, where values are known, if a gradient has too few directions.
    """
    adapters, enough = {}, {}
    for path, target in targets.items():
        adapters[path], enough[path] = gradient_adapter(
            weights[path], gradients[path], rank=target.rank, order=order, **settings
        )
    if any(isinstance(x, jax.core.Tracer) for x in enough.values()):
        return adapters
    poor = [
        path for path, verdict in jax.device_get(enough).items() if not verdict.all()
    ]
    if poor:
        wanted = (1 + max(ORDERS[order])) * targets[poor[0]].rank
        checks.warn(
            f"the mean gradient at `{poor[0]}` has a rank below {wanted}, as many "
            "singular vectors as its adapter starts in (in all, "
            f"{len(poor)} of {len(targets)} targets): those beyond its rank are "
            "orthonormal, and mean nothing. Take the mean over more examples, or give "
            "the pattern a smaller rank."
        )
    return adapters


def check_svd(svd: str) -> None:
    """Raises for an unknown way to decompose."""
    checks.check_choice("svd", svd, ("auto", "exact", "randomized"))


def per_target(
    targets: Targets, function: Any, *matrices: Mapping[str, Any]
) -> Adapters:
    """One adapter a target: ``function(target, *its entries)``."""

    def one(path: str, target: Target):
        return function(target, *(each[path] for each in matrices))

    return {path: one(path, target) for path, target in targets.items()}


@jax.jit
def _varies(matrix):
    return jnp.max(matrix, axis=(-2, -1)) > jnp.min(matrix, axis=(-2, -1))


def _variance(matrix: chex.Array) -> chex.Array:
    return jnp.var(matrix, axis=(-2, -1), ddof=1, keepdims=True)


def _randomized(matrix, width, key):
    """A truncated decomposition by a random range finder with power iterations.

    References:
      Halko et al, `Finding structure with randomness
      <https://arxiv.org/abs/0909.4061>`_, 2009
    """
    key = jax.random.key(0) if key is None else key

    def times(a, b):
        return jnp.matmul(a, b, precision=PRECISION)

    transposed = jnp.swapaxes(matrix, -1, -2)
    shape = (*matrix.shape[:-2], matrix.shape[-1], width)
    test = jax.random.normal(key, shape, matrix.dtype)
    basis, _ = decompositions.qr(times(matrix, test))
    for _ in range(_POWER_ITERATIONS):
        # Orthonormal in between, or all columns would turn to the leading vector.
        other, _ = decompositions.qr(times(transposed, basis))
        basis, _ = decompositions.qr(times(matrix, other))
    small = times(jnp.swapaxes(basis, -1, -2), matrix)
    left, s, right = decompositions.svd(small)
    return times(basis, left), s, right
