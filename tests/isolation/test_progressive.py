import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_cl
from optax_cl.isolation import progressive
from tests.arrays import normal

KEY = jax.random.key(0)
COLUMNS = 3
# Momentum and weight decay, which a mask on gradients would let through.
TX = optax.chain(
    optax.adamw(0.05, weight_decay=0.1), progressive(COLUMNS, inputs="first")
)


def make_params():
    return {
        "first": normal(0, 4, 6) / 2,
        "bias": normal(1, 6) / 2,
        "second": normal(2, 6, 9) / 2,
        "third": normal(3, 9, 6) / 2,
    }


def network(params, x):
    """Outputs ``[B, columns, 2]``."""
    h = jnp.tanh(x @ params["first"] + params["bias"][None])
    h = jnp.tanh(h @ params["second"])
    return (h @ params["third"]).reshape(len(x), COLUMNS, -1)


def boundary(state, params):
    stats = optax_cl.collect(state, params, [np.ones(1)], task=optax_cl.Task(), key=KEY)
    return optax_cl.end_task(state, params, stats)


def make_train(tx, network, steps=20):
    @jax.jit
    def train(params, state, x, y, task):
        def loss(p):
            return jnp.mean((network(p, x)[:, task] - y) ** 2)

        def step(_, carry):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, step, (params, state))

    return train


train = make_train(TX, network)
outputs = jax.jit(network)


@pytest.fixture(scope="module")
def three_tasks():
    """The parameters before, and after each of three tasks."""
    params = make_params()
    state = TX.init(params)
    seen, x = [params], normal(9, 12, 4)
    for task in range(COLUMNS):
        params, state = train(params, state, x, normal(20 + task, 12, 2), task)
        seen.append(params)
        if task < COLUMNS - 1:
            state = boundary(state, params)
    return seen, x


def test_outputs_of_a_column_never_change_after_its_task_to_the_bit(three_tasks):
    (_, *seen), x = three_tasks
    for task, params in enumerate(seen):
        then = outputs(params, x)[:, task]
        for later in seen[task:]:
            assert np.array_equal(then, outputs(later, x)[:, task])


def test_only_the_blocks_that_feed_the_tasks_column_move(three_tasks):
    seen, _ = three_tasks
    for task in range(COLUMNS):
        before, after = (jax.tree.map(np.asarray, p) for p in seen[task : task + 2])
        for name, unit in (("second", 3), ("third", 2)):
            moved = before[name] != after[name]
            mine = np.zeros_like(moved)
            mine[: 2 * task + 2 if name == "second" else 3 * task + 3] = True
            mine[:, : unit * task] = mine[:, unit * (task + 1) :] = False
            if task == 0:  # what later columns feed earlier ones became zero
                ahead = np.kron(
                    np.tril(np.ones((3, 3)), -1), np.ones((len(moved) // 3, unit))
                )
                assert not after[name][ahead > 0].any()
                mine |= ahead > 0
            assert np.array_equal(moved, mine), name
        for name in ("first", "bias"):
            moved = (before[name] != after[name]).reshape(-1, COLUMNS, 2)
            assert moved[:, task].all() and moved.sum() == moved[:, task].size


def columns_of(params):
    """The same network as the paper has it: own kernels W and lateral ones U."""
    width = {"first": (4, 2), "second": (2, 3), "third": (3, 2)}

    def block(name, j, k):
        rows, cols = width[name]
        return params[name][rows * j : rows * (j + 1), cols * k : cols * (k + 1)]

    return [
        {
            "first": block("first", 0, k),
            "bias": params["bias"][2 * k : 2 * k + 2],
            "second": block("second", k, k),
            "third": block("third", k, k),
            "lateral": [
                {name: block(name, j, k) for name in ("second", "third")}
                for j in range(k)
            ],
        }
        for k in range(COLUMNS)
    ]


def column_outputs(column, before, x):
    """Outputs of the last of some columns; those before it as they are."""
    hidden = []  # for each column the inputs of the second and the third layer
    for c in (*before, column):
        units = {"second": jnp.tanh(x @ c["first"] + c["bias"][None])}
        for name, out in (("second", "third"), ("third", "output")):
            z = units[name] @ c[name]
            for u, h in zip(c["lateral"], hidden, strict=True):
                z = z + h[name] @ u[name]
            units[out] = jnp.tanh(z) if out == "third" else z
        hidden.append(units)
    return hidden[-1]["output"]


def test_it_is_the_papers_network_of_separate_columns():
    tx = optax.chain(optax.sgd(0.3), progressive(COLUMNS, inputs="first"))
    train_wide = make_train(tx, network)
    params, x = make_params(), normal(9, 12, 4)
    state, columns = tx.init(params), columns_of(params)

    @jax.jit
    def train_column(column, before, y):
        def step(_, column):
            grads = jax.grad(
                lambda c: jnp.mean((column_outputs(c, before, x) - y) ** 2)
            )(column)
            return jax.tree.map(lambda p, g: p - 0.3 * g, column, grads)

        return jax.lax.fori_loop(0, 20, step, column)

    # A first step of nothing, so that what must be zero is so.
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    params = optax.apply_updates(params, updates)
    for task in range(COLUMNS):
        y = normal(20 + task, 12, 2)
        params, state = train_wide(params, state, x, y, task)
        columns[task] = train_column(columns[task], columns[:task], y)
        if task < COLUMNS - 1:
            state = boundary(state, params)
    for found, expected in zip(columns_of(params), columns, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected
        )


class Net(nnx.Module):
    """Convolution, a norm for each column by itself, attention by column."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 12, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(12, num_groups=COLUMNS, rngs=rngs)
        self.second = nnx.Conv(12, 12, (3, 3), strides=2, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(COLUMNS, 12, decode=False, rngs=rngs)
        self.out = nnx.Linear(12, 2 * COLUMNS, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.norm(self.conv(x)))
        h = nnx.relu(self.second(h)).reshape(len(x), -1, 12)
        h = h + self.attention(h)
        return self.out(h.mean(1)).reshape(len(x), COLUMNS, 2)


def test_columns_of_a_convolution_with_norm_and_attention_hold():
    graph, params = nnx.split(Net(nnx.Rngs(0)))
    axes = {
        "(query|key|value)/kernel": (0, 1),
        "(query|key|value)/bias": (None, 0),
        "attention/out/kernel": (0, 2),
    }
    link = progressive(COLUMNS, inputs="^conv", axes=axes)
    tx = optax.chain(optax.adamw(0.01, weight_decay=0.1), link)

    def net(params, x):
        return nnx.merge(graph, params)(x)

    train_net, net = make_train(tx, net, steps=3), jax.jit(net)
    state, x = tx.init(params), normal(0, 3, 6, 6, 1)
    start, old = params, []
    for task in range(COLUMNS):
        params, state = train_net(params, state, x, normal(task, 3, 2), task)
        old.append(net(params, x)[:, task])
        if task < COLUMNS - 1:
            state = boundary(state, params)
    for task, then in enumerate(old):
        assert np.array_equal(net(params, x)[:, task], then)
    moved = jax.tree.map(lambda a, b: np.array_equal(a, b), start, params)
    assert not any(jax.tree.leaves(moved))  # every leaf of the model took part


def test_what_later_columns_would_feed_is_zero_from_the_first_update():
    link = progressive(2, inputs="none|first")
    params = {"first": normal(0, 2, 2), "second": normal(1, 4, 2)}
    state = link.init(params)
    for dtype in (jnp.float32, jnp.bfloat16):
        mine = jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), params)
        updates, _ = link.update(jax.tree.map(jnp.ones_like, mine), state, mine)
        new = optax.apply_updates(mine, updates)
        assert new["second"].dtype == dtype and not new["second"][2:, 0].any()
        assert np.array_equal(new["second"][:2, 0], mine["second"][:2, 0] + 1)
        assert np.array_equal(new["second"][:, 1], mine["second"][:, 1])


def test_bfloat16_updates_bring_float32_to_zero_in_three_steps():
    link = progressive(2, inputs="first")
    params = {"first": normal(0, 2, 2), "second": normal(1, 40, 20)}
    state = link.init(params)
    for _ in range(3):
        zero = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.bfloat16), params)
        params = optax.apply_updates(params, link.update(zero, state, params)[0])
    assert not params["second"][20:, :10].any() and params["second"][:20].all()


def test_a_leaf_common_to_all_columns_is_trained_by_the_first_task_alone():
    link = progressive(2, inputs="first", axes={"shared": (None, None)})
    params = {"first": np.ones((1, 2)), "shared": np.ones((3, 5)), "scale": np.ones([])}
    first = link.init(params)
    for state, learnt in ((first, 1), (boundary(first, params), 0)):
        updates, _ = link.update(params, state, params)
        assert (np.asarray(updates["shared"]) == learnt).all()
        assert updates["scale"] == learnt


def test_hidden_leaves_and_integers_pass():
    params = {**make_params(), "steps": np.ones(2, np.int32)}
    hide = {k: k in ("first", "second", "steps") for k in params}
    tx = optax.masked(progressive(3, inputs="first"), hide)
    updates, _ = tx.update(params, tx.init(params), params)
    for name in ("third", "bias", "steps"):
        assert np.array_equal(updates[name], params[name])
    assert not np.array_equal(updates["second"], params["second"])


def test_nothing_is_compiled_again_over_tasks_and_nothing_learns_after_the_last():
    params = make_params()
    state, x, y = TX.init(params), normal(9, 12, 4), normal(5, 12, 2)
    before = train._cache_size()
    for task in range(COLUMNS):
        params, state = train(params, state, x, y, task)
        if task == COLUMNS - 1:
            with pytest.warns(UserWarning, match="3 columns") as told:
                state = boundary(state, params)
            assert len(told) == 1
        else:
            state = boundary(state, params)
    assert train._cache_size() <= before + 1
    (row,) = [r for r in optax_cl.describe(state) if r.method == "Progressive"]
    assert (row.tasks, row.capacity, row.bytes, row.left) == (3, 3, 2, 0)
    after, _ = train(params, state, x, y, 0)
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), params, after))
    )


def test_tasks_beyond_the_last_column_learn_nothing_however_many():
    link, params = progressive(2, inputs="first"), {"first": np.ones((2, 4))}
    state = link.init(params)
    with pytest.warns(UserWarning, match="2 columns"):
        for _ in range(4):
            state = boundary(state, params)
        (row,) = optax_cl.describe(state)
        assert (row.tasks, row.left) == (2, 0)
        # The number of a task stops where eight bits end.
        state = boundary(state._replace(task=np.uint8(255)), params)
    assert state.task == 255
    assert not link.update(params, state, params)[0]["first"].any()


def test_a_task_ends_inside_jit_also_in_a_state_that_it_closes_over():
    params = make_params()
    state = progressive(COLUMNS, inputs="first").init(params)
    for task in (1, COLUMNS):
        state = state._replace(task=jnp.uint8(task))
        inside = jax.jit(lambda state=state: boundary(state, params))
        if task < COLUMNS:
            assert inside().task == task + 1
        else:
            with pytest.warns(UserWarning, match="3 columns"):
                assert inside().task == task + 1


def test_axes_may_be_integers_of_numpy():
    params = {**make_params(), "heads": normal(5, 2, 6, 3)}
    updates = jax.tree.map(jnp.zeros_like, params)

    def routed(*pair):
        link = progressive(3, inputs="first", axes={"heads": pair})
        return link.update(updates, link.init(params), params)[0]["heads"]

    assert np.array_equal(routed(np.int64(2), np.int32(1)), routed(2, 1))
    assert np.array_equal(routed(None, np.uint8(1)), routed(None, 1))


def test_mistakes_are_named():
    params = make_params()
    make = functools.partial(progressive, inputs="first")
    with pytest.raises(TypeError, match="`columns`"):
        make(2.0)
    for columns in (0, 255):
        with pytest.raises(ValueError, match="`columns` must be"):
            make(columns)
    with pytest.raises(ValueError, match="`inputs` must be a regular expression"):
        progressive(2, inputs="(")
    with pytest.raises(ValueError, match="`axes` must be a regular expression"):
        make(2, axes={"(": (0, 1)})
    for arguments in ({"inputs": b"first"}, {"inputs": "a", "axes": {b"b": (0, 1)}}):
        with pytest.raises(ValueError, match=r"must be a regular expression.*bytes"):
            progressive(2, **arguments)
    with pytest.raises(ValueError, match=r"`inputs`.*'frst'.*no leaf.*bias, first"):
        progressive(3, inputs="frst").init(params)
    with pytest.raises(ValueError, match=r"`axes`.*'conv'.*no leaf"):
        make(3, axes={"conv": (0, 1)}).init(params)
    with pytest.raises(ValueError, match=r"axis 0 of `bias`.*\(6,\).*multiple of 4"):
        make(4).init(params)
    for path, shape in (("bias", (2, 3)), ("embedding", (6, 3)), ("w", (2, 3, 3))):
        wrong = {"first": params["first"], path: np.zeros(shape, np.float32)}
        with pytest.raises(ValueError, match=rf"can't tell which axes .*`{path}`"):
            make(3).init(wrong)
    for pair in (
        (0, 0),
        (1, None),
        (0, 2),
        (0,),
        1,
        (False, True),
        (None, True),
        (0, 1.0),
    ):
        with pytest.raises(ValueError, match=r"`axes` gives the leaf `second`"):
            make(3, axes={"second": pair}).init(params)
    with pytest.raises(TypeError, match="complex"):
        make(2).init({"first": np.zeros((2, 2), np.complex64)})
    link = make(3)
    state = link.init(params)
    with pytest.raises(ValueError, match="`progressive` reads the parameters"):
        link.update(params, state)
    with pytest.raises(ValueError, match=r"at `first` got \(6, 7\)"):
        link.update({**params, "first": np.zeros((6, 7), np.float32)}, state, params)
