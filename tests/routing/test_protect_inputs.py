"""Subspaces of layer inputs, and bases that grow by what a task misses."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from tests.arrays import distance, normal, orthonormal
from tests.routing.helpers import (
    IN,
    KEY,
    OUT,
    boundary,
    logits,
    make_batches,
    make_params,
    projector,
    protected,
)

TASK = optax_cl.classification(logits, lambda batch: batch["y"])._replace(
    layer_inputs=lambda params, batch: {"w": batch["x"], "b": None}
)
# Labels, outputs and losses have no say.
UNLABELLED = optax_cl.Task(layer_inputs=TASK.layer_inputs)


def stacked_inputs(batches):
    """R, ``[in, n]`` in float64."""
    return np.concatenate([np.float64(b["x"]) for b in batches]).T


@pytest.mark.parametrize("memory", ["all", "last"])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_basis_of_inputs_against_float64_eigenvectors_over_three_tasks(memory, svd):
    tx = protected(statistic="inputs", memory=memory, svd=svd)
    state = tx.init(make_params())
    u, e = np.zeros((IN, 2)), np.zeros(2)
    for task in range(3):
        batches = make_batches(20 + task, (5, 5, 2), scale=[3, 2, 1, 1, 0.3, 0.1])
        state = boundary(state, make_params(), batches, task=UNLABELLED)
        r = stacked_inputs(batches)
        total = r @ r.T / np.sum(r**2)
        if memory == "all":
            total += (u * e) @ u.T
        values, vectors = np.linalg.eigh(total)
        u, e = vectors[:, ::-1][:, :2], values[::-1][:2]
        np.testing.assert_allclose(projector(state.basis["w"]), projector(u), atol=1e-4)
        np.testing.assert_allclose(state.energy["w"], e, rtol=1e-4)


def gpm(m, r, threshold):
    """The published rule, on the representation matrix itself."""
    total = np.sum(r**2)
    rest = r - m @ (m.T @ r)
    vectors, singular, _ = np.linalg.svd(rest)
    k, held = 0, total - np.sum(rest**2)
    while held < threshold * total:
        held += singular[k] ** 2
        k += 1
    return np.concatenate([m, vectors[:, :k]], axis=1)


@pytest.mark.parametrize("statistic", ["inputs", "gradients"])
def test_a_growing_basis_follows_the_published_rule_over_three_tasks(statistic):
    # Of gradients, R is those of the batches side by side.
    settings = {"labels": "empirical"} if statistic == "gradients" else {}
    tx = protected(IN, statistic=statistic, memory="grow", threshold=0.9, **settings)
    state, m, sizes = tx.init(make_params()), np.zeros((IN, 0)), []
    for task in range(3):
        scale = np.roll([3, 1, 0.1, 0.05, 0.02, 0.01], 2 * task)
        params, batches = make_params(task), make_batches(30 + task, (8, 4), scale)
        state = boundary(state, params, batches, task=TASK)
        if statistic == "inputs":
            r = stacked_inputs(batches)
        else:
            r = np.concatenate([gradient(params, b) for b in batches], axis=1)
        m = gpm(m, r, 0.9)
        used = np.any(np.asarray(state.basis["w"]) != 0, axis=0)
        assert used.sum() == m.shape[1] and used[: m.shape[1]].all()
        np.testing.assert_allclose(projector(state.basis["w"]), projector(m), atol=1e-4)
        sizes.append(m.shape[1])
    assert 0 < sizes[0] < sizes[1] < sizes[2] <= IN
    basis = np.asarray(state.basis["w"])[:, : sizes[2]]
    np.testing.assert_allclose(basis.T @ basis, np.eye(sizes[2]), atol=1e-5)


def gradient(params, batch):
    x, w = (np.float64(a) for a in (batch["x"], params["w"]))
    z = np.exp(x @ w + np.float64(params["b"]))
    p = z / z.sum(axis=1, keepdims=True)
    return x.T @ (p - np.eye(OUT)[np.asarray(batch["y"])])


def test_tasks_of_one_subspace_add_no_column_of_rounding():
    tx = optax_cl.protect(32, optax_cl.project(), statistic="inputs", memory="grow")
    task = optax_cl.Task(layer_inputs=lambda params, batch: {"w": batch})
    params, span = {"w": jnp.zeros((32, 4))}, orthonormal(0, 32, 8)
    state = tx.init(params)
    for seed in range(4):
        x = (
            normal(seed, 200, 8)
            * np.logspace(0, -2, 8, dtype=np.float32)[None]
            @ span.T
        )
        state = boundary(state, params, [x], task=task)
        assert np.any(state.basis["w"] != 0, axis=0).sum() == 8


def test_energies_of_a_growing_basis_add_up_each_tasks_share_along_a_column():
    tx = protected(4, statistic="inputs", memory="grow")
    state, expected = tx.init(make_params()), np.zeros(4)
    for task in range(3):
        batches = make_batches(task, (5, 5), scale=[1, 1, 1, 1, 0, 0])
        state = boundary(state, make_params(), batches, task=UNLABELLED)
        r, u = stacked_inputs(batches), np.float64(state.basis["w"])
        expected += np.sum((u.T @ r) ** 2, axis=1) / np.sum(r**2)
    np.testing.assert_allclose(state.energy["w"], expected, rtol=1e-4)


def test_a_full_basis_gives_up_no_column_when_it_grows_but_one_when_tasks_merge():
    weak, strong = ([1, 0.5, 0, 0, 0, 0], [0, 0, 5, 5, 5, 0])
    for memory, kept in (("grow", True), ("all", False)):
        state = protected(3, statistic="inputs", memory=memory).init(make_params())
        for task, scale in enumerate((weak, strong)):
            batches = make_batches(task, (6, 6), scale)
            state = boundary(state, make_params(), batches, task=UNLABELLED)
        held = np.diag(projector(state.basis["w"]))
        assert (held[:2] > 1 - 1e-4).all() == kept
        np.testing.assert_allclose(held.sum(), 3, rtol=1e-4)


# A network without biases: two layers, whose inputs are the batch and the hidden units.


def hidden(params, x):
    return jnp.tanh(x @ params["first"])


def network(params, batch):
    return hidden(params, batch["x"]) @ params["second"]


NETWORK = optax_cl.classification(network, lambda batch: batch["y"])._replace(
    layer_inputs=lambda params, batch: {
        "first": batch["x"],
        "second": hidden(params, batch["x"]),
    }
)
BEHIND = (optax_cl.scale_by_decoupled_adam(), optax_cl.project())
BEFORE = (optax_cl.project(), optax_cl.scale_by_decoupled_adam(second_moment="raw"))


def learn_a_second_task(links, settings):
    """The network before and after a second task, and the first one's data."""
    params = {"first": normal(0, 12, 10) / 3, "second": normal(1, 10, 4) / 3}
    old, new = ({"x": normal(s, 7, 12), "y": np.arange(7) % 4} for s in (2, 3))
    tx = optax.chain(
        optax_cl.protect(10, *links, **settings), optax.scale_by_learning_rate(0.05)
    )
    state = tx.init(params)
    stats = optax_cl.collect(state, params, [old], task=NETWORK, key=KEY)
    state = optax_cl.end_task(state, params, stats)

    @jax.jit
    def train(params, state):
        def step(_, carry):
            params, state = carry
            grads = jax.grad(lambda p: NETWORK.loss(p, new).mean())(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 50, step, (params, state))[0]

    return params, train(params, state), old, new


def test_behind_the_moments_outputs_of_stored_inputs_stay_through_all_layers():
    settings = {"statistic": "inputs", "memory": "grow"}
    params, trained, old, new = learn_a_second_task(BEHIND, settings)
    # The basis comes from sums of squares, so that its rounding is a root of eps.
    assert distance(network(params, old), network(trained, old)) < 1e-4
    losses = [float(NETWORK.loss(p, new).mean()) for p in (params, trained)]
    assert losses[1] < losses[0] / 2  # and it learnt


@pytest.mark.parametrize(
    ("links", "settings"),
    [
        (BEFORE, {"statistic": "inputs", "memory": "grow"}),
        (BEHIND, {"statistic": "gradients", "memory": "grow"}),
    ],
    ids=["before the moments", "of gradients"],
)
def test_no_other_subspace_or_place_keeps_them(links, settings):
    params, trained, old, _ = learn_a_second_task(links, settings)
    assert distance(network(params, old), network(trained, old)) > 0.05


def test_stacked_layers_have_their_bases_each_of_its_own_inputs():
    views = optax_cl.matrix_views(stacked="w")
    tx = optax_cl.protect(
        2, optax_cl.project(), statistic="inputs", memory="grow", matrices=views
    )
    task = optax_cl.Task(layer_inputs=lambda params, batch: {"w": batch.swapaxes(0, 1)})
    params = {"w": jnp.zeros((3, 6, 4))}
    directions = orthonormal(0, 3, 6, 2)
    x = jnp.einsum("lir,nr->nli", directions, normal(1, 5, 2))  # [n, layers, in]
    state = boundary(tx.init(params), params, [x], task=task)
    expected = projector(directions)
    np.testing.assert_allclose(projector(state.basis["w"]), expected, atol=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_convolution_keeps_its_answers_if_patches_are_flattened_as_it_is(
    channels_last,
):
    numbers = ("NHWC", "HWIO", "NHWC")

    def patches(params, batch):
        found = jax.lax.conv_general_dilated_patches(
            batch, (2, 2), (1, 1), "VALID", dimension_numbers=numbers
        )
        if channels_last:  # they come with the channel first
            found = found.reshape(*found.shape[:-1], 3, 4).swapaxes(-1, -2)
            found = found.reshape(*found.shape[:-2], 12)
        return {"w": found}

    params = {"w": normal(0, 2, 2, 3, 5)}  # HWIO
    image = normal(1, 1, 2, 4, 3)
    tx = optax_cl.protect(5, optax_cl.project(), statistic="inputs", memory="grow")
    task = optax_cl.Task(layer_inputs=patches)
    state = boundary(tx.init(params), params, [image], task=task)
    step, _ = tx.update({"w": normal(2, 2, 2, 3, 5)}, state, params)
    change = jax.lax.conv_general_dilated(
        image, step["w"], (1, 1), "VALID", dimension_numbers=numbers
    )
    assert (np.abs(change).max() < 1e-5) == channels_last


def test_an_input_far_weaker_than_others_is_rounding_and_stays_free():
    tx = optax_cl.protect(6, optax_cl.project(), statistic="inputs", memory="grow")
    task = optax_cl.Task(layer_inputs=lambda params, batch: {"w": batch})
    params = {"w": jnp.zeros((6, 4))}
    step = {"w": normal(0, 6, 4)}
    for strength, kept in ((1e-2, True), (1e-4, False)):
        x = np.float32(np.diag([1, strength, 0, 0, 0, 0])[:2])
        state = boundary(tx.init(params), params, [x], task=task)
        update, _ = tx.update(step, state, params)
        assert np.abs(update["w"][0]).max() < 1e-5
        assert (np.abs(update["w"][1]).max() < 1e-3) == kept


def test_a_task_without_usable_inputs_leaves_a_growing_basis_alone():
    tx, params, batches = sgp(10.0), make_params(), make_batches(0)
    state = boundary(tx.init(params), params, batches, task=UNLABELLED)
    for value in (0.0, np.nan, np.inf):
        bad = [{"x": jnp.full((4, IN), value), "y": np.zeros(4, int)}]
        with contextlib.ExitStack() as stack:
            if value != 0:
                stack.enter_context(pytest.warns(UserWarning, match="not finite"))
            after = boundary(state, params, bad, task=UNLABELLED)
        assert distance(after.basis, state.basis) == 0
        assert distance(after.energy, state.energy) == 0
        assert distance(after.importance, state.importance) == 0


def test_balance_works_in_a_subspace_of_inputs():
    tx = protected(3, statistic="inputs", rule=optax_cl.balance())
    params, batches = make_params(), make_batches(0)
    state = boundary(tx.init(params), params, batches, task=TASK)
    u, w = state.basis["w"], params["w"]
    np.testing.assert_allclose(state.anchor["w"], u.T @ w, atol=1e-5)
    assert np.all(np.asarray(state.curvature["w"]) > 0)


def test_wrong_settings_and_inputs_name_what_is_wrong():
    with pytest.raises(ValueError, match="`statistic`"):
        optax_cl.protect(2, statistic="outputs")
    with pytest.raises(ValueError, match=r"`memory='grow'`.*`svd='exact'`"):
        optax_cl.protect(2, memory="grow", svd="randomized")
    tx = protected(2, statistic="inputs")
    state, params = tx.init(make_params()), make_params()
    with pytest.raises(ValueError, match=r"`task.layer_inputs` is None"):
        boundary(state, params, make_batches(0), task=optax_cl.Task())
    for inputs, message in (
        (lambda p, b: {"b": b["x"]}, r"no inputs of `w`.*\['b'\]"),
        (lambda p, b: {"w": b["x"][:, :4]}, r"at `w`.*6 last, got shape \(5, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            task = optax_cl.Task(layer_inputs=inputs)
            boundary(state, params, make_batches(0), task=task)


def importances(tasks, threshold, alpha):
    """SGP's rule as its authors compute it: by the SVD of each part, in float64."""
    m, importance = np.zeros((IN, 0)), np.zeros(0)
    for r in tasks:
        r = r / np.linalg.norm(r)
        old = m.shape[1]
        inside = m @ (m.T @ r)
        u, s, _ = np.linalg.svd(inside)
        s = np.pad(s, (0, max(0, IN - len(s))))[:IN]
        of_old = np.sqrt(((m.T @ u) ** 2 * s**2).sum(1))
        m = gpm(m, r, threshold)
        fresh = np.linalg.svd(r - inside)[1][: m.shape[1] - old]
        values = np.r_[of_old, fresh]
        new = (alpha + 1) * values / (alpha * values + values.max())
        importance = np.clip(np.r_[importance, np.zeros(len(fresh))] + new, 0, 1)
    return m, importance


def sgp(alpha, **settings):
    settings = {
        "statistic": "inputs",
        "memory": "grow",
        "threshold": 0.9,
        "matrices": optax_cl.matrix_views(skip="b"),
        **settings,
    }
    links = optax_cl.scale_by_decoupled_adam(), optax_cl.project(scale=alpha)
    return optax_cl.protect(IN, *links, **settings)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 10.0])
def test_importance_adds_up_over_three_tasks_as_sgp_has_it(alpha):
    tx, seen = sgp(alpha), []
    state = tx.init(make_params())
    for task in range(3):
        scale = np.roll([3, 1, 0.3, 0.1, 0.05, 0.02], 2 * task)
        batches = make_batches(30 + task, (8, 4), scale)
        seen.append(stacked_inputs(batches))
        state = boundary(state, make_params(), batches, task=UNLABELLED)
        m, importance = importances(seen, 0.9, alpha)
        used = np.any(np.asarray(state.basis["w"]) != 0, axis=0)
        assert used.sum() == m.shape[1]
        assert not np.asarray(state.importance["w"])[~used].any()
        # Columns of one task may come in another order, or turned where they are equal.
        u = np.float64(state.basis["w"])
        np.testing.assert_allclose(
            u @ np.diag(state.importance["w"]) @ u.T,
            m @ np.diag(importance) @ m.T,
            atol=2e-4,
        )
    assert 0.05 < importance.min() < 1


def test_a_step_keeps_of_each_direction_what_its_importance_leaves():
    tx = sgp(10.0)
    params, state = make_params(), None
    state = tx.init(params)
    batches = make_batches(3, (6, 6), [3, 1, 0.3, 0.1, 0.05, 0.02])
    state = boundary(state, params, batches, task=UNLABELLED)
    g = make_params(1)
    updates, _ = tx.update(g, state, params)
    plain, _ = protected().update(g, protected().init(params), params)
    u, lam = state.basis["w"], np.asarray(state.importance["w"])
    np.testing.assert_allclose(
        u.T @ updates["w"], (1 - lam)[:, None] * (u.T @ plain["w"]), atol=1e-5
    )


def test_without_bound_the_scale_makes_it_the_whole_projection():
    params, batches = make_params(), make_batches(3, (6, 6), [3, 1, 0.3, 0.1, 0.05, 0])
    projected = []
    for alpha in (1e9, None):
        tx = sgp(alpha)
        state = boundary(tx.init(params), params, batches, task=UNLABELLED)
        projected.append(tx.update(make_params(1), state, params)[0]["w"])
        assert (state.importance is None) == (alpha is None)
    np.testing.assert_allclose(*projected, atol=1e-5)


def test_mistakes_in_scales_are_named():
    params = make_params()
    with pytest.raises(ValueError, match=r"adds up .*`memory='all'` turns columns"):
        sgp(10.0, memory="all").init(params)
    links = optax_cl.project(scale=1.0), optax_cl.project(scale=2.0)
    with pytest.raises(ValueError, match=r"different scales .*\[1.0, 2.0\]"):
        optax_cl.protect(
            2, *links, memory="grow", matrices=optax_cl.matrix_views(skip="b")
        ).init(params)
    with pytest.raises(ValueError, match="`scale` must be"):
        optax_cl.project(scale=-1.0)
    with pytest.raises(TypeError, match="`scale` must be a Python number"):
        optax_cl.project(scale=jnp.float32(1.0))
