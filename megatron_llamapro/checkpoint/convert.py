"""The conversions: Hugging Face → Megatron and back, Hugging Face → expanded Hugging Face. All stream.

Memory is a few tensors, whatever the model's size. What is written is read back and compared before it takes the
target's place.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_llamapro.checkpoint.folder import carry_files, staged
from megatron_llamapro.checkpoint.hf_reader import HFReader
from megatron_llamapro.checkpoint.hf_writer import (
    DEFAULT_MAX_SHARD_BYTES,
    NamedShape,
    with_dtype,
    write_config,
    write_weights,
)
from megatron_llamapro.checkpoint.manifest import Manifest, Source, config_sha256, tool_versions
from megatron_llamapro.checkpoint.megatron_dist import TorchDistReader, write_torch_dist
from megatron_llamapro.checkpoint.sources import ExpandedSource, MegatronSource, TensorSource
from megatron_llamapro.checkpoint.transforms import DTYPES, merge, sha256
from megatron_llamapro.checkpoint.weight_map import hf_name_in_layer, iter_hf, weights_of
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.model.families import CONFIG_NAME, MANIFEST_KEY, expanded_hf_config, model_shape

Progress = Callable[[int], object]
"""Called with the number of bytes that were just written."""

Expand = Callable[[ExpansionPlan], ExpansionPlan]
"""From the plan of the source to the plan of the target."""


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    target: Path
    plan: ExpansionPlan
    num_source_layers: int
    dtype: str
    num_bytes: int
    seconds: float


@dataclass
class _Hashes:
    """Hashes of what is written, made while it streams."""

    written: dict[str, str] = field(default_factory=dict)
    """Of every tensor, by its name in the target."""
    original: dict[str, str] = field(default_factory=dict)
    """Of every original tensor, by its Hugging Face name in the first source model."""

    def note(self, name: str, tensor: torch.Tensor, plan: ExpansionPlan) -> str:
        """The hash of a Hugging Face tensor of the target, kept where the tensor is an original."""
        digest = sha256(tensor)
        source_name = original_name(name, plan)
        if source_name is not None:
            self.original[source_name] = digest
        return digest


def unchanged(plan: ExpansionPlan) -> ExpansionPlan:
    """No expansion."""
    return plan


def hf_to_megatron(
    source: Path,
    target: Path,
    *,
    expand: Expand = unchanged,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda num_bytes: None,
    on_total: Progress = lambda num_bytes: None,
) -> Conversion:
    """Convert a Hugging Face LLaMA to a Megatron checkpoint (torch_dist), adding blocks on the way if `expand` says so.

    `dtype` (float32, bfloat16, float16) casts; without it the source's is kept. `on_total` is told the bytes to come.

    Raises:
        CheckpointError: the source is no checkpoint that can be converted, or the target cannot be written.
        ExpansionError: the blocks cannot be added as asked.
    """
    started = time.monotonic()
    reader = HFReader(source)
    tensors, config = _expanded(reader, expand, dtype)
    weights = {weight.megatron_name: weight for weight in weights_of(tensors.shape)}
    hashes = _Hashes()
    on_total(_total_bytes(tensors))

    def resolve(name: str) -> torch.Tensor:
        weight = weights[name]
        parts = [tensors.tensor(part) for part in weight.hf_names]
        digests = [hashes.note(part, tensor, tensors.plan) for part, tensor in zip(weight.hf_names, parts, strict=True)]
        whole = merge(weight, parts, tensors.shape)
        hashes.written[name] = digests[0] if len(parts) == 1 else sha256(whole)
        progress(whole.nbytes)
        return whole

    with staged(target, overwrite=overwrite, sources=(reader.folder,)) as folder:
        shapes = {name: weight.megatron_shape for name, weight in weights.items()}
        write_torch_dist(folder, shapes, dtype=DTYPES[tensors.dtype], resolve=resolve)
        _compare(folder, hashes, TorchDistReader(folder).tensor)
        _manifest(reader, tensors, hashes).write(folder)
        text = json.dumps(with_dtype(config, tensors.dtype), indent=2) + "\n"
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
        carry_files(reader.folder, folder)
    return _conversion(target, tensors, num_source_layers=reader.shape.num_layers, started=started)


def expand_hf(
    source: Path,
    target: Path,
    *,
    expand: Expand,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    progress: Progress = lambda num_bytes: None,
    on_total: Progress = lambda num_bytes: None,
) -> Conversion:
    """Write the expansion of a Hugging Face LLaMA as a Hugging Face checkpoint. Arguments and errors as above."""
    started = time.monotonic()
    reader = HFReader(source)
    tensors, config = _expanded(reader, expand, dtype)
    on_total(_total_bytes(tensors))
    with staged(target, overwrite=overwrite, sources=(reader.folder,)) as folder:
        hashes = _write_hf(folder, tensors, max_shard_bytes, progress)
        write_config(folder, config, _manifest(reader, tensors, hashes))
        carry_files(reader.folder, folder)
        _compare(folder, hashes, HFReader(folder).tensor)
    return _conversion(target, tensors, num_source_layers=reader.shape.num_layers, started=started)


def megatron_to_hf(
    source: Path,
    target: Path,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    progress: Progress = lambda num_bytes: None,
    on_total: Progress = lambda num_bytes: None,
) -> Conversion:
    """Write a Megatron checkpoint, trained or not, as a Hugging Face checkpoint. Arguments and errors as above."""
    started = time.monotonic()
    tensors = MegatronSource(source)
    on_total(_total_bytes(tensors))
    with staged(target, overwrite=overwrite, sources=(Path(source),)) as folder:
        hashes = _write_hf(folder, tensors, max_shard_bytes, progress)
        write_config(folder, tensors.config, tensors.manifest)
        carry_files(tensors.folder, folder)
        _compare(folder, hashes, HFReader(folder).tensor)
    return _conversion(target, tensors, num_source_layers=tensors.shape.num_layers, started=started)


def _conversion(target: Path, tensors: TensorSource, *, num_source_layers: int, started: float) -> Conversion:
    return Conversion(
        target=Path(target),
        plan=tensors.plan,
        num_source_layers=num_source_layers,
        dtype=tensors.dtype,
        num_bytes=_total_bytes(tensors),
        seconds=time.monotonic() - started,
    )


def _expanded(reader: HFReader, expand: Expand, dtype: str | None) -> tuple[ExpandedSource, dict]:
    """The tensors to write and their configuration, without any manifest in it."""
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype '{dtype}' is not known: it is one of {', '.join(DTYPES)}")
    plan = expand(reader.plan)
    config = {key: value for key, value in reader.config.items() if key != MANIFEST_KEY}
    if plan.num_rounds > reader.plan.num_rounds:
        config = expanded_hf_config(config, plan)
    return ExpandedSource(reader, plan, shape=model_shape(config), dtype=dtype or reader.dtype), config


def _write_hf(folder: Path, tensors: TensorSource, max_shard_bytes: int, progress: Progress) -> _Hashes:
    names = [NamedShape(name, size) for _, name, size in iter_hf(weights_of(tensors.shape))]
    hashes = _Hashes()

    def stream() -> Iterator[torch.Tensor]:
        for item in names:
            tensor = tensors.tensor(item.name)
            hashes.written[item.name] = hashes.note(item.name, tensor, tensors.plan)
            yield tensor
            progress(tensor.nbytes)

    write_weights(folder, stream(), names=names, dtype=tensors.dtype, max_shard_bytes=max_shard_bytes)
    return hashes


def original_name(name: str, plan: ExpansionPlan) -> str | None:
    """The name that a tensor had in the first source model; None for a tensor of an added block."""
    if not name.startswith("model.layers."):
        return name
    layer = plan.layers[int(name.split(".")[2])]
    return None if layer.is_added else hf_name_in_layer(name, layer.source_layer)


def _manifest(reader: HFReader, tensors: ExpandedSource, hashes: _Hashes) -> Manifest:
    """The target's manifest. What an expanded source's manifest says of the original tensors is kept, not made anew
    from tensors that may have been trained since; a source that was never expanded is its own original."""
    known = _known(reader)
    return Manifest(
        family=reader.config["model_type"],
        dtype=tensors.dtype,
        plan=tensors.plan,
        source=known.source if known else _fingerprint(reader),
        original_sha256=_original_hashes(reader, tensors.dtype, hashes),
        tool_versions=tool_versions(),
    )


def _known(reader: HFReader) -> Manifest | None:
    return reader.manifest if reader.plan.num_rounds else None


def _original_hashes(reader: HFReader, dtype: str, hashes: _Hashes) -> dict[str, str]:
    known = _known(reader)
    if known is None or known.dtype != dtype:
        if known is not None:
            _check_unmoved(reader, known)
        return dict(hashes.original)
    return dict(known.original_sha256)


def _check_unmoved(reader: HFReader, known: Manifest) -> None:
    """A cast makes new hashes of the original tensors: refuse to make them of tensors that are no longer original."""
    for _, name, _ in iter_hf(weights_of(reader.shape)):
        source_name = original_name(name, known.plan)
        if source_name is not None and sha256(reader.tensor(name)) != known.original_sha256.get(source_name):
            raise CheckpointError(
                f"{reader.folder}: {name} is not the original tensor any more, so a cast would lose the proof of which "
                "ones are: convert without --dtype"
            )


def _fingerprint(reader: HFReader) -> Source:
    return Source(
        name=reader.folder.resolve().name,
        config_sha256=config_sha256(reader.config),
        weight_bytes=reader.weight_bytes,
    )


def _compare(folder: Path, hashes: _Hashes, read: Callable[[str], torch.Tensor]) -> None:
    """Read back what was written; the disk, or a bug, may have changed it."""
    for name, expected in hashes.written.items():
        if sha256(read(name)) != expected:
            raise CheckpointError(
                f"{folder}: {name} reads back other than it was written: check the disk, and try again"
            )


def _total_bytes(tensors: TensorSource) -> int:
    itemsize = DTYPES[tensors.dtype].itemsize
    return sum(itemsize * torch.Size(size).numel() for _, _, size in iter_hf(weights_of(tensors.shape)))
