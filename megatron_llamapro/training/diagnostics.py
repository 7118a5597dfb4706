"""Diagnostics of every added block on chosen steps: how much it adds to the residual stream, its gradient norm, and its
distance from the block that it was copied from."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_llamapro.checkpoint.formats.small_files import SmallFiles
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.expansion.trainable import is_adapter
from megatron_llamapro.model.freeze import is_divided
from megatron_llamapro.model.lora import merged_weight
from megatron_llamapro.model.names import NamedParameter, global_layer_index, named_parameters, unwrapped
from megatron_llamapro.optimizer.replicas import finish_param_gathers
from megatron_llamapro.training.checkpoints.state import load_values, model_state
from megatron_llamapro.training.machine import Machine

# Sums of squares for each block, over all ranks. Most figures are the root of a quotient of two sums.
_SUMS = ("added", "stream", "gradient", "moved", "copied", "output", "source_output")
_OUTPUTS = (".linear_proj.weight", ".linear_fc2.weight")


class BlockDiagnostics:
    """Diagnostics of a run's added blocks. Every rank has one, and calls the same methods on the same steps."""

    def __init__(self, machine: Machine, *, plan: ExpansionPlan, base: SmallFiles) -> None:
        """`base` is the checkpoint that the run started from. The ranks of the first replica read its copied blocks
        into host memory."""
        self.plan, self.machine, self.layout = plan, machine, machine.layout
        self.layers = [
            layer
            for chunk in machine.chunks
            for layer in unwrapped(chunk).decoder.layers
            if global_layer_index(layer) in plan.added_layers
        ]
        self.parameters = [named for named in named_parameters(machine.chunks) if named.layer in plan.added_layers]
        linears = [module for layer in self.layers for module in layer.modules() if hasattr(module, "lora_a")]
        self.adapted = {id(linear.weight): linear for linear in linears}
        self.sources = self._read_sources(base)
        self.sums = torch.zeros(0)
        self._restart()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record what the blocks add to the residual stream; use it around a step's forward and backward passes."""
        self._restart()
        hooks = [layer.register_forward_hook(self._note_activations, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def note_gradients(self) -> None:
        """Record the gradients; call it between the backward pass and the update. Each replica holds its shard of the
        reduced gradients."""
        layers = {id(named.parameter): named.layer for named in self.parameters}
        for part in self.machine.optimizer.chained_optimizers:
            for parameter in getattr(part, "model_param_gbuf_map", {}):
                if id(parameter) in layers and self._counts(parameter):
                    share = part._get_model_param_range_map(parameter)["param"]
                    self._add(layers[id(parameter)], "gradient", parameter.main_grad.view(-1)[share.start : share.end])

    def figures(self) -> list[dict[str, object]]:
        """Return one record per block; call it after the update. All ranks call it and get the same records.

        - layer: the block's global index.
        - contribution: root mean square of what the block adds to the residual stream, relative to the stream's.
        - grad_norm: gradient norm before clipping.
        - distance: distance from the copied block, relative to that block's norm. It leaves out the weights that were
          initialised as zeros.
        - output_norm: norm of the two output projections, which were initialised as zeros, relative to the copied
          block's.
        """
        finish_param_gathers(self.machine.chunks)
        self._note_weights()
        dist.all_reduce(self.sums)
        return [
            {"layer": layer, **_figures(dict(zip(_SUMS, sums, strict=True)))}
            for layer, sums in zip(self.plan.added_layers, self.sums.tolist(), strict=True)
        ]

    def _restart(self) -> None:
        shape = (len(self.plan.added_layers), len(_SUMS))
        self.sums = torch.zeros(shape, dtype=torch.float64, device=torch.cuda.current_device())

    def _add(self, layer: int | None, name: str, values: torch.Tensor) -> None:
        place = self.plan.added_layers.index(layer), _SUMS.index(name)
        self.sums[place] += values.detach().float().square().sum()

    def _note_activations(self, layer: torch.nn.Module, _: tuple, given: Mapping, output: tuple) -> None:
        """Input and output are [s, b, h]. Tensor-parallel ranks hold copies, or parts with sequence parallelism."""
        if self.layout.tensor_rank == 0 or layer.config.sequence_parallel:
            before, after = given["hidden_states"], output[0]
            with torch.no_grad():
                self._add(global_layer_index(layer), "added", after - before)
                self._add(global_layer_index(layer), "stream", before)

    def _note_weights(self) -> None:
        for named in self.parameters:
            source = self.sources.get(named.name)
            if source is None or not self._counts(named.parameter):
                continue
            linear = self.adapted.get(id(named.parameter))
            source, now = source.to(named.parameter.device), named.parameter.detach()
            if linear is not None:
                with torch.no_grad():
                    now = merged_weight(now, linear)
            is_output = named.name.endswith(_OUTPUTS)
            self._add(named.layer, "output" if is_output else "moved", now if is_output else now - source)
            self._add(named.layer, "source_output" if is_output else "copied", source)

    def _counts(self, parameter: torch.nn.Parameter) -> bool:
        """Return whether to add up this tensor-parallel rank's part. A replicated parameter is added up once."""
        return self.layout.tensor_rank == 0 or is_divided(parameter)

    def _read_sources(self, base: SmallFiles) -> dict[str, torch.Tensor]:
        """Return this rank's part of the block that each added block copies, under the added block's names."""
        wanted = {}
        if self.layout.data_rank == 0:
            sharded = {
                id(value.data): value for state in model_state(self.machine.chunks).values() for value in state.values()
            }
            own = [named for named in self.parameters if not is_adapter(named.name)]
            wanted = {named.name: self._of_source(named, sharded[id(named.parameter)]) for named in own}
        return load_values(wanted, base)

    def _of_source(self, named: NamedParameter, sharded: ShardedTensor | ShardedTensorFactory):
        assert named.layer is not None  # it is of an added block
        source = self.plan.copied_from(named.layer)
        key = sharded.key.replace(f"layers.{named.layer}.", f"layers.{source}.", 1)
        return replace(sharded, key=key, data=torch.empty_like(named.parameter, device="cpu", requires_grad=False))


def _figures(sums: Mapping[str, float]) -> dict[str, float]:
    return {
        "contribution": _root(sums["added"], sums["stream"]),
        "grad_norm": math.sqrt(sums["gradient"]),
        "distance": _root(sums["moved"], sums["copied"]),
        "output_norm": _root(sums["output"], sums["source_output"]),
    }


def _root(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else math.nan
