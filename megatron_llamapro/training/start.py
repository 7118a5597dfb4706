"""Checks a run from its small files, before torch is imported, which takes seconds: whether the starting model can be
trained as configured, and whether the data and the tokenizer exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.checkpoint.description import check_fits
from megatron_llamapro.checkpoint.formats.delta import BASE
from megatron_llamapro.checkpoint.formats.folders import is_torch_dist, resolve_megatron_checkpoint
from megatron_llamapro.checkpoint.formats.small_files import SmallFiles, check_loadable
from megatron_llamapro.checkpoint.side_files import side_files
from megatron_llamapro.config.checks import data_parallel_size
from megatron_llamapro.config.command import is_first_of_node, is_first_rank
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.config.values import DTYPES
from megatron_llamapro.data.token_files import TokenFile, check_token_files
from megatron_llamapro.data.tokenizer import tokenizer_file
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.families.shape import ModelShape
from megatron_llamapro.training.trackers import check_trackers


@dataclass(frozen=True)
class Start:
    """What a run starts from, as plain data that one rank reads and passes to all."""

    source: SmallFiles
    """Small files of the starting checkpoint."""
    tokenizer: Path
    """The tokenizer's file."""
    token_files: Mapping[str, TokenFile]
    """The data's token files, by prefix."""

    @property
    def shape(self) -> ModelShape:
        return self.source.model.shape

    @property
    def plan(self) -> ExpansionPlan:
        return self.source.manifest_or_error().plan

    def check_there(self) -> None:
        """Raise `LlamaProError` if this rank does not see the files that another rank has read."""
        self.source.check_there()
        for token_file in self.token_files.values():
            token_file.check_there()


def read_start_of_node(config: RunConfig, *, world_size: int) -> Start | None:
    """Check the run without torch. The first rank of each node reads the small files; the other ranks get None.

    So every node reports an error, and ends with its exit code. After an error, torchrun ends the other ranks of the
    node; ranks of other nodes end when start_world times out, at the latest. Errors as for `read_start`.
    """
    if is_first_rank():
        check_trackers(config.logging)
    if is_first_of_node():
        return read_start(config, world_size=world_size)
    data_parallel_size(config, world_size)  # every rank knows this without a file
    return None


def read_start(config: RunConfig, *, world_size: int) -> Start:
    """Run all checks that need no torch. Needs no process group, writes nothing, and reads each file once.

    Raises:
        LlamaProError: the configuration, the checkpoint or the data cannot be trained with.
    """
    data_parallel_size(config, world_size)
    source = SmallFiles(_starting_checkpoint(config))
    check_loadable(source)
    folder, shape, manifest = source.folder, source.model.shape, source.manifest_or_error()
    manifest.check_fits(shape)
    check_fits(config, shape, manifest.plan)
    _check_precision(config, manifest, folder)
    if config.logging.diagnostics_interval and not manifest.plan.added_layers:
        raise ConfigError("logging.diagnostics_interval is set, but the checkpoint has no added blocks: set it to 0")
    side_files(folder, config=source.model.config)  # fail now, not at the first checkpoint, if one cannot be copied
    tokenizer = tokenizer_file(Path(config.data.tokenizer or folder))
    token_files = check_token_files(config.data, vocab_size=shape.vocab_size)
    return Start(source.read_all(), tokenizer, token_files)


def _starting_checkpoint(config: RunConfig) -> Path:
    """Return the folder that the run starts from: model.checkpoint, or the run's own base if that no longer exists.

    Raises:
        CheckpointError: neither exists.
    """
    given = Path(config.model.checkpoint)
    base = Path(config.checkpoint.save) / BASE if config.checkpoint.save else None
    if base is not None and not given.exists() and is_torch_dist(base):
        return base
    return resolve_megatron_checkpoint(given)


def _check_precision(config: RunConfig, manifest: Manifest, folder: Path) -> None:
    """Raise `ConfigError` if weights are stored in another type: a cast would silently change every original weight."""
    wanted = DTYPES[config.training.precision]
    if manifest.dtype != wanted:
        raise ConfigError(
            f"training.precision is {config.training.precision}, but {folder} holds {manifest.dtype} weights: "
            f"convert it with --dtype {wanted}, or change training.precision"
        )
