"""Reads and writes the index (`.metadata`) of a torch_dist checkpoint, without running code that a hostile index names.

The index is a pickle. It is read as inert records (`pickles.py`). Its claims are checked against the files before any
memory is allocated for them.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.checkpoint.formats.folders import INDEX_NAME
from megatron_llamapro.checkpoint.formats.pickles import NEW_OBJECT, Call, Global, Pairs, Record, dumps, instance, load
from megatron_llamapro.checkpoint.tensors.weight_map import Shape
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import file_inside, read_inside
from megatron_llamapro.families.hf_config import ITEMSIZES

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_DTYPES = ("float64", "int64", "int32", "int16", "int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2", *ITEMSIZES)

LARGEST_INDEX = 2 * 2**30  # bytes; thousands of ranks with optimizer states write hundreds of megabytes
_LONGEST_KEY = 1000  # characters; keys are shown in errors

# The names that an index may use.
_ADMITTED = frozenset(
    {
        "pathlib.Path",
        "pathlib.PosixPath",
        f"{_FILESYSTEM}._StorageInfo",
        f"{_METADATA}.BytesStorageMetadata",
        f"{_METADATA}.ChunkStorageMetadata",
        f"{_METADATA}.Metadata",
        f"{_METADATA}.MetadataIndex",
        f"{_METADATA}.StorageMeta",
        f"{_METADATA}.TensorProperties",
        f"{_METADATA}.TensorStorageMetadata",
        f"{_METADATA}._MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.planner.SavePlan",
        "torch.distributed.checkpoint.planner.TensorWriteData",
        "torch.distributed.checkpoint.planner.WriteItem",
        "torch.distributed.checkpoint.planner.WriteItemType",
        "torch.serialization._get_layout",
        "torch.strided",
        "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
        "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
        *(f"torch.{dtype}" for dtype in _DTYPES),
    }
)


@dataclass(frozen=True)
class Section:
    """A part of a file that holds a part of a tensor, as a `torch.save` file of its own."""

    start: Shape
    """Index, in the tensor, of the part's first element."""
    shape: Shape
    path: Path
    offset: int
    """Offset in bytes in the file."""
    num_bytes: int


@dataclass(frozen=True)
class IndexedTensor:
    """A tensor of the checkpoint, in sections: one for each rank that held a part of it."""

    shape: Shape
    dtype: str
    sections: tuple[Section, ...]


# Parts of a training checkpoint that are not weights: their keys start with one of these, or contain EXTRA_STATE.
_OTHER_STATE = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state")
EXTRA_STATE = "_extra_state"


def is_other_state(name: str) -> bool:
    """Return whether a training checkpoint's key is not a weight, but optimizer, random or extra state."""
    return name.startswith(_OTHER_STATE) or EXTRA_STATE in name


def is_training_state(name: str) -> bool:
    """Return whether a key belongs to optimizer state or random state."""
    return name.startswith(_OTHER_STATE)


def read_index(folder: Path) -> dict[str, IndexedTensor]:
    """Return every tensor of a torch_dist checkpoint by its key. Objects that are not tensors are left out.

    Raises:
        CheckpointError: there is no index; it is damaged; it names a class that no index has; or the files do not have
            the data that it promises.
    """
    folder = Path(folder)
    metadata = _unpickle(folder)
    try:
        places = {
            (index.field("fqn"), _shape(index.field("offset"))): stored
            for index, stored in metadata.field("storage_data").items()  # type: ignore[attr-defined]
            if index.state.get("offset") is not None  # objects that are not tensors have none
        }
        files = _FolderFiles(folder)
        return {
            name: _tensor(name, entry, places, files)
            for name, entry in metadata.field("state_dict_metadata").items()  # type: ignore[attr-defined]
            if entry.path == f"{_METADATA}.TensorStorageMetadata" and _is_text(name)
        }
    except ValueError as error:
        raise CheckpointError(f"{folder / INDEX_NAME} is damaged: {str(error)[:200]}") from None
    except (AttributeError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{folder / INDEX_NAME} is damaged: {type(error).__name__} {str(error)[:200]}") from None


def _unpickle(folder: Path) -> Record:
    path, content = folder / INDEX_NAME, read_inside(folder, INDEX_NAME, largest=LARGEST_INDEX)
    if content is None:
        raise CheckpointError(f"{folder} has no {INDEX_NAME}: it is not a complete checkpoint")
    try:
        index = load(content, admitted=_ADMITTED)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is not the index of a checkpoint and was not loaded: {error}") from None
    if not isinstance(index, Record) or not index.path.endswith("Metadata"):
        raise CheckpointError(f"{path} is not the index of a checkpoint")
    return index


class _FolderFiles:
    """The sizes of a folder's files. Each file is looked up once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sizes: dict[str, int] = {}

    def size(self, name: str) -> int:
        if name not in self._sizes:
            if Path(name).name != name or "\0" in name:
                raise CheckpointError(
                    f"{self.folder / INDEX_NAME} names the file {name[:200]!r}: a checkpoint's files are in its folder"
                )
            path = file_inside(self.folder, name)
            if path is None:
                raise CheckpointError(f"{self.folder} lacks the file {name}, which its index names")
            self._sizes[name] = path.stat().st_size
        return self._sizes[name]


def _tensor(name: str, entry: Record, places: dict[tuple[str, Shape], Record], files: _FolderFiles) -> IndexedTensor:
    dtype = entry.field("properties").state[0]  # type: ignore[attr-defined]
    dtype = dtype.path.removeprefix("torch.") if isinstance(dtype, type) and issubclass(dtype, Record) else None
    if dtype not in _DTYPES:
        raise ValueError(f"{name} has no type")
    shape = _shape(entry.field("size"))
    if not shape:
        return IndexedTensor(shape, dtype, ())  # a number, so not a weight
    sections = tuple(_section(name, chunk, places, files) for chunk in entry.field("chunks"))  # type: ignore[attr-defined]
    for section in sections:
        ends = [start + size for start, size in zip(section.start, section.shape, strict=True)]
        fits = len(ends) == len(shape) and all(end <= size for end, size in zip(ends, shape, strict=True))
        if not fits or math.prod(section.shape) * ITEMSIZES.get(dtype, 0) > section.num_bytes:
            raise ValueError(f"a piece of {name} does not fit")
    if sum(math.prod(section.shape) for section in sections) != math.prod(shape):
        raise CheckpointError(f"{files.folder}: {name} is not complete: a part of the checkpoint is missing")
    return IndexedTensor(shape, dtype, sections)


def _section(name: str, chunk: Record, places: dict[tuple[str, Shape], Record], files: _FolderFiles) -> Section:
    start, shape = _shape(chunk.field("offsets")), _shape(chunk.field("sizes"))
    stored = places[name, start]
    file, offset, num_bytes = _file_name(stored.field("relative_path")), stored.field("offset"), stored.field("length")
    if type(offset) is not int or type(num_bytes) is not int:
        raise ValueError(f"{name} holds {str(num_bytes)[:40]} bytes at {str(offset)[:40]}")
    if offset < 0 or num_bytes < 0 or offset + num_bytes > files.size(file):
        raise CheckpointError(f"{files.folder / file} is truncated: the index says that it holds more")
    return Section(start, shape, files.folder / file, offset, num_bytes)


def _is_text(name: object) -> bool:
    if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_KEY:
        raise ValueError("a key that is not text")
    return True


def _file_name(value: object) -> str:
    """Return a file's name, given as text or as a pathlib object whose arguments are its parts."""
    if isinstance(value, Record) and value.path.startswith("pathlib."):
        return str(Path(*value.args))  # type: ignore[arg-type]
    if not isinstance(value, str):
        raise ValueError("a file whose name is not text")
    return value


def _shape(value: object) -> Shape:
    """Return a shape, given as a torch.Size (loaded as a tuple) or as its numbers."""
    sizes = tuple(value)  # type: ignore[arg-type]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("a damaged shape")
    return sizes


def index_bytes(tensors: Mapping[str, IndexedTensor], objects: Mapping[str, Section], dtype: str) -> bytes:
    """Return the index of a checkpoint, as torch writes it. `objects` are the entries that are not tensors."""
    entries = {name: _entry(tensor, dtype) for name, tensor in tensors.items()}
    entries |= dict.fromkeys(objects, Call(NEW_OBJECT, (Global(_METADATA, "BytesStorageMetadata"),)))
    sections = [(name, section) for name, tensor in tensors.items() for section in tensor.sections]
    places = tuple((_index(name, _size(section.start)), _place(section)) for name, section in sections)
    places += tuple((_index(name, None), _place(section)) for name, section in objects.items())
    meta = instance(_METADATA, "StorageMeta", checkpoint_id=None, save_id=None, load_id=None, modules=[])
    return dumps(
        instance(
            _METADATA,
            "Metadata",
            state_dict_metadata=entries,
            planner_data=None,
            storage_data=Pairs(places),
            storage_meta=meta,
            version=None,
        )
    )


def _size(shape: Shape) -> Call:
    return Call(Global("torch", "Size"), (tuple(shape),))


def _entry(tensor: IndexedTensor, dtype: str) -> Call:
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    memory_format = Call(Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    properties = Call(
        NEW_OBJECT,
        (Global(_METADATA, "TensorProperties"),),
        state=(Global("torch", dtype), layout, False, memory_format, False),
    )
    chunks = [
        instance(_METADATA, "ChunkStorageMetadata", offsets=_size(section.start), sizes=_size(section.shape))
        for section in tensor.sections
    ]
    return instance(_METADATA, "TensorStorageMetadata", properties=properties, size=_size(tensor.shape), chunks=chunks)


def _index(name: str, start: Call | None) -> Call:
    return instance(_METADATA, "MetadataIndex", fqn=name, offset=start, index=None)


def _place(section: Section) -> Call:
    return instance(
        _FILESYSTEM,
        "_StorageInfo",
        relative_path=section.path.name,
        offset=section.offset,
        length=section.num_bytes,
    )
