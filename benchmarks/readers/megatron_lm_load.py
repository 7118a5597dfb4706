"""Loads a converted checkpoint with Megatron-LM's own arguments, model and `load_checkpoint`, and compares the logits.

PYTHONPATH=MEGATRON_LM_CLONE:. torchrun --nproc-per-node TP×PP benchmarks/readers/megatron_lm_load.py \
    --checkpoint DIR --expanded HF_DIR [--tp N] [--pp N] [--stage_layers 1,2,2,1] [--sizes_from_checkpoint]

DIR is a torch_dist or legacy checkpoint as the converter writes it, or any folder with
latest_checkpointed_iteration.txt. Layers are those of Megatron-LM's local specification, which need no Transformer
Engine. The load is strict: if Megatron-LM falls back to a load that is not strict, this script fails.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from folders import proved

from megatron_llamapro.runtime import cpu, upstream

_TRACKER = "latest_checkpointed_iteration.txt"

# Fields of config.json → Megatron-LM's options with the same meaning.
_FROM_CONFIG = {
    "num_hidden_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "intermediate_size": "--ffn-hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "num_key_value_heads": "--num-query-groups",
    "max_position_embeddings": "--max-position-embeddings",
    "rms_norm_eps": "--norm-epsilon",
}
# The same for models with experts.
_FROM_CONFIG_OF_EXPERTS = {"num_local_experts": "--num-experts", "num_experts_per_tok": "--moe-router-topk"}
_LLAMA = (
    "--group-query-attention --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--attention-dropout 0 --hidden-dropout 0"
)
# With --use-checkpoint-args, Megatron-LM takes all of the above from a legacy checkpoint except this one.
_NEVER_FROM_CHECKPOINT = "rms_norm_eps"
# Kernels that need a GPU, Apex or Transformer Engine.
_CPU = (
    "--transformer-impl local --distributed-backend gloo --no-persist-layer-norm --no-masked-softmax-fusion "
    "--no-gradient-accumulation-fusion --no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion"
)
# Required options, although nothing is trained.
_RUN = "--micro-batch-size 1 --lr 1e-4 --train-iters 1 --tokenizer-type NullTokenizer --mock-data"
_LOAD = "--no-load-optim --no-load-rng --exit-on-missing-checkpoint"


def arguments(
    config: dict,
    *,
    load: Path,
    tp: int,
    pp: int,
    stage_layers: list[int] | None,
    divisible_by: int,
    sizes_from_checkpoint: bool,
) -> list[str]:
    """Return Megatron-LM's command line for a model with this config.json."""
    # NullTokenizer adds one token to the given size. The padded size is rounded up again.
    vocabulary = ["--vocab-size", str(config["vocab_size"] - 1), "--make-vocab-size-divisible-by", str(divisible_by)]
    split = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    if stage_layers:  # its own notation: Et|tt|tt|tL
        split += ["--pipeline-model-parallel-layout", "E" + "|".join("t" * count for count in stage_layers) + "L"]
    always = [*" ".join((_CPU, _RUN, _LOAD)).split(), "--load", str(load), *vocabulary, *split]
    if sizes_from_checkpoint:
        epsilon = [_FROM_CONFIG[_NEVER_FROM_CHECKPOINT], str(config[_NEVER_FROM_CHECKPOINT])]
        return [*always, *epsilon, "--use-checkpoint-args"]
    fields = {**_FROM_CONFIG, **(_FROM_CONFIG_OF_EXPERTS if "num_local_experts" in config else {})}
    sizes = [part for field, option in fields.items() for part in (option, str(config[field]))]
    rope = config.get("rope_parameters") or {}
    base = config.get("rope_theta") or rope.get("rope_theta", 10000)
    untied = [] if config.get("tie_word_embeddings") else ["--untie-embeddings-and-output-weights"]
    rotary = ["--seq-length", str(config["max_position_embeddings"]), "--rotary-base", str(int(base))]
    return [*always, *sizes, *untied, *rotary, *_LLAMA.split()]


def as_release(checkpoint: Path, folder: Path) -> Path:
    """Return a folder that Megatron-LM loads `checkpoint` from. It reads a tracker file, and the folder named in it."""
    if (checkpoint / _TRACKER).is_file():
        return checkpoint
    (folder / "release").symlink_to(checkpoint.absolute(), target_is_directory=True)
    (folder / _TRACKER).write_text("release")
    return folder


@contextlib.contextmanager
def only_strictly() -> Iterator[None]:
    """Make it an error that `load_checkpoint` loads again without checking keys after a strict load has failed."""
    load = torch.nn.Module.load_state_dict

    def load_strictly(module: torch.nn.Module, state: dict, strict: bool = True, assign: bool = False):
        if not strict:
            raise RuntimeError("Megatron-LM falls back to a load that is not strict; see its reason above")
        return load(module, state, strict=True, assign=assign)

    torch.nn.Module.load_state_dict = load_strictly
    try:
        yield
    finally:
        torch.nn.Module.load_state_dict = load


def load_with_megatron_lm(command_line: list[str]) -> list[torch.nn.Module]:
    """Return this rank's part of the model, loaded by `megatron.training.checkpointing.load_checkpoint`."""
    sys.argv = ["pretrain_gpt.py", *command_line]
    from gpt_builders import gpt_builder
    from megatron.training import get_model, initialize
    from megatron.training.checkpointing import load_checkpoint
    from model_provider import model_provider

    upstream.import_megatron()
    cpu.install()
    torch.cuda.device_count = lambda: 1  # without a device, Megatron-LM makes no model-parallel groups
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(major=9)  # read if TP > 1
    initialize._compile_dependencies = lambda: None  # CUDA kernels, and a compiler for datasets
    initialize.initialize_megatron(allow_no_cuda=True)
    model = get_model(functools.partial(model_provider, gpt_builder), wrap_with_ddp=False)
    for chunk in model:  # so that a weight that is not loaded is noticed
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
    with only_strictly():
        load_checkpoint(model, None, None)
    return model


def whole_logits(model: list[torch.nn.Module], tokens: torch.Tensor) -> torch.Tensor | None:
    """Return the logits [b, s, padded vocabulary] of `tokens` [b, s] on the last stage's ranks, else None."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    position_ids = torch.arange(tokens.shape[1]).expand(tokens.shape)

    def forward_step(_: object, chunk: torch.nn.Module):
        return chunk(tokens, position_ids, None), lambda logits, non_loss_data: logits

    for chunk in model:
        chunk.eval()
    is_virtual = len(model) > 1
    with torch.no_grad():
        logits = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(model) if is_virtual else None,
            model=model if is_virtual else model[0],
            num_microbatches=torch.distributed.get_world_size() if is_virtual else 1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    return gather_from_tensor_model_parallel_region(logits[0]) if logits else None


def main() -> None:
    """Load, compare with transformers on the last stage, and report on one rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--expanded", type=Path, required=True, help="the same model in Hugging Face's format")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--stage_layers", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    parser.add_argument(
        "--sizes_from_checkpoint", action="store_true", help="give Megatron-LM no sizes (--use-checkpoint-args)"
    )
    args = parser.parse_args()
    config = json.loads((args.expanded / "config.json").read_text())
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with tempfile.TemporaryDirectory() as folder:
        command_line = arguments(
            config,
            load=as_release(args.checkpoint, Path(folder)),
            tp=args.tp,
            pp=args.pp,
            stage_layers=args.stage_layers,
            divisible_by=args.make_vocab_size_divisible_by,
            sizes_from_checkpoint=args.sizes_from_checkpoint,
        )
        model = load_with_megatron_lm(command_line)
        torch.distributed.barrier()

    from transformers import AutoModelForCausalLM

    tokens = torch.arange(3, 35)[None] % config["vocab_size"]
    logits = whole_logits(model, tokens)
    if logits is not None:
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(args.expanded, dtype=torch.float32)(tokens).logits
        logits = logits[..., : config["vocab_size"]].float()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        difference = (logits - expected).abs().max().item()
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            how = "sizes from the checkpoint" if args.sizes_from_checkpoint else "sizes given"
            where = f"TP {args.tp} × PP {args.pp}" + (f", layers {args.stage_layers}" if args.stage_layers else "")
            proved(f"{where}, {how}: logits differ from transformers' by {difference:.1g} at most")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
