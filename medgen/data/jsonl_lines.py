"""Lines of a JSONL file, each one image with its caption and masks, checked by themselves; called by jsonl_index.py.

No file that a line names is opened here. What is wrong is collected, so that all of it can be told together."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgen.errors import InputError
from medgen.names import CONTROL, printable
from medgen.spec_data import SPLITS, DataSpec

KEYS = ("image_path", "caption", "mask_path", "patient", "label", "split", "id")
SHOWN = 10  # how many of many problems a message lists
SHOWN_CHARACTERS = 80
PATH_CHARACTERS = 4096  # no system takes a longer path


@dataclass(frozen=True)
class Line:
    """One image. `masks`: the file of each class that has one, in the order of data.regions; None where nothing is known, which is not "no lesion"."""

    file: Path
    number: int  # from 1
    image: Path
    caption: str
    masks: dict[str, Path] | None
    patient: str | None
    label: str | None
    split: str | None
    id: str | None

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"


@dataclass(frozen=True, order=True)
class Problem:
    """What is wrong with a line: what was found and what is allowed."""

    file: Path
    number: int
    text: str


def refuse(problems: Iterable[Problem]) -> None:
    """Raises InputError with the first problems, and how many more there are; nothing if there are none."""
    found = sorted(set(problems))
    if not found:
        return
    listed = [printable(f"{problem.file}:{problem.number}: {problem.text}") for problem in found[:SHOWN]]
    if len(found) == 1:
        raise InputError(listed[0])
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    raise InputError("\n  ".join([f"{len(found)} problems in lines of the data; mend them, or remove the lines:", *listed, *more]))


def read_lines(file: Path, data: DataSpec) -> tuple[list[Line], list[Problem]]:
    """Every line that is not blank, read or with what is wrong with it. Raises InputError if there is none, or the file cannot be read."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    rows = [(number, row.strip()) for number, row in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)]
    lines, problems = list[Line](), list[Problem]()
    for number, row in rows:
        if not row:
            continue
        found, told = parse_line(file, number, row, data)
        lines += [found] if found is not None else []
        problems += [Problem(file, number, text) for text in told]
    if not lines and not problems:
        raise InputError(f'{file}: no lines; write one JSON object per line, such as {{"image_path": "images/1.png", "caption": "..."}}')
    return lines, problems


def parse_line(file: Path, number: int, row: bytes, data: DataSpec) -> tuple[Line | None, list[str]]:
    """A line, or everything that is wrong with it. Whatever the bytes are, nothing is raised."""
    record = _object_of(row)
    if isinstance(record, str):
        return None, [record]
    problems = [_unknown_key(key) for key in record if key not in KEYS]
    texts = {key: _text(key, record.get(key), problems) for key in ("image_path", "patient", "label", "split", "id")}
    if record.get("image_path") is None:
        problems.append("no image_path; write the path of the image, counted from this file")
    image = _path(file, "image_path", texts["image_path"], problems)
    caption = _caption(record.get("caption"), texts["label"], data, problems)
    masks = _masks(file, record.get("mask_path"), data, problems)
    if texts["split"] is not None and texts["split"] not in SPLITS:
        problems.append(f"split is {_shown(texts['split'])}; write one of {', '.join(SPLITS)}")
    if problems or image is None or caption is None:
        return None, problems
    return Line(file, number, image, caption, masks, texts["patient"], texts["label"], texts["split"], texts["id"]), []


class _TwiceError(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values for one key JSON takes the last without a word."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(f"the key {_shown(key)} stands twice; keep one of them")
        found[key] = value
    return found


def _object_of(row: bytes) -> dict[str, Any] | str:
    """The object in a line, or what is wrong with it."""
    try:
        found = json.loads(row.decode("utf-8"), object_pairs_hook=_once)
    except _TwiceError as error:
        return str(error)
    except UnicodeDecodeError:
        return "not UTF-8; save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({str(error)[:SHOWN_CHARACTERS]}); write one object per line, such as {{\"image_path\": \"images/1.png\", \"caption\": \"...\"}}"
    if not isinstance(found, dict):
        return f"{_shown(found)} is no object; write one per line, such as {{\"image_path\": \"images/1.png\", \"caption\": \"...\"}}"
    return found


def _shown(value: Any) -> str:
    """As JSON writes it, cut; ASCII alone, so that half characters can be told too."""
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _unknown_key(key: str) -> str:
    close = difflib.get_close_matches(key[:SHOWN_CHARACTERS], KEYS, n=1)
    return f"unknown key {_shown(key)}{f'; did you mean {close[0]!r}?' if close else ''}; the keys are: {', '.join(KEYS)}"


def _text(key: str, value: Any, problems: list[str]) -> str | None:
    """A text, or a whole number as one; None for null. Paths are texts alone."""
    if value is None:
        return None
    if type(value) is int and key not in ("image_path", "split"):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        problems.append(f"{key} is {_shown(value)}; write a text{' or a whole number' if key in ('patient', 'label', 'id') else ''}{'' if key == 'image_path' else ', or leave it out'}")
        return None
    if not _encodable(value) or CONTROL.search(value):
        problems.append(f"{key} is {_shown(value)}, which holds characters that are no text; write it without them")
        return None
    return value


def _encodable(text: str) -> bool:
    """False where half of a character stands alone, as JSON can write it and no file can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _path(file: Path, key: str, text: str | None, problems: list[str]) -> Path | None:
    if text is None:
        return None
    if len(text.encode()) > PATH_CHARACTERS:
        problems.append(f"{key} has {len(text.encode())} bytes; no path is that long")
        return None
    return file.parent / text


def _caption(value: Any, label: str | None, data: DataSpec, problems: list[str]) -> str | None:
    """That of the line, else that of its label; white space in it is one space."""
    if value is None and label is not None and label in data.label_texts:
        return " ".join(data.label_texts[label].split())
    if value is None:
        known = f", or a label of data.label_texts ({', '.join(data.label_texts)})" if data.label_texts else ", or a label and data.label_texts: {label: caption}"
        problems.append(f"no caption{f' for the label {_shown(label)}' if label is not None else ''}; write one{known}")
        return None
    if not isinstance(value, str) or not value.strip():
        problems.append(f"caption is {_shown(value)}; write a text that is not empty, or leave it out where data.label_texts has one for the label")
        return None
    text = " ".join(value.split())
    if not _encodable(text) or CONTROL.search(text):
        problems.append(f"caption is {_shown(value)}, which holds characters that are no text; write it without them")
        return None
    return text


def _masks(file: Path, value: Any, data: DataSpec, problems: list[str]) -> dict[str, Path] | None:
    """The mask file of each class that has one, in the order of the classes; None if there is none."""
    names = data.region_names
    if value is None:
        return None
    if isinstance(value, str):
        if len(names) > 1:
            problems.append(f"mask_path is one path, and data.regions names {', '.join(names)}; write {{{json.dumps(names[0])}: path, ...}}")
            return None
        value = {names[0]: value}
    if not isinstance(value, dict) or not value:
        problems.append(f"mask_path is {_shown(value)}; write null (nothing known), the path of a mask, or {{{json.dumps(names[0])}: path or null}}")
        return None
    found: dict[str, Path] = {}
    for name, text in value.items():
        if name not in names:
            allowed = f"data.regions names {', '.join(names)}" if data.regions is not None else "data.regions names no classes: write regions: [...] in the spec, or the path alone"
            problems.append(f"mask_path has the class {_shown(name)}; {allowed}")
            continue
        if text is not None and not isinstance(text, str):
            problems.append(f"mask_path of {name} is {_shown(text)}; write a path, or null")
            continue
        path = _path(file, "mask_path", _text("mask_path", text, problems), problems)
        found |= {name: path} if path is not None else {}
    twice = sorted({str(path) for path in found.values() if list(found.values()).count(path) > 1})
    if twice:
        problems.append(f"mask_path gives {twice[0]} to several classes; each class has a file of its own")
    return {name: found[name] for name in names if name in found} or None
