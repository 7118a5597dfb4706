"""A model by its shape and expansion plan: what planning and dry runs need of one. Weights are not read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.checkpoint.folder import resolve_megatron_checkpoint
from megatron_llamapro.checkpoint.manifest import MANIFEST_NAME, Manifest
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.expansion.inits import Expansion
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.model.families import model_shape, read_hf_config
from megatron_llamapro.model.shape import ModelShape


@dataclass(frozen=True)
class DescribedModel:
    """What is trained."""

    shape: ModelShape
    plan: ExpansionPlan

    @classmethod
    def expanded(cls, original: ModelShape, plan: ExpansionPlan) -> DescribedModel:
        """What `plan` makes of a model; each added block is of the kind of the one that it copies."""
        return cls(original.with_layers([layer.parent_layer for layer in plan.layers]), plan)


def describe_model(checkpoint: Path, *, hf_config: Path | None, expansion: Expansion | None) -> DescribedModel:
    """The model of a Megatron checkpoint (or of a run's newest), or with `hf_config` the one that `expansion` would
    make of the model whose config.json that folder has. The weights need not be there.

    Raises:
        LlamaProError: there is no such model.
    """
    if hf_config is not None:
        shape = model_shape(read_hf_config(hf_config))
        plan = ExpansionPlan.unexpanded(shape.num_layers)
        if expansion is not None:
            plan = expansion.expand(plan)
        return DescribedModel.expanded(shape, plan)
    if expansion is not None:
        raise ConfigError("added blocks are asked for, but model.checkpoint says itself which it has: give --hf_config")
    if not checkpoint.is_dir():
        raise ConfigError(
            f"model.checkpoint {checkpoint} is not there: convert it first, or describe it by --hf_config FOLDER and "
            "--num_added_blocks N"
        )
    folder = checkpoint if (checkpoint / MANIFEST_NAME).is_file() else resolve_megatron_checkpoint(checkpoint)
    return DescribedModel(model_shape(read_hf_config(folder)), Manifest.read(folder).plan)
