"""Delta checkpoints: a folder with what a run trains, and a record of the base that holds all other weights.

The base is a complete torch_dist checkpoint beside the delta (`runs/first/base` for `runs/first/iter_0000100`). The
delta names it, and has a hash of every tensor that it takes from there, so that any checkpoint with the same tensors
can stand in for a lost base, and none with others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_llamapro.checkpoint.formats.folders import is_torch_dist
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import read_inside

DELTA_NAME = "llamapro_delta.json"
BASE = "base"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Delta:
    """What a delta checkpoint says of itself."""

    base: str
    """Name of the folder beside it that holds what did not train."""
    base_hashes: Mapping[str, str]
    """BLAKE3 of every tensor that is taken from the base, by its Hugging Face name."""
    trained: tuple[str, ...]
    """megatron.core's keys of the weights that are in the delta; all others are in the base."""
    made_from: str
    """The checkpoint that the base was made of; only to be told to people."""

    @classmethod
    def read(cls, folder: Path) -> Delta | None:
        """The record of a checkpoint folder; None where it is a full checkpoint.

        Raises:
            CheckpointError: it is damaged, or of another version.
        """
        path, content = Path(folder) / DELTA_NAME, read_inside(folder, DELTA_NAME)
        if content is None:
            return None
        try:
            data = json.loads(content)
            if data["format_version"] != FORMAT_VERSION:
                raise CheckpointError(
                    f"{path} has format {data['format_version']!r}, this version reads {FORMAT_VERSION}: use the "
                    "version of megatron-llamapro that wrote it"
                )
            return cls(
                base=_folder_name(data["base"]),
                base_hashes={_text(name): _text(value) for name, value in data["base_hashes"].items()},
                trained=tuple(map(_text, data["trained"])),
                made_from=_text(data["made_from"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}): restore it from a copy of {folder}") from None

    def write(self, folder: Path) -> None:
        """Write `llamapro_delta.json`."""
        record = {"format_version": FORMAT_VERSION, **asdict(self)}
        (Path(folder) / DELTA_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def base_of(self, folder: Path) -> Path:
        """The base of the delta checkpoint in `folder`.

        Raises:
            CheckpointError: it is not there, or is no full checkpoint.
        """
        base = Path(folder).resolve().parent / self.base
        if is_torch_dist(base) and not (base / DELTA_NAME).exists():
            return base
        problem = "is no full checkpoint" if base.exists() else "is not there"
        raise CheckpointError(
            f"{folder} holds only what was trained, and the rest is looked for in {base}, which {problem}: move it "
            f"back, or copy the checkpoint that the run started from ({self.made_from}) there"
        )

    def check_hashes(self, base: Path, found: Mapping[str, str]) -> None:
        """Raise `CheckpointError` where the base's tensors, whose hashes were `found`, are not those of the delta."""
        for name, expected in self.base_hashes.items():
            if found.get(name) != expected:
                raise CheckpointError(
                    f"{base}: {name} is not the tensor that was trained with (its hash differs): put the checkpoint "
                    f"that the run started from ({self.made_from}) there"
                )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _folder_name(value: object) -> str:
    """A delta may not lead its reader to anywhere but the folder beside it."""
    name = _text(value)
    if Path(name).name != name or name == ".." or "\0" in name:
        raise ValueError(f"{name[:200]!r} is not the name of a folder")
    return name
