import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl import lora
from optax_cl._core import growth, linalg


def gpm_rule(memory, gradient, threshold):
    """The published rule, one direction at a time, in float64."""
    memory, gradient = np.asarray(memory, np.float64), np.asarray(gradient, np.float64)
    total = np.sum(gradient**2)
    rest = gradient - memory @ (memory.T @ gradient)
    vectors, singular, _ = np.linalg.svd(rest)
    reached, added = total - np.sum(rest**2), []
    for vector, value in zip(vectors.T, singular, strict=False):
        if reached >= threshold * total:
            break
        added.append(vector)
        reached += value**2
    return np.array(added).reshape(-1, gradient.shape[0]).T


# Compiled as one function: quicker than its operations one by one.
grow_memory = jax.jit(lora.grow_memory)


def steep(seed, *shape):
    drawn = np.random.default_rng(seed).normal(size=shape)
    return np.float32(drawn * 0.5 ** np.arange(shape[-1]))


def empty(*shape):
    return np.zeros(shape, np.float32), np.zeros(shape[:-2], np.int32)


def projector(basis):
    return np.asarray(basis) @ np.asarray(basis).mT


def test_growth_follows_the_rule_over_three_tasks():
    memory, count = empty(20, 16)
    expected = np.zeros((20, 0))
    for task, threshold in enumerate((0.9, 0.95, 0.9)):
        gradient = steep(task, 20, 12)
        added = gpm_rule(expected, gradient, threshold)
        expected = np.concatenate([expected, added], axis=1)
        memory, count = grow_memory(memory, count, gradient, threshold)
        assert int(count) == expected.shape[1] > 0
        np.testing.assert_allclose(
            projector(memory), projector(expected), atol=1e-5, rtol=0
        )
        used, columns = np.eye(16) * (np.arange(16) < int(count)), np.asarray(memory)
        np.testing.assert_allclose(columns.T @ columns, used, atol=2e-6, rtol=0)


def test_weak_directions_beside_what_is_held_come_at_unit_length():
    taken = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        q = np.linalg.qr(rng.normal(size=(4, 4)))[0]
        memory = np.float32(q * [1, 1, 0, 0])
        weights = rng.normal(size=(3, 12))
        weights[2] *= 1e-6  # whether that counts is up to rounding
        gradient = np.float32(q[:, :3] @ weights)
        memory, count = grow_memory(memory, np.int32(2), gradient, 1.0)
        taken += int(count) - 2
        memory, used = np.asarray(memory), np.eye(4) * (np.arange(4) < int(count))
        np.testing.assert_allclose(memory.T @ memory, used, atol=2e-6, rtol=0)
    assert taken > 0


@pytest.mark.parametrize("shape", [(6, 12), (8, 12), (8, 8), (1, 5), (5, 1)])
def test_kernels_of_any_shape_fill_the_memory_with_what_they_span(shape):
    fan_in, _ = shape
    for columns in {1, fan_in}:
        gradient = np.float32(np.random.default_rng(0).normal(size=shape))
        memory, count = grow_memory(*empty(fan_in, columns), gradient, 1.0)
        assert int(count) == min(columns, *shape)
        g = np.float64(gradient)
        left, singular, _ = np.linalg.svd(g)
        held = np.linalg.norm(np.asarray(memory).T @ g) ** 2
        np.testing.assert_allclose(held, (singular[: int(count)] ** 2).sum(), rtol=1e-5)
        np.testing.assert_allclose(
            projector(memory),
            projector(left[:, : int(count)]),
            atol=1e-5,
        )


def test_what_the_memory_holds_counts_towards_the_threshold():
    gradient = steep(0, 10, 6)
    memory, count = grow_memory(*empty(10, 8), gradient, 0.95)
    again, more = grow_memory(memory, count, gradient, 0.95)
    assert int(more) == int(count)
    np.testing.assert_array_equal(again, memory)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_gradient_without_direction_adds_nothing(value):
    memory, count = grow_memory(*empty(10, 8), steep(0, 10, 6), 0.9)
    again, more = grow_memory(memory, count, np.full((10, 6), value, np.float32), 0.9)
    assert int(more) == int(count)
    np.testing.assert_array_equal(again, memory)


def test_threshold_zero_adds_nothing_and_one_adds_the_rank():
    gradient = steep(0, 10, 3)
    assert int(grow_memory(*empty(10, 8), gradient, 0.0)[1]) == 0
    assert int(grow_memory(*empty(10, 8), gradient, 1.0)[1]) == 3


@pytest.mark.parametrize("scale", [1e-25, 1e38])
def test_scale_of_the_gradient_does_not_matter(scale):
    gradient = steep(0, 10, 6)
    small = grow_memory(*empty(10, 8), np.float32(scale) * gradient, 0.9)
    large = grow_memory(*empty(10, 8), gradient, 0.9)
    assert int(small[1]) == int(large[1]) > 0
    np.testing.assert_allclose(projector(small[0]), projector(large[0]), atol=1e-5)


def test_a_full_memory_keeps_the_strongest_directions():
    gradient = np.diag(np.float32([3.0, 2.0, 1.0, 0.5]))
    memory, count = grow_memory(*empty(4, 2), gradient, 1.0)
    assert int(count) == 2
    np.testing.assert_allclose(projector(memory), np.diag([1.0, 1, 0, 0]), atol=1e-6)
    assert int(growth.grow(*empty(4, 2), gradient, 1.0).left_out) == 2


def test_stacked_layers_grow_as_each_by_itself():
    gradient = steep(3, 3, 10, 6) * np.float32([[[1.0]], [[5.0]], [[0.0]]])
    stacked = grow_memory(*empty(3, 10, 8), gradient, 0.9)
    for i in range(3):
        single = grow_memory(*empty(10, 8), gradient[i], 0.9)
        memory, count = (np.asarray(x)[i] for x in stacked)
        assert int(count) == int(single[1])
        np.testing.assert_allclose(projector(memory), projector(single[0]), atol=1e-5)


class Setting:
    """A linear layer and data whose last batch is ragged."""

    def __init__(self):
        draw = np.random.default_rng(0).normal
        self.params = {"kernel": np.float32(draw(size=(5, 3)))}
        self.targets = lora.targets(self.params, {"kernel": 2}, alpha=2.0)
        x, y = (np.float32(draw(size=(7, size))) for size in (5, 3))
        self.batches = [(x[:4], y[:4]), (x[4:], y[4:])]
        self.data = np.asarray(x, np.float64), np.asarray(y, np.float64)
        ones = {"kernel": np.ones((5, 3), np.float32)}
        self.adapters = jax.jit(lora.eblora_init)(self.targets, ones)

        def losses(given, batch):
            adapters, params = given
            merged = lora.merge(self.targets, params, adapters)
            return jnp.sum((batch[0] @ merged["kernel"] - batch[1]) ** 2, axis=-1) / 2

        self.task = optax_cl.Task(loss=losses)

    def residual(self):
        x, y = self.data
        merged = jax.jit(lora.merge)(self.targets, self.params, self.adapters)
        return x, x @ np.float64(merged["kernel"]) - y

    def run(self, statistic, **kwargs):
        tx = lora.eblora(
            optax.sgd(0.1), targets=self.targets, memory_rank=3, statistic=statistic
        )
        return optax_cl.collect(
            tx.init(self.adapters),
            self.adapters,
            self.batches,
            task=self.task,
            key=jax.random.key(0),
            **kwargs,
        )


def test_the_pass_gives_the_mean_gradient_at_the_adapted_weights():
    setting = Setting()
    x, residual = setting.residual()
    (result,) = setting.run("mean", frozen=setting.params).results.values()
    np.testing.assert_allclose(result["kernel"], x.T @ residual / 7, rtol=1e-5)


def test_the_pass_over_batches_gives_a_factor_of_their_gram():
    setting = Setting()
    x, residual = setting.residual()
    (result,) = setting.run("batches", frozen=setting.params).results.values()
    sums = [x[:4].T @ residual[:4], x[4:].T @ residual[4:]]
    factor = np.asarray(result["kernel"])
    np.testing.assert_allclose(
        factor @ factor.T, sum(g @ g.T for g in sums), rtol=1e-4, atol=1e-4
    )


def test_rounding_of_a_sum_of_grams_is_no_direction_of_the_memory():
    # Roots of its eigenvalues, 1e-7 of the largest, would be 3e-4 of it: directions
    # that a threshold near one takes in, although no gradient ever had them.
    draw = np.random.default_rng(0).normal
    spans = draw(size=(8, 20, 2))
    gradients = np.float32(np.einsum("kin,bkno->bkio", spans, draw(size=(30, 8, 2, 9))))

    @jax.jit
    def factor_of_the_sum(gradients):
        add = lambda gram, gradient: (gram + linalg.gram(gradient), None)  # noqa: E731
        gram, _ = jax.lax.scan(add, jnp.zeros((8, 20, 20)), gradients)
        return growth.factor(gram)

    factor = factor_of_the_sum(gradients)
    memory, count = grow_memory(*empty(8, 20, 5), factor, 1.0)
    np.testing.assert_array_equal(count, 2)
    kept = np.einsum("kij,kjn->kin", projector(memory), spans)
    np.testing.assert_allclose(kept, spans, atol=1e-5)


def test_collect_without_the_frozen_weights_says_what_to_pass():
    with pytest.raises(ValueError, match="frozen=params"):
        Setting().run("mean")


def test_the_reader_finds_memories_by_kernel():
    setting = Setting()
    tx = optax.apply_if_finite(
        lora.eblora(optax.sgd(0.1), targets=setting.targets, memory_rank=9), 3
    )
    found = lora.memory(tx.init(setting.adapters))
    # V of rank 2 keeps its place in 5 dimensions.
    assert {path: m.shape for path, m in found.items()} == {"kernel": (5, 3)}
    assert lora.memory(optax.sgd(0.1).init(setting.adapters)) == {}
