"""`torch_dist` checkpoints, as megatron.core's `dist_checkpointing` writes and reads them, one tensor at a time.

The format is torch's distributed checkpoint (`.metadata`, `*.distcp`) with `common.pt` and `metadata.json` beside it,
so torch alone can write it: without a model, without megatron.core, without more than one tensor in memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem

from megatron_llamapro.checkpoint.folder import TORCH_DIST_MARK
from megatron_llamapro.checkpoint.weight_map import Shape
from megatron_llamapro.config.errors import CheckpointError

_METADATA = ".metadata"
_COMMON = "common.pt"
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

# Parts of a training checkpoint that are no weights: their keys start so, or contain it.
_OTHER_STATE = ("optimizer.", "rng_state", "rerun_state_machine_state")
_EXTRA_STATE = "_extra_state"


class _LazyPlanner(dcp.DefaultSavePlanner):
    """Asks for each tensor when it is written; the state dict holds tensors of the right shape without data."""

    def __init__(self, resolve: Callable[[str], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._resolve = resolve

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._resolve(write_item.index.fqn)


class _Writer(dcp.FileSystemWriter):
    """Leaves path and random number of this save out of the index: the same tensors give the same bytes."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def write_torch_dist(
    folder: Path, shapes: Mapping[str, Shape], *, dtype: torch.dtype, resolve: Callable[[str], torch.Tensor]
) -> None:
    """Write every tensor of `shapes` to the empty `folder`; `resolve(name)` gives its data when its turn comes."""
    state = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    had_crc = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # content hashes in the manifest do its work, and cost less
    try:
        writer = _Writer(folder, single_file_per_rank=True, sync_files=False, thread_count=1)
        with _alone():
            dcp.save(state, storage_writer=writer, planner=_LazyPlanner(resolve), no_dist=True)
    except dcp.api.CheckpointException as error:  # torch's wrapping of what `resolve` or the disk raised
        raise next(iter(error.failures.values()))[0] from None
    finally:
        torch.serialization.set_crc32_options(had_crc)
    torch.save({}, folder / _COMMON)
    (folder / TORCH_DIST_MARK).write_text(json.dumps(_BACKENDS))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without torch's warning that one process saves or loads alone, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


class TorchDistReader:
    """An open torch_dist checkpoint: its weights by name, assembled from however many pieces they were saved in.

    Raises (on opening):
        CheckpointError: not such a checkpoint, damaged, or one whose index would run code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._storage = _Storage(self.folder)
        entries = self._storage.read_metadata().state_dict_metadata
        self.shapes: dict[str, Shape] = {
            name: tuple(entry.size)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not is_other_state(name)
        }
        self.dtypes = {name: entries[name].properties.dtype for name in self.shapes}

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, as it is stored (a vocabulary may be padded).

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        target = {name: torch.empty(self.shapes[name], dtype=self.dtypes[name])}
        try:
            with _alone():
                dcp.load(target, storage_reader=self._storage, no_dist=True)
        except (dcp.api.CheckpointException, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.folder}: cannot read {name}: {_first_line(error)}") from None
        return target[name]


def is_other_state(name: str) -> bool:
    """Whether a key of a training checkpoint is no weight of the model: optimizer, random states, extra state."""
    return name.startswith(_OTHER_STATE) or _EXTRA_STATE in name


class _Storage(dcp.FileSystemReader):
    """Torch's reader with the index read once, and by an unpickler that admits only what an index is made of."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata = read_index(folder)

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        return self._metadata


# What the index of a torch_dist checkpoint is made of. Nothing here does anything when it is unpickled.
_INDEX_CLASSES = {
    ("builtins", "set"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch.serialization", "_get_layout"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, (torch.dtype, torch.layout)) or (module, name) in _INDEX_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_index(folder: Path) -> Metadata:
    """The index (`.metadata`) of a torch_dist checkpoint, without running anything that a hostile one may ask for.

    Raises:
        CheckpointError: there is none, it is damaged, or it asks for anything but an index's own classes.
    """
    path = Path(folder) / _METADATA
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {_METADATA}: it is not a complete torch_dist checkpoint") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is not the index of a checkpoint, and was not loaded: {error}") from None
    except (EOFError, AttributeError, ValueError, TypeError, IndexError, KeyError, ImportError, MemoryError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None
    if not isinstance(index, Metadata):
        raise CheckpointError(f"{path} is not the index of a checkpoint")
    return index


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
