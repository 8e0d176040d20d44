"""The claims of the two papers on adapters, one by one."""

from collections.abc import Callable

import numpy as np

from experiments.claims import Claim, Verdict, format_number
from experiments.studies import _lora_results as results
from experiments.studies._lora_results import ArmResults

_EBLORA = "EBLoRA, arXiv 2602.00722"
_SLICE = "SLICE, arXiv 2605.12752"
_Of = dict[str, ArmResults]


def claims(loaded: dict[str, _Of], base_higher: bool) -> list[Claim]:
    """The claims table of a run, of those rows whose arms were run.

    Args:
      loaded: Results by stream and arm; the first stream is the main one.
      base_higher: Whether a higher base measure is better.
    """
    rows: list[Claim | None] = []
    for of in list(loaded.values())[:1]:
        rows += [_steep(of), *_geometry(of, base_higher), *_controls(of)]
    for stream, of in loaded.items():
        rows += _surgery(of, stream)
    return [row for row in rows if row is not None]


def _steep(of):
    if "LoRA" not in of:
        return None
    values = of["LoRA"].at_rate.top_energy
    mean, error = _mean(values)
    flat = 1 / of["LoRA"].singular.shape[-1]
    return Claim(
        "plain LoRA's update concentrates in few directions",
        _EBLORA,
        f"LoRA: largest singular value's share of the energy (flat: {flat:.3f})",
        mean,
        error,
        _above(mean - 2 * flat, error),
        "Read as: more than twice the share of a flat spectrum.",
    )


def _geometry(of, base_higher):
    sign = 1.0 if base_higher else -1.0
    return [
        _pair(
            of,
            "EBLoRA keeps more of the old tasks than LoRA",
            _EBLORA,
            ("EBLoRA", "LoRA"),
            "final accuracy",
            lambda m: m.final,
        ),
        _matched(of, "EBLoRA", "LoRA"),
        _pair(
            of,
            "a flat spectrum forgets less, all else equal",
            _EBLORA,
            ("EBLoRA", "EBLoRA steep"),
            "final accuracy",
            lambda m: m.final,
        ),
        _matched(of, "EBLoRA", "EBLoRA steep"),
        _pair(
            of,
            "a flat spectrum forgets less without the memory too",
            _EBLORA,
            ("EBLoRA no memory", "EBLoRA steep no memory"),
            "final accuracy",
            lambda m: m.final,
        ),
        _pair(
            of,
            "the memory contributes",
            _EBLORA,
            ("EBLoRA", "EBLoRA no memory"),
            "final accuracy",
            lambda m: m.final,
        ),
        _pair(
            of,
            "EBLoRA keeps abilities from before the sequence (forward forgetting)",
            _EBLORA,
            ("EBLoRA", "LoRA"),
            "what was known before" if base_higher else "loss on general text, negated",
            lambda m: sign * m.base,
        ),
        _pair(
            of,
            "EBLoRA is better on tasks not trained yet",
            _EBLORA,
            ("EBLoRA", "LoRA"),
            "FWT",
            lambda m: m.forward,
        ),
    ]


def _controls(of):
    source = "control"
    return [
        _pair(
            of,
            "more than a frozen A with the same memory",
            source,
            ("EBLoRA", "frozen A"),
            "final accuracy",
            lambda m: m.final,
        ),
        _matched(of, "EBLoRA", "frozen A"),
        _pair(
            of,
            "one magnitude is better than one for each direction",
            source,
            ("EBLoRA", "EBLoRA diagonal"),
            "final accuracy",
            lambda m: m.final,
        ),
        _pair(
            of,
            "the released code's tangent map is better",
            source,
            ("EBLoRA canonical", "EBLoRA"),
            "final accuracy",
            lambda m: m.final,
        ),
        _pair(
            of,
            "the released code's step multiplier is better",
            source,
            ("EBLoRA x22.6", "EBLoRA"),
            "final accuracy",
            lambda m: m.final,
        ),
        _pair(
            of,
            "starting the magnitude at zero is better",
            source,
            ("EBLoRA s0=0", "EBLoRA"),
            "final accuracy",
            lambda m: m.final,
        ),
    ]


def _surgery(of, stream):
    where = f", stream {stream}"
    names = ("SLICE 1", "SLICE .5", "SLICE global", "always project")
    rows = [
        _at_one_rate(
            of,
            f"{name} keeps more than LoRA-GA{where}",
            name,
            "final accuracy",
            lambda m: m.final,
        )
        for name in names
    ]
    rows += [
        _at_one_rate(
            of,
            f"SLICE 1 forgets less than LoRA-GA{where}",
            "SLICE 1",
            "BWT",
            lambda m: m.backward,
        ),
        _pair(
            of,
            f"a start from the gradient learns better than LoRA's{where}",
            "LoRA-GA, arXiv 2407.05000",
            ("init LoRA-GA", "init LoRA"),
            "AP",
            lambda m: m.learning,
        ),
    ]
    if "SLICE 1" in of:
        r = of["SLICE 1"]
        opened = r.opened[r.chosen, r.tuning :, 1:].mean((1, 2))
        mean, error = _mean(opened)
        rows.append(
            Claim(
                f"gradients of new and old tasks conflict{where}",
                _SLICE,
                "SLICE 1: share of kernels and later tasks whose gate was open",
                mean,
                error,
                _above(mean - 0.5, error),
                "Read as: more often than not.",
            )
        )
    return rows


def _pair(
    of: _Of,
    claim: str,
    source: str,
    names: tuple[str, str],
    measure: str,
    read: Callable[[results.Measures], np.ndarray],
) -> Claim | None:
    """A claim that the first arm's measure is higher, as a paired difference."""
    ours, theirs = names
    if ours not in of or theirs not in of:
        return None
    value, error = results.difference(read(of[ours].at_rate), read(of[theirs].at_rate))
    return Claim(
        claim,
        source,
        f"{measure}: {ours} minus {theirs}",
        value,
        error,
        _above(value, error),
    )


def _at_one_rate(
    of: _Of,
    claim: str,
    name: str,
    measure: str,
    read: Callable[[results.Measures], np.ndarray],
) -> Claim | None:
    """SLICE against LoRA-GA, which differ in nothing but the surgery.

    Both at LoRA-GA's learning rate: with rates of their own, the choice of a rate on
    few tuning seeds is a larger difference than the surgery.
    """
    control = of.get("init LoRA-GA")
    if control is None or name not in of:
        return None
    rate = control.chosen
    ours, theirs = of[name].measures(rate), control.measures(rate)
    value, error = results.difference(read(ours), read(theirs))
    own, own_error = results.difference(read(of[name].at_rate), read(control.at_rate))
    return Claim(
        claim,
        _SLICE,
        f"{measure}: {name} minus init LoRA-GA, both at its learning rate",
        value,
        error,
        _above(value, error),
        f"Each at its own rate: {format_number(own, own_error)}.",
    )


def _matched(of: _Of, ours: str, theirs: str) -> Claim | None:
    if ours not in of or theirs not in of:
        return None
    gain = results.plasticity_matched(of[ours], of[theirs])
    value, error = _mean(gain)
    return Claim(
        f"... and not just because {theirs} learns at another rate",
        "control",
        f"final accuracy: {ours} minus {theirs} where it learns as well",
        value,
        error,
        _above(value, error),
    )


def _mean(values: np.ndarray) -> tuple[float, float]:
    return results.difference(values, np.zeros_like(values))


def _above(value: float, error: float) -> Verdict:
    """Two standard errors above zero, or not reproduced."""
    return "reproduced" if value > 2 * error else "not reproduced"
