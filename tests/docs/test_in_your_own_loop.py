"""The page's code, run unchanged on megatron.core's own model: its parts, and the whole script."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from pages import ROOT, blocks, lines, workplace

import megatron_llamapro
import workers
from megatron_llamapro import megatron_to_hf, megatron_to_megatron, verify
from megatron_llamapro.model.names import named_parameters
from megatron_llamapro.testing.distributed import run_distributed

PAGE = "docs/in_your_own_loop.md"
SCRIPT = "\n".join(blocks(PAGE, "python"))


def page_code() -> dict:
    """Return all names that the page's Python blocks define."""
    names: dict = {"__name__": "my_loop"}
    exec(SCRIPT, names)
    return names


def loop_worker(folder: Path) -> tuple[torch.Tensor | None, tuple[list[int], ...], float, set[float], list[str]]:
    """Run a user's loop: megatron.core's GPTModel with its own local layers, over two stages."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_llamapro.testing.gather import whole_logits

    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    page = page_code()
    config = page["transformer_config"](folder, pipeline_model_parallel_size=2)
    model = page["build"](config, folder)
    page["load"]([model], folder)
    tokens = torch.arange(3, 35)[None]
    logits = whole_logits([model], tokens, vocab_size=131)
    report = page["freeze_originals"]([model], folder)
    page["skip"]([model])
    [ddp] = page["wrap"](config, [model])
    optimizer = page["optimizer_for"]([ddp], lr=1e-3)
    sizes = [p.numel() for group in optimizer.param_groups for p in group["params"]]
    rates = {group["max_lr"] for group in optimizer.param_groups}
    ddp.zero_grad_buffer()
    page["forward_backward"](
        [ddp],
        num_microbatches=2,
        forward_step_func=lambda _, chunk: (chunk(tokens, tokens - 3, None, labels=tokens), mean_loss),
        data_iterator=[None],
        seq_length=32,
        micro_batch_size=1,
        forward_only=False,
    )
    moving = sorted(named.name for named in named_parameters([ddp]) if with_gradient(named.parameter))
    adapted = page["adapt_originals"]([model], folder, rank=2)
    layers = list(report.trainable_layers), list(adapted.trainable_layers)
    return logits, layers, sum(sizes) / report.num_trainable, rates, moving


def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict]:
    return losses.mean(), {}


def with_gradient(parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad and bool(parameter.main_grad.any())


def test_the_pages_parts_train_the_added_blocks_only(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    source = tiny_llama(rms_norm_eps=1e-6)
    page_code()["convert"](source, tmp_path / "pro", positions=(2, 5))
    first, last = run_distributed(loop_worker, 2, tmp_path / "pro")
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(source)(torch.arange(3, 35)[None]).logits
    torch.testing.assert_close(last[0], expected, rtol=1e-4, atol=1e-4)
    assert (first[1], last[1]) == (([2], [0, 1]), ([5], [3, 4]))
    assert first[2] == last[2] == 1.0  # the optimizer holds the trainable part and nothing else
    assert first[3] == {1e-3, 5e-4}
    for layer, moving in ((2, first[4]), (5, last[4])):
        block = f"decoder.layers.{layer}"
        assert moving == [f"{block}.mlp.linear_fc2.weight", f"{block}.self_attention.linear_proj.weight"]


def load_worker(folder: Path) -> torch.Tensor:
    """Load a checkpoint into megatron.core's own GPTModel as the page does, in one process."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_llamapro.testing.gather import whole_logits

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    page = page_code()
    model = page["build"](page["transformer_config"](folder), folder)
    page["load"]([model], folder)
    return whole_logits([model], torch.arange(3, 35)[None], vocab_size=131)


def test_a_runs_converted_checkpoint_loads_into_a_stock_model(run_config: Callable, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    config = run_config(train_iters=1)
    run_distributed(workers.train, 1, config)
    megatron_to_megatron(config.checkpoint.save, tmp_path / "whole")
    megatron_to_hf(config.checkpoint.save, tmp_path / "hf")
    [logits] = run_distributed(load_worker, 1, tmp_path / "whole")
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(tmp_path / "hf")(torch.arange(3, 35)[None]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_script_runs_as_typed(tmp_path: Path) -> None:
    """With the page's own commands: from a tiny LLaMA to a trained, exported and verified model."""
    from transformers import AutoModelForCausalLM

    [commands] = [lines(text) for text in blocks(PAGE, "") if "torchrun" in text]
    (workplace(tmp_path) / "my_loop.py").write_text(SCRIPT)
    programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}
    printed = ""
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "pip":
            continue  # the tests have everything installed
        words = [*programs.get(program, [program]), *arguments]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    for rank, layer in ((0, 2), (1, 5)):
        assert f"rank {rank} trains layers ({layer},): 30848 parameters" in printed
    losses = [float(loss) for loss in re.findall(r"^loss (\S+)$", printed, re.MULTILINE)]
    assert len(losses) == 5 and losses == sorted(losses, reverse=True)
    work = tmp_path / "work"
    checks = list(verify(work / "llama", work / "exported"))
    assert all(f"{check}\n" in printed for check in checks)
    assert {check.name: check.ok for check in checks} == dict.fromkeys(
        ("lineage", "original tensors", "manifest", "added blocks"), True
    )
    assert checks[-1].text == "2, 5: trained"
    assert AutoModelForCausalLM.from_pretrained(work / "exported").config.num_hidden_layers == 6


def test_only_public_names_are_used() -> None:
    imports = [node for node in ast.walk(ast.parse(SCRIPT)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    assert not any(module.startswith("megatron_llamapro") for module in modules)
    ours = [node for node in imports if isinstance(node, ast.ImportFrom) and "llamapro" in str(node.module)]
    assert {node.module for node in ours} == {"megatron_llamapro"}
    assert {alias.name for node in ours for alias in node.names} <= set(megatron_llamapro.__all__)


def test_every_public_name_is_explained() -> None:
    _, _, table = (ROOT / PAGE).read_text().partition("| name | for |")
    assert set(re.findall(r"`(\w+)`", table)) >= set(megatron_llamapro.__all__)


def test_the_page_names_the_installed_versions() -> None:
    page = (ROOT / PAGE).read_text()
    assert f"`megatron.core` {metadata.version('megatron-core')}" in page
    [accepted] = re.findall(r'"(megatron-core[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert f"`{accepted}`" in page
