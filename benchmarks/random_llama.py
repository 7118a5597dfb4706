"""Writes LLaMA checkpoints of random weights in Hugging Face's format, shard by shard: real shapes, no download."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_ITEM_BYTES = 2  # bfloat16
_POOL_VALUES = 4 * 2**20
_SIGN_AND_MANTISSA = 0x807F  # bits that may change without making a number infinite


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a LLaMA, with the names of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int

    def with_layers(self, num_hidden_layers: int) -> LlamaShape:
        """Return the same model with another number of layers."""
        return LlamaShape(**{**vars(self), "num_hidden_layers": num_hidden_layers})

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor, in the order of the forward pass."""
        hidden, feed_forward = self.hidden_size, self.intermediate_size
        key_value = hidden // self.num_attention_heads * self.num_key_value_heads
        block = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key_value, hidden),
            "self_attn.v_proj": (key_value, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (feed_forward, hidden),
            "mlp.up_proj": (feed_forward, hidden),
            "mlp.down_proj": (hidden, feed_forward),
        }
        return {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            **{
                f"model.layers.{layer}.{name}.weight": size
                for layer in range(self.num_hidden_layers)
                for name, size in block.items()
            },
            "model.norm.weight": (hidden,),
            "lm_head.weight": (self.vocab_size, hidden),
        }

    @property
    def num_parameters(self) -> int:
        return sum(_count(size) for size in self.tensors().values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights in bfloat16."""
        return self.num_parameters * _ITEM_BYTES


SHAPES = {
    "tiny": LlamaShape(128, 344, 8, 4, 2, 1000, 512),
    "tinyllama": LlamaShape(2048, 5632, 22, 32, 4, 32000, 2048),
    "llama-2-7b": LlamaShape(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-2-13b": LlamaShape(5120, 13824, 40, 40, 40, 32000, 4096),
}


def write_random_llama(folder: Path, shape: LlamaShape, *, max_shard_bytes: int = 5 * 10**9, seed: int = 0) -> None:
    """Write config.json, the shards and their index to a new folder. Needs a few megabytes of memory for any shape."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config(shape), indent=2) + "\n")
    shards = _divide(shape.tensors(), max_shard_bytes)
    generator = np.random.default_rng(seed)
    pool = _random_bfloat16(generator)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, name))
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for size in shard.values():
                for piece in _pieces(_count(size), pool, generator):
                    file.write(piece)
    index = {"metadata": {"total_size": shape.num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def hf_config(shape: LlamaShape) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **vars(shape),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def _divide(tensors: dict[str, tuple[int, ...]], max_shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, size in tensors.items():
        num_bytes = _count(size) * _ITEM_BYTES
        if shards[-1] and held + num_bytes > max_shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = size
        held += num_bytes
    return shards


def _header(shard: dict[str, tuple[int, ...]]) -> bytes:
    """Return a safetensors header: its length, then JSON padded to a multiple of 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, size in shard.items():
        end = start + _count(size) * _ITEM_BYTES
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _random_bfloat16(generator: np.random.Generator) -> np.ndarray:
    """Return a pool to draw from: the bits of normally distributed numbers as large as weights."""
    values = 0.02 * generator.standard_normal(_POOL_VALUES, dtype=np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _pieces(count: int, pool: np.ndarray, generator: np.random.Generator) -> Iterator[memoryview]:
    """Yield `count` values of the pool, piece by piece. Each piece has other signs and mantissas than the last."""
    while count:
        num_values = min(count, pool.size)
        flipped = np.uint16(generator.integers(2**16) & _SIGN_AND_MANTISSA)
        start = int(generator.integers(pool.size - num_values + 1))
        yield (pool[start : start + num_values] ^ flipped).data
        count -= num_values


def _count(size: tuple[int, ...]) -> int:
    return int(np.prod(size))
