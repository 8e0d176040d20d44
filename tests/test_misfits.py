"""Updates and parameters that are not those the state was made for are named."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_cl
from optax_cl import isolation


def make_params():
    return {"w": jnp.full((4, 3), 0.1), "b": jnp.zeros(3)}


def ewc():
    return optax_cl.chain(optax_cl.ewc(1.0), optax_cl.scale_by_decoupled_adam())


def protect(strength=0.5):
    return optax_cl.protect(
        2, optax_cl.attenuate(strength), optax_cl.scale_by_decoupled_adam()
    )


def balance():
    return protect(optax_cl.balance())


FITTING = {
    "adam": lambda: optax_cl.chain(optax_cl.scale_by_decoupled_adam()),
    "amsgrad": lambda: optax_cl.chain(optax_cl.scale_by_decoupled_amsgrad()),
    "factored": lambda: optax_cl.chain(optax_cl.scale_by_decoupled_factored_rms()),
    "ewc": ewc,
    "ewc, sgd": lambda: optax.chain(optax_cl.ewc(1.0), optax.sgd(0.1)),
    "separate": lambda: optax.chain(
        optax_cl.ewc(1.0, anchors="separate", capacity=2), optax.sgd(0.1)
    ),
    "proximal": lambda: optax_cl.ewc_proximal(0.1, 1.0),
    "rescale": lambda: optax_cl.rescale_by_importance(0.5),
    "mas": lambda: optax_cl.mas(1.0),
    "ogd": lambda: optax_cl.ogd(1, samples=2),
    "packnet": isolation.packnet,
    "si": lambda: optax_cl.chain(optax_cl.si(1.0), optax.sgd(0.1)),
    "protect": protect,
    "balance": balance,
}


@pytest.mark.parametrize("leaf", ["w", "b"])
@pytest.mark.parametrize("name", FITTING)
def test_a_missing_gradient_is_named_with_its_path(name, leaf):
    params = make_params()
    tx = FITTING[name]()
    with pytest.raises(ValueError, match=rf"`updates` .*got None at `{leaf}`.*zeros"):
        tx.update(params | {leaf: None}, tx.init(params), params)


@pytest.mark.parametrize("name", sorted(set(FITTING) - {"factored"}))
def test_updates_of_another_width_are_named_with_their_path(name):
    params = make_params()
    tx = FITTING[name]()
    wide = params | {"w": jnp.ones((4, 5))}
    with pytest.raises(ValueError, match=r"updates` must .*at `w` got.*5\), expected"):
        tx.update(wide, tx.init(params), params)


@pytest.mark.parametrize("w", [None, jnp.ones((4, 5))])
def test_parameters_that_do_not_fit_are_named_where_a_rule_reads_them(w):
    params = make_params()
    tx = balance()
    with pytest.raises(ValueError, match=r"params` must .*at `w`"):
        tx.update(params, tx.init(params), params | {"w": w})


def test_a_parameter_of_none_needs_no_gradient():
    params = make_params() | {"w2": None}
    for name, make in FITTING.items():
        tx = make()

        def step(params, tx=tx):
            return tx.update(params, tx.init(params), params)[0]

        assert jax.eval_shape(step, params)["w2"] is None, name
