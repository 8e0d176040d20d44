"""The reservoir: exact inclusion, rivals for one slot, sampling, bad input."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from optax_cl.replay import (
    Reservoir,
    reservoir_add,
    reservoir_init,
    reservoir_sample,
)

LIMIT = 2**31 - 2
ITEM = np.zeros([], np.int32)
ADD = jax.jit(reservoir_add)
SAMPLE = jax.jit(reservoir_sample, static_argnums=2)


def numbers(count):
    return np.arange(count, dtype=np.int32)


def fill(key, capacity, length, batch_size, add=reservoir_add):
    """The reservoir after the stream 0, 1, ..., length - 1, in batches."""
    batches = jnp.arange(length, dtype=jnp.int32).reshape(-1, batch_size)

    def step(buffer, data):
        batch, key = data
        return add(buffer, batch, key), None

    keys = jax.random.split(key, len(batches))
    return jax.lax.scan(step, reservoir_init(capacity, ITEM), (batches, keys))[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def samples(seeds, capacity, length, batch_size, add=reservoir_add):
    """What is kept, ``[seeds, capacity]``, for many independent keys."""
    keys = jax.random.split(jax.random.key(7), seeds)
    return jax.vmap(lambda k: fill(k, capacity, length, batch_size, add))(keys).items


def inclusion_p_value(kept, length):
    """Chi-square test that each item is kept with the same probability.

    The counts of ``S`` samples of ``M`` out of ``N`` without replacement have variance
    ``S p (1 - p)`` and correlation ``-1 / (N - 1)``, hence the factor in front.
    """
    seeds, capacity = kept.shape
    p = capacity / length
    counts = np.bincount(np.ravel(kept), minlength=length)
    spread = np.sum((counts - seeds * p) ** 2) / (seeds * p * (1 - p))
    return stats.chi2.sf((length - 1) / length * spread, length - 1)


def add_off_by_one(buffer, batch, key):
    """Draws from the items before this one, leaving the item itself out."""
    (item,) = batch
    drawn = jax.random.randint(key, [], 0, jnp.maximum(buffer.seen, 1))
    slot = jnp.where(buffer.seen < 5, buffer.seen, drawn)
    return Reservoir(buffer.items.at[slot].set(item, mode="drop"), buffer.seen + 1)


def add_first_wins(buffer, batch, key):
    """Right draws, but of rivals for a slot the earliest is kept."""
    position = buffer.seen + jnp.arange(len(batch))
    drawn = jax.random.randint(key, [len(batch)], 0, position + 1)
    slot = jnp.where(position < 5, position, drawn)
    items = buffer.items
    for item, target in reversed(list(zip(batch, slot, strict=True))):
        items = items.at[target].set(item, mode="drop")
    return Reservoir(items, buffer.seen + len(batch))


@pytest.mark.parametrize("batch_size", [1, 5, 8, 40])
def test_every_item_is_kept_with_the_same_probability(batch_size):
    kept = np.asarray(samples(8_000, 5, 40, batch_size))
    assert inclusion_p_value(kept, 40) > 1e-3
    assert (np.sort(kept, axis=1)[:, 1:] > np.sort(kept, axis=1)[:, :-1]).all()


def test_drawing_without_the_item_itself_fails_the_same_test():
    kept = np.asarray(samples(8_000, 5, 40, 1, add_off_by_one))
    assert inclusion_p_value(kept, 40) < 1e-9
    # Early items are short, late ones in excess.
    assert (kept < 5).mean() < 5 / 40 < (kept >= 35).mean()


def test_keeping_the_first_of_rivals_fails_the_same_test():
    kept = np.asarray(samples(8_000, 5, 40, 8, add_first_wins))
    assert inclusion_p_value(kept, 40) < 1e-9


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_all_subsets_are_equally_likely(batch_size):
    kept = np.sort(np.asarray(samples(8_000, 3, 8, batch_size)), axis=1)
    subsets = list(itertools.combinations(range(8), 3))
    counts = [int((kept == subset).all(axis=1).sum()) for subset in subsets]
    assert sum(counts) == 8_000
    assert stats.chisquare(counts).pvalue > 1e-3


def test_of_rivals_for_one_slot_the_last_is_kept():
    # With one slot, the survivor is the last item whose draw was 0.
    empty = reservoir_init(1, ITEM)
    for seed in range(20):
        key = jax.random.key(seed)
        draws = jax.random.randint(key, [64], 0, numbers(64) + 1, np.int32)
        survivor = np.flatnonzero(np.asarray(draws) == 0)[-1]
        assert np.asarray(ADD(empty, numbers(64), key).items)[0] == survivor


@given(st.integers(0, 2**31 - 1))
def test_a_batch_is_added_as_if_item_by_item(seed):
    key = jax.random.key(seed)
    before = Reservoir(100 + numbers(6), np.int32(4))
    mask = np.random.default_rng(seed).random(16) < 0.7
    after = ADD(before, numbers(16), key, mask)
    position = 4 + np.cumsum(mask) - mask
    draws = np.asarray(jax.random.randint(key, [16], 0, position + 1, np.int32))
    slots = list(range(100, 106))
    for item in range(16):
        if mask[item]:
            n = position[item]
            slot = n if n < 6 else int(draws[item])
            if slot < 6:
                slots[slot] = item
    assert np.asarray(after.items).tolist() == slots
    assert after.seen == 4 + mask.sum()


def test_the_first_items_fill_the_slots_in_order():
    buffer = reservoir_init(6, ITEM)
    buffer = ADD(buffer, 5 + numbers(4), jax.random.key(0))
    np.testing.assert_array_equal(buffer.items, [5, 6, 7, 8, 0, 0])
    assert buffer.seen == 4 and buffer.seen.dtype == jnp.int32


def test_padding_is_neither_stored_nor_counted():
    buffer = reservoir_init(4, ITEM)
    batch = np.int32([1, -1, 2, -1])
    mask = batch > 0
    buffer = ADD(buffer, batch, jax.random.key(0), mask)
    np.testing.assert_array_equal(buffer.items, [1, 2, 0, 0])
    assert buffer.seen == 2
    same = ADD(buffer, batch, jax.random.key(1), np.zeros(4, bool))
    np.testing.assert_array_equal(same.items, buffer.items)
    assert same.seen == 2


def test_padding_does_not_change_the_odds():
    def add(buffer, batch, key):
        padded = jnp.stack([batch, jnp.full_like(batch, -1)], axis=1).ravel()
        return reservoir_add(buffer, padded, key, padded >= 0)

    kept = np.asarray(samples(8_000, 5, 40, 8, add))
    assert kept.min() >= 0
    assert inclusion_p_value(kept, 40) > 1e-3


def test_the_sample_has_the_imbalance_of_the_stream():
    labels = (np.arange(1000) % 10 == 0).astype(np.int32)
    buffer = ADD(reservoir_init(300, ITEM), labels, jax.random.key(0))
    assert 0.05 < np.mean(buffer.items) < 0.15


def test_one_reservoir_per_class_balances_the_classes():
    labels = np.int32(np.arange(1000) % 10 == 0)
    buffers = jax.tree.map(lambda x: np.stack([x, x]), reservoir_init(50, ITEM))
    buffers = jax.jit(jax.vmap(reservoir_add, in_axes=(0, None, 0, 0)))(
        buffers,
        labels,
        jax.random.split(jax.random.key(0), 2),
        labels[None] == np.arange(2)[:, None],
    )
    np.testing.assert_array_equal(buffers.seen, [900, 100])
    np.testing.assert_array_equal(buffers.items, [[0] * 50, [1] * 50])


def test_leaves_of_one_item_stay_together_and_keep_their_dtypes():
    example = {
        "x": np.zeros([2, 3], jnp.bfloat16),
        "y": jax.ShapeDtypeStruct((), jnp.int8),
        "none": None,
    }
    n = numbers(50)
    batch = {
        "x": np.broadcast_to(n[:, None, None], (50, 2, 3)).astype(jnp.bfloat16),
        "y": n.astype(np.int8),
        "none": None,
    }
    buffer = ADD(reservoir_init(7, example), batch, jax.random.key(0))
    assert buffer.items["x"].dtype == jnp.bfloat16 and buffer.items["none"] is None
    drawn, _ = SAMPLE(buffer, jax.random.key(1), 20)
    assert drawn["x"].shape == (20, 2, 3) and drawn["y"].dtype == jnp.int8
    for items in (buffer.items, drawn):
        expected = np.float32(items["y"]).reshape(-1, 1, 1) * np.ones([1, 2, 3])
        np.testing.assert_array_equal(np.float32(items["x"]), expected)


def test_jit_equals_eager_bit_for_bit_and_the_key_alone_decides():
    batch = numbers(30)
    buffer, key = reservoir_init(5, ITEM), jax.random.key(3)
    eager = reservoir_add(buffer, batch, key)
    jitted = ADD(buffer, batch, key)
    np.testing.assert_array_equal(eager.items, jitted.items)
    other = ADD(buffer, batch, jax.random.key(4))
    assert np.any(np.asarray(other.items) != np.asarray(eager.items))


def test_a_donated_buffer_is_updated_in_one_compilation():
    traces = []

    @functools.partial(jax.jit, donate_argnums=0)
    def add(buffer, batch, key):
        traces.append(None)
        return reservoir_add(buffer, batch, key)

    buffer = reservoir_init(5, ITEM)
    plain = buffer
    for step in range(6):
        plain = ADD(plain, 4 * step + numbers(4), jax.random.key(step))
    buffer = reservoir_init(5, ITEM)
    for step in range(6):
        buffer = add(buffer, 4 * step + numbers(4), jax.random.key(step))
    assert len(traces) == 1
    np.testing.assert_array_equal(buffer.items, plain.items)


def test_vmap_over_seeds_equals_a_loop():
    keys = jax.random.split(jax.random.key(0), 4)
    alone = jax.jit(lambda k: fill(k, 5, 40, 8))
    together = np.asarray(jax.jit(jax.vmap(alone))(keys).items)
    for items, key in zip(together, keys, strict=True):
        np.testing.assert_array_equal(items, alone(key).items)


def test_the_count_stops_before_it_overflows():
    buffer = Reservoir(np.zeros([2], np.int32), np.int32(LIMIT - 3))
    for seed in range(3):
        after = ADD(buffer, numbers(8), jax.random.key(seed))
        assert after.seen >= buffer.seen
        buffer = after
    assert buffer.seen == LIMIT
    # At odds of one in two thousand millions nothing is replaced.
    np.testing.assert_array_equal(buffer.items, [0, 0])


def test_an_empty_buffer_gives_zeros_and_zero_weights():
    buffer = reservoir_init(4, {"x": np.zeros([2], np.float32), "y": ITEM})
    batch, weights = SAMPLE(buffer, jax.random.key(0), 3)
    np.testing.assert_array_equal(weights, [0.0, 0.0, 0.0])
    np.testing.assert_array_equal(batch["x"], np.zeros([3, 2]))


@pytest.mark.parametrize("seen", [1, 3, 5, 50])
def test_only_filled_slots_are_drawn_and_all_equally_often(seen):
    buffer = Reservoir(numbers(5), np.int32(seen))
    batch, weights = SAMPLE(buffer, jax.random.key(0), 5000)
    np.testing.assert_array_equal(weights, np.ones(5000))
    filled = min(seen, 5)
    assert np.max(batch) < filled
    counts = np.bincount(np.asarray(batch), minlength=filled)
    assert stats.chi2.sf(stats.chisquare(counts).statistic, max(filled - 1, 1)) > 1e-3


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_capacity_below_one_is_refused(capacity):
    with pytest.raises(ValueError, match="`capacity` must be at least 1"):
        reservoir_init(capacity, ITEM)


def test_bad_input_is_named():
    buffer = reservoir_init(4, {"x": np.zeros([2], np.float32), "y": ITEM})
    key = jax.random.key(0)
    good = {"x": np.zeros([3, 2], np.float32), "y": np.zeros([3], np.int32)}
    with pytest.raises(TypeError, match="`capacity` must be a Python integer"):
        reservoir_init(2.0, ITEM)
    with pytest.raises(ValueError, match="`example` must hold at least one array"):
        reservoir_init(2, {})
    with pytest.raises(ValueError, match=r"at `x` got \(3, 5\), expected \(3, 2\)"):
        reservoir_add(buffer, {**good, "x": np.zeros([3, 5], np.float32)}, key)
    with pytest.raises(ValueError, match="`batch` must have the tree structure"):
        reservoir_add(buffer, {"x": good["x"]}, key)
    with pytest.raises(TypeError, match="at `y` got float32, expected int32"):
        reservoir_add(buffer, {**good, "y": np.zeros([3], np.float32)}, key)
    for wrong in (np.zeros([4], np.int32), ITEM):
        with pytest.raises(ValueError, match="one common leading batch axis"):
            reservoir_add(buffer, {**good, "y": wrong}, key)
    with pytest.raises(ValueError, match="one common leading batch axis"):
        empty = {"x": np.zeros([0, 2], np.float32), "y": np.zeros([0], np.int32)}
        reservoir_add(buffer, empty, key)
    with pytest.raises(TypeError, match="`mask` must be boolean; got float32"):
        reservoir_add(buffer, good, key, np.ones([3], np.float32))
    with pytest.raises(ValueError, match=r"`mask` must have shape \(3,\)"):
        reservoir_add(buffer, good, key, np.ones([2], bool))
    with pytest.raises(TypeError, match="`batch_size` must be a Python integer"):
        reservoir_sample(buffer, key, 2.5)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        reservoir_sample(buffer, key, 0)
