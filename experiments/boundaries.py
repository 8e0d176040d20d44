"""Task boundaries inside jitted lanes: statistics from stacked batches in one scan."""

import chex
import jax
import jax.numpy as jnp
import optax

import optax_cl
from optax_cl._core import tasks


def collect(
    opt_state: optax.OptState,
    params: optax.Params,
    batches: chex.ArrayTree,
    *,
    task: optax_cl.Task,
    key: chex.PRNGKey,
) -> optax_cl.Statistics:
    """``optax_cl.collect`` for batches that are stacked and may be tracers.

    The library's function streams from the host, one call a batch; inside a trace that
    loop would be unrolled into as many copies of a backward pass. Here every pass is
    one ``jax.lax.scan`` over the same steps, with the same keys, so that the result is
    the same and compiles in the time of one batch.

    Args:
      opt_state: Any optimizer state.
      params: The parameters at the end of the task.
      batches: Batches of the finished task, each leaf ``[batches, B, ...]``.
      task: Pure functions of the task.
      key: For labels sampled from the model.

    Returns:
      ``Statistics`` for ``optax_cl.end_task``.
    """
    states = list(tasks._find(opt_state))
    boundaries = [tasks._BOUNDARIES[type(state)] for state in states]
    plans = [b.passes(s) for b, s in zip(boundaries, states, strict=True)]
    trainable, hidden = tasks._split_trainable(params, boundaries, states)
    count, size = jax.tree.leaves(batches)[0].shape[:2]
    weights = jnp.ones([size], jnp.float32)
    depth = max((len(plan) for plan in plans), default=0)
    results = {}
    for level in range(depth):
        jobs = {}
        for index, plan in enumerate(plans):
            if level < len(plan):
                name = tasks._result_name(plan[level], index)
                if name not in results:
                    jobs.setdefault(name, (plan[level], index))
        selected = {n: None if p.shared else states[i] for n, (p, i) in jobs.items()}
        earlier = {
            name: {q.name: results[tasks._result_name(q, i)] for q in plans[i][:level]}
            for name, (_, i) in jobs.items()
        }
        static = tuple((name, p) for name, (p, _) in jobs.items())
        bound = tasks._bind(task, hidden, None)
        level_key = jax.random.fold_in(key, level)

        def step(
            accs,
            item,
            static=static,
            selected=selected,
            earlier=earlier,
            bound=bound,
            level_key=level_key,
        ):
            index, batch = item
            new = {}
            for name, p in static:
                data = tasks.PassInput(
                    state=selected[name],
                    params=trainable,
                    batch=batch,
                    weights=weights,
                    key=jax.random.fold_in(level_key, index),
                    task=bound,
                    earlier=earlier[name],
                )
                new[name] = p.step(accs[name], data)
            return new, None

        accs = {name: p.init(selected[name], trainable) for name, p in static}
        accs, _ = jax.lax.scan(step, accs, (jnp.arange(count), batches))
        for name, p in static:
            results[name] = p.finish(accs[name], selected[name], earlier[name])
    seen = jnp.full([], count * size if depth else 0, jnp.float32)
    return optax_cl.Statistics(seen, results)
