"""The one reader and writer of YAML. An error names the file and the line. Imports no torch.

Unlike in `yaml.safe_load`, a name that is given twice is an error, 1e-4 is a number, and ~, 24:00:00, 010 and dates are
text.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import ClassVar

import yaml

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.values import expand_user, printable

_LARGEST_FILE = 16 * 2**20  # bytes
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_TAG = "tag:yaml.org,2002:"
# Unwanted meanings of YAML 1.1: 24:00:00 would be 86400, 010 would be 8, and a lone = would be an error.
_OTHER_MEANINGS = {f"{_TAG}{name}" for name in ("int", "float", "timestamp", "value")}
# An integer with more digits than Python converts stays text, and is then rejected as text.
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,4000})$")
_FLOAT = re.compile(
    r"""(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


_REMEDIES = {r"\t": ": indent with spaces", "an alias": ": put text that starts with * in quotes"}


class DocumentError(ConfigError):
    """Text is not YAML. The message does not name its source."""


class _Loader(yaml.SafeLoader):
    """Refuses a name that occurs twice in a mapping. In plain YAML the last one silently wins."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in known if tag not in _OTHER_MEANINGS]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
        if first != "~"  # it means null or the home folder: the field decides
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Compose a mapping and check its names, before `<<` adds names that the mapping may override."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name = (key.tag, key.value)
            if name in lines:
                remedy = "write <<: [*a, *b]" if key.value == "<<" else "leave one of them out"
                problem = f"'{key.value}' is given twice, first in line {lines[name]}: {remedy}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[name] = key.start_mark.line + 1
        return node


class _Dumper(yaml.SafeDumper):
    """Also quotes text such as 1e-4, which `_Loader` would read as a number."""


for _kind, _pattern in (("int", _INT), ("float", _FLOAT)):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_kind}", _pattern, list("-+.0123456789"))


def dump(value: object) -> str:
    """Write plain data as YAML that `load` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load(text: str) -> object:
    """Read YAML text as plain data.

    Raises:
        DocumentError: the text is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        reason = ", ".join(filter(None, (error.context, error.problem)))
        remedy = next((remedy for sign, remedy in _REMEDIES.items() if sign in reason), "")
        raise DocumentError(f"{line}{' '.join(reason.split())}{remedy}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise DocumentError(" ".join(str(error).split()).replace(' in "<unicode string>",', ",")) from None
    except RecursionError:
        raise DocumentError("too deeply nested") from None


def read_document(name: str) -> dict:
    """Read a file of names with values. `~` in its name is the home folder.

    Raises:
        ConfigError: the file does not exist, is not text or not YAML, or holds no names with values.
    """
    text, name = _text_of(name), printable(name)
    try:
        document = load(text)
    except DocumentError as error:
        raise ConfigError(f"{name}, {error}" if str(error).startswith("line ") else f"{name}: {error}") from None
    if document is None:
        raise ConfigError(f"{name} is empty: it must hold names with values, e.g. training: {{train_iters: 100}}")
    if not isinstance(document, dict):
        what = "a list" if isinstance(document, list) else "a single value"
        raise ConfigError(f"{name} is {what}: it must hold names with values, e.g. training: {{train_iters: 100}}")
    return document


def _text_of(name: str) -> str:
    try:
        path = Path(expand_user(name))
    except ValueError as error:
        raise ConfigError(f"{name!r} is not a file name: {error}") from None
    name = printable(name)
    if path.is_dir():
        raise ConfigError(f"{name} is a folder: name the YAML file in it")
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise ConfigError(f"{name} {reason}") from None
    if len(content) > _LARGEST_FILE:
        raise ConfigError(f"{name} has more than {_LARGEST_FILE >> 20} MiB: it is not a configuration file")
    if content.startswith(_UTF16):
        raise ConfigError(f"{name} is UTF-16: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not text: byte {error.start + 1} is not UTF-8") from None
