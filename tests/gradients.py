"""Functions for the ranks of a gradient test: load a checkpoint at any layout, take steps, return every gradient.

    ranks = run_distributed(gradients_worker, 4, folder, parallel(tp=2, pp=2))
    loss, norm, pieces = ranks[0][0]  # of rank 0 at step 0

All ranks of all layouts train on the same batch, so losses, norms and gathered gradients must agree.
`megatron_llamapro.testing.gather.assembled` joins the pieces of all ranks to whole gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType

import torch

from megatron_llamapro.checkpoint.formats.small_files import SmallFiles
from megatron_llamapro.config.schema import LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig, RecomputeConfig

SEQ_LENGTH, BATCH = 32, 4
KEEP_ALL = RecomputeConfig()
NO_ADAPTERS = LoraConfig()


def parallel(
    tp: int = 1, pp: int = 1, vp: int | None = None, sp: bool = False, stage_layers: tuple[int, ...] | None = None
) -> ParallelConfig:
    """Return a layout, from short names for the fields of `ParallelConfig`."""
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        sequence_parallel=sp,
        pipeline_stage_layers=stage_layers,
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens and labels of every step, each [BATCH, SEQ_LENGTH]."""
    stream = torch.randint(3, 131, (BATCH, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()


def load_chunks(
    folder: Path,
    config: ParallelConfig,
    trainable: tuple[str, ...] = ("added_blocks",),
    *,
    recompute: RecomputeConfig = KEEP_ALL,
    lora: LoraConfig = NO_ADAPTERS,
    after_loading: Callable[[list], None] = lambda chunks: None,
    skip: bool = True,
    penalty_weight: float = 0.0,
):
    """Load this rank's chunks of a Megatron checkpoint and freeze all but `trainable`.

    Call `after_loading` with the chunks before freezing. Without `skip`, megatron.core does all work for frozen layers.
    Return the layout, the model's shape and the chunks.
    """
    from megatron_llamapro.expansion.manifest import Manifest
    from megatron_llamapro.expansion.trainable import first_trainable_layer
    from megatron_llamapro.families.hf_config import model_shape, read_hf_config
    from megatron_llamapro.model.build import build_model
    from megatron_llamapro.model.freeze import freeze
    from megatron_llamapro.model.lora import add_adapters
    from megatron_llamapro.model.penalty import penalise_added_blocks
    from megatron_llamapro.model.skip_frozen import skip_frozen_work
    from megatron_llamapro.runtime.distributed import start_model_parallel
    from megatron_llamapro.training.checkpoints.state import load_model

    layout = start_model_parallel(config, seed=1)
    shape = model_shape(read_hf_config(folder))
    chunks = build_model(
        shape, model=ModelConfig(checkpoint=str(folder)), parallel=config, precision="fp32", recompute=recompute
    )
    plan = Manifest.read(folder).plan
    load_model(chunks, SmallFiles(folder))
    add_adapters(chunks, plan, lora, seed=1)
    after_loading(chunks)
    if plan.added_layers:
        freeze(chunks, plan, trainable, tie_word_embeddings=shape.tie_word_embeddings)
        if skip:
            skip_frozen_work(chunks, first_trainable_layer(trainable, plan, lora=lora))
        if penalty_weight:
            penalise_added_blocks(chunks, plan, weight=penalty_weight)
    return layout, shape, chunks


def gradients_worker(
    folder: Path,
    config: ParallelConfig,
    num_steps: int = 1,
    trainable: tuple[str, ...] = ("added_blocks",),
    *,
    observe: Callable[[list], AbstractContextManager] = nullcontext,
    fields: Mapping[str, torch.Tensor] = MappingProxyType({}),
    sums_seen: list | None = None,
    **options: object,
):
    """Take steps and return (loss, gradient norm, this rank's gradient pieces) of each.

    `observe` makes a context manager from the chunks; it surrounds the forward and backward passes of each step.
    `fields` replace or add fields of the batch. `sums_seen` gets the `LossSum` of each step.
    `options` are those of `load_chunks`.
    """
    from megatron.core import parallel_state

    from megatron_llamapro.model.penalty import penalties_of
    from megatron_llamapro.optimizer.build import build_optimizer, build_scheduler
    from megatron_llamapro.testing.gather import gradient_pieces
    from megatron_llamapro.training.machine import connect, wrapped
    from megatron_llamapro.training.step import reduce_loss, run_microbatches

    layout, _, models = load_chunks(folder, config, trainable, **options)
    chunks = [wrapped(model, config) for model in models]
    settings = OptimizerConfig(lr=1e-2, lr_warmup_fraction=0.0)
    optimizer = build_optimizer(chunks, settings, precision="fp32")
    scheduler = build_scheduler(optimizer, settings, train_iters=10)
    connect(models[0].config, chunks, optimizer, overlap_grad_reduce=False, overlap_param_gather=False)
    steps = []
    for _ in range(num_steps):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        with observe(models):
            sums = run_microbatches(
                chunks,
                [micro_batches(layout, fields) for _ in chunks],
                num_microbatches=BATCH // layout.data_size,
                micro_batch_size=1,
                seq_length=SEQ_LENGTH,
                forward_only=False,
            )
        loss = reduce_loss(sums, layout=layout, penalties=penalties_of(models))
        if sums_seen is not None:
            sums_seen.append(loss)
        # A copy, because gathering replaces the gradients that the optimizer clips.
        saved = [buffer.grad_data.clone() for chunk in chunks for buffer in chunk.buffers]
        pieces = gradient_pieces(chunks, data_group=parallel_state.get_data_parallel_group())
        for buffer, data in zip([b for chunk in chunks for b in chunk.buffers], saved, strict=True):
            buffer.grad_data.copy_(data)
        _, norm, _ = optimizer.step()
        scheduler.step(1)
        steps.append((loss.loss, norm, pieces))
    return steps


def micro_batches(layout, fields: Mapping[str, torch.Tensor] = MappingProxyType({})):
    """Yield this data-parallel rank's micro-batches of `batch`, one sample each, with the rows of `fields`."""
    tokens, labels = batch()
    for number in range(BATCH // layout.data_size):
        row = slice(number * layout.data_size + layout.data_rank, number * layout.data_size + layout.data_rank + 1)
        yield {
            "tokens": tokens[row],
            "labels": labels[row],
            "loss_mask": torch.ones(1, SEQ_LENGTH),
            "position_ids": torch.arange(SEQ_LENGTH)[None],
            **{name: values[row] for name, values in fields.items()},
        }
