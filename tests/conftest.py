"""Fixtures for the tests of every room. Tests get real files and models, small enough for a CPU:

- `tiny_model()` and `tiny_llama()`: the folder of a Hugging Face model of random weights;
- `models()`: the same model in both formats, with and without added blocks;
- `token_files`: two preprocessed training sets;
- `run_config()`: the configuration of a training run on them, for `run_distributed(workers.train, num_ranks, config)`.

Models and token files are made once per session and shared, so a test must not change them. Some rooms have more
fixtures in a conftest.py of their own. Helpers to import: workers.py (training ranks), gradients.py (single steps),
programs.py (commands as processes), fuzzing.py (property tests). fast.py decides which tests are slow.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from fast import pytest_collection_modifyitems  # noqa: F401 (a hook)
from megatron_llamapro.config.schema import (
    BlendEntry,
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_llamapro.expansion.round import Expansion

# One thread per process: on tiny tensors, threads that wait for each other cost more than the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for folder in ("benchmarks", "evidence"):  # their scripts import each other
    sys.path.append(str(Path(__file__).parents[1] / folder))

NUM_LAYERS, ADDED = 4, Expansion.at(2, 5)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a tiny model: `make_tiny_model` without its folder argument.

    Equal settings give the same folder, so do not change its files.
    """
    from megatron_llamapro.testing.tiny_models import make_tiny_model

    made: dict[str, Path] = {}

    def make(**settings: object) -> Path:
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            made[key] = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", **settings)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """Return `tiny_model`, for tests about a LLaMA."""
    return tiny_model


@dataclass(frozen=True)
class Models:
    """Four folders of the same model: in both formats, with and without added blocks."""

    original_hf: Path
    expanded_hf: Path
    original_megatron: Path
    expanded_megatron: Path


@pytest.fixture(scope="session")
def models(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Models]:
    """Return a function that makes `Models` of 4 layers from the settings of `tiny_model`; layers 2 and 5 are added.

    Equal settings give the same folders, so do not change their files.
    """
    from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron

    made: dict[str, Models] = {}

    def make(**settings: object) -> Models:
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            source, folder = tiny_llama(num_hidden_layers=NUM_LAYERS, **settings), tmp_path_factory.mktemp("models")
            expand_hf(source, folder / "expanded", expansion=ADDED)
            hf_to_megatron(source, folder / "megatron")
            hf_to_megatron(source, folder / "expanded_megatron", expansion=ADDED)
            made[key] = Models(source, folder / "expanded", folder / "megatron", folder / "expanded_megatron")
        return made[key]

    return make


@pytest.fixture(scope="session")
def token_files(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the prefixes of two pairs of token files, made from Python's own documentation."""
    from megatron_llamapro.data.preprocess import preprocess

    folder = tmp_path_factory.mktemp("tokens")
    documents = sorted(topics.values())
    for name, part in (("a", documents[:30]), ("b", documents[30:50])):
        lines = "".join(json.dumps({"text": text[:2000]}) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text(lines)
        preprocess([folder / f"{name}.jsonl"], folder / name, tokenizer=tiny_llama(num_hidden_layers=NUM_LAYERS))
    return folder / "a", folder / "b"


@pytest.fixture
def run_config(models: Callable[..., Models], token_files: tuple[Path, Path], tmp_path: Path):
    """Return a function that makes a `RunConfig` of four steps on the expanded tiny model.

    Its arguments: the dtype, the layout, the name of the save folder in `tmp_path`, another starting checkpoint, the
    trainable part, and fields of `training`. For other fields, apply `dataclasses.replace` to the result.
    """

    def make(
        *,
        dtype: str = "float32",
        parallel: ParallelConfig | None = None,
        save: str = "save",
        checkpoint: Path | None = None,
        trainable: tuple[str, ...] = ("added_blocks",),
        **training: object,
    ) -> RunConfig:
        settings = {"train_iters": 4, "micro_batch_size": 1, "global_batch_size": 4, **training}
        return RunConfig(
            model=ModelConfig(checkpoint=str(checkpoint or models(dtype=dtype).expanded_megatron), trainable=trainable),
            data=DataConfig(
                train=(BlendEntry(str(token_files[0]), 2.0), BlendEntry(str(token_files[1]))),
                valid={"b": str(token_files[1])},
                seq_length=32,
            ),
            training=TrainingConfig(**settings, precision={"float32": "fp32", "bfloat16": "bf16"}[dtype]),
            parallel=parallel or ParallelConfig(),
            optimizer=OptimizerConfig(lr=1e-2, lr_warmup_fraction=0.0),
            checkpoint=CheckpointConfig(save=str(tmp_path / save)),
            logging=LoggingConfig(),
        )

    return make
