import jax.numpy as jnp
import pytest

from optax_cl._core import statistics, tasks


@pytest.fixture
def finish_task():
    """Ends a task with a given importance in place of an estimated one."""

    def finish(opt_state, params, importance, *, num_items=1.0, estimator="exact"):
        num = jnp.float32(num_items)
        result = statistics.Fisher(importance, num, num)
        stats = tasks.Statistics(num, {f"fisher/{estimator}": result})
        return tasks.begin_task(tasks.end_task(opt_state, params, stats), params)

    return finish
