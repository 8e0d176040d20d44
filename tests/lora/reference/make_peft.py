"""Writes the PEFT files beside it with the peft package, and reads ours with it.

    python make_peft.py

needs torch and peft (the files were written with the versions in ``versions.json``).
Each folder holds an adapter as peft saved it, and ``expected.npz``: the base weights,
inputs, and what the adapted model answers to them.
"""

import json
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
SETTINGS = {
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "o_proj", "head"],
        "rank_pattern": {"head": 1, "layers.1.o_proj": 3},
        "alpha_pattern": {"head": 3},
    },
    "rslora": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": r"layers\.\d+\.(q_proj|o_proj)",
        "use_rslora": True,
    },
}


def network():
    """Two residual layers and a head, with weights from a fixed seed."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(6, 5, bias=False)
            self.o_proj = nn.Linear(5, 6, bias=False)

        def forward(self, x):
            return x + self.o_proj(torch.tanh(self.q_proj(x)))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(6, 3, bias=False)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    torch.manual_seed(0)
    return Network()


def answers(directory):
    """The weights, inputs and outputs of the model with the adapter in a directory."""
    import torch
    from peft import PeftModel

    base = network()
    weights = {name: w.detach().numpy().copy() for name, w in base.named_parameters()}
    model = PeftModel.from_pretrained(base, str(directory))
    inputs = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)
    with torch.no_grad():
        outputs = model(torch.from_numpy(inputs)).numpy()
    return {**weights, "inputs": inputs, "outputs": outputs}


def main():
    import peft
    import torch

    for name, settings in SETTINGS.items():
        folder = HERE / f"peft_{name}"
        model = network()
        torch.manual_seed(1)
        config = peft.LoraConfig(init_lora_weights=False, **settings)
        peft.get_peft_model(model, config).save_pretrained(folder)
        (folder / "README.md").unlink()
        np.savez_compressed(folder / "expected.npz", **answers(folder))
    versions = {"peft": peft.__version__, "torch": torch.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    main()
