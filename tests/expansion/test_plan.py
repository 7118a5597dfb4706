"""Expansion plans, compared with a second, naive version of the paper's rule."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llamapro.config.errors import ExpansionError
from megatron_llamapro.expansion.plan import ExpansionPlan, Placement, placed_positions, positions_after


def naive_interleaved(num_layers: int, num_added: int, top: int) -> list[tuple[int, bool]]:
    """Return (source layer, added?) of every layer: after each group, copies of its last `top` blocks."""
    num_groups = num_added // top
    ends = [(group + 1) * num_layers // num_groups for group in range(num_groups)]
    expanded: list[tuple[int, bool]] = []
    for layer in range(num_layers):
        expanded.append((layer, False))
        if layer + 1 in ends:
            expanded += [(copied, True) for copied in range(layer + 1 - top, layer + 1)]
    return expanded


def described(plan: ExpansionPlan) -> list[tuple[int, bool]]:
    return [(layer.source_layer, layer.is_added) for layer in plan.layers]


@st.composite
def interleavings(draw: st.DrawFn) -> tuple[int, int, int]:
    """Draw any valid counts: layers, added blocks, blocks per group."""
    num_layers = draw(st.integers(1, 100))
    top = draw(st.integers(1, num_layers))
    num_groups = draw(st.integers(1, num_layers // top))
    return num_layers, num_groups * top, top


@st.composite
def plans(draw: st.DrawFn) -> ExpansionPlan:
    """Draw up to three rounds on a small model."""
    plan = ExpansionPlan.unexpanded(draw(st.integers(1, 8)))
    for _ in range(draw(st.integers(0, 3))):
        num_added = draw(st.integers(1, plan.num_layers))
        placement = draw(st.sampled_from(Placement))
        plan = plan.expand(placed_positions(plan.num_layers, num_added, placement=placement))
    return plan


@given(st.sets(st.integers(0, 19), min_size=1))
def test_blocks_added_after_chosen_ones_copy_these(blocks: set[int]) -> None:
    positions = positions_after(blocks)
    expected = [entry for block in range(20) for entry in [(block, False)] + [(block, True)] * (block in blocks)]
    plan = ExpansionPlan.unexpanded(20).expand(positions)
    assert (described(plan), plan.added_layers) == (expected, positions)


def test_the_plan_for_llama_2_7b_is_the_papers() -> None:
    """LLaMA-2-7B, 32 + 8: new blocks 4, 9, … 39, each a copy of the block before it."""
    positions = placed_positions(32, 8)
    assert positions == (4, 9, 14, 19, 24, 29, 34, 39)
    plan = ExpansionPlan.unexpanded(32).expand(positions)
    assert plan.num_layers == 40
    assert plan.added_layers == plan.newest_layers == positions
    assert [plan.layers[position].source_layer for position in positions] == [3, 7, 11, 15, 19, 23, 27, 31]


@given(interleavings())
def test_interleaving_follows_the_papers_rule(counts: tuple[int, int, int]) -> None:
    num_layers, num_added, top = counts
    plan = ExpansionPlan.unexpanded(num_layers).expand(placed_positions(num_layers, num_added, blocks_per_group=top))
    assert described(plan) == naive_interleaved(num_layers, num_added, top)


@given(st.integers(1, 100).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers))))
def test_groups_differ_by_at_most_one_block(counts: tuple[int, int]) -> None:
    num_layers, num_added = counts
    plan = ExpansionPlan.unexpanded(num_layers).expand(placed_positions(num_layers, num_added))
    ends = [plan.layers[position].source_layer + 1 for position in plan.added_layers]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert sum(sizes) == num_layers
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 40).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers))))
def test_prefix_and_suffix_place_blocks_at_the_ends(counts: tuple[int, int]) -> None:
    num_layers, num_added = counts
    original = [(layer, False) for layer in range(num_layers)]
    start = ExpansionPlan.unexpanded(num_layers)
    prefix = start.expand(placed_positions(num_layers, num_added, placement=Placement.PREFIX))
    assert described(prefix) == [(layer, True) for layer in range(num_added)] + original
    suffix = start.expand(placed_positions(num_layers, num_added, placement=Placement.SUFFIX))
    assert described(suffix) == original + [(layer, True) for layer in range(num_layers - num_added, num_layers)]


@given(plans())
def test_rounds_keep_the_original_layers_in_order(plan: ExpansionPlan) -> None:
    originals = [plan.layers[index] for index in plan.original_layers]
    assert [layer.source_layer for layer in originals] == list(range(len(originals)))
    assert set(plan.newest_layers) <= set(plan.added_layers)
    assert {layer.added_in_round for layer in plan.layers} <= set(range(plan.num_rounds + 1))


@given(plans())
def test_a_further_round_keeps_every_earlier_layer(plan: ExpansionPlan) -> None:
    expanded = plan.expand(placed_positions(plan.num_layers, 1))
    kept = [layer for layer in expanded.layers if layer.added_in_round <= plan.num_rounds]
    assert [layer.parent_layer for layer in kept] == list(range(plan.num_layers))
    assert [(layer.source_layer, layer.added_in_round) for layer in kept] == [
        (layer.source_layer, layer.added_in_round) for layer in plan.layers
    ]


@given(plans())
def test_a_plan_after_earlier_rounds_can_be_recovered(plan: ExpansionPlan) -> None:
    expanded = plan.expand(placed_positions(plan.num_layers, 1))
    assert expanded.after(expanded.num_rounds) == expanded
    assert expanded.after(plan.num_rounds) == plan
    assert expanded.after(0) == ExpansionPlan.unexpanded(len(plan.original_layers))


@given(plans())
def test_a_plan_survives_json(plan: ExpansionPlan) -> None:
    assert ExpansionPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@st.composite
def packs(draw: st.DrawFn) -> list[ExpansionPlan]:
    """Plans of one round each, for the same original model."""
    num_layers = draw(st.integers(2, 8))
    choices = st.builds(
        lambda number, placement: placed_positions(num_layers, number, placement=placement),
        st.integers(1, num_layers),
        st.sampled_from(Placement),
    )
    return [
        ExpansionPlan.unexpanded(num_layers).expand(positions)
        for positions in draw(st.lists(choices, min_size=1, max_size=4))
    ]


def composed(packs: list[ExpansionPlan]) -> ExpansionPlan:
    plan = ExpansionPlan.unexpanded(len(packs[0].original_layers))
    for pack in packs:
        plan = plan.with_pack(pack)
    return plan


def behind(plan: ExpansionPlan, number: int) -> list[tuple[int, int]]:
    """Return, for every block of a round, the original block that it stands behind (-1: none) and its source."""
    last, found = -1, []
    for layer in plan.layers:
        last += not layer.is_added
        if layer.added_in_round == number:
            found.append((last, layer.source_layer))
    return found


@given(packs())
def test_packs_keep_their_blocks_behind_the_same_original_blocks(packs: list[ExpansionPlan]) -> None:
    plan = composed(packs)
    assert plan.num_layers == len(plan.original_layers) + sum(len(pack.added_layers) for pack in packs)
    for number, pack in enumerate(packs, 1):
        assert behind(plan, number) == behind(pack, 1)
        assert plan.of_round(number) == pack
    groups = "".join("o" if not layer.is_added else chr(layer.added_in_round) for layer in plan.layers).split("o")
    assert all(list(group) == sorted(group) for group in groups)


@given(packs())
def test_blocks_of_packs_are_copied_from_original_blocks(packs: list[ExpansionPlan]) -> None:
    plan = composed(packs)
    for layer in plan.added_layers:
        assert plan.copied_from(layer) == plan.original_layers[plan.layers[layer].source_layer]


@given(packs())
def test_a_composed_plan_is_recovered_expanded_and_written_as_any_other(packs: list[ExpansionPlan]) -> None:
    plan = composed(packs)
    assert ExpansionPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    for number in range(1, len(packs) + 1):
        assert plan.after(number) == composed(packs[:number])
    larger = plan.expand((0, plan.num_layers + 1))
    assert larger.after(larger.num_rounds) == larger and larger.after(plan.num_rounds) == plan


def test_one_pack_is_the_plan_of_its_run() -> None:
    pack = ExpansionPlan.unexpanded(4).expand((2, 5))
    assert ExpansionPlan.unexpanded(4).with_pack(pack) == pack
    assert "apart" not in pack.to_json()


def test_a_pack_of_another_model_or_of_two_rounds_is_refused() -> None:
    plan = ExpansionPlan.unexpanded(4)
    for pack in (ExpansionPlan.unexpanded(3).expand((0,)), plan.expand((0,)).expand((0,)), plan):
        with pytest.raises(ExpansionError, match="a pack is one round of blocks for 4 original blocks, not"):
            plan.with_pack(pack)


def test_a_run_of_positions_copies_the_blocks_before_it() -> None:
    plan = ExpansionPlan.unexpanded(4).expand((2, 3, 6))
    assert described(plan) == [
        (0, False),
        (1, False),
        (0, True),
        (1, True),
        (2, False),
        (3, False),
        (3, True),
    ]


def test_a_run_at_the_start_copies_the_first_blocks() -> None:
    plan = ExpansionPlan.unexpanded(3).expand((0, 1, 3))
    assert described(plan) == [(0, True), (1, True), (0, False), (0, True), (1, False), (2, False)]


BAD_POSITIONS = {
    "none": ((), "no positions given"),
    "repeated": ((2, 2), "position 2 is given twice"),
    "unsorted": ((5, 2), "not ascending: 2 comes after 5"),
    "too large": (
        (2, 6),
        r"position 6 is out of range: the expanded model has layers 0 … 5 \(4 \+ 2 added\)",
    ),
    "negative": ((-1, 2), "position -1 is out of range"),
    "longer than what is before it": (
        (1, 2),
        "2 added blocks in a row at position 1 have only 1 source blocks",
    ),
}


@pytest.mark.parametrize(("positions", "message"), BAD_POSITIONS.values(), ids=BAD_POSITIONS.keys())
def test_impossible_positions_are_refused(positions: tuple[int, ...], message: str) -> None:
    with pytest.raises(ExpansionError, match=message):
        ExpansionPlan.unexpanded(4).expand(positions)


BAD_COUNTS = {
    "none": ({"num_added_blocks": 0}, "add at least 1"),
    "more than there are": ({"num_added_blocks": 5}, "cannot add 5 blocks to 4 layers"),
    "groups that do not divide": ({"num_added_blocks": 3, "blocks_per_group": 2}, "divide num_added_blocks"),
    "no blocks a group": ({"num_added_blocks": 2, "blocks_per_group": 0}, "at least 1"),
    "groups in a prefix": (
        {"num_added_blocks": 2, "blocks_per_group": 2, "placement": Placement.PREFIX},
        "for interleaved placement, not for prefix",
    ),
}


@pytest.mark.parametrize(("counts", "message"), BAD_COUNTS.values(), ids=BAD_COUNTS.keys())
def test_impossible_counts_are_refused(counts: dict, message: str) -> None:
    with pytest.raises(ExpansionError, match=message):
        placed_positions(4, **counts)


LAYER = {"source_layer": 0, "parent_layer": 0, "added_in_round": 0}
BAD_JSON = {
    "no layers": {"num_rounds": 0},
    "an unknown field": {"num_rounds": 0, "layers": [{**LAYER, "zero": True}]},
    "text for a number": {"num_rounds": 0, "layers": [{**LAYER, "source_layer": "0"}]},
    "originals out of order": {"num_rounds": 0, "layers": [{**LAYER, "source_layer": 1}, LAYER]},
    "a copy of what is not there": {
        "num_rounds": 1,
        "layers": [LAYER, {**LAYER, "source_layer": 4, "added_in_round": 1}],
    },
    "a round that is missing": {"num_rounds": 2, "layers": [LAYER, {**LAYER, "added_in_round": 2}]},
    "only added layers": {"num_rounds": 1, "layers": [{**LAYER, "added_in_round": 1}]},
}


@pytest.mark.parametrize("data", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_json_that_is_not_a_plan_is_refused(data: dict) -> None:
    with pytest.raises(ExpansionError, match="not an expansion plan"):
        ExpansionPlan.from_json(data)
