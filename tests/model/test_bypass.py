"""A bypassed layer's output is its input, and afterwards its forward is what it was."""

from __future__ import annotations

import torch

from megatron_llamapro.model.bypass import bypassed


def test_a_layer_is_bypassed_and_restored() -> None:
    plain, wrapped = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    wrapped.forward = lambda hidden_states: (hidden_states + 1, None)
    given = torch.ones(1, 2)
    before, (after, _) = plain(given), wrapped(given)
    with bypassed([plain, wrapped]):
        assert plain(given)[0] is given and wrapped(given)[0] is given
    assert torch.equal(plain(given), before) and torch.equal(wrapped(given)[0], after)
    assert "forward" not in vars(plain)
