"""Renames the tensors of a Hugging Face checkpoint to the weight map's names, and checks them against its config.json.

The other forms of names that transformers reads are accepted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_llamapro.checkpoint.tensors.layout import whole
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles, stored_hash
from megatron_llamapro.checkpoint.tensors.weight_map import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT_LAYER,
    Shape,
    hf_shapes,
    is_known_extra,
)
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.families.hf_config import ITEMSIZES
from megatron_llamapro.families.shape import ModelShape

SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_DTYPES = {theirs: ours for ours, theirs in SAFETENSORS_DTYPES.items()}

_HEAD, _EMBEDDING, _NORM = (row.hugging_face[0][0] for row in (OUTPUT_LAYER, EMBEDDING, FINAL_NORM))
_MODEL = "model."


class HeaderEntry(NamedTuple):
    """Where a tensor is stored."""

    dtype: str
    """safetensors' name of the type."""
    shape: Shape
    path: Path
    offset: int
    """Offset of its bytes in the file."""


def named(entries: Mapping[str, HeaderEntry], shape: ModelShape) -> dict[str, HeaderEntry]:
    """Return the same tensors under the weight map's names. Like transformers, accept that:

    1. `model.` is missing before all names except the head's, or occurs twice.
    2. A Mixtral's experts are stacked (`save_original_format=False`).
    3. Embeddings are tied, and only the head is stored.
    """
    found = _split_experts(_with_one_prefix(entries), shape)
    if shape.tie_word_embeddings and _EMBEDDING not in found and _HEAD in found:
        found[_EMBEDDING] = found.pop(_HEAD)
    return found


def _with_one_prefix(entries: Mapping[str, HeaderEntry]) -> dict[str, HeaderEntry]:
    renamed = {**entries}
    if _NORM in entries:
        return renamed
    if _MODEL + _NORM in entries:
        renamed = {name.removeprefix(_MODEL): entry for name, entry in entries.items()}
    elif _NORM.removeprefix(_MODEL) in entries:
        renamed = {name if name == _HEAD else _MODEL + name: entry for name, entry in entries.items()}
    return renamed if len(renamed) == len(entries) else {**entries}  # else two names would become one


def _split_experts(entries: Mapping[str, HeaderEntry], shape: ModelShape) -> dict[str, HeaderEntry]:
    """Return the tensors with each layer's stacked experts split into one tensor per expert.

    `mlp.experts.gate_up_proj` [experts, 2 · feed-forward, hidden] holds w1, then w3, expert by expert.
    `mlp.experts.down_proj` [experts, hidden, feed-forward] holds every w2. A tensor of another shape is not split.
    """
    found = {**entries}
    experts, inner, hidden = shape.num_moe_experts or 0, shape.ffn_hidden_size, shape.hidden_size
    for layer in range(shape.num_layers if shape.is_moe else 0):
        theirs, ours = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.block_sparse_moe."
        _rename(found, f"{theirs}gate.weight", f"{ours}gate.weight")
        names = [f"{ours}experts.{expert}.{{}}.weight" for expert in range(experts)]
        gate_up = [name.format(part) for name in names for part in ("w1", "w3")]
        _split(found, f"{theirs}experts.gate_up_proj", (experts, 2 * inner, hidden), gate_up, (inner, hidden))
        down = [name.format("w2") for name in names]
        _split(found, f"{theirs}experts.down_proj", (experts, hidden, inner), down, (hidden, inner))
    return found


def _rename(entries: dict[str, HeaderEntry], name: str, wanted: str) -> None:
    if name in entries and wanted not in entries:
        entries[wanted] = entries.pop(name)


def _split(entries: dict[str, HeaderEntry], name: str, whole: Shape, parts: list[str], part: Shape) -> None:
    """Replace a tensor of shape `whole` by its consecutive parts of shape `part`."""
    held = entries.get(name)
    if held is None or held.shape != whole or held.dtype not in _DTYPES or entries.keys() & {*parts}:
        return
    num_bytes = math.prod(part) * ITEMSIZES[_DTYPES[held.dtype]]
    del entries[name]
    for index, each in enumerate(parts):
        entries[each] = HeaderEntry(held.dtype, part, held.path, held.offset + index * num_bytes)


class Types(NamedTuple):
    """The types that the weights are stored in."""

    most: str
    """The type of most numbers, e.g. bfloat16."""
    others: dict[str, str]
    """The types of the tensors that are stored in another one, by name."""


def are_same(one: HeaderEntry, other: HeaderEntry) -> bool:
    """Return whether two tensors of a supported type are equal bit for bit. Reads both."""
    dtype = _DTYPES.get(one.dtype)
    if dtype is None or one[:2] != other[:2]:  # type and shape
        return False
    size = (math.prod(one.shape),)
    with SourceFiles() as files:
        ours, theirs = (
            stored_hash(whole(size, each.path, each.offset), files, ITEMSIZES[dtype]) for each in (one, other)
        )
    return ours == theirs


def check_tensors(folder: Path, entries: Mapping[str, HeaderEntry], shape: ModelShape, config: Mapping) -> Types:
    """Check names, shapes and types. Return the types.

    Raises:
        CheckpointError: a tensor is missing, unknown, of the wrong shape or of an unsupported type, or the weights are
            quantised.
    """
    said = quantised(config)
    try:
        types = _check(folder, entries, shape)
    except CheckpointError:
        if said is None:
            raise
        raise CheckpointError(f"{folder}: {said}") from None
    if said is not None:
        raise CheckpointError(
            f"{folder}: config.json says that the weights are quantised, but they are plain {types.most}: remove "
            "quantization_config (or quantization) from it, because other software would obey it"
        )
    return types


def _check(folder: Path, entries: Mapping[str, HeaderEntry], shape: ModelShape) -> Types:
    expected = hf_shapes(shape)
    missing = [name for name in expected if name not in entries]
    unknown = [name for name in entries if name not in expected and not is_known_extra(name, shape)]
    why = what_they_are(unknown, missing)
    if why is not None:
        raise CheckpointError(f"{folder}: {why}")
    if missing:
        raise CheckpointError(f"{folder} lacks the tensor {missing[0]}{_and_more(missing)}")
    if unknown:
        raise CheckpointError(
            f"{folder} has the tensor {unknown[0][:200]}{_and_more(unknown)}, which this model family does not "
            "have and a conversion would lose"
        )
    sizes: Counter[str] = Counter()
    for name, size in expected.items():
        entry = entries[name]
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"{folder}: {name} is stored as {entry.dtype}: only {', '.join(_DTYPES)} are supported, so save "
                "the model in one of them (quantised weights: use the model that they were made from)"
            )
        if entry.shape != size:
            raise CheckpointError(f"{folder}: {name} has shape {entry.shape}, but config.json makes it {size}")
        sizes[_DTYPES[entry.dtype]] += math.prod(size)
    [(most, _)] = sizes.most_common(1)
    dtypes = {name: _DTYPES[entries[name].dtype] for name in expected}
    return Types(most, {name: dtype for name, dtype in dtypes.items() if dtype != most})


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


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

PACK_NAME = "llamapro_pack.json"

_OTHER_FORMAT = "it is in {}: use the model in Hugging Face's format, with safetensors"

FOLDERS: tuple[tuple[str, str], ...] = (
    (PACK_NAME, "it is a pack of added blocks, not a model: `llamapro compose --base HF_DIR --pack` makes one of it"),
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
