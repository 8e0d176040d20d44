"""The claims that the regime map can test."""

from collections.abc import Sequence

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
from experiments.studies._regime_claims_digits import digit_claims
from experiments.studies._regime_results import MapResults

# The curves of rules compared with each other; placement and rank are the same.
_RULES = (
    "max 0.25",
    "max 0.5",
    "max 0.75",
    "max 0.9",
    "one_minus .5",
    "proportional 1",
    "ratchet 0.75",
    "balance 1",
    "spring 1",
)


def claims(maps: Sequence[MapResults]) -> list[Claim]:
    """All claims whose arms were run."""
    regression = [one for one in maps if one.map.part == "regression"]
    digits = [one for one in maps if one.map.part == "digits"]
    found: list[Claim] = []
    if regression:
        found += _regression(regression)
    if digits:
        found += digit_claims(digits)
    found.append(
        Claim(
            "On a language model balance is the best strength between 0 and 1",
            SOURCE,
            "-",
            None,
            None,
            "not testable here",
            "see the study domain_stream",
        )
    )
    return found


def _regression(maps: list[MapResults]) -> list[Claim]:
    main = maps[0]
    found = [
        never_worse(one, "balance 1", which)
        for which in ("matched", "fixed")
        for one in maps
    ]
    found += [against_oracle(one, "balance 1") for one in maps]
    found.append(_near_bottom(main))
    found.append(
        less(
            main,
            "ratchet 0.75",
            "proportional 1",
            "A gate on the displacement beats a strength that follows the overlap",
        )
    )
    found.append(
        less(main, "spring 1", "balance 1", "spring is a hair better than balance")
    )
    found.append(
        less(
            main,
            "max 0.5",
            "shared 0.5",
            "Decoupled routing of a fixed strength beats shared routing",
        )
    )
    found.append(_kappas(main))
    found.append(_per_learning(main))
    found += _replay(main)
    found += _lengths(maps)
    return found


def _near_bottom(one: MapResults) -> Claim:
    base = final_of(one, "vanilla")
    names = [n for n in _RULES if n in one.matched]
    means = {n: results.mean_ratio(final_of(one, n), base) for n in names}
    order = sorted(names, key=lambda n: means[n][0])
    place = order.index("one_minus .5") + 1
    mean, error = means["one_minus .5"]
    return Claim(
        "one_minus is near the bottom: it takes protection away where overlap is high",
        SOURCE,
        ran(one),
        mean,
        error,
        verdict(place > len(names) - 3),
        f"mean ratio to vanilla; place {place} of {len(names)} strengths and rules "
        f"before the moments, the best is {order[0]} with {means[order[0]][0]:.3f}",
    )


def _kappas(one: MapResults) -> Claim:
    base = final_of(one, "vanilla")
    worst, name, at = max(
        (
            (float(results.ratio(final_of(one, n), base)[0][i]), n, i)
            for n in ("balance 0.3", "balance 1", "balance 3")
            for i in range(len(one.map.regimes))
        ),
        key=lambda entry: entry[0],
    )
    error = float(results.ratio(final_of(one, name), base)[1][at])
    return Claim(
        "For kappa from .3 to 3 no regime is more than 2 % worse than vanilla",
        SOURCE,
        ran(one),
        worst,
        error,
        verdict(worst <= 1.02),
        f"largest ratio: {name} in {one.map.regimes[at]}",
    )


def _per_learning(one: MapResults) -> Claim:
    ours, theirs = one.fixed["balance 0.3"], one.fixed["max 0.5"]
    learning = (ours.learning - theirs.learning).mean(1)
    forgetting = (ours.forgetting - theirs.forgetting).mean(1)
    count = np.sqrt(len(learning))
    mean, error = forgetting.mean(), forgetting.std(ddof=1) / count
    side, side_error = learning.mean(), learning.std(ddof=1) / count
    holds = mean < -NOISE * error and side <= 0.1 * theirs.learning.mean()
    return Claim(
        "balance .3 learns as well as a constant of .5, and forgets less",
        SOURCE,
        ran(one, "fixed"),
        float(mean),
        float(error),
        verdict(bool(holds)),
        f"difference of forgetting; of the loss right after learning "
        f"{side:+.3f} ± {side_error:.3f} (at most a tenth more counts as as well)",
    )


def _replay(one: MapResults) -> list[Claim]:
    names = [n for n in one.matched if n != "vanilla" and not n.startswith("replay")]
    low = [i for i, r in enumerate(one.map.regimes) if not r.endswith("0.9")]
    [high] = [i for i, r in enumerate(one.map.regimes) if r == "conflict 0.9"]
    replay = final_of(one, "replay 0.8")
    gaps = []
    for i in low:
        # The best rule of the regime, chosen in its favour on these very seeds.
        best = min(names, key=lambda n: final_of(one, n)[:, i].mean())
        gap = replay[:, i] - final_of(one, best)[:, i]
        error = gap.std(ddof=1) / np.sqrt(len(gap))
        gaps.append((gap.mean(), error, one.map.regimes[i], best))
    mean, error, regime, best = max(gaps, key=lambda g: g[0])
    gap = final_of(one, "balance 1")[:, high] - replay[:, high]
    balance, balance_error = gap.mean(), gap.std(ddof=1) / np.sqrt(len(gap))
    return [
        Claim(
            "Replay of 64 examples a task beats every rule at overlaps up to .5",
            SOURCE,
            ran(one),
            float(mean),
            float(error),
            verdict(bool(mean < -NOISE * error)),
            f"its least lead: {regime}, over {best}",
        ),
        Claim(
            "With conflict at overlap .9 balance is level with replay, or better",
            SOURCE,
            ran(one),
            float(balance),
            float(balance_error),
            verdict(bool(balance <= NOISE * balance_error)),
            "final loss of balance 1 minus that of replay",
        ),
    ]


def _lengths(maps: list[MapResults]) -> list[Claim]:
    by = {(one.map.steps, one.map.rank): one for one in maps}
    steps = sorted({s for s, _ in by})
    ranks = sorted({r for _, r in by})
    found = []
    if len(steps) > 1:
        short, long = steps[0], steps[-1]
        for name in ("max 0.5", "max 0.75"):
            pair = by[short, ranks[0]], by[long, ranks[0]]
            found += [
                _kept(*pair, name, which, keeps=False) for which in ("fixed", "matched")
            ]
        for rank in ranks:
            pair = by[short, rank], by[long, rank]
            found += [
                _kept(*pair, "balance 1", which, keeps=True)
                for which in ("fixed", "matched")
            ]
    if len(ranks) > 1:
        low, high = by[steps[-1], ranks[0]], by[steps[-1], ranks[-1]]
        few = _gain(low, "balance 1", "matched")
        many = _gain(high, "balance 1", "matched")
        rules = gap_of(high, "balance 1", "max 0.75")
        gain = many[0] - few[0]
        error = float(np.hypot(few[1], many[1]))
        found.append(
            Claim(
                "Once training is long, the rank matters more than the rule",
                SOURCE,
                f"{ran(high)}, against rank {ranks[0]}",
                gain,
                error,
                verdict(gain > abs(rules[0])),
                f"what the higher rank takes off balance's mean ratio; balance instead "
                f"of max .75 at the higher rank takes off {-rules[0]:.3f} ± "
                f"{rules[1]:.3f}",
            )
        )
    return found


def _gain(one, name, which):
    mean, error = results.mean_ratio(
        final_of(one, name, which), final_of(one, "vanilla", which)
    )
    return 1 - mean, error


def _kept(short, long, name, which, *, keeps) -> Claim:
    before, before_error = _gain(short, name, which)
    after, after_error = _gain(long, name, which)
    share = after / before
    error = abs(share) * np.hypot(before_error / before, after_error / (after or 1e-9))
    times = long.map.steps / short.map.steps
    if keeps:
        text = f"{name} keeps its gain when tasks are {times:g} times as long"
        holds = share >= 0.5
    else:
        text = f"A constant only delays: {name} loses its gain at {times:g} times"
        holds = share < 0.5
    return Claim(
        text,
        SOURCE,
        ran(long, which),
        float(share),
        float(error),
        verdict(bool(holds)),
        f"gain (1 - mean ratio) there over gain at {short.map.steps} steps, "
        f"{after:.3f} / {before:.3f}; the line is drawn at one half",
    )
