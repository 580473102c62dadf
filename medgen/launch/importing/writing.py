"""A draft as the YAML of a spec, with a head of comments that says where every other line went. Used by verb.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from medgen.launch.importing.reading import Draft

PLAIN_TEXT = re.compile(r"[\t\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\uf000-\ufdff\ufe00-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]*")
WIDTH = 120
WIDE = 10**6  # never folded


def spec_text(draft: Draft, resources: dict[str, Any]) -> str:
    """The whole file. `resources`: keys beside setup and slurm; reading it back gives exactly the lines of the draft."""
    lines = [*_head(draft), "version: 1", f"name: {value_scalar(draft.name)}", "stages:", "  main:", "    kind: command"]
    lines += _block("run", draft.run)
    if draft.foreach:
        lines += _items(draft.foreach)
    if draft.parallel is not None:
        lines.append(f"    parallel: {draft.parallel}")
    if draft.segments > 1:
        lines.append(f"    segments: {draft.segments}")
    if draft.env:
        lines += ["    env:", *(f"      {value_scalar(name)}: {text_scalar(value)}" for name, value in draft.env)]
    gpu = {**resources.get("gpu", {}), **({"prefer": draft.prefer} if draft.prefer else {})}
    keys = [f"      {key}: {value_scalar(value)}" for key, value in resources.items() if key != "gpu"]
    keys += [f"      gpu: {_flow(gpu)}"] if gpu else []
    keys += _list("setup", draft.setup) + _list("slurm", [directive.text for directive in draft.directives])
    return "\n".join([*lines, *(["    resources:", *keys] if keys else [])]) + "\n"


def yaml_text(record: dict[str, Any], head: str) -> str:
    """A plain mapping below a line of comment."""
    return f"# {head}\n" + yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=120)


def _head(draft: Draft) -> list[str]:
    lines = [f"# Imported by medgen from {_shown(str(draft.path))}: {_shown(', '.join(draft.summary))}."]
    if draft.hints:
        lines += ["#", "# To check:"]
        lines += [f"#   {f'line {note.line}: ' if note.line else ''}{_shown(note.text)}" for note in draft.hints]
    if draft.moved:
        lines += ["#", "# Lines that stand elsewhere now, or nowhere:"]
        for moved in sorted(draft.moved, key=lambda item: item.line):
            first, *others = moved.text.strip("\n").split("\n")
            place = f"line {moved.line}" if moved.line else "script"
            lines.append(f"#   {place}: {_shown(first.strip())}  -> {_shown(moved.where)}")
            lines += [f"#     {_shown(line)}".rstrip() for line in others]
    return [*lines, ""] if len(lines) > 1 else lines


def comment_lines(lines: Sequence[str]) -> list[str]:
    """Any text as the comment at the head of a spec."""
    return [f"# {_shown(line)}".rstrip() for line in lines]


def _shown(text: str) -> str:
    """For a comment: letters that YAML does not take are written as escapes."""
    return "".join(letter if PLAIN_TEXT.fullmatch(letter) and letter != "\n" else repr(letter)[1:-1] for letter in text)


def _block(key: str, text: str) -> list[str]:
    """Text as it is, line by line, if YAML can hold it so; else in double quotes."""
    if not PLAIN_TEXT.fullmatch(text):
        return [f"    {key}: {_quoted(text)}"]
    lines = text.rstrip("\n").split("\n")
    indicator = "|2" if lines[0].startswith((" ", "\t")) or not lines[0] else "|"
    return [f"    {key}: {indicator}", *(f"      {line}" if line else "" for line in lines)]


def _items(values: tuple[str, ...]) -> list[str]:
    """On one line if it is short."""
    flow = f"    foreach: {_flow(list(values))}"
    if len(flow) <= WIDTH and "${" not in flow:
        return [flow]
    return ["    foreach:", *(f"      - {text_scalar(value)}" for value in values)]


def _list(key: str, values: tuple[str, ...] | list[str]) -> list[str]:
    return [f"      {key}:", *(f"        - {text_scalar(value)}" for value in values)] if values else []


def text_scalar(value: str) -> str:
    """A string as one scalar. A ${NAME} would be replaced by medgen when it reads the spec: its $ is escaped."""
    return _quoted(value) if "${" in value else value_scalar(value)


def _quoted(value: str) -> str:
    text = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=WIDE).strip()
    return text.replace("${", "\\x24{")


def value_scalar(value: Any) -> str:
    """A number, a word or a text without ${NAME} as YAML writes it."""
    return yaml.safe_dump(value, allow_unicode=True, width=WIDE, default_flow_style=True).removesuffix("\n...\n").strip()


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, allow_unicode=True, width=WIDE, default_flow_style=True, sort_keys=False).strip()
