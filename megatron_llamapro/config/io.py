"""YAML and command line -> `RunConfig`, and back to YAML. Imports neither torch nor megatron."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_origin

from megatron_llamapro.config.checks import check_run_config
from megatron_llamapro.config.command import in_one_line
from megatron_llamapro.config.documents import dump, read_document
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.fields import (
    alternatives_of,
    built,
    fields_of,
    items_of,
    missing,
    to_plain,
    with_defaults,
    with_homes,
)
from megatron_llamapro.config.reading import Place, read_text, read_value, shown
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.config.values import printable

USAGE = """llamapro train --config run.yaml [--section.field value …]
       torchrun --nproc-per-node N -m megatron_llamapro.pretrain --config run.yaml [--section.field value …]"""
Config = TypeVar("Config")


def parse_run_config(args: Sequence[str] | None = None) -> RunConfig:
    """Return the run configuration from `args` (default: the command line): `--config FILE` and dotted overrides.

    Raises:
        ConfigError: a file or a key does not exist (the message suggests the nearest key), a value has the wrong type,
            a required field is missing, or values contradict each other.
    """
    try:
        run_config = parse_sections(RunConfig, sys.argv[1:] if args is None else list(args))
        check_run_config(run_config)
    except OSError as error:  # a name that no file can have
        raise ConfigError(in_one_line(error)) from None
    return run_config


def parse_sections(kind: type[Config], args: Sequence[str]) -> Config:
    """Read any configuration of this form (a dataclass of sections and fields) as `parse_run_config` does, with its
    errors. Do not check values against each other."""
    if {"--help", "-h"} & set(args):
        _print_help(kind)
        raise SystemExit(0)
    given = with_homes(kind, _read_arguments(kind, args))
    if "--print_config" in args:
        print(dump(with_defaults(kind, given)), end="")
        raise SystemExit(0)
    if names := list(missing(kind, given)):
        files = [text for name, text in _options(args) if name == "config"]
        verb, pronoun = ("is", "it") if len(names) == 1 else ("are", "them")
        remedy = f"write {pronoun} into {files[-1]}" if files else f"give --{names[0]}, or a file: --config run.yaml"
        raise ConfigError(f"{', '.join(names)} {verb} not set: {remedy}")
    return built(kind, given)


def options_with_homes(kind: type, args: Sequence[str]) -> list[str]:
    """Return options that repeat those in `args` (which must be valid) that contain `~`, with its folder written out:
    where they are read, `~` may be another folder."""
    given = _read_arguments(kind, args)
    return [*_differences(given, with_homes(kind, given))]


def _differences(before: dict, after: dict, section: str = "--") -> Iterator[str]:
    for name, value in after.items():
        if value == before[name]:
            continue
        if isinstance(value, dict):
            yield from _differences(before[name], value, f"{section}{name}.")
        else:
            yield f"{section}{name}={value if isinstance(value, str) else json.dumps(value)}"


def dump_yaml(config: RunConfig) -> str:
    """Return `config` as YAML that `--config` reads back, with every field resolved."""
    return dump(to_plain(config))


def _read_arguments(kind: type, args: Sequence[str]) -> dict:
    """Return the values of files and options as plain data. Later ones win; paths stay as written."""
    given: dict = {}
    for name, text in _options(args):
        if name == "config":
            _merge(kind, given, read_value(kind, read_document(text), Place(kind, f"{text}: ")))
        else:
            _set(kind, given, name, text)
    return given


_FLAGS = ("--debug", "--print_config")


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the names and values of a command line, in order."""
    words = iter(args)
    for word in words:
        name, equals, text = word.partition("=")
        if word in _FLAGS:
            continue
        if not name.startswith("--") or name == "--":
            raise ConfigError(f"{shown(word)} follows no option: for a file, write --config {printable(word)}")
        text = text if equals else next(words, "")
        if not text or (text.startswith("--") and not equals):
            raise ConfigError(f"{printable(name)} has no value: write {printable(name)}=…")
        yield name.removeprefix("--"), text


def _set(kind: type, given: dict, name: str, text: str) -> None:
    """Set an option's value in its section."""
    place = Place(kind, "--", name)
    *sections, last = name.split(".")
    holder, holds = given, kind
    for section in sections:
        holds = _inside(holds, section, place)
        holder = holder.setdefault(section, {})
    inner = _inside(holds, last, place)
    value = read_text(inner, text, place)
    if fields_of(inner):
        _merge(inner, holder.setdefault(last, {}), value)
    else:
        holder[last] = value


def _inside(kind: Any, name: str, place: Place) -> Any:
    """Return the type of a section's field, or of a mapping's value."""
    if name in fields_of(kind):
        return fields_of(kind)[name]
    if name and any(get_origin(each) is dict for each in alternatives_of(kind)):
        return items_of(kind)
    place.is_unknown()


def _merge(kind: Any, given: dict, more: dict) -> None:
    """Merge field by field; lists and mappings are replaced as a whole."""
    for name, value in more.items():
        inner = fields_of(kind)[name]
        if fields_of(inner):
            _merge(inner, given.setdefault(name, {}), value)
        else:
            given[name] = value


def _print_help(kind: type) -> None:
    """Print every field with its docstring."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="llamapro train",
        usage=USAGE,
        description="Post-pretrain an expanded LLaMA from a YAML file. Any field can be overridden by its dotted name.",
        print_config=None,
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with the fields below; may be repeated, later files win"
    )
    parser.add_argument("--print_config", action="store_true", help="print all fields with their values, and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_class_arguments(kind, as_group=True)
    for action in parser._actions:
        if fields_of(fields_of(kind).get(action.dest)):
            action.metavar, action.help = "{…}", "Several of these fields at once, e.g. '{a: 1, b: 2}'"
    parser.print_help()
