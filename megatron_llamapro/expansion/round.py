"""A round of expansion: where its blocks go, how they are initialised, and config.json of the expanded model.

Plain data; imports no torch. Every initialisation makes a block an identity. They differ in the values that the block
gets, and in the weights that are zeroed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from megatron_llamapro.config.errors import ExpansionError
from megatron_llamapro.expansion.plan import ExpansionPlan, Placement, placed_positions
from megatron_llamapro.families.hf_config import MANIFEST_KEY, check_per_layer, family_of, layer_types


class Init(str, Enum):
    """How an added block is initialised."""

    COPY = "copy"
    """A copy of its source block, with both output projections zeroed (as in the paper)."""
    RANDOM = "random"
    """Normal with the model's initializer_range, norms 1, with both output projections zeroed."""
    MEAN = "mean"
    """The mean of its source block and the next one, with both output projections zeroed."""
    ZERO_NORM = "zero_norm"
    """A copy of its source block, with its norms zeroed instead (staged training, Shen et al. 2022)."""

    @property
    def zeroes_norms(self) -> bool:
        """Whether it zeroes the norms instead of the output projections."""
        return self is Init.ZERO_NORM


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """A round of added blocks, given by `positions` or by their number and `placement`: `Expansion.at(2, 5)`,
    `Expansion(num_added_blocks=8)`."""

    positions: tuple[int, ...] | None = None
    """Indices in the expanded model, from 0, ascending."""
    num_added_blocks: int | None = None
    """Number of blocks to add, instead of positions."""
    placement: Placement = Placement.INTERLEAVED
    """Where `num_added_blocks` go."""
    blocks_per_group: int = 1
    """With `num_added_blocks`, interleaved: how many of each group's last blocks are copied after the group."""
    init: Init = Init.COPY
    seed: int = 0
    """Seed of random blocks."""

    def __post_init__(self) -> None:
        """Raise `ExpansionError` if positions are not given in exactly one way, or an enum's value is not a member."""
        if (self.positions is None) is (self.num_added_blocks is None):
            raise ExpansionError("an expansion needs either positions or num_added_blocks")
        if self.positions is not None and (self.placement is not Placement.INTERLEAVED or self.blocks_per_group != 1):
            raise ExpansionError("placement and blocks_per_group are for num_added_blocks: leave them out")
        for value, kind in ((self.placement, Placement), (self.init, Init)):
            if not isinstance(value, kind):
                names = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)
                raise ExpansionError(f"{value!r} is not a member of {kind.__name__}: use one of {names}")

    @classmethod
    def at(cls, *positions: int, init: Init = Init.COPY, seed: int = 0) -> Expansion:
        """Return the round that adds blocks at these positions of the expanded model, in ascending order."""
        return cls(positions=positions, init=init, seed=seed)

    def expand(self, plan: ExpansionPlan) -> ExpansionPlan:
        """Return the plan of the model with this round added.

        Raises:
            ExpansionError: the model has no such positions, or the blocks cannot be placed like this.
        """
        if self.positions is not None:
            return plan.expand(self.positions)
        assert self.num_added_blocks is not None
        positions = placed_positions(
            plan.num_layers,
            self.num_added_blocks,
            placement=self.placement,
            blocks_per_group=self.blocks_per_group,
        )
        return plan.expand(positions)


def expanded_hf_config(config: Mapping, plan: ExpansionPlan) -> dict:
    """Return `config` for the model after the latest round of `plan`, without a manifest.

    The number of layers and every field with a value per layer are changed.
    """
    family = family_of(config)
    expanded = {key: value for key, value in config.items() if key != MANIFEST_KEY}
    old_count = config["num_hidden_layers"]
    types = layer_types({**family.defaults, **config}, family, old_count)
    if len(set(types)) > 1:  # the index of the first windowed layer may not describe the expanded model
        expanded["layer_types"] = types
    expanded["num_hidden_layers"] = plan.num_layers
    for name in family.per_layer_fields:
        values = expanded.get(name)
        if values is not None:
            check_per_layer(name, values, old_count)
            expanded[name] = [values[layer.parent_layer] for layer in plan.layers]
    for name in family.layer_count_fields:
        if type(config.get(name)) is int:
            beyond = max(0, config[name] - old_count)  # a field may count more layers than exist: keep the surplus
            expanded[name] = sum(layer.parent_layer < config[name] for layer in plan.layers) + beyond
    return expanded
