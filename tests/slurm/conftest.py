"""A cluster of three nodes and a tiny model, for all tests of this folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from cluster import Cluster, why_not

from megatron_llamapro.checkpoint.convert import hf_to_megatron
from megatron_llamapro.expansion.round import Expansion

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Start n1, n2 and n3. Their state is not in /tmp, because nodes are expected to have their own."""
    if reason := why_not():
        pytest.skip(f"no SLURM cluster here: {reason}")
    state = ROOT / "runs" / f"slurm-{os.getpid()}"
    with Cluster(state, num_nodes=3) as running:
        yield running
    shutil.rmtree(state)


@pytest.fixture(scope="session")
def inputs(cluster: Cluster, tiny_llama: Callable[..., Path]) -> Path:
    """Return a folder with `model`, 4 + 2 blocks, and token files `text`, on the shared file system."""
    from megatron_llamapro.data.preprocess import preprocess

    folder = cluster.state / "inputs"
    folder.mkdir()
    source = tiny_llama(num_hidden_layers=4)
    hf_to_megatron(source, folder / "model", expansion=Expansion.at(2, 5))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in topics.values()))
    preprocess([folder / "text.jsonl"], folder / "text", tokenizer=source)
    return folder
