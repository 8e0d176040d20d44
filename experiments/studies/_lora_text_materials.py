"""The arrays of both streams of text, from tasks and the pre-trained model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import data, run_folder
from experiments.models import llama, smollm2
from experiments.studies import _lora_text_data as text
from experiments.studies import _lora_text_generation as free
from experiments.studies import _lora_text_mining as mining

TRUNK = "trunk"  # folder of what enters the adapted layers, while a run lasts
_RANK = 8
_EXAMPLES = 32  # that a start or a memory reads, of each task
_GENERAL_WINDOWS = 32
_WARM_RATE = 1e-4  # of the kernels, while they learn to answer yes or no


class Materials(NamedTuple):
    """What the arrays of both streams are made from.

    Attributes:
      model: The whole pre-trained model.
      size: The sizes of the study.
      kernels: Which kernels are adapted in each layer that is.
      folder: The run folder.
      say: Takes a line on how far it is.
    """

    model: smollm2.SmolLM2
    size: dict[str, int]
    kernels: tuple[str, ...]
    folder: Path
    say: Callable[[str], None]

    def data(self, name, tasks, train, test):
        """Settings and arrays of some tasks, at the pre-trained weights."""
        size, whole = self.size, self.model.config
        answer = free.Answer(size["answer"], self.model.stop)
        form = text.Form(self.model.tokenizer, size["length"], answer)
        try:
            words, *parts = text.encode(tasks, form, train, test)
        except ValueError as error:
            raise run_folder.RunError(str(error)) from error
        last, params = llama.last_layers(whole, self.model.params, size["layers"])
        pattern = f"layers/({'|'.join(self.kernels)})/kernel"
        settings = text.Settings(
            last, pattern, _RANK, size["batch"], len(tasks), _EXAMPLES, answer
        )
        writer = free.make_writer(
            self.model.params, size["layers"], tasks, parts[1].inputs, parts[1].where
        )
        parts.append(text.windows(data.load_stream("mini8"), form, _GENERAL_WINDOWS))
        self.say(f"{name}: texts go through the layers that are not adapted")
        train, test, general = (
            text.read(
                whole,
                self.model.params,
                part,
                size["layers"],
                self.folder / TRUNK / f"{name}-{i}.npy",
            )
            for i, part in enumerate(parts)
        )
        no_order = np.zeros([1, 1], np.int32)
        arrays = text.Data(
            *text.split(params, pattern), words, train, test, general, no_order, writer
        )
        return settings, arrays

    def mined(self, tasks, tuning, reported):
        """The pairs of least cosine after the format was learnt; leaves a record."""
        pool = mining.yes_no_pool(tasks)
        settings, arrays = self.data("pool", pool, *_fewest(pool, _EXAMPLES, 1))
        warm, losses = mining.warm_up(settings, arrays, self.size["warm"], _WARM_RATE)
        record: dict[str, Any] = {
            "names": [task.name for task in pool],
            "losses": losses,
        }
        for when, adapted in (("before", arrays.adapted), ("after", warm)):
            at = arrays._replace(adapted=adapted)
            record[when] = {
                "cosines": mining.mine(settings, at, _EXAMPLES),
                "general": mining.general_loss(settings, at),
                **mining.odds(settings, at)._asdict(),
            }
        cosines = record["after"]["cosines"]
        pairs = mining.conflicting_pairs(cosines, tuning + reported)
        record["pairs"] = pairs[:reported]
        run_folder.write_json(self.folder / "mined.json", record)
        # Those of least cosine are reported.
        pairs = np.concatenate([pairs[reported:], pairs[:reported]])
        chosen = tuple(pool[i] for i in pairs.flat)
        counts = _fewest(chosen, self.size["train"], self.size["test"])
        settings, arrays = self.data("mined", chosen, *counts)
        order = np.arange(pairs.size, dtype=np.int32).reshape(pairs.shape)
        return settings, arrays._replace(adapted=warm, order=order)


def _fewest(tasks, train, test):
    """Texts of each part, as many as asked for or as the shortest task has."""
    fewest = (min(len(getattr(t, part)) for t in tasks) for part in ("train", "test"))
    return tuple(map(min, fewest, (train, test)))
