"""megatron.core, imported without its noise and with a name that it forgot. Nothing is imported before
`import_megatron` is called."""

from __future__ import annotations

import importlib
import os
import warnings

# What this package imports of megatron.core, and what warns when it is imported.
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

# What megatron.core 0.16.1 makes newer versions of torch warn of. Start of the message, category.
UPSTREAM_WARNINGS = (
    (r"`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning),
    (
        r"The .grad attribute of a Tensor that is not a leaf",
        UserWarning,
    ),  # its optimizer asks views of parameters
    (r"WARNING: there is no optimizer on RANK", UserWarning),  # where nothing trains: its stage report says so
    (r"`load_state_dict` is deprecated", FutureWarning),  # its checkpoint loader
    (r"torch.distributed.(_all_gather_base|_reduce_scatter_base) is a private function", FutureWarning),
)


# Names that 0.16.1 tests for None, but does not have at all where their import failed: module, name.
_FORGOTTEN_NAMES = (
    # RouterGatingLinearFunction raises NameError without Transformer Engine, on a GPU as on the CPU.
    ("megatron.core.transformer.moe.moe_utils", "te_general_gemm"),
)


def import_megatron() -> None:
    """Import `megatron.core` without its notices that Transformer Engine and Apex are missing, and silence what it
    warns of later and nobody can mend. What is not imported by then warns as it likes."""
    # Kernels and collectives in one queue, so that tensor-parallel all-reduces overlap with the products after them.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in _MEGATRON_MODULES:
            importlib.import_module(module)
    for module, name in _FORGOTTEN_NAMES:
        vars(importlib.import_module(module)).setdefault(name, None)
    for message, category in UPSTREAM_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
