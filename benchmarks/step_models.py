"""The models of benchmarks/train_step.py: random weights in the compared shapes, in both formats."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_llamapro.expansion.round import Expansion

SEED = 0


@dataclass(frozen=True)
class StepModel:
    """A LLaMA to expand, and the batch of a step."""

    title: str
    num_layers: int
    """Before blocks are added."""
    added_layers: tuple[int, ...]
    """Positions in the expanded model."""
    seq_length: int
    batch_size: int
    config: dict = field(default_factory=dict)
    """Further fields of transformers' LlamaConfig."""

    @property
    def num_expanded_layers(self) -> int:
        return self.num_layers + len(self.added_layers)


MODELS = {
    "tiny": StepModel(
        title="a check",
        num_layers=4,
        added_layers=(2, 5),
        seq_length=32,
        batch_size=2,
        config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 384,
        },
    ),
    "small": StepModel(
        title="hidden 512, 12 → 15 layers",
        num_layers=12,
        added_layers=(4, 9, 14),
        seq_length=512,
        batch_size=2,
        config={
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
        },
    ),
    "smollm2": StepModel(
        title="the shape of SmolLM2-135M, 30 → 36 layers",
        num_layers=30,
        added_layers=(5, 11, 17, 23, 29, 35),
        seq_length=512,
        batch_size=2,
        config={
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
}


def make_checkpoints(folder: Path, model: StepModel) -> None:
    """Write `folder`/hf and `folder`/megatron: the same expanded model, float32, for all candidates."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        num_hidden_layers=model.num_layers,
        max_position_embeddings=max(model.seq_length, 128),
        dtype="float32",
        **model.config,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "original")
    expansion = Expansion.at(*model.added_layers)
    expand_hf(folder / "original", folder / "hf", expansion=expansion)
    hf_to_megatron(folder / "original", folder / "megatron", expansion=expansion)
    shutil.rmtree(folder / "original")


def tokens_and_labels(model: StepModel, step: int):
    """Return random tokens and their next tokens, [batch, seq_length] each, the same for every candidate."""
    import torch

    generator = torch.Generator().manual_seed(SEED + step)
    size = (model.batch_size, model.seq_length + 1)
    stream = torch.randint(model.config["vocab_size"], size, generator=generator)
    return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()


def trained_names(added_layers: Sequence[int]) -> tuple[str, ...]:
    """Return the prefixes of the trainable weights' names in a Hugging Face checkpoint."""
    return tuple(f"model.layers.{layer}." for layer in added_layers)
