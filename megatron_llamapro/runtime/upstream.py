"""Imports megatron.core without its noise, defines a name that it forgot, and gives its objects our classes. Nothing is
imported before `import_megatron` is called."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TypeVar, cast

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.runtime.changes import CHANGES, VERSION, How

Ours = TypeVar("Ours")

# Modules of megatron.core that this package imports, or that warn on import.
_MEGATRON_MODULES = (
    "megatron.core",
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
)

# Warnings of newer torch versions about megatron.core 0.16.1: start of the message, category.
UPSTREAM_WARNINGS = (
    (r"`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning),
    (r"The .grad attribute of a Tensor that is not a leaf", UserWarning),  # its optimizer asks views of parameters
    (r"WARNING: there is no optimizer on RANK", UserWarning),  # a rank that trains nothing: its stage report says so
    (r"`load_state_dict` is deprecated", FutureWarning),  # its checkpoint loader
    (r"torch.distributed.(_all_gather_base|_reduce_scatter_base) is a private function", FutureWarning),
)

# Names that 0.16.1 compares with None, but does not define if their import failed: module, name.
_FORGOTTEN_NAMES = (
    # RouterGatingLinearFunction raises NameError without Transformer Engine, on the GPU and on the CPU.
    ("megatron.core.transformer.moe.moe_utils", "te_general_gemm"),
)

_CLASSES = {f"megatron_llamapro.{row.ours}": row for row in CHANGES if row.how is How.CLASS}


def import_megatron() -> None:
    """Import `megatron.core` without its notices that Transformer Engine and Apex are missing. Silence its later
    warnings that no user can fix. Modules that are imported later still warn."""
    # One queue for kernels and collectives, so that tensor-parallel all-reduces overlap with the products after them.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in _MEGATRON_MODULES:
            importlib.import_module(module)
    for module, name in _FORGOTTEN_NAMES:
        vars(importlib.import_module(module)).setdefault(name, None)
    for message, category in UPSTREAM_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)


def become(built: object, ours: type[Ours]) -> Ours:
    """Make `ours` the class of an object that megatron.core built, and return the object. Its state does not change.

    All such changes go through this function, and each class has its row in `CHANGES`.

    Raises:
        ConfigError: the object's class is not the one that the row names, so its own methods would be lost; or that
            class lacks a method that `ours` replaces, so nobody would call ours.
    """
    name = _path(ours)
    row = _CLASSES[name]
    lineage = {_path(kind): kind for kind in ours.__mro__}
    upstream = lineage[row.upstream]
    if not (issubclass(ours, type(built)) and issubclass(type(built), upstream)):
        raise ConfigError(
            f"{name} replaces {row.upstream}, but this object is a {_path(type(built))}, whose own methods would "
            f"be lost: build the model or the optimizer with megatron.core's {upstream.__name__}"
        )
    missing = [member for member in row.replaces if not hasattr(upstream, member)]
    if missing:
        raise ConfigError(
            f"{name} replaces {row.upstream}.{missing[0]}, which this version of megatron.core does not have: install "
            f"megatron-core=={VERSION}"
        )
    built.__class__ = ours
    return cast(Ours, built)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
