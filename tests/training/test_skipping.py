"""A step whose loss or gradient is not finite updates nothing, exactly as if the step had been skipped by hand.

The NaN are real: one token's embedding is NaN in the checkpoint, and one document contains it. The run is compared, bit
for bit, with a run of a checkpoint without NaN that skips the step; that run is compared with transformers.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import workers
from megatron_llamapro.checkpoint.convert import hf_to_megatron
from megatron_llamapro.checkpoint.formats.folders import LATEST
from megatron_llamapro.checkpoint.formats.small_files import SmallFiles
from megatron_llamapro.config.schema import BlendEntry, LoraConfig, OptimizerConfig, ParallelConfig, RunConfig
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.testing.checkpoints import read_tensors, read_with_torch
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.training.checkpoints.resume import read_progress

BAD_TOKEN, BAD_STEP, STEPS, LR = 130, 2, 4, 1e-2
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "dp2 overlap": (2, ParallelConfig(**OVERLAP)),
    "tp2 sequence parallel": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "pp2 virtual 2 dp2 overlap": (
        4,
        ParallelConfig(
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            pipeline_stage_layers=(2, 1, 2, 1),
            **OVERLAP,
        ),
    ),
}


def edited(source: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Convert the tiny model, with its tensors edited and blocks added, to Megatron's format."""
    hf = shutil.copytree(source, folder / "hf")
    tensors = load_file(hf / "model.safetensors")
    edit(tensors)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(hf, folder / "megatron", expansion=Expansion.at(2, 5))
    return folder / "megatron"


@pytest.fixture(scope="module")
def bad_checkpoints(models: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the other fixtures' models with a NaN only in the bad token's embedding."""
    made = {}

    def make(dtype: str) -> Path:
        if dtype not in made:
            made[dtype] = edited(
                models(dtype=dtype).original_hf,
                tmp_path_factory.mktemp("bad"),
                lambda tensors: tensors["model.embed_tokens.weight"][BAD_TOKEN].fill_(math.nan),
            )
        return made[dtype]

    return make


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write documents of random tokens; the bad token is in the second step of four."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("data") / "text"
    documents = torch.randint(3, BAD_TOKEN, (20, 40), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    documents[16, 20] = BAD_TOKEN
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for document in documents.numpy():
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def on_bad_data(run_config: Callable, token_file: str) -> Callable[..., RunConfig]:
    """Return `run_config` on those documents."""

    def make(*, lora: LoraConfig | None = None, **settings: object) -> RunConfig:
        config = run_config(train_iters=STEPS, **settings)
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, train=(BlendEntry(token_file),)),
            lora=lora or LoraConfig(),
        )

    return make


def progress_at(config: RunConfig, step: int) -> dict:
    return read_progress(SmallFiles(Path(config.checkpoint.save) / f"iter_{step:07d}"))


def saved(config: RunConfig, step: int) -> dict[str, torch.Tensor]:
    """Return the trained weights, main parameters and moments of a run's checkpoint."""
    return read_with_torch(Path(config.checkpoint.save) / f"iter_{step:07d}")


def states(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys() and one
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def updates(config: RunConfig, step: int) -> set[float]:
    """Return the update counts of the optimizer."""
    common = torch.load(Path(config.checkpoint.save) / f"iter_{step:07d}" / "common.pt", weights_only=True)
    return {group["step"] for group in common["optimizer"]["optimizer"]["param_groups"]}


CASES = [
    ("dp2 overlap", "bfloat16", False),
    ("tp2 sequence parallel", "float32", False),
    ("pp2", "float32", True),
    ("pp2 virtual 2 dp2 overlap", "float32", False),
]


@pytest.mark.parametrize(("layout", "dtype", "with_lora"), CASES)
def test_a_nan_changes_nothing(
    layout: str, dtype: str, with_lora: bool, on_bad_data: Callable, bad_checkpoints: Callable
) -> None:
    world_size, parallel = LAYOUTS[layout]
    settings: dict = {"parallel": parallel, "dtype": dtype}
    if with_lora:
        settings |= {"trainable": ("lora",), "lora": LoraConfig(rank=2)}
    bad = on_bad_data(checkpoint=bad_checkpoints(dtype), save="bad", **settings)
    good = on_bad_data(save="good", skip_iterations=(BAD_STEP,), **settings)
    skipped, left_out = (run_distributed(workers.train, world_size, config) for config in (bad, good))
    for ours, theirs in zip(skipped, left_out, strict=True):
        assert ours.skips == [(BAD_STEP, "skipped", 1, 1)] and theirs.skips == [(BAD_STEP, "left out", 1, 0)]
        assert ours.figures == theirs.figures and [step for step, *_ in ours.figures] == [1, 3, 4]
    assert same(saved(bad, STEPS), saved(good, STEPS))
    assert updates(bad, STEPS) == updates(good, STEPS) == {STEPS - 1}


def test_a_skipped_step_equals_transformers_without_it(on_bad_data: Callable, models: Callable) -> None:
    """AdamW over all other steps, each with its own learning rate and data. Within 1e-4: Adam's updates have the size
    of the learning rate even for tiny gradients, so their last bits count."""
    config = on_bad_data(skip_iterations=(BAD_STEP,))
    figures = run_distributed(workers.train, 1, config)[0].figures
    [steps] = run_distributed(workers.batches, 1, config)
    assert [BAD_TOKEN in tokens for tokens, _ in steps] == [step == BAD_STEP for step in range(1, STEPS + 1)]
    reference = list(transformers_training(models().expanded_hf, steps))
    assert [step for step, *_ in figures] == [step for step, *_ in reference]
    for ours, theirs in zip(figures, reference, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def transformers_training(folder: Path, steps: list[tuple]) -> Iterator[tuple[int, float, float, float]]:
    """Yield step, loss, gradient norm and learning rate of every step but the bad one, by transformers and torch
    alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(False)
    for layer in (2, 5):
        model.model.layers[layer].requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": OptimizerConfig().weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step, (tokens, labels) in enumerate(steps, 1):
        if step == BAD_STEP:
            continue
        rate = LR * (1 + math.cos(math.pi * (step - 1) / STEPS)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        optimizer.step()
        yield step, loss.item(), norm, rate


def go_back(config: RunConfig, step: int) -> None:
    """Make a run resume from an earlier checkpoint."""
    (Path(config.checkpoint.save) / LATEST).write_text(f"{step}\n")


def with_every_step_saved(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, save_interval=1))


def test_a_resumed_run_remembers_skipped_steps(on_bad_data: Callable, bad_checkpoints: Callable) -> None:
    """The bad step saves the same state as the step before it. A run resumed from it ends with the same bits."""
    world_size, parallel = LAYOUTS["dp2 overlap"]
    config = with_every_step_saved(on_bad_data(checkpoint=bad_checkpoints("float32"), parallel=parallel))
    whole = run_distributed(workers.train, world_size, config)[0].figures
    last = states(saved(config, STEPS))
    before, after, later = (states(saved(config, step)) for step in (BAD_STEP - 1, BAD_STEP, BAD_STEP + 1))
    assert same(before, after) and not same(after, later)
    assert [updates(config, step) for step in range(1, STEPS + 1)] == [{1}, {1}, {2}, {3}]
    progress = [progress_at(config, step) for step in range(1, STEPS + 1)]
    assert [each["skipped_steps"] for each in progress] == [[], [BAD_STEP], [BAD_STEP], [BAD_STEP]]
    assert [each["skipped_in_a_row"] for each in progress] == [0, 1, 0, 0]
    assert [each["consumed_samples"] for each in progress] == [4, 8, 12, 16]
    go_back(config, BAD_STEP)
    rest = run_distributed(workers.train, world_size, config)[0]
    assert rest.figures == whole[1:] and rest.skips == []
    assert same(states(saved(config, STEPS)), last) and progress[-1] == progress_at(config, STEPS)


def test_a_checkpoint_before_the_first_update_is_saved(on_bad_data: Callable) -> None:
    """The optimizer has no moments to save yet."""
    world_size, parallel = LAYOUTS["pp2"]
    config = with_every_step_saved(on_bad_data(parallel=parallel, skip_iterations=("1-2",)))
    whole = run_distributed(workers.train, world_size, config)[0].figures
    last = saved(config, STEPS)
    assert [updates(config, step) for step in range(1, STEPS + 1)] == [{0}, {0}, {1}, {2}]
    assert same(
        read_tensors(Path(config.checkpoint.save) / "iter_0000002"), read_tensors(Path(config.model.checkpoint))
    )
    go_back(config, 2)
    assert run_distributed(workers.train, world_size, config)[0].figures == whole
    assert [step for step, *_ in whole] == [3, 4] and same(saved(config, STEPS), last)


@pytest.mark.parametrize(("most", "left_out", "message"), [(5, (), "no error"), (2, (2,), "step 3: the loss is")])
def test_an_overflowing_gradient_norm_skips_the_step(
    most: int, left_out: tuple[int, ...], message: str, on_bad_data: Callable, models: Callable, tmp_path: Path
) -> None:
    """In every step the loss and each gradient are finite, but not the sum of their squares. A step skipped by hand
    neither lengthens nor ends the row of skipped steps."""
    huge = edited(models().original_hf, tmp_path, lambda tensors: tensors["lm_head.weight"].mul_(1e20))
    config = on_bad_data(checkpoint=huge, max_skipped_steps=most, skip_iterations=left_out)
    [error] = run_distributed(workers.training_error, 1, config)
    assert error.startswith(message), error
    if error == "no error":
        assert same(read_tensors(Path(config.checkpoint.save)), read_tensors(huge))
    else:
        assert "and the gradient norm inf; steps in a row without an update: 2, the limit" in error
        assert re.search(r"the loss is \d\.\d+e\+20 ", error)


def test_a_gradient_of_zero_is_an_error(on_bad_data: Callable) -> None:
    """In the first step the cause is the trainable part: these projections feed into zeroed ones. Later it is
    divergence: the hidden states are so large that the final norm gives zeros, and the loss is that of uniform
    guessing."""
    frozen_out = on_bad_data(trainable=("linear_qkv",), max_skipped_steps=3)
    far = on_bad_data(max_skipped_steps=2)
    far = dataclasses.replace(far, optimizer=dataclasses.replace(far.optimizer, lr=1e8))
    errors = [run_distributed(workers.training_error, 1, config)[0] for config in (frozen_out, far)]
    assert "step 2: the gradient norm is exactly 0, so nothing learns: check model.trainable" in errors[0]
    assert f"the loss is {math.log(131):.4g} and the gradient norm 0; steps in a row without an update: 2" in errors[1]
