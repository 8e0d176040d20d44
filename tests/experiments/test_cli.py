"""The command line: what it does, and one clear line for everything wrong."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cli, run_folder, studies

sys.path.insert(0, str(Path(__file__).parent))
import toy

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(studies, "_REGISTERED", {"toy": toy.STUDY})


def command(*arguments, **environment):
    """The real command line, in a process of its own."""
    return subprocess.run(
        [sys.executable, toy.__file__, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished quick run on two devices."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    done = command("run", "toy", "--quick", "--devices", 2, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def refused(capsys, *arguments):
    """The one line a wrong command line gives."""
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "Traceback" not in out + err
    return err


def test_run_leaves_the_whole_folder(finished):
    folder, done = finished
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "config.json",
        "results.json",
        "report.html",
        "lock",
        "raw/plain.npz",
        "raw/slow.npz",
        "tables/final.md",
        "tables/claims.md",
        "figures/loss.svg",
        "figures/loss.png",
    }
    assert "| plain |" in done.stdout and "report.html" in done.stdout
    assert "100 %" in done.stderr


def test_config_json_tells_what_ran_where(finished):
    record = json.loads((finished[0] / "config.json").read_text())
    assert record["study"] == "toy"
    assert record["config"]["steps"] == 12  # the quick value
    assert record["config"]["rate"] == 0.05  # which has no quick value
    assert record["device_count"] == 2
    assert {"python", "jax", "optax", "numpy"} <= set(record["versions"])
    config = cli.make_config(toy.Config, quick=True, given={})
    assert record["config_hash"] == run_folder.config_hash("toy", config)


def test_same_command_again_changes_nothing(finished):
    folder, _ = finished
    before = {p: p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}
    again = command("run", "toy", "--quick", "--devices", 2, "--out", folder)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before") == 2
    assert {p: p.read_bytes() for p in folder.rglob("*.*") if p.is_file()} == before


def test_another_number_of_devices_is_refused(finished):
    folder, _ = finished
    other = command("resume", folder, "--devices", 1)
    assert other.returncode == 2
    assert "was started on 2 cpu device(s), but here are 1 cpu" in other.stderr
    assert "--devices 2" in other.stderr


def test_report_is_written_again(finished, capsys):
    folder, _ = finished
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == page
    assert "| plain |" in capsys.readouterr().out


def test_list_names_each_study(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert "toy" in out and "a toy for the tests" in out


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "rnu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command 'rnu'; did you mean run?\n"


def test_help_tells_default_and_quick_values(capsys):
    with pytest.raises(SystemExit) as leave:
        cli.main(["run", "toy", "--help"])
    assert leave.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "number of seeds (default: 3, quick: 2)" in text
    assert "learning rate (not in %)" in text
    assert "--kind {map,vmap}" in text


def test_flags_become_the_config(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(cli, "execute", lambda *a: seen.append(a) or 0, raising=True)
    line = (
        "run toy --quick --seeds 4 --rate 1e-3 --arms slow,plain --kind vmap --no-noisy"
    )
    assert cli.main([*line.split(), "--out", str(tmp_path / "x")]) == 0
    [(study, config, folder, devices)] = seen
    assert (study, folder, devices) == (toy.STUDY, tmp_path / "x", None)
    assert config == toy.Config(
        seeds=4,
        steps=12,
        chunk_steps=5,
        rate=1e-3,
        arms=("slow", "plain"),
        kind="vmap",
        noisy=False,
    )


def test_default_folder_tells_quick_from_full(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "execute", lambda *a: seen.append(a[2]) or 0)
    cli.main(["run", "toy"])
    cli.main(["run", "toy", "--quick"])
    assert seen == [Path("runs/toy-full"), Path("runs/toy-quick")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rnu toy", "unknown command 'rnu'; did you mean run?"),
        ("run", "run needs a study first"),
        ("run toi", "unknown study 'toi'; did you mean toy?"),
        ("run zebra", "unknown study 'zebra'; there are: "),
        ("run toy --seed 3", "unknown flag '--seed'; did you mean --seeds?"),
        ("run toy extra", "unknown argument 'extra'"),
        ("run toy --seeds -1", "--seeds: must be at least 1; got -1"),
        ("run toy --seeds 0", "--seeds: must be at least 1; got 0"),
        ("run toy --seeds two", "--seeds: 'two' is not a whole number"),
        ("run toy --seeds 1.5", "--seeds: '1.5' is not a whole number"),
        ("run toy --rate nan", "--rate: must be finite; got nan"),
        ("run toy --rate -0.1", "--rate: must be at least 0.0; got -0.1"),
        ("run toy --kind vmpa", "'vmpa' is not one of its choices; did you mean vmap?"),
        ("run toy --arms plian", "unknown arm 'plian'; there are: plain, slow"),
        ("run toy --arms ,", "--arms: needs at least one value"),
        ("run toy --stream liens", "unknown stream 'liens'; there are: lines"),
        ("run toy --devices 0", "--devices: must be at least 1; got 0"),
        ("run toy --devices three", "--devices: 'three' is not a whole number"),
        ("resume", "the following arguments are required: folder"),
        ("resume /nowhere", "/nowhere/config.json does not exist"),
        ("report /nowhere", "/nowhere/config.json does not exist"),
        ("data", "the following arguments are required: action, name"),
        ("data put mini8", "invalid choice: 'put'"),
        ("data get mini9", "mini9"),
    ],
)
def test_wrong_command_line_is_one_clear_line(capsys, tmp_path, line, message):
    words = line.split()
    if words[:2] == ["run", "toy"]:
        words += ["--out", str(tmp_path / "new")]
    assert message in refused(capsys, *words)
    assert not (tmp_path / "new").exists()


def test_folder_of_another_config_is_refused(capsys, tmp_path):
    with run_folder.locked(tmp_path):
        run_folder.open_run(tmp_path, "toy", toy.Config(seeds=2))
    before = (tmp_path / "config.json").read_bytes()
    line = refused(capsys, "run", "toy", "--out", tmp_path)
    assert "another config (seeds: 2 there, 3 here)" in line
    assert f"resume {tmp_path}" in line
    assert (tmp_path / "config.json").read_bytes() == before


def test_folder_of_another_study_is_refused(capsys, tmp_path):
    with run_folder.locked(tmp_path):
        run_folder.open_run(tmp_path, "other", toy.Config())
    line = refused(capsys, "run", "toy", "--out", tmp_path)
    assert "holds a run of the study 'other', not of 'toy'" in line


def test_folder_in_use_is_refused_with_the_process(capsys, tmp_path):
    handle = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    os.write(handle, b"4321\n")
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        line = refused(capsys, "run", "toy", "--out", tmp_path)
    finally:
        os.close(handle)
    assert f"{tmp_path} is in use by another process (pid 4321)" in line


def test_folder_with_foreign_files_is_refused(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    line = refused(capsys, "run", "toy", "--out", tmp_path)
    assert "holds files but no config.json (thesis.tex" in line


def test_file_in_place_of_a_folder_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write into" in refused(
        capsys, "run", "toy", "--out", tmp_path / "file"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged or unreadable"),
        ("[]", "does not describe a run"),
        ('{"study": "gone", "config": {}, "config_hash": ""}', "unknown study 'gone'"),
        (
            '{"study": "toy", "config": {"seeds": 1}, "config_hash": ""}',
            "does not fit this version",
        ),
    ],
)
def test_damaged_config_json_is_told(capsys, tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    assert message in refused(capsys, "resume", tmp_path)


def test_edited_config_json_is_refused(capsys, tmp_path):
    with run_folder.locked(tmp_path):
        run_folder.open_run(tmp_path, "toy", toy.Config())
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"seeds": 3', '"seeds": 4'))
    assert "config.json was edited" in refused(capsys, "resume", tmp_path)


def test_report_of_an_unfinished_run_is_refused(capsys, tmp_path):
    with run_folder.locked(tmp_path):
        run_folder.open_run(tmp_path, "toy", toy.Config())
    assert "has no results yet" in refused(capsys, "report", tmp_path)


def test_other_versions_are_told_and_allowed(tmp_path):
    run_folder.open_run(tmp_path, "toy", toy.Config())
    record = json.loads((tmp_path / "config.json").read_text())
    record["versions"]["jax"] = "0.0.1"
    run_folder.write_json(tmp_path / "config.json", record)
    [warning] = run_folder.open_run(tmp_path, "toy", toy.Config())
    assert warning.startswith("jax: '0.0.1' there")


def test_field_that_cannot_be_a_flag_is_named():
    import argparse
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Odd:
        table: dict | None = None

    with pytest.raises(TypeError, match="config field `table` has the type"):
        cli.add_fields(argparse.ArgumentParser(), Odd)
