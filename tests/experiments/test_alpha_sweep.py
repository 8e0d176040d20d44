"""The sweep against closed formulas and against Adam written out in float64."""

import numpy as np
import pytest

from experiments import claims, engine, run_folder
from experiments.progress import Progress
from experiments.studies import _sweep_cases as cases
from experiments.studies import _sweep_laws as laws
from experiments.studies import _sweep_program as program
from experiments.studies import _sweep_report as reporting
from experiments.studies import alpha_sweep

CONFIG = alpha_sweep.Config(seeds=2, steps=520, chunk_steps=260)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    with run_folder.locked(folder):
        run_folder.open_run(folder, "alpha_sweep", CONFIG)
        context = engine.Context(folder, Progress(stream=None))
        results = alpha_sweep.run(CONFIG, folder, context)
    run_folder.write_json(folder / "results.json", results)
    return folder, results


def part(results, name):
    return [case for case in results[1]["cases"] if case["part"] == name]


def test_lanes_cross_every_case_with_every_seed():
    lanes = cases.lanes(CONFIG)
    table = cases.cases(CONFIG)
    assert all(len(v) == 2 * len(table) for v in lanes.values())
    np.testing.assert_array_equal(lanes["seed"][:4], [0, 1, 0, 1])
    np.testing.assert_allclose(lanes["strength"][::2], [c["strength"] for c in table])


def test_axis_aligned_gain_is_the_naive_law(results):
    for case in part(results, "aligned"):
        want = 1 / (1 - case["strength"])
        np.testing.assert_allclose(case["gain"][0], want, rtol=1e-6)


def test_rotated_gain_is_the_refined_law_and_not_the_naive_one(results):
    worst = 0.0
    for case in part(results, "rotated"):
        a, s = case["strength"], case["measured_overlap"][0]
        assert abs(s - case["overlap"]) < 0.02
        np.testing.assert_allclose(
            case["gain"][0], (1 - a * (2 - a) * s) ** -0.5, rtol=0.08
        )
        worst = max(worst, 1 / (1 - a) / case["gain"][0] - 1)
    assert worst > 1.0


def test_distance_moved_by_each_routing(results):
    for case in part(results, "aligned"):
        a = case["strength"]
        want = {
            "vanilla": 1,
            "shared": 1,
            "decoupled (raw)": 1 - a,
            "decoupled (max)": 1 - a,
            "denominator only": 1 / (1 - a),
            "post": 1 - a,
        }
        got = dict(zip(results[1]["routings"], case["moved"][0], strict=True))
        assert got == pytest.approx(want, rel=1e-5)


def test_only_post_keeps_a_rotated_subspace_still(results):
    for case in part(results, "leak"):
        leak = dict(zip(results[1]["routings"], case["leak"][0], strict=True))
        assert leak["post"] < 1e-10
        for routing in ("shared", "decoupled (raw)", "decoupled (max)"):
            assert 0.01 < leak[routing] < leak["vanilla"]


def test_eps_and_switch_follow_their_formulas(results):
    for case in part(results, "eps"):
        x, a = case["ratio"], case["strength"]
        np.testing.assert_allclose(case["gain"][0], (1 + x) / (1 - a + x), rtol=0.03)
    for case in part(results, "switch"):
        a, q, t = case["strength"], case["q"], np.array(case["times"])
        old = CONFIG.b2**t
        law = (old * q + 1 - old) / (old * q + (1 - old) * (1 - a) ** 2)
        np.testing.assert_allclose(case["transient"][0], law**0.5, rtol=0.08)
        assert case["transient"][0][0] < 1 + 0.02 / (1 - a)  # nothing to see at first


def test_gain_equals_adam_written_out_in_float64():
    """One lane, its gradients replayed through the definition of R."""
    rng, a, s = np.random.default_rng(0), 0.5, 0.6
    basis = cases.rotated_bases(CONFIG)[0].astype(np.float64)
    dim, rank = basis.shape
    raw = shared = np.zeros(dim)
    gains = []
    for t in range(1, 2001):
        g = (s * dim / rank) ** 0.5 * basis @ rng.normal(size=rank)
        out = rng.normal(size=dim)
        g += ((1 - s) * dim / (dim - rank)) ** 0.5 * (out - basis @ (basis.T @ out))
        routed = g - a * basis @ (basis.T @ g)
        raw = CONFIG.b2 * raw + (1 - CONFIG.b2) * g**2
        shared = CONFIG.b2 * shared + (1 - CONFIG.b2) * routed**2
        if t > 500:
            upper = np.diag(basis.T @ np.diag(shared**-0.5) @ basis)
            gains.append(np.mean(upper / np.diag(basis.T @ np.diag(raw**-0.5) @ basis)))
    one = np.asarray(
        program.inflation(basis, np.sqrt(shared), np.sqrt(raw)), np.float64
    )
    np.testing.assert_allclose(one, gains[-1], rtol=1e-5)
    np.testing.assert_allclose(np.mean(gains), laws.refined_law(a, s), rtol=0.05)


def test_report_judges_every_claim(results):
    made = reporting.make_report(results[0])
    verdicts = [claim.verdict for claim in made.claims]
    assert len(claims.rows(made.claims)) == 11
    # All but the naive law on a rotated subspace.
    assert verdicts.count("not reproduced") == 1
    assert verdicts[1] == "not reproduced"
    assert len(made.tables) == 5 and len(made.figures) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 64}, "--rank 64 must be smaller than --dim 64"),
        ({"steps": 500}, "--steps 500 is too short for --b2 0.99"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        alpha_sweep.Config(**settings)
