"""The domain stream at a size for tests: a tiny model, and texts made of few letters.

Run as a script it is the real command line with this size in place of ``small``.
"""

import sys

import numpy as np

from experiments import cli
from experiments.models import byte_lm
from experiments.studies import _stream_program as program
from experiments.studies import domain_stream as study
from tests.experiments import toy

TINY = byte_lm.ByteLMConfig(layers=1, width=8, heads=1, hidden=8, context=8)
TASKS, STEPS, BATCH, MEMORY = 3, 5, 4, 6
SETTINGS = program.Settings(
    model=TINY,
    common=program.Common(b2=0.99, rank=2),
    tasks=TASKS,
    steps=STEPS,
    batch=BATCH,
    memory=MEMORY,
    collect_batches=2,
)
SIZE = study.Size(TINY, BATCH, STEPS, learning_rate=1e-2, b2=0.99, rank=2)
TEXTS = {
    "digits": b"0123456789",
    "lower": b"abcdefgh ",
    "upper": b"ABCDEFGH ",
    "x": b"xyz",
}


def alphabet(letters, seed):
    """A text whose letters say which domain it is."""
    drawn = np.random.default_rng(seed).integers(0, len(letters), 12_000)
    return bytes(letters[i] for i in drawn)


def write_texts(folder):
    """A folder with one text for each domain."""
    folder.mkdir(exist_ok=True)
    for seed, (name, letters) in enumerate(TEXTS.items()):
        (folder / f"{name}.txt").write_bytes(alphabet(letters, seed))
    return folder


def lane(arrays, arm, order=(2, 0, 3), seed=7, rate=1e-2):
    """One arm on one seed."""
    return program.Lane(
        seed=np.int32(seed),
        order=np.array(order, np.int32),
        learning_rate=np.float32(rate * arm.learning_rate),
        strength=np.float32(arm.strength),
        joint=np.bool_(arm.joint),
        digest=np.uint32(program.digest(arrays)),
    )


if __name__ == "__main__":
    toy.slow_down_if_asked()
    study.SIZES["small"] = SIZE
    study._COLLECT_BATCHES = SETTINGS.collect_batches
    sys.exit(cli.main())
