"""What is left of a pre-trained model's abilities."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl import metrics

# A base model and two stages, three probes.
PROBES = np.array([[0.75, 0.5, 1.0], [0.5, 0.625, 1.0], [0.625, 0.25, 0.5]])


def test_taxes_by_hand():
    got = metrics.ability_tax(PROBES, chance=[0.25, 0.25, 0.5])
    np.testing.assert_array_equal(got.total, [[0.25, -0.125, 0], [0.125, 0.25, 0.5]])
    np.testing.assert_array_equal(got.hop, [[0.25, -0.125, 0], [-0.125, 0.375, 0.5]])
    np.testing.assert_allclose(got.mean, [0.125 / 3, 0.875 / 3])
    np.testing.assert_array_equal(got.worst, [0.25, 0.5])
    np.testing.assert_array_equal(got.retained, [[0.5, 1.5, 1.0], [0.75, 0.0, 0.0]])


@hypothesis.given(st.integers(0, 2**32 - 1))
def test_hops_add_up_to_the_total_and_the_worst_is_no_better_than_the_mean(seed):
    probes = np.random.default_rng(seed).uniform(0.1, 1.0, size=(2, 6, 4))
    got = metrics.ability_tax(probes, chance=np.full(4, 0.05))
    np.testing.assert_allclose(got.hop.cumsum(-2), got.total, atol=1e-12)
    assert (got.worst >= got.mean - 1e-12).all()
    # Of what was above chance: all if nothing is lost, nothing at chance.
    above = (probes[:, 1:] - 0.05) / (probes[:, :1] - 0.05)
    np.testing.assert_allclose(got.retained, above)


def test_losses_are_accuracies_turned_over():
    losses = metrics.ability_tax(
        3.0 - PROBES, chance=3.0 - np.array([0.25, 0.25, 0.5]), higher_is_better=False
    )
    scores = metrics.ability_tax(PROBES, chance=[0.25, 0.25, 0.5])
    jax.tree.map(np.testing.assert_allclose, losses, scores)


def test_jit_equals_numpy():
    chance = [0.25, 0.25, 0.5]
    got = jax.jit(lambda p: metrics.ability_tax(p, chance=chance))(jnp.array(PROBES))
    expected = metrics.ability_tax(PROBES, chance=chance)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), got, expected
    )


def test_without_a_chance_level_no_share_is_told():
    assert metrics.ability_tax(PROBES).retained is None


@pytest.mark.parametrize(
    ("probes", "chance", "message"),
    [
        (PROBES[:1], None, "the base model in row 0 and at least one stage"),
        (PROBES[0], None, "must have shape"),
        (np.where(PROBES == 0.625, np.nan, PROBES), None, "must be finite"),
        (PROBES, [0.25, 0.25], "one entry per probe"),
        (PROBES, [0.25, 0.5, 0.25], "on probe 1 it is not"),
    ],
)
def test_bad_input_is_refused(probes, chance, message):
    with pytest.raises(ValueError, match=message):
        metrics.ability_tax(probes, chance=chance)
