"""The domain stream: pairing, memory, settings, and a run from end to end."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, data, engine
from experiments.models import byte_lm
from experiments.studies import _stream_arms as arms
from experiments.studies import _stream_program as program
from experiments.studies import domain_stream as study
from tests.experiments import tiny_stream as tiny

TINY, TASKS, STEPS, MEMORY = tiny.TINY, tiny.TASKS, tiny.STEPS, tiny.MEMORY
SETTINGS, TEXTS, alphabet = tiny.SETTINGS, tiny.TEXTS, tiny.alphabet
WINDOWS, PROBE_WINDOWS = 8, 3


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """Lets the runs of this file, which have one size, share what they compile."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((program, "make_program"), (engine, "_compile")):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    return data.load_stream(tiny.write_texts(tmp_path_factory.mktemp("texts")))


@pytest.fixture(scope="module")
def arrays(stream):
    return program.make_data(stream, TINY.context, WINDOWS, PROBE_WINDOWS)


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


@jax.jit
def drawn_for_the_buffer(arrays, lane):
    """Many windows, which the first boundary drew."""
    functions = program.make_program(
        arms.FAMILIES["replay-max"], SETTINGS._replace(memory=500)
    )
    carry = functions.init(arrays, lane)
    carry, _ = functions.boundary(arrays, lane, carry, jnp.int32(0))
    return carry.buffer.items[:500]


def test_joint_training_draws_from_all_domains_of_the_order_and_no_other(arrays):
    lane = jax.tree.map(lambda x: x[0], lanes(0.5))._replace(joint=np.bool_(True))
    drawn = set(drawn_for_the_buffer(arrays, lane).ravel().tolist())
    assert drawn == set(TEXTS["upper"] + TEXTS["digits"] + TEXTS["x"])


def test_windows_never_reach_behind_the_end_of_a_short_domain(stream):
    short = stream._replace(train=(stream.train[0][:30], *stream.train[1:]))
    arrays = program.make_data(short, TINY.context, WINDOWS, PROBE_WINDOWS)
    lane = jax.tree.map(lambda x: x[0], lanes(0.5, order=(0, 1, 2)))
    drawn = np.asarray(drawn_for_the_buffer(arrays, lane))
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
        ({"arms": ("vanila",)}, "knows no 'vanila'; did you mean vanilla"),
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


@functools.cache
def jitted_model(config, build=byte_lm.byte_lm):
    model = build(config)
    return model._replace(apply=jax.jit(model.apply))


@pytest.fixture
def model_traced_once(monkeypatch):
    """Traces the model, which is the same in all families, for the first one alone."""
    monkeypatch.setattr(byte_lm, "byte_lm", jitted_model)
    # The programs of the other tests are left with the model as it is.
    monkeypatch.setattr(program, "make_program", program.make_program.__wrapped__)


def case(name):
    """A family; each rule in one routing is quick, and the constant one in them all."""
    rule, _, routing = name.partition("-")
    doubles = rule in arms.RULES and routing != "max"
    return pytest.param(name, marks=[pytest.mark.slow] if doubles else [])


@pytest.mark.parametrize("name", [case(name) for name in sorted(arms.FAMILIES)])
@pytest.mark.usefixtures("model_traced_once")
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


# From end to end.


@pytest.fixture
def tiny_size(monkeypatch):
    monkeypatch.setitem(study.SIZES, "small", tiny.SIZE)
    monkeypatch.setattr(study, "_COLLECT_BATCHES", SETTINGS.collect_batches)
    monkeypatch.setattr(study, "_CHUNKS_PER_TASK", 1)
    monkeypatch.setattr(study, "_EVALUATED_WINDOWS", WINDOWS)
    monkeypatch.setattr(study, "_PROBE_WINDOWS", PROBE_WINDOWS)


def test_a_run_on_a_folder_of_texts_gives_tables_figures_and_results(
    tiny_size, tmp_path, capsys
):
    texts = tiny.write_texts(tmp_path / "texts")
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


def test_seeds_and_orders_are_written_before_the_first_step(
    tiny_size, tmp_path, monkeypatch, capsys
):
    def no_step(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "run_program", no_step)
    texts, out = tiny.write_texts(tmp_path / "texts"), tmp_path / "run"
    line = f"run domain_stream --stream {texts} --seeds 3 --first-seed 5 --out {out}"
    assert cli.main(line.split()) == 130
    written = json.loads((out / "stream.json").read_text())
    assert written["seeds"] == [5, 6, 7]
    want = study.orders(study.Config(seeds=3, first_seed=5), len(TEXTS))
    np.testing.assert_array_equal(written["orders"], want)
    assert written["names"] == sorted(TEXTS)


def test_another_text_in_the_folder_does_not_continue_the_run(tmp_path, arrays):
    config = study.Config(seeds=2)
    order = study.orders(config, 4)
    before = study._lanes(config, [arms.ARMS["vanilla"]], order, arrays)
    other = arrays._replace(heldout=arrays.heldout[:, ::-1])
    after = study._lanes(config, [arms.ARMS["vanilla"]], order, other)
    assert (before.digest != after.digest).all()
