"""Every transformation lowers for accelerators that are not here."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export

import optax_cl
from optax_cl import testing
from tests import registry

PLATFORMS = ("cpu", "cuda", "tpu")
FEW = ("agem", "attenuate[balance]", "ewc", "scale_by_decoupled_factored_rms")


def lower(function, *args, platforms=PLATFORMS):
    """Exports for all platforms at once; raises where one has no lowering."""
    exported = export.export(jax.jit(function), platforms=platforms)(*args)
    assert exported.platforms == platforms
    return exported


def logits(params, batch):
    # Of parameters of any structure.
    numbers = jnp.concatenate([jnp.ravel(p) for p in jax.tree.leaves(params)])
    return jnp.tanh(batch["x"][:, :3] + numbers.sum()) * numbers[:3][None]


TASK = optax_cl.classification(logits, lambda batch: batch["y"])
BATCH = {"x": jnp.ones((5, 4)), "y": jnp.arange(5) % 3}


def export_step(name):
    entry = registry.ENTRIES[name]
    tx, params = entry.make(), entry.params()

    def train_step(params, state, batch):
        grads = jax.grad(lambda p: TASK.loss(p, batch).mean())(params)
        updates, state = tx.update(grads, state, params, **entry.extra_args(grads))
        return optax.apply_updates(params, updates), state

    exported = lower(train_step, params, tx.init(params), BATCH)
    expected = jax.eval_shape(lambda: (params, tx.init(params)))
    assert exported.out_tree == jax.tree.structure(expected)
    for found, leaf in zip(exported.out_avals, jax.tree.leaves(expected), strict=True):
        assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize("name", FEW)
def test_a_train_step_lowers_for_every_platform(name):
    export_step(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(registry.ENTRIES) - set(FEW)))
def test_every_train_step_lowers_for_every_platform(name):
    export_step(name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", registry.ENTRIES)
def test_every_update_lowers_in_half_precision(name, dtype):
    entry = registry.ENTRIES[name]
    tx, params = entry.make(), optax.tree.cast(entry.params(), dtype)

    def update(grads, state, params):
        return tx.update(grads, state, params, **entry.extra_args(grads))

    lower(update, params, tx.init(params), params)


def export_boundary(name):
    entry = registry.ENTRIES[name]
    tx, params = entry.make(), entry.params()
    # Shapes are all that lowering reads.
    state = jax.eval_shape(tx.init, params)
    statistics = jax.eval_shape(testing.collect_synthetic, state, params)

    def boundary(state, params, statistics):
        state = optax_cl.end_task(state, params, statistics)
        return optax_cl.begin_task(state, params)

    exported = lower(boundary, state, params, statistics)
    assert exported.out_tree == jax.tree.structure(state)


@pytest.mark.parametrize("name", ["attenuate[balance]", "ewc"])
def test_a_boundary_lowers_for_every_platform(name):
    export_boundary(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(registry.ENTRIES) - {"ewc[separate]"}))
def test_every_boundary_lowers_for_every_platform(name):
    export_boundary(name)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_the_decompositions_of_a_boundary_lower_for_every_platform(svd):
    # `collect` compiles them for the platform it runs on; this calls the same passes.
    rule = optax_cl.attenuate(optax_cl.balance())
    tx, params = optax_cl.protect(2, rule, svd=svd), registry.params()

    def collect(state, params, batch):
        key = jax.random.key(0)
        return optax_cl.collect(state, params, [batch] * 2, task=TASK, key=key)

    lower(collect, tx.init(params), params, BATCH)


def test_an_operation_that_a_platform_does_not_have_is_caught():
    with pytest.raises(NotImplementedError, match="eig"):
        lower(jnp.linalg.eig, jnp.ones((2, 2)))
