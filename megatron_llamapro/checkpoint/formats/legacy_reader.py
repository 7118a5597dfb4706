"""Reads `legacy` checkpoints of any division, ours or Megatron-LM's own, without running code that a file names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint, Format
from megatron_llamapro.checkpoint.formats.folders import LATEST, RELEASE, iteration_folder
from megatron_llamapro.checkpoint.formats.legacy_grid import Grid, LayerSpec, RankEntry, check_grid, chunk_entries
from megatron_llamapro.checkpoint.formats.legacy_writer import RANK_FILE, Copies, copy_of, pieces_of
from megatron_llamapro.checkpoint.formats.megatron_args import MEGATRON_GLOBALS, check_args
from megatron_llamapro.checkpoint.formats.megatron_tensors import MegatronTensor, open_megatron
from megatron_llamapro.checkpoint.formats.torch_archive import ArchivedTensor, DamagedArchiveError, read_archive
from megatron_llamapro.checkpoint.tensors.streaming import state_of
from megatron_llamapro.checkpoint.tensors.weight_map import EMBEDDING, weights_of
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import file_inside, read_small
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.families.hf_config import ITEMSIZES, read_hf_model
from megatron_llamapro.families.shape import ModelShape

_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")

_RankKey = tuple[int, int]
"""Tensor rank and stage."""


def is_legacy(folder: Path) -> bool:
    """Return whether a folder, or the checkpoint that its tracker file names, holds `mp_rank_…` folders."""
    return _ranks_folder(Path(folder)) is not None


def _ranks_folder(folder: Path) -> Path | None:
    candidates = [folder]
    tracker = file_inside(folder, LATEST) if folder.is_dir() else None
    if tracker is not None:
        text = read_small(tracker).decode(errors="replace").strip()
        candidates.append(folder / RELEASE if text == RELEASE else folder)
        if text.isascii() and text.isdigit() and len(text) < 20:
            candidates.append(iteration_folder(folder, int(text)))
    return next((path for path in candidates if any(path.glob(f"mp_rank_*/{RANK_FILE}"))), None)


def open_legacy(folder: Path) -> Checkpoint:
    """Open a legacy checkpoint, ours or Megatron-LM's. `folder` must hold config.json, and may hold llamapro.json.

    Raises:
        CheckpointError: there is no such checkpoint; a rank's file is missing, is damaged or would run code; or the
            tensors do not fit the model that config.json describes.
    """
    folder = Path(folder)
    ranks = _ranks_folder(folder)
    if ranks is None:
        raise CheckpointError(f"{folder} has no mp_rank_… folders: it is not a legacy checkpoint")
    model = read_hf_model(folder)
    paths = {_rank(path): _file_of(path) for path in sorted(ranks.glob("mp_rank_*")) if path.is_dir()}
    states = {path: state_of(path) for path in paths.values()}
    held = {rank: _state(path) for rank, path in paths.items()}
    files = {rank: (path, _chunks(path, held[rank])) for rank, path in paths.items()}
    for state in held.values():
        check_args(state.get("args"), model.shape, where=ranks)
    rank_files = _RankFiles(ranks, files, model.shape)
    checkpoint = open_megatron(folder, Format.LEGACY, model, Manifest.find(folder), rank_files.tensors(), states=states)
    return replace(checkpoint, division=str(rank_files.grid), stage_layers=rank_files.grid.stage_layers)


def _rank(path: Path) -> tuple[int, int]:
    """Return the tensor rank and the stage that a folder's name gives."""
    match = _RANK_FOLDER.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a rank's folder: its name must be mp_rank_TT or mp_rank_TT_PPP")
    return int(match[1]), int(match[2] or 0)


def _file_of(folder: Path) -> Path:
    """Return a rank's file."""
    path = file_inside(folder.parent, f"{folder.name}/{RANK_FILE}")
    if path is None:
        raise CheckpointError(f"{folder} has no {RANK_FILE}: the checkpoint is not complete")
    return path


def _state(path: Path) -> dict:
    """Return the content of a rank's file."""
    try:
        with path.open("rb") as file:
            state = read_archive(file, admitted=MEGATRON_GLOBALS)
    except DamagedArchiveError as error:
        raise CheckpointError(f"{path} was not loaded: {error}") from None
    return state if isinstance(state, dict) else {}


def _chunks(path: Path, state: Mapping) -> list[dict]:
    """Return the state of each chunk in a rank's file."""
    numbered = [key for key in state if isinstance(key, str) and re.fullmatch(r"model\d{1,4}", key)]
    keys = ["model"] if "model" in state else sorted(numbered, key=lambda key: int(key.removeprefix("model")))
    chunks = [state[key] for key in keys]
    if not chunks or not all(map(_is_state_dict, chunks)):
        raise CheckpointError(f"{path} holds no model")
    return chunks


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


class _RankFiles:
    """The files of all ranks, and how the model is divided over them."""

    def __init__(self, folder: Path, files: Mapping[_RankKey, tuple[Path, list[dict]]], shape: ModelShape) -> None:
        self._folder, self._files, self._shape = folder, files, shape
        tensor_size, pipeline_size = (max(rank[axis] for rank in files) + 1 for axis in (0, 1))
        if len(files) != tensor_size * pipeline_size:
            places = ((t, p) for t in range(tensor_size) for p in range(pipeline_size))
            rank, stage = next(place for place in places if place not in files)
            raise CheckpointError(f"{folder} lacks tensor rank {rank} of stage {stage}")
        virtual = len(files[0, 0][1])
        order = [(stage, chunk) for chunk in range(virtual) for stage in range(pipeline_size)]
        if any(len(chunks) != virtual for _, chunks in files.values()):
            raise CheckpointError(f"{folder}: its ranks do not hold the same number of chunks")
        layers = tuple(_num_layers(files[0, stage][1][chunk]) for stage, chunk in order)
        self.grid = Grid(tensor_size, layers, virtual if virtual > 1 else None)
        check_grid(self.grid, shape)
        embedding = self._tensor((0, 0), 0, EMBEDDING.megatron)
        self._padded_vocab_size = embedding.shape[0] * tensor_size
        self._spec = LayerSpec.LOCAL
        if any(name.endswith("layer_norm_weight") for _, chunks in files.values() for name in chunks[0]):
            self._spec = LayerSpec.TRANSFORMER_ENGINE

    def tensors(self) -> dict[str, MegatronTensor]:
        """Return megatron.core's whole tensors, taken from the first copy of each."""
        pieces: Copies = {}
        dtypes: dict[str, str] = {}
        for rank, (path, chunks) in self._files.items():
            for chunk, state in enumerate(chunks):
                known = set()
                for entry in self._entries(rank, chunk):
                    known.add(entry.name)
                    tensor = self._tensor(rank, chunk, entry.name)
                    if tensor.shape != entry.shape:
                        raise CheckpointError(f"{path}: {entry.name} has shape {tensor.shape}, not {entry.shape}")
                    name = entry.weight.megatron_name
                    dtypes.setdefault(name, tensor.dtype)
                    held = pieces.setdefault(name, {}).setdefault(copy_of(entry, rank[0]), [])
                    held.extend(pieces_of(entry, path, tensor.offset, ITEMSIZES.get(tensor.dtype, 0)))
                _check_known(path, state, known)
        weights = {weight.megatron_name: weight for weight in weights_of(self._shape)}
        return {
            name: MegatronTensor(weights[name].megatron_shape, dtypes[name], tuple(copies[min(copies)]))
            for name, copies in pieces.items()
        }

    def _entries(self, rank: tuple[int, int], chunk: int) -> Iterator[RankEntry]:
        place = {"stage": rank[1], "chunk": chunk, "tensor_rank": rank[0], "spec": self._spec}
        return chunk_entries(self._shape, self.grid, padded_vocab_size=self._padded_vocab_size, **place)

    def _tensor(self, rank: tuple[int, int], chunk: int, name: str) -> ArchivedTensor:
        path, chunks = self._files[rank]
        found = chunks[chunk].get(name)
        if not isinstance(found, ArchivedTensor):
            raise CheckpointError(f"{path} lacks the tensor {name}")
        return found


def _num_layers(state: Mapping[str, object]) -> int:
    numbers = [int(match[1]) for name in state if (match := re.match(r"decoder\.layers\.(\d{1,5})\.", str(name)))]
    return max(numbers, default=-1) + 1


def _check_known(path: Path, state: Mapping[str, object], known: set[str]) -> None:
    unknown = sorted(name for name in map(str, state) if name not in known and not name.endswith("_extra_state"))
    if unknown:
        raise CheckpointError(f"{path} has the tensor {unknown[0][:200]}, which this model family does not have")
