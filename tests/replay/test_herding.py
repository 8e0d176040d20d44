import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl.replay import herding
from tests.arrays import normal


def by_distance(features, num):
    """The definition, in float64."""
    unit = np.float64(features)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    mean, chosen = unit.mean(0), []
    for t in range(1, num + 1):
        total = unit[chosen].sum(0)
        distances = np.linalg.norm(mean - (unit + total) / t, axis=1)
        distances[chosen] = np.inf
        chosen.append(int(np.argmin(distances)))
    return chosen


@pytest.mark.parametrize("seed", range(3))
def test_choices_are_the_nearest_by_definition(seed):
    features = normal(seed, 30, 5) + 1.0
    assert herding(features, 12).tolist() == by_distance(features, 12)


def test_a_shorter_list_is_the_beginning_of_a_longer_one():
    features = normal(3, 20, 4)
    assert herding(features, 5).tolist() == herding(features, 11)[:5].tolist()


def test_all_are_chosen_once():
    assert sorted(herding(normal(4, 9, 3), 9).tolist()) == list(range(9))


def test_reordered_examples_give_reordered_choices():
    features, order = normal(5, 12, 4), np.random.default_rng(0).permutation(12)
    assert order[herding(features[order], 6)].tolist() == herding(features, 6).tolist()


def test_the_mean_of_the_chosen_is_nearer_than_that_of_a_random_choice():
    features = np.asarray(normal(6, 200, 6)) + np.eye(6)[0]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)

    def error(rows):
        return np.linalg.norm(unit[rows].mean(0) - unit.mean(0))

    rng = np.random.default_rng(0)
    random = [error(rng.choice(200, 20, replace=False)) for _ in range(20)]
    assert error(np.asarray(herding(features, 20))) < min(random) / 3


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e38])
def test_only_directions_count(scale):
    features = normal(7, 10, 3)
    rows = np.where(np.arange(10) % 2, np.float32(scale), 1)[:, None]
    assert herding(rows * features, 5).tolist() == herding(features, 5).tolist()


def test_classes_of_one_size_are_chosen_from_at_once():
    features = normal(8, 3, 8, 4)
    found = jax.jit(jax.vmap(lambda f: herding(f, 3)))(features)
    assert found.tolist() == [herding(f, 3).tolist() for f in features]


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_features_without_a_direction_are_chosen_last_inside_jit(value):
    features = normal(10, 9, 4)
    bad = np.insert(features, [2, 5], value, axis=0)
    found = jax.jit(lambda f: herding(f, 11))(bad).tolist()
    places = np.insert(np.arange(9), [2, 5], -1)  # of the rows in `features`
    assert [places[i] for i in found] == [*herding(features, 9).tolist(), -1, -1]
    assert found[-2:] == [2, 6]


def test_they_are_last_even_where_all_others_lead_away_from_the_mean():
    # After two choices both that are left are on the far side of what is missing.
    features = [[0, 0], [-0.995, 0.103], [0.073, 0.997], [-0.353, 0.936], [0.93, 0.368]]
    found = jax.jit(lambda f: herding(f, 5))(np.float32(features)).tolist()
    assert found == [*[i + 1 for i in by_distance(features[1:], 4)], 0]


def test_indices_are_int32_where_integers_are_wider(x64):
    features = np.random.default_rng(11).normal(size=(6, 3))
    assert herding(features, 4).dtype == np.int32
    assert herding(features, 4).tolist() == by_distance(features, 4)


def test_mistakes_are_named():
    features = normal(9, 4, 3)
    with pytest.raises(ValueError, match="`num` is 5, but there are 4"):
        herding(features, 5)
    with pytest.raises((TypeError, ValueError), match="`num`"):
        herding(features, 0)
    with pytest.raises(ValueError, match=r"`\[N, d\]`; got shape \(4,\)"):
        herding(features[:, 0], 2)
    with pytest.raises(TypeError, match="int32"):
        herding(jnp.ones((4, 3), jnp.int32), 2)
    for value in (0.0, np.nan):
        with pytest.raises(ValueError, match="row 2 is not"):
            herding(features.at[2].set(value), 2)
