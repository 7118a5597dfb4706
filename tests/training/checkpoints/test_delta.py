"""Delta checkpoints of real runs: their contents and size, how they are read, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import workers
from megatron_llamapro.checkpoint.convert import hf_to_megatron, megatron_to_hf, megatron_to_megatron
from megatron_llamapro.checkpoint.inspection import inspect
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.schema import ParallelConfig, RunConfig
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.testing.checkpoints import read_tensors, read_with_torch
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)


def with_checkpoint(config: RunConfig, **fields: object) -> RunConfig:
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, **fields))


def last_of(config: RunConfig) -> Path:
    return sorted(Path(config.checkpoint.save).glob("iter_*"))[-1]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def trained(run_config: Callable) -> Callable[..., RunConfig]:
    """Finish a run of two steps with the given checkpoint fields."""

    def make(ranks: int = 1, *, delta: bool = True, **settings: object) -> RunConfig:
        config = with_checkpoint(run_config(**{"train_iters": 2, **settings}), delta=delta)
        run_distributed(workers.train, ranks, config)
        return config

    return make


def test_a_rank_may_look_for_the_base_late(run_config: Callable) -> None:
    """The first rank has made the base before the second one looks for it."""
    late, usual = (run_config(train_iters=1, save=name) for name in ("late", "usual"))
    ranks = run_distributed(late_worker, 2, late)
    assert ranks[0].figures == run_distributed(workers.train, 2, usual)[0].figures


def late_worker(config: RunConfig) -> workers.Result:
    from megatron_llamapro.training.checkpoints import delta_parts as delta

    in_shares, base = delta._hash_in_shares, Path(config.checkpoint.save) / "base"

    def late(*args):
        hashes, end = in_shares(*args), time.monotonic() + 2
        while torch.distributed.get_rank() and not base.exists() and time.monotonic() < end:
            time.sleep(0.02)
        return hashes

    delta._hash_in_shares = late
    return workers.train(config)


TRAINABLE = {
    "blocks": ("added_blocks",),
    "embedding": ("added_blocks", "embedding"),
    "parts": ("linear_proj", "final_norm"),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("what", TRAINABLE)
def test_exactly_the_trainable_part_is_written(what: str, tied: bool, trained: Callable, models: Callable) -> None:
    """TP 2 x PP 2, DP 1, with tied embeddings on two stages: key by key, and byte by byte."""
    folder = models(tie_word_embeddings=tied).expanded_megatron
    both = {"trainable": TRAINABLE[what], "parallel": TP2_PP2, "checkpoint": folder}
    full = trained(4, delta=False, save="full", **both)
    delta = trained(4, delta=True, save="delta", **both)
    in_full, in_delta = read_with_torch(last_of(full)), read_with_torch(last_of(delta))
    record = json.loads((last_of(delta) / "llamapro_delta.json").read_text())
    moved = {name for name in in_full if f"optimizer.state.exp_avg.{name}" in in_full}
    assert set(record["trained"]) == moved
    assert same(in_delta, {name: tensor for name, tensor in in_full.items() if name in moved or "optimizer." in name})
    num_bytes = {name: tensor.nbytes for name, tensor in in_full.items()}
    frozen_bytes = sum(size for name, size in num_bytes.items() if name not in moved and "optimizer." not in name)
    assert frozen_bytes > 0
    assert sum(tensor.nbytes for tensor in in_delta.values()) == sum(num_bytes.values()) - frozen_bytes
    # weight, float32 master and two moments of the trainable part, and nothing else (including the padded vocabulary)
    assert sum(tensor.nbytes for tensor in in_delta.values()) == 4 * sum(num_bytes[name] for name in moved)
    assert same(read_tensors(last_of(delta)), read_tensors(last_of(full)))


def test_a_run_that_trains_everything_writes_full_checkpoints(trained: Callable) -> None:
    config = trained(trainable=("everything",))
    assert not (Path(config.checkpoint.save) / "base").exists()
    assert not (last_of(config) / "llamapro_delta.json").exists()


def test_the_base_takes_no_disk_space(trained: Callable, tmp_path: Path) -> None:
    """On one file system the base's weights are a clone of the starting checkpoint's file. Without copy-on-write they
    are the same file."""
    from megatron_llamapro.training.checkpoints.delta_parts import _clone

    config = trained()
    source, base = Path(config.model.checkpoint), Path(config.checkpoint.save) / "base"
    assert same(read_with_torch(source), read_with_torch(base))
    (file,) = base.glob("*.distcp")
    try:
        _clone(file, tmp_path / "clone")
        has_clones = True
    except OSError:
        has_clones = False
    assert file.samefile(source / file.name) is not has_clones


@pytest.mark.parametrize(
    ("saved_with", "saved_ranks", "loaded_with", "loaded_ranks"),
    [(TP2_PP2, 4, ParallelConfig(), 1), (TP2_PP2, 4, ParallelConfig(), 2), (ParallelConfig(), 2, TP2_PP2, 4)],
    ids=["tp2 pp2 to one", "tp2 pp2 to dp2", "dp2 to tp2 pp2"],
)
def test_a_stage_without_added_blocks_resumes_at_another_layout(
    saved_with, saved_ranks, loaded_with, loaded_ranks, run_config, suffix: Path
) -> None:
    """Blocks are added at the end only, so the first stage trains, saves and loads nothing of a delta."""
    whole = run_distributed(workers.train, 1, run_config(checkpoint=suffix, save="whole"))[0].figures
    first = run_config(checkpoint=suffix, parallel=saved_with, save="cut", exit_interval=2)
    run_distributed(workers.train, saved_ranks, first)
    assert (last_of(first) / "llamapro_delta.json").is_file()
    rest = run_distributed(
        workers.train, loaded_ranks, run_config(checkpoint=suffix, parallel=loaded_with, save="cut")
    )[0].figures
    assert [step for step, *_ in rest] == [3, 4]
    for ours, theirs in zip(rest, whole[2:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_resume_is_bit_exact(dtype: str, run_config: Callable) -> None:
    """TP 2 x PP 2, saved beside training: steps 2 to 4 after the interruption are bit-equal."""
    whole = run_distributed(workers.train, 4, run_config(dtype=dtype, parallel=TP2_PP2, save="whole"))[0].figures
    cut = run_config(dtype=dtype, parallel=TP2_PP2, save="cut", exit_interval=1)
    cut = with_checkpoint(cut, async_save=True)
    first = run_distributed(workers.train, 4, cut)[0].figures
    rest = with_checkpoint(run_config(dtype=dtype, parallel=TP2_PP2, save="cut"), async_save=True)
    assert first + run_distributed(workers.train, 4, rest)[0].figures == whole


@pytest.fixture
def suffix(models: Callable, tmp_path: Path) -> Path:
    folder = tmp_path / "suffix"
    hf_to_megatron(models().original_hf, folder, expansion=Expansion.at(4, 5))
    return folder


def test_experts_are_in_a_delta(trained: Callable, models: Callable) -> None:
    folder = models(**TINY_FAMILIES["mixtral"]).expanded_megatron
    delta = trained(4, checkpoint=folder, save="delta", parallel=TP2_PP2)
    full = trained(4, checkpoint=folder, save="full", parallel=TP2_PP2, delta=False)
    assert same(read_tensors(last_of(delta)), read_tensors(last_of(full)))
    record = json.loads((last_of(delta) / "llamapro_delta.json").read_text())
    assert {int(name.split(".")[2]) for name in record["trained"]} == {2, 5}


def test_a_run_resumes_from_full_and_delta_alike(run_config: Callable) -> None:
    """A run with full checkpoints switches to deltas; their base is made from the last full one."""
    whole = run_distributed(workers.train, 1, run_config(save="whole"))[0].figures
    figures = []
    for step, delta in ((1, False), (2, True), (3, False), (4, True)):
        config = with_checkpoint(run_config(save="mixed", exit_interval=1), delta=delta)
        figures += run_distributed(workers.train, 1, config)[0].figures
        assert (last_of(config) / "llamapro_delta.json").is_file() is delta
        assert last_of(config).name == f"iter_000000{step}"
    assert figures == whole


def test_the_starting_checkpoint_may_be_deleted(run_config: Callable, models: Callable, tmp_path: Path) -> None:
    """A run resumes after its starting checkpoint was deleted and its own folder moved."""
    whole = run_distributed(workers.train, 1, run_config(save="whole"))[0].figures
    start = shutil.copytree(models().expanded_megatron, tmp_path / "start")
    run_distributed(workers.train, 1, run_config(checkpoint=start, save="cut", exit_interval=2))
    shutil.rmtree(start)
    (tmp_path / "cut").rename(tmp_path / "moved")
    rest = run_distributed(workers.train, 1, run_config(checkpoint=start, save="moved"))[0].figures
    assert rest == whole[2:]


def test_a_run_may_start_from_another_runs_delta(trained: Callable, tmp_path: Path) -> None:
    """Its base is the whole model; there are no deltas of deltas."""
    first = trained(save="first")
    second = trained(save="second", checkpoint=Path(first.checkpoint.save), trainable=("embedding",))
    shutil.rmtree(first.checkpoint.save)
    one, other = Path(second.checkpoint.save) / "base", last_of(second)
    before, after = read_tensors(one), read_tensors(other)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"model.embed_tokens.weight"}
    assert not any(name.startswith("optimizer.") for name in read_with_torch(one))


def test_every_tool_reads_base_and_delta(trained: Callable, models: Callable, tmp_path: Path) -> None:
    delta, full = trained(save="delta"), trained(save="full", delta=False)
    for config, name in ((delta, "delta_hf"), (full, "full_hf")):
        megatron_to_hf(Path(config.checkpoint.save), tmp_path / name)
    assert same(read_tensors(tmp_path / "delta_hf"), read_tensors(tmp_path / "full_hf"))
    megatron_to_megatron(Path(delta.checkpoint.save), tmp_path / "again")
    assert same(read_tensors(tmp_path / "again"), read_tensors(last_of(full)))
    expansion = Expansion.at(6)
    megatron_to_megatron(Path(delta.checkpoint.save), tmp_path / "grown", expansion=expansion, dtype=None)
    megatron_to_megatron(Path(delta.checkpoint.save), tmp_path / "cast", dtype="bfloat16")
    checks = list(verify(models().original_hf, Path(delta.checkpoint.save)))
    assert all(check.ok for check in checks) and "base" in [check.name for check in checks]
    described = inspect(Path(delta.checkpoint.save))
    assert described.base == Path(delta.checkpoint.save) / "base"
    assert "for 39 tensors" in str(described) and described.to_json()["base"] == str(described.base)


def test_a_lost_base_is_named_and_can_be_replaced(trained: Callable, tmp_path: Path) -> None:
    """One line names the place. A copy of the starting checkpoint there replaces the base."""
    config = trained()
    folder, base = last_of(config), Path(config.checkpoint.save) / "base"
    base.rename(tmp_path / "elsewhere")
    answers = run_distributed(workers.set_up_errors, 2, [config])
    for message in (*(answer[0] for answer in answers), _error(lambda: megatron_to_hf(folder, tmp_path / "hf"))):
        assert f"{base} must hold the others, but does not exist" in message
        assert f"({config.model.checkpoint})" in message and "\n" not in message
    assert not (tmp_path / "hf").exists()
    shutil.copytree(config.model.checkpoint, base)
    assert run_distributed(workers.set_up_errors, 2, [config]) == [["no error"]] * 2
    megatron_to_hf(folder, tmp_path / "hf")


def test_a_changed_base_is_noticed(trained: Callable, models: Callable, tmp_path: Path) -> None:
    """One changed bit of a frozen tensor: resuming, converting and verifying say so. A bit of a tensor that the delta
    replaces does not matter."""
    config = trained()
    folder, base = last_of(config), Path(config.checkpoint.save) / "base"
    flip(base, "decoder.layers.2.mlp.linear_fc2.weight")
    megatron_to_hf(folder, tmp_path / "hf")
    flip(base, "decoder.layers.3.mlp.linear_fc2.weight")
    wrong = "model.layers.3.mlp.down_proj.weight is not the tensor that the run trained with"
    errors = [_error(lambda: megatron_to_hf(folder, tmp_path / "wrong"))]
    errors.append(_error(lambda: megatron_to_megatron(folder, tmp_path / "wrong", dtype="bfloat16")))
    errors += [answer[0] for answer in run_distributed(workers.set_up_errors, 2, [config])]
    assert all(f"{base}: {wrong}" in error and "\n" not in error for error in errors), errors
    assert not (tmp_path / "wrong").exists()
    failed = [check.name for check in verify(models().original_hf, folder) if not check.ok]
    assert failed == ["original tensors", "manifest", "base"]


def test_the_base_of_another_run_is_kept(trained: Callable, models: Callable, run_config: Callable) -> None:
    """The folder's checkpoints were deleted but not its base: a run from other weights does not overwrite that base."""
    config = trained()
    (Path(config.checkpoint.save) / "latest_checkpointed_iteration.txt").unlink()
    other = run_config(checkpoint=models(seed=1).expanded_megatron, train_iters=2)
    message = run_distributed(workers.training_error, 2, other)
    assert all("base holds other weights than" in text and "\n" not in text for text in message)
    assert run_distributed(workers.training_error, 1, run_config(train_iters=2)) == ["no error"]


def flip(folder: Path, name: str) -> None:
    """Change one bit of a tensor of a checkpoint, in a file of its own: hard links are left unchanged."""
    from megatron_llamapro.checkpoint.formats.torch_dist_index import read_index

    section = read_index(folder)[name].sections[0]
    data = bytearray(section.path.read_bytes())
    data[section.offset + section.num_bytes // 2] ^= 1
    section.path.unlink()
    section.path.write_bytes(data)


def _error(function: Callable) -> str:
    with pytest.raises(CheckpointError) as raised:
        function()
    return str(raised.value)
