"""The byte-pair tokenizer that a GGUF file carries in its metadata."""

from collections.abc import Mapping
from typing import Any

from experiments.data import DataError

# Which text is cut where before the merges is known by name only: a table per name.
_DIGITS_APART = {"smollm"}
_CONTROL = 3


def from_metadata(
    metadata: Mapping[str, Any], vocabulary: int, *, source: str = "the GGUF file"
) -> Any:
    """Builds the tokenizer of a model file.

    Text is cut into digits, words, punctuation and spaces, written in the printable
    alphabet of GPT-2's bytes, and merged. Control tokens like ``<|im_start|>`` are
    recognised in the text and left out when tokens are decoded.

    Args:
      metadata: The metadata of ``gguf.read``.
      vocabulary: How many tokens the model has.
      source: The file's name, for messages.

    Returns:
      A ``tokenizers.Tokenizer``: ``encode(text).ids`` and ``decode(ids)``.

    Raises:
      DataError: If the metadata hold no tokenizer of this kind, a damaged one, or one
        of another vocabulary.
      ImportError: If the package ``tokenizers`` is missing.

    References:
      Sennrich et al., `Neural Machine Translation of Rare Words with Subword Units
      <https://arxiv.org/abs/1508.07909>`_, 2016
    """
    try:
        from tokenizers import (
            AddedToken,
            Tokenizer,
            decoders,
            models,
            pre_tokenizers,
        )
    except ImportError as error:
        raise ImportError(
            "The tokenizer needs the package `tokenizers`: "
            "`pip install 'optax-cl[experiments]'`."
        ) from error
    kind = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind[0] != "gpt2" or kind[1] not in _DIGITS_APART:
        raise DataError(
            f"{source} has a tokenizer of the kind {kind}; read is 'gpt2' with one of "
            f"{sorted(_DIGITS_APART)}."
        )
    tokens, kinds, merges = (
        metadata.get(f"tokenizer.ggml.{key}")
        for key in ("tokens", "token_type", "merges")
    )
    if not tokens or not merges or not kinds or len(kinds) != len(tokens):
        raise DataError(f"{source} is damaged: its tokenizer lacks tokens or merges.")
    if len(tokens) != vocabulary:
        raise DataError(
            f"{source} has a tokenizer of {len(tokens)} tokens, but the model has "
            f"{vocabulary}: they don't belong together."
        )
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise DataError(f"{source} is damaged: its tokenizer lists a token twice.")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or any(part not in ids for part in (*pair, "".join(pair))):
            raise DataError(
                f"{source} is damaged: its tokenizer has the merge {' '.join(pair)!r}, "
                "which doesn't make a token out of two."
            )
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in control]
    )
    return tokenizer
