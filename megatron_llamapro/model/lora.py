"""Low-rank adapters (LoRA, arXiv 2106.09685) on megatron.core's linears: W x becomes W x + alpha / rank * B (A x).

B is initialised to zeros, so the model starts unchanged, bit for bit. Adapters on frozen weights are the usual
baseline; on added blocks they make the blocks low-rank. Works with any GPTModel of megatron.core's own linears.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Protocol

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn import functional

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import LoraConfig
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.expansion.trainable import ADAPTER_OWNERS, adapted_layers
from megatron_llamapro.model.names import global_layer_index, unwrapped
from megatron_llamapro.runtime.upstream import become


class _HasAdapter(Protocol):
    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter
    lora_scaling: float


def merged_weight(weight: torch.Tensor, linear: _HasAdapter) -> torch.Tensor:
    """Return this rank's weight with its adapter merged in, in float32."""
    return weight.float() + linear.lora_scaling * (linear.lora_b.float() @ linear.lora_a.float())


class LoraColumnParallelLinear(ColumnParallelLinear):
    """weight [out / TP, in] with an adapter: lora_a [rank, in], the same on every rank, and lora_b [out / TP, rank]."""

    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter
    lora_scaling: float
    is_gated: bool
    """Whether its rows stack the gate's and the up projection's, which are sharded separately."""

    def forward(self, input_, weight=None, runtime_gather_output=None):
        """input_ [s, b, in], with sequence parallelism [s / TP, b, in] → [s, b, out / TP], and the bias."""
        output, bias = super().forward(input_, weight, runtime_gather_output)
        low = functional.linear(input_, self.lora_a)
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return _plus(output, low, self), bias

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Return the sharded state. lora_b is sharded as the weight's rows are; lora_a is not sharded."""
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0, "lora_b": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.is_gated:  # as megatron.core's MLP does for the weight
            state[f"{prefix}lora_b"] = apply_swiglu_sharded_factory(state[f"{prefix}lora_b"], sharded_offsets)
        return state


class LoraRowParallelLinear(RowParallelLinear):
    """weight [out, in / TP] with an adapter: lora_a [rank, in / TP], and lora_b [out, rank], the same on every rank."""

    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter
    lora_scaling: float

    def forward(self, input_):
        """input_ [s, b, in / TP] → [s, b, out], with sequence parallelism [s / TP, b, out], and the bias."""
        output, bias = super().forward(input_)
        low = functional.linear(input_, self.lora_a)
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return _plus(output, low, self), bias

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Return the sharded state. lora_a is sharded as the weight's columns are; lora_b is not sharded."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 1, "lora_a": 1},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def _plus(output: torch.Tensor, low: torch.Tensor, linear: _HasAdapter) -> torch.Tensor:
    """Return output [s, b, out] + scaling * low [s, b, rank] B^T, in one operation that stores no separate product."""
    rows = output.reshape(-1, output.shape[-1])
    low = low.reshape(-1, low.shape[-1])
    return torch.addmm(rows, low, linear.lora_b.t(), alpha=linear.lora_scaling).view_as(output)


def add_adapters(chunks: Iterable[torch.nn.Module], plan: ExpansionPlan, lora: LoraConfig, *, seed: int) -> None:
    """Add adapters to the linears that `lora` names: A is random, B is zeros. A seed gives the same A at any
    parallelism. Call this once, after the weights are loaded and before `freeze`.

    Raises:
        ConfigError: a named linear is not megatron.core's own.
    """
    layers = adapted_layers(lora, plan)
    for chunk in chunks:
        for layer in unwrapped(chunk).decoder.layers:
            index = global_layer_index(layer)
            for target in lora.targets if index in layers else ():
                owner = ADAPTER_OWNERS[target]
                name = f"decoder.layers.{index}.{owner}.{target}"
                _add_adapter(getattr(getattr(layer, owner), target), name, lora, seed=seed)


def _add_adapter(linear: torch.nn.Module, name: str, lora: LoraConfig, *, seed: int) -> None:
    rank = lora.rank
    assert rank is not None  # without a rank, adapted_layers is empty
    whole_a = _initial(f"{seed} {name}.lora_a", rank, linear.input_size)
    if isinstance(linear, ColumnParallelLinear):
        become(linear, LoraColumnParallelLinear)
        linear.is_gated = name.endswith("linear_fc1") and linear.config.gated_linear_unit
        a, out = whole_a, linear.output_size_per_partition
    elif isinstance(linear, RowParallelLinear):
        become(linear, LoraRowParallelLinear)
        width = linear.input_size_per_partition
        a, out = whole_a[:, linear.tp_group.rank() * width :][:, :width], linear.output_size
    else:
        raise ConfigError(f"lora: {name} is a {type(linear).__name__}: set model.transformer_impl to local")
    like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
    linear.lora_scaling = lora.scaling
    linear.lora_a = torch.nn.Parameter(a.to(**like).contiguous())
    linear.lora_b = torch.nn.Parameter(torch.zeros(out, rank, **like))
    is_column = isinstance(linear, ColumnParallelLinear)
    divided, whole = (linear.lora_b, linear.lora_a) if is_column else (linear.lora_a, linear.lora_b)
    set_tensor_model_parallel_attributes(divided, is_parallel=True, dim=0 if is_column else 1, stride=1)
    whole.sequence_parallel = linear.sequence_parallel  # each rank then has only its sequence part's gradient


def _initial(seed: str, rank: int, width: int) -> torch.Tensor:
    """Return A [rank, in] as the authors' code initialises it: uniform within ± 1 / sqrt(in)."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "little"))
    bound = 1 / math.sqrt(width)
    return torch.empty(rank, width, device="cpu").uniform_(-bound, bound, generator=generator)
