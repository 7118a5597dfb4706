"""The manifest of a checkpoint: its source, the blocks added to it, and a hash of every original tensor.

It is `llamapro.json` beside the weights. A Hugging Face export also has it under "llamapro" in its config.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

from megatron_llamapro.config.errors import CheckpointError, ExpansionError
from megatron_llamapro.config.files import read_inside
from megatron_llamapro.config.version import VERSION
from megatron_llamapro.expansion.dial_record import DialRecord
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.expansion.provenance import AveragedCheckpoint, ComposedPack
from megatron_llamapro.expansion.round import Init
from megatron_llamapro.families.hf_config import MANIFEST_KEY, WEIGHT_DTYPES
from megatron_llamapro.families.shape import ModelShape

MANIFEST_NAME = "llamapro.json"
FORMAT_VERSIONS = (1, 2, 3)
"""The lowest format that can hold a manifest is written, so that older versions of this program can read it. Format 2
has a `hash_dtype`. Format 1 has none, because it equals `dtype`. Format 3 has rounds that were added apart (packs), and
may have a `hash_dtype`. Any may have a `dial`: older versions leave it out,
and read and convert the weights correctly."""
HASH_FUNCTION = "blake3"
"""Four times as fast as SHA-256, so that a conversion never waits for hashing."""


@dataclass(frozen=True)
class Source:
    """Fingerprint of the first source model, before any round of expansion."""

    name: str
    """Its folder's name."""
    config_sha256: str
    """Hash of its config.json as canonical JSON."""
    weight_bytes: int


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's plan, its source and the hashes of its original tensors."""

    family: str
    """model_type."""
    dtype: str
    """Type of the stored weights, e.g. bfloat16."""
    plan: ExpansionPlan
    source: Source
    original_hashes: Mapping[str, str]
    """BLAKE3 of every original tensor's bytes in `hash_dtype`, by its Hugging Face name in the first source model."""
    inits: tuple[str, ...] = ()
    """How the added blocks of each round were initialised (`expansion.round.Init`)."""
    init_seeds: tuple[int | None, ...] = ()
    """Seed of each round's random blocks; None if they were not random, or if an older version wrote the manifest."""
    tool_versions: Mapping[str, str] = field(default_factory=dict)
    hashed_as: str | None = None
    """`hash_dtype` if it is not `dtype`: the weights were cast after they were hashed."""
    averaged: tuple[AveragedCheckpoint, ...] = ()
    """The checkpoints that it, or the model that it was trained from, is the mean of."""
    packs: tuple[ComposedPack, ...] = ()
    """The packs that rounds of blocks came from."""
    dial: DialRecord | None = None
    """How the checkpoint was dialed, or None if it was not. A further round of blocks starts without it."""

    @property
    def hash_dtype(self) -> str:
        """Type of the tensors that `original_hashes` were computed from."""
        return self.hashed_as or self.dtype

    @property
    def casts(self) -> tuple[str, ...]:
        """The types that the original tensors were cast to, in turn. `hash_dtype` comes first if that cast lost bits.
        (A cast to float32 loses none.)"""
        return (self.dtype,) if self.hash_dtype in (self.dtype, "float32") else (self.hash_dtype, self.dtype)

    def stored_as(self, dtype: str) -> Manifest:
        """Return the manifest of the same model with its weights in `dtype`.

        The hashes stay those of the first source's own bytes. To check a cast model, cast the source as well.
        """
        return replace(self, dtype=dtype, hashed_as=None if dtype == self.hash_dtype else self.hash_dtype)

    def to_json(self) -> dict:
        """Return plain data. `from_json` turns it back into an equal manifest."""
        hashed_as = {"hash_dtype": self.hashed_as} if self.hashed_as else {}
        dial = {"dial": self.dial.to_json()} if self.dial else {}
        return {
            "format_version": 3 if self.plan.apart else 2 if hashed_as else 1,
            "family": self.family,
            "dtype": self.dtype,
            "plan": self.plan.to_json(),
            "inits": list(self.inits),
            "init_seeds": list(self.init_seeds),
            "source": vars(self.source),
            "hash_function": HASH_FUNCTION,
            **hashed_as,
            "original_hashes": dict(self.original_hashes),
            **dial,
            "tool_versions": dict(self.tool_versions),
            **({"averaged": [vars(each) for each in self.averaged]} if self.averaged else {}),
            **({"packs": [vars(each) for each in self.packs]} if self.packs else {}),
        }

    @classmethod
    def from_json(cls, data: object, *, where: object) -> Manifest:
        """Return the manifest that `to_json` wrote. Errors name `where`.

        Raises:
            CheckpointError: the data has another format version, or is not a manifest.
        """
        if not isinstance(data, dict):
            raise CheckpointError(f"{where}: the manifest is not a JSON object")
        version = data.get("format_version")
        if version not in FORMAT_VERSIONS:
            known = ", ".join(map(str, FORMAT_VERSIONS))
            raise CheckpointError(
                f"{where}: the manifest has format {version!r}, this version reads {known}: "
                "use the version of megatron-llamapro that wrote it, or convert the model again"
            )
        try:
            plan = ExpansionPlan.from_json(data["plan"])
            return cls(
                family=_text(data["family"]),
                dtype=_dtype(data["dtype"]),
                plan=plan,
                inits=_inits(data["inits"], plan),
                init_seeds=_init_seeds(data.get("init_seeds"), plan),
                source=_source(data["source"]),
                original_hashes={_text(k): _text(v) for k, v in data["original_hashes"].items()},
                tool_versions={_text(k): _text(v) for k, v in data["tool_versions"].items()},
                hashed_as=_dtype(data["hash_dtype"]) if version == 2 or "hash_dtype" in data else None,
                averaged=tuple(map(AveragedCheckpoint.from_json, data.get("averaged", ()))),
                packs=tuple(map(ComposedPack.from_json, data.get("packs", ()))),
                dial=_dial(data.get("dial"), plan),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ExpansionError) as error:
            raise CheckpointError(f"{where}: the manifest is damaged ({error!r}): convert the model again") from None

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read the manifest of a checkpoint folder.

        Raises:
            CheckpointError: there is no manifest, or it is damaged.
        """
        path, content = Path(folder) / MANIFEST_NAME, read_inside(Path(folder), MANIFEST_NAME)
        if content is None:
            raise CheckpointError(f"{folder} has no {MANIFEST_NAME}: convert the model (llamapro convert)")
        try:
            data = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from None
        return cls.from_json(data, where=path)

    @classmethod
    def find(cls, folder: Path) -> Manifest | None:
        """Return the manifest of a checkpoint folder, or None if it has none. Raises `CheckpointError` if damaged."""
        return cls.read(folder) if (Path(folder) / MANIFEST_NAME).exists() else None

    def write(self, folder: Path) -> None:
        """Write `llamapro.json` atomically."""
        path = Path(folder) / MANIFEST_NAME
        draft = path.with_name(f"{MANIFEST_NAME}.tmp")
        draft.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        draft.replace(path)

    def check_fits(self, shape: ModelShape, *, where: object = "the checkpoint") -> None:
        """Raise `CheckpointError` if the plan and the model do not have the same number of layers."""
        if self.plan.num_layers != shape.num_layers:
            raise CheckpointError(
                f"{where}: its manifest has {self.plan.num_layers} layers, but its config.json has {shape.num_layers}: "
                f"use files of one model, or remove {MANIFEST_NAME} and {MANIFEST_KEY} in config.json to treat it as a "
                "model that was never expanded"
            )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _dtype(value: object) -> str:
    if value not in WEIGHT_DTYPES:
        raise ValueError(f"weights of type {value!r}")
    return _text(value)


def _inits(names: object, plan: ExpansionPlan) -> tuple[str, ...]:
    inits = tuple(Init(name).value for name in names)  # type: ignore[attr-defined]
    if len(inits) != plan.num_rounds:
        raise ValueError(f"{len(inits)} inits for {plan.num_rounds} rounds")
    return inits


def _init_seeds(seeds: object, plan: ExpansionPlan) -> tuple[int | None, ...]:
    if seeds is None:
        return (None,) * plan.num_rounds
    if not isinstance(seeds, list) or not all(seed is None or type(seed) is int for seed in seeds):
        raise ValueError(f"seeds {str(seeds)[:40]}")
    if len(seeds) != plan.num_rounds:
        raise ValueError(f"{len(seeds)} seeds for {plan.num_rounds} rounds")
    return tuple(seeds)


def _dial(data: object, plan: ExpansionPlan) -> DialRecord | None:
    if data is None:
        return None
    if not isinstance(data, Mapping):
        raise TypeError(f"dial {str(data)[:40]}")
    return DialRecord.from_json(data, num_added_blocks=len(plan.added_layers))


def _source(data: Mapping) -> Source:
    source = Source(**data)
    if type(source.weight_bytes) is not int:
        raise TypeError(f"{source.weight_bytes!r} is not a number of bytes")
    return Source(_text(source.name), _text(source.config_sha256), source.weight_bytes)


def config_sha256(config: Mapping) -> str:
    """Return the hash of a configuration. The order and layout of its fields do not matter."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def tool_versions() -> dict[str, str]:
    """Return the versions of the packages that write checkpoints."""
    others = {name: metadata.version(name) for name in ("torch", "numpy")}
    return {"megatron_llamapro": VERSION, **others}
