"""The adapter study on digits: its data, its arms, and one small run."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import engine, report
from experiments.progress import Progress
from experiments.studies import _lora_arms as arms
from experiments.studies import _lora_data as data
from experiments.studies import _lora_results as results
from experiments.studies import lora_digits
from optax_cl import lora

QUICK = lora_digits.Config(
    streams=("pixels", "labels"),
    arms=("LoRA per task", "EBLoRA", "EBLoRA steep", "init LoRA-GA", "SLICE 1"),
    seeds=2,
    tuning=1,
    rates=(3e-3,),
    steps=3,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a few steps, and the numbers it returned."""
    folder = tmp_path_factory.mktemp("run")
    record = {
        "study": "lora_digits",
        "config": dataclasses.asdict(QUICK),
        "config_hash": "x",
    }
    from experiments import run_folder

    run_folder.write_json(folder / "config.json", record)
    with jax.numpy_rank_promotion("allow"):  # as in a run from the command line
        numbers = lora_digits.run(
            QUICK, folder, engine.Context(folder, Progress(stream=None))
        )
    loaded = results.load(folder, lora_digits.programs(QUICK), QUICK)
    return folder, numbers, loaded


def test_a_task_exchanges_pixels_and_keeps_the_others():
    images, labels = data._stream(3)
    for task in range(1, 1 + data.TASKS):
        moved = (images[0] != images[task]).any(0)
        assert 0 < moved.sum() <= data.MOVED
        np.testing.assert_array_equal(
            np.sort(images[0], axis=1), np.sort(images[task], axis=1)
        )
    np.testing.assert_array_equal(labels[0], np.stack([labels[0, 0]] * 6))


def test_the_second_stream_renames_the_classes_of_each_task():
    _, labels = data._stream(3)
    np.testing.assert_array_equal(labels[1, 0], labels[0, 0])
    for task in range(1, 1 + data.TASKS):
        pairs = set(zip(labels[0, task], labels[1, task], strict=True))
        assert len(pairs) == data.CLASSES  # one new name for each class
        assert len({new for _, new in pairs}) == data.CLASSES
        assert any(old != new for old, new in pairs)


def test_a_steep_view_has_the_norm_of_a_flat_one():
    adapter = lora.Spectral(s=np.float32(0.5), u=np.eye(9, 8), v=np.eye(12, 8))
    norms = []
    for decay in (1.0, 0.6):
        lane = jax.tree.map(lambda x: x[0], _lanes("EBLoRA"))._replace(decay=decay)
        product = lora.product(arms.view(lane, {"k": adapter})["k"])
        norms.append(np.linalg.norm(product))
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-6)
    np.testing.assert_allclose(norms[0], 0.5 * np.sqrt(8), rtol=1e-6)


@pytest.mark.slow
def test_all_arms_of_a_seed_start_from_the_same_network(run):
    *_, loaded = run
    first = loaded["pixels"]["EBLoRA"].matrix[:, :, 0]
    for arm in loaded["pixels"].values():
        np.testing.assert_array_equal(arm.matrix[:, :, 0], first)
        np.testing.assert_allclose(arm.base[:, :, 0], arm.base[0, 0, 0], atol=0.05)
    assert (loaded["pixels"]["EBLoRA"].base[:, :, 0] > 0.95).all()


@pytest.mark.slow
def test_eblora_keeps_its_spectrum_flat_and_the_steep_arm_steep(run):
    *_, loaded = run
    flat = loaded["pixels"]["EBLoRA"].singular
    np.testing.assert_allclose(flat / flat[..., :1], 1.0, rtol=1e-5)
    steep = loaded["pixels"]["EBLoRA steep"].singular
    np.testing.assert_allclose(steep[..., 1:] / steep[..., :-1], 0.6, rtol=1e-4)


@pytest.mark.slow
def test_the_memory_grows_from_task_to_task_and_only_where_there_is_one(run):
    *_, loaded = run
    columns = loaded["pixels"]["EBLoRA"].memory.sum(-1)
    assert (np.diff(columns, axis=-1) >= 0).all()
    assert (columns[..., 0] > 0).all()
    assert not loaded["pixels"]["SLICE 1"].memory.any()


@pytest.mark.slow
def test_an_adapter_of_its_own_forgets_nothing(run):
    *_, loaded = run
    matrix = loaded["pixels"]["LoRA per task"].matrix
    for task in range(data.TASKS):
        learned = matrix[..., task + 1, task]
        for later in range(task + 2, data.TASKS + 1):
            np.testing.assert_array_equal(matrix[..., later, task], learned)


@pytest.mark.slow
def test_without_a_conflict_slice_is_lora_ga(run):
    *_, loaded = run
    one, other = loaded["pixels"]["SLICE 1"], loaded["pixels"]["init LoRA-GA"]
    # The first task has nothing to conflict with.
    np.testing.assert_array_equal(one.matrix[:, :, 1], other.matrix[:, :, 1])
    assert not one.opened[:, :, 0].any()
    shut = ~one.opened.astype(bool)
    assert (one.cosine[shut] >= 0).all()
    assert (one.cosine[~shut] < 0).all()


def test_the_best_rate_is_chosen_on_the_tuning_seeds_alone():
    matrix = np.zeros([2, 3, 3, 2])
    matrix[0, 0, -1], matrix[1, 0, -1] = 0.9, 0.1  # the tuning seed likes rate 0
    matrix[0, 1:, -1], matrix[1, 1:, -1] = 0.1, 0.9  # the others would not
    empty = np.ones([2, 3, 2, 1, 1])
    arm = results.ArmResults(
        arms.ARMS["LoRA"],
        np.array([1.0, 2.0]),
        1,
        matrix,
        np.ones([2, 3, 3]),
        empty,
        empty[..., 0],
        empty[..., 0],
        empty[..., 0],
    )
    assert arm.chosen == 0
    np.testing.assert_allclose(arm.at_rate.final, 0.1)


@pytest.mark.slow
def test_the_report_holds_tables_figures_and_claims(run, tmp_path):
    folder, numbers, _ = run
    content = lora_digits.report(folder)
    assert {t.name for t in content.tables} >= {"methods-pixels", "starts-labels"}
    assert "# Claims" in report.to_markdown(content)
    assert numbers["pixels"]["EBLoRA"]["final"].shape == (2,)
    for claim in content.claims:
        assert claim.measured is not None


def _lanes(name):
    return arms.make_lanes([(arms.ARMS[name], "pixels")], data.STREAMS, (1e-3,), (0,))
