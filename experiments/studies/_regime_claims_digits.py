"""The claims that the streams of digits can test."""

import itertools
from collections.abc import Iterable

import numpy as np

from experiments.claims import Claim
from experiments.studies import _regime_results as results
from experiments.studies._regime_claim_parts import (
    NOISE,
    SOURCE,
    against_oracle,
    final_of,
    gap_of,
    less,
    never_worse,
    ran,
    verdict,
)
from experiments.studies._regime_results import MapResults


def digit_claims(maps: list[MapResults]) -> list[Claim]:
    """The claims on the streams of digits, from the first map."""
    main = maps[0]
    found = [_unsafe(main)]
    found += [never_worse(main, "balance 1", w) for w in ("matched", "fixed")]
    found += [against_oracle(main, name) for name in ("ratchet 0.75", "balance 1")]
    found.append(_best_rule(main))
    found.append(_monotonic(main))
    found += [_tempered(main, name) for name in ("balance 1, T=2", "balance 1, T=4")]
    found.append(
        less(
            main,
            "max 0.5",
            "one_minus .5",
            "A constant beats one_minus of the same number",
        )
    )
    found.append(
        less(
            main,
            "ratchet 0.75",
            "replay 0.5",
            "A ratchet beats replay of 7 images a task",
        )
    )
    found.append(_swap(main))
    found.append(_learns_less(main))
    return found


def _unsafe(one: MapResults) -> Claim:
    def largest(names: Iterable[str]) -> float:
        return max(float(one.fixed[n].largest.max()) for n in names)

    raw = largest(n for n in one.fixed if n.startswith("raw"))
    safe = largest(n for n in one.fixed if not n.startswith("raw"))
    ours, theirs = final_of(one, "raw 0.5", "fixed"), final_of(one, "max 0.5", "fixed")
    mean, error = results.difference(ours, theirs)
    at = results.worst(mean, error)
    raw_text = f"{raw:.1e}" if np.isfinite(raw) else "not a number"
    return Claim(
        "With dead pixels a second moment of the raw gradient is unsafe; the maximum "
        "of raw and routed is safe",
        SOURCE,
        ran(one, "fixed"),
        f"{raw_text} against {safe:.1f}",
        None,
        verdict(raw > 1e3 and safe < 10),
        "largest step in units of the learning rate; raw .5 makes "
        f"{100 * mean[at]:.0f} ± {100 * error[at]:.0f} points more errors than max .5 "
        f"in {one.map.regimes[at]}",
    )


def _best_rule(one: MapResults) -> Claim:
    names = [
        n
        for n in ("ratchet 0.75", "balance 1", "balance 3", "spring 1", "one_minus .5")
        if n in one.matched
    ]
    base = final_of(one, "vanilla")
    means = {n: results.mean_ratio(final_of(one, n), base)[0] for n in names}
    rival = min((n for n in names if n != "ratchet 0.75"), key=means.__getitem__)
    gap, error = gap_of(one, "ratchet 0.75", rival)
    return Claim(
        "On digits, where the Fisher is too small, ratchet .75 is the best rule",
        SOURCE,
        ran(one),
        gap,
        error,
        verdict(gap < 0),
        f"its mean ratio to vanilla minus that of the next, {rival}; kappa above 3 "
        "and tempered curvature have rows of their own",
    )


def _monotonic(one: MapResults) -> Claim:
    base = final_of(one, "vanilla")
    names = ["balance 1", "balance 3", "balance 10", "balance 30"]
    means = [results.mean_ratio(final_of(one, n), base) for n in names]
    steps = [gap_of(one, b, a) for a, b in itertools.pairwise(names)]
    words = ", ".join(
        f"{n.removeprefix('balance ')}: {m:.3f}"
        for n, (m, _) in zip(names, means, strict=True)
    )
    return Claim(
        "On digits balance gets better with kappa up to 10",
        SOURCE,
        ran(one),
        *gap_of(one, "balance 10", "balance 1"),
        verdict(all(gap < 0 for gap, _ in steps[:2])),
        f"mean ratio at kappa 10 minus that at 1; mean ratios by kappa {words}",
    )


def _tempered(one: MapResults, name: str) -> Claim:
    gain, error = gap_of(one, name, "balance 1")
    whole, _ = gap_of(one, "balance 10", "balance 1")
    return Claim(
        f"With curvature at tempered logits kappa = 1 suffices ({name})",
        "open question of our prototypes",
        ran(one),
        gain,
        error,
        verdict(gain <= 0.8 * whole),
        f"mean ratio to vanilla minus that of balance 1; kappa 10 gains {whole:.3f}, "
        "and four fifths of that count",
    )


def _swap(one: MapResults) -> Claim:
    at = one.map.regimes.index("swap")
    base = final_of(one, "vanilla")[:, at]
    gaps = {
        n: base - final_of(one, n)[:, at]
        for n in one.matched
        if n != "vanilla" and not n.startswith("raw")
    }
    best = max(gaps, key=lambda n: gaps[n].mean())
    gap = 100 * gaps[best]
    mean, error = gap.mean(), gap.std(ddof=1) / np.sqrt(len(gap))
    return Claim(
        "When labels contradict each other, nothing helps by more than a point",
        SOURCE,
        ran(one),
        float(mean),
        float(error),
        verdict(bool(mean <= 1 + NOISE * error)),
        f"points of accuracy over vanilla in swap, of the best of {len(gaps)} arms on "
        f"these very seeds, {best}",
    )


def _learns_less(one: MapResults) -> Claim:
    gap = one.fixed["post 1"].learning - one.fixed["vanilla"].learning
    at = int(gap.mean(0).argmax())
    mean = 100 * gap[:, at].mean()
    error = 100 * gap[:, at].std(ddof=1) / np.sqrt(len(gap))
    return Claim(
        "A strict projection stops learning where overlap is high",
        SOURCE,
        ran(one, "fixed"),
        float(mean),
        float(error),
        verdict(bool(mean > 5 and mean > NOISE * error)),
        f"points of error right after learning, post 1 minus vanilla, in "
        f"{one.map.regimes[at]}; five points count",
    )
