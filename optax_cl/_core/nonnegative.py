"""Small quadratic programs, solved inside a compiled step."""

import chex
import jax
import jax.numpy as jnp

# Of the machine epsilon. Sums over millions of entries leave Gram matrices indefinite
# by some of these; with a quarter of it, errors of 1e-6 gave garbage in float32.
_RIDGE = 32
# Of the machine epsilon: what the gradient of the objective may miss zero by.
_SLACK = 4


# Called by itself, outside any jit, the loop would be compiled anew each time.
@jax.jit
def minimise(matrix: chex.Array, linear: chex.Array) -> chex.Array:
    r"""Minimises a convex quadratic over the non-negative orthant.

    .. math::

        \operatorname{argmin}_{x \ge 0}\; \tfrac12 x^\top (A + \varepsilon I)\, x +
        b^\top x, \qquad \varepsilon = 32\, u \operatorname{tr}(A) / K,

    with u the machine epsilon: in float32 the ridge is 4e-6 of the mean of the
    diagonal. It picks one solution where A is singular (equal rows of what A is the
    Gram matrix of), and bounds it where A is indefinite by rounding.

    An active-set method (Lawson and Hanson's, on the Gram matrix), started from all
    that b alone would have positive. It is exact after finitely many systems of
    equations; a few, where projected gradients and coordinate descent take thousands
    of sweeps on nearly parallel rows. Every iterate is feasible, and after 3 K + 3
    systems the last one is returned; that was not seen.

    No library is called: on a CPU the decompositions of a vmapped LAPACK call may wait
    for those of another device.

    Args:
      matrix: A, symmetric and positive semi-definite, ``[K, K]``, finite. Rows should
        be scaled to a common diagonal.
      linear: b, ``[K]``, finite.

    Returns:
      x, ``[K]``, at least 0; zeros where b is nowhere negative. With w = (A + eps I) x
      + b: w = 0 where x > 0, and w >= 0 elsewhere, to a few roundings of |A| x + |b|.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl._core.nonnegative import minimise
      >>> print(minimise(jnp.eye(2), jnp.array([-1.0, 1.0])).round(3))
      [1. 0.]

    References:
      Lawson and Hanson, `Solving Least Squares Problems
      <https://doi.org/10.1137/1.9781611971217>`_, 1974, chapter 23
    """
    size = linear.shape[0]
    dtype = jnp.result_type(matrix, linear)
    unit = float(jnp.finfo(dtype).eps)
    ridge = _RIDGE * unit * jnp.trace(matrix) / size
    matrix = matrix + ridge * jnp.eye(size, dtype=dtype)
    order = jnp.arange(size)

    def unfinished(carry):
        _, _, done, systems = carry
        return ~done & (systems < 3 * size + 3)

    def step(carry):
        x, free, _, systems = carry
        target = _solve_on(free, matrix, -linear, ridge)
        # Go to the minimum over the free entries, or towards it until the first of
        # them is zero, which is free no longer.
        blocking = free & (target <= 0)
        blocked = jnp.any(blocking)
        gap = jnp.where(blocking & (x > 0), x - target, 1)
        share = jnp.where(blocking, x / gap, jnp.inf)
        first = jnp.min(share)
        moved = jnp.where(
            blocked, x + jnp.where(blocked, first, 1) * (target - x), target
        )
        stays = free & ~(blocking & (share <= first))
        # At the minimum the gradient says which entry to free next, if any.
        scale = _times(jnp.abs(matrix), jnp.abs(target)) + jnp.abs(linear)
        gradient = _times(matrix, target) + linear
        gain = jnp.where(free, 0, -gradient - _SLACK * unit * scale)
        enters = ~blocked & (jnp.max(gain) > 0) & (order == jnp.argmax(gain))
        done = ~blocked & ~jnp.any(enters)
        x = jnp.where(stays, jnp.maximum(moved, 0), 0)
        return x, stays | enters, done, systems + 1

    # The start is made of `linear`, so that it varies over the devices of a `shard_map`
    # where `linear` does.
    free = linear < 0
    start = 0 * linear, free, ~jnp.any(free), jnp.zeros([], jnp.int32)
    return jax.lax.while_loop(unfinished, step, start)[0]


def _solve_on(
    free: chex.Array, matrix: chex.Array, right: chex.Array, ridge: chex.Array
) -> chex.Array:
    """The x with ``(A x)_free = right_free``, and zero elsewhere.

    Elimination without pivoting, which is stable for positive definite matrices. A
    pivot under the ridge is of an indefinite matrix; its entry is zero too.
    """
    size = right.shape[0]
    order = jnp.arange(size)
    both = free[:, None] & free[None, :]
    alone = jnp.eye(size, size + 1, dtype=matrix.dtype)
    rows = jnp.where(both, matrix, alone[:, :size])
    rows = jnp.concatenate([rows, jnp.where(free, right, 0)[:, None]], axis=1)

    def eliminate(k, rows):
        row = jnp.where(rows[k, k] > ridge / 2, rows[k], alone[k])
        factor = jnp.where(order > k, rows[:, k] / row[k], 0)
        return rows.at[k].set(row) - factor[:, None] * row[None, :]

    rows = jax.lax.fori_loop(0, size, eliminate, rows)

    def substitute(i, x):
        k = size - 1 - i
        known = jnp.sum(rows[k, :size] * x)  # x is still zero up to k
        return x.at[k].set((rows[k, size] - known) / rows[k, k])

    return jax.lax.fori_loop(0, size, substitute, 0 * right)


def _times(matrix: chex.Array, x: chex.Array) -> chex.Array:
    """A product in full precision, which `@` is not on every device."""
    return jnp.sum(matrix * x[None, :], axis=1)
