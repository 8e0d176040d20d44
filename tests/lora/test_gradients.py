"""Mean gradients of targeted kernels, against float64 NumPy, and their cosines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_cl
from optax_cl import lora, matrix_views
from optax_cl.lora import _gradients


def drawn(seed, *shape):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


def linear_loss(params, batch):
    x, y = batch
    return (((x @ params["kernel"] + params["bias"]) - y) ** 2).sum(axis=1)


def linear_case(examples):
    params = {"kernel": drawn(0, 4, 3), "bias": drawn(1, 1, 3)}
    data = drawn(2, examples, 4), drawn(3, examples, 3)
    return params, lora.targets(params, {"kernel": 2}, alpha=1.0), data


def in_float64(params, data):
    w, b, x, y = (np.asarray(v, np.float64) for v in (*params.values(), *data))
    return 2 * x.T @ (x @ w + b - y) / len(x)


def cut(data, *sizes):
    ends = np.cumsum(sizes)
    return [
        jax.tree.map(lambda v, a=end - size, b=end: v[a:b], data)
        for size, end in zip(sizes, ends, strict=True)
    ]


def test_every_example_weighs_the_same_in_a_ragged_last_batch():
    params, chosen, data = linear_case(11)
    batches = iter(cut(data, 4, 4, 3))
    found = lora.mean_gradients(chosen, linear_loss, params, batches)
    expected = in_float64(params, data)
    assert found.keys() == {"kernel"}
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-5, atol=1e-6)
    # The mean of the batches' means is another number.
    means = [in_float64(params, b) for b in cut(data, 4, 4, 3)]
    assert np.abs(np.mean(means, axis=0) - expected).max() > 1e-3


def test_a_ragged_batch_compiles_nothing_new():
    params, chosen, data = linear_case(11)
    traces = 0

    def loss(params, batch):
        nonlocal traces
        traces += 1
        return linear_loss(params, batch)

    lora.mean_gradients(chosen, loss, params, cut(data, 4, 4, 3))
    assert traces == 1


def test_stacked_batches_in_a_scan_give_the_same_inside_and_outside_jit():
    params, chosen, data = linear_case(12)
    stacked = jax.tree.map(lambda v: v.reshape(3, 4, -1), data)

    def gradients(params, batches):
        return lora.mean_gradients(chosen, linear_loss, params, batches, stacked=True)

    expected = lora.mean_gradients(chosen, linear_loss, params, cut(data, 4, 4, 4))
    for found in (gradients(params, stacked), jax.jit(gradients)(params, stacked)):
        np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-5)


def test_only_targeted_kernels_are_differentiated():
    @jax.custom_vjp
    def forward_only(x):
        return x

    def refuse(_, g):
        raise AssertionError("differentiated")

    forward_only.defvjp(lambda x: (x, None), refuse)

    def loss(params, batch):
        frozen = {"kernel": params["kernel"], "bias": forward_only(params["bias"])}
        return linear_loss(frozen, batch)

    params, chosen, data = linear_case(4)
    params["steps"] = np.zeros([], np.int32)
    lora.mean_gradients(chosen, loss, params, [data])


def test_sums_of_bfloat16_gradients_are_kept_in_float32():
    params = {"kernel": np.zeros((2, 2), jnp.bfloat16)}
    chosen = lora.targets(params, {"kernel": 1}, alpha=1.0)
    found = lora.mean_gradients(
        chosen,
        lambda p, x: (x @ p["kernel"]).sum(axis=1),
        params,
        np.ones((600, 1, 2), jnp.bfloat16),
        stacked=True,
    )
    # A bfloat16 sum of ones stops at 256.
    assert found["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(found["kernel"], 1.0)


def test_a_large_batch_does_not_overflow_in_half_precision():
    params = {"kernel": np.zeros((2, 2), np.float16)}
    chosen = lora.targets(params, {"kernel": 1}, alpha=1.0)
    batch = np.full((64, 2), 3000.0, np.float16)
    loss = lambda p, x: (x @ p["kernel"]).sum(axis=1).astype(jnp.float32)  # noqa: E731
    found = lora.mean_gradients(chosen, loss, params, [batch])
    np.testing.assert_allclose(found["kernel"], 3000.0, rtol=1e-3)


def test_float64_kernels_get_float64_gradients(x64):
    params = {"kernel": np.ones((3, 2))}
    chosen = lora.targets(params, {"kernel": 1}, alpha=1.0)
    x = np.random.default_rng(0).normal(size=(5, 3))
    found = lora.mean_gradients(
        chosen, lambda p, x: (x @ p["kernel"]).sum(axis=1), params, [x]
    )
    expected = np.asarray(x).mean(axis=0)[:, None].repeat(2, axis=1)
    assert found["kernel"].dtype == jnp.float64
    # Weights of examples are float32, and 1/5 there is good to 6e-8 only if divided
    # last.
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-14)


def test_stacked_and_convolution_kernels_come_as_matrices():
    params = {"layers": drawn(0, 2, 3, 3), "conv": drawn(1, 3, 3, 2, 5)}
    rule = matrix_views(stacked="layers")
    chosen = lora.targets(params, {"": 1}, alpha=1.0, matrices=rule)

    def loss(params, batch):
        squares = sum((p**2).sum() for p in jax.tree.leaves(params))
        return squares * jnp.ones(batch.shape[0])

    found = lora.mean_gradients(chosen, loss, params, [np.ones((2, 1), np.float32)])
    np.testing.assert_allclose(found["layers"], 2 * params["layers"], rtol=1e-6)
    matrix = params["conv"].reshape(18, 5)
    np.testing.assert_allclose(found["conv"], 2 * matrix, rtol=1e-6)


def test_it_takes_the_state_of_an_nnx_module():
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    chosen = lora.targets(state, {"kernel": 1}, alpha=1.0)
    x = drawn(0, 4, 3)
    found = lora.mean_gradients(
        chosen, lambda s, x: nnx.merge(graph, s)(x).sum(axis=1), state, [x]
    )
    expected = np.asarray(x).mean(axis=0)[:, None].repeat(2, axis=1)
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_the_step_holds_one_copy_of_the_sums_and_less_than_one_of_gradients():
    # Parameters and two gradient copies is all that a start may need: the finished one
    # of the new task, and the sums of the reference, which are updated in place.
    params = {f"layer{i}": drawn(i, 128, 128) for i in range(8)}
    chosen = lora.targets(params, {"layer": 2}, alpha=1.0)

    def loss(params, x):
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return x.sum(axis=1)

    sums = _gradients._nothing(chosen, params)
    batch, weights = np.ones((4, 128), np.float32), np.ones(4, np.float32)
    step = _gradients._step.lower(loss, chosen, sums, params, batch, weights)
    memory = step.compile().memory_analysis()
    copy = sum(p.nbytes for p in params.values())
    assert memory.alias_size_in_bytes >= copy
    assert memory.temp_size_in_bytes < 0.6 * copy


def test_no_batch_is_an_error():
    params, chosen, _ = linear_case(4)
    with pytest.raises(ValueError, match="`batches` is empty"):
        lora.mean_gradients(chosen, linear_loss, params, [])
    with pytest.raises(ValueError, match=r"\[batches, B, \.\.\.\]"):
        lora.mean_gradients(
            chosen, linear_loss, params, np.ones((0, 4, 4), np.float32), stacked=True
        )


def test_a_loss_that_is_a_mean_is_refused():
    params, chosen, data = linear_case(4)
    with pytest.raises(ValueError, match="loss of each example"):
        lora.mean_gradients(
            chosen, lambda p, b: linear_loss(p, b).mean(), params, [data]
        )


def test_a_gradient_that_is_not_finite_is_named():
    params, chosen, (x, y) = linear_case(4)
    x[0] = np.nan
    with pytest.raises(ValueError, match="at `kernel` the mean gradient is not finite"):
        lora.mean_gradients(chosen, linear_loss, params, [(x, y)])


# --- Labels --------------------------------------------------------------------------


def classifier(labels):
    """A task of three classes, and batches of 4 and of 3 with these labels."""
    params = {"kernel": drawn(0, 4, 3)}
    task = optax_cl.classification(lambda p, b: b["x"] @ p["kernel"], lambda b: b["y"])
    batches = [{"x": drawn(1, len(y), 4), "y": np.asarray(y)} for y in labels]
    return lora.targets(params, {"kernel": 2}, alpha=1.0), task, params, batches


def test_a_task_gives_the_gradient_of_its_loss():
    chosen, task, params, batches = classifier(([0, 1, 2, 1], [2, 0, 0]))
    expected = lora.mean_gradients(chosen, task.loss, params, batches)
    found = lora.mean_gradients(chosen, task, params, batches)
    np.testing.assert_array_equal(found["kernel"], expected["kernel"])
    stacked = jax.tree.map(lambda x: np.stack([x[:3], x[1:]]), batches[0])
    found = lora.mean_gradients(chosen, task, params, stacked, stacked=True)
    inside = jax.jit(
        lambda b: lora.mean_gradients(chosen, task, params, b, stacked=True)
    )(stacked)
    np.testing.assert_allclose(found["kernel"], inside["kernel"], rtol=1e-6)


def test_labels_of_a_task_are_judged_as_collect_judges_them():
    for second, error, match in [
        ([2, 0, -1], ValueError, "`task.labels` must give classes from 0 to 2.*-1 to"),
        ([2, 0, 3], ValueError, "`task.labels` must give classes from 0 to 2.*to 3"),
    ]:
        chosen, task, params, batches = classifier(([0, 1, 2, 1], second))
        with pytest.raises(error, match=match):
            lora.mean_gradients(chosen, task, params, batches)
        stacked = jax.tree.map(lambda x: x[None], batches[1])
        with pytest.raises(error, match=match):
            lora.mean_gradients(chosen, task, params, stacked, stacked=True)
    chosen, task, params, batches = classifier(([0.0, 1.0, 2.0, 1.0],))
    with pytest.raises(TypeError, match="got dtype float"):
        lora.mean_gradients(chosen, task, params, batches)
    with pytest.raises(ValueError, match=r"`task\.loss` is None"):
        lora.mean_gradients(chosen, optax_cl.Task(), params, batches)


def test_a_loss_that_is_not_finite_is_told_where_the_gradient_is():
    # The example with the label -1 adds nothing to the gradient, and its loss is NaN.
    good, bad = [0, 1, 2, 1], [2, -1, 0]
    for labels in (([*bad, 1], good), (good, bad)):
        chosen, task, params, batches = classifier(labels)
        with pytest.raises(ValueError, match=r"`loss` is not finite.*label"):
            lora.mean_gradients(chosen, task.loss, params, batches)
    stacked = jax.tree.map(lambda x: x[None], batches[1])
    with pytest.raises(ValueError, match=r"`loss` is not finite.*label"):
        lora.mean_gradients(chosen, task.loss, params, stacked, stacked=True)


# --- Conflicts -----------------------------------------------------------------------


def test_cosines_equal_float64_for_each_layer_of_a_stack_and_over_all():
    g = {"a": drawn(0, 5, 4), "b": drawn(1, 3, 4, 2)}
    r = {"a": drawn(2, 5, 4), "b": drawn(3, 3, 4, 2)}

    def cosine(x, y):
        x, y = np.ravel(np.float64(x)), np.ravel(np.float64(y))
        return x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    found = lora.conflict(g, r)
    np.testing.assert_allclose(found.cosine["a"], cosine(g["a"], r["a"]), atol=1e-6)
    layers = [cosine(g["b"][i], r["b"][i]) for i in range(3)]
    np.testing.assert_allclose(found.cosine["b"], layers, atol=1e-6)
    flat = [np.concatenate([np.ravel(x) for x in t.values()]) for t in (g, r)]
    np.testing.assert_allclose(found.overall, cosine(*flat), atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_cosines_are_right_where_float32_can_not_square(size):
    size = np.float32(size)
    g = {"a": size * drawn(0, 5, 4), "b": size * drawn(1, 4, 4)}
    found = lora.conflict(g, jax.tree.map(np.negative, g))
    for cosine in (*found.cosine.values(), found.overall):
        np.testing.assert_allclose(cosine, -1.0, rtol=1e-6)


def test_the_cosine_with_nothing_is_zero():
    g = {"a": drawn(0, 5, 4)}
    for nothing in (0.0, np.nan, np.inf):
        found = lora.conflict(g, {"a": np.full((5, 4), nothing, np.float32)})
        assert (found.cosine["a"], found.overall) == (0.0, 0.0)
    with pytest.raises(ValueError, match="`reference`"):
        lora.conflict(g, {"a": np.ones((4, 5), np.float32)})
