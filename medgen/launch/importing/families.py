"""Scripts that differ only in a few words become one stage with `foreach`. Used by verb.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from medgen.launch.importing.directives import MAGIC
from medgen.launch.importing.reading import Draft, Note
from medgen.launch.importing.shell import Statement, split
from medgen.launch.importing.words import names_in

PIECES = re.compile(r"[\w.]+|.", re.DOTALL)
MOST_VARIABLES = 4
LEAST_ALIKE = 0.9  # share of the pieces of `run` that all must have in common


@dataclass(frozen=True)
class Variable:
    """What differs from script to script: the places in the pieces of `run`, and the word of each script there."""

    name: str
    places: tuple[int, ...]
    words: tuple[str, ...]


def join_families(drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts, those of a family as one; in the order of the first of each."""
    groups: list[list[Draft]] = []
    for draft in drafts:
        family = next((group for group in groups if _differences([*group, draft]) is not None), None)
        if family is None:
            groups.append([draft])
        else:
            family.append(draft)
    starts = [_common_start([item.path.stem for item in group]) for group in groups]
    return [_as_one(group, start if starts.count(start) == 1 else _first_and_more(group)) for group, start in zip(groups, starts, strict=True)]


def _differences(drafts: Sequence[Draft]) -> list[Variable] | None:
    """What differs in `run`; None if they are no family: other resources, other lines, too much, or where bash cannot put a value."""
    first = drafts[0]
    if any(_fixed(draft) != _fixed(first) for draft in drafts) or first.foreach or first.directive("array") is not None:
        return None
    pieces = [PIECES.findall(_without_comments(draft)) for draft in drafts]
    if len({len(items) for items in pieces}) != 1:
        return None
    columns = {place: words for place, words in enumerate(zip(*pieces, strict=True)) if len(set(words)) > 1}
    if not columns or len(columns) > (1 - LEAST_ALIKE) * len(pieces[0]) or not all(_can_vary(pieces[0], place) for place in columns):
        return None
    if any(not re.fullmatch(r"[\w.]+", word) for words in columns.values() for word in words):
        return None
    by_words: dict[tuple[str, ...], list[int]] = {}
    for place, words in columns.items():
        by_words.setdefault(words, []).append(place)
    if len(by_words) > MOST_VARIABLES or len(set(zip(*by_words, strict=True))) < len(drafts):
        return None
    taken: set[str] = set()
    found = []
    for words, places in by_words.items():
        name = _name(pieces[0], places[0], names_in("".join(pieces[0])) | taken, alone=len(by_words) == 1)
        taken.add(name)
        found.append(Variable(name, tuple(places), words))
    return found if _all_expand(first, found, pieces[0]) else None


def _fixed(draft: Draft) -> tuple[object, ...]:
    return tuple(item.text for item in draft.directives), draft.setup, draft.env, draft.segments, draft.prefer, draft.login


def _without_comments(draft: Draft) -> str:
    return "\n".join(statement.text for statement in draft.body if statement.kind not in ("comment", "blank"))


def _can_vary(pieces: Sequence[str], place: int) -> bool:
    """A word that bash can put together: no variable's name, no number of a redirection, no command."""
    before = "".join(pieces[max(0, place - 2) : place])
    after = "".join(pieces[place + 1 : place + 2])
    return bool(before) and not before.endswith(("$", "${", "\n", "`", "$(", ";", "|", "&")) and after not in ("<", ">") and not (
        after == "=" and before.endswith((" ", "\t")) and "-" not in before
    )


def _name(pieces: Sequence[str], place: int, taken: set[str], alone: bool) -> str:
    """A name for the variable: the option or variable before the value."""
    if alone:
        return "MEDGEN_ITEM"
    before = "".join(pieces[max(0, place - 6) : place]).rsplit("\n", 1)[-1]
    words = re.findall(r"[A-Za-z]\w*", before)
    base = (words[-1] if words else "item").lower()
    return next(name for name in (f"its_{base}", *(f"its_{base}_{number}" for number in range(2, 99))) if name not in taken)


def _all_expand(draft: Draft, variables: Sequence[Variable], pieces: list[str]) -> bool:
    """No place lies in single quotes, in a here-document, or in anything that could not be followed."""
    text = "".join(pieces)
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    offsets = sorted(starts[place] for variable in variables for place in variable.places)
    position = 0
    for statement in split(text):
        inside = [offset - position for offset in offsets if position <= offset < position + len(statement.text)]
        if inside and (statement.kind == "opaque" or "<<" in statement.text or any(_in_single_quotes(statement, offset) for offset in inside)):
            return False
        position += len(statement.text) + 1
    return True


def _in_single_quotes(statement: Statement, offset: int) -> bool:
    """Counting quotes from the start of the statement; also true in a comment at the end of a line."""
    quote, position, text = "", 0, statement.text
    while position < offset:
        letter = text[position]
        if letter == "\\" and quote != "'":
            position += 2
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter == "#" and (position == 0 or text[position - 1] in " \t\n"):
            end = text.find("\n", position)
            if end < 0 or end > offset:
                return True
            position = end
        position += 1
    return quote == "'"


def _as_one(drafts: Sequence[Draft], stem: str) -> Draft:
    """`stem`: of the name of its file."""
    variables = _differences(drafts) if len(drafts) > 1 else None
    if variables is None:
        return drafts[0]
    first = drafts[0]
    draft = replace(first, body=_with_variables(first, variables), foreach=tuple(" ".join(words) for words in zip(*(item.words for item in variables), strict=True)))
    if len(variables) > 1:
        draft = draft.first(f'read -r {" ".join(item.name for item in variables)} <<< "$MEDGEN_ITEM"')
    hints = tuple(dict.fromkeys(Note(note.line, note.text) for item in drafts for note in item.hints))
    draft = replace(draft, name=_common_start([item.name for item in drafts]), path=first.path.with_name(f"{stem}{first.path.suffix}"), hints=hints)
    for number, item in enumerate(drafts):
        draft = draft.moved_line(0, f"{item.path.name} ({item.name})", f"item {number}: {draft.foreach[number]}")
        draft = _with_its_own_lines(draft, first, item)
    return draft.understood(f"{len(drafts)} scripts -> foreach: {len(drafts)}")


def _common_start(names: Sequence[str]) -> str:
    """`base_256` of base_256_1, base_256_12, ...; where they begin differently, the first and how many more."""
    same = 0
    while len(names) > 1 and same < len(names[0]) and all(name[: same + 1] == names[0][: same + 1] for name in names):
        same += 1
    return names[0][:same].rstrip("0123456789.").rstrip("_-.") or (names[0] if len(names) == 1 else f"{names[0]}_and_{len(names) - 1}_more")


def _first_and_more(drafts: Sequence[Draft]) -> str:
    return drafts[0].path.stem if len(drafts) == 1 else f"{drafts[0].path.stem}_and_{len(drafts) - 1}_more"


def _with_variables(draft: Draft, variables: Sequence[Variable]) -> tuple[Statement, ...]:
    """The body with ${name} in the places that differ."""
    names = {place: item.name for item in variables for place in item.places}
    place = 0
    body: list[Statement] = []
    for statement in draft.body:
        if statement.kind in ("comment", "blank"):
            body.append(statement)
            continue
        pieces = PIECES.findall(statement.text)
        text = "".join(f"${{{names[place + index]}}}" if place + index in names else piece for index, piece in enumerate(pieces))
        place += len(pieces) + 1  # the newline between statements
        body += [replace(item, first=statement.first, last=statement.last) for item in split(text)]
    return tuple(body)


def _with_its_own_lines(draft: Draft, first: Draft, item: Draft) -> Draft:
    """What only this script says: its comments, and what was moved out of it; its name and logs are told already."""
    known = {statement.text.strip() for statement in first.body} | {moved.text.strip() for moved in first.moved}
    for statement in item.body:
        if statement.kind == "comment" and statement.text.strip() not in known:
            draft = draft.moved_line(statement.first, statement.text, f"a comment of {item.path.name}")
    for moved in item.moved:
        if moved.text.strip() not in known and not moved.text.startswith(MAGIC):
            draft = draft.moved_line(moved.line, moved.text, f"{moved.where} (of {item.path.name})")
    return draft
