"""Which averages of an optimizer a reset reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from tests.arrays import normal

OPTIMIZERS = {
    "adabelief": optax.adabelief(0.1),
    "adadelta": optax.adadelta(0.1),
    "adafactor": optax.adafactor(0.1, momentum=0.9),
    "adafactor, factored": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "adagrad": optax.adagrad(0.1),
    "adamw": optax.adamw(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "lion": optax.lion(0.1),
    "muon": optax.contrib.muon(0.1),
    "novograd": optax.novograd(0.1),
    "rmsprop": optax.rmsprop(0.1, centered=True, momentum=0.9),
    "sgd": optax.sgd(0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_reset_reaches_every_average(name):
    tx = OPTIMIZERS[name]
    params = {"w": normal(0, 4, 3), "b": jnp.ones((1, 3))}
    state = first = tx.init(params)
    for seed in range(2):
        grads = jax.tree.map(lambda p, s=seed: normal(s, *p.shape), params)
        _, state = tx.update(grads, state, params)
    statistics = optax_cl.collect(
        state, params, [], task=optax_cl.Task(), key=jax.random.key(0)
    )
    state = optax_cl.end_task(state, params, statistics, moments="reset")
    for (path, leaf), begun in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(first), strict=True
    ):
        # Muon's state holds the coefficients of its iteration too.
        kept = jax.tree_util.GetAttrKey("ns_coeffs") in path
        expected = begun if kept else np.zeros_like(begun)
        np.testing.assert_array_equal(leaf, expected, str(path))


def test_an_optimizer_whose_second_moment_is_a_sum_is_no_modifier():
    tx = optax_cl.decoupled_adamw(0.1, modifiers=[optax.adagrad(0.1)])
    with pytest.raises(ValueError, match=r"`modifiers\[0\]` holds a second moment"):
        tx.init(jnp.ones(3))
