"""Opens Hugging Face checkpoints: finds every tensor in their safetensors files.

Headers are read and checked completely. Tensors are not read, unless two have the same name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint, Format
from megatron_llamapro.checkpoint.formats.folders import LATEST, TORCH_DIST_MARK
from megatron_llamapro.checkpoint.formats.hf_tensors import FOLDERS, HeaderEntry, are_same, check_tensors, named
from megatron_llamapro.checkpoint.tensors.layout import StoredTensor, whole
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles, state_of, stored_hash
from megatron_llamapro.checkpoint.tensors.weight_map import EMBEDDING, OUTPUT_LAYER, hf_shapes, is_known_extra
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import fetch_rest, file_inside, read_small
from megatron_llamapro.expansion.manifest import MANIFEST_NAME, Manifest
from megatron_llamapro.families.hf_config import ITEMSIZES, MANIFEST_KEY, read_hf_model
from megatron_llamapro.families.shape import ModelShape

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_HEAD, _EMBEDDING = (row.hugging_face[0][0] for row in (OUTPUT_LAYER, EMBEDDING))


def open_hf(folder: Path) -> Checkpoint:
    """Open a Hugging Face checkpoint, with its configuration and lineage.

    Raises:
        CheckpointError: there is no checkpoint; a shard is missing or truncated; the model is not supported; or a
            tensor is missing, unknown, different in two shards, of the wrong shape or of an unsupported type.
    """
    folder = Path(folder)
    _check_format(folder)
    model = read_hf_model(folder)
    config, shape = model.config, model.shape
    manifest = _read_manifest(folder, config, shape)
    states = {path: state_of(path) for path in _shards(folder)}
    promised = _promised(folder)
    stored = _read_headers(states, promised)
    _check_index(folder, stored, shape, promised)
    entries = named(stored, shape)
    types = check_tensors(folder, entries, shape, config)
    head = _stored_head(folder, entries) if shape.tie_word_embeddings else None
    return Checkpoint(
        folder,
        Format.HUGGING_FACE,
        config,
        shape,
        # Other software may have trained an export and saved it in another type.
        manifest and manifest.stored_as(types.most),
        types.most,
        {name: _stored(entries[name]) for name in hf_shapes(shape)},
        states,
        stored_head=head,
        other_dtypes=types.others,
    )


def _check_format(folder: Path) -> None:
    """Raise `CheckpointError` if the folder has another known format."""
    if any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return
    for pattern, meaning in FOLDERS:
        if any(folder.glob(pattern)):
            raise CheckpointError(f"{folder}: {meaning}")


def check_stored_head(checkpoint: Checkpoint, files: SourceFiles) -> None:
    """Raise `CheckpointError` if a tied head is stored and differs from the embedding. In that case transformers 5 uses
    the head, and older versions use the embedding."""
    head = checkpoint.stored_head
    if head is None:
        return
    itemsize = ITEMSIZES[checkpoint.dtype_of(_EMBEDDING)]
    ours, theirs = (stored_hash(held, files, itemsize) for held in (checkpoint.tensors[_EMBEDDING], head))
    if ours != theirs:
        raise _another_head(checkpoint.folder)


def _another_head(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder}: {_HEAD} differs from {_EMBEDDING}, but config.json ties them: set tie_word_embeddings to false to "
        "keep both, or remove the tensor"
    )


def _stored_head(folder: Path, entries: Mapping[str, HeaderEntry]) -> StoredTensor | None:
    if _HEAD not in entries:
        return None
    if entries[_HEAD][:2] != entries[_EMBEDDING][:2]:  # type and shape
        raise _another_head(folder)
    return _stored(entries[_HEAD])


def _stored(entry: HeaderEntry) -> StoredTensor:
    return whole(entry.shape, entry.path, entry.offset)


def _read_manifest(folder: Path, config: Mapping, shape: ModelShape) -> Manifest | None:
    if file_inside(folder, MANIFEST_NAME) is not None:
        manifest = Manifest.read(folder)
    elif MANIFEST_KEY in config:
        manifest = Manifest.from_json(config[MANIFEST_KEY], where=folder / "config.json")
    else:
        return None
    manifest.check_fits(shape, where=folder)
    return manifest


def _shards(folder: Path) -> list[Path]:
    """Return the weight files of a checkpoint. Raise `CheckpointError` if one is missing."""
    single = file_inside(folder, SINGLE_FILE)
    if single is not None:
        return [single]
    index = file_inside(folder, INDEX_FILE)
    if index is None:
        raise CheckpointError(f"{folder}: {_what_is_there(folder)}")
    shards = []
    for name in sorted(set(_weight_map(index).values())):
        shard = file_inside(folder, name)
        if shard is None:
            rest = fetch_rest(folder) or "copy it into the folder"
            raise CheckpointError(f"{folder} lacks the shard {name}, which {INDEX_FILE} names: {rest}")
        shards.append(shard)
    return shards


def _what_is_there(folder: Path) -> str:
    """Return what a folder without safetensors files holds, with advice."""
    if any(folder.glob("pytorch_model*.bin")):
        return "it has only pytorch_model*.bin, which runs code when read: save it as safetensors first"
    if any((folder / name).is_file() for name in (TORCH_DIST_MARK, LATEST)):
        return "it is a Megatron checkpoint: megatron-to-hf and megatron-to-megatron read it"
    instead = fetch_rest(folder) or "give the folder of a Hugging Face checkpoint"
    return f"no {SINGLE_FILE} and no {INDEX_FILE}: {instead}"


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor name → file name, read from the index."""
    try:
        weight_map = json.loads(read_small(index).decode("utf-8"))["weight_map"]
        names = {**weight_map}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors shards: {error!r}") from None
    for shard in names.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard or not shard.isprintable():
            raise CheckpointError(f"{index} names the shard {shard!r}: shards are files in the same folder")
    return names


def _promised(folder: Path) -> dict[str, str]:
    """Return tensor name → file name if the folder has an index, else nothing."""
    index = folder / INDEX_FILE
    return _weight_map(index) if index.is_file() and not (folder / SINGLE_FILE).is_file() else {}


def _read_headers(paths: Iterable[Path], promised: Mapping[str, str]) -> dict[str, HeaderEntry]:
    """Return every tensor of all files. If two are the same, return the one that the index names."""
    entries: dict[str, HeaderEntry] = {}
    for path in paths:
        for name, entry in read_header(path).items():
            if not name.isprintable():
                raise CheckpointError(f"{path} names a tensor {name[:80]!r}: it is damaged")
            if name in entries and not are_same(entries[name], entry):
                raise CheckpointError(
                    f"{path.parent}: the tensor {name[:200]} differs between two shards, {entries[name].path.name} and "
                    f"{path.name}, and programs differ in which one they use: save the model again, or restore its "
                    "shards"
                )
            if name not in entries or promised.get(name) == path.name:
                entries[name] = entry
    return entries


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """Return every tensor of a safetensors file.

    The library checks the header (offsets within the file, no overlap, no gap) but does not say where a tensor starts.

    Raises:
        CheckpointError: the file is truncated, or is not a safetensors file.
    """
    try:
        with safe_open(path, framework="np") as checked:
            names = set(checked.keys())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        start = 8 + length
        entries = {
            name: HeaderEntry(entry["dtype"], tuple(entry["shape"]), path, start + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error!r}") from None
    if entries.keys() != names:
        raise CheckpointError(f"{path} changed while it was being read: wait until it is complete, try again")
    return entries


def _check_index(
    folder: Path, entries: Mapping[str, HeaderEntry], shape: ModelShape, promised: Mapping[str, str]
) -> None:
    """Raise `CheckpointError` if a tensor is not in the shard that the index names, unless it may be left out."""
    for name, shard in promised.items():
        if name not in entries and is_known_extra(name, shape):
            continue
        if name not in entries or entries[name].path.name != shard:
            raise CheckpointError(f"{folder / shard} lacks the tensor {name}, but {INDEX_FILE} says that it has it")
