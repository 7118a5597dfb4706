"""megatron.core's distributed optimizer, made resumable: what is saved of it is what it holds.

Each override below mends one place of `DistributedOptimizer` 0.16.1. One concerns every kernel. The others concern
torch's AdamW, which is taken where neither Transformer Engine nor Apex is installed: it keeps a `step` per parameter,
unlike their fused kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_LENT = "lent"  # a key that is no tensor: torch's state_dict looks tensors up in the groups


class ResumableDistributedOptimizer(DistributedOptimizer):
    """Set as the class of an optimizer that `get_megatron_optimizer` made."""

    def get_parameter_state_dp_zero(self, *args: object, **kwargs: object) -> dict | None:
        """Upstream leaves out the padding between buckets here, and counts it where it cuts the result into parameters:
        state of every parameter behind a padded bucket would be saved shifted. (Buckets are padded to a multiple of
        the data-parallel size and of 128; there are several from 40 million parameters on, where reduction overlaps.)
        """
        state = super().get_parameter_state_dp_zero(*args, **kwargs)
        if state is None:
            return None
        for index, buffer in enumerate(self.buffers):
            for tensors in state[index].values():
                for name, value in tensors.items():
                    if isinstance(value, torch.Tensor):
                        tensors[name] = _with_padding(value, buffer)
        return state


def _with_padding(values: torch.Tensor, buffer: _ParamAndGradBuffer) -> torch.Tensor:
    """Values of a whole buffer, bucket after bucket → each bucket at its offset in the buffer."""
    if all(bucket.numel_unpadded == bucket.grad_data.numel() for bucket in buffer.buckets[:-1]):
        return values  # no bucket is shifted
    placed = values.new_zeros(buffer.numel)
    parts = values.split([bucket.numel_unpadded for bucket in buffer.buckets])
    for bucket, part in zip(buffer.buckets, parts, strict=True):
        placed[bucket.offset : bucket.offset + len(part)] = part
    return placed


class TorchAdamDistributedOptimizer(ResumableDistributedOptimizer):
    """The same, around torch's AdamW."""

    lent_step: float = 0.0
    """Steps taken so far, for a rank whose optimizer holds no state to read them from."""

    def state_dict(self) -> dict:
        """Upstream asserts exactly one `step` among the states: a rank with nothing to train has none."""
        with self._lend_step():
            return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Upstream gives all states one shared `step` tensor, which AdamW would then advance once a parameter."""
        with torch.no_grad(), self._lend_step():
            super().load_state_dict(state_dict)
        for key, state in self.optimizer.state.items():
            if key != _LENT:
                state["step"] = state["step"].clone()
        self.optimizer.state.pop(_LENT, None)

    def _set_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter, tensors: dict) -> None:
        """Upstream copies every state that AdamW has, `step` too, which checkpoints keep with the groups instead."""
        step = self._get_main_param_and_optimizer_states(model_param)["step"]
        super()._set_main_param_and_optimizer_states(model_param, {**tensors, "step": step})

    @contextlib.contextmanager
    def _lend_step(self) -> Iterator[None]:
        if self.optimizer.state:
            yield
            return
        self.optimizer.state[_LENT] = {"step": torch.tensor(self.lent_step)}
        try:
            yield
        finally:
            self.optimizer.state.pop(_LENT, None)


def init_state(part: DistributedOptimizer) -> None:
    """Make an optimizer's state exist (zeros, no steps taken), so that there is something to load into, or to save.

    Upstream does it by a step with zero gradients; the learning rate 0 keeps that from decaying the weights. torch's
    AdamW counts steps a parameter, Transformer Engine's and Apex's a group.
    """
    groups = part.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    part._init_optimizer_states_with_dummy_values()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        if "step" in group:
            group["step"] = 0
    for state in part.optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
