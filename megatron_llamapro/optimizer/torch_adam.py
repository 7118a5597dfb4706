"""megatron.core's distributed optimizer, made resumable: the saved state is exactly the state that it holds.

Each override below fixes one place in `DistributedOptimizer` 0.16.1. One applies to every kernel. The others apply to
torch's AdamW, which is used if neither Transformer Engine nor Apex is installed. It keeps a `step` per parameter,
unlike their fused kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_LENT = "lent"  # a key that is not a tensor: torch's state_dict looks tensors up in the groups


class ResumableDistributedOptimizer(DistributedOptimizer):
    """A distributed optimizer that can be resumed. Set as the class of one that `get_megatron_optimizer` made."""

    def get_parameter_state_dp_zero(self, *args: object, **kwargs: object) -> dict | None:
        """Put back the padding between buckets. Upstream omits it here, but counts it when it cuts the result into
        parameters, so the state of every parameter after a padded bucket would be saved shifted. (Buckets are padded
        to a multiple of the data-parallel size and of 128. With overlapped reduction, a model of over 40 million
        parameters has several.)
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
    """Move values that lie bucket after bucket, without padding, to each bucket's offset in the buffer."""
    if all(bucket.numel_unpadded == bucket.grad_data.numel() for bucket in buffer.buckets[:-1]):
        return values  # no bucket is shifted
    placed = values.new_zeros(buffer.numel)
    parts = values.split([bucket.numel_unpadded for bucket in buffer.buckets])
    for bucket, part in zip(buffer.buckets, parts, strict=True):
        placed[bucket.offset : bucket.offset + len(part)] = part
    return placed


class TorchAdamDistributedOptimizer(ResumableDistributedOptimizer):
    """A resumable distributed optimizer around torch's AdamW."""

    lent_step: float = 0.0
    """Number of steps taken, for a rank whose optimizer has no state to read it from."""

    def state_dict(self) -> dict:
        """Lend a `step` to a rank with nothing to train: upstream asserts exactly one among the states."""
        with self._lend_step():
            return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Give every state its own `step`. Upstream shares one, and AdamW would advance it once per parameter."""
        with torch.no_grad(), self._lend_step():
            super().load_state_dict(state_dict)
        for key, state in self.optimizer.state.items():
            if key != _LENT:
                state["step"] = state["step"].clone()
        self.optimizer.state.pop(_LENT, None)

    def _set_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter, tensors: dict) -> None:
        """Add the current `step`. Upstream copies all AdamW states, but checkpoints keep `step` with the groups."""
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
    """Create an optimizer's state (zeros, no steps taken), so that it can be loaded into or saved.

    Upstream takes a step with zero gradients for this; learning rate 0 keeps it from decaying the weights. torch's
    AdamW counts steps per parameter, Transformer Engine's and Apex's per group.
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
