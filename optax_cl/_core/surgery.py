"""Surgery on gradients: what two gradient trees of one model do to each other."""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks, trees


def project_conflict(
    g: chex.ArrayTree,
    ref: chex.ArrayTree,
    *,
    granularity: str = "global",
    strength: chex.Numeric = 1.0,
    gate: str = "conflict",
) -> chex.ArrayTree:
    r"""Removes from ``g`` what works against ``ref``, if anything does.

    The closest point to :math:`g` that does not oppose the reference :math:`r`:

    .. math::

        \operatorname{argmin}_v \|v - g\|^2 \ \text{s.t.}\ \langle v, r\rangle \ge 0
        \;=\; g - \frac{\min(\langle g, r\rangle, 0)}{\langle r, r\rangle}\, r

    A ``strength`` c under 1 takes that share of the step, which leaves
    :math:`(1-c)\langle g, r\rangle`. Only the direction of ``ref`` matters, not its
    length. ``g`` comes back bit for bit
    where it does not conflict, and where ``ref`` gives no direction to protect: it is
    zero, it (or ``g``) is not finite, or it is so small that float32 cannot hold its
    square (a norm under about ``3.4e-18 * sqrt(size)``).

    Args:
      g: Tree of floating-point arrays. Inner products are taken in float32 at least,
        since in bfloat16 their rounding flips the sign of small ones.
      ref: Tree with the structure and shapes of ``g``.
      granularity: ``"global"`` takes one inner product over the whole tree; ``"leaf"``
        projects every leaf by itself, which implies the global constraint and removes
        more.
      strength: Share c of the conflict to remove, ``[]``; in [0, 1] where concrete.
      gate: ``"conflict"`` acts where the inner product is negative; ``"always"`` takes
        the component along ``ref`` out whatever its sign (as OGD does).

    Returns:
      A tree with the structure, shapes and dtypes of ``g``.

    Raises:
      ValueError: If the structures or shapes differ, ``granularity`` or ``gate`` is
        unknown, or ``strength`` lies outside [0, 1].
      TypeError: If a leaf is not a real floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl._core.surgery import project_conflict
      >>> print(project_conflict(jnp.array([1., -2.]), jnp.array([0., 3.])))
      [1. 0.]
      >>> print(project_conflict(jnp.array([1., 2.]), jnp.array([0., 3.])))
      [1. 2.]
    """
    checks.check_choice("granularity", granularity, ("global", "leaf"))
    checks.check_same_shapes("ref", ref, g, "`g`")
    check_floating("g", g)
    check_floating("ref", ref)
    checks.check_choice("gate", gate, ("conflict", "always"))
    checks.check_number("strength", strength, low=0.0, high=1.0)

    def project(g, ref):
        return _project_jointly(g, ref, strength, gate)

    return jax.tree.map(project, g, ref) if granularity == "leaf" else project(g, ref)


def check_floating(name: str, tree: Any) -> None:
    """Raises unless every leaf is a real floating-point array."""

    def check(path, leaf):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"`{name}` must hold real floating-point arrays; at "
                f"`{checks.path_str(path)}` got {dtype}. Mask integer leaves out with "
                "`optax.masked`, and wrap complex ones in "
                "`optax.contrib.split_real_and_imaginary`."
            )

    jax.tree_util.tree_map_with_path(check, tree)


def _project_jointly(
    g: chex.ArrayTree, ref: chex.ArrayTree, strength: chex.Numeric, gate: str
) -> chex.ArrayTree:
    """Projects with one inner product over all leaves of ``g``."""
    dot, squared = trees.vdot(g, ref), trees.squared_norm(ref)
    # Squares below the smallest normal number are flushed to zero, so the squared norm
    # is short by up to `size * tiny`. Where that could be a part in a thousand or more,
    # dividing by it would inflate the correction instead of making it.
    size = sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(ref))
    floor = 1e3 * size * float(jnp.finfo(squared.dtype).tiny)
    has_direction = squared > floor
    # The division comes last, and all that the leaves read is its result: a compiler
    # copies cheap scalar expressions into the loop of every leaf, and a sum over all
    # leaves in each of them makes compile time quadratic (a minute for 200 leaves). A
    # division is not copied.
    removed = strength * (jnp.minimum(dot, 0.0) if gate == "conflict" else dot)
    coefficient = removed / jnp.where(has_direction, squared, jnp.inf)
    # Not finite: dot or squared norm overflowed, or an input was not finite.
    conflict = (coefficient != 0) & jnp.isfinite(coefficient)

    def project(g_leaf, ref_leaf):
        projected = g_leaf - coefficient * jnp.asarray(ref_leaf, coefficient.dtype)
        # A select, not a coefficient of zero: 0 * inf is NaN, and -0. - 0. is 0.
        return jnp.where(conflict, projected.astype(g_leaf.dtype), g_leaf)

    return jax.tree.map(lambda a, b: project(jnp.asarray(a), b), g, ref)
