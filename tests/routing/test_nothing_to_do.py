"""Strength 0, lambda 0 and an empty memory: bit for bit the optimizer alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl import penalties, routing
from tests.arrays import normal, orthonormal
from tests.routing.helpers import make_params

PARAMS = make_params()


def owner(*links):
    return optax_cl.protect(2, *links, matrices=optax_cl.matrix_views(skip="b"))


def filled(opt_state):
    """The state with something in every memory, as after a task."""

    def like(tree, seed, make=normal):
        return jax.tree.map(lambda x: make(seed, *x.shape), tree)

    def protect(state):
        return state._replace(
            basis=like(state.basis, 0, orthonormal),
            energy=jax.tree.map(jnp.ones_like, state.energy),
            anchor=like(state.anchor, 1),
            curvature=jax.tree.map(jnp.abs, like(state.curvature, 2)),
        )

    def importance(state):
        memory = state.memory._replace(
            importance=jax.tree.map(jnp.abs, like(state.memory.importance, 3)),
            anchor=like(state.memory.anchor, 4),
        )
        return state._replace(memory=memory)

    opt_state = optax_cl.map_states(protect, opt_state, routing.ProtectState)
    for state_class in (
        penalties.EwcState,
        penalties.MasState,
        penalties.RescaleByImportanceState,
        penalties.SiState,
    ):
        if any(isinstance(n, state_class) for n in opt_state.inner):
            opt_state = optax_cl.map_states(importance, opt_state, state_class)
    return opt_state


def zeros(grads):
    return jax.tree.map(jnp.zeros_like, grads)


def nan(grads):
    return jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grads)


# Name -> (link in front of Adam, extra arguments, whether there is a memory).
CASES = {
    "strength 0": (lambda: optax_cl.attenuate(0.0), None, True),
    "schedule at 0": (lambda: optax_cl.attenuate(lambda step: 0.0 * step), None, True),
    "weighted 0": (lambda: optax_cl.attenuate(0.0, weighted=True), None, True),
    "one_minus 0": (lambda: optax_cl.attenuate(optax_cl.one_minus(0.0)), None, True),
    "ratchet 0": (lambda: optax_cl.attenuate(optax_cl.ratchet(0.0)), None, True),
    "kappa 0": (lambda: optax_cl.attenuate(optax_cl.balance(0.0)), None, True),
    "spring 0": (lambda: optax_cl.attenuate(optax_cl.spring(0.0)), None, True),
    "empty basis": (lambda: optax_cl.attenuate(1.0), None, False),
    "empty anchor": (lambda: optax_cl.attenuate(optax_cl.spring(5.0)), None, False),
    "project nothing": (optax_cl.project, None, False),
    "lambda 0": (lambda: optax_cl.ewc(0.0), None, True),
    "empty ewc": (lambda: optax_cl.ewc(1e3), None, False),
    "mas 0": (lambda: optax_cl.mas(0.0), None, True),
    "empty mas": (lambda: optax_cl.mas(1e3), None, False),
    "si 0": (lambda: optax_cl.si(0.0), None, True),
    "empty si": (lambda: optax_cl.si(1e3), None, False),
    "rescale 0": (lambda: optax_cl.rescale_by_importance(0.0), None, True),
    "empty rescale": (lambda: optax_cl.rescale_by_importance(0.5), None, False),
    "no reference": (optax_cl.agem, {"reference_updates": zeros}, False),
    "no reference yet": (
        lambda: optax_cl.agem(decay=0.5),
        {"reference_updates": zeros},
        False,
    ),
    "no past task": (
        optax_cl.gem,
        {
            "memory_updates": lambda grads: jax.tree.map(
                lambda g: jnp.full((2, *g.shape), jnp.nan), grads
            ),
            "memory_mask": lambda grads: jnp.zeros(2, bool),
        },
        False,
    ),
    "rho 0": (lambda: optax_cl.mix_replay(0.0), {"replay_updates": nan}, False),
    "weight 0": (
        lambda: optax_cl.mix_replay(0.5),
        {"replay_updates": nan, "replay_weight": lambda grads: 0.0},
        False,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_to_do_changes_no_bit_op_by_op(name):
    make, extra, memory = CASES[name]
    tx = owner(make(), optax_cl.scale_by_decoupled_adam(eps_root=1e-9))
    state = tx.init(PARAMS)
    if memory:
        state = filled(state)
    plain = optax.scale_by_adam(eps_root=1e-9)
    reference, params = plain.init(PARAMS), make_params(1)
    with jax.disable_jit():
        for seed in range(3):
            grads = {"w": normal(seed, 6, 3), "b": normal(seed, 1, 3)}
            given = {k: f(grads) for k, f in (extra or {}).items()}
            updates, state = tx.update(grads, state, params, **given)
            expected, reference = plain.update(grads, reference)
            for key in expected:
                np.testing.assert_array_equal(updates[key], expected[key], err_msg=key)
            params = optax.apply_updates(params, jax.tree.map(jnp.negative, updates))


@pytest.mark.parametrize(
    "link",
    [
        lambda: optax_cl.attenuate(0.0),
        lambda: optax_cl.ewc(0.0),
        lambda: optax_cl.ewc_proximal(0.1, 0.0),
    ],
)
def test_nothing_to_do_behind_the_moments_changes_no_bit_op_by_op(link):
    tx = owner(optax_cl.scale_by_decoupled_adam(), link())
    state = filled(tx.init(PARAMS))
    plain = optax.scale_by_adam()
    reference = plain.init(PARAMS)
    with jax.disable_jit():
        grads = {"w": normal(0, 6, 3), "b": normal(0, 1, 3)}
        updates, _ = tx.update(grads, state, PARAMS)
        expected, _ = plain.update(grads, reference)
    for key in expected:
        np.testing.assert_array_equal(updates[key], expected[key], err_msg=key)
