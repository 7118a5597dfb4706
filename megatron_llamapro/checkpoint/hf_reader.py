"""Hugging Face checkpoints: where every tensor lies in their safetensors files. Headers are read and checked whole,
tensors are not touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_llamapro.checkpoint.folder import LATEST, TORCH_DIST_MARK
from megatron_llamapro.checkpoint.layout import StoredTensor, whole
from megatron_llamapro.checkpoint.manifest import MANIFEST_NAME, Manifest
from megatron_llamapro.checkpoint.opened import Checkpoint, Format
from megatron_llamapro.checkpoint.streaming import SourceFiles, state_of, stored_hash
from megatron_llamapro.checkpoint.weight_map import EMBEDDING, OUTPUT_LAYER, Shape, hf_shapes, is_known_extra
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import file_inside, read_small
from megatron_llamapro.config.hints import fetch_rest
from megatron_llamapro.model.families import MANIFEST_KEY, read_hf_model
from megatron_llamapro.model.shape import ModelShape

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_DTYPES = {theirs: ours for ours, theirs in SAFETENSORS_DTYPES.items()}

_HEAD, _EMBEDDING = (row.hugging_face[0][0] for row in (OUTPUT_LAYER, EMBEDDING))

_Entry = tuple[str, Shape, Path, int]
"""Their dtype, shape, file, offset of the bytes in it."""


def open_hf(folder: Path) -> Checkpoint:
    """A Hugging Face checkpoint, with its configuration and lineage.

    Raises:
        CheckpointError: no checkpoint, a missing or truncated shard, a tensor that is missing, unknown, of the wrong
            shape or of an unsupported or mixed type, a model that is not supported.
    """
    folder = Path(folder)
    model = read_hf_model(folder)
    config, shape = model.config, model.shape
    manifest = _read_manifest(folder, config, shape)
    entries: dict[str, _Entry] = {}
    states = {path: state_of(path) for path in _shards(folder)}
    for path in states:
        entries.update(_read_header(path))
    _check_index(folder, entries)
    dtype = _check_tensors(folder, entries, shape)
    tensors = {name: _stored(entries[name]) for name in hf_shapes(shape)}
    if manifest is not None and manifest.dtype != dtype:
        raise CheckpointError(
            f"{folder}: its tensors are {dtype}, its manifest is of {manifest.dtype} ones: other software has saved it "
            "in another type, so what it was made from can't be proven any more; take the checkpoint it was made from"
        )
    head = _stored_head(folder, entries) if shape.tie_word_embeddings else None
    return Checkpoint(folder, Format.HUGGING_FACE, config, shape, manifest, dtype, tensors, states, stored_head=head)


def check_stored_head(checkpoint: Checkpoint, files: SourceFiles) -> None:
    """Raise `CheckpointError` where a tied head is stored, and is not the embedding: transformers 5 takes it then, and
    older ones the embedding."""
    head = checkpoint.stored_head
    if head is None:
        return
    ours, theirs = (stored_hash(held, files, checkpoint.itemsize) for held in (checkpoint.tensors[_EMBEDDING], head))
    if ours != theirs:
        raise _another_head(checkpoint.folder)


def _another_head(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder}: {_HEAD} is not {_EMBEDDING}, though tie_word_embeddings in config.json says so: make that false to "
        "keep it, or remove the tensor"
    )


def _stored_head(folder: Path, entries: Mapping[str, _Entry]) -> StoredTensor | None:
    if _HEAD not in entries:
        return None
    if entries[_HEAD][:2] != entries[_EMBEDDING][:2]:  # type and shape
        raise _another_head(folder)
    return _stored(entries[_HEAD])


def _stored(entry: _Entry) -> StoredTensor:
    _, size, path, offset = entry
    return whole(size, path, offset)


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
    """The weight files of a checkpoint, all of them there."""
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
            rest = fetch_rest(folder) or "copy it there"
            raise CheckpointError(f"{folder} lacks the shard {name}, which {INDEX_FILE} names: {rest}")
        shards.append(shard)
    return shards


def _what_is_there(folder: Path) -> str:
    """In a folder without safetensors files."""
    if any(folder.glob("pytorch_model*.bin")):
        return "it has only pytorch_model*.bin, which runs code when read: save it as safetensors first"
    if any((folder / name).is_file() for name in (TORCH_DIST_MARK, LATEST)):
        return "it is a Megatron checkpoint: megatron-to-hf and megatron-to-megatron read it"
    instead = fetch_rest(folder) or "give the folder of a Hugging Face checkpoint"
    return f"no {SINGLE_FILE} and no {INDEX_FILE}: {instead}"


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name, out of the index."""
    try:
        weight_map = json.loads(read_small(index).decode("utf-8"))["weight_map"]
        names = {**weight_map}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors shards: {error!r}") from None
    for shard in names.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard or not shard.isprintable():
            raise CheckpointError(f"{index} names the shard {shard!r}: shards are files in the same folder")
    return names


def _read_header(path: Path) -> dict[str, _Entry]:
    """Every tensor of a file. The library says whether the header is sound (offsets within the file, no overlap, no
    gap); what it does not tell is where a tensor begins."""
    try:
        with safe_open(path, framework="np") as checked:
            names = set(checked.keys())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        start = 8 + length
        entries = {
            name: (entry["dtype"], tuple(entry["shape"]), path, start + entry["data_offsets"][0])
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


def _check_index(folder: Path, entries: Mapping[str, _Entry]) -> None:
    """Every tensor that the index promises is in the shard it names."""
    index = folder / INDEX_FILE
    if not index.is_file() or (folder / SINGLE_FILE).is_file():
        return
    for name, shard in _weight_map(index).items():
        if name not in entries or entries[name][2].name != shard:
            raise CheckpointError(f"{folder / shard} lacks the tensor {name}, which {INDEX_FILE} says it holds")


def _check_tensors(folder: Path, entries: Mapping[str, _Entry], shape: ModelShape) -> str:
    """Check names, shapes and types; return the one type of all."""
    expected = hf_shapes(shape)
    missing = [name for name in expected if name not in entries]
    if missing:
        raise CheckpointError(f"{folder} lacks the tensor {missing[0]}{_and_more(missing)}")
    unknown = [name for name in entries if name not in expected and not is_known_extra(name, shape)]
    if unknown:
        raise CheckpointError(
            f"{folder} has the tensor {unknown[0][:200]}{_and_more(unknown)}, which this model family does not "
            "have: it would be lost"
        )
    dtypes: dict[str, str] = {}
    for name, size in expected.items():
        dtype, stored, _, _ = entries[name]
        if stored != size:
            raise CheckpointError(f"{folder}: {name} has shape {stored}, config.json makes it {size}")
        dtypes.setdefault(dtype, name)
    return _one_dtype(folder, dtypes)


def _one_dtype(folder: Path, dtypes: Mapping[str, str]) -> str:
    for dtype, name in dtypes.items():
        if dtype not in _DTYPES:
            raise CheckpointError(f"{folder}: {name} is stored as {dtype}: only {', '.join(_DTYPES)} are supported")
    if len(dtypes) > 1:
        (one, first), (other, second) = list(dtypes.items())[:2]
        raise CheckpointError(
            f"{folder} mixes types: {first} is {one}, {second} is {other}: save the model in one type"
        )
    return _DTYPES[next(iter(dtypes))]


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
