"""A checkpoint of another version or of other settings is refused by name."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import optax_cl

PARAMS = {"w": jnp.zeros((4, 3))}


def state(**kwargs):
    tx = optax_cl.protect(
        kwargs.pop("rank", 2),
        optax_cl.attenuate(),
        optax_cl.ewc(1.0, estimator=kwargs.pop("estimator", "exact")),
        optax_cl.scale_by_decoupled_adam(),
        **kwargs,
    )
    return tx.init(PARAMS)


def stored(s):
    return json.loads(json.dumps(optax_cl.schema(s)))


def test_the_same_settings_pass_after_json():
    optax_cl.check_schema(state(), stored(state()))
    optax_cl.check_schema(state(), stored(state(rank=np.int64(2))))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"memory": "last"}, "settings.*'memory': 'last'.*expected.*'memory': 'all'"),
        ({"estimator": "sampled"}, "fisher.*'sampled'.*expected.*'exact'"),
        ({"rank": 3}, r"anchor/w.*\[3, 3\].*expected.*\[2, 3\]"),
    ],
)
def test_other_settings_are_refused_with_the_place(other, message):
    with pytest.raises(ValueError, match=message):
        optax_cl.check_schema(state(), stored(state(**other)))


def test_another_version_is_refused():
    saved = stored(state()) | {"version": 0}
    with pytest.raises(ValueError, match="schema version 0, this library reads 1"):
        optax_cl.check_schema(state(), saved)


def test_another_chain_is_refused():
    saved = stored(optax_cl.scale_by_decoupled_adam().init(PARAMS))
    with pytest.raises(ValueError, match="holds nothing, expected"):
        optax_cl.check_schema(state(), saved)
