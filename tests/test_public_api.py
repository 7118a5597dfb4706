"""The public API: its names and signatures as text, so that a review sees every change, and the cost of importing
it."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path

import pytest

import megatron_llamapro

# A class is listed with the methods that a user calls.
SIGNATURES = """
hf_to_megatron(source, target, *, expansion=None, dtype=None, dial=None, kind=TargetKind(), options=Options())
megatron_to_hf(source, target, *, dial=None, max_shard_bytes=5000000000, options=Options())
megatron_to_megatron(source, target, *, expansion=None, dtype=None, dial=None, kind=TargetKind(), merge_adapters=True, options=Options())
expand_hf(source, target, *, expansion, dtype=None, max_shard_bytes=5000000000, options=Options())
verify(original, expanded, *, quick=False, trained=Trained.NEW_BLOCKS, undialed=None, num_workers=0, progress=nothing)
ConversionOptions(overwrite=False, resume=False, num_workers=0, progress=nothing, on_total=nothing)
Expansion(*, positions=None, num_added_blocks=None, placement=Placement.INTERLEAVED, blocks_per_group=1, init=Init.COPY, seed=0)
Expansion.at(*positions, init=Init.COPY, seed=0)
ExpansionPlan.unexpanded(num_layers)
ExpansionPlan.expand(self, positions)
Manifest.read(folder)
read_hf_model(folder)
freeze(chunks, plan, trainable=('added_blocks',), *, tie_word_embeddings=None, tensor_size=None)
skip_frozen_work(chunks, first_trainable_layer=None)
schedule_arguments(chunks, num_microbatches)
penalise_added_blocks(chunks, plan, *, weight, num_blocks=None)
penalty_arguments(chunk, token_weights)
ParamGroupRule(match, lr_mult=1.0, wd_mult=None)
param_group_overrides(chunks, rules=(), *, lr, min_lr=0.0)
LoraConfig(rank=None, alpha=None, targets=('linear_qkv', 'linear_proj', 'linear_fc1', 'linear_fc2'), blocks='originals')
add_adapters(chunks, plan, lora, *, seed)
allow_cpu()
"""  # noqa: E501


ENUMS = {"Init": ["copy", "random", "mean", "zero_norm"], "Placement": ["interleaved", "prefix", "suffix"]}


class Shown:
    """Shows a default as the text above does."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        if isinstance(self.value, Enum):
            return f"{type(self.value).__name__}.{self.value.name}"
        if is_dataclass(self.value):
            return f"{type(self.value).__name__}()"
        return self.value.__name__ if inspect.isfunction(self.value) else repr(self.value)


def signature_of(function: Callable) -> str:
    """Return names, kinds and defaults of the parameters."""
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(
            annotation=parameter.empty,
            default=parameter.default if parameter.default is parameter.empty else Shown(parameter.default),
        )
        for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


@pytest.mark.parametrize("line", SIGNATURES.strip().splitlines(), ids=lambda line: line.partition("(")[0])
def test_signatures_are_as_written(line: str) -> None:
    name, _, method = line.partition("(")[0].partition(".")
    value = getattr(megatron_llamapro, name)
    assert line == line.partition("(")[0] + signature_of(getattr(value, method) if method else value)


def test_every_public_name_has_a_signature() -> None:
    names = {line.partition("(")[0].partition(".")[0] for line in SIGNATURES.strip().splitlines()}
    names |= {"LlamaProError", *ENUMS}  # an error is caught, never called
    assert set(megatron_llamapro.__all__) == set(megatron_llamapro._PUBLIC) == names
    assert names < set(dir(megatron_llamapro))


@pytest.mark.parametrize("name", ENUMS)
def test_enums_have_the_written_values(name: str) -> None:
    assert [member.value for member in getattr(megatron_llamapro, name)] == ENUMS[name]


def test_type_checkers_see_the_imported_names() -> None:
    """The block for type checkers imports every name from the module that the table names."""
    source = ast.parse(Path(megatron_llamapro.__file__).read_text())
    [block] = [node for node in source.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: (str(node.module), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen.keys() == set(megatron_llamapro.__all__)
    for name, (module, attribute) in seen.items():
        assert getattr(import_module(module), attribute) is getattr(megatron_llamapro, name)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(AttributeError, match="module 'megatron_llamapro' has no attribute 'freze'"):
        megatron_llamapro.freze  # noqa: B018


@pytest.mark.parametrize(
    "statement",
    [
        "import megatron_llamapro",
        "from megatron_llamapro import hf_to_megatron",
        "from megatron_llamapro import Expansion, ExpansionPlan, Manifest, megatron_to_hf, verify",
    ],
)
def test_importing_loads_no_torch(statement: str) -> None:
    check = "import sys; sys.exit(str({'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules) or ''))"
    if statement != "import megatron_llamapro":
        check = check.replace(", 'numpy'", "")
    done = subprocess.run([sys.executable, "-c", f"{statement}\n{check}"], capture_output=True, text=True)
    assert (done.stderr.strip(), done.stdout) == ("", "")
