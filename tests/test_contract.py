"""Every public transformation keeps the contract of ``optax_cl.testing``."""

import importlib
import inspect
import pkgutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_cl
from optax_cl import testing
from tests import registry

PARAMS = registry.params


def public_functions():
    """Name -> function, for every function that a public module exports."""
    modules = [optax_cl]
    for found in pkgutil.walk_packages(optax_cl.__path__, "optax_cl."):
        parts = found.name.split(".")
        if not any(part.startswith("_") for part in parts) and "testing" not in parts:
            modules.append(importlib.import_module(found.name))
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__.startswith("optax_cl")
        and not name.startswith("_")
    }


def public_transformations():
    def returns_transformation(function):
        returned = inspect.signature(function).return_annotation
        return isinstance(returned, type) and issubclass(
            returned, optax.GradientTransformation
        )

    return {n: f for n, f in public_functions().items() if returns_transformation(f)}


# --- The registry is complete --------------------------------------------------------


def test_every_public_transformation_is_registered():
    registered = {name.split("[")[0] for name in registry.ENTRIES}
    assert registered == set(public_transformations())


def test_every_public_function_says_what_it_returns():
    # Or else the test above would not see a transformation.
    silent = [
        name
        for name, function in public_functions().items()
        if inspect.signature(function).return_annotation is inspect.Signature.empty
    ]
    assert not silent


def test_every_argument_that_takes_a_schedule_is_tried_with_one():
    def schedulable(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name for p in parameters if p.annotation == optax.ScalarOrSchedule}

    for name, function in public_transformations().items():
        entries = [e for n, e in registry.ENTRIES.items() if n.split("[")[0] == name]
        tried = set().union(*(schedulable(e.make) for e in entries))
        assert schedulable(function) <= tried, name


# --- The contract --------------------------------------------------------------------


# The stream moves parameters as it likes, off the manifold too.
@pytest.mark.filterwarnings("ignore:`eblora` found its factors elsewhere")
# And it prunes nothing.
@pytest.mark.filterwarnings("ignore:`packnet` has no weight free")
@pytest.mark.filterwarnings("ignore:`progressive` has 1 columns")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in registry.SLOW else name
        for name in registry.ENTRIES
    ],
)
def test_contract(name):
    entry = registry.ENTRIES[name]
    testing.check_contract(
        entry.make,
        entry.params(),
        extra_args=entry.extra_args,
        agreeing_extra_args=entry.agreeing,
        links=entry.links,
    )


@pytest.mark.parametrize("name", registry.SLOW)
def test_slow_entries_keep_what_tracing_shows(name):
    entry = registry.ENTRIES[name]
    tx, params = entry.make(), entry.params()
    testing.check_update_dtypes(tx, params, extra_args=entry.extra_args)
    testing.check_state_is_stable(tx, params, extra_args=entry.extra_args)
    testing.check_map_params(tx, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "objective"),
    [
        (name, objective)
        for name, entry in registry.ENTRIES.items()
        for objective in testing.OBJECTIVES
        if objective in ("matrix", "mixed") or not entry.needs_matrix
    ],
)
def test_converges_on_every_objective(name, objective):
    entry = registry.ENTRIES[name]
    agreeing = entry.agreeing or entry.extra_args
    testing.check_converges(entry.make(), objective, extra_args=agreeing)


@pytest.mark.parametrize("name", registry.ENTRIES)
def test_a_single_array_is_a_tree_of_parameters(name):
    entry = registry.ENTRIES[name]
    tx, params = entry.make(), jnp.ones((3, 2))
    testing.check_update_dtypes(tx, params, extra_args=entry.extra_args)
    testing.check_map_params(tx, params)


# --- Each check can fail -------------------------------------------------------------


class CountState(NamedTuple):
    count: jax.Array


def make(init=lambda params: optax.EmptyState(), update=None):
    """A transformation that scales by -0.1, or what ``update`` makes of it."""

    def scale(updates, state, params=None, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda u: -0.1 * u, updates), state

    return optax.GradientTransformationExtraArgs(init, update or scale)


def scaling(factor):
    """Scales by ``factor()``, called anew at every trace and eager call."""

    def update(updates, state, params=None, **extra_args):
        by = factor()
        return jax.tree.map(lambda u: (by * u).astype(u.dtype), updates), state

    return make(update=update)


def counting(factor=0.5):
    """Scales by a power of the times it was called from Python: not pure."""
    calls = []

    def next_factor():
        calls.append(None)
        return -(factor ** len(calls))

    return scaling(next_factor)


def test_the_checks_accept_plain_descent():
    testing.check_contract(lambda: make(), PARAMS(), converges=False)


def test_a_transformation_that_swallows_extra_arguments_is_caught():
    plain = optax.GradientTransformation(*make())
    with pytest.raises(AssertionError, match="would lose extra arguments"):
        testing.check_accepts_extra_args(plain, PARAMS())


def test_a_transformation_that_refuses_unknown_arguments_is_caught():
    tx = make(update=lambda updates, state, params=None: (updates, state))
    with pytest.raises(TypeError, match="an_unknown_argument"):
        testing.check_accepts_extra_args(tx, PARAMS())


def test_an_update_of_another_dtype_is_caught():
    def update(updates, state, params=None, **extra_args):
        return optax.tree.cast(updates, jnp.float32), state

    with pytest.raises(AssertionError, match="updates of bfloat16 parameters"):
        testing.check_update_dtypes(make(update=update), PARAMS())


def test_a_state_that_changes_dtype_is_caught():
    def update(updates, state, params=None, **extra_args):
        return updates, optax.tree.cast(state, jnp.float32)

    with pytest.raises(AssertionError, match="state of bfloat16 parameters: at"):
        testing.check_state_is_stable(make(optax.tree.zeros_like, update), PARAMS())


def test_a_python_number_in_the_state_is_caught():
    with pytest.raises(AssertionError, match="holds 0, which is no array"):
        testing.check_state_is_stable(make(lambda params: CountState(0)), PARAMS())


def test_an_init_that_indexes_leaves_is_caught():
    tx = make(lambda params: jnp.zeros_like(jax.tree.leaves(params)[0]))
    with pytest.raises(IndexError):
        testing.check_map_params(tx, PARAMS())


def test_an_update_that_needs_a_leaf_is_caught():
    def update(updates, state, params=None, **extra_args):
        return updates, jnp.stack(jax.tree.leaves(updates))

    with pytest.raises(ValueError, match=r"at least one|non-empty"):
        testing.check_empty_tree(make(update=update))


def test_a_state_that_shares_the_parameters_buffers_is_caught():
    # An anchor that is the same array can't be donated beside the parameters.
    with pytest.raises(Exception, match="donate the same buffer twice"):
        testing.check_tasks(make(lambda params: CountState(params)), PARAMS())


def test_a_state_that_makes_the_step_trace_again_is_caught():
    def update(updates, state, params=None, **extra_args):
        return updates, CountState(state.count + jnp.ones([], jnp.float32))

    # The zero is weakly typed, what the update makes of it is not.
    tx = make(lambda params: CountState(jnp.asarray(0.0)), update)
    with pytest.raises(AssertionError, match="traced 2 times in 3 tasks"):
        testing.check_tasks(tx, PARAMS())


def test_a_number_that_is_not_finite_is_caught():
    with pytest.raises(AssertionError, match="not all numbers are finite"):
        testing.check_tasks(scaling(lambda: jnp.inf), PARAMS())


def test_a_transformation_that_is_not_pure_is_caught():
    with pytest.raises(AssertionError, match="op by op it gives other updates"):
        testing.check_jit_and_scan(counting(), PARAMS())
    with pytest.raises(AssertionError, match="under vmap it gives other updates"):
        testing.check_vmap(counting(), PARAMS())
    with pytest.raises(AssertionError, match="multi_steps it gives other updates"):
        testing.check_multi_steps(counting(), PARAMS())
    with pytest.raises(AssertionError, match="if_finite it gives other updates"):
        testing.check_apply_if_finite(counting(), PARAMS())


def test_a_method_that_reads_hidden_leaves_is_caught():
    def update(updates, state, params=None, *, other, **extra_args):
        norm = optax.tree.norm(other)
        return jax.tree.map(lambda u: norm * u, updates), state

    with pytest.raises(AssertionError, match="masked it gives other updates"):
        testing.check_masks(
            make(update=update),
            PARAMS(),
            extra_args=lambda updates: {"other": updates},
        )


def test_an_update_that_breaks_on_none_leaves_is_caught():
    def update(updates, state, params=None, **extra_args):
        is_none = lambda x: x is None  # noqa: E731
        return jax.tree.map(lambda u: 2 * u, updates, is_leaf=is_none), state

    with pytest.raises(TypeError):
        testing.check_masks(make(update=update), PARAMS())


def test_a_tree_of_one_leaf_can_not_be_masked():
    with pytest.raises(ValueError, match="two leaves or more"):
        testing.check_masks(make(), jnp.ones(3))


def test_a_condition_on_a_hyper_parameter_is_caught():
    def make_tx(strength=1.0):
        return make() if strength > 0 else optax.identity()

    with pytest.raises(jax.errors.TracerBoolConversionError):
        testing.check_inject_hyperparams(make_tx, PARAMS())


def test_an_argument_that_only_says_that_it_takes_schedules_is_caught():
    def make_tx(rate: optax.ScalarOrSchedule = 0.1):
        return optax.scale(-float(rate))

    with pytest.raises(TypeError):
        testing.check_schedules(make_tx, PARAMS())


def test_a_chain_that_captures_nothing_is_caught(monkeypatch):
    monkeypatch.setattr(optax_cl, "chain", optax.chain)
    with pytest.raises(ValueError, match="raw_updates"):
        testing.check_explicit_raw([optax_cl.scale_by_decoupled_adam()], PARAMS())


def test_ascent_is_caught():
    with pytest.raises(AssertionError):
        testing.check_converges(optax.scale(0.01), "parabola", num_steps=10)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="objective"):
        testing.check_converges(make(), "sphere")


def test_the_check_of_everything_runs_every_check(monkeypatch):
    names = {n for n in vars(testing) if n.startswith("check_")} - {"check_contract"}
    called = set()
    home = importlib.import_module(testing.check_contract.__module__)
    for name in names:
        monkeypatch.setattr(
            home, name, lambda *args, _name=name, **kwargs: called.add(_name)
        )
    testing.check_contract(make, PARAMS(), links=lambda: (make(),))
    assert called == names
