"""Owners of a subspace: what they store, masks, views, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl import MatrixView, matrix_views
from optax_cl.routing import ProtectState
from tests.arrays import normal, orthonormal
from tests.routing.helpers import (
    IN,
    OUT,
    boundary,
    install,
    make_batches,
    make_params,
    projector,
    protected,
    run,
)


def test_only_what_a_link_declares_is_stored():
    state = protected(rule=0.5).init(make_params())
    for unread in (state.anchor, state.curvature, state.mean, state.mean_weight):
        assert unread is None
    state = protected(rule=optax_cl.ratchet()).init(make_params())
    assert state.anchor["w"].shape == (2, OUT)
    assert state.curvature is None and state.mean is None
    state = protected(rule=optax_cl.spring()).init(make_params())
    assert state.curvature["w"].shape == (2, OUT) and state.mean is None
    state = protected(rule=optax_cl.balance()).init(make_params())
    assert state.mean["w"].shape == (2, OUT)
    for tree in (state.basis, state.energy, state.anchor, state.curvature):
        assert tree["b"] == optax.MaskedNode()


def test_owner_stores_nothing_for_links_that_another_owner_serves():
    inner = protected(1, rule=optax_cl.balance())
    state = optax_cl.protect(2, inner, matrices=matrix_views(skip="b")).init(
        make_params()
    )
    assert state.anchor is None and state.curvature is None and state.mean is None
    assert state.inner[0].anchor is not None


# Owners inside owners, masks


def test_innermost_owner_wins():
    g, eye = np.asarray(normal(0, 4, 3)), np.eye(4, dtype=np.float32)
    inner = optax_cl.protect(1, optax_cl.project())
    tx = optax_cl.protect(2, inner)
    state = tx.init(g)
    state = state._replace(
        basis=eye[:, :2],
        inner=(state.inner[0]._replace(basis=eye[:, 2:3]),),
    )
    updates, _ = tx.update(g, state, g)
    np.testing.assert_array_equal(updates, g * [[1], [1], [0], [1]])


def two_layers():
    return {
        "first": {"w": normal(0, IN, 4), "b": np.zeros((1, 4), np.float32)},
        "second": {"w": normal(1, 4, OUT), "b": np.zeros((1, OUT), np.float32)},
    }


def two_layer_logits(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["first"]["w"] + params["first"]["b"])
    return hidden @ params["second"]["w"] + params["second"]["b"]


TWO_LAYERS = optax_cl.classification(two_layer_logits, lambda b: b["y"])
LEAF_MASK = {
    "first": {"w": True, "b": True},
    "second": {"w": False, "b": False},
}
PREFIX_MASK = {"first": True, "second": False}


@pytest.mark.parametrize("mask", [LEAF_MASK, PREFIX_MASK], ids=["leaves", "prefix"])
@pytest.mark.parametrize("place", ["outside", "inside", "partition"])
def test_masks_outside_and_inside_an_owner(mask, place):
    params = two_layers()
    rule = optax_cl.balance()
    links = [
        optax_cl.attenuate(rule),
        optax_cl.scale_by_decoupled_adam(),
        optax_cl.project(),
    ]
    views = matrix_views(skip="b$")
    if place == "outside":
        tx = optax.masked(optax_cl.protect(2, *links, matrices=views), mask)
    elif place == "inside":
        tx = optax_cl.protect(
            2, optax.masked(optax.chain(*links), mask), matrices=views
        )
    else:
        labels = jax.tree.map(lambda m: "held" if m else "free", mask)
        owner = optax_cl.protect(2, *links, matrices=views)
        other = optax_cl.protect(3, optax_cl.project(), matrices=views)
        tx = optax.partition({"held": owner, "free": other}, labels)
    state = tx.init(params)
    for task in range(2):
        state = boundary(state, params, make_batches(task), task=TWO_LAYERS)
        updates, state = jax.jit(tx.update)(params, state, params)
    owners = [
        s
        for s in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, ProtectState))
        if isinstance(s, ProtectState)
    ]
    (u,) = {
        id(o.basis["first"]["w"]): o.basis["first"]["w"]
        for o in owners
        if o.basis["first"] != optax.MaskedNode()
        and not isinstance(o.basis["first"]["w"], optax.MaskedNode)
    }.values()
    u = np.asarray(u)
    assert np.linalg.norm(u) > 1
    assert np.linalg.norm(u.T @ np.asarray(updates["first"]["w"])) < 1e-5
    if place != "partition":
        np.testing.assert_array_equal(updates["second"]["w"], params["second"]["w"])


def test_none_leaves_are_left_alone():
    # Equinox keeps None where a module holds no array.
    tx = protected(2, rule=optax_cl.balance())
    params = {**make_params(), "f": None}
    state = boundary(tx.init(params), params, make_batches(0))
    updates, _ = jax.jit(tx.update)(params, state, params)
    assert updates["f"] is None and np.all(np.isfinite(updates["w"]))


# Views


def test_stacked_layers_are_as_if_each_had_an_owner():
    grads = np.asarray(normal(0, 6, 3, IN, OUT))
    links = [optax_cl.attenuate(0.7), optax_cl.scale_by_decoupled_adam()]
    basis = np.stack([orthonormal(i, IN, 2) for i in range(3)])
    tx = optax_cl.protect(2, *links, matrices=matrix_views(stacked=""))
    together, _ = run(tx, grads, state=install(tx.init(grads[0]), basis=basis))
    tx = optax_cl.protect(2, *links)
    for i in range(3):
        state = install(tx.init(grads[0, i]), basis=basis[i])
        alone, _ = run(tx, grads[:, i], state=state)
        np.testing.assert_allclose(
            np.asarray(together)[:, i], alone, rtol=1e-5, atol=1e-6
        )


def test_stacked_bases_at_a_boundary_are_the_single_ones():
    batches = [{"x": normal(0, 8, 2, IN), "y": np.zeros(8, np.int32)}]
    params = np.asarray(normal(1, 2, IN, OUT))

    def sum_of_layers(w, batch):
        return jnp.einsum("bli,lio->bo", batch["x"], w)

    def after_a_task(params, logits, **views):
        task = optax_cl.classification(logits, lambda b: b["y"])
        rule = optax_cl.attenuate(optax_cl.spring())
        tx = optax_cl.protect(2, rule, labels="empirical", **views)
        state = jax.jit(lambda p: boundary(tx.init(p), p, batches, task=task))(params)
        return jax.tree.map(np.asarray, (state.basis, state.curvature))

    stacked = after_a_task(params, sum_of_layers, matrices=matrix_views(stacked=""))
    single = after_a_task(
        {"l0": params[0], "l1": params[1]},
        lambda p, b: sum_of_layers(jnp.stack([p["l0"], p["l1"]]), b),
    )
    for i in range(2):
        basis, curvature = (tree[f"l{i}"] for tree in single)
        np.testing.assert_allclose(
            projector(stacked[0][i]), projector(basis), atol=1e-4
        )
        np.testing.assert_allclose(stacked[1][i], curvature, rtol=1e-3)


@pytest.mark.parametrize(
    ("shape", "kwargs", "to", "back"),
    [
        ((2, 2, 3, 4), {}, lambda x: x.reshape(12, 4), lambda m: m.reshape(2, 2, 3, 4)),
        ((4, 6), {"layout": "out_in"}, lambda x: x.T, lambda m: m.T),
        (
            (4, 3, 2, 2),
            {"layout": "out_in"},
            lambda x: x.reshape(4, 12).T,
            lambda m: m.T.reshape(4, 3, 2, 2),
        ),
        (
            (6, 2, 2),
            {"override": {"": MatrixView((0,), (1, 2))}},
            lambda x: x.reshape(6, 4),
            lambda m: m.reshape(6, 2, 2),
        ),
    ],
    ids=["conv", "out_in", "conv out_in", "multi-axis dense"],
)
def test_views_equal_reshaping_by_hand(shape, kwargs, to, back):
    grads = np.asarray(normal(0, 4, *shape))
    basis = orthonormal(0, to(grads[0]).shape[0], 2)
    links = [optax_cl.attenuate(0.7), optax_cl.scale_by_decoupled_adam()]
    tx = optax_cl.protect(2, *links, matrices=matrix_views(**kwargs))
    viewed, _ = run(tx, grads, state=install(tx.init(grads[0]), basis=basis))
    by_hand = np.stack([to(g) for g in grads])
    tx = optax_cl.protect(2, *links)
    flat, _ = run(tx, by_hand, state=install(tx.init(by_hand[0]), basis=basis))
    flat = np.stack([back(m) for m in np.asarray(flat)])
    np.testing.assert_allclose(viewed, flat, rtol=1e-6, atol=1e-7)


def test_integer_matrices_are_left_alone_and_bases_keep_their_dtype(x64):
    params = {
        "table": jnp.zeros((4, 3), jnp.int32),
        "w": jnp.ones((4, 3), jnp.bfloat16),
        "v": jnp.ones((4, 3), jnp.float32),
    }
    state = optax_cl.protect(2, optax_cl.attenuate()).init(params)
    assert isinstance(state.basis["table"], optax.MaskedNode)
    assert state.basis["w"].dtype == state.basis["v"].dtype == jnp.float32


# Bad input


def test_embedding_without_a_decision_is_refused():
    params = {"token_embed": {"embedding": np.zeros((50, 4))}}
    with pytest.raises(ValueError, match="`token_embed/embedding`"):
        optax_cl.protect(2, optax_cl.project()).init(params)


def test_rank_larger_than_a_fan_in_names_the_leaf():
    params = {"big": np.zeros((9, 2)), "head": {"w": np.zeros((3, 8))}}
    with pytest.raises(ValueError, match=r"`rank` is 4.*`head/w`.*fan-in of 3"):
        optax_cl.protect(4, optax_cl.project()).init(params)


def test_parameters_without_a_matrix_are_refused():
    tx = optax_cl.protect(2, optax_cl.project(), matrices=matrix_views(skip="free"))
    for params in ({"b": np.zeros(3)}, {"free": np.zeros((3, 3))}):
        with pytest.raises(ValueError, match=r"`protect`.*no matrix"):
            tx.init(params)
    tx.init({})  # nothing at all is no mistake
    with pytest.raises(ValueError, match="`links` is empty"):
        optax_cl.protect(2)
    with pytest.raises(ValueError, match="`links` is empty"):
        optax_cl.chain()


@pytest.mark.parametrize(
    ("link", "name"),
    [
        (lambda: optax_cl.attenuate(0.5), "attenuate"),
        (lambda: optax_cl.attenuate(), "attenuate"),
        (lambda: optax_cl.project(), "project"),
        (lambda: optax_cl.measure("overlap"), "measure"),
        (lambda: optax_cl.measure("leak"), "measure"),
    ],
)
def test_link_without_an_owner_is_a_type_error(link, name):
    g = np.ones((3, 2), np.float32)
    tx = optax_cl.chain(link())
    with pytest.raises(TypeError, match=rf"`{name}`.*optax_cl\.protect"):
        jax.jit(tx.update)(g, tx.init(g), g)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"rank": 0}, ValueError),
        ({"rank": 2.0}, TypeError),
        ({"threshold": 0.0}, ValueError),
        ({"threshold": 1.1}, ValueError),
        ({"mean_decay": 1.0}, ValueError),
        ({"memory": "none"}, ValueError),
        ({"svd": "full"}, ValueError),
        ({"labels": "true"}, ValueError),
    ],
)
def test_bad_argument_is_named(kwargs, error):
    kwargs = dict(kwargs)
    (name,) = kwargs
    with pytest.raises(error, match=f"`{name}`"):
        optax_cl.protect(*[kwargs.pop("rank", 2)], optax_cl.project(), **kwargs)


def test_missing_params_are_named_where_a_rule_reads_the_anchor():
    g = np.ones((3, 2), np.float32)
    tx = optax_cl.protect(1, optax_cl.attenuate(optax_cl.ratchet()))
    with pytest.raises(ValueError, match="`params` is None"):
        tx.update(g, tx.init(g))
    plain = optax_cl.protect(1, optax_cl.attenuate(0.5))
    plain.update(g, plain.init(g))


def test_settings_are_static_and_numbers_are_arrays():
    tx = protected(2, rule=0.5)
    state = tx.init(make_params())
    assert jax.tree.leaves(state.settings) == []
    assert state.threshold.dtype == jnp.float32
    again = optax_cl.protect(
        2,
        optax_cl.attenuate(0.5),
        optax_cl.scale_by_decoupled_adam(),
        matrices=matrix_views(skip="b"),
    ).init(make_params())
    assert jax.tree.structure(again) == jax.tree.structure(state)
