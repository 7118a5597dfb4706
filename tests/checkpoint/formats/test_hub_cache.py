"""Models in the huggingface_hub cache: its links, folders and ids. Also Git LFS pointers left in place of large
files."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.utils._shared_blobs import publish_blob_to_shared_store

from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron
from megatron_llamapro.checkpoint.formats.checkpoint import Format
from megatron_llamapro.checkpoint.formats.folders import resolve_megatron_checkpoint
from megatron_llamapro.checkpoint.inspection import inspect
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.config.errors import CheckpointError, LlamaProError
from megatron_llamapro.data.tokenizer import load_tokenizer
from megatron_llamapro.expansion.round import Expansion

Tiny = Callable[..., Path]
REVISION = "0123456789abcdef0123456789abcdef01234567"


def download(model: Path, cache: Path, *, subfolder: str = "", shared: bool = True) -> Path:
    """Lay out a model as `hf download x/y` does in its cache, and return the snapshot. If `shared`, every file lies in
    the shared store, as huggingface_hub puts it there; otherwise none does."""
    repository = cache / "models--x--y"
    snapshot = repository / "snapshots" / REVISION
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(REVISION)
    for path in (path for path in sorted(model.rglob("*")) if path.is_file()):
        content = path.read_bytes()
        etag, xet_hash = hashlib.sha1(content).hexdigest(), hashlib.sha256(content).hexdigest()
        blob, link = repository / "blobs" / etag, snapshot / subfolder / path.relative_to(model)
        blob.write_bytes(content)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        if shared:
            size = len(content)
            assert publish_blob_to_shared_store(
                blob_path=str(blob), xet_hash=xet_hash, cache_dir=cache, expected_size=size
            )
            assert blob.is_symlink() and link.resolve() == cache / "blobs" / xet_hash[:2] / xet_hash
    return snapshot / subfolder


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file but the manifest, because that names its source."""
    files = {path for path in folder.rglob("*") if path.is_file() and path.name != "llamapro.json"}
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("subfolder", ["", "llm", "a/b"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared blobs", "blobs of its own"])
def test_every_command_reads_a_snapshot(shared: bool, subfolder: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama(max_shard_size="100KB"), tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ messages }}")
    snapshot = download(model, tmp_path / "hub", subfolder=subfolder, shared=shared)
    (tmp_path / "link").symlink_to(snapshot)
    for name, source in (("plain", model), ("cached", snapshot), ("linked", tmp_path / "link")):
        hf_to_megatron(source, tmp_path / name, expansion=Expansion.at(2))
    expected = contents(tmp_path / "plain")
    assert {"tokenizer.json", "generation_config.json", "additional_chat_templates/tool_use.jinja"} < expected.keys()
    assert contents(tmp_path / "cached") == contents(tmp_path / "linked") == expected
    expand_hf(snapshot, tmp_path / "expanded", expansion=Expansion.at(2))
    assert all(check.ok for check in verify(snapshot, tmp_path / "expanded", quick=True))
    assert inspect(snapshot).format == Format.HUGGING_FACE
    assert load_tokenizer(snapshot).digest == load_tokenizer(model).digest


def test_a_folder_of_links_into_the_cache_is_refused_with_working_advice(tiny_llama: Tiny, tmp_path: Path) -> None:
    """`--local-dir` made such folders before huggingface_hub 0.23."""
    snapshot = download(tiny_llama(), tmp_path / "hub", shared=False)
    local = tmp_path / "local"
    local.mkdir()
    for path in snapshot.iterdir():
        (local / path.name).symlink_to(path.resolve())
    with pytest.raises(CheckpointError, match=r"is a link out of its folder, .*: copy the folder with") as refusal:
        hf_to_megatron(local, tmp_path / "it")
    assert str(refusal.value).endswith(" or fetch it with `hf download x/y --local-dir NEW`")
    [command] = re.findall(r"`(cp .*?)`", str(refusal.value))
    subprocess.run(command.replace("NEW", str(tmp_path / "new")).split(), check=True)
    assert contents(tmp_path / "new") == contents(tiny_llama())
    hf_to_megatron(tmp_path / "new", tmp_path / "it")


def secret(tmp_path: Path, place: str) -> Path:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


HASH = hashlib.sha256(b"").hexdigest()
OUTSIDE = [
    "secret",
    "hub/secret",
    "hub/blobs/secret",
    f"hub/blobs/aa/{HASH}",  # not the digits that the hash starts with
    f"hub/blobs/{HASH[:2]}/{HASH}.lock",
    f"hub/blobs/{HASH[:2]}/more/{HASH}",
    f"other/blobs/{HASH[:2]}/{HASH}",
    f"hub/models--x--y/{HASH}",
    f"hub/models--other--y/blobs/{HASH}",
    "hub/models--x--y/snapshots/main/tokenizer.json",
]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("place", OUTSIDE)
def test_a_link_out_of_the_cache_is_not_followed(place: str, name: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    snapshot = download(tiny_llama(), tmp_path / "hub")
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(secret(tmp_path, place))
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        hf_to_megatron(snapshot, tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_the_store_is_trusted_only_for_folders_of_the_cache(tiny_llama: Tiny, tmp_path: Path) -> None:
    """A user's own folder named snapshots may lie beside one named blobs."""
    download(tiny_llama(), tmp_path / "hub")
    mine = tmp_path / "hub" / "mine" / "snapshots" / "first"
    shutil.copytree(tiny_llama(), mine)
    blob = (tmp_path / "hub" / "models--x--y" / "snapshots" / REVISION / "tokenizer.json").resolve()
    (mine / "tokenizer.json").unlink()
    (mine / "tokenizer.json").symlink_to(blob)
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        hf_to_megatron(mine, tmp_path / "it")


def opened(path: Path) -> dict[str, str]:
    """Return each reader's error for a path that is not a model folder."""
    readers: dict[str, Callable[[Path], object]] = {
        "convert": lambda path: hf_to_megatron(path, path.parent / "target"),
        "expand": lambda path: expand_hf(path, path.parent / "target", expansion=Expansion.at(1)),
        "inspect": inspect,
        "verify": lambda path: list(verify(path, path)),
        "train": resolve_megatron_checkpoint,
        "tokenize": load_tokenizer,
    }
    answers = {}
    for name, read in readers.items():
        with pytest.raises(LlamaProError) as refusal:
            read(path)
        answers[name] = str(refusal.value)
        assert "\n" not in answers[name]
    return answers


def test_a_folder_of_the_cache_is_refused_with_its_snapshots_named(tiny_llama: Tiny, tmp_path: Path) -> None:
    snapshot = download(tiny_llama(), tmp_path / "hub")
    repository = tmp_path / "hub" / "models--x--y"
    blob = next((repository / "blobs").iterdir())
    (repository / ".no_exist").mkdir()
    folders = [repository, *(repository / name for name in ("snapshots", "blobs", "refs", ".no_exist"))]
    for path in (*folders, repository / "refs" / "main", blob):
        answers = opened(path)
        train, tokenize = answers.pop("train"), answers["tokenize"]
        assert "hf-to-megatron writes one" in train or f"give its snapshot, {snapshot}" in train
        if path.is_file():
            assert "is not a known tokenizer" in tokenize
            del answers["tokenize"]
        assert all(f"give its snapshot, {snapshot}" in answer for answer in answers.values()), answers
    for path in (tmp_path / "hub", tmp_path):  # HF_HUB_CACHE, HF_HOME
        answers = opened(path)
        del answers["train"]
        wanted = f"give a folder {tmp_path}/hub/MODEL/snapshots/REVISION; it holds models--x--y"
        assert all(wanted in answer for answer in answers.values()), answers
    (repository / "snapshots" / "00").mkdir()
    wanted = f"give one of its snapshots (main's first), {snapshot}, {repository}/snapshots/00"
    assert wanted in opened(repository)["convert"]
    shutil.rmtree(repository / "snapshots")
    (repository / "snapshots").mkdir()
    assert "without a snapshot: `hf download x/y` fetches one" in opened(repository)["convert"]


@pytest.mark.parametrize(
    "given",
    [
        "meta-llama/Llama-2-7b-hf",
        "https://huggingface.co/meta-llama/Llama-2-7b-hf",
        "https://hf.co/meta-llama/Llama-2-7b-hf/tree/main",
        "huggingface.co/meta-llama/Llama-2-7b-hf",
        "hf://meta-llama/Llama-2-7b-hf",
    ],
)
def test_a_hub_id_is_refused_with_the_download_command(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for answer in opened(Path(given)).values():
        assert "`hf download meta-llama/Llama-2-7b-hf` fetches it and prints the folder" in answer


def test_a_path_in_an_existing_folder_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    assert not any("hf download" in answer for answer in opened(Path("models/llama")).values())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_the_model_is_refused_with_its_folder_named(name: str, tiny_llama: Tiny) -> None:
    answers = opened(tiny_llama() / name)
    assert "tokenizer" in answers.pop("tokenize")
    assert all(
        f"is not a folder: give the folder that it is in, {tiny_llama()}" in answer for answer in answers.values()
    ), answers


def test_the_parent_folder_is_refused_with_the_subfolder_named(tiny_llama: Tiny, tmp_path: Path) -> None:
    snapshot = download(tiny_llama(), tmp_path / "hub", subfolder="llm")
    answers = opened(snapshot.parent)
    del answers["train"]
    assert all(f"give the folder in it that has one: {snapshot}" in answer for answer in answers.values()), answers


def test_an_incomplete_snapshot_is_refused_with_the_download_command(tiny_llama: Tiny, tmp_path: Path) -> None:
    """Either only some files were requested, or the download was interrupted."""
    model = shutil.copytree(tiny_llama(max_shard_size="100KB"), tmp_path / "model")
    shard = sorted(model.glob("model-*.safetensors"))[1].name
    for name in (shard, "model.safetensors.index.json", "config.json", "tokenizer.json"):
        (model / name).unlink()
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
        snapshot = download(model, tmp_path / "hub")
        read = load_tokenizer if name == "tokenizer.json" else inspect
        with pytest.raises(LlamaProError, match="`hf download x/y` fetches the rest"):
            read(snapshot)
        shutil.copyfile(tiny_llama(max_shard_size="100KB") / name, model / name)
    snapshot = download(model, tmp_path / "other")
    (snapshot / "config.json").resolve().unlink()
    shutil.copytree(snapshot, tmp_path / "copied", symlinks=True)  # as seen by a container that has this folder only
    for folder in (snapshot, tmp_path / "copied"):
        with pytest.raises(CheckpointError, match=r"config\.json is a link to .*, which does not exist: .*cp -rL"):
            inspect(folder)


def test_a_broken_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nothing")
    answers = opened(tmp_path / "dangling")
    assert all(f"{tmp_path}/dangling is a broken link to nothing" in each for each in answers.values())


COMMANDS = {
    "convert": ["convert_checkpoint.py", "hf-to-megatron", "--source", "{path}", "--target", "new"],
    "convert back": ["convert_checkpoint.py", "megatron-to-hf", "--source", "{path}", "--target", "new"],
    "target": ["convert_checkpoint.py", "hf-to-megatron", "--source", "{model}", "--target", "{path}"],
    "in the target": ["expand_checkpoint.py", "--source", "{model}", "--target", "{path}/new", "--positions", "1"],
    "verify": ["verify_checkpoint.py", "--original", "{path}", "--expanded", "{path}"],
    "inspect": ["inspect_checkpoint.py", "--checkpoint", "{path}"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_loop_of_links_is_one_line_in_every_command(command: list[str], tiny_llama: Tiny, tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    program = Path(__file__).parents[3] / "tools" / command[0]
    arguments = [each.format(path=tmp_path / "one", model=tiny_llama()) for each in command[1:]]
    ended = subprocess.run(
        [sys.executable, str(program), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert ended.stderr.startswith("error: ") and f"{tmp_path}/one" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{HASH}\nsize 9976576152\n"
POINTERS = ["config.json", "model.safetensors.index.json", "tokenizer.json", "generation_config.json"]


@pytest.mark.parametrize("name", [*POINTERS, "model-00001-of-"])
def test_a_git_lfs_pointer_is_refused(name: str, damaged: Tiny, tmp_path: Path) -> None:
    folder = damaged(max_shard_size="100KB")
    path = next(folder.glob(f"{name}*"))
    path.write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{path} is a Git-LFS pointer, not the file itself: run `git lfs pull`"):
        hf_to_megatron(folder, tmp_path / "it")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["damaged"]


@pytest.mark.parametrize("content", ["", "{}", "[1]", "no JSON"])
def test_a_stray_metadata_json_does_not_change_the_format(content: str, damaged: Tiny, tmp_path: Path) -> None:
    """A folder with safetensors remains a Hugging Face checkpoint."""
    folder = damaged()
    (folder / "metadata.json").write_text(content)
    assert inspect(folder).format == Format.HUGGING_FACE
    expand_hf(folder, tmp_path / "expanded", expansion=Expansion.at(1))
    (tmp_path / "expanded" / "metadata.json").write_text(content)
    assert all(check.ok for check in verify(folder, tmp_path / "expanded", quick=True))
    with pytest.raises(CheckpointError, match=r"not a Megatron checkpoint.*hf-to-megatron writes one"):
        resolve_megatron_checkpoint(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\*\.bin"):
        inspect(folder)
