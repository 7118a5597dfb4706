"""Which existing name was meant by one that does not exist, with the section that it stands in. Imports no torch."""

from __future__ import annotations

import difflib
import re
from typing import Any

from megatron_llamapro.config.fields import entry_fields_of, fields_of, items_of, names_of

_INDEX = re.compile(r"\[\d+\]")
_AT_MOST = 3


def suggestion(kind: Any, name: str, *, dashes: str = "") -> str:
    """What to add to the error that `name`, dotted, is no name of the configuration `kind`: the nearest ones, or
    else all of the section. `dashes` stand before an option."""
    near = nearest(kind, name, in_entry=not dashes and name.rpartition(".")[0].endswith("]"))
    if near:
        forms = (f"{dashes}{each.replace(': ', '=', 1) if dashes else each}" for each in near)
        return f": did you mean {' or '.join(forms)}?"
    known = names_of(kind)
    section = _INDEX.sub("", name).rpartition(".")[0]
    while section and section not in known:
        section = section.rpartition(".")[0]
    if not section:
        anchor = "" if dashes else "; an anchor (&x) stands where its value is used first"
        return f": the top level takes {', '.join(fields_of(kind))}{anchor}"
    takes = fields_of(known[section]) or fields_of(items_of(known[section]))
    return f": {section} takes {', '.join(takes)}" if takes else ""


def nearest(kind: Any, name: str, *, in_entry: bool) -> list[str]:
    """Existing dotted names, best first: the same name in another section; else one that is spelt alike, in the
    same section before others. Fields of a list's entries are in the form that the list is written in, unless the name
    stands in such an entry (`in_entry`)."""
    section, _, last = _INDEX.sub("", name.replace("-", "_")).rpartition(".")
    known = names_of(kind)
    entry = list(fields_of(items_of(known.get(section))))
    if entry:
        return _alike(last, entry) if in_entry else [f"{section}: [{{{each}: …}}]" for each in _alike(last, entry)]
    same = [each for each in known if each.rpartition(".")[2] == last]
    same += [f"{each}: [{{{field}: …}}]" for each, field in entry_fields_of(kind) if field == last]
    if same:
        return same[:_AT_MOST]
    if section:
        sections = [each for each in known if fields_of(known[each])]
        for each in [section] if section in known else _alike(section, sections):
            if alike := _alike(last, list(fields_of(known[each]))):
                return [f"{each}.{alike[0]}"]
    by_last = {each.rpartition(".")[2]: each for each in reversed(known)}
    return [by_last[each] for each in _alike(last, list(by_last))]


def _alike(word: str, words: list[str]) -> list[str]:
    return difflib.get_close_matches(word, words, n=1)
