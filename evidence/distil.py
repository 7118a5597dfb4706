"""Train a run with distillation from its own original: a question of docs/evidence.md, not a part of the program.

torchrun --nproc-per-node 2 evidence/distil.py --kl_weight 1 --config run.yaml

On samples of sources marked `known`, the loss is kl_weight times KL(original || trained) instead of the cross-entropy.
The original is the same model with its added blocks bypassed, in another forward pass without autograd. Whole logits,
one pipeline stage, one tensor-parallel rank.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional

from megatron_llamapro.config.command import run_command


def distilling_step(kl_weight: float, sum_loss, batches: Iterator, chunk: torch.nn.Module):
    """The forward step of `training/step.py`, with another loss of known samples."""
    from megatron_llamapro.model.bypass import bypassed
    from megatron_llamapro.model.names import unwrapped

    batch = next(batches)
    tokens, position_ids, labels, known = (batch[name] for name in ("tokens", "position_ids", "labels", "known"))
    logits = chunk(tokens, position_ids, None)  # [b, s, padded vocabulary]
    vocab_size = unwrapped(chunk).true_vocab_size
    logits = logits[..., :vocab_size].float()
    losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # [b, s]
    if known.any():
        model = unwrapped(chunk)
        added = [layer for layer in model.decoder.layers if any(p.requires_grad for p in layer.parameters())]
        with torch.no_grad(), bypassed(added):
            original = model(tokens[known], position_ids[known], None)[..., :vocab_size].float()
        divergence = functional.kl_div(
            functional.log_softmax(logits[known], -1),
            functional.log_softmax(original, -1),
            log_target=True,
            reduction="none",
        ).sum(-1)
        losses = losses.masked_scatter(known[:, None].expand_as(losses), kl_weight * divergence)
    return losses, partial(sum_loss, batch["loss_mask"])


def main() -> int:
    """Train as `megatron_llamapro.pretrain` does, with another forward step."""
    from megatron_llamapro import pretrain
    from megatron_llamapro.runtime import cpu
    from megatron_llamapro.runtime.upstream import import_megatron

    _, option, weight, *arguments = sys.argv
    assert option == "--kl_weight"
    import_megatron()
    cpu.install()
    from megatron_llamapro.training import step

    step._forward_step = partial(distilling_step, float(weight), step._sum_loss)
    return pretrain.main(arguments)


if __name__ == "__main__":
    run_command(main)
