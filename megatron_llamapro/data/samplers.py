"""Samplers: a model that continues token ids, in transformers or in vLLM. Importing this module imports neither.

Both return the ids of one batch of documents. Equal batches with an equal seed give equal ids, on the same machine with
the same versions.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_llamapro.config.errors import ConfigError, RunError
from megatron_llamapro.config.files import read_inside

if TYPE_CHECKING:
    import torch


class SamplerBackend(Enum):
    """The library that runs the model."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


BATCH_SIZES = {SamplerBackend.TRANSFORMERS: 32, SamplerBackend.VLLM: 1024}
"""Default number of documents in a batch. vLLM chooses by itself how many of them it computes together."""


_OLDEST = (4, 56)
"""Version of transformers. Earlier ones name the type of the weights otherwise."""


def choose_backend(requested: SamplerBackend | None) -> SamplerBackend:
    """Return the requested backend. Without a request: vLLM if it is installed and there is a GPU, else transformers.

    Raises:
        ConfigError: the backend is not installed, or too old.
    """
    chosen = requested
    if chosen is None:
        chosen = SamplerBackend.VLLM if find_spec("vllm") and _has_gpu() else SamplerBackend.TRANSFORMERS
    if find_spec(chosen.value) is None:
        other = ", or give --backend transformers" if chosen is SamplerBackend.VLLM else ""
        raise ConfigError(
            f"{chosen.value}, which samples the text, is not installed: pip install {chosen.value}{other}"
        )
    if chosen is SamplerBackend.TRANSFORMERS and _numbers(found := version("transformers")) < _OLDEST:
        raise ConfigError(f"transformers {found} is too old: pip install 'transformers>=4.56'")
    return chosen


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, and where a document ends."""

    ends: frozenset[int]
    """The ids that end a document. One that has no token yet does not end."""
    vocab_size: int
    """Number of the tokenizer's ids. A model's embedding may have more rows, to pad it; they are never drawn."""
    max_document_tokens: int
    """Most tokens of a document. The token that starts it does not count, the one that ends it does."""
    temperature: float = 1.0
    top_p: float = 1.0

    def num_new_tokens(self, prompt: list[int]) -> int:
        """The most tokens to draw after a prompt, which starts with the start token."""
        return self.max_document_tokens + 1 - len(prompt)


Progress = Callable[[int, int], object]
"""Called with the number of documents that just ended, and of tokens that were just drawn."""


class Sampler(Protocol):
    """A loaded model."""

    def sample(self, prompts: Sequence[list[int]], *, seed: Sequence[int], progress: Progress) -> list[list[int]]:
        """Continue every prompt up to its end, and return the new ids, with the end if it was drawn.

        All prompts have the same number of ids: the start of a document, and the first tokens of a text, if any. `seed`
        is the user's, then the number of the batch.

        Raises:
            RunError: the GPU's memory ran out.
        """
        ...


def load_sampler(backend: SamplerBackend, model: Path, sampling: Sampling, *, dtype: str | None) -> Sampler:
    """Load a Hugging Face checkpoint. Without `dtype`, in the type it is stored in. None of its code is run."""
    kind = {SamplerBackend.TRANSFORMERS: TransformersSampler, SamplerBackend.VLLM: VllmSampler}[backend]
    return kind(model, sampling, dtype=dtype or "auto")


def _seeds(seed: Sequence[int], count: int) -> list[int]:
    """Return unrelated seeds of 63 bits, for a user's seed and the number of a batch."""
    from numpy.random import SeedSequence

    return [int(state) >> 1 for state in SeedSequence(seed).generate_state(count, "uint64")]


# Fields that name code. transformers would fetch and run some of it.
_CODE = re.compile(r"auto_map|_?(attn|experts)_implementation(_internal)?")


class TransformersSampler:
    """Samples with transformers, on the GPU if there is one. A document that has ended leaves the batch."""

    def __init__(self, model: Path, sampling: Sampling, *, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, TemperatureLogitsWarper, TopPLogitsWarper
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            config=_config_without_code(model),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",
        )
        try:
            self._model: Any = loaded.to(self._device).eval()
        except torch.OutOfMemoryError:
            raise RunError("the model does not fit the GPU's memory: give --dtype bfloat16, or a larger GPU") from None
        self._sampling = sampling
        self._warpers = [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature != 1 else []
        self._warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []

    def sample(self, prompts: Sequence[list[int]], *, seed: Sequence[int], progress: Progress) -> list[list[int]]:
        import torch

        try:
            with torch.inference_mode():
                return self._sample(prompts, seed, progress)
        except torch.OutOfMemoryError:
            raise RunError(
                f"the GPU's memory ran out with {len(prompts)} documents: start again with a smaller --batch_size or "
                "--max_document_tokens"
            ) from None

    def _sample(self, prompts: Sequence[list[int]], seed: Sequence[int], progress: Progress) -> list[list[int]]:
        import torch

        generator = torch.Generator(self._device)
        generator.manual_seed(_seeds(seed, 1)[0])
        documents: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # the documents of the rows of `tokens` and the cache
        tokens, cache = torch.tensor(prompts, device=self._device), None  # [rows, new tokens]
        for step in range(self._sampling.num_new_tokens(prompts[0])):
            output = self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            may_end = step > 0 or len(prompts[0]) > 1
            drawn = self._drawn(output.logits[:, -1].float(), generator, may_end=may_end)  # [rows]
            ids = drawn.tolist()
            for row, token in zip(rows, ids, strict=True):
                documents[row].append(token)
            left = [place for place, token in enumerate(ids) if token not in self._sampling.ends]
            progress(len(rows) - len(left), len(rows))
            if not left:
                return documents
            if len(left) < len(rows):
                chosen = torch.tensor(left, device=self._device)
                cache.batch_select_indices(chosen)
                drawn, rows = drawn[chosen], [rows[place] for place in left]
            tokens = drawn[:, None]
        progress(len(rows), 0)
        return documents

    def _drawn(self, logits: torch.Tensor, generator: torch.Generator, *, may_end: bool) -> torch.Tensor:
        """Draw a token for every row of `logits` [rows, vocabulary]."""
        import torch

        logits[:, self._sampling.vocab_size :] = -torch.inf
        if not may_end:
            logits[:, [token for token in self._sampling.ends if token < logits.shape[1]]] = -torch.inf
        for warper in self._warpers:
            logits = warper(None, logits)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _config_without_code(model: Path) -> Any:
    from transformers import AutoConfig

    fields = json.loads(read_inside(model, "config.json") or b"{}")
    # As a file, because transformers decides some things when it reads one.
    with tempfile.TemporaryDirectory() as folder:
        kept = {name: value for name, value in fields.items() if not _CODE.fullmatch(name)}
        (Path(folder) / "config.json").write_text(json.dumps(kept))
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


class VllmSampler:
    """Samples with vLLM, on one GPU. Not run so far: vLLM needs a GPU, and is not installed with this project."""

    def __init__(self, model: Path, sampling: Sampling, *, dtype: str) -> None:
        from vllm import LLM

        self._sampling = sampling
        self._model = LLM(
            model=str(model),
            dtype=dtype,
            max_model_len=sampling.max_document_tokens + 1,
            load_format="safetensors",
            trust_remote_code=False,
            skip_tokenizer_init=True,  # it gets ids and returns ids
            generation_config="vllm",  # not the model's own defaults, such as top_k
        )

    def sample(self, prompts: Sequence[list[int]], *, seed: Sequence[int], progress: Progress) -> list[list[int]]:
        from vllm import SamplingParams

        settings = [
            SamplingParams(
                temperature=self._sampling.temperature,
                top_p=self._sampling.top_p,
                seed=each,
                max_tokens=self._sampling.num_new_tokens(prompt),
                min_tokens=0 if len(prompt) > 1 else 1,
                stop_token_ids=sorted(self._sampling.ends),
                detokenize=False,
            )
            for prompt, each in zip(prompts, _seeds(seed, len(prompts)), strict=True)
        ]
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self._model.generate(asked, settings, use_tqdm=False)
        documents = [
            [token for token in answer.outputs[0].token_ids if token < self._sampling.vocab_size] for answer in answers
        ]
        progress(len(documents), sum(map(len, documents)))
        return documents
