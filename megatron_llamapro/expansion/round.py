"""A round of expansion: where its blocks go, how they are initialised, and config.json of the model with it.
Plain data; imports no torch.

Every initialisation makes a block an identity. They differ in what the block is a copy of, and in what is zeroed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from megatron_llamapro.config.errors import ExpansionError
from megatron_llamapro.expansion.plan import ExpansionPlan, Placement, placed_positions
from megatron_llamapro.families.hf_config import MANIFEST_KEY, check_per_layer, family_of, layer_types


class Init(str, Enum):
    """What an added block starts as."""

    COPY = "copy"
    """A copy of its source block, both output projections zeroed (the paper's)."""
    RANDOM = "random"
    """Normal with the model's initializer_range, norms 1, both output projections zeroed."""
    MEAN = "mean"
    """The mean of its source block and the one behind that, both output projections zeroed."""
    ZERO_NORM = "zero_norm"
    """A copy of its source block with its norms zeroed instead (staged training, Shen et al. 2022)."""

    @property
    def zeroes_norms(self) -> bool:
        """Whether it zeroes the norms, and not the output projections."""
        return self is Init.ZERO_NORM


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """A round of added blocks, at given `positions` or so many of them with a `placement`: `Expansion.at(2, 5)`,
    `Expansion(num_added_blocks=8)`."""

    positions: tuple[int, ...] | None = None
    """Indices in the expanded model, from 0, ascending."""
    num_added_blocks: int | None = None
    """Instead of positions."""
    placement: Placement = Placement.INTERLEAVED
    """Of `num_added_blocks`."""
    blocks_per_group: int = 1
    """Of `num_added_blocks`, interleaved: the last blocks of each group are copied behind it."""
    init: Init = Init.COPY
    seed: int = 0
    """Of random blocks."""

    def __post_init__(self) -> None:
        """Raises `ExpansionError` where it is not clear where the blocks go, or a value is of another type."""
        if (self.positions is None) is (self.num_added_blocks is None):
            raise ExpansionError("an expansion needs either positions or num_added_blocks")
        if self.positions is not None and (self.placement is not Placement.INTERLEAVED or self.blocks_per_group != 1):
            raise ExpansionError("placement and blocks_per_group are for num_added_blocks: leave them out")
        for value, kind in ((self.placement, Placement), (self.init, Init)):
            if not isinstance(value, kind):
                names = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)
                raise ExpansionError(f"{value!r} is no {kind.__name__}: use one of {names}")

    @classmethod
    def at(cls, *positions: int, init: Init = Init.COPY, seed: int = 0) -> Expansion:
        """Blocks at these positions of the expanded model, ascending."""
        return cls(positions=positions, init=init, seed=seed)

    def expand(self, plan: ExpansionPlan) -> ExpansionPlan:
        """The plan of the model with this round added.

        Raises:
            ExpansionError: the model has no such positions, or the blocks cannot be placed so.
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


def check_init(init: Init, *, force: bool) -> None:
    """Raise `ExpansionError` for an initialisation that cannot learn in any known family, unless forced."""
    if init is Init.ZERO_NORM and not force:
        raise ExpansionError(
            "init zero_norm cannot learn in a SwiGLU block: with its input at 0 the feed-forward is of second order, "
            "so its norm's gradient stays 0 (arXiv 2401.02415, section 3.2): take copy, or compare with --force"
        )


def expanded_hf_config(config: Mapping, plan: ExpansionPlan) -> dict:
    """`config` for the model that `plan`'s latest round makes of it, without any manifest: the layer count and every
    field that speaks of single layers."""
    family = family_of(config)
    expanded = {key: value for key, value in config.items() if key != MANIFEST_KEY}
    old_count = config["num_hidden_layers"]
    types = layer_types({**family.defaults, **config}, family, old_count)
    if len(set(types)) > 1:  # a first windowed layer alone may not describe what the plan makes of it
        expanded["layer_types"] = types
    expanded["num_hidden_layers"] = plan.num_layers
    for name in family.per_layer_fields:
        values = expanded.get(name)
        if values is not None:
            check_per_layer(name, values, old_count)
            expanded[name] = [values[layer.parent_layer] for layer in plan.layers]
    for name in family.layer_count_fields:
        if type(config.get(name)) is int:
            beyond = max(0, config[name] - old_count)
            expanded[name] = sum(layer.parent_layer < config[name] for layer in plan.layers) + beyond
    return expanded
