"""Writes smollm2.json: what Hugging Face's transformers computes on the same GGUF file.

    python make_smollm2_logits.py SmolLM2-135M-Instruct.Q4_1.gguf

Needs `torch`, `transformers`, `gguf` and `accelerate`, which no quick test needs;
the file was made with the versions it names. Transformers dequantises the weights,
undoes llama.cpp's order of the q and k rows, cuts and merges the text and runs the
model, all in float32 on a CPU. llama.cpp (cyllama 0.2.18) cuts and merges every text
here into the same tokens.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SENTENCES = {
    "biology": (
        "The mitochondrion is an organelle that generates most of the chemical energy "
        "needed to power the biochemical reactions of the cell."
    ),
    "novel": (
        "Call me Ishmael. Some years ago, never mind how long precisely, having little "
        "or no money in my purse, I thought I would sail about a little."
    ),
    "code": "def add(a, b):\n    return a + b\n\nprint(add(12, 345))  # -> 357\n",
}
# Only for the tokenizer: digits, runs of spaces, other scripts, control tokens.
TEXTS = [
    "",
    " leading and  double   spaces\t\n\n",
    "In 1984, 3.14159 x 10^23 wasn't 007's number; they'll say we've 12345.",
    "Füße, naïve café, Ελληνικά, 日本語, 🙂🚀",
    "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n",
    "CamelCase snake_case $x^{2}$ https://example.org/?q=1&r=2",
]
PACKAGES = ("torch", "transformers", "gguf")
TOP = 5
CONTINUE = ("The capital of France is", 16)


def main(path: Path) -> None:
    """Runs the model and writes the file beside this one."""
    source = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, **source
    ).eval()
    reference = {
        "made_with": {name: version(name) for name in PACKAGES},
        "tokens": [{"text": t, "ids": tokenizer(t)["input_ids"]} for t in TEXTS],
        "logits": {name: run(model, tokenizer, t) for name, t in SENTENCES.items()},
        "greedy": greedy(model, tokenizer, *CONTINUE),
    }
    out = Path(__file__).with_name("smollm2.json")
    text = json.dumps(reference, ensure_ascii=False, indent=None)
    out.write_text(text + "\n", encoding="utf-8")


def run(model, tokenizer, text):
    """The likeliest tokens at every position, their logits, and each token's loss."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits[0]
    top = logits.topk(TOP, dim=-1)
    losses = torch.nn.functional.cross_entropy(
        logits[:-1], ids[0, 1:], reduction="none"
    )
    rounded = lambda values: [float(f"{x:.7g}") for x in values]  # noqa: E731
    return {
        "text": text,
        "ids": ids[0].tolist(),
        "top_ids": top.indices.tolist(),
        "top_logits": [rounded(row) for row in top.values.tolist()],
        "losses": rounded(losses.tolist()),
    }


def greedy(model, tokenizer, prompt, steps):
    """The likeliest continuation."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(
        ids, max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    added = out[0, ids.shape[1] :].tolist()
    return {"text": prompt, "ids": ids[0].tolist(), "added": added}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
