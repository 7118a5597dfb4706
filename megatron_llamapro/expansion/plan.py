"""Expansion plans: for every layer of the expanded model, where it comes from and whether it was added.

A plan is data. It is made before any tensor is read, and stored in every checkpoint's manifest. Nothing else says which
layers are new. Layer indices are 0-based and global, as in Hugging Face. Paper: arXiv 2401.02415, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise

from megatron_llamapro.config.errors import ExpansionError


class Placement(str, Enum):
    """Where the added blocks go."""

    INTERLEAVED = "interleaved"
    """After every group of blocks, as in the paper."""
    PREFIX = "prefix"
    """Before block 0."""
    SUFFIX = "suffix"
    """After the last block."""


class Trained(str, Enum):
    """Which blocks may have been trained since a model was expanded."""

    NOTHING = "nothing"
    """None: every added block still has its initial values."""
    NEW_BLOCKS = "new_blocks"
    """The blocks that were added to it."""
    ADDED_BLOCKS = "added_blocks"
    """Those blocks, and the ones that earlier rounds had added."""


@dataclass(frozen=True)
class Layer:
    """One layer of the expanded model."""

    source_layer: int
    """The layer that it is or copies, in the first source model (before any round)."""
    parent_layer: int
    """The layer that it is or copies, in the model that the latest round expanded."""
    added_in_round: int = 0
    """0: an original block. r >= 1: added in round r."""

    @property
    def is_added(self) -> bool:
        return self.added_in_round > 0


@dataclass(frozen=True)
class ExpansionPlan:
    """Every layer of the expanded model, in order, with its lineage back to the first source model."""

    layers: tuple[Layer, ...]
    num_rounds: int = 0
    """How many times the first source model was expanded. Blocks of the latest round have this number."""
    apart: tuple[int, ...] = ()
    """Rounds after the first whose blocks were added to the first source model (`with_pack`), not to the model that
    the rounds before made."""

    @classmethod
    def unexpanded(cls, num_layers: int) -> ExpansionPlan:
        """Return the plan of an unexpanded model: every layer is its own source."""
        return cls(tuple(Layer(source_layer=i, parent_layer=i) for i in range(num_layers)))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def added_layers(self) -> tuple[int, ...]:
        """Layers added in any round."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.is_added)

    @property
    def original_layers(self) -> tuple[int, ...]:
        """Layers of the first source model, in its order."""
        return self.layers_after(0)

    @property
    def newest_layers(self) -> tuple[int, ...]:
        """Layers added in the latest round. That round initialised them as identities."""
        if self.num_rounds == 0:
            return ()
        return tuple(i for i, layer in enumerate(self.layers) if layer.added_in_round == self.num_rounds)

    def layers_after(self, num_rounds: int) -> tuple[int, ...]:
        """Return the layers that existed after `num_rounds` rounds, in order."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.added_in_round <= num_rounds)

    def layers_of_round(self, number: int) -> tuple[int, ...]:
        """Return the layers of the model that round `number` made, in order. If its blocks were added apart, these are
        the original ones and its own."""
        if number not in self.apart:
            return self.layers_after(number)
        return tuple(i for i, layer in enumerate(self.layers) if layer.added_in_round in (0, number))

    def of_round(self, number: int) -> ExpansionPlan:
        """Return the plan of the model that round `number` made. Raises what `after` raises."""
        if number not in self.apart:
            return self.after(number)
        layers = self.layers_of_round(number)
        positions = [i for i, layer in enumerate(layers) if self.layers[layer].is_added]
        return ExpansionPlan.unexpanded(len(self.original_layers)).expand(positions)

    def copied_from(self, layer: int) -> int:
        """Return the layer of this model that the added block `layer` was copied from."""
        number = self.layers[layer].added_in_round
        parent = self.after(number).layers[self.layers_after(number).index(layer)].parent_layer
        return self.layers_after(number - 1)[parent]

    def after(self, num_rounds: int) -> ExpansionPlan:
        """Return the plan after `num_rounds` rounds, made again from the positions of their blocks.

        Raises:
            ExpansionError: blocks of those rounds are at positions where no round can put them.
        """
        plan = ExpansionPlan.unexpanded(len(self.original_layers))
        for number in range(1, num_rounds + 1):
            if number in self.apart:
                plan = plan.with_pack(self.of_round(number))
                continue
            layers = [self.layers[i] for i in self.layers_after(number)]
            plan = plan.expand([i for i, layer in enumerate(layers) if layer.added_in_round == number])
        return plan

    def expand(self, positions: Sequence[int]) -> ExpansionPlan:
        """Return the plan with one more round: blocks are added at `positions`, which index the expanded model.

        A run of k added blocks after source block s copies s-k+1 … s, in order (the paper's "top P"). A run at the
        very start copies the first k.

        Raises:
            ExpansionError: `positions` are not ascending indices of the expanded model, or a run is longer than the
                blocks that it can copy.
        """
        parents = parent_of_each_layer(self.num_layers, positions)
        added = set(positions)
        new_round = self.num_rounds + 1
        layers = tuple(
            Layer(
                source_layer=self.layers[parent].source_layer,
                parent_layer=parent,
                added_in_round=new_round if index in added else self.layers[parent].added_in_round,
            )
            for index, parent in enumerate(parents)
        )
        return ExpansionPlan(layers, new_round, self.apart)

    def with_pack(self, pack: ExpansionPlan) -> ExpansionPlan:
        """Return the plan with the blocks of `pack`, a plan of one round of the same first source model, as one more
        round.

        A block stays behind the original block that it is behind in `pack` (or before block 0), after all blocks that
        are there already.

        Raises:
            ExpansionError: `pack` has another number of rounds or of original blocks.
        """
        if pack.num_rounds != 1 or len(pack.original_layers) != len(self.original_layers):
            raise ExpansionError(
                f"a pack is one round of blocks for {len(self.original_layers)} original blocks, not "
                f"{pack.num_rounds} rounds for {len(pack.original_layers)}"
            )
        if self.num_rounds == 0:
            return pack
        new_round = self.num_rounds + 1
        layers: list[Layer] = []
        for own, added in zip(self._groups(), pack._groups(), strict=True):
            layers += [replace(self.layers[i], parent_layer=i) for i in own]
            for source in (pack.layers[i].source_layer for i in added if pack.layers[i].is_added):
                layers.append(Layer(source, self.original_layers[source], new_round))
        return ExpansionPlan(tuple(layers), new_round, (*self.apart, new_round))

    def _groups(self) -> list[list[int]]:
        """Return the layers before the first original block, then each original block with the added ones behind it."""
        groups: list[list[int]] = [[]]
        for i, layer in enumerate(self.layers):
            if not layer.is_added:
                groups.append([])
            groups[-1].append(i)
        return groups

    def to_json(self) -> dict:
        """Return plain data. `from_json` turns it back into an equal plan."""
        return {
            "num_rounds": self.num_rounds,
            **({"apart": list(self.apart)} if self.apart else {}),
            "layers": [
                {
                    "source_layer": x.source_layer,
                    "parent_layer": x.parent_layer,
                    "added_in_round": x.added_in_round,
                }
                for x in self.layers
            ],
        }

    @classmethod
    def from_json(cls, data: dict) -> ExpansionPlan:
        """Return the plan that `to_json` wrote.

        Raises:
            ExpansionError: the data is not a plan, or its lineage contradicts itself.
        """
        try:
            layers = tuple(Layer(**layer) for layer in data["layers"])
            plan = cls(layers, data["num_rounds"], tuple(data.get("apart", ())))
        except (KeyError, TypeError) as error:
            raise ExpansionError(f"not an expansion plan: {error}") from None
        plan._check_lineage()
        return plan

    def _check_lineage(self) -> None:
        numbers = [n for x in self.layers for n in (x.source_layer, x.parent_layer, x.added_in_round)]
        if not all(type(n) is int and n >= 0 for n in [*numbers, self.num_rounds, *self.apart]):
            raise ExpansionError("not an expansion plan: layers and rounds are whole numbers, 0 or more")
        originals = [layer.source_layer for layer in self.layers if not layer.is_added]
        if not originals or originals != list(range(len(originals))):
            raise ExpansionError("not an expansion plan: its original layers are not 0, 1, 2, … in order")
        if any(layer.source_layer >= len(originals) for layer in self.layers):
            raise ExpansionError("not an expansion plan: an added layer copies a layer that does not exist")
        if any(layer.parent_layer >= len(self.layers) for layer in self.layers):
            raise ExpansionError("not an expansion plan: a layer's parent does not exist")
        if self.num_rounds > len(self.layers):
            raise ExpansionError("not an expansion plan: it has more rounds than layers")
        if {x.added_in_round for x in self.layers if x.is_added} != set(range(1, self.num_rounds + 1)):
            raise ExpansionError("not an expansion plan: its rounds do not match its added layers")
        if not set(self.apart) <= set(range(2, self.num_rounds + 1)) or sorted(set(self.apart)) != [*self.apart]:
            raise ExpansionError(
                "not an expansion plan: the rounds that were added apart are not some of the later ones"
            )


def parent_of_each_layer(num_source_layers: int, positions: Sequence[int]) -> list[int]:
    """Return, for every layer of the model expanded at `positions`, the source layer that it is or copies."""
    num_layers = num_source_layers + len(positions)
    _check_positions(positions, num_layers)
    added = set(positions)
    parents: list[int] = []
    next_source = 0
    index = 0
    while index < num_layers:
        if index not in added:
            parents.append(next_source)
            next_source += 1
            index += 1
            continue
        run = 1
        while index + run in added:
            run += 1
        first = next_source - run if next_source else 0
        if first < 0 or first + run > num_source_layers:
            raise ExpansionError(
                f"{run} added blocks in a row at position {index} have only "
                f"{next_source or num_source_layers} source blocks to copy: add fewer"
            )
        parents.extend(range(first, first + run))
        index += run
    return parents


def positions_after(blocks: Iterable[int]) -> tuple[int, ...]:
    """Return the positions, in the expanded model, of one added block after each of these source blocks.

    An added block copies the block before it, so each of these source blocks is copied once. (3, 7) gives 4, 9.
    """
    return tuple(block + 1 + num_before for num_before, block in enumerate(sorted(blocks)))


def _check_positions(positions: Sequence[int], num_layers: int) -> None:
    if not positions:
        raise ExpansionError("no positions given: name at least one layer index of the expanded model")
    for before, after in pairwise(positions):
        if after == before:
            raise ExpansionError(f"position {after} is given twice: each added block has its own index")
        if after < before:
            raise ExpansionError(f"positions are not ascending: {after} comes after {before}")
    if positions[0] < 0 or positions[-1] >= num_layers:
        wrong = positions[0] if positions[0] < 0 else positions[-1]
        raise ExpansionError(
            f"position {wrong} is out of range: the expanded model has layers 0 … {num_layers - 1} "
            f"({num_layers - len(positions)} + {len(positions)} added)"
        )


def placed_positions(
    num_source_layers: int,
    num_added_blocks: int,
    *,
    placement: Placement = Placement.INTERLEAVED,
    blocks_per_group: int = 1,
) -> tuple[int, ...]:
    """Return the positions, in the expanded model, of `num_added_blocks` blocks added to `num_source_layers`.

    `interleaved` makes `num_added_blocks / blocks_per_group` groups. Group i ends after source block
    `floor((i + 1) * L * P / N) - 1`, and its added blocks follow. 32 + 8 gives 4, 9, …, 39.

    Raises:
        ExpansionError: the counts cannot be placed like this.
    """
    if num_added_blocks < 1:
        raise ExpansionError(f"num_added_blocks is {num_added_blocks}: add at least 1 block")
    if num_added_blocks > num_source_layers:
        raise ExpansionError(
            f"cannot add {num_added_blocks} blocks to {num_source_layers} layers in one round: "
            f"each source block is copied at most once, so add at most {num_source_layers}"
        )
    if placement is not Placement.INTERLEAVED and blocks_per_group != 1:
        raise ExpansionError(f"blocks_per_group is for interleaved placement, not for {placement.value}")
    if placement is Placement.PREFIX:
        return tuple(range(num_added_blocks))
    if placement is Placement.SUFFIX:
        return tuple(range(num_source_layers, num_source_layers + num_added_blocks))
    return _interleaved_positions(num_source_layers, num_added_blocks, blocks_per_group)


def _interleaved_positions(num_source_layers: int, num_added_blocks: int, per_group: int) -> tuple[int, ...]:
    if per_group < 1 or num_added_blocks % per_group:
        raise ExpansionError(
            f"blocks_per_group is {per_group}: it must be at least 1 and divide num_added_blocks ({num_added_blocks})"
        )
    num_groups = num_added_blocks // per_group
    positions: list[int] = []
    for group in range(num_groups):
        group_end = (group + 1) * num_source_layers // num_groups  # source blocks up to the group's end
        start = group_end + group * per_group
        positions.extend(range(start, start + per_group))
    return tuple(positions)
