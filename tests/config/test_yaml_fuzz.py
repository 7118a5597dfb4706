"""Any damage to a configuration gives a configuration that reads back equal, or one line that names the file, the
option or the field. It never gives a traceback. `FUZZ_EXAMPLES=5000 make fuzz` tries more."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonargparse
import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from fuzzing import fuzz_settings
from megatron_llamapro.config.documents import dump
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.fields import fields_of, names_of, to_plain
from megatron_llamapro.config.io import parse_run_config, parse_sections
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.config.values import printable
from megatron_llamapro.launch.config import LaunchConfig, read_launch_config

SEEDED = fuzz_settings(60)

RUN = {
    "model": {"checkpoint": "c", "trainable": ["added_blocks"]},
    "data": {"train": [{"prefix": "a", "weight": 2.0}, {"prefix": "b"}], "seq_length": 64, "valid": {"cpp": "v"}},
    "training": {"train_iters": 6, "micro_batch_size": 1, "global_batch_size": 4, "precision": "bf16"},
    "parallel": {"pipeline_model_parallel_size": 2, "pipeline_stage_layers": [3, 2], "overlap_grad_reduce": True},
    "optimizer": {"lr": 2e-4, "param_groups": [{"match": "*.bias", "lr_mult": 0.5, "wd_mult": None}]},
    "recompute": {"granularity": "selective", "modules": ["mlp"]},
    "checkpoint": {"save": "runs/x", "save_interval": 3},
    "logging": {"wandb_project": None, "tensorboard_dir": "tb"},
}
LAUNCH = {
    "log_dir": "logs",
    "nodes": {"num_nodes": 2, "gpus_per_node": 8, "memory_per_node": "0"},
    "slurm": {"time": "24:00:00", "options": ["--qos=long"], "max_lives": None},
    "environment": {"NCCL_DEBUG": "INFO", "X": 3, "Y": 0.5},
    "container_mounts": ["/a:/a"],
    "rendezvous_port": 29400,
}
FILES = {RunConfig: RUN, LaunchConfig: LAUNCH}
NAMES = sorted({part for kind in FILES for name in names_of(kind) for part in (name, name.rpartition(".")[2])})

NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-5, 5e-324, 1e308, float("nan")])
WORDS = st.sampled_from(
    [
        *("~", "~/x", "~nobody-has-this-name", "$HOME/x", "null", "1e-4", "3", "yes", "24:00:00", "010", "2024-01-01"),
        *("=", "[a]", "{a: 1}", "&a", "*a", "!x", "<<", "- a", "os.system", "bfloat16", "bf16", "everything", "x.yaml"),
        *("", "\0", "é\u2028", "a b\n"),
    ]
)
VALUES = st.recursive(
    NUMBERS | st.none() | st.booleans() | WORDS | st.text(max_size=3) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | WORDS, inner, max_size=2),
    max_leaves=4,
)


def places_in(value: object, place: tuple = ()) -> Iterator[tuple]:
    """Yield the place of every value in nested lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*place, key)
        yield from places_in(item, (*place, key))


@st.composite
def damaged_documents(draw: st.DrawFn, document: dict) -> dict:
    """Replace, remove, rename or move one to three places of a document."""
    result = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(list(places_in(result)) or [("x",)]))
        holder = result
        for key in way:
            holder = holder[key]
        change = draw(st.sampled_from(["replace", "replace", "leave out", "rename", "move"]))
        if change == "replace" or isinstance(holder, list) or last not in holder:
            holder[last] = draw(VALUES)
            continue
        value = holder.pop(last)
        if change == "rename":
            holder[draw(st.sampled_from(NAMES) | st.text(max_size=3) | st.just(f"{last}s"))] = value
        if change == "move":
            sections = [section for section in result.values() if isinstance(section, dict)]
            draw(st.sampled_from(sections or [result]))[last] = value
    return result


@st.composite
def damaged_files(draw: st.DrawFn, document: dict) -> bytes:
    """Draw the document's YAML, in part with characters added, lost or repeated."""
    style = draw(st.sampled_from([None, True, False]))
    content = yaml.safe_dump(draw(damaged_documents(document)), default_flow_style=style, allow_unicode=True).encode()
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(content)))
        more = draw(
            st.sampled_from([b"\t", b":", b"-", b"#", b"\n", b"'", b"[", b"}", b"&a ", b"*a", b"\xff", b"\0", b"? "])
        )
        content = (
            content[:at] + draw(st.sampled_from([more, b"", content[:at]])) + content[draw(st.integers(at, at + 9)) :]
        )
    return content


OPTIONS = (
    st.tuples(
        st.sampled_from(NAMES)
        | st.sampled_from(["config", "data.valid.x", "data.train.0", "", ".", "x"])
        | st.text(max_size=4),
        VALUES.map(
            lambda value: (
                value
                if isinstance(value, str)
                else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
            )
        ),
    ).map(lambda option: f"--{option[0]}={option[1]}")
    | WORDS
    | st.sampled_from([f"--{name}" for name in NAMES])
)


def ends_well(parse: Callable, file: Path, dumped: Path, *options: str) -> object:
    """Return a configuration that reads back equal, or None if the error is one line that says where."""
    try:
        config = parse(["--config", str(file), *options])
    except ConfigError as error:
        message = str(error)
        assert "\n" not in message and not any(
            foreign in message for foreign in ("<class", "typing.", "unicode string")
        )
        files = [word.removeprefix("--config=") for word in options if word.startswith("--config=")]
        files += [
            form for name in files for form in (printable(name), repr(name))
        ]  # messages escape control characters
        assert any(place in message for place in ("--", *NAMES, str(file), *files)), message
        return None
    dumped.write_text(dump(to_plain(config)), encoding="utf-8")
    assert parse(["--config", str(dumped)]) == config
    return config


def parse_launch(arguments: list[str]) -> LaunchConfig:
    return read_launch_config(Path(arguments[1]), arguments[2:])


PARSERS = {RunConfig: parse_run_config, LaunchConfig: parse_launch}


@pytest.mark.parametrize("kind", FILES, ids=lambda kind: kind.__name__)
@SEEDED
@given(data=st.data())
def test_damaged_files_end_well(kind: type, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.yaml"
        file.write_bytes(data.draw(damaged_files(FILES[kind])))
        ends_well(PARSERS[kind], file, Path(folder) / "dumped.yaml")


@pytest.mark.parametrize("kind", FILES, ids=lambda kind: kind.__name__)
@SEEDED
@given(options=st.lists(OPTIONS, min_size=1, max_size=4))
def test_damaged_options_end_well(kind: type, options: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.yaml"
        file.write_text(yaml.safe_dump(FILES[kind]))
        ends_well(PARSERS[kind], file, Path(folder) / "dumped.yaml", *options)


@pytest.mark.parametrize("kind", FILES, ids=lambda kind: kind.__name__)
@fuzz_settings(30)
@given(data=st.data())
def test_accepted_files_read_as_jsonargparse_reads_them(kind: type, data: st.DataObject) -> None:
    """Another reader of the same dataclasses finds the same values if both accept a file."""
    document = data.draw(damaged_documents(FILES[kind]))
    text = dump(document)
    assume("~" not in text)
    reference = jsonargparse.ArgumentParser(exit_on_error=False)
    reference.add_class_arguments(kind, as_group=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            ours = to_plain(parse_sections(kind, ["--config", str(file)]))
            theirs = reference.instantiate(reference.parse_path(str(file)))
        except (ConfigError, jsonargparse.ArgumentError, TypeError):
            return
    assert ours == {name: to_plain(theirs[name]) for name in fields_of(kind)}
