"""Herding: examples whose mean feature is the mean of all."""

import functools

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks
from optax_cl._core.orthonormal import unit_scale


def herding(features: chex.Array, num: int) -> chex.Array:
    r"""Chooses examples, one by one, that keep the mean feature of the class.

    With :math:`\phi_i` the features at length one, :math:`\mu` their mean and
    :math:`p_1, p_2, \dots` the choices,

    .. math:: p_t = \operatorname{argmin}_{i \notin \{p_s\}}
       \Big\| \mu - \tfrac1t \Big(\phi_i + \sum_{s<t} \phi_{p_s}\Big) \Big\| .

    The list is in the order of choice, so that its first m entries are what
    ``herding(features, m)`` gives: to make room for a new class, cut every list short.
    Of equals the first is chosen.

    Args:
      features: Of one class, ``[N, d]``; finite and not zero, since only directions
        count. Inside ``jit``, where that is not known, others are chosen last.
      num: How many to choose, from 1 to N.

    Returns:
      Indices of the chosen, int32 ``[num]``, none twice. ``num`` products of
      ``[N, d]`` with ``[d]``. Jittable; ``vmap`` over classes of one size.

    Raises:
      ValueError: For features that are no matrix, or (where values are known) zero or
        not finite; for ``num`` above N.
      TypeError: For features that are not real and floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl.replay import herding
      >>> features = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 1.2]])
      >>> print(herding(features, 2))
      [3 1]

    References:
      Rebuffi et al, `iCaRL: Incremental Classifier and Representation Learning
      <https://arxiv.org/abs/1611.07725>`_, 2017

      Welling, `Herding Dynamical Weights to Learn
      <https://doi.org/10.1145/1553374.1553517>`_, 2009

    Differs from the authors' code: no example is chosen twice, as in the paper.
    """
    checks.check_positive_int("num", num)
    shape, dtype = jnp.shape(features), jnp.result_type(features)
    if len(shape) != 2:
        raise ValueError(f"`features` must be `[N, d]`; got shape {shape}.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`features` must be real and floating; got dtype {dtype}.")
    if num > shape[0]:
        raise ValueError(
            f"`num` is {num}, but there are {shape[0]} features to choose from."
        )
    if not isinstance(features, jax.core.Tracer):
        usable = jnp.any(features != 0, axis=1) & jnp.all(jnp.isfinite(features), 1)
        if not jnp.all(usable):
            raise ValueError(
                "`features` must be finite and not zero, to have a direction; row "
                f"{int(jnp.argmin(usable))} is not. Leave such examples out."
            )
    return _herd(jnp.asarray(features), num)


@functools.partial(jax.jit, static_argnums=1)
def _herd(features, num):
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    # Scaled first, so that squares neither overflow nor vanish.
    rows = unit_scale(features[:, None])[:, 0]
    lengths = jnp.linalg.norm(rows, axis=1, keepdims=True)
    usable = (lengths > 0) & jnp.isfinite(lengths)
    unit = jnp.where(usable, rows / jnp.where(usable, lengths, 1), 0)
    mean = jnp.sum(unit, axis=0) / jnp.maximum(jnp.sum(usable), 1)
    last = jnp.finfo(unit.dtype).min

    def choose(t, carry):
        chosen, total, free = carry
        # All features are of one length, so that the distance to (t + 1) mu is least
        # where the product with what is missing of it is largest.
        missing = (t + 1) * mean - total
        score = jnp.einsum("nd,d->n", unit, missing, precision="highest")
        score = jnp.where(usable[:, 0], score, last)
        best = jnp.argmax(jnp.where(free, score, -jnp.inf)).astype(jnp.int32)
        return chosen.at[t].set(best), total + unit[best], free.at[best].set(False)

    start = (
        jnp.zeros(num, jnp.int32),
        jnp.zeros_like(mean),
        jnp.ones(len(unit), bool),
    )
    return jax.lax.fori_loop(0, num, choose, start)[0]
