"""Every study's train step lowers for accelerators that are not here.

Of each study every family of arms is lowered, at a tiny size: all four functions that
the engine compiles. Nothing runs, so networks that would have to be trained first are
shapes alone.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from experiments import data, studies
from experiments.models import llama
from experiments.studies import (
    _classic_arms,
    _classic_data,
    _classic_program,
    _lora_arms,
    _lora_data,
    _lora_program,
    _lora_text_data,
    _regime_arms,
    _regime_digits,
    _regime_program,
    _regime_regression,
    _stream_arms,
    _stream_program,
    _sweep_cases,
    _sweep_program,
)
from tests.experiments import tiny_stream

PLATFORMS = ("cpu", "cuda", "tpu")
STEPS = 3


def one_lane(lanes):
    return jax.tree.map(lambda x: x[0], lanes)


def domain_stream(family, tmp_path):
    stream = data.load_stream(tiny_stream.write_texts(tmp_path))
    arrays = _stream_program.make_data(stream, tiny_stream.TINY.context, 8, 3)
    arm = next(a for a in _stream_arms.ARMS.values() if a.family == family)
    made = _stream_program.make_program(
        _stream_arms.FAMILIES[family], tiny_stream.SETTINGS
    )
    return made, arrays, tiny_stream.lane(arrays, arm)


def alpha_sweep(tmp_path):
    config = _sweep_cases.Config(seeds=2, dim=8, rank=2, steps=501)
    lane = one_lane(_sweep_cases.lanes(config))
    return _sweep_program.program(config), _sweep_cases.rotated_bases(config), lane


def regime_map(bench, routing, tmp_path):
    settings = _regime_program.Settings((1e-3, 1e-2), STEPS, rank=2, collect_batches=2)
    made = _regime_program.make_program("tiny", bench.BENCHMARK, routing, settings)
    arm = next(a for a in _regime_arms.ARMS.values() if a.routing == routing)
    lane = one_lane(_regime_program.make_lanes([arm], (0,)))
    return made, bench.make_data((0,)), lane


def classic_digits(name, tmp_path):
    method = _classic_arms.METHODS[name]
    setting = _classic_arms.Setting(method.scenarios[0], method.strengths[0], 1e-2)
    lane = one_lane(_classic_arms.make_lanes([setting], {5: 0}))
    made = _classic_program.make_program(method, name, STEPS)
    return made, _classic_data.make_data((0,)), lane


def adapter_lane(family, streams):
    arm = next(a for a in _lora_arms.ARMS.values() if a.family == family)
    return one_lane(_lora_arms.make_lanes([(arm, streams[0])], streams, (1e-2,), (5,)))


def lora_digits(family, tmp_path):
    images, labels = (np.stack([x]) for x in _lora_data._stream(0))
    base = jax.eval_shape(
        _lora_data._train_base, images[:, 0], labels[:, 0, 0], np.zeros(1, np.int32)
    )
    made = _lora_program.make_program(
        _lora_data.BENCH, _lora_arms.FAMILIES[family], STEPS
    )
    lane = adapter_lane(family, _lora_data.STREAMS)
    return made, _lora_data.Data(images, labels, base), lane


def lora_text(family, tmp_path):
    config, examples, length, tasks = llama.LlamaConfig.tiny(), 8, 16, 2
    weights = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), llama.abstract_params(config)
    )
    last, params = llama.last_layers(config, weights, 2)
    settings = _lora_text_data.Settings(
        last, r"layers/(q|k|v|o)/kernel", 2, 4, tasks, examples
    )

    def asked(*shape):
        """Streams that enter the adapted layers, and one place that is asked for."""
        return _lora_text_data.Examples(
            np.zeros([*shape, length, config.width], np.float32),
            np.zeros([*shape, 1], np.int32),
            np.zeros([*shape, 1], np.int32),
            np.zeros(shape, np.int32),
        )

    arrays = _lora_text_data.Data(
        *_lora_text_data.split(params, settings.pattern),
        np.zeros([tasks, 2], np.int32),
        asked(tasks, examples),
        asked(tasks, examples),
        asked(3),
        np.array([[0, 1]], np.int32),
    )
    made = _lora_program.make_program(
        _lora_text_data.make_bench(settings), _lora_arms.FAMILIES[family], STEPS
    )
    return made, arrays, adapter_lane(family, _lora_text_data.STREAMS)


CASES = {
    "alpha_sweep": alpha_sweep,
    **{f"domain_stream-{f}": partial(domain_stream, f) for f in _stream_arms.FAMILIES},
    **{
        f"regime_map-{name}-{routing}": partial(regime_map, bench, routing)
        for name, bench in {
            "regression": _regime_regression,
            "digits": _regime_digits,
        }.items()
        for routing in dict.fromkeys(a.routing for a in _regime_arms.ARMS.values())
    },
    **{
        f"classic_digits-{m}": partial(classic_digits, m) for m in _classic_arms.METHODS
    },
    **{f"lora_digits-{f}": partial(lora_digits, f) for f in _lora_arms.FAMILIES},
    **{f"lora_text-{f}": partial(lora_text, f) for f in _lora_arms.FAMILIES},
}
FEW = ("alpha_sweep", "domain_stream-balance-max")


def lower(function, *args):
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*args)
    assert exported.platforms == PLATFORMS


def check_study(name, folder):
    task = step = jnp.int32(0)
    # As in a run from the command line.
    with jax.numpy_rank_promotion("allow"):
        made, arrays, lane = CASES[name](folder)
        carry = jax.eval_shape(made.init, arrays, lane)
        lower(made.init, arrays, lane)
        lower(made.step, arrays, lane, carry, task, step)
        lower(made.boundary, arrays, lane, carry, task)
        lower(made.evaluate, arrays, lane, carry)


@pytest.mark.parametrize("name", FEW)
def test_a_study_lowers_for_every_platform(name, tmp_path):
    check_study(name, tmp_path / "texts")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in FEW])
def test_every_study_lowers_for_every_platform(name, tmp_path):
    check_study(name, tmp_path / "texts")


def test_no_study_is_left_out():
    assert {name.split("-")[0] for name in CASES} == set(studies.names())
