"""YAML and command line -> `RunConfig`, and back to YAML. Imports neither torch nor megatron."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar, get_type_hints

import jsonargparse
import yaml

from megatron_llamapro.config.checks import check_run_config
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import RunConfig

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

PROG = "torchrun --nproc-per-node N -m megatron_llamapro.pretrain"
Config = TypeVar("Config")
_UNKNOWN_OPTION = re.compile(r"(?:does not accept option|unrecognized arguments:|Option) '?-*([\w.]+)")


def parse_run_config(args: Sequence[str] | None = None) -> RunConfig:
    """The run configuration from `args` (default: the command line): `--config FILE` and dotted overrides.

    Raises:
        ConfigError: a file that is not there, a key that does not exist (with the nearest that does), a value of
            the wrong type, a required field that is missing, or values that cannot go together.
    """
    run_config = parse_sections(RunConfig, sys.argv[1:] if args is None else list(args))
    check_run_config(run_config)
    return run_config


def parse_sections(kind: type[Config], args: Sequence[str]) -> Config:
    """Any configuration of this shape (a dataclass of sections and fields), as `parse_run_config` reads its own; values
    are not checked against each other. Errors as above."""
    parser = _parser(kind)
    try:
        namespace = parser.parse_args(list(args))
    except (jsonargparse.ArgumentError, yaml.YAMLError, TypeError) as error:
        raise ConfigError(_with_nearest_key(_in_plain_words(" ".join(str(error).split())), kind)) from None
    for path in namespace.config or ():
        for name in _unknown_names(kind, yaml.safe_load(Path(path.absolute).read_text(encoding="utf-8"))):
            raise ConfigError(_with_nearest_key(f"Option '{name}' is not accepted", kind))
    config = parser.instantiate(namespace)
    return kind(**{f.name: config[f.name] for f in dataclasses.fields(kind)})  # type: ignore[arg-type]


def to_plain(value: object) -> object:
    """A config as plain dicts, lists, strings and numbers, in the order of its fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def dump_yaml(config: RunConfig) -> str:
    """`config`, every field resolved, as YAML that `--config` reads back."""
    return yaml.safe_dump(to_plain(config), sort_keys=False)


def _parser(kind: type) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=PROG,
        description="Post-pretrain an expanded LLaMA: one YAML file, every field overridable by its dotted name.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with the fields below; may be given again")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_class_arguments(kind, as_group=True)
    return parser


def _unknown_names(kind: type, data: object) -> Iterator[str]:
    """Keys that are no fields. jsonargparse refuses them itself, but for those of empty mappings, which it drops."""
    if not isinstance(data, dict) or not dataclasses.is_dataclass(kind):
        return
    hints = get_type_hints(kind)
    for key, value in data.items():
        if key not in hints:
            yield str(key)
        else:
            yield from _unknown_names(hints[key], value)


def _in_plain_words(message: str) -> str:
    for name, words in (
        ("str", "text (in quotes)"),
        ("tuple", "a list"),
        ("int", "a whole number"),
        ("dict", "names with values (A: 1)"),
    ):
        message = message.replace(f"Expected a <class '{name}'>", f"Expected {words}")
    return message.replace("Unexpected config:", "not a file of names with values:")


def _with_nearest_key(message: str, kind: type) -> str:
    """`message`, and the nearest existing key where it names one that does not exist."""
    unknown = _UNKNOWN_OPTION.search(message)
    if not unknown:
        return message
    names = sorted(_field_names(kind))
    nearest = difflib.get_close_matches(unknown.group(1).split(".")[-1], names, n=1)
    return f"{message}: did you mean '{nearest[0]}'?" if nearest else message


def _field_names(kind: type) -> set[str]:
    """Of a configuration, its sections, and what is in their lists."""
    module = vars(sys.modules[kind.__module__]).values()
    sections = [x for x in module if isinstance(x, type) and x.__module__ == kind.__module__]
    return {f.name for section in sections if dataclasses.is_dataclass(section) for f in dataclasses.fields(section)}
