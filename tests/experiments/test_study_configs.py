"""What every study with tuning seeds refuses, before anything is written."""

import pytest

from experiments import cli, studies
from experiments.studies import _configs as configs

WITH_TUNING = ["classic_digits", "lora_digits", "lora_text", "regime_map"]
# An arm of those that let one choose.
ARMS = {"classic_digits": "Progressive", "lora_digits": "EBLoRA", "lora_text": "EBLoRA"}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", WITH_TUNING)
def test_tuning_and_reporting_seeds_are_disjoint(name, quick):
    config = cli.make_config(studies.get(name).Config, quick=quick, given={})
    tuning, reported = configs.seeds(config)
    assert reported and (tuning or quick)
    assert not set(tuning) & set(reported)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_seed": 0, "seeds": 2}, r"seeds \[0.*\] would .* `--first-seed`"),
        ({"rates": (0.1, 0.1)}, "`--rates` names a value twice"),
    ],
    ids=["a seed in both roles", "a rate twice"],
)
@pytest.mark.parametrize("name", WITH_TUNING)
def test_settings_that_make_no_sense_are_refused_by_name(name, changes, message):
    study = studies.get(name)
    if name == "regime_map":
        changes = {"fixed_rate": 0.1, **changes}
    with pytest.raises(ValueError, match=message):
        study.check(study.Config(**changes))


@pytest.mark.parametrize("name", ARMS)
def test_unknown_arms_and_arms_given_twice_are_refused(name):
    study, arm = studies.get(name), ARMS[name]
    with pytest.raises(ValueError, match=f"knows no '{arm}s'; did you mean {arm}"):
        study.check(study.Config(arms=(f"{arm}s",)))
    with pytest.raises(ValueError, match="`--arms` names a value twice"):
        study.check(study.Config(arms=(arm, arm)))


def test_missing_images_are_told_before_a_run(monkeypatch):
    monkeypatch.setattr(configs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the part `x` .* `pip install scikit-learn`"):
        configs.check_digits("the part `x`")
