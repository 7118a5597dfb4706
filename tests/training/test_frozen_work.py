"""Frozen layers cost only the necessary work, and the trainable part gets the same gradients as without savings.

The reference is megatron.core's own step on one process, with all its work for frozen layers. Losses and gradients:
1e-5 relative in float32, because the sums have another order. Recomputation changes no order, so its results are
bit-equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

import workers
from gradients import BATCH, gradients_worker, parallel
from megatron_llamapro.config.schema import ParallelConfig, RecomputeConfig
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.model.names import global_layer_index
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.gather import assembled
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

# Added blocks of 8 layers.
PLACEMENTS = {"suffix": (6, 7), "prefix": (0, 1), "mixed": (3, 6), "last": (7,)}


@dataclass
class Work:
    """The work of one rank in a step."""

    gradients_sent: int = 0
    """To the previous stage."""
    gradients_received: int = 0
    saved_bytes: dict[object, int] = field(default_factory=dict)
    """Activations kept for the backward pass, by global layer, or by virtual stage ("chunk 0") outside of layers."""
    layer_runs: dict[int, int] = field(default_factory=dict)
    """Forward passes by global layer."""
    with_autograd: set[int] = field(default_factory=set)
    """Layers that ran with autograd enabled."""
    input_bytes: int = 0
    """Bytes of received activations that are still held when the step ends."""


class Observed:
    """Counts the work of the step inside its block."""

    def __init__(self, chunks: list) -> None:
        self.chunks, self.work, self.undo, self.received = chunks, Work(), [], []

    def __enter__(self) -> Observed:
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        for number, chunk in enumerate(self.chunks):
            self._around(chunk, self._saving, f"chunk {number}")
            for layer in chunk.decoder.layers:
                self._around(layer, self._saving, global_layer_index(layer))
                self._around(layer, self._counting, global_layer_index(layer))
                self._around(layer.self_attention, self._watching_autograd, global_layer_index(layer))
        original = P2PCommunicator._communicate
        self.undo.append(lambda: setattr(P2PCommunicator, "_communicate", original))

        def communicate(communicator, **messages):
            self.work.gradients_sent += messages["tensor_send_prev"] is not None
            self.work.gradients_received += messages["recv_next"]
            received = original(communicator, **messages)
            if received[0] is not None:
                self.received.append(received[0])
            return received

        P2PCommunicator._communicate = communicate
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.work.input_bytes = sum(tensor.untyped_storage().nbytes() for tensor in self.received if tensor.numel() > 1)
        for undo in reversed(self.undo):
            undo()

    def _around(self, module: torch.nn.Module, wrapper: Callable, key: object) -> None:
        before = module.forward
        module.forward = wrapper(before, key)
        self.undo.append(lambda: setattr(module, "forward", before))

    def _saving(self, forward: Callable, key: object) -> Callable:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                saved = self.work.saved_bytes
                saved[key] = saved.get(key, 0) + tensor.nbytes
            return tensor

        def saving(*args, **kwargs):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return forward(*args, **kwargs)

        return saving

    def _counting(self, forward: Callable, layer: int) -> Callable:
        def counting(*args, **kwargs):
            self.work.layer_runs[layer] = self.work.layer_runs.get(layer, 0) + 1
            return forward(*args, **kwargs)

        return counting

    def _watching_autograd(self, forward: Callable, layer: int) -> Callable:
        def watching(*args, **kwargs):
            if torch.is_grad_enabled():
                self.work.with_autograd.add(layer)
            return forward(*args, **kwargs)

        return watching


def worker(folder: Path, settings: list[dict]) -> list[tuple[list, Work]]:
    """Take two steps for each of the settings; the work is the second step's."""
    results = []
    for setting in settings:
        observed: list[Observed] = []

        def observe(chunks: list, observed: list = observed) -> Observed:
            observed.append(Observed(chunks))
            return observed[-1]

        steps = gradients_worker(folder, num_steps=2, observe=observe, **setting)
        results.append((steps, observed[-1].work))
    return results


@pytest.fixture(scope="module")
def grown(tiny_llama: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the tiny model with added blocks at a placement, 8 layers in all."""
    from megatron_llamapro.checkpoint.convert import hf_to_megatron

    made: dict[tuple, Path] = {}

    def make(placement: str, tie: bool = False) -> Path:
        if (placement, tie) not in made:
            positions = PLACEMENTS[placement]
            source = tiny_llama(num_hidden_layers=8 - len(positions), tie_word_embeddings=tie)
            folder = tmp_path_factory.mktemp("grown") / placement
            hf_to_megatron(source, folder, expansion=Expansion.at(*positions))
            made[placement, tie] = folder
        return made[placement, tie]

    return make


REFERENCE = {"config": parallel(), "skip": False}
PIPELINES = {
    2: [
        parallel(pp=2),
        parallel(pp=2, stage_layers=(7, 1)),
        parallel(pp=2, stage_layers=(0, 8)),
        parallel(pp=2, vp=2, stage_layers=(3, 2, 2, 1)),
        parallel(pp=2, vp=2, stage_layers=(1, 3, 0, 4)),
    ],
    4: [
        parallel(pp=4, stage_layers=(3, 3, 1, 1)),
        parallel(pp=4, stage_layers=(1, 2, 4, 1)),
        parallel(tp=2, pp=2, sp=True),
        parallel(tp=2, pp=2, sp=True, vp=2, stage_layers=(2, 3, 1, 2)),
    ],
}


@pytest.mark.parametrize("num_ranks", PIPELINES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_stages_below_the_first_trainable_layer_only_run_forward(
    placement: str, num_ranks: int, grown: Callable
) -> None:
    folder = grown(placement)
    [[(reference, _)]] = run_distributed(worker, 1, folder, [REFERENCE])
    layouts = PIPELINES[num_ranks]
    ranks = run_distributed(worker, num_ranks, folder, [{"config": layout} for layout in layouts])
    for number, layout in enumerate(layouts):
        results = [rank[number] for rank in ranks]
        check_steps([steps for steps, _ in results], reference)
        for rank, (_, work) in enumerate(results):
            check_work(work, layout, rank // layout.tensor_model_parallel_size, PLACEMENTS[placement][0])


def check_steps(ranks: list[list[tuple]], reference: list[tuple]) -> None:
    """Assert that every rank has the reference's losses and gradient norms, and all ranks together its gradients."""
    for step, (loss, norm, pieces) in enumerate(reference):
        expected = assembled(pieces)
        ours = assembled(piece for steps in ranks for piece in steps[step][2])
        assert set(ours) == set(expected)
        for steps in ranks:
            assert steps[step][:2] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5))
        for name, gradient in expected.items():
            assert (ours[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-3 * norm), (step, name)
    assert all(gradient.any() for gradient in expected.values())  # the last step reaches the whole trainable part


def check_work(work: Work, layout: ParallelConfig, stage: int, first_trainable: int) -> None:
    """Assert one rank's messages and kept activations, by the layers on it."""
    num_stages = layout.pipeline_model_parallel_size
    counts = layout.pipeline_stage_layers or (8 // num_stages,) * num_stages
    first_layers = [sum(counts[:position]) for position in range(len(counts))]
    mine = range(stage, len(counts), num_stages)
    crosses = [first_trainable < first for first in first_layers]  # gradients, from this position to the previous one
    assert work.gradients_sent == BATCH * sum(crosses[position] for position in mine if position > 0)
    assert work.gradients_received == BATCH * sum(crosses[p + 1] for p in mine if p + 1 < len(counts))
    layers = [layer for p in mine for layer in range(first_layers[p], first_layers[p] + counts[p])]
    assert work.layer_runs == dict.fromkeys(layers, BATCH)
    with_backward = {layer for layer in layers if layer >= first_trainable}
    assert work.with_autograd == with_backward
    assert {key for key in work.saved_bytes if isinstance(key, int)} == with_backward
    outside = {f"chunk {chunk}" for chunk, position in enumerate(mine) if position == len(counts) - 1}
    assert {key for key in work.saved_bytes if isinstance(key, str)} == outside  # the head
    if not any(crosses[position] for position in mine):
        assert work.input_bytes == 0


FULL = [
    RecomputeConfig("full", method, num_layers) for method, num_layers in (("uniform", 1), ("uniform", 3), ("block", 2))
]
SELECTIVE = [
    RecomputeConfig("selective", modules=modules) for modules in (("core_attn",), ("mlp",), ("core_attn", "mlp"))
]


@pytest.mark.parametrize(
    "trainable", [("added_blocks",), ("linear_fc2",), ("linear_fc1", "linear_proj"), ("embedding",)]
)
@pytest.mark.parametrize("layout", [parallel(), parallel(tp=2, pp=2, sp=True)], ids=["one process", "tp2 pp2"])
def test_recomputation_changes_nothing(layout: ParallelConfig, trainable: tuple[str, ...], grown: Callable) -> None:
    """Added blocks on both stages, with frozen blocks before and between: gradients are bit-equal to those without
    recomputation."""
    settings = [RecomputeConfig(), *FULL, *SELECTIVE]
    num_ranks = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    ranks = run_distributed(
        worker,
        num_ranks,
        grown("mixed"),
        [{"config": layout, "recompute": recompute, "trainable": trainable} for recompute in settings],
    )
    for rank in ranks:
        check_same_bits([steps for steps, _ in rank])


def check_same_bits(runs: list[list[tuple]]) -> None:
    """Assert that all runs have the first one's losses, gradient norms and gradients."""
    kept, *recomputed = runs
    for steps in recomputed:
        for (loss, norm, pieces), (kept_loss, kept_norm, kept_pieces) in zip(steps, kept, strict=True):
            assert (loss, norm) == (kept_loss, kept_norm) and norm > 0
            for piece, kept_piece in zip(pieces, kept_pieces, strict=True):
                assert piece.key == kept_piece.key and torch.equal(piece.data, kept_piece.data), piece.key


def test_experts_are_recomputed(models: Callable) -> None:
    settings = [RecomputeConfig(), *FULL, RecomputeConfig("selective", modules=("moe",))]
    [results] = run_distributed(
        worker,
        1,
        models(**TINY_FAMILIES["mixtral"]).expanded_megatron,
        [{"config": parallel(), "recompute": recompute} for recompute in settings],
    )
    check_same_bits([steps for steps, _ in results])


def test_full_recomputation_repeats_layers_with_a_backward_pass(grown: Callable) -> None:
    """Layers 0 to 2 of 8 lie below the first trainable one."""
    [results] = run_distributed(
        worker, 1, grown("mixed"), [{"config": parallel(), "recompute": recompute} for recompute in FULL]
    )
    again = [range(3, 8), range(3, 8), range(3, 5)]
    for (_, work), layers in zip(results, again, strict=True):
        assert work.layer_runs == {layer: BATCH * (1 + (layer in layers)) for layer in range(8)}


@pytest.mark.parametrize("trainable", [("added_blocks",), ("embedding", "added_blocks"), ("final_norm",)])
def test_tied_embeddings_have_the_reference_gradients(trainable: tuple[str, ...], grown: Callable) -> None:
    """The first stage and the last hold the same embedding, frozen or trainable."""
    folder = grown("last", tie=True)
    [[(reference, _)]] = run_distributed(worker, 1, folder, [{**REFERENCE, "trainable": trainable}])
    ranks = run_distributed(worker, 2, folder, [{"config": parallel(pp=2), "trainable": trainable}])
    check_steps([steps for [(steps, _)] in ranks], reference)


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize("layout", [parallel(pp=2), parallel(pp=2, vp=2)], ids=["pp2 dp2", "pp2 virtual 2 dp2"])
def test_overlapped_reduction_changes_nothing(layout: ParallelConfig, grown: Callable, run_config: Callable) -> None:
    """One stage, and some chunks, have nothing to reduce or gather."""
    figures = [
        run_distributed(workers.train, 4, run_config(checkpoint=grown("last"), parallel=config, save=save))
        for config, save in ((layout, "plain"), (replace(layout, **OVERLAP), "overlapped"))
    ]
    plain, overlapped = ([rank.figures for rank in ranks] for ranks in figures)
    assert plain == overlapped and len(plain[0]) == 4
