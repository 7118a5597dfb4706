"""Delta checkpoints: a folder with the weights that a run trains, and a record of the base that holds all others.

The base is a complete torch_dist checkpoint beside the delta (`runs/first/base` for `runs/first/iter_0000100`). The
delta names it, and has a hash of every tensor that it takes from the base. If the base is lost, any checkpoint with the
same tensors can replace it; one with other tensors is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_llamapro.checkpoint.formats.folders import is_torch_dist, read_record, write_record
from megatron_llamapro.config.errors import CheckpointError

DELTA_NAME = "llamapro_delta.json"
BASE = "base"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Delta:
    """The record of a delta checkpoint."""

    base: str
    """Name of the folder beside the delta that holds the frozen weights."""
    base_hashes: Mapping[str, str]
    """BLAKE3 of every tensor that is taken from the base, by its Hugging Face name."""
    trained: tuple[str, ...]
    """megatron.core's keys of the weights in the delta. All other weights are in the base."""
    made_from: str
    """The checkpoint that the base was copied from. Only shown to people."""

    @classmethod
    def read(cls, folder: Path) -> Delta | None:
        """Return the record of a checkpoint folder, or None if it is a full checkpoint.

        Raises:
            CheckpointError: the record is damaged, or of another version.
        """
        return read_record(folder, DELTA_NAME, format_version=FORMAT_VERSION, build=cls._of)

    @classmethod
    def _of(cls, data: dict) -> Delta:
        return cls(
            base=_folder_name(data["base"]),
            base_hashes={_text(name): _text(value) for name, value in data["base_hashes"].items()},
            trained=tuple(map(_text, data["trained"])),
            made_from=_text(data["made_from"]),
        )

    def write(self, folder: Path) -> None:
        """Write `llamapro_delta.json`."""
        write_record(folder, DELTA_NAME, format_version=FORMAT_VERSION, fields=asdict(self))

    def base_of(self, folder: Path) -> Path:
        """Return the base of the delta checkpoint in `folder`.

        Raises:
            CheckpointError: the base does not exist, or is not a full checkpoint.
        """
        base = Path(folder).resolve().parent / self.base
        if is_torch_dist(base) and not (base / DELTA_NAME).exists():
            return base
        problem = "is not a full checkpoint" if base.exists() else "does not exist"
        raise CheckpointError(
            f"{folder} holds only the trained weights; {base} must hold the others, but {problem}: move it back, or "
            f"copy the checkpoint that the run started from ({self.made_from}) to it"
        )

    def check_hashes(self, base: Path, found: Mapping[str, str]) -> None:
        """Raise `CheckpointError` if the base's tensors, which have the hashes `found`, are not those of the delta."""
        for name, expected in self.base_hashes.items():
            if found.get(name) != expected:
                raise CheckpointError(
                    f"{base}: {name} is not the tensor that the run trained with (its hash differs): replace this "
                    f"folder with the checkpoint that the run started from ({self.made_from})"
                )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _folder_name(value: object) -> str:
    """Return `value` if it names a folder beside the delta, so that a delta cannot send its reader anywhere else."""
    name = _text(value)
    if Path(name).name != name or name == ".." or "\0" in name:
        raise ValueError(f"{name[:200]!r} is not the name of a folder")
    return name
