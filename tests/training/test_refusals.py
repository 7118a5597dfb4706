"""An impossible run is refused before anything is built, with the same line on every rank."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import programs
import workers
from megatron_llamapro.checkpoint.convert import legacy, megatron_to_megatron
from megatron_llamapro.checkpoint.formats.folders import latest_checkpoint
from megatron_llamapro.config.io import dump_yaml
from megatron_llamapro.config.schema import BlendEntry, KeepConfig, ParallelConfig
from megatron_llamapro.testing.distributed import run_distributed


def with_data(config, **fields: object):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


def with_model(config, **fields: object):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def test_every_refusal_is_the_same_line_on_every_rank(
    run_config: Callable, models: Callable, token_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """All cases share one start of the ranks, because the checks change nothing."""
    base = run_config()
    short = shutil.copytree(base.model.checkpoint, tmp_path / "short")
    plan = json.loads((short / "llamapro.json").read_text())
    plan["plan"]["layers"].pop()
    (short / "llamapro.json").write_text(json.dumps(plan))
    shards = tmp_path / "shards"
    megatron_to_megatron(Path(base.model.checkpoint), shards, kind=legacy())
    cut_bin = tmp_path / "cut"
    for ending in (".bin", ".idx"):
        shutil.copyfile(f"{token_files[0]}{ending}", f"{cut_bin}{ending}")
    with Path(f"{cut_bin}.bin").open("r+b") as file:
        file.truncate(1000)
    (tmp_path / "empty").mkdir()
    pointer = shutil.copytree(base.model.checkpoint, tmp_path / "pointer")
    (pointer / "generation_config.json").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 9\n"
    )
    cases = {
        "common.pt was not loaded: it asks for": with_model(base, checkpoint=str(hostile_copy(base, tmp_path))),
        "is not a folder": with_model(base, checkpoint=str(tmp_path / "nowhere")),
        "is not a Megatron checkpoint": with_model(base, checkpoint=str(models().original_hf)),
        "is a legacy checkpoint, for one division of ranks: convert it with": with_model(base, checkpoint=str(shards)),
        "its manifest has 5 layers": with_model(base, checkpoint=str(short)),
        "convert it with --dtype bfloat16": dataclasses.replace(
            base, training=dataclasses.replace(base.training, precision="bf16")
        ),
        "did you mean 'added_blocks'": with_model(base, trainable=("added_block",)),
        "has no added blocks": with_model(base, checkpoint=str(models().original_megatron)),
        "no added block trains: set it to 0, or add added_blocks to model.trainable": dataclasses.replace(
            with_model(base, trainable=("embedding",)), keep=KeepConfig(penalty_weight=1.0)
        ),
        "needs a CUDA device": with_model(base, transformer_impl="transformer_engine"),
        "cannot be divided by parallel.tensor_model_parallel_size 4": dataclasses.replace(
            base, parallel=ParallelConfig(tensor_model_parallel_size=4)
        ),
        "positions": with_data(base, seq_length=4096),
        "does not exist": with_data(base, train=(BlendEntry(str(tmp_path / "none")),)),
        "one is truncated": with_data(base, train=(BlendEntry(str(cut_bin)),)),
        "fewer than one sample": with_data(base, valid={"tiny": str(one_token_file(tmp_path, models))}),
        "give a tokenizer file": with_data(base, tokenizer=str(tmp_path / "empty")),
        "give the folder in it that has one": with_data(base, tokenizer=str(tmp_path)),
        "`hf download owner/name` fetches it": with_data(base, tokenizer="owner/name"),
        "generation_config.json is a Git-LFS pointer": with_model(base, checkpoint=str(pointer)),
    }
    answers = run_distributed(workers.set_up_errors, 4, list(cases.values()))
    for message, *on_ranks in zip(cases, *answers, strict=True):
        assert all(message in str(answer) for answer in on_ranks), (message, on_ranks)
        assert all("\n" not in answer for answer in on_ranks)
    assert not (tmp_path / "ran").exists()


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def hostile_copy(config, folder: Path) -> Path:
    """Copy the checkpoint, with a common state that runs code when megatron.core loads it."""
    copy = shutil.copytree(config.model.checkpoint, folder / "hostile")
    torch.save({"args": Hostile(folder / "ran")}, copy / "common.pt")
    return copy


def one_token_file(folder: Path, models: Callable) -> Path:
    from megatron_llamapro.data.preprocess import preprocess

    (folder / "tiny.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    preprocess([folder / "tiny.jsonl"], folder / "tiny", tokenizer=models().original_hf)
    return folder / "tiny"


def pretrain(config, folder: Path, *, launcher: list[str] | None = None) -> subprocess.CompletedProcess:
    """Run the front door, by default in a process that needs no imports."""
    (folder / "run.yaml").write_text(dump_yaml(config))
    arguments = ["-m", "megatron_llamapro.pretrain", "--config", str(folder / "run.yaml")]
    if launcher is None:
        return programs.run(*arguments)
    return subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=200)


def test_the_front_door_prints_one_line(run_config: Callable, tmp_path: Path) -> None:
    result = pretrain(with_model(run_config(), checkpoint="nowhere"), tmp_path, launcher=[sys.executable])
    assert result.returncode == 2
    assert result.stderr.startswith("error: nowhere is not a folder") and result.stderr.count("\n") == 1


def test_a_failure_during_the_run_is_not_the_inputs_fault(run_config: Callable, tmp_path: Path) -> None:
    """The disk is full when the first checkpoint is written."""
    full = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", sys.executable]
    config = run_config(train_iters=1)
    whole = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, delta=False))
    result = pretrain(whole, tmp_path, launcher=full)
    assert result.returncode == 75, result.stderr
    assert result.stderr.startswith("error: step 1 was not saved") and "the disk may be full, or" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_run_that_diverges_has_its_own_exit_code(run_config: Callable, tmp_path: Path) -> None:
    """The learning rate makes every later loss NaN."""
    config = run_config(train_iters=6, max_skipped_steps=2)
    optimizer = dataclasses.replace(config.optimizer, lr=1e19)
    checkpoint = dataclasses.replace(config.checkpoint, save_interval=2)
    result = pretrain(dataclasses.replace(config, optimizer=optimizer, checkpoint=checkpoint), tmp_path)
    assert result.returncode == 65, result.stderr
    assert result.stderr.startswith("error: step 3: the loss is nan and the gradient norm nan; steps in a row")
    assert result.stderr.count("\n") == 1 and "lower optimizer.lr" in result.stderr
    records = [json.loads(line) for line in (tmp_path / "save" / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records if record["kind"] == "skip"] == [2, 3]
    assert latest_checkpoint(tmp_path / "save") == tmp_path / "save" / "iter_0000002"


def test_an_impossible_path_is_the_inputs_fault(run_config: Callable, tmp_path: Path) -> None:
    config = run_config(train_iters=1)
    (tmp_path / "file").touch()
    result = pretrain(with_data(config, cache_dir=str(tmp_path / "file" / "cache")), tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "cannot be created or written to: Not a directory: set data.cache_dir" in result.stderr


def test_torchruns_output_ends_with_the_error_once(run_config: Callable, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    result = pretrain(with_model(run_config(), checkpoint="nowhere"), tmp_path, launcher=torchrun)
    assert result.returncode != 0
    lines, said = result.stderr.splitlines(), "error: nowhere is not a folder: give the folder of a Megatron checkpoint"
    assert lines.count(said) == 1
    assert lines[-2].endswith(said) and set(lines[-1]) == {"="}, result.stderr


def test_resuming_a_changed_run_is_refused(
    run_config: Callable, models: Callable, token_files: tuple[Path, Path]
) -> None:
    """A resumed run reads the rest of the same data, and trains the same part of the same model."""
    config = run_config(exit_interval=1, train_iters=2)
    run_distributed(workers.train, 1, config)
    other_seed = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=5))
    other_blend = with_data(config, train=(BlendEntry(str(token_files[0])),))
    other_model = with_model(config, checkpoint=str(models(seed=3).expanded_megatron))
    other_parts = with_model(config, trainable=("added_blocks", "final_norm"))
    too_late = dataclasses.replace(config, training=dataclasses.replace(config.training, skip_iterations=(1,)))
    smaller = dataclasses.replace(config.training, train_iters=4, global_batch_size=2)  # the same order
    too_short = dataclasses.replace(config, training=smaller)
    cases = {
        "training.seed": other_seed,
        "data.train": other_blend,
        "belongs to a run of another model": other_model,
        "started with model.trainable": other_parts,
        "names step 1, but the run resumes from step 1": too_late,
        "4 + 6 > 8; set --training.train_iters 3, or --training.global_batch_size 1 or less": too_short,
    }
    [answers] = run_distributed(workers.set_up_errors, 1, list(cases.values()))
    for part, answer in zip(cases, answers, strict=True):
        assert part in answer


def test_pypis_apex_is_refused(tmp_path: Path, run_config: Callable) -> None:
    """PyPI's package of that name is a web toolkit without apex.optimizers."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from megatron_llamapro.runtime.upstream import import_megatron; import_megatron()\n"
        "from megatron_llamapro.optimizer.build import check_apex; check_apex()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "is not NVIDIA's Apex" in result.stderr
