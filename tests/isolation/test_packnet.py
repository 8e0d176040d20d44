import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl.isolation import packnet, packnet_params, packnet_prune
from tests.arrays import distance, normal

KEY = jax.random.key(0)


def make_params(seed=0):
    return {
        "first": normal(seed, 6, 8) / 2,
        "bias": normal(seed + 1, 8) / 2,
        "second": normal(seed + 2, 8, 3) / 2,
    }


def network(params, x):
    return jnp.tanh(x @ params["first"] + params["bias"][None]) @ params["second"]


def boundary(state, params):
    stats = optax_cl.collect(state, params, [np.ones(1)], task=optax_cl.Task(), key=KEY)
    return optax_cl.end_task(state, params, stats)


def owner_of(state):
    return jax.tree.map(np.asarray, state[-1].owner)


# Momentum and weight decay, which a mask on gradients would let through.
TX = optax.chain(optax.adamw(0.05, weight_decay=0.1), packnet())


@jax.jit
def train(params, state, x, y):
    def step(_, carry):
        params, state = carry
        grads = jax.grad(lambda p: jnp.mean((network(p, x) - y) ** 2))(params)
        updates, state = TX.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, 40, step, (params, state))


prune = jax.jit(packnet_prune)


@pytest.fixture(scope="module")
def three_tasks():
    """States and parameters: after training, pruning and retraining of each task."""
    params = make_params()
    state = TX.init(params)
    seen = []
    for task in range(3):
        x, y = normal(10 + task, 12, 6), normal(20 + task, 12, 3)
        trained, state = train(params, state, x, y)
        state, pruned = prune(state, trained, 0.6)
        params, retrained = train(pruned, state, x, y)
        losses = [float(np.mean((network(p, x) - y) ** 2)) for p in (pruned, params)]
        seen.append((trained, pruned, params, owner_of(retrained), losses))
        state = boundary(retrained, params)
    return seen, state, params, x


def test_what_a_task_computes_with_never_changes_to_the_bit(three_tasks):
    seen, state, final, x = three_tasks
    for task, (_, _, params, _, _) in enumerate(seen, start=1):
        then = network(packnet_params(state, params, task), x)
        now = network(packnet_params(state, final, task), x)
        assert np.array_equal(then, now)
        # And it is all that the network was then.
        assert np.array_equal(then, network(params, x))
    assert distance(seen[0][2], final) > 0.1  # while the parameters moved


def test_each_task_learns_on_its_own_weights_and_reads_those_before(three_tasks):
    for _, _, _, _, (pruned, retrained) in three_tasks[0]:
        assert retrained < pruned


def test_exactly_the_smallest_of_the_tasks_own_weights_become_zero_and_free(
    three_tasks,
):
    taken = {"first": np.zeros((6, 8), bool), "second": np.zeros((8, 3), bool)}
    for task, (trained, pruned, params, owner, _) in enumerate(three_tasks[0], 1):
        for name, before in taken.items():
            own = ~before
            w = np.abs(np.asarray(trained[name]))
            freed = np.asarray(owner[name]) == 0
            assert freed.sum() == round(0.6 * own.sum()) and not (freed & before).any()
            assert w[freed].max() <= w[own & ~freed].min()
            for zero in (pruned, params):  # and stay so while the others are retrained
                assert not np.asarray(zero[name])[freed].any()
            assert (owner[name][own & ~freed] == task).all()
            taken[name] = before | (own & ~freed)


def test_biases_belong_to_the_first_task(three_tasks):
    biases = [params["bias"] for _, _, params, _, _ in three_tasks[0]]
    assert np.array_equal(biases[0], biases[2])
    assert (owner_of(three_tasks[1])["bias"] == 1).all()


def test_a_mask_on_gradients_would_not_do():
    # Weight decay and momentum behind it move what belongs to others.
    tx = optax.chain(packnet(), optax.adamw(0.05, weight_decay=0.1))
    params = make_params()
    state = tx.init(params)
    for task in range(2):
        updates, state = tx.update(make_params(5), state, params)
        before, params = params, optax.apply_updates(params, updates)
        if task == 0:
            state, params = prune(state, params, 0.5)
            state = boundary(state, params)
    kept = np.asarray(state[0].owner["first"]) == 1
    assert np.abs(np.asarray(params["first"] - before["first"])[kept]).min() > 1e-3


@pytest.mark.parametrize("fraction", [0.0, 1 / 3, 0.5, 1.0])
def test_the_share_is_exact_among_equal_weights(fraction):
    params = {"kernel": np.ones((3, 6), np.float32)}
    tx = packnet()
    state, pruned = prune(tx.init(params), params, fraction)
    free = np.asarray(state.owner["kernel"]) == 0
    assert free.sum() == round(fraction * 18)
    assert np.array_equal(pruned["kernel"] == 0, free)


def test_the_share_of_known_numbers_is_rounded_as_python_does():
    params = {"kernel": np.ones((10, 15), np.float32)}
    state, _ = packnet_prune(packnet().init(params), params, 0.07)
    free = np.asarray(state.owner["kernel"]) == 0
    assert free.sum() == round(0.07 * 150) == 11  # in float32 it is 10.5 and 10


@pytest.mark.parametrize("value", [5.0, np.inf, np.nan])
def test_weights_of_other_tasks_stay_theirs_whatever_the_own_ones_hold(value):
    params = {"kernel": np.float32([[1.0, 2.0], [3.0, value]])}
    state = packnet().init(params)
    owner = {"kernel": np.uint8([[1, 1], [2, 2]])}
    state = state._replace(owner=owner, task=np.uint8(2))
    for fraction in (1.0, jnp.float32(2.0)):  # of an array the value is not judged
        after, pruned = prune(state, params, fraction)
        assert after.owner["kernel"].tolist() == [[1, 1], [0, 0]]
        assert pruned["kernel"].tolist() == [[1.0, 2.0], [0.0, 0.0]]
    after, _ = prune(state, params, 0.5)  # what is not finite is as large as any
    assert after.owner["kernel"].tolist() == [[1, 1], [0, 2]]


@pytest.mark.parametrize(("fraction", "count"), [(0.51171875, 512), (0.69921875, 699)])
def test_the_share_is_counted_in_full_whatever_the_fractions_dtype(fraction, count):
    params = {"kernel": normal(0, 40, 25)}
    state, _ = packnet_prune(packnet().init(params), params, jnp.bfloat16(fraction))
    assert np.sum(np.asarray(state.owner["kernel"]) == 0) == count


@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 2, 2)])
def test_kernels_of_another_layout_lose_their_smallest_weights(shape):
    w = normal(0, *shape)
    tx = packnet(matrices=optax_cl.matrix_views(layout="out_in"))
    state, pruned = packnet_prune(tx.init({"kernel": w}), {"kernel": w}, 0.4)
    smallest = np.argsort(np.abs(np.ravel(w)))[: round(0.4 * w.size)]
    assert set(np.flatnonzero(np.ravel(pruned["kernel"]) == 0)) == set(smallest)
    # Of parameters that were never pruned, too.
    read = packnet_params(state, {"kernel": w}, 1)
    assert distance(read, pruned) == 0


def test_stacked_layers_are_pruned_each_by_itself():
    tx = packnet(matrices=optax_cl.matrix_views(stacked="kernel"))
    w = normal(0, 3, 4, 5) * jnp.array([1.0, 10.0, 100.0])[:, None, None]
    state, _ = packnet_prune(tx.init({"kernel": w}), {"kernel": w}, 0.5)
    free = np.asarray(state.owner["kernel"]) == 0
    assert (free.sum((1, 2)) == 10).all()


def test_nothing_is_compiled_again_over_tasks_and_shapes_stay():
    params = make_params()
    state = TX.init(params)
    x, y = normal(1, 12, 6), normal(2, 12, 3)
    sizes = []
    for _ in range(3):
        params, state = train(params, state, x, y)
        state, params = prune(state, params, 0.5)
        state = boundary(state, params)
        sizes.append((train._cache_size(), prune._cache_size()))
    assert sizes[0] == sizes[2]
    kinds = jax.tree.map(lambda a: (a.shape, a.dtype), TX.init(params))
    assert kinds == jax.tree.map(lambda a: (a.shape, a.dtype), state)


def test_stacked_states_end_a_task_without_vmap_as_with_it():
    # Three seeds, each at a task of its own; the leaf's last axis is as long.
    params = {"kernel": normal(0, 3, 4, 3)}
    state = jax.vmap(packnet().init)(params)
    state, params = jax.vmap(packnet_prune, (0, 0, None))(state, params, 0.5)
    state = state._replace(task=np.uint8([1, 2, 3]))
    apart = jax.vmap(lambda s, p: boundary(s, p))(state, params)
    together = boundary(state, params)
    assert jax.tree.map(np.array_equal, together, apart).owner["kernel"]
    assert [set(np.ravel(o)) for o in together.owner["kernel"]] == [
        {1, n} for n in (2, 3, 4)
    ]


def test_a_task_too_many_inside_jit_spoils_the_last_one_only():
    params = {"kernel": np.ones((2, 3), np.float32)}
    owner = {"kernel": np.uint8([[1, 2, 255], [0, 0, 254]])}
    state = packnet().init(params)._replace(owner=owner, task=np.uint8(255))
    after = jax.jit(boundary)(state, params)
    assert after.task == 255
    assert after.owner["kernel"].tolist() == [[1, 2, 255], [255, 255, 254]]


def test_a_task_is_its_number_and_never_what_eight_bits_make_of_it():
    params = {"kernel": np.float32([[1.0, 2.0, 3.0]])}
    owner = {"kernel": np.uint8([[1, 255, 0]])}
    state = packnet().init(params)._replace(owner=owner, task=np.uint8(255))
    read = jax.jit(packnet_params)  # a Python integer is a weak one in there
    for task, expected in ((1, [1, 0, 0]), (254, [1, 0, 0]), (255, [1, 2, 0])):
        for given in (task, np.int64(task), np.array(task), jnp.uint8(task)):
            assert packnet_params(state, params, given)["kernel"].tolist() == [expected]
        assert read(state, params, task)["kernel"].tolist() == [expected]
    for task in (256, 257, jnp.int32(300)):  # its value is not known inside jit
        assert read(state, params, task)["kernel"].tolist() == [[1, 2, 0]]
    for wrong in (0, 256, 257, 10**10, np.int64(300), np.nan):
        with pytest.raises(ValueError, match=r"`task` must be .* in \[1, 255\]"):
            packnet_params(state, params, wrong)
    for wrong in (1.5, 2.0, np.float32(1), jnp.float32(1), True, "1"):
        with pytest.raises(TypeError, match="`task` must be"):
            packnet_params(state, params, wrong)


def test_a_task_ends_inside_jit_also_in_a_state_that_it_closes_over():
    params = make_params()
    state, params = prune(packnet().init(params), params, 0.5)
    inside = jax.jit(lambda params: boundary(state, params))(params)
    same = jax.tree.map(np.array_equal, inside, boundary(state, params))
    assert all(jax.tree.leaves(same))


def test_that_no_weight_is_free_is_told_once_and_at_the_end_of_a_task():
    params = make_params()
    state = packnet().init(params)
    with pytest.warns(UserWarning, match=r"no weight free.*packnet_prune") as told:
        boundary(state, params)
    assert len(told) == 1 and told[0].filename == __file__


WRAPPED = {
    "chain": TX,
    "MultiSteps": optax.MultiSteps(TX, 2),
    "apply_if_finite": optax.apply_if_finite(TX, 2),
    "inject_hyperparams": optax.inject_hyperparams(
        lambda learning_rate: optax.chain(optax.sgd(learning_rate), packnet())
    )(0.1),
    "partition": optax.partition(
        {"kernels": TX, "rest": optax.sgd(0.1)},
        {"first": "kernels", "second": "kernels", "bias": "rest"},
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_it_is_pruned_and_read_wherever_it_stands(name):
    params = make_params()
    state, pruned = packnet_prune(WRAPPED[name].init(params), params, 0.5)
    free = {k: np.asarray(pruned[k]) == 0 for k in ("first", "second")}
    assert free["first"].sum() == 24 and free["second"].sum() == 12
    state = boundary(state, pruned)
    learnt = jax.tree.map(lambda p: p + 1, pruned)
    then, now = (packnet_params(state, learnt, task) for task in (1, 2))
    for k, zero in free.items():
        assert np.array_equal(np.asarray(then[k]) == 0, zero)
        assert np.array_equal(now[k], learnt[k])


def test_hidden_leaves_and_integers_belong_to_nobody():
    params = {**make_params(), "steps": np.ones(2, np.int32)}
    hide = {"first": True, "bias": True, "second": False, "steps": True}
    tx = optax.masked(packnet(), hide)
    state, pruned = packnet_prune(tx.init(params), params, 0.5)
    assert np.array_equal(pruned["second"], params["second"])
    assert np.array_equal(pruned["steps"], params["steps"])
    assert np.sum(np.asarray(pruned["first"]) == 0) == 24
    state = boundary(state, pruned)
    updates, _ = tx.update(jax.tree.map(np.ones_like, params), state, pruned)
    assert (np.asarray(updates["second"]) == 1).all()
    assert np.sum(np.asarray(updates["first"]) == 1) == 24


def test_half_precision_keeps_its_dtype():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_params())
    tx = packnet()
    state, pruned = packnet_prune(tx.init(half), half, 0.5)
    updates, _ = tx.update(half, state, pruned)
    for tree in (pruned, updates, packnet_params(state, pruned, 1)):
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(tree))


def test_mistakes_are_named():
    params, tx = make_params(), packnet()
    state = tx.init(params)
    with pytest.raises(ValueError, match="`fraction`"):
        packnet_prune(state, params, 1.5)
    with pytest.raises(ValueError, match="`task`"):
        packnet_params(state, params, 0)
    with pytest.raises(ValueError, match=r"one PacknetState; found 0"):
        packnet_prune(optax.sgd(0.1).init(params), params, 0.5)
    with pytest.raises(ValueError, match=r"one PacknetState; found 2"):
        packnet_params((state, state), params, 1)
    with pytest.raises(TypeError, match="complex"):
        tx.init({"kernel": np.zeros((2, 2), np.complex64)})
    with pytest.raises(ValueError, match="embeddings"):
        tx.init({"embedding": np.zeros((9, 2), np.float32)})
    wrong = {**params, "first": np.zeros((6, 7), np.float32)}
    for call in (
        lambda: tx.update(wrong, state),
        lambda: packnet_prune(state, wrong, 0.5),
        lambda: packnet_params(state, wrong, 1),
    ):
        with pytest.raises(ValueError, match=r"at `first` got \(6, 7\)"):
            call()
    full = state._replace(task=np.uint8(255))
    with pytest.raises(ValueError, match=r"255 tasks.*not ended"):
        boundary(full, params)
