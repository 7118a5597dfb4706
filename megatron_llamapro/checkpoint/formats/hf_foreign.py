"""Names of tensors in Hugging Face checkpoints that are not a model's own weights, and advice for each.

Data, and the functions that look it up. Imports nothing of this package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_QUANTISED = "quantised weights cannot be expanded: use the model that they were made from"

_SAVED = "and save it with save_original_format=False (else transformers 5 quantises it again)"

DEQUANTISE: dict[str, str] = {
    "bitsandbytes": f"or load it in transformers, call model.dequantize(), {_SAVED}",
    "fp8": f"or load it in transformers with quantization_config=FineGrainedFP8Config(dequantize=True), {_SAVED}",
    "mlx": "or convert it with mlx_lm.convert --dequantize",
}
"""quant_method of config.json → how to get plain weights, if that is known to work (mlx: according to its options)."""


def quantised(config: Mapping) -> str | None:
    """Return what config.json says about quantised weights, with advice, or None if it says nothing."""
    settings = config.get("quantization_config")
    if isinstance(settings, Mapping):
        method = str(settings.get("quant_method"))[:40]
        said = f"quantization_config of quant_method {method!r}"
    elif isinstance(config.get("quantization"), Mapping):
        method, said = "mlx", "quantization, which is MLX's"
    else:
        return None
    remedy = f", {DEQUANTISE[method]}" if method in DEQUANTISE else ""
    return f"config.json has {said}: {_QUANTISED}{remedy}"


_MULTIMODAL = "the model reads more than text, and only text models can be expanded: save its language model alone"
_FUSED = "these projections are stored fused, which is not supported: save the model with separate ones"

_OTHER_FORMAT = "it is in {}: use the model in Hugging Face's format, with safetensors"

FOLDERS: tuple[tuple[str, str], ...] = (
    ("adapter_config.json", "it is a PEFT adapter: load it with its model, merge_and_unload(), and save the model"),
    ("*.gguf", "it is GGUF, a format for llama.cpp, mostly quantised: use the model that it was made from"),
    ("consolidated*", _OTHER_FORMAT.format("Meta's or Mistral's own format")),
    ("tf_model*.h5", _OTHER_FORMAT.format("TensorFlow's format")),
    ("flax_model*.msgpack", _OTHER_FORMAT.format("Flax's format")),
)
"""Files of a folder without safetensors weights → what the folder is. The first match counts."""

SIGNS: tuple[tuple[str, str], ...] = (
    (
        r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_shape|scales|SCB|absmax|W_q)$"
        r"|\.weight\.(absmax|quant_map|quant_state)",
        _QUANTISED,
    ),
    (r"\.lora_[AB]\.|\.base_layer\.|^base_model\.model\.", "PEFT's: merge_and_unload() first, then save the model"),
    (r"_orig_mod\.", "torch.compile's: save model._orig_mod, or remove _orig_mod. from the names"),
    (r"_fsdp_wrapped_module\.", "FSDP's: save the whole model, or remove _fsdp_wrapped_module. from the names"),
    (
        r"_checkpoint_wrapped_module\.",
        "activation checkpointing's: remove _checkpoint_wrapped_module. from the names",
    ),
    (
        r"^(module\.)?(decoder|embedding)\.(layers|word_embeddings)\.",
        "Megatron's names: megatron-to-hf converts them",
    ),
    (r"^module\.", "data parallelism's or DeepSpeed's: save model.module, or remove module. from the names"),
    (
        r"^(language_model|model\.language_model|text_model|llm|vision_tower|vision_model|visual|model\.visual|"
        r"multi_modal_projector|mm_projector|model\.mm_projector|audio_tower|thinker)\b",
        _MULTIMODAL,
    ),
    (
        r"^(tok_embeddings|layers\.\d+\.attention\.w[qkvo])\.",
        "Meta's or Mistral's own format: use the model in Hugging Face's, or convert it (transformers has scripts)",
    ),
    (
        r"^(score|classifier|qa_outputs)\.",
        "a classifier's, e.g. a reward model's, which has no head for tokens: use the language model that it was made "
        "from",
    ),
    (r"\.layers\.\d+\.ln[12]\.", "the first Yi's names: use the newer files of that model, whose model_type is llama"),
    (r"\.(W_pack|wqkv|qkv_proj|query_key_value|gate_up_proj|c_attn)\.", _FUSED),
    (
        r"\.experts\.(gate_up_proj|down_proj|\d+\.(gate|up|down)_proj)",
        "experts in another layout than Mixtral's: save the model with transformers 5 and its default options",
    ),
)
"""Names that are not a model's own → whose names they are. The first match counts."""


def what_they_are(unknown: Sequence[str], missing: Sequence[str]) -> str | None:
    """Return whose names `unknown` tensors have, with advice, or None if nothing is known about them.

    `missing` are the names that the model should have. If all of them exist behind one prefix, the advice says so.
    """
    for pattern, meaning in SIGNS:
        found = [name for name in unknown if re.search(pattern, name)]
        if found:
            return f"{_some(found)}: {meaning}"
    prefix = _common_prefix(unknown, missing)
    if prefix is not None:
        return f"{_some(unknown)}: remove {prefix[:80]} from the names of all tensors"
    if len(missing) == 1 and missing[0] == "lm_head.weight":
        return (
            "it has no lm_head.weight: it was saved without its head, as embedding models are; use the model with its "
            "head, or set tie_word_embeddings to true in config.json if its head is the embedding"
        )
    return None


def _common_prefix(unknown: Sequence[str], missing: Sequence[str]) -> str | None:
    """Return the prefix that every missing name has among the unknown names, or None."""
    if not missing:
        return None
    ends = [name.removesuffix(missing[0]) for name in unknown if name.endswith(missing[0])]
    there = set(unknown)
    prefixes = (prefix for prefix in ends if all(prefix + name in there for name in missing))
    return next(prefixes, None)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"it has {names[0][:200]}{more}"
