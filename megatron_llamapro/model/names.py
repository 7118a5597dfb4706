"""Global parameter names. megatron.core's module names number layers from each stage's first; these do not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

_LOCAL_LAYER = re.compile(r"(?:^|\.)decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class NamedParameter:
    """A parameter of this rank with its name in the whole model."""

    name: str
    """As megatron.core spells it, with the global 0-based layer index: decoder.layers.39.mlp.linear_fc2.weight."""
    layer: int | None
    """Global layer index; None outside the decoder's layers."""
    parameter: torch.nn.Parameter


def global_layer_index(layer: torch.nn.Module) -> int:
    """Return the 0-based global index of a megatron.core TransformerLayer."""
    return layer.layer_number - 1


def named_parameters(chunks: Iterable[torch.nn.Module]) -> Iterator[NamedParameter]:
    """Yield every parameter of this rank's model chunks (GPTModel, or wrapped in DDP), in order.

    On a single stage, a tied embedding comes once, as the embedding. The last stage's copy of it is named
    `output_layer.weight`.
    """
    for chunk in chunks:
        model = unwrapped(chunk)
        for name, parameter in model.named_parameters():
            local = _LOCAL_LAYER.search(name)
            if local is None:
                yield NamedParameter(name, None, parameter)
                continue
            layer = global_layer_index(model.decoder.layers[int(local.group(1))])
            start, end = local.span(1)
            yield NamedParameter(f"{name[:start]}{layer}{name[end:]}", layer, parameter)


def unwrapped(chunk: torch.nn.Module) -> torch.nn.Module:
    """Return the GPTModel inside DDP or Float16Module, or the chunk itself."""
    while not hasattr(chunk, "decoder") and hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
