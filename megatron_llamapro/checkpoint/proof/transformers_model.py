"""The forward pass of a checkpoint in transformers, with its reading of config.json, its modules and our bytes.

Everything else in this package depends on our reading of config.json; this does not. The model is built on the meta
device. A module holds its float32 weights only while it computes. The largest ones are a linear, or the experts of one
Mixtral block.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_llamapro.checkpoint.formats.open import TensorSource
from megatron_llamapro.checkpoint.proof.reference import embedded, projected
from megatron_llamapro.config.errors import CheckpointError

_OLDEST = (4, 56)
"""Older versions lack the classes that this module uses, or read newer fields by other rules."""

# Fields that name code. transformers would fetch and run some of it.
_CODE = re.compile(r"auto_map|_?(attn|experts)_implementation(_internal)?|quantization_config")

# Modules of a Mixtral in transformers 5 have other parameters than its files. These map them to the files' tensors.
_ROUTER = re.compile(r"(model\.layers\.\d+)\.mlp\.gate\.weight")
_EXPERTS = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_EXPERT_PARTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


@dataclass(frozen=True)
class TheirModel:
    """The results of transformers for a checkpoint."""

    logits: torch.Tensor
    """[b, s, vocabulary], float32."""
    frequencies: torch.Tensor
    """Frequencies of the rotary embeddings, [head / 2], float32."""


def version() -> str | None:
    """Return the version of transformers, or None if it is not installed or too old."""
    try:
        from transformers import __version__
    except ImportError:
        return None
    return __version__ if tuple(map(int, __version__.split(".")[:2])) >= _OLDEST else None


def their_model(config: Mapping, model: TensorSource, tokens: torch.Tensor) -> TheirModel:
    """Run the model of `config`, with the tensors of `model`, on `tokens` [b, s].

    Raises:
        CheckpointError: transformers fails on the configuration, or needs other tensors than the checkpoint has.
    """
    try:
        return _computed(config, model, tokens)
    except CheckpointError:
        raise
    except Exception as error:  # a version of transformers may raise anything
        first_line = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise CheckpointError(f"transformers {version()} fails on config.json: {first_line}") from error


@torch.no_grad()
def _computed(config: Mapping, model: TensorSource, tokens: torch.Tensor) -> TheirModel:
    causal = _without_memory(config)
    base = causal.model
    base.rotary_emb = type(base.rotary_emb)(config=causal.config)
    base.embed_tokens = torch.nn.Identity()  # the table is looked up below, in `embedded`
    for name, module in base.named_modules():
        _stream(module, f"model.{name}", model)
    hidden = base(inputs_embeds=embedded(model, tokens), use_cache=False, return_dict=True).last_hidden_state
    head = projected(model, hidden, is_tied=causal.config.tie_word_embeddings)
    return TheirModel(head, base.rotary_emb.inv_freq)


def _without_memory(config: Mapping) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    # As a file, because transformers decides some things when it reads one.
    fields = {name: value for name, value in config.items() if not _CODE.fullmatch(name)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(fields))
        read = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(read, dtype=torch.float32, attn_implementation="sdpa").eval()


def _stream(module: torch.nn.Module, name: str, model: TensorSource) -> None:
    """Make a module read its own weights before it computes, and drop them afterwards."""
    empty = dict(module.named_parameters(recurse=False))
    if not empty:
        return

    def read(module: torch.nn.Module, args: object) -> None:
        for part, parameter in empty.items():
            values = _weight(model, f"{name}.{part}")
            if values.shape != parameter.shape:
                wanted = list(parameter.shape)
                raise CheckpointError(f"transformers needs {name}.{part} of shape {wanted}, not {list(values.shape)}")
            setattr(module, part, torch.nn.Parameter(values, requires_grad=False))

    def forget(module: torch.nn.Module, args: object, output: object) -> None:
        for part, parameter in empty.items():
            setattr(module, part, parameter)

    module.register_forward_pre_hook(read)
    module.register_forward_hook(forget)


def _weight(model: TensorSource, name: str) -> torch.Tensor:
    if match := _ROUTER.fullmatch(name):
        name = f"{match[1]}.block_sparse_moe.gate.weight"
    if match := _EXPERTS.fullmatch(name):
        return _experts(model, f"{match[1]}.block_sparse_moe.experts", _EXPERT_PARTS[match[2]])
    try:
        return model.tensor(name).float()
    except KeyError:
        raise CheckpointError(f"transformers needs the tensor {name}, which the checkpoint does not have") from None


def _experts(model: TensorSource, prefix: str, parts: tuple[str, ...]) -> torch.Tensor:
    """Return the stacked experts, [experts, rows of all parts, columns]."""
    experts = range(model.shape.num_moe_experts or 0)
    rows = [
        torch.cat([model.tensor(f"{prefix}.{expert}.{part}.weight").float() for part in parts]) for expert in experts
    ]
    return torch.stack(rows)
