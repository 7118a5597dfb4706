"""A model's other files travel with it: transformers treats an export as it treats the source."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron, legacy, megatron_to_hf, megatron_to_megatron
from megatron_llamapro.checkpoint.report import summary
from megatron_llamapro.checkpoint.side_files import SIDE_FILES, copy_side_files
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.families.hf_config import FAMILIES

Tiny = Callable[..., Path]
TALK, DOCUMENTS = [{"role": "user", "content": "x = 1"}], [{"title": "title", "text": "text"}]


def exports(source: Path, folder: Path) -> list[Path]:
    """Return the model expanded, and exported from both of Megatron's formats."""
    expand_hf(source, folder / "expanded", expansion=Expansion.at(2))
    hf_to_megatron(source, folder / "torch_dist", expansion=Expansion.at(2))
    megatron_to_megatron(folder / "torch_dist", folder / "legacy", kind=legacy(tensor_model_parallel_size=2))
    megatron_to_hf(folder / "torch_dist", folder / "back")
    megatron_to_hf(folder / "legacy", folder / "back_from_legacy")
    return [folder / name for name in ("expanded", "back", "back_from_legacy")]


def test_named_chat_templates_are_copied(damaged: Tiny, tmp_path: Path) -> None:
    source = damaged()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {
        "default": "{{ messages[0]['content'] }}",
        "tool_use": "tools: {{ messages[0]['content'] }}",
        "rag": "{{ documents[0]['text'] }}",
    }
    tokenizer.save_pretrained(source)
    assert (source / "additional_chat_templates" / "tool_use.jinja").is_file()

    def rendered(folder: Path, name: str | None) -> str:
        loaded = AutoTokenizer.from_pretrained(folder)
        return loaded.apply_chat_template(TALK, chat_template=name, tokenize=False, documents=DOCUMENTS)

    assert rendered(source, "tool_use") == "tools: x = 1"
    for export in exports(source, tmp_path):
        for name in (None, "tool_use", "rag"):
            assert rendered(export, name) == rendered(source, name)
        assert AutoModelForCausalLM.from_pretrained(export).config.num_hidden_layers == 5


def test_a_vocabulary_and_its_merges_are_copied(damaged: Tiny, tmp_path: Path) -> None:
    """Older checkpoints have these instead of a tokenizer.json."""
    source = damaged(model_type="qwen2")
    for path in source.glob("*token*"):
        path.unlink()
    vocabulary = ["a", "b", "ab", "<|endoftext|>"]
    (source / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    expected = AutoTokenizer.from_pretrained(source)("abba").input_ids
    assert expected == [2, 1, 0]
    for export in exports(source, tmp_path):
        loaded = AutoTokenizer.from_pretrained(export)
        assert isinstance(loaded, Qwen2Tokenizer) and loaded("abba").input_ids == expected


def test_every_file_of_the_families_tokenizers_is_copied() -> None:
    """transformers itself lists the files that it looks for."""
    classes = {TOKENIZER_MAPPING_NAMES.get(family, "LlamaTokenizer") for family in FAMILIES} | {"CodeLlamaTokenizer"}
    found = [each for each in map(tokenizer_class_from_name, classes) if each is not None]
    names = {name for each in found for name in each.vocab_files_names.values()}
    assert {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"} <= names
    names |= {"tekken.json", "tiktoken.model", "tokenizer.model.v3", "tokenizer.4.0.json"}
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in SIDE_FILES) for name in names), names


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_only_known_files_are_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates" / "more").mkdir(parents=True)
    (source / "LICENSES").mkdir()
    target.mkdir()
    kept = [
        "LICENSE.txt",
        "USE_POLICY.md",
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "tekken.json",
        "tiktoken.model",
        "tokenizer.model",
        "tokenizer.model.v3",
    ]
    left = [
        "README.md",
        "additional_chat_templates/._rag.jinja",
        "additional_chat_templates/.rag.jinja.swp",
        "additional_chat_templates/more/nested.jinja",
        "modeling_evil.py",
        "tokenizer.model.bak",
        "training_args.bin",
    ]
    for name in (*kept, *left):
        (source / name).write_text(name)
    copy_side_files(source, target)
    assert names(target) == kept
    copy_side_files(source, target)  # a resumed conversion
    assert names(target) == kept


@pytest.mark.parametrize("place", ["a template", "the folder"])
def test_templates_that_link_out_of_the_folder_are_refused(place: str, damaged: Tiny, tmp_path: Path) -> None:
    source = damaged()
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.jinja").write_text("secret")
    folder = source / "additional_chat_templates"
    if place == "the folder":
        folder.symlink_to(tmp_path / "secrets")
    else:
        folder.mkdir()
        (folder / "key.jinja").symlink_to(tmp_path / "secrets" / "key.jinja")
    with pytest.raises(CheckpointError, match=r"key\.jinja is a link out of its folder"):
        hf_to_megatron(source, tmp_path / "it")
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize("link", ["../LICENSE", "nothing", "LICENSE"], ids=["out", "to nothing", "a loop"])
def test_a_license_that_links_out_of_the_folder_is_left_out(link: str, damaged: Tiny, tmp_path: Path) -> None:
    """A repository of several models has such links. A link inside the folder is followed."""
    source = damaged()
    (tmp_path / "LICENSE").write_text("of all models")
    (source / "LICENSE").symlink_to(link)
    (source / "legal.txt").write_text("notice")
    (source / "NOTICE.txt").symlink_to("legal.txt")
    done = expand_hf(source, tmp_path / "expanded", expansion=Expansion.at(2))
    assert "left out, as links to another folder or to nothing: LICENSE; add" in summary(done)
    assert "NOTICE" not in summary(done)
    assert not (tmp_path / "expanded" / "LICENSE").exists()
    assert (tmp_path / "expanded" / "NOTICE.txt").read_text() == "notice"
    assert "left out" not in summary(expand_hf(tmp_path / "expanded", tmp_path / "again", expansion=Expansion.at(2)))
    (source / "tokenizer_config.json").unlink()
    (source / "tokenizer_config.json").symlink_to(link)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json (is a link|cannot be opened)"):
        expand_hf(source, tmp_path / "other", expansion=Expansion.at(2))


RAN = "from pathlib import Path\nPath({mark!r}).write_text(__name__)\n"
TOKENIZER_CODE = {
    "tokenization_own.py": "from transformers import PreTrainedTokenizerFast\n"
    "from .vocabulary import upper\n"
    "class OwnTokenizer(PreTrainedTokenizerFast):\n"
    "    def _batch_encode_plus(self, batch, *args, **kwargs):\n"
    "        changed = [upper(text) for text in batch] if isinstance(batch, list) else upper(batch)\n"
    "        return super()._batch_encode_plus(changed, *args, **kwargs)\n"
    "    def _encode_plus(self, text, *args, **kwargs):\n"
    "        return super()._encode_plus(upper(text), *args, **kwargs)\n",
    "vocabulary.py": "from .letters import UPPER\ndef upper(text):\n    return UPPER(text)\n",
    "letters.py": "UPPER = str.upper\ndef again():\n    from .vocabulary import upper\n",
}
MODEL_CODE = {
    "modeling_own.py": "from transformers import LlamaForCausalLM\nfrom .helper import *\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    pass\n",
    "configuration_own.py": "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    pass\n",
    "helper.py": "",
}
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}

TOKENIZER_MAP = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}


def write_code(folder: Path, code: dict[str, str], mark: Path) -> None:
    for name, text in code.items():
        (folder / name).write_text(text + RAN.format(mark=str(mark)))


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep transformers' copies of code in a folder of the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.mark.usefixtures("modules")
def test_model_code_is_left_out(damaged: Tiny, tmp_path: Path) -> None:
    """The export uses transformers' own class, for which the weights were converted and trained."""
    source = damaged(config={"auto_map": AUTO_MAP})
    write_code(source, MODEL_CODE, tmp_path / "ran")
    found = exports(source, tmp_path)
    done = expand_hf(source, tmp_path / "again", expansion=Expansion.at(2))
    assert "auto_map in config.json names the model's own code, which is left out" in summary(done)
    assert "auto_map" not in summary(megatron_to_hf(tmp_path / "torch_dist", tmp_path / "back_again"))
    assert not (tmp_path / "ran").exists()
    expected = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
    tokens = torch.arange(40)[None]
    for export in (*found, tmp_path / "torch_dist"):
        assert "auto_map" not in json.loads((export / "config.json").read_text())
        assert not list(export.rglob("*.py"))
    for export in found:
        for trusted in (True, False):
            model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=trusted)
            assert type(model) is type(expected)
            assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
def test_tokenizer_code_is_copied_but_not_run(where: str, damaged: Tiny, tmp_path: Path) -> None:
    source = damaged(config={"auto_map": {**AUTO_MAP, **TOKENIZER_MAP}} if where == "config.json" else None)
    write_code(source, {**TOKENIZER_CODE, **MODEL_CODE}, tmp_path / "ran")
    config = json.loads((source / "tokenizer_config.json").read_text())
    if where == "config.json":
        del config["tokenizer_class"]
    else:
        config |= {"auto_map": TOKENIZER_MAP, "tokenizer_class": "OwnTokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    found = exports(source, tmp_path)
    for export in (*found, tmp_path / "torch_dist"):
        assert [path.name for path in sorted(export.rglob("*.py"))] == sorted(TOKENIZER_CODE)
    assert not (tmp_path / "ran").exists()
    for export in found:
        if where == "config.json":  # transformers 4 reads it from config.json
            assert json.loads((export / where).read_text())["auto_map"] == TOKENIZER_MAP
            continue
        loaded = AutoTokenizer.from_pretrained(export, trust_remote_code=True)
        assert type(loaded).__name__ == "OwnTokenizer"
        assert loaded.decode(loaded("x = [1]").input_ids) == "X = [1]"
        assert (tmp_path / "ran").exists()


STRANGE = {
    "no object": 3,
    "null": None,
    "of another repository": {"AutoTokenizer": ["owner/name--tokenization_own.OwnTokenizer", None]},
    "up": {"AutoTokenizer": "../secret.Tokenizer"},
    "absolute": {"AutoTokenizer": ["/etc/secret.Tokenizer"]},
    "numbers": {"AutoTokenizer": [1, 2]},
    "no such file": {"AutoTokenizer": "nothing.Tokenizer"},
}


@pytest.mark.parametrize("auto_map", STRANGE.values(), ids=STRANGE.keys())
def test_a_malformed_auto_map_copies_no_code(auto_map: object, damaged: Tiny, tmp_path: Path) -> None:
    source = damaged(config={"auto_map": auto_map})
    (tmp_path / "secret.py").write_text("secret")
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    expand_hf(source, tmp_path / "it", expansion=Expansion.at(2))
    assert not list((tmp_path / "it").rglob("*.py"))


def test_tokenizer_code_may_be_a_link_out_of_the_folder(damaged: Tiny, tmp_path: Path) -> None:
    source = damaged(config={"auto_map": {"AutoTokenizer": "own.Tokenizer"}})
    (tmp_path / "secret").write_text("secret")
    (source / "own.py").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        expand_hf(source, tmp_path / "it", expansion=Expansion.at(2))
