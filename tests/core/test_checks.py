"""Argument checks: what passes, what does not, and what the message says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl._core import checks


@pytest.mark.parametrize(
    "value", [0, 0.5, 1, np.float32(0.5), np.int64(1), np.array(0.5)]
)
def test_numbers_in_the_interval_pass(value):
    checks.check_number("x", value, low=0.0, high=1.0)


@pytest.mark.parametrize(
    "value", [-1e-9, 1.1, float("nan"), float("inf"), -float("inf"), np.array(2.0)]
)
def test_numbers_outside_or_not_finite_are_refused(value):
    with pytest.raises(ValueError, match=r"`x` must be a finite number in \[0, 1\]"):
        checks.check_number("x", value, low=0.0, high=1.0)


def test_open_ends_exclude_the_bound():
    checks.check_number("x", 0.0, low=0.0)
    with pytest.raises(ValueError, match=r"\(0, inf\]"):
        checks.check_number("x", 0.0, low=0.0, open_low=True)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        checks.check_number("x", 1.0, low=0.0, high=1.0, open_high=True)


@pytest.mark.parametrize(
    "value", ["1", None, True, np.True_, 1j, [1.0], np.ones(1), {}]
)
def test_what_is_no_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="`x` must be a number; got"):
        checks.check_number("x", value)


def test_arrays_and_tracers_pass_unjudged_if_scalar():
    checks.check_number("x", jnp.array(7.0), high=1.0)
    jax.jit(lambda x: checks.check_number("x", x, high=1.0))(7.0)
    with pytest.raises(ValueError, match=r"`x` must be a scalar; got .* \(2,\)"):
        checks.check_number("x", jnp.ones(2))


def test_schedules_pass_only_where_allowed():
    checks.check_number("x", lambda step: step, schedule=True)
    with pytest.raises(TypeError, match="`x` must be a number; got"):
        checks.check_number("x", lambda step: step)
    with pytest.raises(TypeError, match="a number or an Optax schedule"):
        checks.check_number("x", "fast", schedule=True)


def test_sizes_are_positive_python_integers():
    checks.check_positive_int("n", 3)
    checks.check_positive_int("n", np.int32(3))
    for value in (0, -1):
        with pytest.raises(ValueError, match="`n` must be at least 1"):
            checks.check_positive_int("n", value)
    for value in (1.0, True, None, "3", jnp.array(3)):
        with pytest.raises(TypeError, match="`n` must be a Python integer"):
            checks.check_positive_int("n", value)


def test_choices_are_listed():
    checks.check_choice("c", "a", ("a", "b"))
    with pytest.raises(ValueError, match=r"`c` must be one of 'a', 'b'; got 'd'"):
        checks.check_choice("c", "d", ("a", "b"))


def test_missing_params_say_what_to_call():
    checks.check_params("m", {})
    with pytest.raises(ValueError, match=r"`m`.*tx\.update\(grads, state, params\)"):
        checks.check_params("m", None)


def test_paths_are_written_as_users_write_them():
    tree = {"dense": [jnp.zeros(1)]}
    (path, _), *_ = jax.tree_util.tree_leaves_with_path(tree)
    assert checks.path_str(path) == "dense/0"
    assert checks.path_str(()) == "<root>"


def test_shapes_are_compared_by_path():
    like = {"a": jnp.zeros(2), "b": jnp.zeros((2, 1))}
    checks.check_same_shapes("x", {"a": np.ones(2), "b": np.ones((2, 1))}, like, "y")
    with pytest.raises(ValueError, match=r"`x`.*of y; at `b` got \(2,\)"):
        checks.check_same_shapes("x", {"a": np.ones(2), "b": np.ones(2)}, like, "y")
    with pytest.raises(ValueError, match=r"1 leaves \(a\) where 2 leaves \(a, b\)"):
        checks.check_same_shapes("x", {"a": np.ones(2)}, like, "y")
