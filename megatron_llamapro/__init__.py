"""LLaMA Pro block expansion and post-pretraining on megatron.core.

The names below are the public API, for your own training loop. docs/in_your_own_loop.md uses them, and nothing else of
this package. Each is imported on first use, so importing the package does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from megatron_llamapro.config.version import VERSION

if TYPE_CHECKING:  # the same names as in the table, for type checkers and editors
    from megatron_llamapro.checkpoint.convert import Options as ConversionOptions
    from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron, megatron_to_hf, megatron_to_megatron
    from megatron_llamapro.checkpoint.proof.verify import verify
    from megatron_llamapro.config.errors import LlamaProError
    from megatron_llamapro.config.schema import LoraConfig, ParamGroupRule
    from megatron_llamapro.expansion.manifest import Manifest
    from megatron_llamapro.expansion.plan import ExpansionPlan, Placement
    from megatron_llamapro.expansion.round import Expansion, Init
    from megatron_llamapro.families.hf_config import read_hf_model
    from megatron_llamapro.model.freeze import freeze
    from megatron_llamapro.model.lora import add_adapters
    from megatron_llamapro.model.penalty import penalise_added_blocks, penalty_arguments
    from megatron_llamapro.model.skip_frozen import skip_frozen_work
    from megatron_llamapro.optimizer.param_groups import param_group_overrides
    from megatron_llamapro.runtime.cpu import install as allow_cpu
    from megatron_llamapro.training.communication import communication as schedule_arguments

__version__ = VERSION

# Public name -> module, with ":name" if its name in the module differs.
_PUBLIC = {
    # checkpoints
    "hf_to_megatron": "checkpoint.convert",
    "megatron_to_hf": "checkpoint.convert",
    "megatron_to_megatron": "checkpoint.convert",
    "expand_hf": "checkpoint.convert",
    "ConversionOptions": "checkpoint.convert:Options",
    "verify": "checkpoint.proof.verify",
    # descriptions of a checkpoint
    "Expansion": "expansion.round",
    "Init": "expansion.round",
    "Placement": "expansion.plan",
    "ExpansionPlan": "expansion.plan",
    "Manifest": "expansion.manifest",
    "read_hf_model": "families.hf_config",
    # training a part of a model
    "freeze": "model.freeze",
    "skip_frozen_work": "model.skip_frozen",
    "schedule_arguments": "training.communication:communication",
    "penalise_added_blocks": "model.penalty",
    "penalty_arguments": "model.penalty",
    "ParamGroupRule": "config.schema",
    "param_group_overrides": "optimizer.param_groups",
    "LoraConfig": "config.schema",
    "add_adapters": "model.lora",
    # everything else
    "allow_cpu": "runtime.cpu:install",
    "LlamaProError": "config.errors",
}

__all__ = [
    "ConversionOptions",
    "Expansion",
    "ExpansionPlan",
    "Init",
    "LlamaProError",
    "LoraConfig",
    "Manifest",
    "ParamGroupRule",
    "Placement",
    "add_adapters",
    "allow_cpu",
    "expand_hf",
    "freeze",
    "hf_to_megatron",
    "megatron_to_hf",
    "megatron_to_megatron",
    "param_group_overrides",
    "penalise_added_blocks",
    "penalty_arguments",
    "read_hf_model",
    "schedule_arguments",
    "skip_frozen_work",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), attribute or name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
