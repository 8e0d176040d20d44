import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from experiments import claims, engine, lanes, run_folder
from experiments.studies import _regime_arms as arms
from experiments.studies import _regime_claim_parts as claim_parts
from experiments.studies import _regime_digits as digits
from experiments.studies import _regime_program as program
from experiments.studies import _regime_regression as regression
from experiments.studies import _regime_results as results
from experiments.studies import regime_map

TINY = regime_map.Config(
    seeds=2,
    tuning=1,
    steps=(3, 6),
    ranks=(2, 4),
    rates=(1e-3, 4e-3),
    digit_steps=3,
    digit_ranks=(3,),
    digit_rates=(3e-3,),
    side_arms="core",
    collect_batches=2,
    chunk_steps=2,
)


# -- seeds and rates -------------------------------------------------------------------


def test_at_least_twelve_fresh_seeds_are_reported():
    assert regime_map.Config().seeds >= 12


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fixed_rate": 0.1}, "--fixed-rate"),
        ({"digit_fixed_rate": 0.1}, "--digit-fixed-rate"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        regime_map.check(dataclasses.replace(TINY, **changes))


def test_rates_are_chosen_on_the_tuning_seeds_alone():
    finals = np.zeros([5, 2, 3])
    finals[:2] = [[3, 1, 2], [1, 2, 3]]
    finals[2:] = [[1, 3, 2], [3, 2, 1]]  # the reporting seeds say otherwise
    np.testing.assert_array_equal(results.tuned(finals, 2), [1, 0])


def test_full_grid_has_every_arm_at_every_length_and_rank():
    config = regime_map.Config()
    maps = [m for m in results.maps(config) if m.part == "regression"]
    assert [(m.steps, m.rank) for m in maps] == [
        (500, 8),
        (500, 32),
        (2500, 8),
        (2500, 32),
    ]
    assert all(m.arms == results.REGRESSION_ARMS for m in maps)
    for one in results.maps(config):
        assert set(one.arms) <= set(arms.ARMS)
        assert one.arms[0] == "vanilla"


# -- numbers ---------------------------------------------------------------------------


def test_ratio_and_its_error_by_hand():
    ours = np.array([[1.0, 4.0], [3.0, 4.0]])
    theirs = np.array([[2.0, 2.0], [6.0, 6.0]])
    value, error = results.ratio(ours, theirs)
    np.testing.assert_allclose(value, [0.5, 1.0])
    # Regime 0: ours is half of theirs on each seed, so the ratio has no error. Regime
    # 1: residuals 4 - 2 and 4 - 6 over the mean 4 are +-.5, with standard error .5.
    np.testing.assert_allclose(error, [0.0, 0.5], atol=1e-12)
    mean, mean_error = results.mean_ratio(ours, theirs)
    assert (mean, mean_error) == pytest.approx((0.75, 0.25))
    gap, gap_error = results.ratio_gap(ours, theirs, theirs)
    assert (gap, gap_error) == pytest.approx((-0.25, 0.25))


# -- regression ------------------------------------------------------------------------

SAMPLE = jax.jit(regression.BENCHMARK.sample, static_argnums=5)


@pytest.fixture(scope="module")
def problems():
    return regression.make_data((0, 1))


def regimes_with(agreement=None, overlap=None):
    return [
        i
        for i, name in enumerate(regression.REGIMES)
        if (agreement is None or name.split()[0] == agreement)
        and (overlap is None or float(name.split()[1]) == overlap)
    ]


def shared_subspace(data, seed):
    mixing = data.mixing[seed, 0, 0, : regression.SUBSPACE].astype(np.float64)
    return np.linalg.svd(mixing, full_matrices=False)[2]


@pytest.mark.parametrize("rho", regression.OVERLAPS)
def test_overlap_is_the_share_of_input_energy_that_tasks_share(problems, rho):
    shared = shared_subspace(problems, 1)
    for regime in regimes_with(overlap=rho):
        for task in range(regression.TASKS):
            mixing = problems.mixing[1, regime, task].astype(np.float64)
            inside = np.sum((mixing @ shared.T) ** 2)
            assert inside / np.sum(mixing**2) == pytest.approx(rho, abs=1e-6)
            batch = SAMPLE(problems, 1, regime, task, jax.random.key(task), 4000)
            x = np.asarray(batch["x"], np.float64)
            measured = np.sum((x @ shared.T) ** 2) / np.sum(x**2)
            assert measured == pytest.approx(rho, abs=0.02)


@pytest.mark.parametrize("name", list(regression.AGREEMENTS))
def test_agreement_is_the_cosine_of_targets_in_the_shared_subspace(problems, name):
    gamma = regression.AGREEMENTS[name]
    shared = shared_subspace(problems, 0)
    for regime in regimes_with(agreement=name):
        inside = problems.target[0, regime, :, :, 0] @ shared.T
        unit = inside / np.linalg.norm(inside, axis=1, keepdims=True)
        cosines = (unit @ unit.T)[np.triu_indices(regression.TASKS, 1)]
        np.testing.assert_allclose(cosines, gamma, atol=1e-5)


def test_subspaces_are_not_axis_aligned(problems):
    shared = shared_subspace(problems, 0)
    leverage = np.sum(shared**2, axis=0)
    assert np.all(leverage > 1e-3) and np.all(leverage < 0.9)


def test_joint_optimum_is_what_least_squares_finds(problems):
    best = regression.joint_optimum(problems)
    regime = regression.REGIMES.index("partial 0.5")
    mixing = problems.mixing[1, regime].astype(np.float64)
    target = problems.target[1, regime].astype(np.float64)
    rows = mixing.reshape(-1, regression.DIMENSION)
    values = (mixing @ target).reshape(-1)
    residual = rows @ np.linalg.lstsq(rows, values, rcond=None)[0] - values
    expected = 0.5 * np.sum(residual**2) / regression.TASKS
    assert best[1, regime] == pytest.approx(expected, rel=1e-9)


def test_reported_loss_is_the_expected_excess(problems):
    params = {"w": np.ones([regression.DIMENSION, 1], np.float32)}
    exact = jax.jit(regression.BENCHMARK.evaluate)(problems, 0, 4, params)["loss"]
    batch = SAMPLE(problems, 0, 4, 2, jax.random.key(0), 40000)
    sampled = jax.jit(regression.BENCHMARK.loss)(params, batch)
    excess = float(sampled) - regression.NOISE**2 / 2
    assert excess == pytest.approx(float(exact[2]), rel=0.03)


def test_curvature_is_the_hessian_and_not_the_residuals(problems):
    """With large residuals; the wrong form, observed labels, would be 7 times it."""
    regime = regression.REGIMES.index("conflict 0.5")
    params = {"w": 2 * jnp.ones([regression.DIMENSION, 1])}
    zero = jnp.int32(list(arms.RULES).index("balance"))
    tx = arms.optimizer("max", 6, zero, jnp.float32(1), jnp.float32(1e-3))
    count, size = 400, 16

    @jax.jit
    def after_the_task(batches):
        state = tx.init(params)
        statistics = optax_cl.collect(
            state,
            params,
            batches,
            task=regression.BENCHMARK.task,
            key=jax.random.key(2),
            stacked=True,
        )
        return optax_cl.end_task(state, params, statistics)

    batch = SAMPLE(problems, 0, regime, 0, jax.random.key(1), count * size)
    state = after_the_task(
        jax.tree.map(lambda x: np.reshape(x, (count, size, *x.shape[1:])), batch)
    )
    mixing = problems.mixing[0, regime, 0]
    basis = np.asarray(optax.tree.get(state, "basis")["w"])
    exact = np.sum((mixing @ basis) ** 2, axis=0)
    measured = np.asarray(optax.tree.get(state, "curvature")["w"])[:, 0]
    np.testing.assert_allclose(measured, exact, rtol=5 * np.sqrt(2 / count))


# -- digits ----------------------------------------------------------------------------


def test_rotation_keeps_and_turns_images():
    image = np.arange(64.0).reshape(8, 8)
    turned = (digits.rotation(90.0) @ image.ravel()).reshape(8, 8)
    assert any(np.allclose(turned, np.rot90(image, k)) for k in (1, 3))
    np.testing.assert_allclose(digits.rotation(0.0), np.eye(64), atol=1e-12)


def test_streams_are_what_they_say():
    data = digits.make_data((3,))
    images, labels = data.images[0], data.labels[0]
    assert np.all(images[..., -1] == 1)  # the folded bias
    perm, rot, near, swap = range(4)
    pixels = np.sort(images[perm], axis=-1)
    for task in range(1, digits.TASKS):
        np.testing.assert_array_equal(pixels[task], pixels[0])
        assert not np.array_equal(images[perm, task], images[perm, 0])
        np.testing.assert_array_equal(images[swap, task], images[swap, 0])
    for stream in (perm, rot, near):
        assert np.all(labels[stream] == labels[stream, :1])
    # Two classes trade names in each task of swap, the others keep theirs.
    for task in range(digits.TASKS):
        changed = labels[swap, task] != labels[perm, 0]
        assert len(set(labels[perm, 0][changed])) == 2
        assert set(labels[swap, task][changed]) == set(labels[perm, 0][changed])
    dead = np.all(images[swap, 0] == 0, axis=0)
    assert dead.sum() >= 3  # what makes a raw second moment unsafe


def test_tempered_curvature_is_that_of_softened_probabilities():
    random = np.random.default_rng(0)
    params = {
        name: jnp.asarray(random.normal(size=[a, b]) * 3 / np.sqrt(a), jnp.float32)
        for name, a, b in zip(
            ("in", "middle", "out"), digits.SIZES[:-1], digits.SIZES[1:], strict=True
        )
    }
    x = jnp.asarray(random.uniform(size=[1, 65]), jnp.float32)
    task = digits.BENCHMARK.task

    @jax.jit
    def both(t):
        batch = {"x": x, "y": jnp.zeros([1], int), "temperature": t[None]}
        p = jax.nn.softmax(digits.logits(params, x)[0] / t)
        jacobian = jax.jacobian(lambda w: digits.logits(w, x)[0])(params)["out"]
        centred = jnp.diag(p) - jnp.outer(p, p)
        expected = jnp.einsum("cio,cd,dio->io", jacobian, centred, jacobian)

        def score(label):
            labels = label[None]
            return jax.grad(lambda w: task.log_prob(w, batch, labels)[0])(params)

        scores = jax.vmap(score)(jnp.arange(10))["out"]
        return jnp.einsum("k,kio->io", p, scores**2), expected

    for t in (1.0, 4.0):
        fisher, expected = both(jnp.float32(t))
        np.testing.assert_allclose(fisher, expected, rtol=1e-3, atol=1e-6)


# -- programs --------------------------------------------------------------------------


def one_lane(arm):
    return jax.tree.map(lambda x: jnp.asarray(x[0]), program.make_lanes([arm], (0,)))


def test_lanes_are_all_pairs_of_arm_and_seed():
    chosen = [arms.ARMS[n] for n in ("vanilla", "balance 3", "balance 1, T=4")]
    lanes = program.make_lanes(chosen, (7, 1000))
    assert {x.shape for x in jax.tree.leaves(lanes)} == {(6,)}
    np.testing.assert_array_equal(lanes.seed, [7, 1000] * 3)
    np.testing.assert_array_equal(lanes.problem, [0, 1] * 3)
    np.testing.assert_array_equal(lanes.strength, [0, 0, 3, 3, 1, 1])
    np.testing.assert_array_equal(lanes.temperature, [1, 1, 1, 1, 4, 4])


@pytest.mark.parametrize("rule", list(arms.RULES))
def test_choice_is_the_rule_that_it_picks(rule):
    random = np.random.default_rng(0)
    coeffs, displacement, mean = (
        {"w": jnp.asarray(random.normal(size=[3, 2]), jnp.float32)} for _ in range(3)
    )
    context = optax_cl.Context(
        raw=coeffs,
        displacement=displacement,
        curvature=jax.tree.map(jnp.abs, mean),
        mean=mean,
        overlap={"w": jnp.float32(0.7)},
    )
    rules = tuple(make(0.4) for make in arms.RULES.values())
    index = list(arms.RULES).index(rule)
    picked, plain = arms.choice(jnp.int32(index), rules), rules[index]
    assert plain.needs <= picked.needs
    states = picked.init(coeffs)
    new, states = picked.apply(coeffs, context, states)
    expected, state = plain.apply(coeffs, context, plain.init(coeffs))
    np.testing.assert_allclose(new["w"], expected["w"], rtol=1e-6)
    assert not np.allclose(new["w"], coeffs["w"])
    jax.tree.map(np.testing.assert_allclose, states[index], state)


def test_vanilla_through_the_engine_is_plain_adam(tmp_path):
    settings = program.Settings((1e-3, 4e-3), 4, 3, 2)
    bench = regression.BENCHMARK._replace(tasks=2, regimes=regression.REGIMES[:1])
    data = jax.tree.map(jnp.asarray, regression.make_data((0,)))
    chosen = [arms.ARMS[n] for n in ("vanilla", "max 0.9")]
    out = engine.run_program(
        program.make_program("tiny", bench, "max", settings),
        data,
        program.make_lanes(chosen, (0,)),
        chunk_steps=4,
        folder=tmp_path,
    )
    # Lanes, boundaries, regimes, rates, tasks of the data.
    assert out["evaluate/loss"].shape == (2, 3, 1, 2, regression.TASKS)
    assert out["boundary/overlap"].shape == (2, 2, 1, 2)
    adam = optax.adam(4e-3, b2=arms.B2)
    lane = one_lane(chosen[0])

    @jax.jit
    def step(w, state, task, index):
        key = lanes.key(lane.seed, lanes.BATCH, task, index)
        batch = bench.sample(data, 0, 0, task, key, bench.batch)
        updates, state = adam.update(jax.grad(bench.loss)(w, batch), state, w)
        return optax.apply_updates(w, updates), state

    evaluate = jax.jit(bench.evaluate)
    w = bench.init(jax.random.key(0))
    state = adam.init(w)
    for task in range(2):
        for index in range(4):
            w, state = step(w, state, jnp.int32(task), jnp.int32(index))
        expected = evaluate(data, 0, 0, w)["loss"]
        measured = out["evaluate/loss"][0, task + 1, 0, 1]
        np.testing.assert_allclose(measured, expected, rtol=1e-5)
    ours, theirs = out["evaluate/loss"][:, -1, 0, 1]
    assert not np.allclose(ours, theirs, rtol=1e-4)  # .9 is not nothing


def fake_run(config, folder):
    """A folder as a run leaves it, with random numbers in place of training."""
    run_folder.open_run(folder, "regime_map", config)
    random = np.random.default_rng(0)
    count = config.seeds + config.tuning
    for one in results.maps(config):
        for routing, members in results.by_routing(one).items():
            lanes = len(members) * count
            inner = len(one.regimes), len(one.rates)
            losses = random.uniform(
                0.1, 1.0, size=(lanes, one.tasks + 1, *inner, one.tasks)
            )
            if routing == "raw":
                losses[:, -1, 0] = np.nan
            arrays = {
                f"evaluate/{one.measure}": losses,
                "boundary/overlap": random.uniform(size=(lanes, one.tasks, *inner)),
                "boundary/largest_step": np.ones((lanes, one.tasks, *inner)),
            }
            path = folder / "raw" / f"{one.name}-{routing}.npz"
            run_folder.save_arrays(path, arrays)


def test_report_of_all_maps_names_every_arm_and_claim(tmp_path):
    config = dataclasses.replace(TINY, digit_ranks=(3, 1))
    fake_run(config, tmp_path)
    summary = regime_map.reporting.summarize(tmp_path, config)
    assert list(summary) == [one.name for one in results.maps(config)]
    found = summary["regression-3x2"]["matched"]
    assert set(found) == set(results.REGRESSION_ARMS)
    for arm in found.values():
        assert arm["final"].shape == (config.seeds, len(regression.REGIMES))
        assert set(arm["rates"]) <= set(config.rates)
    run_folder.write_json(tmp_path / "results.json", summary)
    content = regime_map.report(tmp_path)
    claims.check(content.claims)
    names = {figure.name for figure in content.figures}
    for one in results.maps(config):
        assert f"{one.name}-matched" in names
    assert {"regression-settings", "digits-settings"} <= names
    settings = [t for t in content.tables if t.name == "digits-settings"]
    ranks = [name.split(", ")[0] for name in settings[0].columns[1::2]]
    assert ranks == 2 * ["3 x 1", "3 x 3"]  # by size, whichever comes first
    text = "".join(map(str, content.tables))
    assert all(name in text for name in results.DIGIT_ARMS)


def test_a_loss_that_is_no_number_counts_as_a_bad_one(tmp_path):
    fake_run(TINY, tmp_path)
    *_, last = results.load(tmp_path, TINY)
    raw = last.fixed["raw 0.5"].final
    assert np.all(raw[:, 0] == results.CEILING)
    assert np.all(raw[:, 1:] < results.CEILING)


@pytest.mark.slow
def test_a_tiny_map_runs_from_end_to_end(tmp_path):
    run_folder.open_run(tmp_path, "regime_map", TINY)
    context = engine.Context(tmp_path, engine.Progress(stream=None))
    summary = regime_map.run(TINY, tmp_path, context)
    run_folder.write_json(tmp_path / "results.json", summary)
    for found in summary.values():
        for arm in found["matched"].values():
            assert np.all(np.isfinite(arm["final"]))
    claims.check(regime_map.report(tmp_path).claims)


def test_the_first_task_is_the_same_in_every_routing():
    """Nothing is protected yet, so that differences come from later tasks alone."""
    settings = program.Settings((3e-3,), 3, 3, 2)
    bench = regression.BENCHMARK._replace(regimes=regression.REGIMES[:1])
    data = regression.make_data((0,))
    ends = []
    for routing in arms.ROUTINGS:
        made = program.make_program("one", bench, routing, settings)
        chosen = [a for a in arms.ARMS.values() if a.routing == routing][-1]
        lane = one_lane(chosen)

        def train(data, lane, made=made):
            return jax.lax.scan(
                lambda carry, i: made.step(data, lane, carry, jnp.int32(0), i),
                made.init(data, lane),
                jnp.arange(3, dtype=jnp.int32),
            )[0]

        ends.append(jax.jit(train)(data, lane).learners.params["w"])
    assert np.all(np.abs(ends[0]) > 0)
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], rtol=1e-4, atol=1e-6)


def test_every_claim_has_a_verdict_and_the_worst_regime_counts():
    one = results.maps(TINY)[0]
    count = len(one.regimes)
    base = np.full([4, count], 2.0) + np.arange(4)[:, None] * 0.1
    worse = base.copy()
    worse[:, 3] += 0.5 + 0.01 * np.arange(4)
    made = {
        name: results.ArmResults(final, base, base, np.ones(count), base, base)
        for name, final in (("vanilla", base), ("balance 1", worse))
    }
    loaded = results.MapResults(one, made, made, base, base)
    claim = claim_parts.never_worse(loaded, "balance 1")
    assert claim.verdict == "not reproduced"
    assert claim.measured == pytest.approx(0.515)
    assert one.regimes[3] in claim.note
