"""The command line: ``python -m experiments``.

Every fault of the user's is one line on stderr and exit code 2, with the nearest right
word where there is one; a traceback is a fault of ours.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from experiments import cores, studies
from experiments.flags import (
    UsageError,
    add_fields,
    at_least,
    config_from_json,
    make_config,
    nearest,
)
from experiments.progress import Progress, format_seconds

_COMMANDS = ("list", "run", "resume", "report", "data")


class _Parser(argparse.ArgumentParser):
    """Tells a wrong command line in one line, with the nearest right word."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")

    def flags(self) -> list[str]:
        return [s for a in self._actions for s in a.option_strings]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: the command line, without the program's name.

    Returns:
      The exit code: 0, 2 for a fault of the user's, 130 after an interrupt.
    """
    from experiments.run_folder import RunError

    try:
        return _command(list(sys.argv[1:] if arguments is None else arguments))
    except (UsageError, RunError) as error:
        _fail(error)
        return 2
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from the last checkpoint")
        return 130
    except BrokenPipeError:
        # The reader of our output has left (`... list | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(message: object) -> None:
    text = " ".join(str(message).split())
    print(f"error: {text}", file=sys.stderr, flush=True)


def _command(arguments: list[str]) -> int:
    parser = _main_parser()
    if not arguments:
        arguments = ["list"]
    command, rest = arguments[0], arguments[1:]
    if command in ("-h", "--help"):
        parser.print_help()
        return 0
    if command not in _COMMANDS:
        raise UsageError(f"unknown command {command!r}{nearest(command, _COMMANDS)}")
    return globals()[f"_{command}"](rest)


def _main_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m experiments", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(title="commands", metavar="")
    commands.add_parser("list", help="list the studies (the default)")
    commands.add_parser("run", help="run a study, or go on with it")
    commands.add_parser("resume", help="go on with the run in a folder")
    commands.add_parser("report", help="write the report of a run again")
    commands.add_parser("data", help="fetch data: data get NAME")
    return parser


def _parse(parser: _Parser, arguments: Sequence[str]) -> argparse.Namespace:
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        word = unknown[0].split("=")[0]
        hint = nearest(word, parser.flags()) if word.startswith("-") else ""
        kind = "flag" if word.startswith("-") else "argument"
        raise UsageError(f"unknown {kind} {word!r}{hint}")
    return values


# -- list ------------------------------------------------------------------------------


def _list(arguments: Sequence[str]) -> int:
    _parse(_Parser(prog="python -m experiments list"), arguments)
    found = [studies.get(name) for name in studies.names()]
    width = max((len(study.name) for study in found), default=0)
    for study in found:
        print(f"{study.name:<{width}}  {study.summary}")
    print("\nrun one:  python -m experiments run STUDY [--quick]")
    print("its flags: python -m experiments run STUDY --help")
    return 0


# -- run and resume --------------------------------------------------------------------


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            print("usage: python -m experiments run STUDY [flags]\n")
            return _list([])
        raise UsageError(f"run needs a study first{nearest('', studies.names())}")
    make_devices(None)
    study = _study(arguments[0])
    parser = _Parser(
        prog=f"python -m experiments run {study.name}", description=study.summary
    )
    parser.add_argument("--quick", action="store_true", help="small and fast settings")
    parser.add_argument(
        "--out", type=Path, help="run folder (default: runs/<study>-<quick|full>)"
    )
    _add_devices(parser)
    add_fields(parser, study.Config)
    values = vars(_parse(parser, arguments[1:]))
    quick, out = values.pop("quick"), values.pop("out")
    devices = values.pop("devices")
    config = make_config(study.Config, quick=quick, given=values)
    if out is None:
        out = Path("runs") / f"{study.name}-{'quick' if quick else 'full'}"
    return execute(study, config, out, devices)


def _resume(arguments: Sequence[str]) -> int:
    from experiments import run_folder

    parser = _Parser(prog="python -m experiments resume")
    parser.add_argument("folder", type=Path, help="the folder of a run")
    _add_devices(parser)
    values = _parse(parser, arguments)
    make_devices(values.devices)
    record = run_folder.read_record(values.folder)
    study = _study(record["study"])
    config = config_from_json(study.Config, record.get("config"), values.folder)
    return execute(study, config, values.folder)


def _study(name: str) -> studies.Study:
    try:
        return studies.get(name)
    except KeyError:
        raise UsageError(
            f"unknown study {name!r}{nearest(name, studies.names())}"
        ) from None


def _add_devices(parser: _Parser) -> None:
    parser.add_argument(
        "--devices",
        type=at_least(1),
        metavar="N",
        help="CPU devices to make (default: one per core); no effect on accelerators",
    )


def make_devices(count: int | None) -> None:
    """Makes fake devices where this runs on a CPU, one per core unless told.

    Raises:
      UsageError: if a number is asked for that cannot be had any more.
    """
    # Devices decompose matrices side by side; LAPACK's own threads would spin for each
    # other. It reads this when it is loaded, which JAX does at the first decomposition.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import jax

    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    try:
        if not forced:
            jax.config.update("jax_num_cpu_devices", count or cores.count())
    except RuntimeError:
        # JAX has its devices already, as in a program that calls `main`.
        forced = True
    if forced and count not in (None, jax.device_count()):
        raise UsageError(
            f"--devices {count}: this process has {jax.device_count()} devices already "
            "(XLA_FLAGS, or JAX was in use); leave the flag out."
        )


def execute(
    study: studies.Study, config: Any, folder: Path, devices: int | None = None
) -> int:
    """Runs a study in a folder, from wherever it stands, and writes its report.

    Args:
      study: the study.
      config: its settings.
      folder: the run folder.
      devices: fake CPU devices to make; None means one per core.

    Returns:
      The exit code.
    """
    if devices is not None:
        make_devices(devices)
    from experiments import engine, run_folder
    from experiments.data import DataError

    if study.check is not None:
        try:
            study.check(config)
        except ValueError as error:
            raise UsageError(str(error)) from None
    progress = Progress()
    began = time.monotonic()
    with run_folder.locked(folder):
        for warning in run_folder.open_run(folder, study.name, config):
            progress.warn(warning)
        run_folder.remove_unfinished(folder)
        try:
            results = study.run(config, folder, engine.Context(folder, progress))
            run_folder.write_json(folder / "results.json", results)
            page = _write_report(study, folder)
        except DataError as error:
            raise UsageError(str(error)) from None
        except OSError as error:
            if run_folder.is_disk_full(error):
                raise run_folder.disk_full_error(folder) from error
            raise
    took = format_seconds(time.monotonic() - began)
    progress.say(f"{study.name}: done in {took}")
    print(f"report: {page}")
    return 0


# -- report ----------------------------------------------------------------------------


def _report(arguments: Sequence[str]) -> int:
    from experiments import run_folder

    parser = _Parser(prog="python -m experiments report")
    parser.add_argument("folder", type=Path, help="the folder of a finished run")
    folder = _parse(parser, arguments).folder
    record = run_folder.read_record(folder)
    study = _study(record["study"])
    with run_folder.locked(folder):
        if not (folder / "results.json").exists():
            raise run_folder.RunError(
                f"{folder} has no results yet; finish it with `resume {folder}`."
            )
        page = _write_report(study, folder)
    print(f"report: {page}")
    return 0


def _write_report(study: studies.Study, folder: Path) -> Path:
    """Writes the report, shows its tables, and says where the page is."""
    from experiments import report

    content = study.report(folder)
    page = report.write(folder, content)
    print(report.to_markdown(content))
    return page


# -- data ------------------------------------------------------------------------------


def _data(arguments: Sequence[str]) -> int:
    parser = _Parser(prog="python -m experiments data")
    parser.add_argument("action", choices=("get",), help="what to do")
    parser.add_argument("name", help="name of a data set")
    name = _parse(parser, arguments).name
    from experiments import data

    try:
        where = data.get(name)
    except (KeyError, ValueError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UsageError(f"data get {name}: {text}") from None
    print(where)
    return 0
