"""Block times measured on this machine: one of the project's own layers, timed as each kind of block."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from megatron_llamapro.config.schema import ParallelConfig, RunConfig
from megatron_llamapro.families.shape import ModelShape
from megatron_llamapro.model.build import LlamaModel, build_model
from megatron_llamapro.runtime.distributed import start_model_parallel

_WARM_UP, _ROUNDS = 2, 7


def calibrate(config: RunConfig, shape: ModelShape) -> dict[str, dict[str, float]]:
    """Return the median seconds of a micro-batch in each kind of block, in the embedding and in the head:
    {"frozen": {"forward": …, "backward": …}, …}.

    Every rank of a started world calls it; the world is one tensor-parallel group. All blocks of a kind have the same
    size, so one block with random weights is built and timed.
    """
    parallel = ParallelConfig(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        sequence_parallel=config.parallel.sequence_parallel,
    )
    start_model_parallel(parallel, seed=config.training.seed)
    [model] = build_model(
        shape.with_layers([0]), model=config.model, parallel=parallel, precision=config.training.precision
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    timer = _Timer(model, config, shape)
    return {
        "embedding": timer.embedding(),
        "below": timer.block(trains=False, backward=False),
        "frozen": timer.block(trains=False, backward=True),
        "trainable": timer.block(trains=True, backward=True),
        "head": timer.head(),
    }


class _Timer:
    def __init__(self, model: LlamaModel, config: RunConfig, shape: ModelShape) -> None:
        self.model = model
        batch, sequence = config.training.micro_batch_size, config.data.seq_length
        device = torch.cuda.current_device()
        self.tokens = torch.randint(shape.vocab_size, (batch, sequence), device=device)
        self.positions = torch.arange(sequence, device=device).expand(batch, sequence)
        self.rotary = model.rotary_pos_emb(sequence)
        with torch.no_grad():
            self.hidden = model.embedding(self.tokens, self.positions).contiguous()

    def embedding(self) -> dict[str, float]:
        with torch.no_grad():
            forward = _median(lambda: (self.model.embedding(self.tokens, self.positions), None)[1])
        return {"forward": forward[0], "backward": 0.0}

    def block(self, *, trains: bool, backward: bool) -> dict[str, float]:
        layer = self.model.decoder.layers[0]
        layer.requires_grad_(trains)
        hidden = self.hidden.detach().requires_grad_(backward)

        def run() -> torch.Tensor:
            return layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=self.rotary)[0]

        return self._both(run, hidden, backward=backward)

    def head(self) -> dict[str, float]:
        self.model.requires_grad_(False)
        hidden = self.hidden.detach().requires_grad_()

        def run() -> torch.Tensor:
            normed = self.model.decoder.final_layernorm(hidden)
            return self.model._postprocess(
                normed,
                labels=self.tokens,
                input_ids=None,
                position_ids=None,
                rotary_pos_emb=None,
                rotary_pos_cos=None,
                rotary_pos_sin=None,
            )

        return self._both(run, hidden, backward=True)

    def _both(self, run: Callable[[], torch.Tensor], hidden: torch.Tensor, *, backward: bool) -> dict[str, float]:
        def once() -> Callable[[], None] | None:
            output = run()
            if not backward:
                return None
            gradient = torch.ones_like(output)
            return lambda: output.backward(gradient)

        with torch.set_grad_enabled(backward):
            forward, after = _median(once)
        hidden.grad = None
        return {"forward": forward, "backward": after if backward else 0.0}


def _median(once: Callable[[], Callable[[], None] | None]) -> tuple[float, float]:
    """Return the median seconds of `once()`, and of the function that it returns, which is called afterwards."""
    rounds: list[Sequence[float]] = []
    for _ in range(_WARM_UP + _ROUNDS):
        started = _now()
        afterwards = once()
        between = _now()
        if afterwards is not None:
            afterwards()
        rounds.append((between - started, _now() - between))
    forward, backward = zip(*rounds[_WARM_UP:], strict=True)
    return statistics.median(forward), statistics.median(backward)


def _now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
