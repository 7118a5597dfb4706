"""The dry run counts to the last byte what real runs hold and send, and executes what the arithmetic predicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import programs
from gradients import parallel
from megatron_llamapro.checkpoint.description import describe_model
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.io import dump_yaml
from megatron_llamapro.config.schema import KeepConfig, LoraConfig, ParallelConfig, RecomputeConfig, RunConfig
from megatron_llamapro.dry_run.counting import Kind, Product
from megatron_llamapro.testing.distributed import run_apart, run_distributed
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

# This vocabulary needs no padding, so the arithmetic counts the same products.
VOCABULARY = 128


def dry_worker(config: RunConfig, world_size: int, ranks: list[int] | None) -> list:
    from megatron_llamapro.dry_run.run import distinct_ranks, dry_run

    model = describe_model(Path(config.model.checkpoint), hf_config=None, expansion=None)
    ranks = ranks or distinct_ranks(config, world_size)
    return [dry_run(config, model, world_size=world_size, rank=rank, num_largest=3) for rank in ranks]


def real_worker(config: RunConfig) -> dict[str, int]:
    """Return the bytes that one rank of a real run holds after two steps, and sent in the second."""
    from megatron_llamapro.dry_run.counting import CountingMode, Kind
    from megatron_llamapro.dry_run.run import counting
    from megatron_llamapro.runtime.stop import StopRequest
    from megatron_llamapro.training.loop import _batches, _step
    from megatron_llamapro.training.setup import set_up

    run = set_up(config)
    batches = [_batches(run) for _ in run.machine.chunks]
    stop = StopRequest()
    _step(run, batches, stop, None)
    mode: CountingMode = counting(run.machine)
    held = {kind.value: mode.by_kind[kind] for kind in Kind}
    with mode:
        _step(run, batches, stop, None)
    return {"held": held, "flops": dict(mode.counts.flops), "sent": dict(mode.counts.sent_bytes)}


@pytest.fixture
def config(run_config: Callable, models: Callable) -> Callable[..., RunConfig]:
    def make(layout: ParallelConfig | None = None, **settings: object) -> RunConfig:
        folder = models(vocab_size=VOCABULARY).expanded_megatron
        made = run_config(checkpoint=folder, parallel=layout, global_batch_size=16, **settings)
        return replace(made, model=replace(made.model, make_vocab_size_divisible_by=1))

    return make


def arithmetic(config: RunConfig):
    from megatron_llamapro.training.report import work_per_token

    model = describe_model(Path(config.model.checkpoint), hf_config=None, expansion=None)
    return work_per_token(config, model.shape, model.plan)


LAYOUTS = {
    "one process": (1, parallel()),
    "dp2": (2, parallel()),
    "tp2 pp2 sequence parallel": (4, parallel(tp=2, pp=2, sp=True)),
    "pp2 virtual 2": (2, parallel(pp=2, vp=2, stage_layers=(2, 1, 2, 1))),
}


# Every baseline of docs/baselines.md, and mixtures of them.
BASELINES = {
    "everything": (("everything",), LoraConfig()),
    "added blocks": (("added_blocks",), LoraConfig()),
    "zero-initialised projections": (("linear_proj", "linear_fc2"), LoraConfig()),
    "low-rank added blocks": (("lora",), LoraConfig(rank=4, blocks="added_blocks")),
    "LoRA": (("lora",), LoraConfig(rank=4)),
    "LoRA beside added blocks": (("added_blocks", "lora"), LoraConfig(rank=4, targets=("linear_fc1",))),
    "parts and both ends": (("linear_fc1", "embedding", "output_layer"), LoraConfig()),
    "LoRA and the final norm": (("lora", "final_norm"), LoraConfig(rank=2, targets=("linear_proj",), blocks="all")),
}
_WHOLE_BLOCKS = ("everything", "added blocks")


def baseline(config: RunConfig, name: str) -> RunConfig:
    trainable, lora = BASELINES[name]
    return replace(config, model=replace(config.model, trainable=trainable), lora=lora)


@pytest.mark.parametrize(
    ("layout", "what"),
    [
        *((layout, what) for layout in LAYOUTS for what in _WHOLE_BLOCKS),
        *(("pp2 virtual 2", what) for what in BASELINES if what not in _WHOLE_BLOCKS),
    ],
)
def test_work_equals_the_arithmetic(layout: str, what: str, config: Callable) -> None:
    """Exactly the same products, over the whole model."""
    world_size, division = LAYOUTS[layout]
    settings = baseline(config(division), what)
    reports = run_apart(dry_worker, settings, world_size, None)
    counted = {
        product: division.tensor_model_parallel_size
        * sum(report.counts.flops[product] / report.tokens for report in reports)
        for product in Product
    }
    attention = counted[Product.ATTENTION_FORWARD]
    expected = arithmetic(settings)
    assert counted[Product.FORWARD] + attention == expected.forward
    assert counted[Product.INPUT_GRADIENT] + counted[Product.ATTENTION_BACKWARD] == expected.input_gradient
    assert counted[Product.WEIGHT_GRADIENT] == expected.weight_gradient
    assert counted[Product.RECOMPUTED] == 0 and attention > 0


def test_full_recomputation_repeats_blocks_with_a_backward_pass(config: Callable) -> None:
    """Blocks 2 to 5 of 6; the head is not recomputed."""
    kept = config()
    recomputed = replace(kept, recompute=RecomputeConfig("full", "uniform", 1))
    [before], [after] = (run_apart(dry_worker, settings, 1, None) for settings in (kept, recomputed))
    again = after.counts.flops[Product.RECOMPUTED]
    per_block = (before.counts.flops[Product.FORWARD] - head_flops(before)) // 6
    assert again == 4 * per_block
    assert after.counts.flops[Product.ATTENTION_RECOMPUTED] * 6 == before.counts.flops[Product.ATTENTION_FORWARD] * 4
    assert {p: n for p, n in after.counts.flops.items() if "recomputed" not in p.value} == dict(before.counts.flops)
    assert after.counts.peak_bytes < before.counts.peak_bytes
    assert after.saved_bytes < 0.3 * before.saved_bytes


def head_flops(report) -> int:
    return report.tokens * 2 * 64 * VOCABULARY


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_and_work_are_those_of_a_real_run(layout: str, dtype: str, run_config: Callable) -> None:
    """For every rank, tensor-parallel and data-parallel ones included."""
    world_size, division = LAYOUTS[layout]
    data_size = world_size // division.tensor_model_parallel_size // division.pipeline_model_parallel_size
    settings = run_config(parallel=division, dtype=dtype, global_batch_size=4 * data_size)
    real = run_distributed(real_worker, world_size, settings)
    for rank, report in zip(real, run_apart(dry_worker, settings, world_size, [*range(world_size)]), strict=True):
        assert {kind.value: report.held_bytes.get(kind, 0) for kind in Kind} == rank["held"]
        scale = sum(rank["flops"].values()) / report.counts.flops.total()  # per step has this many micro-batches
        assert {product: count * scale for product, count in report.counts.flops.items()} == rank["flops"]
        reduced = {key: size for key, size in rank["sent"].items() if key[0] == "data"}
        assert {key: size for key, size in report.counts.sent_bytes.items() if key[0] == "data"} == reduced


def test_only_the_trainable_part_is_reduced(config: Callable) -> None:
    """float32 gradients of the added blocks, padded to a multiple of the replicas."""
    [report] = run_apart(dry_worker, config(), 16, None)
    trainable = report.stage_report.num_trainable
    [reduced] = [
        n for (group, what), n in report.counts.sent_bytes.items() if (group, what) == ("data", "reduce-scatter")
    ]
    assert 4 * trainable <= reduced < 4 * trainable * 1.05
    assert report.held_bytes[Kind.GRADIENTS] == reduced
    assert report.held_bytes[Kind.MOMENTS] < 8 * trainable / 15


@pytest.mark.parametrize("stages", [1, 2])
def test_a_penalty_executes_no_products_and_keeps_at_most_an_activation(stages: int, config: Callable) -> None:
    """Kept is the output of a stage that an added block ends, and the weight of each token in each added block."""
    plain = config(parallel(pp=stages))
    reports = [
        run_apart(dry_worker, each, 2, None) for each in (plain, replace(plain, keep=KeepConfig(penalty_weight=3.0)))
    ]
    for without, with_it in zip(*reports, strict=True):
        assert with_it.counts.flops == without.counts.flops
        assert with_it.counts.sent_bytes == without.counts.sent_bytes
        assert with_it.message_bytes == without.message_bytes
        assert with_it.held_bytes == without.held_bytes
        tokens, hidden_size = plain.data.seq_length, 64
        weights = 4 * tokens * (2 if stages == 1 else 1)
        output = 4 * tokens * hidden_size if without.stage < stages - 1 else 0
        assert with_it.saved_bytes - without.saved_bytes <= weights + output


def test_a_penalty_runs_dry_on_stages_without_added_blocks(config: Callable) -> None:
    stages = parallel(pp=2, stage_layers=(2, 4))
    reports = run_apart(dry_worker, replace(config(stages), keep=KeepConfig(penalty_weight=3.0)), 2, None)
    assert [report.stage_report.trainable_layers for report in reports] == [(), (2, 5)]


def test_no_gradient_goes_below_the_first_trainable_block(config: Callable, models: Callable, tmp_path: Path) -> None:
    from megatron_llamapro.checkpoint.convert import hf_to_megatron
    from megatron_llamapro.expansion.round import Expansion

    hf_to_megatron(models().original_hf, tmp_path / "suffix", expansion=Expansion.at(4, 5))
    settings = config(parallel(pp=2, stage_layers=(4, 2)))
    settings = replace(settings, model=replace(settings.model, checkpoint=str(tmp_path / "suffix")))
    first, last = run_apart(dry_worker, settings, 2, None)
    assert last.message_bytes == {} and first.message_bytes["activations"] > 0
    assert set(first.counts.flops) == {Product.FORWARD, Product.ATTENTION_FORWARD}
    assert first.held_bytes.get(Kind.GRADIENTS, 0) == first.held_bytes.get(Kind.MOMENTS, 0) == 0


RECOMPUTED = {
    "nothing": RecomputeConfig(),
    "uniform": RecomputeConfig("full", "uniform", 2),
    "block": RecomputeConfig("full", "block", 1),
    "mlp": RecomputeConfig("selective", modules=("mlp",)),
    "attention": RecomputeConfig("selective", modules=("core_attn",)),
}


@pytest.mark.parametrize(
    ("layout", "what", "recomputed"),
    [
        *((layout, "added blocks", "nothing") for layout in LAYOUTS),
        *((layout, "LoRA", "nothing") for layout in ("one process", "tp2 pp2 sequence parallel")),
        *(("tp2 pp2 sequence parallel", "added blocks", recomputed) for recomputed in ("uniform", "mlp", "attention")),
        *(("pp2 virtual 2", "LoRA", recomputed) for recomputed in ("uniform", "block", "mlp", "attention")),
    ],
)
def test_the_planner_predicts_memory_and_work(layout: str, what: str, recomputed: str, config: Callable) -> None:
    """State and kept activations of every stage match to the byte, apart from vectors, padding and labels. Work matches
    exactly, apart from two cases with adapters: input gradients that recomputation needs in the first layer with
    adapters, and matrices that every tensor-parallel rank copies."""
    from megatron_llamapro.config.pipeline_stages import stage_layers
    from megatron_llamapro.expansion.trainable import what_trains
    from megatron_llamapro.planning.job import Job, time_from_flops
    from megatron_llamapro.planning.memory import Division

    world_size, division = LAYOUTS[layout]
    settings = replace(baseline(config(division), what), recompute=RECOMPUTED[recomputed])
    model = describe_model(Path(settings.model.checkpoint), hf_config=None, expansion=None)
    trains = what_trains(settings.model.trainable, model.plan, tie_word_embeddings=False, lora=settings.lora)
    divided = Division(
        tensor_size=division.tensor_model_parallel_size,
        data_size=world_size // division.tensor_model_parallel_size // division.pipeline_model_parallel_size,
        sequence_parallel=division.sequence_parallel,
        seq_length=settings.data.seq_length,
        itemsize=4,
    )
    job = Job(
        shape=model.shape,
        trains=trains,
        division=divided,
        time=time_from_flops(model.shape, trains, divided, flops_per_second=divided.tokens),  # in FLOP per token
        num_stages=division.pipeline_model_parallel_size,
        num_chunks=division.virtual_pipeline_model_parallel_size or 1,
        num_microbatches=4,
        recompute=settings.recompute,
    )
    counts = stage_layers(division, model.shape.num_layers)
    chunks = job.chunks(counts)
    for report in run_apart(dry_worker, settings, world_size, None):
        mine = chunks[report.stage :: job.num_stages]
        assert sum(chunk.held.state for chunk in mine) == pytest.approx(sum(report.held_bytes.values()), rel=0.03)
        assert sum(chunk.held.activations for chunk in mine) == pytest.approx(report.saved_bytes, rel=0.05)
        executed = report.counts.flops.total() / report.tokens
        rel = 0.03 if what == "LoRA" and (recomputed != "nothing" or divided.tensor_size > 1) else 1e-9
        assert sum(chunk.time.total for chunk in mine) == pytest.approx(executed, rel=rel)


def test_4096_ranks_run_dry(config: Callable) -> None:
    """Most of the peak memory is attributed to named tensors."""
    settings = config(parallel(tp=2, pp=2, sp=True))
    settings = replace(settings, training=replace(settings.training, global_batch_size=4096))
    [report] = run_apart(dry_worker, settings, 4096, [4095])
    assert (report.rank, report.stage) == (4095, 1) and len(report.largest) == 3
    assert all(number * held.num_bytes == size for number, size, held in report.largest)


def tool(*arguments: object) -> CompletedProcess[str]:
    return programs.run("tools/dry_run.py", *arguments)


@pytest.fixture
def run_yaml(config: Callable, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config(parallel(pp=2))))
    return path


def test_the_command_reports_memory_and_work(run_yaml: Path, models: Callable) -> None:
    text = tool("--config", run_yaml, "--world_size", 4, "--memory_gib", 1e-6)
    assert text.returncode == 1, text.stderr
    assert "stage 0 │ E o o A │ 1 │ o o A H" in text.stdout and "4 ranks: TP 1 x PP 2 x DP 2" in text.stdout
    assert text.stderr.count("GiB more than 1e-06") == 2
    described = ["--hf_config", models(vocab_size=VOCABULARY).original_hf, "--num_added_blocks", 2]
    found = tool("--config", run_yaml, "--world_size", 4, "--json", *described, "--model.checkpoint", "not-there-yet")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    executed = sum(sum(rank["flops_per_token"].values()) for rank in report["ranks"])
    assert executed == report["arithmetic_flops_per_token"] and len(report["ranks"]) == 2
    for rank in report["ranks"]:
        assert rank["cost_model"]["flops_per_token"] == pytest.approx(sum(rank["flops_per_token"].values()))
        assert rank["cost_model"]["saved_bytes"] == pytest.approx(rank["saved_bytes_per_microbatch"], rel=0.05)
    assert text.stdout.count("the cost model: holds") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world_size", 3], "3 ranks cannot be divided"),
        (["--world_size", 8192], "--world_size is 8192: it must be from 1 to 4,096"),
        (["--world_size", 4, "--largest", -1], "--largest is -1: it cannot be negative"),
        (["--world_size", 4, "--ranks", "4"], "--ranks names a rank that a job of 4 does not have"),
        (["--world_size", 4, "--ranks", "x"], "'x' is neither all nor a list"),
        (
            ["--world_size", 4, "--model.checkpoint", "nowhere"],
            "nowhere does not exist: convert it first, or describe it",
        ),
        (["--world_size", 4, "--num_added_blocks", 2], "give --hf_config"),
    ],
)
def test_bad_input_is_one_line(arguments: list, message: str, run_yaml: Path) -> None:
    result = tool("--config", run_yaml, *arguments)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_experts_are_refused(tiny_model: Callable[..., Path], run_yaml: Path) -> None:
    model = tiny_model(**TINY_FAMILIES["mixtral"])
    added = ["--num_added_blocks", 2, "--world_size", 1]
    result = tool("--config", run_yaml, "--hf_config", model, *added)
    assert result.returncode == 2 and result.stderr.startswith("error: a model with experts cannot run dry: ")


def test_a_missing_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="--hf_config FOLDER"):
        describe_model(Path("nowhere"), hf_config=None, expansion=None)
