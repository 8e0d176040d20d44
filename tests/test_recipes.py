"""A recipe is the chain that its docstring writes out, through task boundaries."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl import recipes
from tests.arrays import normal

TASK = optax_cl.classification(
    lambda p, b: b[0] @ p["w"] + p["b"][None], lambda b: b[1]
)
PARAMS = {"w": normal(0, 6, 3), "b": jnp.zeros(3)}
RATE = optax.linear_schedule(0.1, 0.01, 10)
DECAY = {"weight_decay": 0.03, "mask": {"w": True, "b": False}}


def adam(**settings):
    return optax_cl.scale_by_decoupled_adam(b1=0.8, b2=0.95, eps=1e-6, **settings)


DECAYED = optax.add_decayed_weights(0.03, {"w": True, "b": False})
DESCENT = optax.scale_by_learning_rate(RATE)
RULE = optax_cl.ratchet(0.75)

WRITTEN_OUT = {
    "replay": (
        lambda **adamw: recipes.replay_adamw(RATE, 0.3, **adamw),
        lambda: optax_cl.chain(
            optax_cl.mix_replay(0.3), adam(second_moment="routed"), DECAYED, DESCENT
        ),
    ),
    "agem": (
        lambda **adamw: recipes.agem_adamw(RATE, **adamw),
        lambda: optax_cl.chain(optax_cl.agem(), adam(), DECAYED, DESCENT),
    ),
    "ewc": (
        lambda **adamw: recipes.ewc_adamw(RATE, 30.0, **adamw),
        lambda: optax_cl.chain(optax_cl.ewc(30.0), adam(), DECAYED, DESCENT),
    ),
    "protected": (
        lambda **adamw: recipes.protected_adamw(RATE, 2, RULE, **adamw),
        lambda: optax_cl.protect(2, optax_cl.attenuate(RULE), adam(), DECAYED, DESCENT),
    ),
    "protected by default": (
        lambda **adamw: recipes.protected_adamw(RATE, 2, **adamw),
        lambda: optax_cl.protect(
            2, optax_cl.attenuate(optax_cl.balance(1.0)), adam(), DECAYED, DESCENT
        ),
    ),
    "projected": (
        lambda **adamw: recipes.projected_adamw(RATE, 3, threshold=0.9, **adamw),
        lambda: optax_cl.protect(
            3, adam(), DECAYED, optax_cl.project(), DESCENT, threshold=0.9
        ),
    ),
}


def through_three_tasks(tx):
    """Parameters after every task, and the state at the end."""

    @jax.jit
    def one_task(params, state, batch, memories, key):
        def step(carry, old):
            params, state = carry
            grads = jax.grad(lambda p: TASK.loss(p, batch).mean())(params)
            updates, state = tx.update(
                grads, state, params, replay_updates=old, reference_updates=old
            )
            return (optax.apply_updates(params, updates), state), None

        carry = params, optax_cl.begin_task(state, params)
        (params, state), _ = jax.lax.scan(step, carry, memories)
        statistics = optax_cl.collect(state, params, [batch], task=TASK, key=key)
        return params, optax_cl.end_task(state, params, statistics)

    params, state, seen = PARAMS, jax.jit(tx.init)(PARAMS), []
    for t in range(3):
        batch = (normal(t, 8, 6), np.arange(8) % 3)
        memories = {k: normal(10 + t, 3, *p.shape) for k, p in PARAMS.items()}
        params, state = one_task(params, state, batch, memories, jax.random.key(t))
        seen.append(params)
    return seen, state


@pytest.fixture(scope="module")
def without_a_method():
    tx = optax.chain(adam(second_moment="routed"), DECAYED, DESCENT)
    return through_three_tasks(tx)[0]


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_a_recipe_is_the_chain_that_it_says(name, without_a_method):
    recipe, chain = WRITTEN_OUT[name]
    tx = recipe(b1=0.8, b2=0.95, eps=1e-6, **DECAY)
    seen, state = through_three_tasks(tx)
    expected, other = through_three_tasks(chain())
    jax.tree.map(np.testing.assert_array_equal, seen, expected)
    jax.tree.map(np.testing.assert_array_equal, state, other)
    moved = np.abs(seen[-1]["w"] - without_a_method[-1]["w"]).max()
    assert moved > 1e-3, "the method does nothing"


@pytest.mark.parametrize("recipe", [recipes.agem_adamw, recipes.replay_adamw])
def test_a_recipe_passes_on_what_its_parts_refuse(recipe):
    with pytest.raises(ValueError, match="`weight_decay`"):
        recipe(0.1, weight_decay=-1.0)
    with pytest.raises(ValueError, match="`learning_rate`"):
        recipe(-0.1)
    tx = recipe(0.1)
    with pytest.raises(ValueError, match=r"needs `.*_updates`"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_a_recipe_stands_behind_a_clip_and_in_multi_steps():
    tx = optax.chain(optax.clip_by_global_norm(1.0), recipes.ewc_adamw(0.1, 3.0))
    tx = optax_cl.multi_steps(tx, 2)
    state = tx.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(PARAMS, state, PARAMS)
    assert jnp.all(updates["w"] != 0)


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_a_recipe_can_be_injected(name):
    recipe = getattr(recipes, f"{name.split()[0]}_adamw")
    settings = {"rank": 2} if name.startswith("pro") else {}
    settings |= {"strength": 3.0} if name == "ewc" else {}
    static = ("rank", "mu_dtype") if "rank" in settings else ("mu_dtype",)
    make = optax.inject_hyperparams(recipe, static_args=static)
    tx = make(learning_rate=0.1, b1=0.8, mu_dtype=jnp.float32, **settings)
    state = tx.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0.2)
    old = {"replay_updates": PARAMS, "reference_updates": PARAMS}
    updates, _ = tx.update(PARAMS, state, PARAMS, **old)
    plain = recipe(0.2, b1=0.8, **settings)
    expected, _ = plain.update(PARAMS, plain.init(PARAMS), PARAMS, **old)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5)


def test_a_size_that_is_injected_is_told_to_be_static():
    make = optax.inject_hyperparams(recipes.projected_adamw)
    with pytest.raises(
        TypeError, match=r"`rank` must be a Python integer.*static_args"
    ):
        make(0.1, 2).init(PARAMS)


def test_a_recipe_in_a_capture_is_refused():
    tx = optax_cl.chain(optax.scale(0.5), recipes.ewc_adamw(0.1, 3.0))
    with pytest.raises(ValueError, match="bound already"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
