"""Random numbers of a lane.

Everything random derives from the lane's seed, what it is for, the task and the step,
and not from the arm: on one seed all arms start from the same weights and train on the
same batches, so that differences between them can be taken seed by seed.
"""

from typing import Any

import chex
import jax

# What random numbers are for: each has a stream of its own within one seed.
INIT, BATCH, MEMORY, STORE, COLLECT = range(5)


def key(seed: chex.Array, stream: int, *indices: Any) -> chex.PRNGKey:
    """The key of one stream of a seed, at some place (the task, the step).

    Args:
      seed: the lane's seed.
      stream: what the numbers are for.
      *indices: integers, arrays or not.

    Returns:
      A key.
    """
    result = jax.random.fold_in(jax.random.key(seed), stream)
    for index in indices:
        result = jax.random.fold_in(result, index)
    return result
