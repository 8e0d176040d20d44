"""A Llama decoder in float64 NumPy, one token and head at a time, and made-up files.

Weights are a dictionary in the names and the ``[out, in]`` layout of Hugging Face.
"""

import json

import numpy as np
from safetensors.numpy import save_file

from tests.experiments import gguf_files

LAYER = "model.layers.{}."
HF_TO_GGUF = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def weights(config, seed=0):
    rng = np.random.default_rng(seed)
    d, hidden, kv = config.width, config.hidden, config.kv_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (hidden, d),
        "mlp.up_proj": (hidden, d),
        "mlp.down_proj": (d, hidden),
    }
    out = {"model.embed_tokens.weight": rng.normal(size=(config.vocabulary, d))}
    for i in range(config.layers):
        for name, shape in shapes.items():
            scaled = 1.5 * rng.normal(size=shape) / np.sqrt(shape[1])
            out[f"{LAYER.format(i)}{name}.weight"] = scaled
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"{LAYER.format(i)}{name}.weight"] = rng.uniform(0.5, 2.0, d)
    out["model.norm.weight"] = rng.uniform(0.5, 2.0, d)
    return {name: w.astype(np.float32) for name, w in out.items()}


def logits(config, w, tokens, *, interleaved=False):
    """``tokens`` [time]; ``interleaved`` turns coordinates 2j and 2j + 1 together."""
    w = {name: value.astype(np.float64) for name, value in w.items()}
    size, group = config.head_dim, config.heads // config.kv_heads
    frequencies = [config.rope_theta ** (-2 * j / size) for j in range(size // 2)]

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x) + config.norm_eps) * scale

    def rotate(x, position):
        x = x.copy()
        for j, frequency in enumerate(frequencies):
            at = (2 * j, 2 * j + 1) if interleaved else (j, j + size // 2)
            turned = complex(x[at[0]], x[at[1]]) * np.exp(1j * position * frequency)
            x[at[0]], x[at[1]] = turned.real, turned.imag
        return x

    stream = [w["model.embed_tokens.weight"][token] for token in tokens]
    for i in range(config.layers):
        p = {
            name.removeprefix(LAYER.format(i)).removesuffix(".weight"): value
            for name, value in w.items()
            if name.startswith(LAYER.format(i))
        }
        queries, keys, values = [], [], []
        for t, x in enumerate(stream):
            x = norm(x, p["input_layernorm"])
            q = (p["self_attn.q_proj"] @ x).reshape(config.heads, size)
            k = (p["self_attn.k_proj"] @ x).reshape(config.kv_heads, size)
            queries.append([rotate(head, t) for head in q])
            keys.append([rotate(head, t) for head in k])
            values.append((p["self_attn.v_proj"] @ x).reshape(config.kv_heads, size))
        for t in range(len(stream)):
            heads = []
            for h in range(config.heads):
                scores = [queries[t][h] @ keys[s][h // group] for s in range(t + 1)]
                shares = np.exp(np.array(scores) / np.sqrt(size))
                shares /= shares.sum()
                heads.append(
                    sum(a * values[s][h // group] for s, a in enumerate(shares))
                )
            x = stream[t] + p["self_attn.o_proj"] @ np.concatenate(heads)
            normed = norm(x, p["post_attention_layernorm"])
            gate = p["mlp.gate_proj"] @ normed
            gated = gate / (1 + np.exp(-gate)) * (p["mlp.up_proj"] @ normed)
            stream[t] = x + p["mlp.down_proj"] @ gated
    final = [norm(x, w["model.norm.weight"]) for x in stream]
    return np.stack([w["model.embed_tokens.weight"] @ x for x in final])


def write_hf(folder, config, w, **stated):
    """A folder as Hugging Face writes it, the tensors shared out over two files."""
    folder.mkdir(exist_ok=True)
    entries = {
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        **stated,
    }
    (folder / "config.json").write_text(json.dumps(entries))
    names = sorted(w)
    for part, chosen in enumerate((names[::2], names[1::2])):
        save_file({n: w[n] for n in chosen}, folder / f"model-{part}.safetensors")
    return folder


def gguf_weights(config, w):
    """Names of llama.cpp, and its order of the q and k rows: pairs side by side."""
    out = {}
    for name, value in w.items():
        renamed = name.replace("model.embed_tokens", "token_embd")
        renamed = renamed.replace("model.norm", "output_norm")
        renamed = renamed.replace("model.layers.", "blk.")
        for hf, ggml in HF_TO_GGUF.items():
            renamed = renamed.replace(hf, ggml)
        out[renamed] = value
        if ".attn_q." in renamed or ".attn_k." in renamed:
            half = config.head_dim // 2
            order = [
                head * config.head_dim + j + side * half
                for head in range(len(value) // config.head_dim)
                for j in range(half)
                for side in (0, 1)
            ]
            out[renamed] = value[order]
    return out


def gguf_entries(config):
    whole = {
        "block_count": config.layers,
        "embedding_length": config.width,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "feed_forward_length": config.hidden,
        "context_length": config.context,
        "rope.dimension_count": config.head_dim,
    }
    real = {
        "rope.freq_base": config.rope_theta,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    }
    return {
        "general.architecture": (gguf_files.STRING, "llama"),
        **{f"llama.{k}": (gguf_files.U32, v) for k, v in whole.items()},
        **{f"llama.{k}": (gguf_files.FLOAT, v) for k, v in real.items()},
    }


def write_gguf(path, config, w, entries=None):
    tensors = {name: gguf_files.f32(x) for name, x in gguf_weights(config, w).items()}
    path.write_bytes(gguf_files.build(gguf_entries(config) | (entries or {}), tensors))
    return path
