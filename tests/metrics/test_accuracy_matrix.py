"""Numbers read off the accuracy (or loss) matrix."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl import metrics

# Three tasks. Rows: random init, then after each task. Columns: tasks.
MATRIX = np.array(
    [
        [0.10, 0.20, 0.30],
        [0.80, 0.25, 0.20],
        [0.90, 0.70, 0.45],
        [0.60, 0.80, 0.95],
    ]
)
ON_LEVELS = [
    (metrics.average_accuracy, (0.60 + 0.80 + 0.95) / 3),
    # After one task .8, after two (.9 + .7) / 2, after three the average accuracy.
    (metrics.average_incremental_accuracy, (0.80 + 0.80 + 2.35 / 3) / 3),
    (metrics.learning_accuracy, (0.80 + 0.70 + 0.95) / 3),
]
ON_DIFFERENCES = [
    # (.6 - .8) and (.8 - .7), over T - 1 = 2.
    (metrics.backward_transfer, -0.05),
    (metrics.negated_backward_transfer, 0.05),
    # (.9 - .6) and (.7 - .8), over 2; the last row is not in the maximum.
    (metrics.chaudhry_forgetting, 0.10),
    # (.25 - .20) and (.45 - .30), over 2.
    (metrics.forward_transfer, 0.10),
]
SEEDS = st.integers(0, 2**32 - 1)


def random_matrix(seed, tasks=4, batch=()):
    return np.random.default_rng(seed).uniform(size=(*batch, tasks + 1, tasks))


@pytest.mark.parametrize(("metric", "expected"), ON_LEVELS + ON_DIFFERENCES)
def test_numbers_by_hand(metric, expected):
    np.testing.assert_allclose(metric(MATRIX), expected, atol=1e-12)


@pytest.mark.parametrize(("metric", "expected"), ON_LEVELS)
def test_levels_of_losses_keep_their_unit(metric, expected):
    losses = 3.0 - MATRIX
    np.testing.assert_allclose(metric(losses), 3.0 - expected, atol=1e-12)


@pytest.mark.parametrize(("metric", "expected"), ON_DIFFERENCES)
def test_differences_of_losses_keep_their_meaning(metric, expected):
    losses = 3.0 - MATRIX
    got = metric(losses, higher_is_better=False)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_rising_losses_are_positive_forgetting_and_negative_transfer():
    losses = np.array([[2.0, 2.0], [0.5, 2.5], [1.5, 0.5]])
    numbers = metrics.summary(losses, higher_is_better=False)
    assert numbers.negated_backward_transfer == 1.0
    assert numbers.chaudhry_forgetting == 1.0
    assert numbers.backward_transfer == -1.0
    assert numbers.forward_transfer == -0.5


def test_backward_transfer_divides_by_one_less_than_the_tasks():
    tasks = 3
    change = [MATRIX[-1, j] - MATRIX[j + 1, j] for j in range(tasks)]
    assert change[-1] == 0.0
    got = metrics.backward_transfer(MATRIX)
    np.testing.assert_allclose(got * (tasks - 1) / tasks, np.mean(change), atol=1e-12)


def test_chaudhry_forgetting_leaves_out_the_last_row_and_random_init():
    better_at_last = np.array([[0.95, 0.5], [0.5, 0.5], [0.75, 0.5]])
    assert metrics.chaudhry_forgetting(better_at_last) == -0.25


def test_chaudhry_forgetting_counts_what_was_solved_before_it_was_learned():
    # Task 2 stands at .9 after task 1, at .5 once learned.
    matrix = MATRIX.copy()
    matrix[1, 1] = 0.9
    expected = ((0.9 - 0.6) + (0.9 - 0.8)) / 2
    np.testing.assert_allclose(metrics.chaudhry_forgetting(matrix), expected)


def test_forward_transfer_is_measured_from_random_init_row():
    matrix = MATRIX.copy()
    matrix[0, 1:] += 0.1
    change = metrics.forward_transfer(matrix) - metrics.forward_transfer(MATRIX)
    np.testing.assert_allclose(change, -0.1, atol=1e-12)
    matrix = MATRIX.copy()
    matrix[0, 0] = 0.99  # The first task has no earlier one.
    assert metrics.forward_transfer(matrix) == metrics.forward_transfer(MATRIX)


def test_average_and_average_incremental_accuracy_are_two_numbers():
    matrix = np.array([[0.5, 0.5], [1.0, 0.5], [0.5, 0.5]])
    assert metrics.average_accuracy(matrix) == 0.5
    assert metrics.average_incremental_accuracy(matrix) == 0.75


def test_gain_over_independent_by_hand():
    independent = np.array([0.7, 0.8, 0.9])
    got = metrics.gain_over_independent(MATRIX, independent)
    np.testing.assert_allclose(got, (0.1 - 0.1 + 0.05) / 3)
    got = metrics.gain_over_independent(
        3.0 - MATRIX, 3.0 - independent, higher_is_better=False
    )
    np.testing.assert_allclose(got, (0.1 - 0.1 + 0.05) / 3)


def test_intransigence_by_hand_is_per_task_and_minus_the_gain():
    joint = np.array([0.8, 0.9, 0.9])
    got = metrics.intransigence(MATRIX, joint)
    np.testing.assert_allclose(got, [0.0, 0.2, -0.05], atol=1e-12)
    gain = metrics.gain_over_independent(MATRIX, joint)
    np.testing.assert_allclose(got.mean(), -gain, atol=1e-12)
    got = metrics.intransigence(3.0 - MATRIX, 3.0 - joint, higher_is_better=False)
    np.testing.assert_allclose(got, [0.0, 0.2, -0.05], atol=1e-12)


def test_learning_curve_area_counts_zero_shot_and_beta_batches():
    curves = np.array([[0.0, 0.5, 1.0, 9.0], [0.5, 0.5, 0.5, np.nan]])
    assert metrics.learning_curve_area(curves, beta=1) == (0.25 + 0.5) / 2
    assert metrics.learning_curve_area(curves, beta=2) == 0.5


@hypothesis.given(SEEDS)
def test_average_minus_learning_is_the_share_of_backward_transfer(seed):
    matrix = random_matrix(seed)
    difference = metrics.average_accuracy(matrix) - metrics.learning_accuracy(matrix)
    expected = 3 / 4 * metrics.backward_transfer(matrix)
    np.testing.assert_allclose(difference, expected, atol=1e-12)


@hypothesis.given(SEEDS, st.booleans())
def test_chaudhry_forgetting_is_at_least_negated_backward_transfer(seed, better):
    matrix = random_matrix(seed)
    best = metrics.chaudhry_forgetting(matrix, higher_is_better=better)
    learned = metrics.negated_backward_transfer(matrix, higher_is_better=better)
    assert best >= learned - 1e-12


@hypothesis.given(SEEDS)
def test_all_numbers_equal_the_definitions_written_as_loops(seed):
    a, tasks = random_matrix(seed, 5), 5
    independent, joint = np.random.default_rng(seed + 1).uniform(size=(2, 5))
    got = metrics.summary(a, independent=independent, joint=joint)
    bwt = sum(a[5, j] - a[j + 1, j] for j in range(4)) / 4
    best = [max(a[row, j] for row in range(1, tasks)) for j in range(4)]
    expected = metrics.Summary(
        average=sum(a[5, j] for j in range(5)) / 5,
        average_incremental=sum(sum(a[k, j] for j in range(k)) / k for k in range(1, 6))
        / 5,
        learning=sum(a[j + 1, j] for j in range(5)) / 5,
        backward_transfer=bwt,
        negated_backward_transfer=-bwt,
        chaudhry_forgetting=sum(best[j] - a[5, j] for j in range(4)) / 4,
        forward_transfer=sum(a[j, j] - a[0, j] for j in range(1, 5)) / 4,
        gain_over_independent=sum(a[j + 1, j] - independent[j] for j in range(5)) / 5,
        intransigence=sum(joint[j] - a[j + 1, j] for j in range(5)) / 5,
        learning_curve_area=None,
    )
    assert got.learning_curve_area is None
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-12), got, expected)


def test_a_matrix_that_never_changes_has_no_transfer_and_no_forgetting():
    numbers = metrics.summary(np.full((4, 3), 0.5))
    assert numbers.average == numbers.average_incremental == numbers.learning == 0.5
    assert numbers.backward_transfer == numbers.forward_transfer == 0.0
    assert numbers.chaudhry_forgetting == numbers.negated_backward_transfer == 0.0


def test_summary_is_equal_over_batches_jit_vmap_and_numpy():
    matrix = random_matrix(0, tasks=4, batch=(2, 3))
    reference = np.random.default_rng(1).uniform(size=4)
    curves = np.random.default_rng(2).uniform(size=(2, 3, 4, 11))

    def run(matrix, curves):
        return metrics.summary(
            matrix, independent=reference, joint=reference, learning_curves=curves
        )

    batched = run(matrix, curves)
    assert all(x.shape == (2, 3) and x.dtype == np.float64 for x in batched)
    single = run(matrix[1, 2], curves[1, 2])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[1, 2], y, 1e-12), batched, single
    )
    on_device = jax.jit(run)(jnp.asarray(matrix), jnp.asarray(curves))
    mapped = jax.jit(jax.vmap(jax.vmap(run)))(jnp.asarray(matrix), jnp.asarray(curves))
    for got in (on_device, mapped):
        assert all(isinstance(x, jax.Array) for x in got)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            got,
            batched,
        )


def test_half_precision_and_integers_are_computed_in_full():
    percent = np.array([[10, 10], [91, 10], [90, 80]])
    assert metrics.backward_transfer(percent) == -1.0
    half = jnp.asarray(MATRIX, jnp.bfloat16)
    assert metrics.average_accuracy(half).dtype == jnp.float32


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_entries_that_a_metric_does_not_read_may_be_missing(convert):
    matrix = MATRIX.copy()
    matrix[0] = np.nan
    matrix[1, 1:] = np.nan
    matrix[2, 2] = np.nan
    for metric, expected in [*ON_LEVELS, *ON_DIFFERENCES[:2]]:
        np.testing.assert_allclose(metric(convert(matrix)), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"chaudhry_forgetting.*nan at matrix\[1, 1\]"):
        metrics.chaudhry_forgetting(convert(matrix))
    with pytest.raises(ValueError, match=r"forward_transfer.*nan at matrix\[0, 1\]"):
        metrics.forward_transfer(convert(matrix))


@pytest.mark.parametrize(
    ("metric", "row", "column"),
    [
        (metrics.average_accuracy, 3, 0),
        (metrics.average_incremental_accuracy, 2, 0),
        (metrics.learning_accuracy, 2, 1),
        (metrics.backward_transfer, 1, 0),
        (metrics.negated_backward_transfer, 3, 1),
        (metrics.chaudhry_forgetting, 1, 1),
        (metrics.forward_transfer, 2, 2),
        (metrics.forward_transfer, 0, 2),
        (metrics.summary, 1, 0),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_entries_that_a_metric_reads_must_be_finite(metric, row, column, value):
    matrix = np.stack([MATRIX, MATRIX])
    matrix[1, row, column] = value
    with pytest.raises(ValueError, match=rf"matrix\[1, {row}, {column}\]"):
        metric(matrix)


def test_each_metric_reads_just_the_entries_it_checks():
    for metric, _ in ON_LEVELS + ON_DIFFERENCES:
        for index in np.ndindex(MATRIX.shape):
            broken, moved = MATRIX.copy(), MATRIX.copy()
            broken[index] = np.nan
            moved[index] = 10.0
            try:
                metric(broken)
            except ValueError:
                continue
            assert metric(moved) == metric(MATRIX), (metric.__name__, index)


def test_a_missing_entry_under_jit_gives_nan_and_no_number():
    matrix = jnp.asarray(MATRIX).at[1, 0].set(jnp.nan)
    assert np.isnan(jax.jit(metrics.backward_transfer)(matrix))
    assert np.isnan(jax.jit(metrics.chaudhry_forgetting)(matrix))


@pytest.mark.parametrize("shape", [(3, 4), (3,), (), (5, 3), (1, 0)])
def test_a_matrix_of_another_shape_is_refused(shape):
    for metric in (*(m for m, _ in ON_LEVELS + ON_DIFFERENCES), metrics.summary):
        with pytest.raises(ValueError, match="`matrix`"):
            metric(np.zeros(shape))
    if shape:
        with pytest.raises(ValueError, match="`matrix`"):
            jax.jit(metrics.summary)(jnp.zeros(shape))


def test_a_square_matrix_is_told_to_prepend_random_init():
    with pytest.raises(ValueError, match="Prepend row 0"):
        metrics.average_accuracy(np.zeros((3, 3)))


def test_one_task_has_averages_and_no_transfer():
    one = np.array([[0.1], [0.9]])
    assert metrics.average_accuracy(one) == metrics.learning_accuracy(one) == 0.9
    for metric, _ in ON_DIFFERENCES:
        with pytest.raises(ValueError, match="at least 2 tasks"):
            metric(one)


@pytest.mark.parametrize(
    "metric", [metrics.gain_over_independent, metrics.intransigence]
)
def test_references_of_another_shape_or_not_finite_are_refused(metric):
    for shape in ((), (1,), (2,), (2, 3)):
        with pytest.raises(ValueError, match=r"one entry per task.*\(3,\)"):
            metric(MATRIX, np.zeros(shape))
    with pytest.raises(ValueError, match=r"nan at \w+\[1\]"):
        metric(MATRIX, [0.5, np.nan, 0.5])
    seeds = np.stack([MATRIX, MATRIX])
    per_seed = np.stack([np.zeros(3), np.ones(3)])
    assert metric(seeds, per_seed).shape == metric(seeds, np.zeros(3)).shape


def test_learning_curves_that_are_too_short_or_not_finite_are_refused():
    curves = np.zeros((2, 10))
    with pytest.raises(ValueError, match=r"11 columns.*\(2, 10\)"):
        metrics.learning_curve_area(curves)
    with pytest.raises(ValueError, match="shape"):
        metrics.learning_curve_area(np.zeros(11))
    with pytest.raises(ValueError, match="`beta`"):
        metrics.learning_curve_area(curves, beta=0)
    curves[1, 3] = np.nan
    with pytest.raises(ValueError, match=r"learning_curves\[1, 3\]"):
        metrics.learning_curve_area(curves, beta=5)


@pytest.mark.parametrize(
    ("matrix", "error"),
    [
        (MATRIX + 1j, TypeError),
        (jnp.asarray(MATRIX) + 1j, TypeError),
        (np.full((4, 3), "a"), TypeError),
        ([[0.1, 0.2], [0.8]], ValueError),
        (None, TypeError),
    ],
)
def test_a_matrix_that_holds_no_numbers_is_refused(matrix, error):
    with pytest.raises(error, match="`matrix`"):
        metrics.summary(matrix)


def test_a_direction_that_is_no_boolean_is_refused():
    with pytest.raises(TypeError, match="`higher_is_better`"):
        metrics.backward_transfer(MATRIX, higher_is_better="loss")
