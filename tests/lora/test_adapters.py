"""Adapters beside frozen parameters: applying, converting, labelling."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optax_cl import lora, matrix_views
from tests.arrays import distance, normal
from tests.lora.helpers import plain, random_lora

# Compiled as one function: quicker than their operations one by one. What rounds to
# bfloat16 is better looked at op by op, since a compiler may leave roundings out.
merge, product = jax.jit(lora.merge), jax.jit(lora.product)


def zero_b(adapters):
    return {k: x._replace(b=np.zeros_like(x.b)) for k, x in adapters.items()}


def all_equal(x, y):
    return all(
        np.array_equal(p, q)
        for p, q in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    )


# Applying


def test_merge_adds_the_scaled_product():
    params = plain()
    targets = lora.targets(params, {"kernel": 2}, alpha=3.0)
    adapters = random_lora(targets)
    merged = lora.merge(targets, params, adapters)
    for layer in ("hidden", "out"):
        a, b = (np.asarray(f, np.float64) for f in adapters[f"{layer}/kernel"])
        expected = np.asarray(params[layer]["kernel"], np.float64) + 1.5 * a @ b
        np.testing.assert_allclose(merged[layer]["kernel"], expected, rtol=2e-5)
    assert merged["hidden"]["bias"] is params["hidden"]["bias"]
    assert merged["embed"]["embedding"] is params["embed"]["embedding"]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)]
)
def test_unmerge_takes_out_what_merge_added(dtype, tolerance):
    params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), plain())
    targets = lora.targets(params, {"kernel": 2}, alpha=2.0)
    adapters = random_lora(targets)
    merged = lora.merge(targets, params, adapters)
    back = lora.unmerge(targets, merged, adapters)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, params)
    assert distance(back, params) < 8 * tolerance
    assert distance(merged["out"]["kernel"], params["out"]["kernel"]) > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_b_is_the_base_model_bitwise(dtype):
    params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), plain())
    targets = lora.targets(params, {"kernel": 2}, alpha=2.0)
    adapters = zero_b(random_lora(targets))
    assert all_equal(merge(targets, params, adapters), params)
    x = normal(5, 7, 4, dtype=dtype)
    kernel = params["hidden"]["kernel"]
    for adapter in (adapters["hidden/kernel"], None):
        y = lora.dense(x, kernel, adapter, targets["hidden/kernel"].scale)
        assert y.dtype == dtype and bool(jnp.array_equal(y, x @ kernel))


def test_dense_names_what_does_not_fit():
    kernel = np.ones((4, 3))
    adapter = lora.LoRA(np.ones((4, 2)), np.ones((2, 3)))
    with pytest.raises(
        ValueError, match=r"`x` must be .* in = 4 .* got shape \(7, 5\)"
    ):
        lora.dense(np.ones((7, 5)), kernel, adapter, 1.0)
    other = lora.LoRA(np.ones((3, 2)), np.ones((2, 3)))
    with pytest.raises(
        ValueError, match=r"`adapter` must fit .*\(4, 3\).*'a': \(3, 2\)"
    ):
        lora.dense(np.ones((7, 4)), kernel, other, 1.0)
    with pytest.raises(ValueError, match=r"`kernel` must be \[in, out\].*\(2, 4, 3\)"):
        lora.dense(np.ones((7, 4)), np.stack([kernel, kernel]), adapter, 1.0)
    with pytest.raises(TypeError, match=r"`adapter` must be .* got dict.*\[path\]"):
        lora.dense(np.ones((7, 4)), kernel, {"kernel": adapter}, 1.0)
    assert lora.dense(np.ones(4), kernel, adapter, 1.0).shape == (3,)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("spectral", [False, True])
def test_dense_equals_the_merged_kernel(dtype, rtol, spectral):
    params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), plain())
    targets = lora.targets(params, {"hidden/kernel": 3}, alpha=1.0)
    adapters = random_lora(targets)
    if spectral:
        adapters = lora.to_spectral(adapters)
    x = normal(5, 2, 7, 4, dtype=dtype)
    merged = merge(targets, params, adapters)["hidden"]["kernel"]
    target = targets["hidden/kernel"]
    y = lora.dense(
        x, params["hidden"]["kernel"], adapters["hidden/kernel"], target.scale
    )
    expected = np.asarray(x, np.float64) @ np.asarray(merged, np.float64)
    assert y.dtype == dtype
    error = np.abs(np.asarray(y, np.float64) - expected).max()
    assert error < rtol * np.abs(expected).max()


def test_sums_are_taken_in_float32_for_bfloat16_kernels():
    # 1 + 2^-8 is a tie that bfloat16 rounds down; the product's last bit, which
    # bfloat16 would have dropped before the sum, tips it up.
    params = {"kernel": np.ones((1, 1), jnp.bfloat16)}
    targets = lora.targets(params, {"kernel": 1}, alpha=1.0)
    a, b = np.float32([[[1.0 + 2.0**-9]], [[2.0**-8]]])
    merged = lora.merge(targets, params, {"kernel": lora.LoRA(a, b)})
    assert merged["kernel"].item() > 1.0


def test_float64_kernels_keep_their_digits(x64):
    params = {"kernel": np.full((2, 2), 1.0 + 1e-12)}
    targets = lora.targets(params, {"kernel": 1}, alpha=1.0)
    adapters = zero_b(random_lora(targets))
    assert all_equal(merge(targets, params, adapters), params)


def test_the_product_has_at_most_the_rank():
    targets = lora.targets(plain(), {"hidden/kernel": 2}, alpha=1.0)
    for adapters in (random_lora(targets), lora.to_spectral(random_lora(targets))):
        update = product(adapters["hidden/kernel"])
        assert np.linalg.matrix_rank(update, tol=1e-5) == 2


def test_count_counts_every_number():
    targets = lora.targets(plain(), {"kernel": 2}, alpha=1.0)
    assert lora.count(random_lora(targets)) == 2 * (4 + 6) + 2 * (6 + 3)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda x: {}, "must map the paths"),
        (lambda x: None, "must map the paths"),
        (lambda x: {**x, "more": x["out/kernel"]}, "must map the paths"),
        (lambda x: {**x, "out/kernel": x["out/kernel"].a}, "must hold LoRA"),
        (
            lambda x: {**x, "out/kernel": x["out/kernel"]._replace(a=np.ones((5, 2)))},
            r"at `out/kernel` must fit .*\(6, 3\)",
        ),
        (
            # Would broadcast in silence.
            lambda x: {
                **x,
                "out/kernel": lora.Spectral(
                    jnp.ones(1), jnp.ones((3, 2)), jnp.ones((6, 2))
                ),
            },
            r"at `out/kernel` must fit",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(damage, match):
    params = plain()
    targets = lora.targets(params, {"kernel": 2}, alpha=1.0)
    with pytest.raises(ValueError, match=match):
        lora.merge(targets, params, damage(random_lora(targets)))


def test_foreign_parameters_are_refused():
    params = plain()
    targets = lora.targets(params, {"kernel": 2}, alpha=1.0)
    with pytest.raises(ValueError, match=r"`hidden/kernel` expected shape .*no such"):
        lora.kernels(targets, {"out": params["out"]})


# Models


def test_linen_parameters():
    model = nn.Dense(3)
    x = jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    targets = lora.targets(variables, {"kernel": 2}, alpha=2.0)
    assert list(targets) == ["params/kernel"]
    adapters = random_lora(targets)
    y = model.apply(merge(targets, variables, adapters), x)
    expected = model.apply(variables, x) + x @ product(adapters["params/kernel"])
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("pure", [False, True])
def test_nnx_states(pure):
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state) if pure else state
    targets = lora.targets(params, {"kernel": 2}, alpha=2.0)
    assert list(targets) == ["kernel"]
    adapters = random_lora(targets)
    merged = merge(targets, params, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    if pure:
        nnx.replace_by_pure_dict(state, merged)
        merged = state
    x = jnp.ones((2, 4))
    expected = model(x) + x @ product(adapters["kernel"])
    np.testing.assert_allclose(nnx.merge(graphdef, merged)(x), expected, atol=1e-5)


def test_equinox_trees_with_none_leaves():
    model = eqx.nn.MLP(4, 3, 5, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    views = matrix_views(layout="out_in")
    targets = lora.targets(params, {"weight": 2}, alpha=2.0, matrices=views)
    assert list(targets) == ["layers/0/weight", "layers/1/weight"]
    assert targets["layers/0/weight"].matrix_shape == (4, 5)
    adapters = random_lora(targets)
    x = jnp.ones(4)
    merged = eqx.combine(merge(targets, params, adapters), static)
    first, second = model.layers
    h = first(x) + x @ product(adapters["layers/0/weight"])
    h = jax.nn.relu(h)
    expected = second(h) + h @ product(adapters["layers/1/weight"])
    np.testing.assert_allclose(merged(x), expected, atol=1e-5)


@pytest.mark.parametrize("closed_over", [False, True])
def test_merge_under_jit(closed_over):
    params = plain()
    targets = lora.targets(params, {"kernel": 2}, alpha=2.0)
    adapters = random_lora(targets)
    if closed_over:
        merged = jax.jit(lambda p, a: lora.merge(targets, p, a))(params, adapters)
    else:
        merged = jax.jit(lora.merge)(targets, params, adapters)
    chex.assert_trees_all_close(merged, lora.merge(targets, params, adapters))


def test_vmap_over_seeds_equals_one_by_one():
    params = plain()
    targets = lora.targets(params, {"kernel": 2}, alpha=2.0)
    seeds = [random_lora(targets, seed) for seed in range(3)]
    together = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
    merged = jax.vmap(lambda a: merge(targets, params, a)["out"])(together)
    for i, adapters in enumerate(seeds):
        alone = merge(targets, params, adapters)["out"]
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], merged), alone)


# Training


def loss(params, adapters, targets, x):
    merged = merge(targets, params, adapters)
    h = x @ merged["hidden"]["kernel"]
    return jnp.mean((h @ merged["out"]["kernel"] - 1.0) ** 2)


def test_gradients_reach_the_adapters_as_the_chain_rule_says():
    params = plain()
    targets = lora.targets(params, {"out/kernel": 2}, alpha=3.0)
    adapters = random_lora(targets)
    x = normal(6, 8, 4)
    grad = jax.grad(loss, 1)(params, adapters, targets, x)["out/kernel"]
    merged = merge(targets, params, adapters)
    dw = jax.grad(lambda w: jnp.mean((x @ params["hidden"]["kernel"] @ w - 1.0) ** 2))(
        merged["out"]["kernel"]
    )
    a, b = adapters["out/kernel"]
    np.testing.assert_allclose(grad.a, 1.5 * dw @ b.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad.b, 1.5 * a.T @ dw, rtol=1e-4, atol=1e-5)


def test_partition_trains_adapters_only_and_keeps_no_state_for_the_rest():
    params = plain()
    targets = lora.targets(params, {"kernel": 2}, alpha=2.0)
    tree = {"params": params, "adapters": random_lora(targets)}
    tx = optax.partition(
        {"adapter": optax.adamw(0.01), "frozen": optax.set_to_zero()}, lora.labels
    )
    state = tx.init(tree)
    sizes = sum(x.size for x in jax.tree.leaves(state))
    assert sizes == 2 * lora.count(tree["adapters"]) + 1
    x = normal(6, 8, 4)

    @jax.jit
    def step(tree, state):
        value, grads = jax.value_and_grad(
            lambda t: loss(t["params"], t["adapters"], targets, x)
        )(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    start = tree
    values = []
    for _ in range(20):
        tree, state, value = step(tree, state)
        values.append(value)
    assert values[-1] < 0.7 * values[0]
    assert all_equal(tree["params"], start["params"])
    assert not all_equal(tree["adapters"], start["adapters"])


def test_labels_without_adapters_raise():
    with pytest.raises(ValueError, match="found no LoRA or Spectral"):
        lora.labels(plain())
