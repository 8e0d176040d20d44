"""The domain stream: pairing, memory, measures, verdicts, and a run from end to end."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, data, engine, run_folder
from experiments.models import byte_lm
from experiments.studies import _stream_arms as arms
from experiments.studies import _stream_claims as claims
from experiments.studies import _stream_program as program
from experiments.studies import _stream_results as measured
from experiments.studies import domain_stream as study

TINY = byte_lm.ByteLMConfig(layers=1, width=8, heads=1, hidden=8, context=8)
TASKS, STEPS, BATCH, MEMORY = 3, 5, 4, 6
SETTINGS = program.Settings(
    model=TINY,
    common=program.Common(b2=0.99, rank=2),
    tasks=TASKS,
    steps=STEPS,
    batch=BATCH,
    memory=MEMORY,
    collect_batches=2,
)


def alphabet(letters, seed):
    """A text whose letters say which domain it is."""
    drawn = np.random.default_rng(seed).integers(0, len(letters), 12_000)
    return bytes(letters[i] for i in drawn)


TEXTS = {
    "digits": b"0123456789",
    "lower": b"abcdefgh ",
    "upper": b"ABCDEFGH ",
    "x": b"xyz",
}


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for seed, (name, letters) in enumerate(TEXTS.items()):
        (folder / f"{name}.txt").write_bytes(alphabet(letters, seed))
    return data.load_stream(folder)


@pytest.fixture(scope="module")
def arrays(stream):
    return program.make_data(stream, TINY.context, windows=8, probe_windows=3)


def lanes(*numbers, order=(2, 0, 3), seed=7, rate=1e-2):
    """One lane per strength."""
    rows = [
        program.Lane(
            seed=np.int32(seed),
            order=np.array(order, np.int32),
            learning_rate=np.float32(rate),
            strength=np.float32(number),
            joint=np.bool_(False),
            digest=np.uint32(0),
        )
        for number in numbers
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


@pytest.fixture(scope="module")
def raw(arrays, tmp_path_factory):
    """The raw results of three families on one seed."""
    folder = tmp_path_factory.mktemp("run")

    def run(family, *numbers):
        return engine.run_program(
            program.make_program(arms.FAMILIES[family], SETTINGS),
            arrays,
            lanes(*numbers),
            chunk_steps=STEPS,
            folder=folder,
        )

    return {
        "plain": run("plain", 0.0),
        "constant-shared": run("constant-shared", 0.0, 1.0),
        "replay-max": run("replay-max", 0.5),
    }


# The program.


def test_arms_of_one_seed_see_the_same_batches_and_weights(raw):
    # Before the first boundary no method has anything to protect or to replay, so all
    # arms must be the same run; a batch that depended on the arm would show here.
    want = raw["plain"]["step/loss"][0, 0]
    for family in ("constant-shared", "replay-max"):
        np.testing.assert_allclose(raw[family]["step/loss"][0, 0], want, rtol=1e-5)


def test_strength_zero_is_vanilla_and_full_strength_is_not(raw):
    want = raw["plain"]["evaluate/loss"][0]
    zero, full = raw["constant-shared"]["evaluate/loss"]
    np.testing.assert_allclose(zero, want, rtol=1e-4)
    assert np.abs(full - want)[-1].max() > 1e-3


def test_replay_changes_what_follows_the_first_domain(raw):
    want = raw["plain"]["evaluate/loss"][0]
    replayed = raw["replay-max"]["evaluate/loss"][0]
    np.testing.assert_allclose(replayed[:2], want[:2], rtol=1e-4)
    assert np.abs(replayed - want)[-1].max() > 1e-3


def test_meters_are_read_after_every_step(raw):
    results = raw["constant-shared"]
    for name in arms.FAMILIES["constant-shared"].meters:
        assert results[f"step/{name}"].shape == (2, TASKS, STEPS)
    np.testing.assert_array_equal(results["step/overlap"][:, 0], 0.0)
    assert results["step/overlap"][:, 1:].min() > 0.0
    np.testing.assert_allclose(
        results["step/strength"][:, 1:],
        [[[0.0]], [[1.0]]] * np.ones([2, TASKS - 1, STEPS]),
        atol=1e-5,
    )


def test_columns_of_the_matrix_are_the_domains_in_the_order_of_the_lane(arrays):
    functions = program.make_program(arms.FAMILIES["plain"], SETTINGS)
    ordered = [
        jax.tree.map(lambda x: x[0], lanes(0.0, order=o))
        for o in [(2, 0, 3), (3, 2, 0)]
    ]
    carry = jax.jit(functions.init)(arrays, ordered[0])
    evaluate = jax.jit(functions.evaluate)
    first, second = (evaluate(arrays, lane, carry)["loss"] for lane in ordered)
    np.testing.assert_allclose(second, np.asarray(first)[[2, 0, 1]], rtol=1e-6)


def test_the_buffer_keeps_windows_of_finished_domains_alone(arrays):
    functions = program.make_program(arms.FAMILIES["replay-max"], SETTINGS)
    lane = jax.tree.map(lambda x: x[0], lanes(0.5))
    carry, boundary = jax.jit(functions.init)(arrays, lane), jax.jit(functions.boundary)
    for task in range(2):
        carry, _ = boundary(arrays, lane, carry, jnp.int32(task))
    items = np.asarray(carry.buffer.items)
    assert items.shape == (TASKS * MEMORY, TINY.context + 1)
    assert int(carry.buffer.seen) == 2 * MEMORY
    letters = [set(TEXTS[name]) for name in ("upper", "digits")]
    assert set(items[:MEMORY].ravel()) <= letters[0]
    assert set(items[MEMORY : 2 * MEMORY].ravel()) <= letters[1]
    np.testing.assert_array_equal(items[2 * MEMORY :], 0)


@functools.partial(jax.jit, static_argnums=0)
def first_boundary(functions, arrays, lane):
    """The carry after the first boundary, from untrained weights."""
    carry = functions.init(arrays, lane)
    return functions.boundary(arrays, lane, carry, jnp.int32(0))[0]


def test_joint_training_draws_from_all_domains_of_the_order_and_no_other(arrays):
    functions = program.make_program(
        arms.FAMILIES["replay-max"], SETTINGS._replace(memory=200)
    )
    lane = jax.tree.map(lambda x: x[0], lanes(0.5))._replace(joint=np.bool_(True))
    carry = first_boundary(functions, arrays, lane)
    drawn = set(np.asarray(carry.buffer.items[:200]).ravel().tolist())
    assert drawn == set(TEXTS["upper"] + TEXTS["digits"] + TEXTS["x"])


def test_windows_never_reach_behind_the_end_of_a_short_domain(stream):
    short = stream._replace(train=(stream.train[0][:30], *stream.train[1:]))
    arrays = program.make_data(short, TINY.context, 8, 3)
    functions = program.make_program(
        arms.FAMILIES["replay-max"], SETTINGS._replace(memory=500)
    )
    lane = jax.tree.map(lambda x: x[0], lanes(0.5, order=(0, 1, 2)))
    carry = first_boundary(functions, arrays, lane)
    drawn = np.asarray(carry.buffer.items[:500])
    assert 0 not in drawn, "a zero byte is padding behind the end"
    assert (drawn == short.train[0][-1]).any(), "the last byte must be reachable"


def test_held_out_windows_come_from_the_held_out_part(arrays, stream):
    for windows, text in zip(arrays.heldout, stream.heldout, strict=True):
        whole = text.tobytes()
        assert all(window.tobytes() in whole for window in windows)
        assert windows[0].tobytes() == whole[: TINY.context + 1]
        assert windows[-1].tobytes() == whole[-TINY.context - 1 :]


def test_the_digest_tells_one_text_from_another(arrays):
    other = arrays._replace(train=arrays.train ^ np.uint8(1))
    assert program.digest(arrays) != program.digest(other)


# The config.


def test_reporting_seeds_and_tuning_seeds_are_disjoint():
    for quick in (False, True):
        config = cli.make_config(study.Config, quick=quick, given={})
        seeds = range(config.first_seed, config.first_seed + config.seeds)
        assert not set(seeds) & set(study.TUNING_SEEDS)
    with pytest.raises(ValueError, match="kept for tuning"):
        study.check(study.Config(first_seed=999_999, seeds=2))


def test_orders_derive_from_the_seed_alone():
    five = study.orders(study.Config(seeds=5), 8)
    np.testing.assert_array_equal(np.sort(five, axis=1), np.tile(np.arange(8), (5, 1)))
    assert len({tuple(row) for row in five}) == 5
    later = study.orders(study.Config(first_seed=3, seeds=2, domains=4), 8)
    np.testing.assert_array_equal(later, five[3:, :4])
    assert study.orders(study.Config(domains=9), 8).shape == (5, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("vanila",)}, "knows no 'vanila'; did you mean 'vanilla'"),
        ({"domains": 1}, "`--domains` must be 0 or at least 2"),
        ({"stream": "nowhere"}, "There is no stream 'nowhere'"),
        ({"rank": 33}, "`--rank` 33 is larger than 32"),
    ],
)
def test_settings_that_cannot_run_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        study.check(study.Config(**change))


def test_a_domain_too_short_for_the_context_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_bytes(alphabet(b"abc", 0)[:10_000])
    with pytest.raises(ValueError, match="too short for a context of 1024"):
        study.check(study.Config(stream=str(tmp_path), size="full"))


def test_groups_of_arms_hold_known_arms_and_every_arm_has_its_family():
    assert len(arms.QUICK) == 5
    for group in (arms.CORE, arms.QUICK):
        assert len(set(group)) == len(group)
        assert set(group) <= set(arms.ARMS)
    assert {arm.family for arm in arms.ARMS.values()} == set(arms.FAMILIES)
    assert study.chosen_arms(("joint",))[0].name == "vanilla"
    assert len(study.chosen_arms(("all",))) == len(arms.ARMS)


@pytest.mark.parametrize("name", sorted(arms.FAMILIES))
def test_every_family_builds_with_traced_numbers_and_keeps_its_state(name, arrays):
    family = arms.FAMILIES[name]
    functions = program.make_program(family, SETTINGS)
    lane = jax.tree.map(lambda x: x[0], lanes(0.5))

    def once(arrays, lane):
        carry = functions.init(arrays, lane)
        stepped, recorded = functions.step(
            arrays, lane, carry, jnp.int32(1), jnp.int32(0)
        )
        after, _ = functions.boundary(arrays, lane, stepped, jnp.int32(0))
        return carry, stepped, after, recorded

    carry, stepped, after, recorded = jax.eval_shape(once, arrays, lane)
    shapes = [
        jax.tree.map(lambda x: (x.shape, x.dtype), c) for c in (carry, stepped, after)
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    assert set(recorded) == {"loss", "first_domain", *family.meters}


def test_the_full_size_traces_without_being_allocated(stream):
    size = study.SIZES["full"]
    settings = study._settings(study.Config(size="full", domains=3), stream, 3)
    assert settings.model == byte_lm.FULL
    arrays = program.make_data(stream, size.model.context, 256, 16)
    assert arrays.heldout.shape[1:] == (1, 1025), "no more windows than fit"
    functions = program.make_program(arms.FAMILIES["constant-max"], settings)
    lane = jax.tree.map(lambda x: x[0], lanes(0.5))

    def once(arrays, lane):
        carry = functions.init(arrays, lane)
        return functions.step(arrays, lane, carry, jnp.int32(1), jnp.int32(0))

    carry, recorded = jax.eval_shape(once, arrays, lane)
    assert sum(p.size for p in jax.tree.leaves(carry.params)) > 8.5e7
    assert recorded["loss"].shape == ()


# The measures, on numbers made by hand.


def results_of(name, forgetting=0.5, learning=2.0):
    """An arm on three seeds and two domains.

    With one old domain, forgetting is [2, 0] - [1, 0] and learning is the mean of
    [1, 0] and [2, 1], so that the final loss is learning + forgetting / 2.
    """
    matrix = np.zeros([3, 3, 2])
    matrix[:, 1, 0] = 1.0 + np.array([0.0, 0.1, 0.2])
    matrix[:, 2, 0] = matrix[:, 1, 0] + forgetting
    matrix[:, 2, 1] = 2 * learning - matrix[:, 1, 0]
    curves = {"first_domain": np.zeros([3, 4])}
    return measured.ArmResults(arms.ARMS[name], matrix, curves)


def test_measures_read_the_matrix_as_they_say():
    r = results_of("vanilla", forgetting=0.5, learning=2.0)
    np.testing.assert_allclose(r.forgetting, 0.5)
    np.testing.assert_allclose(r.learning, 2.0)
    np.testing.assert_allclose(r.final, 2.25)
    np.testing.assert_allclose(r.perplexity.matrix[:, 2, 0], np.exp(r.matrix[:, 2, 0]))


def test_the_stability_gap_is_what_comes_back_and_not_what_stays_lost():
    # First switch: 1 at the switch, peak 4, end 2: 4 - 2. Second: end 2, peak 2.5,
    # down to 1: 2.5 - 2. Third: the loss only rises: nothing comes back.
    curve = [[3.0, 1.0, 4.0, 2.0, 2.5, 1.0, 2.0, 3.0]]
    matrix = np.zeros([1, 5, 4])
    r = measured.ArmResults(
        arms.ARMS["vanilla"], matrix, {"first_domain": np.array(curve)}
    )
    np.testing.assert_allclose(r.stability_gap, (2.0 + 0.5 + 0.0) / 3)


def test_meters_leave_out_the_first_domain():
    curves = {"overlap": np.array([[9.0, 9.0, 1.0, 3.0, 4.0, 6.0]])}
    r = measured.ArmResults(arms.ARMS["shared-0.5"], np.zeros([1, 4, 3]), curves)
    assert r.meter("overlap") == 3.5
    assert r.settled("overlap") == 5.0
    assert r.meter("leak") is None


def with_learning_rates(learning):
    """Vanilla at four rates, and an arm with a given learning loss."""
    rates = {
        "vanilla": (0.5, 2.0),
        "vanilla-lr*0.5": (0.3, 2.2),
        "vanilla-lr*0.25": (0.1, 2.6),
        "vanilla-lr*2.0": (9.0, 1.0),
    }
    results = {name: results_of(name, *numbers) for name, numbers in rates.items()}
    return results | {"max-0.5": results_of("max-0.5", 0.0, learning)}


@pytest.mark.parametrize(
    ("learning", "final"),
    [
        (2.0, 2.25),  # vanilla itself
        (2.2, 2.35),  # at half the rate
        (2.3, 0.75 * 2.35 + 0.25 * 2.65),  # a quarter of the way to the next
        (1.5, 2.25),  # learns better than vanilla: vanilla; a higher rate is no option
        (9.0, 2.65),  # learns worse than at the lowest rate: the lowest rate
    ],
)
def test_the_learning_rate_control_is_vanilla_at_the_learning_loss_of_the_arm(
    learning, final
):
    results = with_learning_rates(learning)
    difference = measured.learning_rate_matched(results, "max-0.5")
    np.testing.assert_allclose(difference, learning - final, atol=1e-12)


def test_the_learning_rate_control_needs_another_rate():
    results = with_learning_rates(2.0)
    assert measured.has_learning_rates(results)
    assert not measured.has_learning_rates({"vanilla": results["vanilla"]})


def test_an_arm_that_diverged_is_set_apart_and_a_diverged_vanilla_is_an_error():
    results = with_learning_rates(2.0)
    results["max-0.5"].matrix[1, 2, 0] = np.nan
    sound, diverged = measured.split_diverged(results)
    assert list(diverged) == ["max-0.5"]
    assert diverged["max-0.5"].diverged == 1
    assert len(sound) == len(results) - 1
    results["vanilla"].matrix[0, 1, 1] = np.inf
    with pytest.raises(run_folder.RunError, match="lower --learning-rate"):
        measured.split_diverged(results)


# The verdicts.


def verdicts(**forgetting):
    """Verdicts by the claim's first words, for arms with given forgetting."""
    results = {"vanilla": results_of("vanilla")}
    for name, value in forgetting.items():
        name = name.replace("__", "-")
        r = results_of(name, value)
        ones = np.ones([3, 4])
        r.curves.update(gain_inflation=2.0 * ones, overlap=ones)
        results[name] = r
    return {row.claim: row for row in claims.claims(results)}


def verdict(rows, start):
    (row,) = (row for words, row in rows.items() if words.startswith(start))
    return row.verdict


def known(**values):
    table = {
        "shared": "shared-0.5",
        "raw": "raw-0.5",
        "adaptive": "one_minus-raw",
        "replay": "replay-shared",
    }
    return verdicts(**{table[k]: v for k, v in values.items()})


def test_claims_hold_on_the_published_pattern_and_fall_on_the_opposite():
    published = known(shared=0.48, raw=0.55, adaptive=0.35, replay=0.44)
    opposite = known(shared=0.3, raw=0.4, adaptive=0.49, replay=0.1)
    starts = [
        "Under shared routing",
        "Decoupling at a fixed strength",
        "Decoupling with the overlap-aware",
        "That replay buffer still",
        "Adaptive decoupled routing is the only",
    ]
    assert [verdict(published, s) for s in starts] == ["reproduced"] * 5
    assert [verdict(opposite, s) for s in starts] == ["not reproduced"] * 5


def test_the_gain_law_is_judged_by_its_own_tolerance():
    rows = known(shared=0.48)
    assert verdict(rows, "Projection inflates") == "reproduced"  # R = 2 at a = .5
    results = {
        "vanilla": results_of("vanilla"),
        "shared-0.5": results_of("shared-0.5"),
    }
    ones = np.ones([3, 4])
    results["shared-0.5"].curves.update(gain_inflation=1.8 * ones, overlap=ones)
    row = {r.claim: r for r in claims.claims(results)}
    assert verdict(row, "Projection inflates") == "not reproduced"


def test_claims_whose_arms_did_not_run_say_which():
    rows = known(shared=0.48)
    row = rows["Decoupling at a fixed strength forgets more than vanilla."]
    assert (row.verdict, row.note) == ("not testable here", "not run: raw-0.5")


def test_few_seeds_are_marked_in_every_measured_row():
    rows = known(shared=0.48, raw=0.55).values()
    for row in rows:
        assert ("only 3 seeds" in row.note) == (row.measured is not None)


# From end to end.


@pytest.fixture
def tiny_size(monkeypatch):
    size = study.Size(TINY, batch=4, steps=STEPS, learning_rate=1e-2, b2=0.99, rank=2)
    monkeypatch.setitem(study.SIZES, "small", size)
    monkeypatch.setattr(study, "_COLLECT_BATCHES", 2)


def test_a_run_on_a_folder_of_texts_gives_tables_figures_and_results(
    tiny_size, tmp_path, capsys
):
    texts = tmp_path / "texts"
    texts.mkdir()
    for seed, (name, letters) in enumerate(TEXTS.items()):
        (texts / f"{name}.txt").write_bytes(alphabet(letters, seed))
    out = tmp_path / "run"
    line = f"run domain_stream --quick --stream {texts} --domains 3 --out {out}"
    line += " --arms vanilla-lr*0.5,shared-0.5,joint"
    assert cli.main(line.split()) == 0
    printed = capsys.readouterr().out
    assert "| digits | 0.00 | 1.00 |" in printed, "the divergences are printed"
    assert "second_moment" in printed
    results = json.loads((out / "results.json").read_text())
    assert list(results) == sorted(["vanilla", "vanilla-lr*0.5", "shared-0.5", "joint"])
    assert results["shared-0.5"]["second_moment"] == "routed"
    assert len(results["shared-0.5"]["forgetting"]) == 2
    assert results["joint"]["forgetting"] is None
    for name in ("losses", "perplexities", "meters", "divergences", "claims"):
        assert (out / "tables" / f"{name}.md").is_file()
    for name in ("trade", "differences", "first_domain", "traces"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 5_000
    assert str(tmp_path) not in (out / "results.json").read_text()


def test_another_text_in_the_folder_does_not_continue_the_run(tmp_path, arrays):
    config = study.Config(seeds=2)
    order = study.orders(config, 4)
    before = study._lanes(config, [arms.ARMS["vanilla"]], order, arrays)
    other = arrays._replace(heldout=arrays.heldout[:, ::-1])
    after = study._lanes(config, [arms.ARMS["vanilla"]], order, other)
    assert (before.digest != after.digest).all()
