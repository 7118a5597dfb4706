"""Records, in a manifest, of the files that a model was made of besides its source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AveragedCheckpoint:
    """A checkpoint that was averaged with others."""

    name: str
    """Its folder's name, after its run's: first/iter_0000300."""
    iteration: int | None
    """None if its folder's name has no step."""
    hash: str
    """Hash of the tensors that were averaged (`tensors.streaming.combined_hash`)."""

    @classmethod
    def from_json(cls, data: dict) -> AveragedCheckpoint:
        """Return the record with these fields.

        Raises:
            TypeError: `data` does not have them.
        """
        record = cls(**data)
        if not isinstance(record.name, str) or not isinstance(record.hash, str):
            raise TypeError(f"{data!r} is not an averaged checkpoint")
        if record.iteration is not None and type(record.iteration) is not int:
            raise TypeError(f"{record.iteration!r} is not a step")
        return record


@dataclass(frozen=True)
class ComposedPack:
    """A pack of added blocks that became a round of a model."""

    round: int
    name: str
    """Its folder's name."""
    hash: str
    """Hash of its tensors (`tensors.streaming.combined_hash`), before they were scaled."""
    scale: float
    """The factor of its output projections."""

    def __str__(self) -> str:
        return f"{self.name} × {self.scale:g} (round {self.round})"

    @classmethod
    def from_json(cls, data: dict) -> ComposedPack:
        """Return the record with these fields.

        Raises:
            TypeError: `data` does not have them.
        """
        record = cls(**data)
        if not isinstance(record.name, str) or not isinstance(record.hash, str):
            raise TypeError(f"{data!r} is not a pack")
        if type(record.round) is not int or type(record.scale) not in (int, float):
            raise TypeError(f"{data!r} is not a pack")
        return record
