"""Every refused model type has a reason, confirmed in transformers' own source if it has the type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.families import refusals
from megatron_llamapro.families.hf_config import FAMILIES, family_of
from megatron_llamapro.families.refusals import REFUSED

MODELS = Path(transformers.__file__).parent / "models"

# Patterns that show a reason in a model's source; "not " before a pattern means that it is absent.
EVIDENCE: Mapping[str, str] = {
    refusals.BIASES: r"nn\.LayerNorm\(|LayerNorm\(.*eps=.*\)|nn\.LayerNorm\)",
    refusals.SIDE_BY_SIDE: r"\+ (hidden_states_mlp|mlp_output|attention_output)|parallel_attn",
    refusals.NORM_BEHIND: r"post_feedforward_layernorm|post_mlp_layernorm",
    refusals.SCALED: r"residual_multiplier|scale_emb",
    refusals.OTHER_EXPERTS: r"experts",
    refusals.FUSED: r"qkv_proj|Wqkv|gate_up_proj",
    refusals.OTHER_BLOCKS: r"(?i)mamba|linear_attn|conv1d|mlstm|rglru|time_decay|lightning|shortconv",
    refusals.PLUS_ONE: r"1\.0 \+ self\.weight",
    refusals.UNGATED: r"not self\.gate_proj\b",
    refusals.LATENT: r"kv_a_proj",
    refusals.INTERLEAVED: r"\[\.\.\., 0::2\]",
    refusals.INNER_NORMS: r"attn_sub_norm|query_layernorm",
    refusals.SINKS: r"sinks",
    refusals.SOME_WINDOWS: r"layer_types\[",
    refusals.MORE_THAN_TEXT: r"vision|Vision|audio|image",
    REFUSED["gpt_oss"]: r"sinks",
    REFUSED["mpt"]: r"alibi",
    REFUSED["olmo"]: r"None, None, eps=",
    REFUSED["smollm3"]: r"use_rope",
    REFUSED["ministral3"]: r"llama_4_scaling_beta",
    REFUSED["seed_oss"]: r"residual_dropout",
    REFUSED["diffllama"]: r"lambda_q1",
}
ELSEWHERE = {
    *("stablelm_epoch", "orion", "minicpm", "kimi_k2", "phi3small", "qwen", "baichuan", "internlm", "internlm2"),
    *("chatglm", "internvl_chat", "deci", "nemotron-nas", "openelm", "Yi"),
}
"""Model types that transformers does not have; their code lies beside their weights."""


def source_of(model_type: str) -> str | None:
    """Return the source from which transformers builds this type, or None if it has no such type."""
    if model_type not in CONFIG_MAPPING_NAMES:
        return None
    folder = MODELS / model_type_to_module_name(model_type)
    return "".join(path.read_text() for path in sorted(folder.glob("modeling_*.py")))


@pytest.mark.parametrize("model_type", REFUSED)
def test_every_type_is_refused_with_its_reason(model_type: str) -> None:
    reason = REFUSED[model_type]
    message = r"'.+' is not supported: .{20,}; the supported types are llama"
    with pytest.raises(CheckpointError, match=message) as refusal:
        family_of({"model_type": model_type})
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)
    assert model_type not in FAMILIES
    source = source_of(model_type)
    assert (source is None) == (model_type in ELSEWHERE)
    if source is not None:
        pattern = EVIDENCE[reason]
        found = re.search(pattern.removeprefix("not "), source)
        assert (found is None) == pattern.startswith("not ")


@pytest.mark.parametrize("name", ["text_config", "language_config", "llm_config", "thinker_config"])
def test_an_unknown_model_with_a_language_model_inside_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="'new_vl' is not supported: it reads more than text: save its language"):
        family_of({"model_type": "new_vl", name: {"model_type": "llama"}})


def test_an_unknown_model_is_refused() -> None:
    message = r"^model_type 'abc' is not supported: the supported types are llama, mistral, mix"
    with pytest.raises(CheckpointError, match=message):
        family_of({"model_type": "abc", "text_config": None})
