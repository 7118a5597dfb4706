"""The arithmetic of a step's work, against counts that were made independently."""

import pytest

from megatron_llamapro.model.families import ModelShape
from megatron_llamapro.pipeline.cost import step_work

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


def test_llama_pro_8b() -> None:
    """32 + 8 blocks at 4,096 tokens. Block 4 and everything above it run backward; the head's weights do not train."""
    work = step_work(LLAMA2_7B, seq_length=4096, trainable_layers=ADDED)
    assert work.forward / 1e9 == pytest.approx(17.79, abs=0.01)
    assert work.input_gradient / 1e9 == pytest.approx(17.25, abs=0.01)
    assert work.weight_gradient / 1e9 == pytest.approx(3.24, abs=0.01)


def test_everything_trainable() -> None:
    work = step_work(
        LLAMA2_7B,
        seq_length=4096,
        trainable_layers=range(40),
        embedding_trains=True,
        output_layer_trains=True,
    )
    assert work.total / 1e9 == pytest.approx(53.38, abs=0.02)
