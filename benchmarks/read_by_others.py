"""Proves that other projects' tools read this project's checkpoints: a tiny model, each tool in its own environment.

python benchmarks/read_by_others.py [--tools peft vllm …] [--venvs DIR] [--megatron_lm CLONE]

Prints one line per tool: ok, not run and why, or FAIL. Exits with 1 if one failed. docs/other_tools.md has the results.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.errors import ConfigError
from venvs import python_of

ROOT = Path(__file__).resolve().parents[1]
READERS = ROOT / "benchmarks" / "readers"
_LONGEST_SECONDS = 600
_SHOWN_CHARACTERS = 3000
_PROVED = "proved: "
# No tool fetches anything from a hub. vLLM reserves only the memory that the tiny model needs.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


# The tiny models, with their differences from a LLaMA.
MODELS: dict[str, dict] = {
    "llama": {},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 3},
}


@dataclasses.dataclass(frozen=True)
class Tool:
    """Another project's tool, and the script that makes it read a checkpoint."""

    name: str
    script: str
    venv: str | None
    """Name of its environment. None: this project's own."""
    layout: tuple[int, int] | None = None
    """Tensor and pipeline sizes, for Megatron-LM. It runs one process per rank, with its clone on the path."""
    stage_layers: tuple[int, ...] | None = None
    """Layers on each (virtual) stage, for Megatron-LM. None: as even as possible."""
    options: tuple[str, ...] = ()
    """Further options of Megatron-LM's script."""
    is_legacy: bool = False
    """Whether Megatron-LM reads legacy shards in its layout, instead of torch_dist."""
    model: str = "llama"
    """The model that it reads, one of `MODELS`."""


TOOLS = (
    Tool("transformers", "transformers_decode.py", None),
    Tool("mergekit", "mergekit_passthrough.py", "mergekit"),
    Tool("peft", "peft_lora.py", "peft"),
    Tool("lm-eval", "lm_eval_task.py", "lm-eval"),
    Tool("vllm", "vllm_decode.py", "vllm"),
    Tool("llama.cpp", "llama_cpp_gguf.py", "llama.cpp"),
    Tool("megatron-bridge", "megatron_bridge_load.py", "megatron-bridge"),
    Tool("megatron-lm", "megatron_lm_load.py", "megatron-bridge", layout=(1, 1)),
    Tool("megatron-lm-tp2-pp2", "megatron_lm_load.py", "megatron-bridge", layout=(2, 2)),
    Tool("megatron-lm-legacy", "megatron_lm_load.py", "megatron-bridge", layout=(1, 1), is_legacy=True),
    Tool(
        "megatron-lm-legacy-tp2-pp2",
        "megatron_lm_load.py",
        "megatron-bridge",
        layout=(2, 2),
        options=("--sizes_from_checkpoint",),
        is_legacy=True,
    ),
    Tool("megatron-lm-uneven", "megatron_lm_load.py", "megatron-bridge", layout=(1, 2), stage_layers=(4, 2)),
    Tool("megatron-lm-virtual", "megatron_lm_load.py", "megatron-bridge", layout=(1, 2), stage_layers=(1, 2, 2, 1)),
    Tool(
        "megatron-lm-legacy-uneven",
        "megatron_lm_load.py",
        "megatron-bridge",
        layout=(1, 2),
        stage_layers=(4, 2),
        is_legacy=True,
    ),
    Tool(
        "megatron-lm-legacy-virtual",
        "megatron_lm_load.py",
        "megatron-bridge",
        layout=(2, 2),
        stage_layers=(1, 2, 2, 1),
        is_legacy=True,
    ),
    # Tensor size 1: on several ranks experts need sequence parallelism, and the norms of layers without Transformer
    # Engine refuse it.
    Tool("megatron-lm-mixtral", "megatron_lm_load.py", "megatron-bridge", layout=(1, 2), model="mixtral"),
    Tool(
        "megatron-lm-mixtral-legacy",
        "megatron_lm_load.py",
        "megatron-bridge",
        layout=(1, 2),
        options=("--sizes_from_checkpoint",),
        is_legacy=True,
        model="mixtral",
    ),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one tool."""

    status: str
    """ok, not run or FAIL."""
    text: str
    """The proof, or the reason why there is none."""


def make_checkpoints(folder: Path, **settings: object) -> dict[str, Path]:
    """Make a tiny random model with a sentencepiece tokenizer, its expansion by two blocks, and that in Megatron's
    format. The commands write them. `settings` are `make_tiny_model`'s."""
    from megatron_llamapro.testing.tiny_models import make_tiny_model

    folder.mkdir()
    made = {name: folder / name for name in ("original", "expanded", "megatron")}
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": topic}) + "\n" for _, topic in sorted(topics.items())))
    # Heads of size 64: every tool has kernels for them.
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
    make_tiny_model(made["original"], **sizes, **settings, with_tokenizer=False)
    _llamapro("train-tokenizer", "--input", text, "--vocab_size", 512, "--output_dir", made["original"])
    _llamapro("expand", "--source", made["original"], "--target", made["expanded"], "--num_added_blocks", 2)
    _llamapro("convert", "hf-to-megatron", "--source", made["expanded"], "--target", made["megatron"])
    return made


def make_legacy(expanded: Path, folder: Path, tool: Tool) -> Path:
    """Write legacy shards of the expanded model in the tool's layout: they cannot be loaded in another."""
    assert tool.layout is not None
    tp, pp = tool.layout
    into = ["--target", folder, "--format", "legacy", "--tensor_model_parallel_size", tp]
    into += ["--pipeline_model_parallel_size", pp]
    if tool.stage_layers:
        into += ["--pipeline_stage_layers", _comma_separated(tool.stage_layers)]
        if len(tool.stage_layers) > pp:
            into += ["--virtual_pipeline_model_parallel_size", len(tool.stage_layers) // pp]
    _llamapro("convert", "hf-to-megatron", "--source", expanded, *into)
    return folder


def _llamapro(*words: object) -> None:
    command = [sys.executable, "-m", "megatron_llamapro", *words]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def read_with(tool: Tool, made: dict[str, Path], *, venvs: Path, megatron_lm: Path | None) -> Result:
    """Let a tool read the checkpoints, in its own process."""
    if tool.layout and megatron_lm is None:
        return Result("not run", "give --megatron_lm DIR, a clone of it: no package contains its loader")
    try:
        python = python_of(tool.venv, venvs) if tool.venv else Path(sys.executable)
    except ConfigError as error:
        return Result("not run", str(error))
    with tempfile.TemporaryDirectory() as work_dir:
        if tool.is_legacy:
            made = {**made, "megatron": make_legacy(made["expanded"], Path(work_dir) / "legacy", tool)}
        command = _command(tool, python, made, Path(work_dir))
        path = os.pathsep.join(map(str, [megatron_lm, ROOT] if tool.layout else [ROOT]))
        environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": path}
        try:
            ended = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=_LONGEST_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return Result("FAIL", f"still running after {_LONGEST_SECONDS} seconds")
    proofs = [line.removeprefix(_PROVED) for line in ended.stdout.splitlines() if line.startswith(_PROVED)]
    if ended.returncode == 0 and proofs:
        return Result("ok", proofs[-1])
    print(ended.stderr[-_SHOWN_CHARACTERS:], file=sys.stderr)
    errors = [line for line in ended.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
    return Result("FAIL", errors[-1].strip()[:300] if errors else f"exit code {ended.returncode}")


def _command(tool: Tool, python: Path, made: dict[str, Path], work_dir: Path) -> list[str]:
    script = str(READERS / tool.script)
    if tool.layout is None:
        given = {**made, "work_dir": work_dir}
        return [str(python), script, *(part for name, path in given.items() for part in (f"--{name}", str(path)))]
    tp, pp = tool.layout
    torchrun = [str(python), "-m", "torch.distributed.run", "--nproc-per-node", str(tp * pp), script]
    given = ["--checkpoint", made["megatron"], "--expanded", made["expanded"], "--tp", tp, "--pp", pp]
    given += ["--stage_layers", _comma_separated(tool.stage_layers)] if tool.stage_layers else []
    return [*torchrun, *map(str, given), *tool.options]


def _comma_separated(counts: tuple[int, ...]) -> str:
    return ",".join(map(str, counts))


def main() -> int:
    """Make the checkpoints, and let every tool read them."""
    parser = CommandParser(description=__doc__)
    names = [tool.name for tool in TOOLS]
    parser.add_argument("--tools", nargs="+", choices=names, default=names, metavar="TOOL", help=", ".join(names))
    parser.add_argument("--venvs", type=Path, default=ROOT / "runs" / "venvs", metavar="DIR", help="their environments")
    parser.add_argument("--megatron_lm", type=Path, metavar="DIR", help="a clone of Megatron-LM at core_v0.16.1")
    args = parser.parse_args()
    if args.megatron_lm and not (args.megatron_lm / "megatron" / "training").is_dir():
        parser.error(f"--megatron_lm {args.megatron_lm} is not a clone of Megatron-LM")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        tools = [tool for tool in TOOLS if tool.name in args.tools]
        made = {model: make_checkpoints(Path(folder) / model, **MODELS[model]) for model in {t.model for t in tools}}
        for tool in tools:
            megatron_lm = args.megatron_lm.absolute() if args.megatron_lm else None
            result = read_with(tool, made[tool.model], venvs=args.venvs, megatron_lm=megatron_lm)
            print(f"{result.status:8}{tool.name:27} {result.text}", flush=True)
            failed |= result.status == "FAIL"
    return int(failed)


if __name__ == "__main__":
    run_command(main)
