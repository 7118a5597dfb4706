"""The manifest: which blocks were added, to what, and a hash of every original tensor. Kept with every checkpoint.

`llamapro.json` beside the weights; a Hugging Face export has the same content under "llamapro" in its config.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

import megatron_llamapro
from megatron_llamapro.config.errors import CheckpointError, ExpansionError
from megatron_llamapro.config.files import read_inside
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.expansion.round import Init
from megatron_llamapro.families.hf_config import MANIFEST_KEY, WEIGHT_DTYPES
from megatron_llamapro.families.shape import ModelShape

MANIFEST_NAME = "llamapro.json"
FORMAT_VERSIONS = (1, 2)
"""Written is the least that says all, so that earlier versions of this program read what they understand: 2 has a
`hash_dtype`, 1 has none, since it is `dtype`."""
HASH_FUNCTION = "blake3"
"""Four times as fast as SHA-256 here, so that hashing is never what a conversion waits for."""


@dataclass(frozen=True)
class Source:
    """Fingerprint of the first source model, before any round of expansion."""

    name: str
    """Its folder's name."""
    config_sha256: str
    """Of its config.json as canonical JSON."""
    weight_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is made of and where it came from."""

    family: str
    """model_type."""
    dtype: str
    """Type of the stored weights, e.g. bfloat16."""
    plan: ExpansionPlan
    source: Source
    original_hashes: Mapping[str, str]
    """BLAKE3 of every original tensor's bytes in `hash_dtype`, by its Hugging Face name in the first source model."""
    inits: tuple[str, ...] = ()
    """What the added blocks of each round began as (`expansion.round.Init`)."""
    init_seeds: tuple[int | None, ...] = ()
    """The seed that each round's were drawn with; None: they were not drawn, or it was not noted yet."""
    tool_versions: Mapping[str, str] = field(default_factory=dict)
    hashed_as: str | None = None
    """`hash_dtype`, where it is not `dtype`: the weights were cast after the hashes were made."""

    @property
    def hash_dtype(self) -> str:
        """Type of the bytes that `original_hashes` are of."""
        return self.hashed_as or self.dtype

    @property
    def casts(self) -> tuple[str, ...]:
        """The types that original tensors were cast to, in turn: `hash_dtype` first, where `dtype` can hold what that
        cast lost. (float32 loses nothing.)"""
        return (self.dtype,) if self.hash_dtype in (self.dtype, "float32") else (self.hash_dtype, self.dtype)

    def stored_as(self, dtype: str) -> Manifest:
        """The manifest of the same model with its weights in `dtype`. Hashes stay what they are: those of the first
        source's own bytes, which a cast one can be held against by casting the source too."""
        return replace(self, dtype=dtype, hashed_as=None if dtype == self.hash_dtype else self.hash_dtype)

    def to_json(self) -> dict:
        """Plain data; `from_json` gives the equal manifest back."""
        hashed_as = {"hash_dtype": self.hashed_as} if self.hashed_as else {}
        return {
            "format_version": FORMAT_VERSIONS[bool(hashed_as)],
            "family": self.family,
            "dtype": self.dtype,
            "plan": self.plan.to_json(),
            "inits": list(self.inits),
            "init_seeds": list(self.init_seeds),
            "source": vars(self.source),
            "hash_function": HASH_FUNCTION,
            **hashed_as,
            "original_hashes": dict(self.original_hashes),
            "tool_versions": dict(self.tool_versions),
        }

    @classmethod
    def from_json(cls, data: object, *, where: object) -> Manifest:
        """The manifest that `to_json` wrote; `where` is named in errors.

        Raises:
            CheckpointError: another format version, or not a manifest.
        """
        if not isinstance(data, dict):
            raise CheckpointError(f"{where}: the manifest is not a JSON object")
        version = data.get("format_version")
        if version not in FORMAT_VERSIONS:
            known = " and ".join(map(str, FORMAT_VERSIONS))
            raise CheckpointError(
                f"{where}: manifest format {version!r}, this version reads {known}: "
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
                hashed_as=_dtype(data["hash_dtype"]) if version == 2 else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError, ExpansionError) as error:
            raise CheckpointError(f"{where}: damaged manifest ({error!r}): convert the model again") from None

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """The manifest of a checkpoint folder.

        Raises:
            CheckpointError: there is none, or it is damaged.
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
        """The manifest of a checkpoint folder, None where there is none. Errors as above."""
        return cls.read(folder) if (Path(folder) / MANIFEST_NAME).exists() else None

    def write(self, folder: Path) -> None:
        """Write `llamapro.json` atomically."""
        path = Path(folder) / MANIFEST_NAME
        draft = path.with_name(f"{MANIFEST_NAME}.tmp")
        draft.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        draft.replace(path)

    def check_fits(self, shape: ModelShape, *, where: object = "the checkpoint") -> None:
        """Raise `CheckpointError` where the plan and the model do not have the same layers."""
        if self.plan.num_layers != shape.num_layers:
            raise CheckpointError(
                f"{where}: its manifest is for {self.plan.num_layers} layers, its config.json for {shape.num_layers}: "
                f"one of the two is of another model; without {MANIFEST_NAME} and {MANIFEST_KEY} in config.json it is "
                "taken as a model that was never expanded"
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


def _source(data: Mapping) -> Source:
    source = Source(**data)
    if type(source.weight_bytes) is not int:
        raise TypeError(f"{source.weight_bytes!r} is no number of bytes")
    return Source(_text(source.name), _text(source.config_sha256), source.weight_bytes)


def config_sha256(config: Mapping) -> str:
    """Hash of a configuration, whatever the order and layout of its fields."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def tool_versions() -> dict[str, str]:
    """Versions of what writes checkpoints here."""
    others = {name: metadata.version(name) for name in ("torch", "numpy")}
    return {"megatron_llamapro": megatron_llamapro.__version__, **others}
