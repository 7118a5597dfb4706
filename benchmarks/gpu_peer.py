"""The step of gpu_throughput.py by `transformers`: the same model, with blocks frozen by `requires_grad` as in
LLaMA-Factory, SDPA, torch's fused AdamW on bfloat16 weights without a float32 copy, and clipped gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from step_models import trained_names


def make_step(
    hf_config: dict, added_layers: Sequence[int], tokens: torch.Tensor, *, num_microbatches: int, checkpointing: bool
) -> Callable[[], None]:
    """Return an optimizer step over `num_microbatches` times `tokens` [b, s], on their device, with random weights."""
    with torch.device(tokens.device):
        net = LlamaForCausalLM._from_config(LlamaConfig(**hf_config), dtype=torch.bfloat16, attn_implementation="sdpa")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith(trained_names(added_layers)))
    net.train()
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
        net.enable_input_require_grads()
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    labels = tokens.roll(-1, dims=1)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(num_microbatches):
            loss = net(tokens, labels=labels, use_cache=False).loss
            (loss / num_microbatches).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step
