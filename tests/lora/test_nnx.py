"""nnx.LoRA modules with the adapters of optax_cl.lora, there and back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_cl
import optax_cl.flax
from optax_cl import lora
from optax_cl.flax import lora_from_nnx, lora_to_nnx
from tests.arrays import distance, normal


class Model(nnx.Module):
    """An adapted linear layer of either kind, with normalisation between them."""

    def __init__(self, rngs):
        base = nnx.Linear(6, 5, rngs=rngs)
        self.first = nnx.LoRA(6, 2, 5, base_module=base, rngs=rngs)
        self.norm = nnx.LayerNorm(5, rngs=rngs)
        self.second = nnx.LoRALinear(5, 3, lora_rank=1, rngs=rngs)

    def __call__(self, x):
        return self.second(self.norm(jax.nn.relu(self.first(x))))


PATHS = ["first/base_module/kernel", "second/kernel"]


@nnx.jit
def outputs(model, x):
    return model(x)


def model_with_updates(seed=0):
    model = Model(nnx.Rngs(seed))
    _, _, adapters = lora_from_nnx(model)
    moved = {
        path: adapter._replace(b=jnp.asarray(np.asarray(adapter.b) + np.float32(0.3)))
        for path, adapter in adapters.items()
    }
    lora_to_nnx(model, moved)
    return model


def x(n=8):
    return normal(1, n, 6)


def test_targets_have_scale_one_and_the_paths_of_kernels():
    targets, params, adapters = lora_from_nnx(Model(nnx.Rngs(0)))
    assert sorted(adapters) == sorted(targets) == PATHS
    assert {t.scale for t in targets.values()} == {1.0}
    assert [targets[p].rank for p in PATHS] == [2, 1]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert len(leaves) == 6 and "lora" not in str(leaves)


def test_merging_folds_in_what_the_modules_compute():
    model = model_with_updates()
    y = outputs(model, x())
    targets, params, adapters = lora_from_nnx(model)
    merged = jax.jit(lora.merge)(targets, params, adapters)
    zero = {
        path: adapter._replace(b=jnp.asarray(np.zeros_like(adapter.b)))
        for path, adapter in adapters.items()
    }
    lora_to_nnx(model, zero)
    assert distance(outputs(model, x()), y) > 0.1
    lora_to_nnx(model, zero, merged)
    np.testing.assert_allclose(outputs(model, x()), y, atol=1e-5)


def test_writing_back_what_was_read_changes_nothing():
    model = model_with_updates()
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    _, params, adapters = lora_from_nnx(model)
    lora_to_nnx(model, adapters, params)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)


def test_spectral_adapters_come_back_by_conversion():
    model = model_with_updates()
    y = outputs(model, x())
    _, _, adapters = lora_from_nnx(model)
    lora_to_nnx(model, lora.to_lora(lora.to_spectral(adapters)))
    np.testing.assert_allclose(outputs(model, x()), y, atol=1e-5)


def test_stacked_modules_have_batch_axes():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(key))

    model = make(jax.random.split(jax.random.key(0), 5))
    targets, params, adapters = lora_from_nnx(model)
    assert targets["kernel"].matrix_shape == (5, 4, 3)
    assert adapters["kernel"].a.shape == (5, 4, 2)
    merged = jax.jit(lora.merge)(targets, params, adapters)
    chex.assert_trees_all_close(merged, params)


def test_a_train_loop_with_nnx_optimizer_moves_the_adapters_only():
    model = Model(nnx.Rngs(0))
    tx = optax_cl.decoupled_adamw(0.03)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    frozen = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.LoRAParam)))
    frozen = jax.tree.map(jnp.copy, frozen)
    inputs = x(32)
    labels = np.argmax(np.asarray(inputs)[:, :3], axis=-1)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        grad = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))
        value, grads = grad(model)
        optimizer.update(model, grads)
        return value

    values = [float(step(model, optimizer)) for _ in range(60)]
    assert values[-1] < 0.7 * values[0]
    after = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.LoRAParam)))
    chex.assert_trees_all_equal(after, frozen)
    _, _, adapters = lora_from_nnx(model)
    moments = [v for v in jax.tree.leaves(nnx.as_pure(optimizer.opt_state)) if v.ndim]
    assert sum(m.size for m in moments) == 2 * lora.count(adapters)


def test_a_method_of_the_package_trains_them_and_writes_back():
    model = Model(nnx.Rngs(0))
    targets, params, adapters = lora_from_nnx(model)
    tx = optax_cl.decoupled_adamw(0.03)
    state = tx.init(adapters)

    inputs = x()

    @jax.jit
    def loss(adapters):
        merged = lora.merge(targets, params, adapters)
        first, second = merged["first"]["base_module"], merged["second"]
        h = jax.nn.relu(inputs @ first["kernel"] + first["bias"][None, :])
        y = model.norm(h) @ second["kernel"] + second["bias"][None, :]
        return jnp.sum(y**2)

    expected = np.sum(np.asarray(outputs(model, inputs)) ** 2)
    np.testing.assert_allclose(loss(adapters), expected, rtol=1e-5)

    @jax.jit
    def step(adapters, state):
        updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    for _ in range(5):
        adapters, state = step(adapters, state)
    lora_to_nnx(model, adapters)
    expected = np.sum(np.asarray(outputs(model, inputs)) ** 2)
    np.testing.assert_allclose(loss(adapters), expected, rtol=1e-4)


def test_a_module_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match=r"at `<root>` wraps no module with a kernel"):
        lora_from_nnx(nnx.LoRA(3, 2, 4, rngs=nnx.Rngs(0)))


def test_a_kernel_of_another_shape_is_refused():
    rngs = nnx.Rngs(0)
    base = nnx.Conv(3, 4, (3,), rngs=rngs)
    model = nnx.LoRA(3, 2, 4, base_module=base, rngs=rngs)
    with pytest.raises(ValueError, match=r"don't fit its kernel of shape \(3, 3, 4\)"):
        lora_from_nnx(model)


def test_a_model_without_adapters_is_refused_with_the_other_way():
    with pytest.raises(ValueError, match=r"holds no nnx\.LoRA.*lora\.targets"):
        lora_from_nnx(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))


def test_foreign_adapters_are_refused():
    model = Model(nnx.Rngs(0))
    _, params, adapters = lora_from_nnx(model)
    with pytest.raises(ValueError, match="must have the model's paths"):
        lora_to_nnx(model, {"kernel": adapters[PATHS[0]]})
    wide = lora.LoRA(np.ones((6, 4)), np.ones((4, 5)))
    with pytest.raises(ValueError, match=r"first/base_module/kernel/a.*\(6, 4\)"):
        lora_to_nnx(model, adapters | {PATHS[0]: wide})
    with pytest.raises(ValueError, match="`params` must have the tree structure"):
        lora_to_nnx(model, adapters, params["first"])
