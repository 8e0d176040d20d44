"""The command line: ``python -m experiments``.

Every fault of the user's is one line on stderr and exit code 2, with the nearest right
word where there is one; a traceback is a fault of ours.
"""

import argparse
import dataclasses
import difflib
import os
import sys
import time
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from experiments import studies
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


class UsageError(Exception):
    """A command line that cannot be carried out."""


def nearest(word: str, known: Sequence[str]) -> str:
    """``"; did you mean X?"``, or all there is, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are: {', '.join(known)}" if known else ""


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
        type=_One(int, {"minimum": 1}),
        metavar="N",
        help="CPU devices to make (default: one per core); no effect on accelerators",
    )


def make_devices(count: int | None) -> None:
    """Makes fake devices where this runs on a CPU, one per core unless told.

    Raises:
      UsageError: if a number is asked for that cannot be had any more.
    """
    import jax

    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    try:
        if not forced:
            cores = len(os.sched_getaffinity(0))
            jax.config.update("jax_num_cpu_devices", count or cores)
            # XLA sizes the pool of threads that all devices share by this variable. In
            # jaxlib 0.10 a batched decomposition (SVD, QR, ...) holds one of them while
            # it waits for others, so a pool of one thread per core can wait for itself
            # for ever. Spare threads sleep. The size also decides how sums are split,
            # and so the last bits: hence a fixed number rather than the user's.
            os.environ["NPROC"] = str(max(64, 2 * cores))
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


# -- configs and flags -----------------------------------------------------------------


def add_fields(parser: argparse.ArgumentParser, config: type) -> None:
    """Gives the parser one flag per field of a config."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        element, many = _element(hints[field.name], field.name)
        metadata = field.metadata
        text = f"{metadata.get('help', '')} (default: {_word(field.default)}"
        if "quick" in metadata:
            text += f", quick: {_word(metadata['quick'])}"
        flag = "--" + field.name.replace("_", "-")
        options = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": (text + ")").replace("%", "%%"),
        }
        if element is bool and not many:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, **options)
        elif many:
            convert = _Many(element, metadata)
            action = _Extend
            parser.add_argument(
                flag, type=convert, nargs="+", action=action, metavar="X", **options
            )
        else:
            convert = _One(element, metadata)
            metavar = convert.metavar
            parser.add_argument(flag, type=convert, metavar=metavar, **options)


class _Extend(argparse.Action):
    """Joins ``--arms a,b c`` to one tuple."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(v for part in values for v in part))


class _One:
    """Text to one legal value."""

    def __init__(self, element: Any, metadata: typing.Mapping[str, Any]):
        self._element = element
        self._low = metadata.get("minimum")
        self._high = metadata.get("maximum")
        choices = "{" + ",".join(map(str, typing.get_args(element))) + "}"
        self.metavar = {int: "N", float: "X", str: "NAME"}.get(element, choices)

    def __call__(self, text: str) -> Any:
        try:
            return legal(_convert(text, self._element), self._low, self._high)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None


class _Many(_One):
    """Comma-separated text to a tuple of legal values."""

    def __call__(self, text: str) -> tuple:
        parts = [part for part in text.split(",") if part]
        if not parts:
            raise argparse.ArgumentTypeError("needs at least one value")
        return tuple(super(_Many, self).__call__(part) for part in parts)


def _convert(text: str, element: Any) -> Any:
    if typing.get_origin(element) is Literal:
        choices = typing.get_args(element)
        for choice in choices:
            if text == str(choice):
                return choice
        hint = nearest(text, [str(choice) for choice in choices])
        raise ValueError(f"{text!r} is not one of its choices{hint}")
    if element is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"{text!r} is neither true nor false")
    if element is str:
        return text
    kind = "a whole number" if element is int else "a number"
    try:
        value = element(text)
    except ValueError:
        raise ValueError(f"{text!r} is not {kind}") from None
    if value != value or value in (float("inf"), -float("inf")):
        raise ValueError(f"must be finite; got {text}")
    return value


def legal(value: Any, low: float | None, high: float | None) -> Any:
    """``value``, if it lies in its interval.

    Raises:
      ValueError: if not.
    """
    if low is not None and value < low:
        raise ValueError(f"must be at least {low}; got {value}")
    if high is not None and value > high:
        raise ValueError(f"must be at most {high}; got {value}")
    return value


def _element(hint: Any, name: str) -> tuple[Any, bool]:
    """A field's type as (element type, whether it is a tuple of them)."""
    many = typing.get_origin(hint) is tuple
    element = typing.get_args(hint)[0] if many else hint
    plain = element in (int, float, str, bool)
    if not plain and typing.get_origin(element) is not Literal:
        raise TypeError(
            f"the config field `{name}` has the type {hint}, which cannot become a "
            "flag; use int, float, str, bool, a Literal or a tuple[X, ...] of these."
        )
    return element, many


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def make_config(config: type, *, quick: bool = False, given: dict[str, Any]) -> Any:
    """A config from its defaults, or its quick ones, and what was given.

    Args:
      config: the dataclass.
      quick: take the ``quick`` values of the fields that have one.
      given: values from the command line, by field.

    Returns:
      An instance of ``config``.

    Raises:
      UsageError: if the values don't go together.
    """
    values = {}
    if quick:
        values = {
            field.name: field.metadata["quick"]
            for field in dataclasses.fields(config)
            if "quick" in field.metadata
        }
    try:
        return config(**{**values, **given})
    except ValueError as error:
        raise UsageError(str(error)) from None


def config_from_json(config: type, saved: Any, folder: Path) -> Any:
    """The config that a run folder recorded.

    Raises:
      UsageError: if it does not fit the study as it is now.
    """
    known = {field.name for field in dataclasses.fields(config)}
    if not isinstance(saved, dict) or set(saved) != known:
        odd = sorted(set(saved) ^ known) if isinstance(saved, dict) else "all of it"
        raise UsageError(
            f"the config in {folder / 'config.json'} does not fit this version of the "
            f"study (differs in: {odd}); start a new run with --out."
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    return make_config(config, given=values)
