"""The arithmetic of a step's work, compared with independent counts."""

import dataclasses

import pytest

from megatron_llamapro.expansion.trainable_part import TrainablePart, linears
from megatron_llamapro.families.shape import ModelShape
from megatron_llamapro.planning.flops import block_attention_flops, step_work

LLAMA2_7B = ModelShape(
    num_layers=40,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
    kv_channels=128,
    vocab_size=32000,
    layernorm_epsilon=1e-5,
    max_position_embeddings=4096,
    rotary_base=10000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
)
ADDED = (4, 9, 14, 19, 24, 29, 34, 39)


def test_the_work_of_llama_pro_8b() -> None:
    """32 + 8 blocks at 4,096 tokens. Block 4 and all above it run backward; the head's weights do not train."""
    work = step_work(LLAMA2_7B, seq_length=4096, trains=TrainablePart(frozenset(ADDED)))
    assert work.forward / 1e9 == pytest.approx(17.79, abs=0.01)
    assert work.input_gradient / 1e9 == pytest.approx(17.25, abs=0.01)
    assert work.weight_gradient / 1e9 == pytest.approx(3.24, abs=0.01)


def test_the_work_of_full_training() -> None:
    work = step_work(
        LLAMA2_7B,
        seq_length=4096,
        trains=TrainablePart(frozenset(range(40)), embedding=True, output_layer=True),
    )
    assert work.total / 1e9 == pytest.approx(53.38, abs=0.02)


MIXTRAL_8X7B = dataclasses.replace(
    LLAMA2_7B, num_layers=32, ffn_hidden_size=14336, num_query_groups=8, num_moe_experts=8, moe_router_topk=2
)


def block_matrix_flops(shape: ModelShape) -> float:
    """Return forward FLOP per token of one block's weight matrices; of experts, only those that the router chooses."""
    return sum(linear.forward_flops for linear in linears(shape))


def test_only_the_chosen_experts_count() -> None:
    """Mixtral 8x7B: 12.9 B of 46.7 B parameters are active (arXiv 2401.04088, table 1), here without the embedding."""
    active = MIXTRAL_8X7B.num_layers * block_matrix_flops(MIXTRAL_8X7B) / 2 + 4096 * 32000
    assert active / 1e9 == pytest.approx(12.88 - 0.13, abs=0.01)
    router = dataclasses.replace(MIXTRAL_8X7B, num_moe_experts=9)
    assert block_matrix_flops(router) - block_matrix_flops(MIXTRAL_8X7B) == 2 * 4096


@pytest.mark.parametrize(("window", "seq_length"), [(8, 32), (32, 32), (100, 32), (1, 7)])
def test_attention_counts_the_keys_in_the_window(window: int, seq_length: int) -> None:
    """Against the sum over tokens. Each token counts itself half, as in full causal attention."""
    shape = dataclasses.replace(LLAMA2_7B, window_size=(window - 1, 0), window_attn_skip_freq=(1, 0))
    keys = sum(min(i + 1, window) - 0.5 * (i < window) for i in range(seq_length)) / seq_length
    assert block_attention_flops(shape, seq_length, layer=0) == pytest.approx(4 * keys * 4096)
    full = block_attention_flops(LLAMA2_7B, seq_length)
    assert block_attention_flops(shape, seq_length, layer=1) == full == 2 * seq_length * 4096
    work = step_work(dataclasses.replace(shape, num_layers=2), seq_length=seq_length, trains=TrainablePart(frozenset()))
    head = 2 * 4096 * 32000
    assert work.forward == pytest.approx(2 * block_matrix_flops(shape) + 4 * keys * 4096 + full + head)
