"""Work that is done several times becomes `foreach`: a job array, a loop over fixed words, a number given by hand. Used by verb.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from medgen.launch.importing.environment import KEYWORDS, LOOKS, PRINTS
from medgen.launch.importing.reading import Draft, ScriptError
from medgen.launch.importing.shell import Statement, split
from medgen.launch.importing.words import assignment, literal

ARRAY_PART = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")
MOST_ITEMS = 100_000
# what people number by hand: FOLD=2 sbatch train.slurm
BY_HAND = {"FOLD", "SPLIT", "SEED", "SHARD", "PART", "REPEAT", "REPLICATE", "TRIAL", "RUN_INDEX", "INDEX", "IDX"}
LOOP = re.compile(r"for[ \t]+([A-Za-z_]\w*)[ \t]+in[ \t]+([^;\n#]+?)[ \t]*(?:;[ \t]*|\n[ \t]*)do[ \t]*(?:#.*)?\n(.*)\n[ \t]*done[ \t]*(?:#.*)?", re.DOTALL)
FROM_LOOP_TO_LOOP = re.compile(r"(?<![\w-])(break|continue|wait|local|return|exit)(?![\w-])|>>|&[ \t]*(?:#.*)?$", re.MULTILINE)
# what may run once per item instead of once before all of them
PREPARES = PRINTS | LOOKS | KEYWORDS | {
    ":", "[", "cd", "conda", "declare", "export", "false", "mkdir", "ml", "module", "readonly", "set", "shopt", "source", ".", "test", "true", "ulimit",
    "umask", "unset",
}  # fmt: skip


def lift_items(draft: Draft) -> Draft:
    """At most one of the three; an array is always lifted, because medgen makes its own."""
    if draft.directive("array") is not None:
        return _from_array(draft)
    lifted = _from_loop(draft)
    return lifted if lifted is not None else _from_variable(draft)


def array_items(text: str) -> tuple[list[int], int | None]:
    """The task ids of `--array` in order, and how many may run at once. Raises ValueError for what Slurm would refuse."""
    indices, percent, limit = text.partition("%")
    found: list[int] = []
    for part in indices.strip("[]").split(","):
        match = ARRAY_PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"not a list of array indices: {text!r}")
        first, last, step = int(match.group(1)), int(match.group(2) or match.group(1)), int(match.group(3) or 1)
        if last < first or step < 1 or (last - first) // step >= MOST_ITEMS:
            raise ValueError(f"not a range that medgen takes: {part.strip()!r}")
        found += range(first, last + 1, step)
    if percent and not (limit.isdecimal() and int(limit) > 0):
        raise ValueError(f"not a number of tasks at once: {limit!r}")
    return sorted(set(found)), int(limit) if percent else None


def _from_array(draft: Draft) -> Draft:
    directive = draft.directive("array")
    assert directive is not None
    try:
        indices, parallel = array_items(directive.value or "")
    except ValueError as error:
        raise ScriptError(f"{draft.path}:{directive.line}: {error}") from None
    bounds = {"MIN": indices[0], "MAX": indices[-1], "COUNT": len(indices)}
    lines = ["export SLURM_ARRAY_TASK_ID=$MEDGEN_ITEM"]
    lines += [f"export SLURM_ARRAY_TASK_{name}={value}" for name, value in bounds.items() if f"SLURM_ARRAY_TASK_{name}" in draft.run]
    draft = draft.move_directive(directive, "foreach" + (", parallel" if parallel else "")).first("\n".join(lines))
    draft = replace(draft, foreach=tuple(str(index) for index in indices), parallel=parallel)
    return draft.understood(f"array -> foreach: {len(indices)}" + (f", parallel: {parallel}" if parallel else ""))


def _from_loop(draft: Draft) -> Draft | None:
    """A loop at the end of the script whose rounds have nothing to do with each other; one at a time, as it was."""
    working = [statement for statement in draft.body if statement.kind not in ("blank", "comment") and not _prints(statement)]
    loop = working[-1] if working else None
    match = LOOP.fullmatch(loop.text.rstrip()) if loop is not None and loop.kind == "compound" else None
    if loop is None or match is None or draft.segments > 1:
        return None
    variable, words, body = match.groups()
    values = [value for value in map(literal, split(f": {words}")[0].commands[0][1:]) if value is not None]
    if len(values) < 2 or len(set(values)) < len(values) or len(values) < len(split(f": {words}")[0].commands[0]) - 1:
        return None
    before, after = draft.body[: draft.body.index(loop)], draft.body[draft.body.index(loop) + 1 :]
    told = any(variable in statement.text for statement in after if statement.kind != "comment")
    if told or not _rounds_are_separate(variable, body) or not _may_be_repeated(before, body):
        return draft.hint(loop.first, f"a loop over {len(values)} items; if no round needs another, write foreach: and $MEDGEN_ITEM for ${variable}")
    head = loop.text[: match.start(3)].rstrip("\n").split("\n")
    for offset, line in enumerate(head):
        draft = draft.moved_line(loop.first + offset, line, "foreach")
    draft = draft.moved_line(loop.last, loop.lines[-1], "foreach")
    draft = draft.put(loop, f'{variable}="$MEDGEN_ITEM"\n{_dedent(body)}')
    draft = replace(draft, foreach=tuple(values), parallel=1)
    return draft.understood(f"loop over {variable} -> foreach: {len(values)}, one at a time (remove parallel: 1 to run them at once)")


def _may_be_repeated(before: Sequence[Statement], body: str) -> bool:
    """What stands before the loop can run once per item: it only sets things up, and gives every item the same values."""
    for statement in before:
        if statement.kind in ("blank", "comment"):
            continue
        if statement.kind == "opaque" or not set(statement.called) <= PREPARES:
            return False
        computed = re.findall(r"(?<![\w$.-])([A-Za-z_]\w*)=[^\n]*?(?:\$\((?!\()|`|\$RANDOM|\$SECONDS)", statement.text)
        if any(re.search(rf"\$\{{?{name}\b", body) for name in computed):
            return False
    return True


def _prints(statement: Statement) -> bool:
    return statement.kind == "simple" and bool(statement.called) and set(statement.called) <= PRINTS | LOOKS


def _rounds_are_separate(variable: str, body: str) -> bool:
    """Each round starts from the loop's variable alone: nothing is counted, collected, or left half-way."""
    if FROM_LOOP_TO_LOOP.search(body) or f"${variable}" not in body.replace("{", "") or "<<" in body:
        return False
    assigned: set[str] = set()
    for statement in split(body):
        if statement.kind == "opaque" or "((" in statement.text:
            return False
        for name in re.findall(r"(?<![\w$.-])([A-Za-z_]\w*)\+?=", statement.text):
            own = re.search(rf"(?<![\w$.-]){name}(\+?)=", statement.text)
            used = re.search(rf"\$\{{?{name}\b", statement.text)
            if (own is not None and own.group(1)) or (used is not None and name not in assigned):
                return False
            assigned.add(name)
    return True


def _dedent(body: str) -> str:
    """Without the indentation that all lines share, unless a quotation may run over several lines."""
    lines = body.split("\n")
    if any(line.count("'") % 2 or line.count('"') % 2 for line in lines):
        return body
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[margin:] for line in lines)


def _from_variable(draft: Draft) -> Draft:
    """`FOLD=${FOLD:-0}`: an array by hand. The one item is the script's own default; the others are the user's to add."""
    found: list[tuple[Statement, str, str]] = []
    for statement in draft.body:
        pair = assignment(statement.tokens[0].text) if len(statement.tokens) == 1 else None
        if pair is not None and pair[0].upper() in BY_HAND and (match := re.fullmatch(rf'"?\$\{{{pair[0]}:-(\d+)\}}"?', pair[1])):
            found.append((statement, pair[0], match.group(1)))
    if len(found) != 1:
        for statement, name, _ in found:
            draft = draft.hint(statement.first, f"{name} was given by hand at sbatch; write a fixed value, or foreach: and ${{MEDGEN_ITEM}}")
        return draft
    statement, name, default = found[0]
    draft = draft.put(statement, f'{name}="$MEDGEN_ITEM"').moved_line(statement.first, statement.text, "foreach")
    draft = replace(draft, foreach=(default,)).understood(f"{name} -> foreach: [{default}]")
    return draft.hint(statement.first, f"{name} was given by hand at sbatch ({name}=1 sbatch ...): foreach holds the default, add the others to it")
