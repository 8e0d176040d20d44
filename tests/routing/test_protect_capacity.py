"""A basis that grows has room for so many columns: what is told, refused and added."""

import jax
import numpy as np
import pytest

import optax_cl
from optax_cl._core import growth
from tests.routing.helpers import (
    IN,
    boundary,
    make_batches,
    make_params,
    projector,
    protected,
)

TASK = optax_cl.Task(layer_inputs=lambda params, batch: {"w": batch["x"], "b": None})


def growing(rank, **settings):
    return protected(rank, statistic="inputs", memory="grow", **settings)


def learn(state, task):
    """The state after a task of two input directions, ``task`` and the one behind."""
    scale = np.eye(IN)[task] + 0.5 * np.eye(IN)[(task + 1) % IN]
    return boundary(state, make_params(), make_batches(task, (6, 6), scale), task=TASK)


def test_columns_in_use_and_in_all_are_told():
    state, told = growing(3).init(make_params()), []
    for task in (0, 2, 4):
        (row,) = optax_cl.describe(state)
        told.append((row.tasks, row.capacity, row.left))
        state = learn(state, task)
    assert told == [(0, 3, 3), (2, 3, 1), (3, 3, 0)]


def test_what_does_not_fit_is_refused_if_asked_with_what_to_do():
    state = learn(growing(3, overflow="error").init(make_params()), 0)
    with pytest.raises(ValueError, match=r"`w` has 3 columns.*needs 1 more.*grow\("):
        learn(state, 2)
    fits = learn(optax_cl.grow(state, 4), 2)
    np.testing.assert_allclose(
        projector(fits.basis["w"]), np.diag([1, 1, 1, 1, 0, 0]), atol=1e-5
    )
    with pytest.raises(ValueError, match=r"inside a transformed.*build `protect`"):
        jax.jit(lambda s: learn(s, 2))(state)
    statistics = optax_cl.collect(
        state, make_params(), make_batches(2, (6,)), task=TASK, key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match=r"inside a transformed.*build `protect`"):
        jax.jit(lambda s: optax_cl.end_task(state, make_params(), s))(statistics)


def test_where_a_basis_is_as_wide_as_it_can_be_growth_is_not_advised():
    with pytest.raises(ValueError, match="no room for more than 1: lower `threshold`"):
        growth.check_fits("protect", "w", 1, 1, np.int32([0, 2]))
    with pytest.raises(ValueError, match=r"needs 2 more.*optax_cl\.grow"):
        growth.check_fits("protect", "w", 1, 2, np.int32([0, 2]))


def test_a_rule_for_matrices_is_something_to_call():
    with pytest.raises(TypeError, match=r"`matrices` must be a rule.*got 'kernel'"):
        optax_cl.protect(3, optax_cl.project(), matrices="kernel")


def test_nothing_else_than_growth_can_be_refused():
    with pytest.raises(ValueError, match=r"`overflow='error'`.*`memory='grow'`"):
        protected(3, overflow="error")
    with pytest.raises(ValueError, match=r"`overflow`.*'strongest'"):
        growing(3, overflow="drop")


@pytest.mark.parametrize(
    "links",
    [
        (optax_cl.project(scale=10.0),),
        (optax_cl.attenuate(optax_cl.balance()), optax_cl.scale_by_decoupled_adam()),
    ],
    ids=["importance", "anchor, curvature and mean"],
)
def test_an_enlarged_state_goes_on_as_one_made_so_large(links):
    def make(rank):
        return optax_cl.protect(
            rank,
            *links,
            statistic="inputs",
            memory="grow",
            matrices=optax_cl.matrix_views(skip="b"),
        )

    task = optax_cl.classification(
        lambda p, batch: batch["x"] @ p["w"] + p["b"], lambda batch: batch["y"]
    )._replace(layer_inputs=TASK.layer_inputs)
    params, gradient = make_params(), make_params(1)

    def go_on(tx, state, task_index):
        state = boundary(
            state,
            params,
            make_batches(task_index, (6, 6), np.eye(IN)[task_index]),
            task=task,
        )
        return tx.update(gradient, state, params)

    small, large = make(2), make(5)
    _, state = go_on(small, small.init(params), 0)
    state = optax_cl.grow(state, 5)
    _, expected = go_on(large, large.init(params), 0)
    for index in (1, 2, 3):
        update, state = go_on(large, state, index)
        wanted, expected = go_on(large, expected, index)
        jax.tree.map(np.testing.assert_array_equal, update, wanted)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_more_columns_than_inputs_cannot_be_had():
    state = growing(3).init(make_params())
    with pytest.raises(ValueError, match=rf"`capacity` is 9.*`w`.*fan-in of {IN}"):
        optax_cl.grow(state, 9)
    with pytest.raises(ValueError, match="can't shrink"):
        optax_cl.grow(state, 2)
    with pytest.raises(ValueError, match="no memory with a capacity"):
        optax_cl.grow(protected(3).init(make_params()), 4)
