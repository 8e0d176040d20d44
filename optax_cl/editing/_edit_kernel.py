"""The smallest change of a kernel that makes it answer keys with values."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_cl._core import checks, decompositions
from optax_cl._core.linalg import lift
from optax_cl._core.orthonormal import unit_scale


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
    (in float32 about 1e-6 of :math:`\|k\|\,\|W + \Delta\|`, which is much where keys
    differ little and their values a lot). The change has the rank of the keys at most.
    An input x with :math:`x^\top C^{-1} k = 0` for every key, C with its ridge, is
    answered as before.

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
      of ``[in + n, n]`` and ``O(in^2 (n + out))``. Keys of any lengths may stand beside
      each other. Those that depend on each other, to ``max(n, in)`` roundings, are
      answered in the least squares of what is missing over :math:`\sqrt s`: of what
      it would cost to write it for each key alone. A kernel that can't be edited (see
      below; inside ``jit`` values are not known, and nothing can be raised) comes back
      as it was.

    Raises:
      ValueError: For shapes that do not fit or numbers out of range; where values are
        known, for arrays that are not finite, a key of zeros (or of numbers too small
        for float32) that is to be answered with something else, a covariance that with
        its ridge is not positive definite, or an edit too large for the dtype.
      TypeError: For what is no real and floating array.

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
    for name, x in {"damping": damping, "ridge": ridge}.items():
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            x = x if x.ndim else np.asarray(x)  # an array's value is judged, too
        checks.check_number(name, x, low=0.0)
    wide = _check(kernel, keys, values, covariance)
    dtype = jnp.result_type(kernel)
    w, k, v, c, damping, ridge = (
        jnp.asarray(x, wide) for x in (kernel, keys, values, covariance, damping, ridge)
    )
    # Of the scale of C only the damping depends.
    root = jnp.sqrt(damping) * jnp.sqrt(jnp.max(jnp.abs(c), initial=0))
    c, size = unit_scale(c), c.shape[-1]
    eye = jnp.eye(size, dtype=wide)
    lower = decompositions.cholesky(c + ridge * jnp.trace(c) / size * eye)
    _check_positive(lower)
    # With A = L^-1 K^T and B = [A; sqrt(lambda) I], C^-1 K^T is L^-T A, and lambda I +
    # K C^-1 K^T is B^T B. That is never formed: its rounding is a share of the squares,
    # and would hide what tells one key from a similar one. With B D = P S Q^T, and P_A
    # the upper rows of P, it is A (B^T B)^-1 R = P_A S^-1 Q^T D R. D makes the columns
    # of length one: a short key would be taken for what rounding left of a long one.
    k, v, root = _even(k, v, jnp.full((len(k), 1), root))
    missing = v - lift(k, w)
    upper = decompositions.solve_lower(lower, k.T)
    b, missing = _even(jnp.concatenate([upper, jnp.diag(root[:, 0])]).T, missing)
    p, s, qt = decompositions.svd(b.T)
    has = s > jnp.max(s, initial=0) * max(k.shape) * jnp.finfo(wide).eps
    gain = jnp.where(has, 1 / jnp.where(has, s, 1), 0)
    answer = lift(p[:size] * gain[None], lift(qt, missing))
    edited = (w + decompositions.solve_transposed(lower, answer)).astype(dtype)
    # All or nothing: one key that is not finite leaves no column as it should be.
    finite = jnp.all(jnp.isfinite(edited))
    if not isinstance(finite, jax.core.Tracer) and not finite:
        raise ValueError(
            f"the edited kernel would not be finite in {dtype}: `values` are too large "
            "for their `keys`. Compare their lengths with those of answers and inputs, "
            "or give the kernel a wider dtype."
        )
    return jnp.where(finite, edited, jnp.asarray(kernel))


def _even(rows, *others):
    """Rows of length one, but for those of zeros; others by the same factors."""
    # By the largest entry first, so that no square is out of range, and in two factors,
    # since the inverse of a number near the largest float is below the smallest.
    for order in (np.inf, 2):
        size = jnp.linalg.norm(rows, order, axis=1, keepdims=True)
        root = jax.lax.rsqrt(jnp.where(size > 0, size, 1))
        rows, *others = (x * root * root for x in (rows, *others))
    return rows, *others


def _check(kernel, keys, values, covariance):
    """Raises for arrays that won't do; the dtype to compute in."""
    named = {
        "kernel": kernel,
        "keys": keys,
        "values": values,
        "covariance": covariance,
    }
    for name, x in named.items():
        if not hasattr(x, "dtype"):
            raise TypeError(f"`{name}` must be an array; got {type(x).__name__}.")
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
    wide = jnp.promote_types(jnp.result_type(kernel), jnp.float32)
    if any(isinstance(x, jax.core.Tracer) for x in named.values()):
        return wide
    limits = jnp.finfo(wide)
    for name, x in named.items():
        if not np.all(np.abs(np.asarray(x, np.float64)) <= float(limits.max)):
            raise ValueError(f"`{name}` must be finite in {wide}.")
    c = np.asarray(covariance, np.float64)
    if not np.allclose(c, c.T, rtol=1e-3, atol=1e-3 * np.abs(c).max(initial=0)):
        raise ValueError("`covariance` must be symmetric.")
    # XLA takes entries below the smallest normal number for zero.
    least = float(limits.tiny / limits.eps)
    zero = ~np.any(np.abs(np.asarray(keys, np.float64)) >= least, axis=1)
    unanswerable = zero & np.any(np.asarray(values, np.float64), axis=1)
    if np.any(unanswerable):
        raise ValueError(
            f"`keys` has zeros in row {int(np.argmax(unanswerable))}, or numbers too "
            f"small for {wide}, which every kernel answers with zero. Leave it out, or "
            "scale it and its value."
        )
    return wide


def _check_positive(lower):
    if not isinstance(lower, jax.core.Tracer) and not np.all(np.isfinite(lower)):
        raise ValueError(
            "`covariance` must be positive semi-definite, and not zero; with `ridge` "
            "on its diagonal it has no Cholesky factor. Raise `ridge` if it is one of "
            "few or badly rounded inputs."
        )
