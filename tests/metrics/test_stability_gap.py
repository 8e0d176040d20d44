"""Metrics of evaluations made during training."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl import metrics

SEEDS = st.integers(0, 2**32 - 1)
ENDS = (3, 8)  # Of three tasks on twelve evaluations; the last ends at 11.
LENGTH = 12

# Two tasks; the first is learned at evaluation 2, then falls, and partly comes back.
CURVES = np.array(
    [
        [0.0, 0.5, 0.875, 0.25, 0.5, 0.75, 0.75],
        [0.1, 0.1, 0.1, 0.5, 0.75, 1.0, 1.0],
    ]
)


def random_curves(seed, batch=()):
    # One decimal place, so that ties are common.
    values = np.random.default_rng(seed).uniform(size=(*batch, 3, LENGTH))
    return np.round(values, 1)


def loop_gap(curves, target, tolerance):
    """The definitions, pair by pair, in plain Python."""
    ends = [*ENDS, LENGTH - 1]
    found = np.zeros((4, 2, 2))
    for k in range(2):
        s, e = ends[k], ends[k + 1]
        for i in range(k + 1):
            curve = [float(x) for x in curves[i]]
            lowest = min(curve[s + 1 : e + 1])
            argmin = curve.index(lowest, s + 1)
            goal = (curve[s] if target == "switch" else curve[e]) - tolerance
            steps = math.inf
            for n in range(e, argmin, -1):
                if curve[n] >= goal:
                    steps = n - s
            found[:, k, i] = (
                max(0.0, curve[s] - lowest),
                max(0.0, min(curve[s], curve[e]) - lowest),
                0.0 if lowest >= goal else steps,
                sum(max(0.0, curve[s] - curve[n]) for n in range(s + 1, e + 1)),
            )
    return metrics.StabilityGap(*found)


def loop_windowed(curves, window, mask, sign):
    worst = []
    for curve, counts in zip(curves, mask, strict=True):
        drops = [0.0]
        for n in range(len(curve)):
            for m in range(max(0, n - window + 1), n):
                if counts[m] and counts[n]:
                    drops.append(sign * (curve[m] - curve[n]))
        worst.append(max(drops))
    return sum(worst) / len(worst)


# --- min-ACC and WC-ACC ---------------------------------------------------------------


def test_min_accuracy_by_hand():
    assert metrics.min_accuracy(CURVES, [2]) == 0.25
    three = np.zeros((3, 7))
    three[0] = [0.0, 0.9, 0.5, 0.8, 0.4, 0.7, 0.6]
    three[1] = [0.0, 0.0, 0.0, 1.0, 0.2, 0.3, 0.4]
    got = metrics.min_accuracy(three, [1, 3])
    np.testing.assert_allclose(got, (0.4 + 0.2) / 2)


def test_min_accuracy_leaves_out_evaluations_before_a_task_was_learned():
    early = CURVES.copy()
    early[0, :2] = 0.0
    early[1, :-1] = 0.0
    assert metrics.min_accuracy(early, [2]) == 0.25
    early[0, :2] = np.nan
    early[1] = np.nan
    assert metrics.min_accuracy(early, [2]) == 0.25


def test_worst_case_accuracy_by_hand():
    assert metrics.worst_case_accuracy(CURVES, [2]) == 1.0 / 2 + 0.25 / 2


def test_worst_case_of_losses_is_the_highest():
    losses = 4.0 - CURVES
    assert metrics.min_accuracy(losses, [2], higher_is_better=False) == 3.75
    got = metrics.worst_case_accuracy(losses, [2], higher_is_better=False)
    assert got == 4.0 - 0.625


@hypothesis.given(SEEDS)
def test_the_worst_case_bounds_what_is_left_at_the_end(seed):
    curves = random_curves(seed)
    final = curves[:, -1]
    assert metrics.min_accuracy(curves, ENDS) <= final[:-1].mean() + 1e-12
    assert metrics.worst_case_accuracy(curves, ENDS) <= final.mean() + 1e-12
    kwargs = {"higher_is_better": False}
    assert metrics.min_accuracy(curves, ENDS, **kwargs) >= final[:-1].mean() - 1e-12
    assert metrics.worst_case_accuracy(curves, ENDS, **kwargs) >= final.mean() - 1e-12


# --- windows --------------------------------------------------------------------------


def test_plasticity_of_a_dip_and_rise_starts_at_the_dip():
    window = np.array([[0.5, 0.2, 0.9]])
    np.testing.assert_allclose(metrics.windowed_plasticity(window, 3), 0.7)
    np.testing.assert_allclose(metrics.windowed_forgetting(window, 3), 0.3)


def test_window_holds_as_many_evaluations_as_it_says():
    steady = np.array([[1.0, 0.875, 0.75, 0.625, 0.5]])
    for window, expected in [(2, 0.125), (3, 0.25), (4, 0.375), (5, 0.5), (99, 0.5)]:
        assert metrics.windowed_forgetting(steady, window) == expected
        assert metrics.windowed_plasticity(steady, window) == 0.0


def test_windowed_metrics_are_means_over_tasks_of_each_ones_worst():
    curves = np.array([[1.0, 0.5, 1.0], [0.5, 0.5, 0.75]])
    assert metrics.windowed_forgetting(curves, 2) == 0.25
    assert metrics.windowed_plasticity(curves, 2) == 0.375


def test_masked_evaluations_neither_start_nor_end_a_drop():
    curve = np.array([[9.0, 0.5, np.nan, 0.25, -9.0]])
    mask = np.array([False, True, False, True, False])
    assert metrics.windowed_forgetting(curve, 5, mask=mask) == 0.25
    assert metrics.windowed_plasticity(curve, 5, mask=mask) == 0.0
    assert metrics.windowed_forgetting(curve, 2, mask=mask) == 0.0


@hypothesis.given(SEEDS, st.sampled_from([2, 3, 4, 6, 7, 8, 9, 12, 50]))
def test_windowed_metrics_equal_all_pairs_in_a_window(seed, window):
    curves = random_curves(seed)
    mask = np.random.default_rng(seed).uniform(size=curves.shape) < 0.7
    mask[:, 5] = True
    for mask_or_none in (mask, None):
        counts = np.ones(curves.shape, bool) if mask_or_none is None else mask
        for better in (True, False):
            kwargs = {"mask": mask_or_none, "higher_is_better": better}
            sign = 1 if better else -1
            np.testing.assert_allclose(
                metrics.windowed_forgetting(curves, window, **kwargs),
                loop_windowed(curves, window, counts, sign),
                atol=1e-12,
            )
            np.testing.assert_allclose(
                metrics.windowed_plasticity(curves, window, **kwargs),
                loop_windowed(curves, window, counts, -sign),
                atol=1e-12,
            )


@hypothesis.given(SEEDS)
def test_windowed_metrics_do_not_decrease_with_the_window(seed):
    curves = random_curves(seed)
    for metric in (metrics.windowed_forgetting, metrics.windowed_plasticity):
        values = [float(metric(curves, w)) for w in range(2, LENGTH + 3)]
        assert values == sorted(values)
        assert 0.0 <= values[0] and values[-1] <= 1.0


@hypothesis.given(SEEDS)
def test_window_of_two_is_the_largest_single_drop(seed):
    curves = random_curves(seed)
    largest = np.maximum(0.0, -np.diff(curves)).max(-1).mean()
    np.testing.assert_allclose(metrics.windowed_forgetting(curves, 2), largest)


# --- the stability gap ----------------------------------------------------------------


def one_pair(curve, **kwargs):
    """The gap of a curve whose task ends at its first evaluation."""
    curves = np.stack([curve, np.zeros(len(curve))])
    return [float(x[0, 0]) for x in metrics.stability_gap(curves, [0], **kwargs)]


def test_gap_by_hand():
    gap = metrics.stability_gap(CURVES, [2])
    assert gap.depth == 0.875 - 0.25
    assert gap.recovered == 0.75 - 0.25
    assert gap.recovery_steps == np.inf
    assert gap.area == 0.625 + 0.375 + 0.125 + 0.125


def test_recovery_to_where_the_curve_ends_or_within_a_tolerance():
    settled = metrics.stability_gap(CURVES, [2], target="end")
    assert settled.recovery_steps == 3.0
    near = metrics.stability_gap(CURVES, [2], tolerance=0.125)
    assert near.recovery_steps == 3.0
    wide = metrics.stability_gap(CURVES, [2], tolerance=0.375)
    assert wide.recovery_steps == 2.0
    assert wide.depth == settled.depth == 0.625


@pytest.mark.parametrize("target", ["switch", "end"])
def test_a_constant_curve_has_no_gap_and_takes_no_steps(target):
    assert one_pair([0.5] * 4, target=target) == [0.0, 0.0, 0.0, 0.0]
    numbers = metrics.curve_summary(
        np.full((3, LENGTH), 0.5), ENDS, windows=(2, 5), target=target
    )
    assert numbers.min_accuracy == numbers.worst_case_accuracy == 0.5
    assert numbers.gap_recovery_rate == 1.0
    for name, value in numbers._asdict().items():
        if name not in ("min_accuracy", "worst_case_accuracy", "gap_recovery_rate"):
            np.testing.assert_array_equal(value, 0.0, err_msg=name)


def test_a_curve_that_only_rises_has_no_negative_depth():
    assert one_pair([0.5, 0.75, 1.0]) == [0.0, 0.0, 0.0, 0.0]


def test_a_dip_within_the_tolerance_takes_no_steps():
    assert one_pair([0.5, 0.25, 0.5], tolerance=0.25)[2] == 0.0
    assert one_pair([0.5, 0.25, 0.5], tolerance=0.125)[2] == 2.0


def test_recovery_is_counted_after_the_lowest_point():
    # Back at the target once before the real minimum comes.
    assert one_pair([0.5, 0.25, 0.5, 0.0, 0.25, 0.75])[2] == 5.0


def test_recovery_after_a_flat_minimum_counts_from_its_beginning():
    assert one_pair([0.5, 0.25, 0.25, 0.25, 0.5])[2] == 4.0


def test_each_switch_ends_with_its_task_and_the_last_with_the_curve():
    curves = np.zeros((3, 6))
    #            s0          s1
    curves[0] = [1.0, 0.75, 1.0, 0.5, 0.25, 0.5]
    curves[1] = [0.0, 0.00, 1.0, 1.0, 0.75, 1.0]
    gap = metrics.stability_gap(curves, [0, 2])
    np.testing.assert_array_equal(gap.depth, [[0.25, 0.0], [0.75, 0.25]])
    np.testing.assert_array_equal(gap.recovered, [[0.25, 0.0], [0.25, 0.25]])
    np.testing.assert_array_equal(gap.recovery_steps, [[2.0, 0.0], [np.inf, 3.0]])
    np.testing.assert_array_equal(gap.area, [[0.25, 0.0], [1.75, 0.25]])
    numbers = metrics.curve_summary(curves, [0, 2], windows=(2, 4))
    np.testing.assert_allclose(numbers.gap_depth, (0.25 + 0.75 + 0.25) / 3)
    np.testing.assert_allclose(numbers.gap_recovery_rate, 2 / 3)
    # The pair that does not recover counts the three evaluations of the last task.
    np.testing.assert_allclose(numbers.gap_recovery_steps, (2 + 3 + 3) / 3)
    np.testing.assert_allclose(
        numbers.windowed_forgetting, [(0.5 + 0.25) / 3, (0.75 + 0.25) / 3]
    )


def test_summary_windows_begin_with_the_training_of_a_task():
    curves = np.zeros((2, 6))
    curves[1] = [1.0, 0.0, 0.25, 0.75, 0.75, 0.75]
    numbers = metrics.curve_summary(curves, [2], windows=(2,))
    assert numbers.windowed_forgetting == 0.0  # Falls while it is not yet trained.
    assert numbers.windowed_plasticity == 0.25  # From the value at the switch.


@hypothesis.given(SEEDS, st.sampled_from(["switch", "end"]), st.sampled_from([0, 0.25]))
def test_gap_equals_the_definitions_written_as_loops(seed, target, tolerance):
    curves = random_curves(seed)
    expected = loop_gap(curves, target, tolerance)
    kwargs = {"target": target, "tolerance": tolerance}
    got = metrics.stability_gap(curves, ENDS, **kwargs)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), got, expected
    )
    got = metrics.stability_gap(-curves, ENDS, higher_is_better=False, **kwargs)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), got, expected
    )


@hypothesis.given(SEEDS)
def test_depth_is_what_was_recovered_plus_what_was_lost(seed):
    curves = random_curves(seed)
    gap = metrics.stability_gap(curves, ENDS)
    lost = np.zeros((2, 2))
    for k, (s, e) in enumerate(((3, 8), (8, 11))):
        lost[k] = curves[:-1, s] - curves[:-1, e]
    lost = np.where(metrics.old_task_pairs(3), lost, 0.0)
    expected = gap.recovered + np.maximum(0.0, lost)
    np.testing.assert_allclose(gap.depth, expected, atol=1e-12)
    assert (gap.depth >= lost - 1e-12).all()
    assert (gap.area >= gap.depth - 1e-12).all()
    assert ((gap.depth >= 0.0) & (gap.depth <= 1.0)).all()
    np.testing.assert_array_equal(gap.recovery_steps == 0.0, gap.depth == 0.0)


# --- masks ----------------------------------------------------------------------------


def test_masks_by_hand():
    np.testing.assert_array_equal(
        metrics.since_started([1, 3], 5),
        np.array([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]], bool),
    )
    np.testing.assert_array_equal(
        metrics.since_learned([1, 3], 5),
        np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], bool),
    )


def test_min_accuracy_is_the_minimum_under_the_mask_since_learned():
    curves = random_curves(0)
    mask = metrics.since_learned(ENDS, LENGTH)
    expected = np.where(mask, curves, np.inf)[:-1].min(-1).mean()
    np.testing.assert_allclose(metrics.min_accuracy(curves, ENDS), expected)


def test_what_was_measured_before_a_task_started_is_not_read():
    curves = random_curves(3)
    expected = metrics.curve_summary(curves, ENDS, windows=(2, 6))
    curves[~metrics.since_started(ENDS, LENGTH)] = np.nan
    got = metrics.curve_summary(curves, ENDS, windows=(2, 6))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# --- batches, jit and vmap ------------------------------------------------------------


@pytest.mark.parametrize("better", [True, False])
def test_curve_summary_is_equal_over_batches_jit_vmap_and_numpy(better):
    curves = random_curves(5, batch=(4,))

    def run(curves):
        kwargs = {"windows": (2, 5), "tolerance": 0.05, "higher_is_better": better}
        return metrics.curve_summary(curves, ENDS, **kwargs)

    batched = run(curves)
    assert batched.gap_depth.shape == (4,)
    assert batched.windowed_forgetting.shape == (4, 2)
    assert all(x.dtype == np.float64 and np.isfinite(x).all() for x in batched)
    single = run(curves[2])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[2], y, 1e-12), batched, single
    )
    on_device = jnp.asarray(curves)
    for got in (jax.jit(run)(on_device), jax.jit(jax.vmap(run))(on_device)):
        assert all(isinstance(x, jax.Array) for x in got)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            got,
            batched,
        )


def test_jax_arrays_are_computed_in_jax_without_jit_too():
    got = metrics.min_accuracy(jnp.asarray(CURVES), [2])
    assert isinstance(got, jax.Array) and got == 0.25


def test_a_missing_evaluation_under_jit_gives_nan_and_no_number():
    curves = jnp.asarray(random_curves(0)).at[0, 6].set(jnp.nan)
    numbers = jax.jit(lambda c: metrics.curve_summary(c, ENDS, windows=(3,)))(curves)
    for name, value in numbers._asdict().items():
        if name != "gap_recovery_rate":
            assert np.isnan(value).all(), name


def test_tolerance_may_be_traced():
    curves = random_curves(1)
    gap = jax.jit(lambda t: metrics.stability_gap(curves, ENDS, tolerance=t))(0.25)
    expected = metrics.stability_gap(curves, ENDS, tolerance=0.25)
    np.testing.assert_allclose(gap.depth, expected.depth, rtol=1e-6)
    np.testing.assert_array_equal(gap.recovery_steps, expected.recovery_steps)


# --- bad input ------------------------------------------------------------------------

ALL = [
    metrics.min_accuracy,
    metrics.worst_case_accuracy,
    metrics.stability_gap,
    metrics.curve_summary,
]


@pytest.mark.parametrize("metric", ALL)
def test_wrong_boundaries_are_refused(metric):
    curves = random_curves(0)
    for boundaries in ([3], [3, 5, 8], []):
        with pytest.raises(ValueError, match=r"one entry per task but the last, 2"):
            metric(curves, boundaries)
    for boundaries in ([5, 3], [3, 3], [-1, 3], [3, LENGTH - 1], [3, LENGTH]):
        with pytest.raises(ValueError, match="increase strictly"):
            metric(curves, boundaries)
    for boundaries in ([3.0, 5.0], 3, [[3, 5]], ["a", "b"], [True, False]):
        with pytest.raises(TypeError, match="sequence of integers"):
            metric(curves, boundaries)
    with pytest.raises(TypeError, match="known at trace time"):
        jax.jit(lambda b: metric(curves, b))(jnp.array(ENDS))
    with pytest.raises(ValueError, match="at least 2 tasks"):
        metric(curves[:1], [])


@pytest.mark.parametrize("metric", ALL)
def test_wrong_curves_are_refused(metric):
    for shape in ((LENGTH,), (), (3, 0), (0, LENGTH)):
        with pytest.raises(ValueError, match=r"`curves` must have shape"):
            metric(np.zeros(shape), ENDS)
    for value in (np.nan, np.inf, -np.inf):
        curves = random_curves(0, batch=(2,))
        curves[1, 0, 7] = value
        with pytest.raises(ValueError, match=r"curves\[1, 0, 7\]"):
            metric(curves, ENDS)


def test_a_missing_last_evaluation_of_the_last_task_is_refused():
    curves = random_curves(0)
    curves[-1, -1] = np.nan
    assert np.isfinite(metrics.min_accuracy(curves, ENDS))
    with pytest.raises(ValueError, match=r"worst_case_accuracy.*curves\[2, 11\]"):
        metrics.worst_case_accuracy(curves, ENDS)


@pytest.mark.parametrize(
    "metric", [metrics.windowed_forgetting, metrics.windowed_plasticity]
)
def test_wrong_windows_and_masks_are_refused(metric):
    curves = random_curves(0)
    for window in (1, 0, -3):
        with pytest.raises(ValueError, match="`window`"):
            metric(curves, window)
    with pytest.raises(TypeError, match="`window`"):
        metric(curves, 2.5)
    with pytest.raises(TypeError, match="`mask` must be boolean"):
        metric(curves, 2, mask=np.ones(LENGTH))
    with pytest.raises(ValueError, match="`mask` must broadcast"):
        metric(curves, 2, mask=np.ones(LENGTH + 1, bool))
    with pytest.raises(TypeError, match="known at trace time"):
        jax.jit(lambda m: metric(curves, 2, mask=m))(jnp.ones(LENGTH, bool))
    mask = np.ones(curves.shape, bool)
    mask[1] = False
    with pytest.raises(ValueError, match=r"task 1 .* of 3 has none"):
        metric(curves, 2, mask=mask)
    curves[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"curves\[0, 0\]"):
        metric(curves, 2)


def test_wrong_options_are_refused():
    curves = random_curves(0)
    with pytest.raises(ValueError, match="`target`"):
        metrics.stability_gap(curves, ENDS, target="start")
    for tolerance in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="`tolerance`"):
            metrics.stability_gap(curves, ENDS, tolerance=tolerance)
    with pytest.raises(ValueError, match="`windows`"):
        metrics.curve_summary(curves, ENDS, windows=())
    with pytest.raises(TypeError, match="`higher_is_better`"):
        metrics.stability_gap(curves, ENDS, higher_is_better=None)
    for length in (0, 2.0):
        with pytest.raises((TypeError, ValueError), match="`length`"):
            metrics.since_started([], length)
