"""One candidate of benchmarks/train_step.py: `step_worker.py CANDIDATE MODEL FOLDER`.

It reads one word per line and answers each with a line of JSON. `step` takes one optimizer step and returns its seconds
and loss. `memory`, as the first word, takes two steps and returns the bytes that they needed above the weights.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from step_models import MODELS, StepModel, tokens_and_labels, trained_names

Step = Callable[[], float]
"""Takes one step and returns its loss."""
Prepared = tuple[int, Callable[[], Step]]
"""Bytes of the loaded weights, and a function that makes the rest of a step: optimizer and gradient buffers."""

LEARNING_RATE, CLIP_GRAD = 1e-4, 1.0
ADAM = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def ours(model: StepModel, folder: Path, *, trainable: str = "added_blocks") -> Prepared:
    """Prepare this program's own model, freezing, DDP, optimizer and `train_step`."""
    from megatron_llamapro.runtime import cpu
    from megatron_llamapro.runtime.distributed import start_model_parallel, start_world
    from megatron_llamapro.runtime.upstream import import_megatron

    import_megatron()
    cpu.install()
    start_world()
    from megatron_llamapro.checkpoint.formats.small_files import SmallFiles
    from megatron_llamapro.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
    from megatron_llamapro.expansion.manifest import Manifest
    from megatron_llamapro.expansion.trainable import first_trainable_layer
    from megatron_llamapro.families.hf_config import model_shape, read_hf_config
    from megatron_llamapro.model.build import build_model
    from megatron_llamapro.model.freeze import freeze
    from megatron_llamapro.model.skip_frozen import skip_frozen_work
    from megatron_llamapro.optimizer.build import build_optimizer, build_scheduler
    from megatron_llamapro.training.checkpoints.state import load_model
    from megatron_llamapro.training.machine import Machine, connect, wrapped
    from megatron_llamapro.training.step import train_step

    parallel, checkpoint = ParallelConfig(), folder / "megatron"
    layout = start_model_parallel(parallel, seed=1)
    shape = model_shape(read_hf_config(checkpoint))
    models = build_model(shape, model=ModelConfig(checkpoint=str(checkpoint)), parallel=parallel, precision="fp32")
    plan = Manifest.read(checkpoint).plan
    report = freeze(models, plan, (trainable,), tie_word_embeddings=shape.tie_word_embeddings)
    skip_frozen_work(models, first_trainable_layer((trainable,), plan))
    load_model(models, SmallFiles(checkpoint))
    settings = OptimizerConfig(lr=LEARNING_RATE, lr_decay_style="constant", lr_warmup_fraction=0.0, clip_grad=CLIP_GRAD)

    def prepare() -> Step:
        chunks = [wrapped(chunk, parallel) for chunk in models]
        optimizer = build_optimizer(chunks, settings, precision="fp32")
        scheduler = build_scheduler(optimizer, settings, train_iters=1000)
        connect(models[0].config, chunks, optimizer, overlap_grad_reduce=False, overlap_param_gather=False)
        machine = Machine(layout=layout, chunks=chunks, optimizer=optimizer, scheduler=scheduler, report=report)
        number = 0

        def step() -> float:
            nonlocal number
            tokens, labels = tokens_and_labels(model, number)
            number += 1
            batch = {
                "tokens": tokens,
                "labels": labels,
                "loss_mask": torch.ones(tokens.shape),
                "position_ids": torch.arange(model.seq_length).expand_as(tokens),
            }
            result = train_step(
                machine,
                [iter([batch])],
                num_microbatches=1,
                micro_batch_size=model.batch_size,
                seq_length=model.seq_length,
            )
            return result.loss.loss

        return step

    return weight_bytes(models[0]), prepare


def ours_everything(model: StepModel, folder: Path) -> Prepared:
    """Prepare the same with nothing frozen."""
    return ours(model, folder, trainable="everything")


def transformers(model: StepModel, folder: Path) -> Prepared:
    """Prepare `LlamaForCausalLM` with SDPA, frozen as in LLaMA-Factory: no `requires_grad` but for the added blocks,
    and no gradient checkpointing. The optimizer is transformers' Trainer's default, torch's fused AdamW, with clipped
    gradients."""
    from transformers import LlamaForCausalLM

    net = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="sdpa")
    for name, parameter in net.named_parameters():
        parameter.data = parameter.data.clone()  # a mapped file would not count as memory
        parameter.requires_grad_(name.startswith(trained_names(model.added_layers)))
    net.train()

    def prepare() -> Step:
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True, **ADAM)
        number = 0

        def step() -> float:
            nonlocal number
            tokens, labels = tokens_and_labels(model, number)
            number += 1
            optimizer.zero_grad()
            loss = net(tokens, labels=labels, shift_labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP_GRAD)
            optimizer.step()
            return loss.item()

        return step

    return weight_bytes(net), prepare


def floor(model: StepModel, folder: Path) -> Prepared:
    """Prepare only the matrix products and SDPA calls of our step, on separate weights."""
    from step_floor import Floor

    products = Floor(model)

    def step() -> float:
        products.run()
        return 0.0

    return products.weight_bytes, lambda: step


CANDIDATES: dict[str, Callable[[StepModel, Path], Prepared]] = {
    "ours": ours,
    "ours_everything": ours_everything,
    "transformers": transformers,
    "floor": floor,
}


def weight_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def resident_bytes() -> dict[str, int]:
    """Return VmRSS, VmHWM (the largest VmRSS so far) and RssFile (pages of files, mostly code) of this process."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0] in ("VmRSS:", "VmHWM:", "RssFile:")}


def peak_above_the_weights(prepare: Callable[[], Step], num_steps: int = 2) -> int:
    """Return the peak resident bytes of the first steps, above the resident bytes with only the weights loaded.

    Code that a step touches for the first time adds pages of files. They are subtracted.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to VmRSS
    before = resident_bytes()
    step = prepare()
    for _ in range(num_steps):
        step()
    after = resident_bytes()
    return after["VmHWM"] - before["VmRSS"] - (after["RssFile"] - before["RssFile"])


def main() -> None:
    candidate, name, folder = sys.argv[1:]
    weights, prepare = CANDIDATES[candidate](MODELS[name], Path(folder))
    step: Step | None = None
    for line in sys.stdin:
        if line.strip() == "memory":
            answer = {"weight_bytes": weights, "peak_bytes": peak_above_the_weights(prepare)}
        else:
            step = step or prepare()
            started, cpu_started = time.perf_counter(), time.process_time()
            loss = step()
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
            answer = {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
