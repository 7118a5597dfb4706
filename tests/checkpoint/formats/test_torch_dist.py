"""torch_dist: megatron.core reads our files, we read its files, and a hostile index runs no code."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_llamapro.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_llamapro.checkpoint.formats.torch_dist_index import read_index
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.testing.checkpoints import edit_dist_index, read_tensors, read_with_torch
from megatron_llamapro.testing.distributed import run_distributed

Tiny = Callable[..., Path]
NORM = "decoder.final_layernorm.weight"
EMBEDDING = "embedding.word_embeddings.weight"
WORD_ROWS = 131


@pytest.fixture
def megatron(tiny_llama: Tiny, tmp_path: Path) -> Path:
    """Return a converted tiny model that a test may damage."""
    hf_to_megatron(tiny_llama(), tmp_path / "megatron")
    return tmp_path / "megatron"


def load_with_megatron(folder: str) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, read by megatron.core."""
    from megatron.core import dist_checkpointing

    found = dist_checkpointing.load_plain_tensors(folder)  # includes the contents of common.pt
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def load_halves_with_megatron(folder: str) -> torch.Tensor:
    """Return this rank's half of a weight and of the padded embedding, read by megatron.core."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    rank = torch.distributed.get_rank()
    rows = ShardedTensor.from_rank_offsets(EMBEDDING, torch.zeros(128, 64), (0, rank, 2), allow_shape_mismatch=True)
    columns = ShardedTensor.from_rank_offsets(
        "decoder.layers.1.mlp.linear_fc2.weight", torch.zeros(64, 48), (1, rank, 2)
    )
    loaded = dist_checkpointing.load({"rows": rows, "columns": columns}, folder)
    return [loaded["rows"], loaded["columns"]]


def test_megatron_core_reads_our_checkpoint(megatron: Path) -> None:
    (theirs,) = run_distributed(load_with_megatron, 1, str(megatron))
    ours = read_with_torch(megatron)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name


def test_megatron_core_reads_it_divided_over_ranks(megatron: Path) -> None:
    """At tensor-parallel size 2, with the vocabulary padded from 131 to 256."""
    (top, left), (bottom, right) = run_distributed(load_halves_with_megatron, 2, str(megatron))
    ours = read_with_torch(megatron)
    assert torch.equal(torch.cat([top, bottom])[:WORD_ROWS], ours[EMBEDDING])
    assert torch.equal(torch.cat([left, right], dim=1), ours["decoder.layers.1.mlp.linear_fc2.weight"])


def save_as_trained(folder: str, tensors: dict[str, torch.Tensor]) -> None:
    """Save as training at tensor-parallel size 2 does: in halves, with a padded vocabulary and optimizer state."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    rank = torch.distributed.get_rank()
    state: dict[str, object] = {}
    for name, tensor in tensors.items():
        if tensor.shape[0] == WORD_ROWS:
            tensor = torch.cat([tensor, torch.full((256 - WORD_ROWS, 64), 7.0)])
        dimension = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
        if tensor.dim() == 1:
            state[name] = ShardedTensor.from_rank_offsets(name, tensor, replica_id=rank)
        else:
            half = tensor.chunk(2, dim=dimension)[rank].contiguous()
            state[name] = ShardedTensor.from_rank_offsets(name, half, (dimension, rank, 2))
    moments = torch.ones(8)
    state["moments"] = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.x", moments, replica_id=rank)
    state["extra"] = ShardedObject("decoder.layers.0.mlp._extra_state", [1], (1,), (0,), replica_id=rank)
    dist_checkpointing.save({**state, "progress": {"iteration": 3}}, folder)


def test_we_read_training_checkpoints(megatron: Path, tmp_path: Path) -> None:
    """Pieces are assembled, padding is cut off, and optimizer and extra state are left out."""
    tensors = read_with_torch(megatron)
    trained = tmp_path / "trained"
    trained.mkdir()
    run_distributed(save_as_trained, 2, str(trained), tensors)
    for name in ("config.json", "llamapro.json"):
        (trained / name).write_bytes((megatron / name).read_bytes())
    assert read_index(trained)[EMBEDDING].shape == (256, 64)
    assert len(read_index(trained)["decoder.layers.0.mlp.linear_fc2.weight"].sections) == 2
    ours, theirs = read_tensors(trained), read_tensors(megatron)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    megatron_to_hf(trained, tmp_path / "hf")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in read_tensors(tmp_path / "hf").items())


def test_an_index_of_an_older_python_is_read(megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11.0 to 3.11.3 pickled enumeration members by name."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    folder = shutil.copytree(megatron, tmp_path / "copy")
    before = read_index(folder)
    monkeypatch.setattr(
        _MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self._name_))
    )
    index = pickle.dumps(pickle.loads((folder / ".metadata").read_bytes()))
    assert b"getattr" in index
    (folder / ".metadata").write_bytes(index)
    after = read_index(folder)
    assert after.keys() == before.keys() and len(after) > 10
    assert all(after[name].shape == held.shape for name, held in before.items())


def test_neither_megatron_nor_torch_is_imported(tiny_llama: Tiny, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from megatron_llamapro.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_llamapro.checkpoint.proof.verify import verify
source, target = Path(sys.argv[1]), Path(sys.argv[2])
from megatron_llamapro.expansion.round import Expansion
hf_to_megatron(source, target / "megatron", expansion=Expansion.at(4))
megatron_to_hf(target / "megatron", target / "back")
assert all(check.ok for check in verify(source, target / "megatron", quick=True))
print([name for name in sys.modules if name.split(".")[0] in ("megatron", "transformers", "torch")])
"""
    arguments = [str(tiny_llama()), str(tmp_path)]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"
    assert ended.stderr == ""


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


class HostileBySystem(Hostile):
    """Runs a command."""

    def __reduce__(self) -> tuple:
        import os

        return (os.system, (f"touch {self.path}",))


class HostileByEval(Hostile):
    """Evaluates text."""

    def __reduce__(self) -> tuple:
        return (eval, (f"open({str(self.path)!r}, 'w')",))


class HostileByTorch(Hostile):
    """Loads another pickle, through torch."""

    def __reduce__(self) -> tuple:
        return (torch.load, (str(self.path),))


@pytest.mark.parametrize("hostile", [Hostile, HostileBySystem, HostileByEval, HostileByTorch])
def test_a_hostile_index_runs_no_code(hostile: type[Hostile], megatron: Path, tmp_path: Path) -> None:
    (megatron / ".metadata").write_bytes(pickle.dumps(hostile(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="was not loaded: it asks for ") as refusal:
        megatron_to_hf(megatron, tmp_path / "hf")
    assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron"]


def test_hostile_tensor_data_and_common_state_run_no_code(megatron: Path, tmp_path: Path) -> None:
    """common.pt is never read. torch's restricted loader refuses a hostile object in place of a tensor."""
    torch.save(Hostile(tmp_path / "ran"), megatron / "common.pt")
    torch.save(Hostile(tmp_path / "ran"), tmp_path / "evil.pt")
    data = next(megatron.glob("*.distcp"))
    size = data.stat().st_size
    data.write_bytes((tmp_path / "evil.pt").read_bytes().ljust(size, b"\0"))
    (tmp_path / "evil.pt").unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        megatron_to_hf(megatron, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron"]


def entry(index, name: str = NORM):
    """Return the storage entry of a tensor with one piece."""
    return index.storage_data[MetadataIndex(name, torch.Size([0] * len(index.state_dict_metadata[name].size)))]


def set_path(path: object) -> Callable:
    return lambda index: setattr(entry(index), "relative_path", path)


def enlarge(index) -> None:
    """Give the vocabulary petabytes, which could be taken for padding."""
    stored = index.state_dict_metadata[EMBEDDING]
    stored.size = torch.Size([10**13, 64])
    stored.chunks[0].sizes = torch.Size([10**13, 64])


def leave_a_gap(index) -> None:
    index.state_dict_metadata[NORM].chunks[0].sizes = torch.Size([32])


def overlap(index) -> None:
    """Let two pieces overlap so that their sizes still add up to the whole."""
    stored = index.state_dict_metadata[NORM]
    halves = [type(stored.chunks[0])(torch.Size([start]), torch.Size([32])) for start in (0, 16)]
    for half in halves:
        index.storage_data[MetadataIndex(NORM, half.offsets)] = entry(index)
    stored.chunks = halves


DAMAGED_INDEX = {
    "it is nothing": (lambda index: [1, 2], "is not the index of a checkpoint"),
    "it has no tensors": (lambda index: setattr(index, "state_dict_metadata", None), "is damaged"),
    "it has no files": (lambda index: setattr(index, "storage_data", None), "is damaged"),
    "a file in another folder": (set_path("../config.json"), r"names the file '\.\./config\.json'"),
    "a file at an absolute path": (set_path("/etc/passwd"), "names the file '/etc/passwd'"),
    "a file that is not there": (set_path("__9_0.distcp"), "lacks the file __9_0.distcp"),
    "a file that is another": (set_path("config.json"), "truncated: the index says that it holds more"),
    "an offset behind the end": (lambda index: setattr(entry(index), "offset", 10**15), "is truncated"),
    "a negative offset": (lambda index: setattr(entry(index), "offset", -5), "is truncated"),
    "an offset that is infinite": (lambda index: setattr(entry(index), "offset", float("inf")), "is damaged"),
    "an offset that is text": (lambda index: setattr(entry(index), "offset", "here"), "is damaged"),
    "petabytes": (enlarge, "is damaged: a piece of embedding.word_embeddings.weight does not fit"),
    "a gap": (leave_a_gap, "decoder.final_layernorm.weight is not complete"),
    "pieces that overlap": (overlap, "cannot read|is not the tensor that the index promises|overlap"),
    "another tensor's place": (
        lambda index: entry(index).__dict__.update(entry(index, EMBEDDING).__dict__),
        "is not the tensor that the index promises",
    ),
    "a tensor that is missing": (
        lambda index: index.state_dict_metadata.pop(NORM) and None,
        f"lacks the tensor {NORM}",
    ),
    "a tensor that is unknown": (
        lambda index: index.state_dict_metadata.update(
            {"decoder.layers.0.mlp.linear_fc1.bias": index.state_dict_metadata[NORM]}
        ),
        "is damaged|linear_fc1.bias",
    ),
    "a key of two lines": (
        lambda index: index.state_dict_metadata.update({"decoder.layers.a\nb": index.state_dict_metadata[NORM]}),
        "is damaged: a key that is not text",
    ),
    "a size that is no number": (
        lambda index: setattr(index.state_dict_metadata[NORM], "size", ("many",)),
        "is damaged",
    ),
    "a type that no weight has": (
        lambda index: setattr(index.state_dict_metadata[NORM].properties, "dtype", torch.int8),
        f"{NORM} is int8: weights must be float32, bfloat16, float16",
    ),
    "an unlisted harmless class": (lambda index: OrderedDict(a=complex(1, 2)), "it asks for builtins.complex"),
}


@pytest.mark.parametrize(("edit", "message"), DAMAGED_INDEX.values(), ids=DAMAGED_INDEX.keys())
def test_an_index_that_does_not_match_the_files_is_refused(
    edit: Callable, message: str, megatron: Path, tmp_path: Path
) -> None:
    edit_dist_index(megatron, edit)
    with pytest.raises(CheckpointError, match=message) as refusal:
        megatron_to_hf(megatron, tmp_path / "hf")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "hf").exists()


DAMAGED_FILES = {
    "no index": (lambda f: (f / ".metadata").unlink(), "has no .metadata"),
    "a truncated index": (lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:300]), "metadata is"),
    "an empty index": (lambda f: (f / ".metadata").write_bytes(b""), "is damaged"),
    "no data": (lambda f: next(f.glob("*.distcp")).unlink(), "lacks the file"),
    "truncated data": (lambda f: next(f.glob("*.distcp")).write_bytes(b"PK"), "is truncated"),
    "no mark of completeness": (lambda f: (f / "metadata.json").unlink(), "not a Megatron checkpoint"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "has no config.json"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED_FILES.values(), ids=DAMAGED_FILES.keys())
def test_a_damaged_folder_is_refused_in_one_line(
    damage: Callable, message: str, megatron: Path, tmp_path: Path
) -> None:
    damage(megatron)
    with pytest.raises(CheckpointError, match=message) as refusal:
        megatron_to_hf(megatron, tmp_path / "hf")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "hf").exists()
