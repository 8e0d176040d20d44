"""A whole training step of a language model: EBLoRA against plain LoRA with AdamW.

The sizes are SmolLM2-135M's, its weights random (they don't change the time). Adapters
of rank 16 stand on the attention kernels of all 30 layers; a batch is one text of 128
tokens, or the eight of 48 that the study `lora_text` trains on. What EBLoRA adds to an
optimizer step has to vanish beside the model.
"""

import jax
import jax.numpy as jnp
import optax

import optax_cl
from benchmarks import timing
from benchmarks.timing import Row
from experiments.models import llama
from optax_cl import lora

RANK, BUDGET = 16, 1.05
BATCHES = ((1, 128), (8, 48))
PATTERN = r"layers/(q|k|v|o)/kernel"


def rows(pairs: int) -> list[Row]:
    """Rows without a memory and with one of 64 directions a kernel.

    Args:
      pairs: How often each step is timed, in turn with plain LoRA's.
    """
    config = llama.LlamaConfig.smollm2_135m()
    params = llama.init(config, jax.random.key(0))
    targets = lora.targets(
        params,
        {PATTERN: RANK},
        alpha=2.0 * RANK,
        matrices=optax_cl.matrix_views(stacked="layers", embeddings="skip"),
    )

    def make(tx, adapters, tokens):
        def loss(adapters, params, tokens):
            logits = llama.forward(config, params, tokens, adapters, targets)
            return llama.next_token_loss(logits, tokens)

        def step(carry, params, tokens):
            adapters, state = carry
            grads = jax.grad(loss)(adapters, params, tokens)
            updates, state = tx.update(grads, state, adapters)
            return optax.apply_updates(adapters, updates), state

        return timing.compile_step(step, (adapters, tx.init(adapters)), params, tokens)

    draw = {
        path: jax.random.normal(jax.random.key(3), target.matrix_shape)
        for path, target in targets.items()
    }
    plain_start = lora.lora_init(targets, params, jax.random.key(2)).adapters
    found = []
    for batch in BATCHES:
        tokens = jax.random.randint(
            jax.random.key(1), batch, 0, config.vocabulary, jnp.int32
        )
        plain = make(optax.adamw(1e-4), plain_start, tokens)
        for width in (None, 64):
            tx = lora.eblora(
                optax.adamw(1e-4), optax.adam(1e-4), targets=targets, memory_rank=width
            )
            step = make(tx, lora.eblora_init(targets, draw), tokens)
            ratio = timing.compare(step, plain, pairs=pairs, warmup=1)
            found.append(_row(batch, width, ratio, step.counts, plain.counts))
    return found


def _row(batch, width, ratio, counts, plain_counts):
    memory = f"memory of {width}" if width else "no memory"
    return Row(
        f"training step of SmolLM2-135M, {batch[0]} x {batch[1]} tokens, EBLoRA / LoRA "
        f"with AdamW, {memory}",
        f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
        f"<= {BUDGET:g}",
        ratio.median <= BUDGET,
        f"{ratio.seconds * 1e3:.0f} ms against {ratio.base_seconds * 1e3:.0f}; "
        f"XLA: {counts.gflops / plain_counts.gflops:.3f} times the FLOPs",
    )
