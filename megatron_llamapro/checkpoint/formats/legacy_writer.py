"""Lays out `legacy` checkpoints for one division of the model: a file `mp_rank_XX[_YYY]/model_optim_rng.pt` per rank.

Megatron-LM's own loader reads them (`megatron/training/checkpointing.py`, core_v0.16.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.checkpoint.formats.folders import LATEST, RELEASE
from megatron_llamapro.checkpoint.formats.legacy_grid import Grid, LayerSpec, RankEntry, check_grid, chunk_entries
from megatron_llamapro.checkpoint.formats.pickles import instance
from megatron_llamapro.checkpoint.formats.torch_archive import archive_layout, tensor_call
from megatron_llamapro.checkpoint.tensors.layout import Piece, StoredTensor, TargetFile, TargetLayout, parts_of
from megatron_llamapro.checkpoint.tensors.weight_map import OUTPUT_LAYER, Sharding, weights_of
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.pipeline_stages import even_stage_layers
from megatron_llamapro.families.hf_config import ITEMSIZES
from megatron_llamapro.families.shape import ModelShape, padded_vocab_size

RANK_FILE = "model_optim_rng.pt"


@dataclass(frozen=True)
class LegacyTarget:
    """How to divide a legacy checkpoint."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    pipeline_stage_layers: tuple[int, ...] | None = None
    """Layers of every (virtual) stage; None: as even as possible."""
    layer_spec: LayerSpec = LayerSpec.LOCAL
    make_vocab_size_divisible_by: int = 128

    def grid(self, shape: ModelShape) -> Grid:
        """Return the division of a model.

        Raises:
            CheckpointError: the model cannot be divided like this.
        """
        stages, virtual = self.pipeline_model_parallel_size, self.virtual_pipeline_model_parallel_size
        if virtual is not None and min(virtual, stages) < 2:
            raise CheckpointError(
                f"virtual_pipeline_model_parallel_size is {virtual} and pipeline_model_parallel_size is {stages}: the "
                "interleaved schedule needs at least 2 of each"
            )
        num_stages = stages * (virtual or 1)
        if self.pipeline_stage_layers is None and shape.num_layers < num_stages:
            raise CheckpointError(
                f"the model has {shape.num_layers} layers, fewer than the {num_stages} (virtual) stages: give "
                "pipeline_stage_layers, with 0 for stages without layers"
            )
        counts = self.pipeline_stage_layers or even_stage_layers(shape.num_layers, num_stages)
        if len(counts) != num_stages:
            raise CheckpointError(
                f"pipeline_stage_layers has {len(counts)} counts for {num_stages} (virtual) stages: give one per stage"
            )
        grid = Grid(self.tensor_model_parallel_size, counts, virtual)
        check_grid(grid, shape)
        return grid

    def padded_vocab_size(self, shape: ModelShape) -> int:
        """Return the number of rows of embedding and head over all ranks."""
        return padded_vocab_size(
            shape.vocab_size,
            divisible_by=self.make_vocab_size_divisible_by,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
        )


@dataclass(frozen=True)
class _DividedModel:
    """A divided model: the part that the files of all ranks have in common."""

    shape: ModelShape
    dtype: str
    target: LegacyTarget
    grid: Grid

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]


def legacy_layout(folder: Path, shape: ModelShape, dtype: str, *, target: LegacyTarget) -> TargetLayout:
    """Return the layout of a checkpoint for one division of the model, under `release/`.

    Raises:
        CheckpointError: the model cannot be divided like this.
    """
    grid = target.grid(shape)
    divided = _DividedModel(shape, dtype, target, grid)
    files: list[TargetFile] = []
    pieces: Copies = {}
    for stage in range(grid.pipeline_size):
        for rank in range(grid.tensor_size):
            path = folder / RELEASE / _rank_folder(grid, rank, stage) / RANK_FILE
            files.append(_rank_file(path, divided, stage, rank, pieces))
    tensors: dict[str, tuple[StoredTensor, ...]] = {}
    for weight in weights_of(shape):
        held = pieces[weight.megatron_name].values()
        copies = [parts_of(weight, copy, shape=shape, itemsize=divided.itemsize) for copy in held]
        tensors.update({name: tuple(copy[name] for copy in copies) for name in weight.hf_names})
    return TargetLayout(tensors, tuple(files), {LATEST: f"{RELEASE}\n".encode()})


def _rank_folder(grid: Grid, tensor_rank: int, stage: int) -> str:
    return f"mp_rank_{tensor_rank:02d}" + (f"_{stage:03d}" if grid.pipeline_size > 1 else "")


def _rank_file(path: Path, divided: _DividedModel, stage: int, rank: int, pieces: Copies) -> TargetFile:
    """Return a rank's file. The places of its tensors are added to `pieces`."""
    shape, target, itemsize = divided.shape, divided.target, divided.itemsize
    state: dict[str, object] = {
        "args": _args(shape, target),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
    }
    entries: list[RankEntry] = []
    for chunk, key in enumerate(_model_keys(divided.grid)):
        place = {"stage": stage, "chunk": chunk, "tensor_rank": rank, "spec": target.layer_spec}
        found = list(chunk_entries(shape, divided.grid, padded_vocab_size=target.padded_vocab_size(shape), **place))
        state[key] = {e.name: tensor_call(str(len(entries) + i), divided.dtype, e.shape) for i, e in enumerate(found)}
        entries += found
    archive = archive_layout(state, [math.prod(entry.shape) * itemsize for entry in entries])
    for entry, offset in zip(entries, archive.tensor_offsets, strict=True):
        copies = pieces.setdefault(entry.weight.megatron_name, {})
        copies.setdefault(copy_of(entry, rank), []).extend(pieces_of(entry, path, offset, itemsize))
    return TargetFile(path, archive.num_bytes, archive.fixed)


def _model_keys(grid: Grid) -> list[str]:
    return ["model"] if grid.virtual_size is None else [f"model{number}" for number in range(grid.virtual_size)]


Copies = dict[str, dict[tuple[bool, int], list[Piece]]]
"""Weight → copies of it → pieces of a copy."""


def copy_of(entry: RankEntry, rank: int) -> tuple[bool, int]:
    """Return which copy of its weight a tensor belongs to.

    Every tensor-parallel rank holds each norm, and the last stage holds a second copy of a tied embedding.
    """
    is_replicated = entry.weight.row.sharding is Sharding.REPLICATED
    return entry.name == OUTPUT_LAYER.megatron, rank if is_replicated else 0


def pieces_of(entry: RankEntry, path: Path, offset: int, itemsize: int) -> Iterator[Piece]:
    for rectangle in entry.rectangles:
        yield Piece(rectangle.rows, rectangle.columns, path, offset)
        offset += rectangle.num_elements * itemsize


def _args(shape: ModelShape, target: LegacyTarget) -> object:
    """Return the arguments that Megatron-LM checks and, with --use-checkpoint-args, takes from a checkpoint."""
    return instance(
        "argparse",
        "Namespace",
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        group_query_attention=True,
        kv_channels=shape.kv_channels,
        max_position_embeddings=shape.max_position_embeddings,
        seq_length=shape.max_position_embeddings,
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=False,
        rotary_base=int(shape.rotary_base) if shape.rotary_base.is_integer() else shape.rotary_base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        add_bias_linear=shape.add_bias_linear,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        num_experts=shape.num_moe_experts,
        moe_router_topk=shape.moe_router_topk,
        moe_router_pre_softmax=False,
        swiglu=True,
        untie_embeddings_and_output_weights=not shape.tie_word_embeddings,
        normalization="RMSNorm",
        norm_epsilon=shape.layernorm_epsilon,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        make_vocab_size_divisible_by=target.make_vocab_size_divisible_by,
        padded_vocab_size=target.padded_vocab_size(shape),
        tensor_model_parallel_size=target.tensor_model_parallel_size,
        pipeline_model_parallel_size=target.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=target.virtual_pipeline_model_parallel_size,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
