"""Protected subspaces: what is stored, what is kept still, and where it leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl import MatrixView, matrix_views
from optax_cl.routing import ProtectState
from tests.routing.helpers import install, normal, orthonormal, run

KEY = jax.random.key(0)
IN, OUT = 6, 3


def logits(params, batch):
    return batch["x"] @ params["w"] + params["b"]


TASK = optax_cl.classification(logits, lambda batch: batch["y"])


def make_params(seed=0):
    return {"w": normal(seed, IN, OUT), "b": jnp.zeros((1, OUT))}


def make_batches(seed, sizes=(5, 5, 5), scale=None):
    """Batches of one task; ``scale`` weighs the input directions."""
    rng = np.random.default_rng(seed)
    scale = np.ones(IN) if scale is None else np.asarray(scale)
    return [
        {
            "x": jnp.asarray(rng.normal(size=(n, IN)) * scale, jnp.float32),
            "y": jnp.asarray(rng.integers(0, OUT, n)),
        }
        for n in sizes
    ]


@functools.cache
def protected(rank=2, *, rule=None, **settings):
    links = [optax_cl.scale_by_decoupled_adam()]
    if rule is not None:
        links = [optax_cl.attenuate(rule), *links]
    settings = {"matrices": matrix_views(skip="b"), **settings}
    return optax_cl.protect(rank, *links, **settings)


def boundary(state, params, batches, key=KEY, task=TASK):
    stats = optax_cl.collect(state, params, batches, task=task, key=key)
    return optax_cl.end_task(state, params, stats)


def projector(u):
    u = np.asarray(u, np.float64)
    return u @ np.swapaxes(u, -1, -2)


# Oracles in float64


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gradient_sum(params, batch):
    x, w = (np.asarray(a, np.float64) for a in (batch["x"], params["w"]))
    p = softmax(x @ w + np.asarray(params["b"], np.float64))
    return x.T @ (p - np.eye(OUT)[np.asarray(batch["y"])])


def merged(u, e, params, batches, rank):
    gram = sum(g @ g.T for g in (gradient_sum(params, b) for b in batches))
    total = (u * e) @ u.T + gram / np.trace(gram)
    values, vectors = np.linalg.eigh(total)
    return vectors[:, ::-1][:, :rank], values[::-1][:rank]


# Bases


@pytest.mark.parametrize("memory", ["all", "last"])
@pytest.mark.parametrize("sizes", [(5, 5, 5), (5, 5, 2)])
def test_basis_against_float64_eigenvectors_over_three_tasks(memory, sizes):
    tx = protected(memory=memory, labels="empirical")
    state = tx.init(make_params())
    u, e = np.zeros((IN, 2)), np.zeros(2)
    for task in range(3):
        params, batches = make_params(task), make_batches(10 + task, sizes)
        state = boundary(state, params, batches)
        if memory == "last":
            u, e = 0 * u, 0 * e
        u, e = merged(u, e, params, batches, 2)
        np.testing.assert_allclose(projector(state.basis["w"]), projector(u), atol=1e-4)
        np.testing.assert_allclose(state.energy["w"], e, rtol=1e-4)
    assert state.tasks == 3
    gram = state.basis["w"].T @ state.basis["w"]
    np.testing.assert_allclose(gram, np.eye(2), atol=1e-5)


def test_every_task_has_equal_say():
    # The second task's gradients are a thousand times larger; the first is still kept.
    tx = protected(labels="empirical")
    params = make_params()
    first = make_batches(0, scale=[1, 0, 0, 0, 0, 0])
    second = make_batches(1, scale=[0, 1e3, 0, 0, 0, 0])
    state = boundary(boundary(tx.init(params), params, first), params, second)
    np.testing.assert_allclose(
        np.diag(projector(state.basis["w"])), [1, 1, 0, 0, 0, 0], atol=1e-5
    )
    last = boundary(
        boundary(
            protected(memory="last", labels="empirical").init(params), params, first
        ),
        params,
        second,
    )
    np.testing.assert_allclose(
        np.diag(projector(last.basis["w"])), [0, 1, 0, 0, 0, 0], atol=1e-5
    )


def test_a_batch_of_one_example_does_not_weigh_as_a_full_one():
    # Gradients are summed over a batch's items: how the data were cut does not decide.
    params = make_params()
    full = make_batches(0, (30,) * 4, scale=[1, 1, 0, 0, 0, 0])
    odd = make_batches(1, (1,), scale=[0, 0, 3, 0, 0, 0])
    state = boundary(protected().init(params), params, full + odd)
    np.testing.assert_allclose(
        np.diag(projector(state.basis["w"])), [1, 1, 0, 0, 0, 0], atol=0.05
    )


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
def test_randomized_is_close_to_exact_on_a_decaying_spectrum(labels):
    n, r = 24, 3
    task = optax_cl.classification(lambda w, b: b["x"] @ w, lambda b: b["y"])
    w = normal(0, n, 4)
    rng = np.random.default_rng(0)
    batches = [
        {
            "x": jnp.asarray(
                rng.normal(size=(8, n)) * 0.5 ** np.arange(n), jnp.float32
            ),
            "y": jnp.asarray(rng.integers(0, 4, 8)),
        }
        for _ in range(4)
    ]
    found = []
    for svd in ("exact", "randomized"):
        tx = optax_cl.protect(
            r, optax_cl.scale_by_decoupled_adam(), svd=svd, labels=labels
        )
        found.append(boundary(tx.init(w), w, batches, task=task))
    np.testing.assert_allclose(
        projector(found[1].basis), projector(found[0].basis), atol=2e-3
    )
    np.testing.assert_allclose(found[1].energy, found[0].energy, rtol=2e-3)


@pytest.mark.parametrize("directions", [1, 2])
def test_randomized_survives_gradients_of_low_rank_in_a_small_matrix(directions):
    # The sketch is then as wide as the matrix, and its core singular.
    params = make_params()
    scale = [1.0] * directions + [0.0] * (IN - directions)
    tx = protected(4, svd="randomized", labels="empirical")
    state = boundary(tx.init(params), params, make_batches(0, scale=scale))
    np.testing.assert_allclose(
        np.diag(projector(state.basis["w"])), np.sign(scale), atol=1e-4
    )
    assert int((state.energy["w"] > 0).sum()) == directions


def test_threshold_drops_columns_that_are_not_needed():
    params = make_params()
    batches = make_batches(0, scale=[1, 0.3, 0.1, 0.01, 0, 0])
    ranks = []
    for threshold in (0.5, 0.99, 1.0):
        tx = protected(4, threshold=threshold, labels="empirical")
        state = boundary(tx.init(params), params, batches)
        energy = np.asarray(state.energy["w"])
        kept = int((energy > 0).sum())
        assert np.all(np.asarray(state.basis["w"])[:, kept:] == 0)
        if threshold < 1:
            assert energy.sum() >= threshold > energy[: kept - 1].sum()
        ranks.append(kept)
    assert ranks == [1, 2, 4]


# Faults in the data


def poisoned(kind):
    batches = make_batches(5)
    if kind == "zero":
        return [b | {"x": 0 * b["x"]} for b in batches]
    value = {"nan": jnp.nan, "inf": jnp.inf}[kind]
    return [batches[0], batches[1] | {"x": batches[1]["x"].at[0, 0].set(value)}]


@pytest.mark.parametrize("kind", ["zero", "nan", "inf"])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_task_without_a_usable_gradient_leaves_the_basis_alone(kind, svd):
    tx = protected(3, rule=optax_cl.balance(), threshold=0.6, svd=svd)
    params = make_params()
    empty = boundary(tx.init(params), params, poisoned(kind))
    np.testing.assert_array_equal(empty.basis["w"], 0.0)
    np.testing.assert_array_equal(empty.curvature["w"], 0.0)
    state = boundary(tx.init(params), params, make_batches(0))
    after = boundary(state, params, poisoned(kind))
    np.testing.assert_array_equal(after.basis["w"], state.basis["w"])
    np.testing.assert_array_equal(after.energy["w"], state.energy["w"])
    assert after.tasks == 2
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))


def test_zero_gradients_give_zero_updates_and_no_nan():
    tx = optax_cl.protect(
        2,
        optax_cl.attenuate(optax_cl.balance()),
        optax_cl.measure("overlap"),
        optax_cl.measure("strength"),
        optax_cl.scale_by_decoupled_adam(),
        optax_cl.project(),
        optax_cl.measure("leak"),
    )
    params = normal(0, IN, OUT)
    state = install(tx.init(params), basis=orthonormal(0, IN, 2))
    updates, state = run(tx, jnp.zeros((3, IN, OUT)), params, state)
    np.testing.assert_array_equal(updates, 0.0)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


# Anchor and curvature


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


def test_anchor_is_the_parameters_in_the_new_basis():
    tx = protected(rule=optax_cl.ratchet())
    state = tx.init(make_params())
    for task in range(3):
        params = make_params(task)
        state = boundary(state, params, make_batches(task))
        np.testing.assert_allclose(
            state.anchor["w"], state.basis["w"].T @ params["w"], rtol=1e-4, atol=1e-5
        )


def exact_fisher(params, batches, basis):
    """Fisher of the mean loss over items along u_k (x) e_o, in float64."""
    x = np.concatenate(
        [np.asarray(b["x"], np.float64).reshape(-1, IN) for b in batches]
    )
    p = softmax(x @ np.asarray(params["w"], np.float64))
    squares = (x @ np.asarray(basis, np.float64)) ** 2
    return squares.T @ (p * (1 - p)) / len(x)


@pytest.mark.parametrize("items", [1, 3])
def test_curvature_is_the_exact_fisher_in_expectation(items):
    # Ragged, and inputs of different size, so that weights of batches matter.
    params = {"w": 0.5 * normal(0, IN, OUT), "b": jnp.zeros((1, OUT))}
    rng = np.random.default_rng(3)
    batches = []
    for n, size in ((4, 0.5), (4, 0.5), (1, 2.0)):
        shape = (n,) if items == 1 else (n, items)
        batches.append(
            {
                "x": jnp.asarray(size * rng.normal(size=(*shape, IN)), jnp.float32),
                "y": jnp.zeros(shape, jnp.int32),
            }
        )
    task = TASK if items == 1 else ITEMS_TASK
    state = protected(rule=optax_cl.spring()).init(params)
    errors = []
    for seed in range(120):
        new = boundary(state, params, batches, jax.random.key(seed), task)
        errors.append(
            new.curvature["w"] - exact_fisher(params, batches, new.basis["w"])
        )
    errors = np.stack(errors)
    z = errors.mean(0) / (errors.std(0, ddof=1) / np.sqrt(len(errors)))
    assert np.max(np.abs(z)) < 4.0
    # The test can see an error of a fifth.
    expected = exact_fisher(params, batches, new.basis["w"])
    assert np.all(errors.std(0) / np.sqrt(len(errors)) < 0.15 * expected.max())


ITEMS_TASK = optax_cl.classification(
    lambda params, batch: jnp.einsum("bti,io->bto", batch["x"], params["w"]),
    lambda batch: batch["y"],
)


def test_curvature_sums_over_tasks_and_turns_with_the_basis():
    tx = protected(rule=optax_cl.spring())
    params = make_params()
    one = boundary(tx.init(params), params, make_batches(0))
    stats = optax_cl.collect(one, params, make_batches(1), task=TASK, key=KEY)
    two = optax_cl.end_task(one, params, stats)
    (task_curvature,) = [
        v["w"] for k, v in stats.results.items() if k.startswith("curvature")
    ]
    mixing = np.asarray(two.basis["w"].T @ one.basis["w"], np.float64) ** 2
    np.testing.assert_allclose(
        two.curvature["w"],
        mixing @ np.asarray(one.curvature["w"]) + np.asarray(task_curvature),
        rtol=1e-4,
    )


def test_last_task_only_forgets_the_curvature_too():
    params = make_params()
    tx = protected(rule=optax_cl.spring(), memory="last")
    second = make_batches(1)
    state = boundary(boundary(tx.init(params), params, make_batches(0)), params, second)
    fresh = boundary(tx.init(params), params, second)
    np.testing.assert_allclose(state.curvature["w"], fresh.curvature["w"], rtol=1e-4)


def test_boundary_restarts_the_averaged_coefficients():
    tx = protected(rule=optax_cl.balance())
    params = make_params()
    state = boundary(tx.init(params), params, make_batches(0))
    _, state = tx.update(params, state, params)
    assert state.mean_weight > 0
    state = boundary(state, params, make_batches(1))
    assert state.mean_weight == 0 and not np.any(state.mean["w"])


# Placement: how much of the displacement stays inside, with a rotated basis


@functools.cache
def displaced(routing):
    """Displacement at strength 1; .7 of the energy inside, unequal coordinates."""
    u = np.asarray(orthonormal(0, 16, 16))
    energies = np.r_[np.full(4, 0.7 / 4), np.full(12, 0.3 / 12)]
    draws = np.random.default_rng(0).normal(size=(300, 16)) * np.sqrt(energies)
    grads = (draws @ u.T) * np.logspace(-0.3, 0.3, 16)
    grads = jnp.asarray(grads[..., None], jnp.float32)
    params = normal(1, 16, 1)
    away = optax_cl.attenuate(1.0)
    adam = optax_cl.scale_by_decoupled_adam
    decay = optax.add_decayed_weights(0.1)
    links = {
        "vanilla": [adam()],
        "shared": [away, adam(second_moment="routed")],
        "raw": [away, adam(second_moment="raw")],
        "max": [away, adam()],
        "post": [adam(), away],
        "project": [adam(), optax_cl.project()],
        "decay, project": [adam(), decay, optax_cl.project()],
        "project, decay": [adam(), optax_cl.project(), decay],
        "project, rate": [adam(), optax_cl.project(), optax.scale(-0.1)],
        "rate, project": [adam(), optax.scale(-0.1), optax_cl.project()],
    }[routing]
    tx = optax_cl.protect(4, *links, optax_cl.measure("leak"))
    basis = jnp.asarray(u[:, :4])
    state = install(tx.init(params), basis=basis)
    updates, state = jax.jit(functools.partial(run, tx))(grads, params, state)
    moved = np.asarray(updates.sum(0), np.float64)
    inside = np.asarray(basis, np.float64).T @ moved
    last = np.asarray(updates[-1], np.float64)
    share = ((np.asarray(basis).T @ last) ** 2).sum() / (last**2).sum()
    np.testing.assert_allclose(optax.tree.get(state, "leak"), share, atol=1e-6)
    return (inside**2).sum() / (moved**2).sum()


@pytest.mark.parametrize(
    "routing", ["post", "project", "decay, project", "project, rate", "rate, project"]
)
def test_nothing_leaks_behind_the_moments(routing):
    assert displaced(routing) < 1e-12


@pytest.mark.parametrize("routing", ["shared", "raw", "max", "project, decay"])
def test_everything_else_leaks(routing):
    assert displaced(routing) > 1e-3


def test_decoupled_routing_still_protects():
    assert displaced("vanilla") > 0.3
    assert max(displaced("max"), displaced("raw")) < 0.1


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_post_shrinks_the_protected_part_exactly(strength):
    grads = normal(0, 5, 16, 2)
    basis = orthonormal(0, 16, 4)
    tx = optax_cl.protect(
        4, optax_cl.scale_by_decoupled_adam(), optax_cl.attenuate(strength)
    )
    updates, _ = run(tx, grads, state=install(tx.init(grads[0]), basis=basis))
    plain, _ = run(optax.scale_by_adam(), grads)
    inside, outside = projector(basis), np.eye(16) - projector(basis)
    np.testing.assert_allclose(
        inside @ updates, (1 - strength) * (inside @ plain), atol=1e-5
    )
    np.testing.assert_allclose(outside @ updates, outside @ plain, atol=1e-5)


def test_weighted_strength_follows_the_singular_values():
    tx = optax_cl.protect(3, optax_cl.attenuate(0.5, weighted=True))
    g = jnp.ones((4, 2))
    state = install(
        tx.init(g), basis=jnp.eye(4)[:, :3], energy=jnp.array([4.0, 1.0, 0.0])
    )
    updates, _ = tx.update(g, state, g)
    np.testing.assert_allclose(updates[:, 0], [0.5, 0.75, 1.0, 1.0], rtol=1e-6)


def test_bfloat16_updates_keep_their_dtype_and_the_basis_stays_float32():
    tx = optax_cl.protect(2, optax_cl.attenuate(optax_cl.balance()), optax_cl.project())
    g = normal(0, 4, 3).astype(jnp.bfloat16)
    state = tx.init(g)
    updates, after = tx.update(g, state, g)
    assert updates.dtype == jnp.bfloat16 and state.basis.dtype == jnp.float32
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


# Owners inside owners, masks


def test_innermost_owner_wins():
    g = normal(0, 4, 3)
    inner = optax_cl.protect(1, optax_cl.project())
    tx = optax_cl.protect(2, inner)
    state = tx.init(g)
    state = state._replace(
        basis=jnp.eye(4)[:, :2],
        inner=(state.inner[0]._replace(basis=jnp.eye(4)[:, 2:3]),),
    )
    updates, _ = tx.update(g, state, g)
    np.testing.assert_array_equal(updates, g.at[2].set(0.0))


def two_layers():
    return {
        "first": {"w": normal(0, IN, 4), "b": jnp.zeros((1, 4))},
        "second": {"w": normal(1, 4, OUT), "b": jnp.zeros((1, OUT))},
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
    assert np.linalg.norm(u) > 1
    assert np.linalg.norm(u.T @ updates["first"]["w"]) < 1e-5
    if place != "partition":
        np.testing.assert_array_equal(updates["second"]["w"], params["second"]["w"])


def test_none_leaves_are_left_alone():
    # Equinox keeps None where a module holds no array.
    tx = protected(2, rule=optax_cl.balance())
    params = {"w": normal(0, IN, OUT), "b": jnp.zeros((1, OUT)), "f": None}
    state = boundary(tx.init(params), params, make_batches(0))
    updates, _ = tx.update(params, state, params)
    assert updates["f"] is None and np.all(np.isfinite(updates["w"]))


# Views


def test_stacked_layers_are_as_if_each_had_an_owner():
    grads = normal(0, 6, 3, IN, OUT)
    links = [optax_cl.attenuate(0.7), optax_cl.scale_by_decoupled_adam()]
    basis = jnp.stack([orthonormal(i, IN, 2) for i in range(3)])
    tx = optax_cl.protect(2, *links, matrices=matrix_views(stacked=""))
    together, _ = run(tx, grads, state=install(tx.init(grads[0]), basis=basis))
    tx = optax_cl.protect(2, *links)
    for i in range(3):
        state = install(tx.init(grads[0, i]), basis=basis[i])
        alone, _ = run(tx, grads[:, i], state=state)
        np.testing.assert_allclose(together[:, i], alone, rtol=1e-5, atol=1e-6)


def test_stacked_bases_at_a_boundary_are_the_single_ones():
    x = normal(0, 8, 2, IN)
    batches = [{"x": x, "y": jnp.zeros(8, jnp.int32)}]
    params = normal(1, 2, IN, OUT)

    def sum_of_layers(w, batch):
        return jnp.einsum("bli,lio->bo", batch["x"], w)

    task = optax_cl.classification(sum_of_layers, lambda b: b["y"])
    kwargs = {"labels": "empirical"}
    rule = optax_cl.attenuate(optax_cl.spring())
    tx = optax_cl.protect(2, rule, matrices=matrix_views(stacked=""), **kwargs)
    stacked = boundary(tx.init(params), params, batches, task=task)
    split = {"l0": params[0], "l1": params[1]}
    task = optax_cl.classification(
        lambda p, b: sum_of_layers(jnp.stack([p["l0"], p["l1"]]), b), lambda b: b["y"]
    )
    single = boundary(
        optax_cl.protect(2, rule, **kwargs).init(split), split, batches, task=task
    )
    for i in range(2):
        np.testing.assert_allclose(
            projector(stacked.basis[i]), projector(single.basis[f"l{i}"]), atol=1e-4
        )
        np.testing.assert_allclose(
            stacked.curvature[i], single.curvature[f"l{i}"], rtol=1e-3
        )


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
    grads = normal(0, 4, *shape)
    basis = orthonormal(0, to(grads[0]).shape[0], 2)
    links = [optax_cl.attenuate(0.7), optax_cl.scale_by_decoupled_adam()]
    tx = optax_cl.protect(2, *links, matrices=matrix_views(**kwargs))
    viewed, _ = run(tx, grads, state=install(tx.init(grads[0]), basis=basis))
    by_hand = jax.vmap(to)(grads)
    tx = optax_cl.protect(2, *links)
    flat, _ = run(tx, by_hand, state=install(tx.init(by_hand[0]), basis=basis))
    np.testing.assert_allclose(viewed, jax.vmap(back)(flat), rtol=1e-6, atol=1e-7)


# Bad input


def test_embedding_without_a_decision_is_refused():
    params = {"token_embed": {"embedding": jnp.zeros((50, 4))}}
    with pytest.raises(ValueError, match="`token_embed/embedding`"):
        optax_cl.protect(2, optax_cl.project()).init(params)


def test_rank_larger_than_a_fan_in_names_the_leaf():
    params = {"big": jnp.zeros((9, 2)), "head": {"w": jnp.zeros((3, 8))}}
    with pytest.raises(ValueError, match=r"`rank` is 4.*`head/w`.*fan-in of 3"):
        optax_cl.protect(4, optax_cl.project()).init(params)


def test_parameters_without_a_matrix_are_refused():
    tx = optax_cl.protect(2, optax_cl.project(), matrices=matrix_views(skip="free"))
    for params in ({"b": jnp.zeros(3)}, {"free": jnp.zeros((3, 3))}):
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
    g = jnp.ones((3, 2))
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
    g = jnp.ones((3, 2))
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


def test_strength_can_be_vmapped_and_injected():
    g = normal(0, IN, OUT)
    basis = orthonormal(0, IN, 2)

    def one(strength):
        tx = optax_cl.protect(2, optax_cl.attenuate(strength))
        return tx.update(g, install(tx.init(g), basis=basis), g)[0]

    batched = jax.vmap(one)(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(batched[0], g, rtol=1e-6)
    np.testing.assert_allclose(basis.T @ batched[1], 0.0, atol=1e-6)

    injected = optax.inject_hyperparams(optax_cl.attenuate)(strength=1.0)
    tx = optax_cl.protect(2, injected)
    state = install(tx.init(g), basis=basis)
    np.testing.assert_allclose(basis.T @ tx.update(g, state, g)[0], 0.0, atol=1e-6)
    state = optax.tree.set(state, strength=jnp.float32(0.0))
    np.testing.assert_allclose(tx.update(g, state, g)[0], g, rtol=1e-6)


def test_integer_matrices_are_left_alone_and_bases_keep_their_dtype(x64):
    params = {
        "table": jnp.zeros((4, 3), jnp.int32),
        "w": jnp.ones((4, 3), jnp.bfloat16),
        "v": jnp.ones((4, 3), jnp.float32),
    }
    state = optax_cl.protect(2, optax_cl.attenuate()).init(params)
    assert isinstance(state.basis["table"], optax.MaskedNode)
    assert state.basis["w"].dtype == state.basis["v"].dtype == jnp.float32
