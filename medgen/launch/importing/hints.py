"""What a person should look at in a script that was imported: things that mean something else in a stage. Used by verb.py."""

from __future__ import annotations

import re

from medgen.launch.importing.reading import Draft
from medgen.launch.importing.shell import Statement

LOOK_AT = (
    (re.compile(r'(?<!\\)\$(0\b|\{0\})|BASH_SOURCE'), "$0 and BASH_SOURCE name no file here: run is text; write the path"),
    (re.compile(r"(?<![\\\w])\$(?:[1-9@*#]|\{[1-9@*#])"), "arguments of sbatch ($1 ...) do not reach run; write them here, or use foreach and $MEDGEN_ITEM"),
    (re.compile(r"\$\{(\w+):?\?"), "the variable must be set where you call medgen submit; or write it into env:"),
    (re.compile(r"(?<![\w-])scontrol requeue(?![\w-])"), "medgen starts interrupted work again by itself; use segments:"),
)
BACKGROUND_TIME = re.compile(r"\s*time\s.*&\s*", re.DOTALL)


def add_hints(draft: Draft) -> Draft:
    for statement in draft.body:
        if statement.kind in ("blank", "comment") or statement.first == 0:
            continue
        if statement.kind == "opaque":
            draft = draft.hint(statement.first, "from here on the script could not be followed; it stays as it is")
            continue
        text = _code(statement)
        inside_function = statement.kind == "compound" and not statement.called
        for pattern, advice in LOOK_AT:
            told = any(note.line == statement.first and "$0" in note.text for note in draft.hints) and "$0" in advice
            if pattern.search(text) and not told and not (inside_function and "arguments" in advice):
                draft = draft.hint(statement.first, advice)
        if BACKGROUND_TIME.fullmatch(text) and re.search(r"kill[^\n]*\$", draft.run):
            draft = draft.hint(statement.first, "a signal sent to the process of `time ... &` never reaches the program; remove time")
    return draft


def kept_lines(draft: Draft) -> str:
    """`lines 31-44 (nvidia-smi, python)`: what of the script stands in run, without comments; for the summary."""
    ranges: list[list[int]] = []
    names: list[str] = []
    for statement in draft.body:
        if statement.kind in ("blank", "comment") or statement.first == 0:
            continue
        if ranges and statement.first <= ranges[-1][1] + 1:
            ranges[-1][1] = max(ranges[-1][1], statement.last)
        else:
            ranges.append([statement.first, statement.last])
        names += [word for word in statement.called if re.fullmatch(r"[A-Za-z_./][\w./+-]*", word)]
    if not ranges:
        return ""
    shown = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)
    different = [name for name in dict.fromkeys(names) if name not in ("if", "fi", "for", "done", "while", "case", "esac", "echo", "function")]
    return f"lines {shown}" + (f" ({', '.join(different[:5])}{', ...' if len(different) > 5 else ''})" if different else "")


def _code(statement: Statement) -> str:
    return "\n".join(line for line in statement.lines if not line.lstrip().startswith("#"))
