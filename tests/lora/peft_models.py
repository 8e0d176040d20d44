"""The models whose adapters `peft` wrote to `reference`, and adapters of our own."""

import pathlib

import jax
import numpy as np

from optax_cl import lora

REFERENCE = pathlib.Path(__file__).parent / "reference"
PATTERNS = {"1/o_proj": 3, "proj": 2, "head": 1}
# Compiled as one function: quicker than its operations one by one.
lora_init = jax.jit(lora.lora_init)


def tree(weights):
    """PyTorch weights ``[out, in]`` by name as a tree of kernels ``[in, out]``."""
    params = {"layers": {"0": {}, "1": {}}, "head": {}}
    for name, weight in weights.items():
        *parts, _ = name.split(".")
        node = params
        for part in parts:
            node = node.setdefault(part, {})
        node["kernel"] = weight.T
    return params


def forward(params, x):
    params = jax.tree.map(np.asarray, params)
    for layer in ("0", "1"):
        block = params["layers"][layer]
        h = np.tanh(x @ block["q_proj"]["kernel"])
        x = x + h @ block["o_proj"]["kernel"]
    return x @ params["head"]["kernel"]


def reference(name):
    """Parameters, inputs and outputs of the model that peft adapted."""
    arrays = dict(np.load(REFERENCE / f"peft_{name}" / "expected.npz"))
    x, y = arrays.pop("inputs"), arrays.pop("outputs")
    return tree(arrays), x, y


def small():
    """Targets of unequal ranks with random adapters, for a model of two layers."""
    params, _, _ = reference("patterns")
    targets = lora.targets(params, PATTERNS, alpha=4.0)
    start = lora_init(targets, params, jax.random.key(0)).adapters
    adapters = {p: x._replace(b=np.ones_like(x.b) / 3) for p, x in start.items()}
    return params, targets, adapters
