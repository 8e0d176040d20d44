"""Arrays for tests, drawn and compared by NumPy, so that nothing is compiled for it."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def orthonormal(seed, *shape, dtype=jnp.float32, off=None):
    """Orthonormal columns, ``[..., d, r]``; off those of ``off``, if given."""
    columns = np.random.default_rng(seed).normal(size=shape)
    if off is not None:
        columns = np.concatenate([np.asarray(off, np.float64), columns], axis=-1)
    q, _ = np.linalg.qr(columns)
    return jnp.asarray(q[..., -shape[-1] :].astype(dtype))


def distance(a, b):
    """The largest difference between entries of two trees."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.abs(np.float64(x) - np.float64(y)).max() for x, y in pairs)
