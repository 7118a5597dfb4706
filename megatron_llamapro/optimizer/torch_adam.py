"""megatron.core's distributed optimizer around torch's AdamW, made resumable.

Where neither Transformer Engine nor Apex is installed, `DistributedOptimizer` 0.16.1 takes torch's AdamW, whose state
has one thing theirs has not: a `step` for every parameter. Each override below mends one place that forgets it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_LENT = "lent"  # a key that is no tensor: torch's state_dict looks tensors up in the groups


class TorchAdamDistributedOptimizer(DistributedOptimizer):
    """Set as the class of an optimizer that `get_megatron_optimizer` made."""

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
