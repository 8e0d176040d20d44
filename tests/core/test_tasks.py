"""Task boundaries: streaming, finding states in any wrapper, moments policies."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl._core import tasks
from optax_cl.routing import ProtectState
from tests.arrays import normal

KEY = jax.random.key(0)
TASK = optax_cl.classification(lambda p, b: b["x"] @ p["w"] + p["b"], lambda b: b["y"])


OWNER = {"labels": "empirical", "matrices": optax_cl.matrix_views(skip="b")}


def make_params(seed=0):
    return {"w": normal(seed, 4, 3), "b": jnp.zeros((1, 3))}


def make_batches(seed, sizes=(5, 5, 2)):
    rng = np.random.default_rng(seed)
    return [
        {
            "x": jnp.asarray(rng.normal(size=(n, 4)), jnp.float32),
            "y": jnp.asarray(rng.integers(0, 3, n)),
        }
        for n in sizes
    ]


@functools.cache
def owner(rank=2, rule=None):
    links = [] if rule is None else [optax_cl.attenuate(optax_cl.balance())]
    return optax_cl.protect(rank, *links, optax_cl.scale_by_decoupled_adam(), **OWNER)


def boundary(state, params, batches, **kwargs):
    stats = optax_cl.collect(state, params, batches, task=TASK, key=KEY)
    return optax_cl.end_task(state, params, stats, **kwargs)


# A memory that sums the inputs it sees, and one pass that counts its compilations

TRACES = []


class SumState(NamedTuple):
    total: Any  # like params
    stored: Any  # int32 []
    bank: Any  # float32 [capacity]


def _sum_step(acc, data):
    TRACES.append(1)
    grads = jax.grad(lambda p: jnp.sum(data.weights * data.task.loss(p, data.batch)))
    return jax.tree.map(jnp.add, acc, grads(data.params))


SUM = tasks.Pass("sum", lambda s, p: jax.tree.map(jnp.zeros_like, p), _sum_step)


def _sum_end(state, params, results):
    total = jax.tree.map(
        lambda t, r: t if isinstance(t, optax.MaskedNode) else t + r,
        state.total,
        results["sum"],
        is_leaf=lambda n: isinstance(n, optax.MaskedNode),
    )
    return state._replace(total=total, stored=state.stored + 1)


tasks.register_boundary(
    SumState,
    tasks.Boundary(
        passes=lambda s: (SUM,),
        end_task=_sum_end,
        like=lambda s: s.total,
        usage=lambda s: (s.stored, s.bank.shape[0]),
        grow=lambda s, n: s._replace(bank=jnp.pad(s.bank, (0, n - s.bank.size))),
    ),
)


def summing():
    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return SumState(zeros, jnp.zeros([], jnp.int32), jnp.zeros(3))

    return optax.GradientTransformationExtraArgs(init, lambda u, s, p=None, **_: (u, s))


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "optax_cl.chain": lambda tx: optax_cl.chain(tx, optax.scale(-1.0)),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "partition": lambda tx: optax.partition(
        {"in": tx, "out": optax.sgd(0.1)}, {"w": "in", "b": "out"}
    ),
    "multi_steps": lambda tx: optax_cl.multi_steps(tx, 2),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate))
    )(rate=0.1),
    "protect": lambda tx: optax_cl.protect(2, tx, **OWNER),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_states_are_found_in_every_wrapper(wrapper):
    params, batches = make_params(), make_batches(0)
    state = WRAPPERS[wrapper](summing()).init(params)
    after = boundary(state, params, batches)
    assert optax.tree.get(after, "stored") == 1
    x = np.concatenate([b["x"] for b in batches]).astype(np.float64)
    y = np.eye(3)[np.concatenate([b["y"] for b in batches])]
    z = x @ np.asarray(params["w"], np.float64)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    total = optax.tree.get(after, "total")["w"]
    np.testing.assert_allclose(total, x.T @ (p - y), rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_ragged_batches_equal_one_batch_and_count_their_examples():
    params = make_params()
    state, batches = summing().init(params), make_batches(0, (5, 5, 2))
    whole = [{k: jnp.concatenate([b[k] for b in batches]) for k in ("x", "y")}]
    collect = functools.partial(optax_cl.collect, state, params, task=TASK, key=KEY)
    ragged, once = collect(batches), collect(whole)
    assert ragged.num_examples == once.num_examples == 12
    for a, b in zip(*map(jax.tree.leaves, (ragged.results, once.results)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_two_tasks_or_twenty_are_one_compilation():
    params = make_params()
    tx = optax_cl.chain(summing(), owner(2, "balance"))
    state, end = tx.init(params), jax.jit(optax_cl.end_task, donate_argnums=0)
    step = jax.jit(tx.update)
    for task in range(4):
        if task == 1:
            traces = len(TRACES)
        grads = jax.tree.map(jnp.ones_like, params)
        _, state = step(grads, state, params)
        stats = optax_cl.collect(
            state, make_params(task), make_batches(task), task=TASK, key=KEY
        )
        state = end(state, make_params(task), stats)
        state = optax_cl.begin_task(state, params)
    assert len(TRACES) == traces
    assert end._cache_size() == 1 and step._cache_size() == 1
    assert optax.tree.get(state, "stored") == 4


def test_jitted_end_task_equals_the_plain_one():
    params, batches = make_params(), make_batches(0)
    state = owner(2, "balance").init(params)
    stats = optax_cl.collect(state, params, batches, task=TASK, key=KEY)
    plain = optax_cl.end_task(state, params, stats)
    jitted = jax.jit(optax_cl.end_task)(state, params, stats)
    assert jax.tree.structure(plain) == jax.tree.structure(jitted)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_stored_arrays_outlive_parameters_and_statistics():
    params, batches = make_params(), make_batches(0)
    state = owner(2, "balance").init(params)
    stats = optax_cl.collect(state, params, batches, task=TASK, key=KEY)
    state = optax_cl.end_task(state, params, stats)
    for x in jax.tree.leaves((params, stats)):
        x.delete()
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


def test_two_equal_methods_each_keep_their_own():
    params = make_params()
    tx = optax.chain(owner(), optax.scale(2.0), owner())
    state = boundary(tx.init(params), params, make_batches(0))
    np.testing.assert_array_equal(state[0].basis["w"], state[2].basis["w"])
    assert state[0].tasks == state[2].tasks == 1
    assert np.linalg.norm(state[0].basis["w"]) > 1


def test_leaves_that_no_method_reads_are_not_differentiated():
    @jax.custom_vjp
    def fragile(x):
        return x

    fragile.defvjp(lambda x: (x, None), lambda *_: pytest.fail("differentiated"))
    task = optax_cl.classification(
        lambda p, b: b["x"] @ p["w"] + fragile(p["b"]) + p["steps"], lambda b: b["y"]
    )
    params = make_params() | {"steps": jnp.array([[0]])}
    tx = optax.masked(summing(), {"w": True, "b": False, "steps": False})
    state = tx.init(params)
    stats = optax_cl.collect(state, params, make_batches(0), task=task, key=KEY)
    (result,) = stats.results.values()
    hidden = {k for k, v in result.items() if isinstance(v, optax.MaskedNode)}
    assert hidden == {"b", "steps"}


# Bad input


def test_iterators_are_refused_where_two_passes_are_needed():
    params = make_params()
    state = owner(2, "balance").init(params)
    with pytest.raises(ValueError, match=r"iterator.*2 passes"):
        boundary(state, params, iter(make_batches(0)))
    boundary(owner().init(params), params, iter(make_batches(0)))  # one pass


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "yielded nothing"),
        ([{"x": jnp.zeros((0, 4)), "y": jnp.zeros(0, jnp.int32)}], "non-empty"),
        ([{"x": jnp.zeros((2, 4)), "y": jnp.zeros(3, jnp.int32)}], "common"),
        ([{"x": jnp.zeros((2, 4)), "y": jnp.zeros((), jnp.int32)}], "common"),
        ([{}], "common"),
    ],
)
def test_bad_batches_are_refused(batches, message):
    params = make_params()
    with pytest.raises(ValueError, match=message):
        boundary(owner().init(params), params, batches)


@pytest.mark.parametrize("name", ["outputs", "sample_label", "log_prob"])
def test_missing_task_function_is_named_with_who_needs_it(name):
    params = make_params()
    tx = optax_cl.protect(2, optax_cl.project(), matrices=OWNER["matrices"])
    task = TASK._replace(**{name: None})
    with pytest.raises(ValueError, match=rf"`task\.{name}` is None, but a basis"):
        optax_cl.collect(tx.init(params), params, make_batches(0), task=task, key=KEY)


def test_statistics_of_another_state_are_refused():
    params = make_params()
    stats = optax_cl.collect(
        optax.adam(0.1).init(params), params, [], task=TASK, key=KEY
    )
    with pytest.raises(ValueError, match="`statistics` hold nothing for ProtectState"):
        optax_cl.end_task(owner().init(params), params, stats)


# Moments


def trained(tx, params):
    state = tx.init(params)
    for seed in range(3):
        grads = {"w": normal(seed, 4, 3), "b": normal(seed, 1, 3)}
        _, state = tx.update(grads, state, params)
    return state


@pytest.mark.parametrize("policy", ["keep", "reset", "project"])
def test_moments_policy(policy):
    params = make_params()
    state = trained(owner(), params)
    after = boundary(state, params, make_batches(0), moments=policy)
    old, new = state.inner[0], after.inner[0]
    u = after.basis["w"]
    if policy == "keep":
        np.testing.assert_array_equal(new.mu["w"], old.mu["w"])
        assert new.count == 3
    elif policy == "reset":
        assert not any(np.any(x) for x in jax.tree.leaves(new))
    else:
        # On the new basis, the old one was empty.
        np.testing.assert_allclose(u.T @ new.mu["w"], 0.0, atol=1e-6)
        np.testing.assert_allclose(
            new.mu["w"], old.mu["w"] - u @ (u.T @ old.mu["w"]), atol=1e-6
        )
        np.testing.assert_array_equal(new.mu["b"], old.mu["b"])
        # The second moment stays, but where a step would be larger than the largest.
        largest = np.max(np.abs(old.mu["w"]) / np.sqrt(old.nu["w"]))
        bearing = np.square(new.mu["w"] / largest)
        np.testing.assert_allclose(new.nu["w"], np.maximum(old.nu["w"], bearing), 1e-5)
        assert np.sum(np.asarray(new.nu["w"] == old.nu["w"])) == 11  # of 12
        np.testing.assert_array_equal(new.nu["b"], old.nu["b"])


def test_unknown_policy_and_projection_without_a_subspace_are_refused():
    params = make_params()
    state = optax.adam(0.1).init(params)
    stats = optax_cl.collect(state, params, [], task=TASK, key=KEY)
    with pytest.raises(ValueError, match="`moments` must be one of"):
        optax_cl.end_task(state, params, stats, moments="forget")
    with pytest.raises(ValueError, match="needs a protected subspace"):
        optax_cl.end_task(state, params, stats, moments="project")


def test_moments_that_stand_outside_the_owner_are_not_silently_left():
    params, batches = make_params(), make_batches(0)
    links = optax.scale_by_adam(), optax_cl.protect(2, optax_cl.project(), **OWNER)
    state = trained(optax.chain(*links), params)
    with pytest.raises(ValueError, match=r"inside.*`optax_cl\.protect"):
        boundary(state, params, batches, moments="project")
    # Moments of other parameters may stand where they like, and there may be none.
    tx = optax.partition({"w": owner(), "b": optax.adam(0.1)}, {"w": "w", "b": "b"})
    boundary(trained(tx, params), params, batches, moments="project")
    tx = optax.chain(optax_cl.protect(2, optax_cl.project(), **OWNER), optax.sgd(0.1))
    boundary(trained(tx, params), params, batches, moments="project")


def test_reset_state_with_a_mask():
    params = make_params()
    state = trained(owner(), params)
    rows = jnp.array([[True], [False], [True], [False]])
    new = optax_cl.reset_state(state, {"w": rows, "b": False}).inner[0]
    old = state.inner[0]
    np.testing.assert_array_equal(new.mu["w"][::2], 0.0)
    np.testing.assert_array_equal(new.nu["w"][1::2], old.nu["w"][1::2])
    np.testing.assert_array_equal(new.mu["b"], old.mu["b"])
    assert new.count == 3


def test_reset_state_never_changes_a_shape():
    params = {"w": jnp.ones((4, 3))}
    tx = optax_cl.chain(
        optax_cl.scale_by_decoupled_factored_rms(min_dim_size_to_factor=2)
    )
    _, state = tx.update(params, tx.init(params), params)
    reset = optax_cl.reset_state(state, {"w": True})
    assert jax.tree.map(jnp.shape, reset) == jax.tree.map(jnp.shape, state)
    with pytest.raises(ValueError, match=r"`mask` must broadcast.*at `w`"):
        optax_cl.reset_state(state, {"w": jnp.ones((4, 3), bool)})
    with pytest.raises(ValueError, match="`mask` must have the tree structure"):
        optax_cl.reset_state(state, {"v": True})


def test_begin_task_resets_the_running_maximum_only_when_asked():
    params = make_params()
    tx = optax_cl.chain(optax_cl.scale_by_decoupled_amsgrad())
    state = trained(tx, params)
    kept = optax_cl.begin_task(state, params)
    reset = optax_cl.begin_task(state, params, reset_nu_max=True)
    np.testing.assert_array_equal(kept[0].nu_max["w"], state[0].nu_max["w"])
    assert not np.any(reset[0].nu_max["w"]) and np.all(reset[0].nu["w"] > 0)


# Looking and growing


def test_map_states_reaches_owners_inside_owners():
    tx = optax_cl.protect(1, owner(), **OWNER)
    state = optax_cl.map_states(
        lambda s: s._replace(tasks=s.tasks + 5), tx.init(make_params()), ProtectState
    )
    assert state.tasks == 5 and state.inner[0].tasks == 5
    with pytest.raises(ValueError, match="holds no SumState"):
        optax_cl.map_states(lambda s: s, state, SumState)


def test_describe_counts_a_memory_without_the_moments_in_it():
    params = make_params()
    tx = optax_cl.chain(summing(), owner(2, "balance"))
    state = boundary(tx.init(params), params, make_batches(0))
    first, second = optax_cl.describe(state)
    assert (first.method, first.tasks, first.capacity, first.left) == ("Sum", 1, 3, 2)
    assert first.bytes == 4 * (12 + 3 + 1 + 3)
    assert (second.method, second.tasks, second.left) == ("Protect", 1, None)
    # Basis and energy; anchor, curvature, mean; four scalars.
    assert second.bytes == 4 * (2 * (4 + 1) + 3 * 2 * 3 + 4)
    assert second.path == "[1]"


def test_grow_enlarges_and_refuses_to_shrink():
    params = make_params()
    state = optax_cl.chain(summing()).init(params)
    assert optax_cl.grow(state, 7)[0].bank.shape == (7,)
    with pytest.raises(ValueError, match=r"can't shrink: got 2.* is 3"):
        optax_cl.grow(state, 2)
    with pytest.raises(ValueError, match="no memory"):
        optax_cl.grow(optax.adam(0.1).init(params), 7)
    with pytest.raises(TypeError, match="`capacity`"):
        optax_cl.grow(state, 7.0)


def test_a_single_memory_of_several_can_grow():
    params = make_params()
    tx = optax_cl.chain(
        summing(), optax_cl.protect(2, optax_cl.project(), memory="grow", **OWNER)
    )
    state = tx.init(params)
    first, second = optax_cl.describe(state)
    with pytest.raises(ValueError, match=r"`Sum` at `\[0\]` is 3.*`path=`"):
        optax_cl.grow(state, 2)
    grown = optax_cl.describe(optax_cl.grow(state, 9, path=first.path))
    assert [row.capacity for row in grown] == [9, second.capacity]
    grown = optax_cl.describe(optax_cl.grow(state, 3, path=second.path))
    assert [row.capacity for row in grown] == [first.capacity, 3]
    with pytest.raises(ValueError, match=r"can grow at `path='\[7\]'`; it has"):
        optax_cl.grow(state, 9, path="[7]")
