"""Scores every block of a checkpoint on held-out sets, by forward passes. All ranks of the started world call it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.data.token_files import TokenFile
from megatron_llamapro.evaluation.job import EvaluationJob
from megatron_llamapro.evaluation.model import EvaluatedModel
from megatron_llamapro.evaluation.ranking import SetScores
from megatron_llamapro.evaluation.run import check_finite, sample_bar
from megatron_llamapro.model.bypass import bypassed
from megatron_llamapro.model.names import global_layer_index
from megatron_llamapro.training.evaluation import HeldOutLoss
from megatron_llamapro.training.step import Batch


def score_blocks(
    checkpoint: Checkpoint, job: EvaluationJob, token_files: Mapping[str, TokenFile]
) -> dict[str, SetScores]:
    """Return the scores of every block, by set. One pass over the samples measures the whole model and how each block
    changes the stream; one more pass per block leaves that block out.

    Raises:
        LlamaProError: a file cannot be read, or a set has no loss; on all ranks.
    """
    model = EvaluatedModel.load(checkpoint, job, token_files)
    num_blocks = checkpoint.shape.num_layers
    with sample_bar("rank-blocks", model, num_passes=num_blocks + 1) as bar:
        change = _StreamChange(model)
        with change.watching():
            whole = model.losses(bar.update, before_batch=change.start_batch)
        check_finite(whole)
        without = []
        for block in range(num_blocks):
            with bypassed([layer for layer in _layers(model) if global_layer_index(layer) == block]):
                without.append(model.losses(bar.update))
    changes = change.of_each_set(whole)
    return {
        name: SetScores(held, [losses[name].loss - held.loss for losses in without], changes[name])
        for name, held in whole.items()
    }


def _layers(model: EvaluatedModel) -> list[TransformerLayer]:
    """Return the layers of this rank."""
    return [layer for chunk in model.chunks for layer in chunk.decoder.layers]


class _StreamChange:
    """How much every block changes the residual stream: for the input x and the output y of a block, the root of the
    mean of r = |y - x|^2 / |x|^2 over the tokens that have a loss. (`model.penalty` penalises the same r.)"""

    def __init__(self, model: EvaluatedModel) -> None:
        self.layers, self.layout = _layers(model), model.layout
        self.device = torch.cuda.current_device()
        num_blocks = model.checkpoint.shape.num_layers
        # Sums of r by set [blocks]. Every token is added on one rank.
        self.sums = {name: torch.zeros(num_blocks, dtype=torch.float64, device=self.device) for name in model.held_out}
        self.of_set = torch.empty(0)  # both are set by `start_batch`
        self.token_weights = torch.empty(0)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Add up what the blocks do in the passes within."""
        hooks = [layer.register_forward_hook(self._add_changes, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def start_batch(self, name: str, batch: Batch) -> None:
        """Name the set and the tokens of the next pass."""
        self.of_set = self.sums[name]
        self.token_weights = batch["loss_mask"].to(self.device).t()  # [s, b], as hidden states

    def of_each_set(self, losses: Mapping[str, HeldOutLoss]) -> dict[str, list[float]]:
        """Return every block's change of the stream, by set. All ranks call it. The losses have the tokens' numbers."""
        changes = {}
        for name, sums in self.sums.items():
            dist.all_reduce(sums)
            changes[name] = (sums / losses[name].num_tokens).sqrt().tolist()
        return changes

    def _add_changes(self, layer: TransformerLayer, _: tuple, given: Mapping, output: tuple) -> None:
        """Input and output are [s, b, h]. Tensor-parallel ranks hold copies, or parts with sequence parallelism."""
        weights, is_divided = self.token_weights, layer.config.sequence_parallel
        if is_divided:
            weights = weights.chunk(self.layout.tensor_size)[self.layout.tensor_rank]
        if is_divided or self.layout.tensor_rank == 0:
            before = given["hidden_states"].float()
            added, stream = (output[0] - before).norm(dim=-1), before.norm(dim=-1)  # [s, b]
            relative = torch.where(stream > 0, added / stream, 0.0).double()
            self.of_set[global_layer_index(layer)] += (relative.square() * weights).sum()
