"""The same boundaries on nnx.Optimizer, linen TrainState and trees with None leaves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optax_cl
import optax_cl.flax


class Model(nnx.Module):
    """Two layers, with dropout and batch statistics between them."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))


def make_tx():
    return optax.chain(
        optax_cl.protect(
            2,
            optax_cl.attenuate(),
            optax_cl.ewc(1.0),
            optax_cl.scale_by_decoupled_adam(),
            optax_cl.project(),
        ),
        optax.scale_by_learning_rate(0.05),
    )


def make_batches(seed, sizes=(8, 8, 5)):
    rng = np.random.default_rng(seed)
    return [
        (
            jnp.asarray(rng.normal(size=(n, 6)), jnp.float32),
            jnp.asarray(rng.integers(0, 4, n)),
        )
        for n in sizes
    ]


def test_nnx_optimizer_goes_through_three_tasks_with_one_compilation():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make_tx(), wrt=nnx.Param)
    task = optax_cl.flax.classification(
        model, lambda m, batch: m(batch[0]), lambda batch: batch[1]
    )
    traces = []

    @nnx.jit
    def step(model, optimizer, batch):
        traces.append(None)

        def loss(m):
            losses = optax.softmax_cross_entropy_with_integer_labels(
                m(batch[0]), batch[1]
            )
            return losses.mean()

        optimizer.update(model, nnx.grad(loss)(model))

    shapes = jax.tree.map(jnp.shape, nnx.as_pure(optimizer.opt_state))
    for seed in range(3):
        batches = make_batches(seed, (8, 8))
        for batch in batches:
            step(model, optimizer, batch)
        before = nnx.as_pure(nnx.state(model))
        before = jax.tree.map(
            lambda x: jax.random.key_data(x) if _is_key(x) else x, before
        )
        stats = optax_cl.flax.collect(
            optimizer, model, batches, task=task, key=jax.random.key(seed)
        )
        optax_cl.flax.end_task(optimizer, model, stats, moments="project")
        optax_cl.flax.begin_task(optimizer, model)
        after = nnx.as_pure(nnx.state(model))
        after = jax.tree.map(
            lambda x: jax.random.key_data(x) if _is_key(x) else x, after
        )
        # Statistics are read in evaluation mode: nothing of the model moves.
        jax.tree.map(np.testing.assert_array_equal, before, after)
    assert len(traces) == 1
    assert shapes == jax.tree.map(jnp.shape, nnx.as_pure(optimizer.opt_state))
    protect, ewc = optax_cl.describe(nnx.as_pure(optimizer.opt_state))
    assert (protect.tasks, ewc.tasks) == (3, 3)
    assert model.dropout.deterministic is False


def test_nnx_boundary_equals_the_functional_one():
    model = Model(nnx.Rngs(1))
    tx = make_tx()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    task = optax_cl.flax.classification(
        model, lambda m, batch: m(batch[0]), lambda batch: batch[1]
    )
    batches = make_batches(7)
    key = jax.random.key(3)
    stats = optax_cl.flax.collect(optimizer, model, batches, task=task, key=key)
    optax_cl.flax.end_task(optimizer, model, stats)

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = nnx.to_pure_dict(params)

    def logits(params, batch):
        state = nnx.State(params)
        full = nnx.merge(graphdef, state, rest)
        full.eval()
        return full(batch[0])

    plain = optax_cl.classification(logits, lambda batch: batch[1])
    state = tx.init(params)
    state = optax_cl.end_task(
        state, params, optax_cl.collect(state, params, batches, task=plain, key=key)
    )
    theirs = jax.tree.leaves(nnx.as_pure(optimizer.opt_state))
    ours = jax.tree.leaves(state)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_linen_train_state_needs_no_face_of_its_own():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(4)(x)
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
            return nn.Dense(4)(x)

    net = Net()
    variables = net.init(jax.random.key(0), jnp.zeros((1, 6)), train=False)
    state = TrainState.create(
        apply_fn=net.apply, params=variables["params"], tx=make_tx()
    )
    # A TrainState starts with a Python integer, which would cost one more compilation.
    state = state.replace(step=jnp.zeros([], jnp.int32))
    task = optax_cl.classification(
        lambda params, batch: net.apply({"params": params}, batch[0], train=False),
        lambda batch: batch[1],
    )

    @jax.jit
    def step(state, batch, key):
        def loss(params):
            logits = state.apply_fn(
                {"params": params}, batch[0], train=True, rngs={"dropout": key}
            )
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, batch[1]
            ).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for seed in range(3):
        batches = make_batches(seed, (8, 8))
        for i, batch in enumerate(batches):
            state = step(state, batch, jax.random.key(i))
        stats = optax_cl.collect(
            state.opt_state, state.params, batches, task=task, key=jax.random.key(seed)
        )
        opt_state = optax_cl.end_task(state.opt_state, state.params, stats)
        state = state.replace(opt_state=optax_cl.begin_task(opt_state, state.params))
    assert step._cache_size() == 1
    assert [m.tasks for m in optax_cl.describe(state.opt_state)] == [3, 3]


def test_equinox_style_tree_with_none_leaves():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(6, 4, 4, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = optax.chain(
        optax_cl.protect(
            2,
            optax_cl.attenuate(),
            optax_cl.ewc(1.0),
            optax_cl.scale_by_decoupled_adam(),
            matrices=optax_cl.matrix_views(layout="out_in"),
        ),
        optax.scale_by_learning_rate(0.05),
    )
    task = optax_cl.classification(
        lambda params, batch: jax.vmap(eqx.combine(params, static))(batch[0]),
        lambda batch: batch[1],
    )
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(lambda p: task.loss(p, batch).mean())(params)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(params, updates), state

    for seed in range(3):
        batches = make_batches(seed, (8, 8))
        for batch in batches:
            params, state = step(params, state, batch)
        stats = optax_cl.collect(
            state, params, batches, task=task, key=jax.random.key(seed)
        )
        state = optax_cl.begin_task(optax_cl.end_task(state, params, stats), params)
    assert step._cache_size() == 1
    basis = state[0].basis.layers[0].weight
    # An Equinox weight is [out, in]; the basis lies on the fan-in side.
    assert basis.shape == (6, 2)
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-5)


def _is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def test_edited_states_of_an_nnx_optimizer_serve_on():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    tx = optax_cl.decoupled_adamw(
        0.1, modifiers=[optax_cl.ewc(1.0, anchors="separate", capacity=1)]
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    task = optax_cl.flax.classification(model, lambda m, b: m(b[0]), lambda b: b[1])
    batches = [(jnp.ones((2, 4)), jnp.array([0, 1]))]

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(
            model, nnx.grad(lambda m: (m(batches[0][0]) ** 2).mean())(model)
        )

    for room in (1, 2):
        optimizer.opt_state = nnx.data(optax_cl.grow(optimizer.opt_state, room))
        step(model, optimizer)
        statistics = optax_cl.flax.collect(
            optimizer, model, batches, task=task, key=jax.random.key(0)
        )
        optax_cl.flax.end_task(optimizer, model, statistics)
        optimizer.opt_state = nnx.data(optax_cl.reset_state(optimizer.opt_state))
        assert optax.tree.get(optimizer.opt_state, "nu")["kernel"][...].max() == 0
    step(model, optimizer)
    assert optax_cl.describe(optimizer.opt_state)[0].left == 0


@pytest.mark.parametrize("call", ["begin_task", "reset_state"])
def test_an_unfinished_update_of_an_nnx_optimizer_is_dropped(call):
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    tx = optax_cl.multi_steps(optax_cl.decoupled_adamw(0.1), 2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    assert optimizer.opt_state.mini_step[...] == 1
    if call == "begin_task":
        optax_cl.flax.begin_task(optimizer, model)
    else:
        optimizer.opt_state = nnx.data(optax_cl.reset_state(optimizer.opt_state))
    assert optimizer.opt_state.mini_step[...] == 0
    assert not np.any(optimizer.opt_state.acc_grads["kernel"][...])
    before = np.asarray(model.kernel[...])
    optimizer.update(model, grads)
    np.testing.assert_array_equal(model.kernel[...], before)


# Reading and editing


def make_packnet():
    model = Model(nnx.Rngs(0))
    tx = optax.chain(optax.adamw(0.1), optax_cl.isolation.packnet())
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@pytest.mark.parametrize("jitted", [False, True])
def test_what_edits_state_and_parameters_reaches_the_model(jitted):
    model, optimizer = make_packnet()
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model, nnx.BatchStat)))

    def prune(optimizer, model):
        optax_cl.flax.edit(
            optimizer, model, lambda s, p: optax_cl.isolation.packnet_prune(s, p, 0.5)
        )

    (nnx.jit(prune) if jitted else prune)(optimizer, model)
    assert (model.first.kernel[...] == 0).sum() == 12
    state, params = optax_cl.flax.pure(optimizer, model)
    assert (state[-1].owner["first"]["kernel"] == 0).sum() == 12
    of_first = optax_cl.isolation.packnet_params(state, params, 1)
    np.testing.assert_array_equal(of_first["first"]["kernel"], model.first.kernel[...])
    after = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_state_may_be_edited_alone_and_grown():
    model = Model(nnx.Rngs(0))
    ewc = optax_cl.ewc(1.0, anchors="separate", capacity=2)
    tx = optax_cl.decoupled_adamw(0.1, modifiers=[ewc])
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optax_cl.flax.edit(optimizer, model, lambda s, p: (optax_cl.grow(s, 5), p))
    state, params = optax_cl.flax.pure(optimizer, model)
    assert optax_cl.describe(state)[0].capacity == 5
    assert optax_cl.ewc_loss(state, params) == 0
    task = optax_cl.flax.classification(model, lambda m, b: m(b[0]), lambda b: b[1])
    for seed in range(3):  # more than fitted before
        batches = make_batches(seed)
        optimizer.update(
            model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        )
        stats = optax_cl.flax.collect(
            optimizer, model, batches, task=task, key=jax.random.key(0)
        )
        optax_cl.flax.end_task(optimizer, model, stats)
    assert optax_cl.describe(optax_cl.flax.pure(optimizer, model)[0])[0].tasks == 3


def test_an_edit_of_another_structure_is_refused():
    model, optimizer = make_packnet()
    for wrong in (lambda s, p: s, lambda s, p: (s, {}), lambda s, p: (s[:1], p)):
        with pytest.raises(ValueError, match=r"pair `\(opt_state, params\)`"):
            optax_cl.flax.edit(optimizer, model, wrong)
    with pytest.raises(TypeError, match=r"`optimizer` must be an nnx.Optimizer"):
        optax_cl.flax.pure(nnx.as_pure(optimizer.opt_state), model)
