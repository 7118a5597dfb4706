"""Checks that two checkpoints are the same function, with our forward pass and, if installed, with transformers'.

Our pass reads config.json by our rules for both models. The pass of transformers shows that this reading is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.checkpoint.formats.open import OpenTensors
from megatron_llamapro.checkpoint.tensors.streaming import Progress, SourceFiles
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.families.hf_config import MANIFEST_KEY, family_of, model_shape, spelled_for_all

if TYPE_CHECKING:
    import torch

_NUM_TOKENS = 32  # length of the sequence that the function is compared on
_LONGEST_WINDOW = 8  # with a longer window, layers with and without it could compute the same on so few tokens
_TOLERANCE = 1e-2
"""As a share of the logits' standard deviation. Both use float32 and other kernels; a misread field moves them far
more."""


@dataclass(frozen=True)
class Check:
    """A claim, and whether it holds."""

    name: str
    ok: bool
    text: str
    """The finding, with numbers and names."""

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.name}: {self.text}"


class CastTensors(OpenTensors):
    """Tensors of a model, cast to each of `types` in turn. `progress` is called with the bytes that are read."""

    def __init__(self, checkpoint: Checkpoint, files: SourceFiles, types: Sequence[str], progress: Progress) -> None:
        super().__init__(checkpoint, files)
        self._types, self._progress = types, progress
        self.config = _with_short_window(checkpoint.config)
        self.shape = model_shape(self.config)

    def tensor(self, name: str) -> torch.Tensor:
        import torch

        tensor = super().tensor(name)
        self._progress(tensor.nbytes)
        for dtype in self._types:
            tensor = tensor.to(getattr(torch, dtype))
        return tensor


def _with_short_window(config: Mapping) -> dict:
    # A window in config.json is shortened even if we read it as none, so that transformers would reveal a misreading.
    window = {**family_of(config).defaults, **config}.get("sliding_window")
    is_longer = isinstance(window, int) and window > _LONGEST_WINDOW
    shorter = {"sliding_window": _LONGEST_WINDOW} if is_longer else {}
    return {**{name: value for name, value in config.items() if name != MANIFEST_KEY}, **shorter}


def check_function(source: CastTensors, result: CastTensors) -> Check:
    """Compare the logits of both models on the same random tokens. Each is computed block by block from its weights."""
    import torch

    from megatron_llamapro.checkpoint.proof.reference import logits
    from megatron_llamapro.checkpoint.proof.transformers_model import version

    shape = source.shape
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocab_size, (1, min(_NUM_TOKENS, shape.max_position_embeddings)), generator=generator)
    where = f"on {tokens.shape[1]} random tokens"
    before, after = logits(source, tokens), logits(result, tokens)
    if not torch.equal(before, after):
        return Check("function", ok=False, text=f"logits differ by up to {_largest(before - after):.3g} {where}")
    equal = f"logits are equal, bit for bit, {where}"
    if version() is None:
        unproven = "not that config.json is read correctly: install transformers 4.56 or newer to check that"
        return Check("function", ok=True, text=f"{equal}; this shows what the blocks do, {unproven}")
    try:
        problem = _against_transformers(source, result, tokens, after)
    except CheckpointError as error:
        problem = str(error)
    if problem:
        return Check("function", ok=False, text=f"by this program's reading {equal}, but {problem}")
    # Version 4 does not read newer spellings, so it gets them in the older one. This program's reading of these fields
    # is then not proven.
    told = ", given rope_parameters in its spelling" if _told(source.config) != source.config else ""
    agree = f"by this program and by transformers {version()}{told}, which agree"
    return Check("function", ok=True, text=f"{equal}, {agree}")


def _told(config: Mapping) -> Mapping:
    """Return `config` for transformers: unchanged, unless the version is 4."""
    from megatron_llamapro.checkpoint.proof.transformers_model import version

    return spelled_for_all(config) if (version() or "").startswith("4.") else config


def _against_transformers(
    source: CastTensors, result: CastTensors, tokens: torch.Tensor, ours: torch.Tensor
) -> str | None:
    """Return what transformers computes differently, or None. Raises what `their_model` raises."""
    import torch

    from megatron_llamapro.checkpoint.proof.transformers_model import their_model, version
    from megatron_llamapro.families.rotary import inverse_frequencies

    before, after = (their_model(_told(model.config), model, tokens) for model in (source, result))
    for model, theirs in ((source, before), (result, after)):
        if not torch.allclose(inverse_frequencies(model.shape), theirs.frequencies, rtol=1e-5, atol=0):
            return f"transformers {version()} reads other rotary embeddings from {model.checkpoint.folder}/config.json"
    if not torch.equal(before.logits, after.logits):
        return f"those of transformers {version()} differ by up to {_largest(before.logits - after.logits):.3g}"
    distance = _largest(ours - after.logits)
    if not distance <= _TOLERANCE * after.logits.std():
        return (
            f"those of transformers {version()} differ from them by up to {distance:.3g}: it reads config.json "
            "differently"
        )
    return None


def _largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()
