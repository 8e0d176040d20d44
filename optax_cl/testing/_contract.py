"""All checks in one call."""

from collections.abc import Callable, Sequence

import optax

from optax_cl.testing._convergence import (
    check_converges,
)
from optax_cl.testing._runs import (
    check_jit_and_scan,
    check_tasks,
    check_vmap,
)
from optax_cl.testing._single import (
    check_accepts_extra_args,
    check_empty_tree,
    check_map_params,
    check_state_is_stable,
    check_update_dtypes,
)
from optax_cl.testing._streams import (
    Collect,
    ExtraArgs,
    collect_synthetic,
    made,
    no_extra_args,
)
from optax_cl.testing._wrappers import (
    check_apply_if_finite,
    check_explicit_raw,
    check_inject_hyperparams,
    check_masks,
    check_multi_steps,
    check_schedules,
)


def check_contract(
    make_tx: Callable[..., optax.GradientTransformation],
    params: optax.Params,
    *,
    extra_args: ExtraArgs = no_extra_args,
    agreeing_extra_args: ExtraArgs | None = None,
    collect: Collect = collect_synthetic,
    links: Callable[..., Sequence[optax.GradientTransformation]] | None = None,
    converges: bool = True,
) -> None:
    """Runs every check of this module.

    Args:
      make_tx: Makes a complete optimizer, learning rate included, around the
        transformation in question: what it returns is added to parameters. Its
        arguments with numeric defaults are the hyper-parameters to inject; those
        annotated ``optax.ScalarOrSchedule`` are also given a schedule.
      params: A small tree of float32 arrays with two leaves or more; the last of them
        is the one that the checks of masks hide.
      extra_args: ``updates -> extra arguments`` of the update.
      agreeing_extra_args: The same for the check of convergence, where memory should
        not contradict the objective; ``extra_args`` if None.
      collect: ``(opt_state, params) -> Statistics`` at a task boundary. The checks of
        masks set the hidden leaf to zero and expect that it then takes no part.
      links: As ``make_tx``, but the links of a chain in which nothing captures; without
        it, that plain and capturing chains agree is not checked.
      converges: Whether the optimizer is meant to find the minimum of an objective.

    Raises:
      AssertionError: If a property does not hold.

    Example:
      >>> import jax.numpy as jnp, optax, optax_cl
      >>> from optax_cl import testing
      >>> def make(strength: optax.ScalarOrSchedule = 3.0):
      ...   return optax_cl.chain(optax_cl.ewc(strength), optax.sgd(0.1))
      >>> testing.check_contract(
      ...     make, {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, converges=False)
    """
    tx = made(make_tx)
    check_accepts_extra_args(tx, params, extra_args=extra_args)
    check_update_dtypes(tx, params, extra_args=extra_args)
    check_state_is_stable(tx, params, extra_args=extra_args)
    check_map_params(tx, params)
    check_empty_tree(tx, extra_args=extra_args)
    streamed = {"extra_args": extra_args, "collect": collect}
    check_tasks(tx, params, **streamed)
    check_jit_and_scan(tx, params, **streamed)
    check_vmap(tx, params, **streamed)
    check_masks(tx, params, **streamed)
    check_multi_steps(tx, params, **streamed)
    check_apply_if_finite(tx, params, **streamed)
    check_inject_hyperparams(make_tx, params, **streamed)
    check_schedules(make_tx, params, **streamed)
    if links is not None:
        check_explicit_raw(links(), params, **streamed)
    if converges:
        agreeing = extra_args if agreeing_extra_args is None else agreeing_extra_args
        check_converges(tx, extra_args=agreeing)
