"""The study of the classic methods: its streams, its methods, and one small run."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import engine, report, run_folder
from experiments.progress import Progress
from experiments.studies import _classic_arms as arms
from experiments.studies import _classic_data as data
from experiments.studies import _classic_report as reporting
from experiments.studies import classic_digits

TINY = classic_digits.Config(
    arms=("fine-tuning", "EWC", "A-GEM", "iCaRL", "PackNet", "Progressive"),
    seeds=2,
    tuning=1,
    rates=(3e-3,),
    steps=4,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a few steps, and the numbers it returned."""
    folder = tmp_path_factory.mktemp("run")
    record = {
        "study": "classic_digits",
        "config": dataclasses.asdict(TINY),
        "config_hash": "x",
    }
    run_folder.write_json(folder / "config.json", record)
    with jax.numpy_rank_promotion("allow"):  # as in a run from the command line
        numbers = classic_digits.run(
            TINY, folder, engine.Context(folder, Progress(stream=None))
        )
    return folder, numbers


def matrix(folder, name):
    """Accuracies ``[scenarios, seeds, T + 1, T]`` of the reporting seeds."""
    found = run_folder.load_program(folder, name)["evaluate/accuracy"]
    return found.reshape(len(arms.METHODS[name].scenarios), -1, *found.shape[1:])


def test_a_task_of_the_first_stream_permutes_the_pixels_of_the_same_images():
    everything = data.make_data((3,))
    images, labels = everything.images[0, 0], everything.labels[0, 0]
    for task in range(data.TASKS):
        np.testing.assert_array_equal(np.sort(images[task]), np.sort(images[0]))
        np.testing.assert_array_equal(labels[task], labels[0])
    assert (images[1] != images[0]).any(-1).all()
    assert (images[..., -1] == 1).all()


def test_a_task_of_the_second_stream_has_two_classes_of_its_own_that_alternate():
    everything = data.make_data((3,))
    images, labels = everything.images[0, 1], everything.labels[0, 1]
    for task in range(data.TASKS):
        np.testing.assert_array_equal(labels[task], 2 * task + np.arange(1700) % 2)
        rows = [
            {image.tobytes() for image in images[task, part]}
            for part in (slice(0, data.TRAIN), slice(data.TRAIN, None))
        ]
        assert [len(r) for r in rows] == [250, 90] and not rows[0] & rows[1]


def test_what_competes_is_the_scenarios():
    everything = data.make_data((0,))
    for index, wanted in enumerate([10, 10, 2]):
        lane = lane_of(data.SCENARIOS[index])
        batch = data.rows(everything, lane, 2, np.arange(6))
        assert (np.asarray(batch["may"]).sum(1) == wanted).all()
        assert np.asarray(batch["may"])[np.arange(6), batch["y"]].all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": ()}, "`--rates` must name one"),
        ({"scenarios": ()}, "`--scenarios` must name one"),
        (
            {"arms": ("EWC", "ER-ACE"), "scenarios": ("domain",)},
            r"`--arms` \['ER-ACE'\] have none of the scenarios",
        ),
    ],
)
def test_a_run_without_a_single_setting_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        classic_digits.check(classic_digits.Config(**changes))


def test_a_scenario_in_which_nothing_ran_is_left_out_of_the_report(monkeypatch):
    config = classic_digits.Config(arms=("ER-ACE",), seeds=2, tuning=1, rates=(1e-3,))
    accuracy = np.ones([2, data.TASKS + 1, data.TASKS])
    found = {"ER-ACE": accuracy, "ER-ACE, tuning": accuracy[:1]}
    monkeypatch.setattr(
        reporting.run_folder,
        "load_program",
        lambda folder, name: {"evaluate/accuracy": found[name]},
    )
    loaded = reporting.load("folder", config, classic_digits.chosen(config))
    content = reporting.report(loaded, config)
    assert [t.name for t in content.tables] == ["class"]


def test_the_best_setting_of_each_scenario_is_that_of_the_tuning_seeds():
    tried = reporting.settings("EWC", ("class", "task"), (1e-3, 3e-3))
    accuracy = np.zeros([len(tried), 3, data.TASKS + 1, data.TASKS])
    accuracy[3, :, :-1] = 1.0  # best but for the end
    for at, finals in ((5, [0.5, 0.5, 0.5]), (2, [1.0, 0.2, 0.2]), (11, [0.1] * 3)):
        accuracy[at, :, -1] = np.array(finals)[:, None]
    flat = accuracy.reshape(-1, *accuracy.shape[2:])
    found = reporting.best(flat, tried, ("class", "task"))
    assert found == [
        arms.Setting("class", 100.0, 3e-3),
        arms.Setting("task", 1.0, 3e-3),
    ]


@pytest.mark.slow
def test_on_one_seed_methods_start_alike_and_the_first_task_is_plain_training(run):
    folder, _ = run
    plain = matrix(folder, "fine-tuning")
    for name in ("EWC", "A-GEM"):
        np.testing.assert_array_equal(matrix(folder, name)[:, :, :2], plain[:, :, :2])
    assert (matrix(folder, "EWC")[:, :, 2:] != plain[:, :, 2:]).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PackNet", "Progressive"])
def test_who_is_told_the_task_keeps_every_answer(run, name):
    found = matrix(run[0], name)
    for task in range(data.TASKS):
        learnt = found[..., task + 1, task]
        for later in range(task + 2, data.TASKS + 1):
            np.testing.assert_array_equal(found[..., later, task], learnt)


@pytest.mark.slow
def test_the_report_has_a_table_for_each_scenario_figures_and_claims(run):
    folder, numbers = run
    content = classic_digits.report(folder)
    assert [t.name for t in content.tables] == list(data.SCENARIOS)
    assert [f.name for f in content.figures] == ["final"]
    assert "PackNet forgets nothing" in report.to_markdown(content)
    assert set(numbers["class"]) == {"fine-tuning", "EWC", "A-GEM", "iCaRL"}
    assert numbers["task"]["PackNet"]["final"].shape == (2,)
    for claim in content.claims:
        assert claim.measured is not None


def lane_of(scenario):
    """One lane."""
    made = arms.make_lanes([arms.Setting(scenario, 0.0, 3e-3)], {0: 0})
    return jax.tree.map(lambda x: x[0], made)
