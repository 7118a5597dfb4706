"""The division of a job's ranks: its messages equal the program's to the last byte, and no other division is faster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_llamapro.checkpoint.description import DescribedModel, describe_model
from megatron_llamapro.config.errors import ConfigError, PipelinePlanError
from megatron_llamapro.config.schema import ParallelConfig, RunConfig
from megatron_llamapro.planning.job import job_of
from megatron_llamapro.planning.network import Network, tensor_parallel_time
from megatron_llamapro.planning.parallelism import Cluster, best_parallelisms
from megatron_llamapro.testing.distributed import run_apart

NETWORK = Network(ranks_per_node=2, within_node=1e9, between_nodes=1e7)


def model_of(config: RunConfig) -> DescribedModel:
    return describe_model(Path(config.model.checkpoint), hf_config=None, expansion=None)


def sent_worker(config: RunConfig, world_size: int) -> dict[str, float]:
    """Return the bytes of the tensor-parallel ranks' collectives per micro-batch, over all stages."""
    from megatron_llamapro.dry_run.run import distinct_ranks, dry_run

    sent = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce"), 0.0)
    for rank in distinct_ranks(config, world_size):
        report = dry_run(config, model_of(config), world_size=world_size, rank=rank)
        for name in sent:
            sent[name] += report.counts.sent_bytes["tensor", name] / report.num_microbatches
    return sent


TRAINABLE = [
    ("added_blocks",),
    ("everything",),
    ("linear_proj", "linear_fc2"),
    ("linear_qkv",),
    ("embedding", "added_blocks"),
    ("output_layer",),
]
LAYOUTS = [
    ParallelConfig(tensor_model_parallel_size=2),
    ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
]


@pytest.mark.parametrize("trainable", TRAINABLE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["tp2", "tp2 pp2 sp"])
def test_tensor_parallel_messages_equal_the_programs(
    layout: ParallelConfig, trainable: tuple[str, ...], run_config: Callable
) -> None:
    """Half of a collective's buffer comes from the other of two ranks; an all-reduce counts twice. The arithmetic
    leaves out small all-reduces: of the loss, and of the norms' gradients."""
    config = run_config(parallel=layout, global_batch_size=16, trainable=trainable)
    model = model_of(config)
    job = job_of(config, model.shape, model.plan, world_size=4, flops_per_second=1.0)
    time = tensor_parallel_time(job.shape, job.trains, job.division, Network(within_node=0.5))
    expected = sum(part.total for part in (*time.layers, time.embedding, time.head))
    sent = run_apart(sent_worker, config, 4)
    if layout.sequence_parallel:
        assert sent["all-gather"] + sent["reduce-scatter"] == expected
    else:
        assert 0 <= 2 * sent["all-reduce"] - expected < 0.01 * expected and not sent["all-gather"]


def cluster(**fields: object) -> Cluster:
    settings = {"num_ranks": 8, "flops_per_second": 1e9, "memory_bytes": float("inf"), "network": NETWORK, **fields}
    return Cluster(**settings)


def test_only_replicas_are_used_if_everything_fits(run_config: Callable) -> None:
    config = run_config(global_batch_size=64)
    best, *others = best_parallelisms(config, model_of(config), cluster(), at_most=100)
    assert (best.config.parallel.tensor_model_parallel_size, best.job.num_stages) == (1, 1)
    divisions = {(each.job.division.tensor_size, each.job.num_stages, each.job.division.data_size) for each in others}
    assert divisions == {(1, 2, 4), (1, 4, 2), (2, 1, 4), (2, 2, 2), (2, 4, 1)}  # every division of a model of 6 blocks
    assert [best.seconds, *(each.seconds for each in others)] == sorted(each.seconds for each in (best, *others))


def test_the_search_stops_early_with_the_same_result(run_config: Callable) -> None:
    config = run_config(global_batch_size=64)
    whole = best_parallelisms(config, model_of(config), cluster(), at_most=100)
    for at_most in (1, 3):
        some = best_parallelisms(config, model_of(config), cluster(), at_most=at_most)
        assert [each.config for each in some] == [each.config for each in whole[:at_most]]


def test_a_model_that_does_not_fit_is_divided_or_recomputed(run_config: Callable) -> None:
    config = run_config(global_batch_size=64)
    model = model_of(config)
    everything = best_parallelisms(config, model, cluster(), at_most=100)
    [alone] = [each for each in everything if each.job.num_stages == each.job.division.tensor_size == 1]
    limit = alone.memory_bytes - 1
    for each in best_parallelisms(config, model, cluster(memory_bytes=limit), at_most=100):
        assert each.memory_bytes <= limit
        is_alone = each.job.num_stages == each.job.division.tensor_size == 1
        assert (each.config.recompute.granularity == "full") is is_alone
    with pytest.raises(PipelinePlanError, match="no division of 8 ranks fits into"):
        best_parallelisms(config, model, cluster(memory_bytes=1e4), at_most=1)


def test_tensor_parallel_ranks_share_a_node(run_config: Callable) -> None:
    """With heads for four: not on nodes of six, because the second group of four would span two nodes."""
    config = run_config(global_batch_size=24)
    for node, sizes in ((6, {1, 2}), (4, {1, 2}), (12, {1, 2})):
        network = Network(ranks_per_node=node)
        found = best_parallelisms(config, model_of(config), cluster(num_ranks=12, network=network), at_most=100)
        assert {each.job.division.tensor_size for each in found} == sizes


def test_the_whole_trainable_part_is_reduced(run_config: Callable) -> None:
    """Including the embedding, the output layer and adapters."""
    network = Network(ranks_per_node=2, within_node=1.0)  # so slow that nothing else matters
    tables = {}
    for trainable in (("added_blocks",), ("added_blocks", "embedding", "output_layer")):
        config = run_config(global_batch_size=2, trainable=trainable)
        found = best_parallelisms(config, model_of(config), cluster(num_ranks=2, network=network), at_most=9)
        tables[trainable] = next(each.seconds for each in found if each.job.division.data_size == 2)
    shape = found[0].job.shape
    few, many = tables.values()
    assert many - few == pytest.approx(2 * shape.hidden_size * shape.vocab_size * (4 + 4) / 2, rel=1e-6)


def test_slow_links_between_replicas_are_counted(run_config: Callable) -> None:
    """Gradients take longer than the backward pass that hides them."""
    config = run_config(global_batch_size=8)
    fast, slow = (
        best_parallelisms(config, model_of(config), cluster(num_ranks=2, network=network), at_most=9)
        for network in (Network(), replace(Network(), within_node=1e3))
    )
    hidden, shown = (next(each for each in found if each.job.division.data_size == 2) for found in (fast, slow))
    trainable = sum(hidden.job.trains.trainable_parameters(hidden.job.shape, layer) for layer in range(6))
    messages = trainable * (4 + 4) / 2 / 1e3  # float32
    work = hidden.plan.stage_forward[0] + hidden.plan.stage_backward[0]
    assert hidden.seconds == hidden.plan.seconds
    assert shown.seconds == pytest.approx(hidden.seconds + messages - work)


def test_a_batch_that_no_division_fits_is_refused(run_config: Callable) -> None:
    config = run_config(global_batch_size=3)
    with pytest.raises(ConfigError, match=r"8 ranks, .*batch_size 3 and micro_batch_size 2: no division"):
        changed = replace(config, training=replace(config.training, micro_batch_size=2))
        best_parallelisms(changed, model_of(config), cluster(), at_most=1)
