"""The smallest change of a kernel that makes it answer keys with values."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_cl._core import checks, decompositions
from optax_cl._core.linalg import lift


def edit_kernel(
    kernel: chex.Array,
    keys: chex.Array,
    values: chex.Array,
    covariance: chex.Array,
    *,
    damping: chex.Numeric = 0.0,
    ridge: chex.Numeric = 1e-5,
) -> chex.Array:
    r"""Makes a kernel map given inputs to given outputs, and others as before.

    A kernel W ``[in, out]`` is read as a memory that answers a key k with
    :math:`k^\top W`. Among all changes that make it answer each key with its value,
    this is the one that changes answers to ordinary inputs least, in the mean square:
    with :math:`C = \mathbb{E}[x x^\top]` the second moment of these inputs, K and V the
    rows of keys and values, and :math:`R = V - K W`,

    .. math::

        \operatorname{argmin}_\Delta \operatorname{tr}(\Delta^\top C \Delta)
        \ \text{s.t.}\ K \Delta = R
        \;=\; C^{-1} K^\top (K C^{-1} K^\top)^{-1} R .

    That is ROME, for one key. With ``damping`` :math:`\lambda > 0` the constraint gives
    way, :math:`\Delta = C^{-1} K^\top (\lambda I + K C^{-1} K^\top)^{-1} R`, which is
    MEMIT's update of one layer, :math:`(\lambda C + K^\top K)^{-1} K^\top R`: of one
    key with :math:`s = k^\top C^{-1} k` it writes the share :math:`s / (\lambda + s)`.

    **What holds.** Without damping :math:`k^\top(W + \Delta)` is the value, to rounding
    (1e-5 of it; 1e-3 of it where keys differ by a thousandth of their length, and their
    values by all). The change has the rank of the keys at most. An input x with
    :math:`x^\top C^{-1} k = 0` for every key, C with its ridge, is answered as before.

    Args:
      kernel: W, ``[in, out]``. Stacked layers by ``jax.vmap``.
      keys: K, ``[n, in]``, what the kernel is given where the fact is asked for. Use
        the same keys for the edit as for what it is held to: an average over contexts
        here and a single prompt there is how repeated edits break a model.
      values: V, ``[n, out]``, what it is to answer.
      covariance: C, ``[in, in]``, symmetric, not centred, over inputs whose answers are
        to stay, ``optax_cl.lora.input_covariances`` for one; up to a factor, which
        ``damping`` does see.
      damping: Lambda, at least 0.
      ridge: What is added to the diagonal of C, as a share of its mean: a second moment
        of activations is nearly singular, and its inverse in float32 nothing but
        rounding.

    Returns:
      The edited kernel, in its own dtype. One Cholesky factor of ``[in, in]``, one SVD
      of ``[in, n]`` and ``O(in^2 (n + out))``. Keys that depend on each other are
      answered in the least squares. A kernel that can't be edited (see below; inside
      ``jit`` values are not known, and nothing can be raised) comes back as it was.

    Raises:
      ValueError: For shapes that do not fit or numbers out of range; where values are
        known, for arrays that are not finite, a key of zeros that is to be answered
        with something else, or a covariance that is not positive semi-definite.
      TypeError: For arrays that are not real and floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl.editing import edit_kernel
      >>> kernel = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> key, value = jnp.array([[1.0, 1.0]]), jnp.array([[2.0, 1.0]])
      >>> # Inputs are mostly along the first axis, so the second one takes the change.
      >>> edited = edit_kernel(kernel, key, value, jnp.diag(jnp.array([99.0, 1.0])))
      >>> print(edited.round(2))
      [[1.01 0.  ]
       [0.99 1.  ]]
      >>> print((key @ edited).round(4))
      [[2. 1.]]

    References:
      Meng et al, `Locating and Editing Factual Associations in GPT
      <https://arxiv.org/abs/2202.05262>`_, 2022 (ROME)

      Meng et al, `Mass-Editing Memory in a Transformer
      <https://arxiv.org/abs/2210.07229>`_, 2023 (MEMIT)

    Differs from the papers' code: one key stands for a fact everywhere, where theirs
    takes an average over contexts in the direction and a plain prompt in the divisor.
    How a value is found, by descent on the model's output, is left to the caller.
    """
    _check(kernel, keys, values, covariance)
    checks.check_number("damping", damping, low=0.0)
    checks.check_number("ridge", ridge, low=0.0)
    dtype = jnp.result_type(kernel)
    wide = jnp.promote_types(dtype, jnp.float32)
    w, k, v, c, damping, ridge = (
        jnp.asarray(x, wide) for x in (kernel, keys, values, covariance, damping, ridge)
    )
    size = c.shape[-1]
    eye = jnp.eye(size, dtype=wide)
    lower = decompositions.cholesky(c + ridge * jnp.trace(c) / size * eye)
    _check_positive(lower)
    # With A = L^-1 K^T = P S Q^T: C^-1 K^T is L^-T A, and K C^-1 K^T is A^T A. That is
    # never formed: its rounding is a share of the squares, and would hide what tells
    # one key from a similar one.
    p, s, qt = decompositions.svd(decompositions.solve_lower(lower, k.T))
    has = s > jnp.max(s, initial=0) * max(k.shape) * jnp.finfo(wide).eps
    s = jnp.where(has, s, 1)
    gain = jnp.where(has, 1 / (s + damping / s), 0)
    answer = lift(p * gain[None], lift(qt, v - lift(k, w)))
    edited = w + decompositions.solve_transposed(lower, answer)
    # All or nothing: one key that is not finite leaves no column as it should be.
    return jnp.where(jnp.all(jnp.isfinite(edited)), edited, w).astype(dtype)


def _check(kernel, keys, values, covariance):
    named = {
        "kernel": kernel,
        "keys": keys,
        "values": values,
        "covariance": covariance,
    }
    for name, x in named.items():
        dtype = jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"`{name}` must be real and floating; got dtype {dtype}.")
    shape = jnp.shape(kernel)
    if len(shape) != 2:
        raise ValueError(
            f"`kernel` must be `[in, out]`; got shape {shape}. For stacked kernels use "
            "`jax.vmap`."
        )
    if jnp.ndim(keys) != 2:
        raise ValueError(
            f"`keys` must be `[n, in]`; got shape {jnp.shape(keys)}. Of a single fact "
            "give `keys[None]` and `values[None]`."
        )
    count = jnp.shape(keys)[0]
    expected = {
        "keys": (count, shape[0]),
        "values": (count, shape[1]),
        "covariance": (shape[0], shape[0]),
    }
    for name, wanted in expected.items():
        if jnp.shape(named[name]) != wanted:
            raise ValueError(
                f"`{name}` must be of shape {wanted} for a kernel of shape {shape} and "
                f"{count} keys; got {jnp.shape(named[name])}."
            )
    if any(isinstance(x, jax.core.Tracer) for x in named.values()):
        return
    for name, x in named.items():
        if not np.all(np.isfinite(np.asarray(x, np.float64))):
            raise ValueError(f"`{name}` must be finite.")
    c = np.asarray(covariance, np.float64)
    if not np.allclose(c, c.T, rtol=1e-3, atol=1e-3 * np.abs(c).max(initial=0)):
        raise ValueError("`covariance` must be symmetric.")
    zero = ~np.any(np.asarray(keys, np.float64), axis=1)
    unanswerable = zero & np.any(np.asarray(values, np.float64), axis=1)
    if np.any(unanswerable):
        raise ValueError(
            f"`keys` has zeros in row {int(np.argmax(unanswerable))}, which every "
            "kernel answers with zero. Leave it out."
        )


def _check_positive(lower):
    if not isinstance(lower, jax.core.Tracer) and not np.all(np.isfinite(lower)):
        raise ValueError(
            "`covariance` must be positive semi-definite, and not zero; with `ridge` "
            "on its diagonal it has no Cholesky factor. Raise `ridge` if it is one of "
            "few or badly rounded inputs."
        )
