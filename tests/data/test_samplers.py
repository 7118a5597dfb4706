"""Sampling with transformers draws what transformers' own logits say; and which backend is chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.data import samplers
from megatron_llamapro.data.samplers import SamplerBackend, Sampling, TransformersSampler, choose_backend
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES, VOCABULARY

PROMPTS = [[1, 40, 41], [1, 50, 60], [1, 70, 71], [1, 80, 90], [1, 100, 101]]
COLD = 1e-4
"""A temperature at which the most likely token is always drawn."""


def nothing(num_documents: int, num_tokens: int) -> None:
    pass


def sampler(
    model: Path, *, max_tokens: int, ends: set[int] = frozenset({2}), vocab_size: int = VOCABULARY, **fields
) -> TransformersSampler:
    """Return a sampler that draws `max_tokens` after each of the prompts."""
    sampling = Sampling(frozenset(ends), vocab_size, max_tokens + len(PROMPTS[0]) - 1, **fields)
    return TransformersSampler(model, sampling, dtype="auto")


def greedy(model: Path, prompt: list[int], ends: set[int], *, max_tokens: int) -> list[int]:
    """Return transformers' own greedy continuation, without a cache and without other rows."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    settings = {"do_sample": False, "use_cache": False, "pad_token_id": 0, "eos_token_id": sorted(ends)}
    ids = torch.tensor([prompt])
    answer = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, **settings)
    return answer[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama, biases", "mistral", "qwen3, alternating windows", "mixtral"])
def test_the_coldest_samples_are_transformers_greedy_ones(family: str, tiny_model: Callable[..., Path]) -> None:
    """Also where documents end after different numbers of tokens, and leave the batch."""
    model = tiny_model(**TINY_FAMILIES[family])
    free = [greedy(model, prompt, {2}, max_tokens=20) for prompt in PROMPTS]
    ends = {2, free[0][2], free[1][7], free[2][12]}
    expected = [greedy(model, prompt, ends, max_tokens=20) for prompt in PROMPTS]
    assert len({len(ids) for ids in expected}) > 2
    counted = numpy.zeros(2, int)
    cold = sampler(model, ends=ends, max_tokens=20, temperature=COLD)
    assert cold.sample(PROMPTS, seed=(0, 0), progress=lambda *more: counted.__iadd__(more)) == expected
    assert counted.tolist() == [len(PROMPTS), sum(map(len, expected))]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.6)])
def test_tokens_are_drawn_as_often_as_they_are_likely(
    temperature: float, top_p: float, tiny_llama: Callable[..., Path]
) -> None:
    model, count = tiny_llama(), 4000
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor(PROMPTS[:1])).logits[0, -1].double()
    likely = numpy.exp(logits.numpy() / temperature)
    likely /= likely.sum()
    order = numpy.argsort(-likely)
    before = numpy.cumsum(likely[order]) - likely[order]
    likely[order[before >= top_p]] = 0
    likely /= likely.sum()
    warm = sampler(model, max_tokens=1, temperature=temperature, top_p=top_p)
    drawn = warm.sample(PROMPTS[:1] * count, seed=(0, 0), progress=nothing)
    often = numpy.bincount([token for [token] in drawn], minlength=VOCABULARY) / count
    assert abs(often - likely).max() < 4 * numpy.sqrt(likely.max() / count)
    assert not often[likely == 0].any()


def test_a_document_has_a_token_before_it_ends(tiny_llama: Callable[..., Path]) -> None:
    """With a prompt, it has one already."""
    first = sampler(tiny_llama(), ends=set(range(1, VOCABULARY)), max_tokens=3)
    assert first.sample([[1]] * 5, seed=(0, 0), progress=nothing)[0][0] == 0
    assert {len(ids) for ids in first.sample(PROMPTS, seed=(0, 0), progress=nothing)} == {1}


def test_ids_that_the_tokenizer_does_not_have_are_never_drawn(tiny_llama: Callable[..., Path]) -> None:
    padded = sampler(tiny_llama(), vocab_size=5, max_tokens=8, ends={2, 500}, temperature=2.0)
    assert {token for ids in padded.sample(PROMPTS * 20, seed=(0, 0), progress=nothing) for token in ids} == set(
        range(5)
    )


def test_equal_seeds_give_equal_documents(tiny_llama: Callable[..., Path]) -> None:
    loaded = sampler(tiny_llama(), max_tokens=20)
    drawn = {seed: loaded.sample(PROMPTS, seed=seed, progress=nothing) for seed in ((0, 0), (0, 1), (1, 0))}
    assert drawn[0, 0] != drawn[0, 1] != drawn[1, 0] != drawn[0, 0]
    assert sampler(tiny_llama(), max_tokens=20).sample(PROMPTS, seed=(0, 1), progress=nothing) == drawn[0, 1]


def test_weights_are_cast_only_if_asked(tiny_llama: Callable[..., Path]) -> None:
    model = tiny_llama(dtype="bfloat16")
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        made = TransformersSampler(model, Sampling(frozenset({2}), VOCABULARY, 4), dtype=dtype)
        assert {parameter.dtype for parameter in made._model.parameters()} == {expected}


@pytest.mark.parametrize(
    ("installed", "has_gpu", "requested", "expected"),
    [
        ({"transformers"}, True, None, SamplerBackend.TRANSFORMERS),
        ({"transformers", "vllm"}, True, None, SamplerBackend.VLLM),
        ({"transformers", "vllm"}, False, None, SamplerBackend.TRANSFORMERS),
        ({"transformers", "vllm"}, True, SamplerBackend.TRANSFORMERS, SamplerBackend.TRANSFORMERS),
        ({"vllm"}, True, SamplerBackend.VLLM, SamplerBackend.VLLM),
        ({"transformers"}, True, SamplerBackend.VLLM, r"vllm.* is not installed: pip install vllm, or give --backend"),
        (set(), False, None, r"transformers.* is not installed: pip install transformers$"),
    ],
)
def test_vllm_is_chosen_where_it_is_installed_with_a_gpu(
    installed: set[str],
    has_gpu: bool,
    requested: SamplerBackend | None,
    expected: SamplerBackend | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(samplers, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(samplers, "_has_gpu", lambda: has_gpu)
    if isinstance(expected, SamplerBackend):
        assert choose_backend(requested) is expected
    else:
        with pytest.raises(ConfigError, match=expected):
            choose_backend(requested)


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "version", lambda name: "5.0rc1")
    assert choose_backend(SamplerBackend.TRANSFORMERS) is SamplerBackend.TRANSFORMERS
    monkeypatch.setattr(samplers, "version", lambda name: "4.9.2")
    with pytest.raises(ConfigError, match=r"transformers 4\.9\.2 is too old"):
        choose_backend(SamplerBackend.TRANSFORMERS)
