"""Layer counts of stages, megatron.core's layout of them, and the drawing."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_llamapro.config.pipeline_stages import draw, even_stage_layers, stage_layers, to_megatron_layout
from megatron_llamapro.config.schema import ParallelConfig


@given(st.integers(1, 200), st.integers(1, 32))
def test_even_split_is_complete_and_even(num_layers: int, num_stages: int) -> None:
    counts = even_stage_layers(num_layers, num_stages)
    assert sum(counts) == num_layers and len(counts) == num_stages
    assert max(counts) - min(counts) <= 1


def test_configured_counts_are_used() -> None:
    assert stage_layers(ParallelConfig(pipeline_model_parallel_size=2), 7) == (4, 3)
    assert stage_layers(ParallelConfig(pipeline_model_parallel_size=2, pipeline_stage_layers=(2, 5)), 7) == (
        2,
        5,
    )


def test_megatron_layout_places_embedding_and_loss() -> None:
    assert to_megatron_layout((1, 0, 2)) == [["embedding", "decoder"], [], ["decoder", "decoder", "loss"]]


def test_drawing_shows_stages_and_added_blocks() -> None:
    assert draw((3, 2), {2, 4}) == "stage 0 │ E o o A │ 1 │ o A H"
    virtual = draw((1, 2, 0, 2), {2, 4}, num_stages=2)
    assert virtual == "stage 0 │ E o │ 1 │ o A │ 0 │ │ 1 │ o A H"
