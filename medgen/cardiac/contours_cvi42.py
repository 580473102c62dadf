"""Circle cvi42 workspaces exported as XML (.cvi42wsx); called by contour_files.py.

Below `ImageStates` stands an element per image, its Hash:key the SOP Instance UID; its `Contours` hold an element per curve with `Points`
(Point:x, Point:y) on a grid that is `SubpixelResolution` times finer than the pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

import numpy as np

from medgen.cardiac.contours import Contour, Kind
from medgen.errors import InputError

# Not published. Scripts known to read these files divide by SubpixelResolution and fill on integer pixel centres, which is this.
FIRST_PIXEL_CENTRE = 0.0
CLOSED: dict[str, Kind] = {"saepicardialContour": "epicardium", "saendocardialContour": "endocardium", "sarvendocardialContour": "right_ventricle"}
OPEN: dict[str, Kind] = {name.replace("Contour", "OpenContour"): kind for name, kind in CLOSED.items()}
DEEPEST = 200  # elements inside each other; a workspace has about fifteen


@dataclass
class Element:
    """`name` as written, with its prefix; `key` its Hash:key; `text` what stands directly in it."""

    name: str
    key: str
    line: int
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self) -> Iterator[Element]:
        """Itself and everything below, in the order of the file; no deeper than DEEPEST, which _tree sees to."""
        yield self
        for child in self.children:
            yield from child.all()

    def child(self, key: str) -> Element | None:
        return next((child for child in self.children if child.key == key), None)


class _Refused(Exception):
    """What a workspace never holds; raised inside the parser, told by parse."""


def parse(path: Path, content: bytes) -> tuple[list[Contour], list[str]]:
    """The short-axis contours, and the names of all other curves. Raises InputError naming the line.

    A file with a document type is refused before anything in it is expanded: no workspace has one, and entities can grow without end."""
    try:
        root = _tree(content)
    except expat.ExpatError as error:
        raise InputError(f"{path}:{error.lineno}: not readable XML ({expat.errors.messages[error.code]}); is the file cut short? "
                         "export the workspace again as .cvi42wsx") from None  # fmt: skip
    except _Refused as refusal:
        raise InputError(f"{path}: {refusal}; export the workspace again from cvi42 as .cvi42wsx") from None
    states = [element for element in root.all() if element.key == "ImageStates"]
    if not states:
        raise InputError(f"{path}: no ImageStates, so this is no cvi42 workspace; export it from cvi42 as .cvi42wsx")
    contours: list[Contour] = []
    others: list[str] = []
    for image in (image for state in states for image in state.children):
        for curve in (curve for group in image.children if group.key == "Contours" for curve in group.children):
            kind = CLOSED.get(curve.key) or OPEN.get(curve.key)
            if kind is None:
                others.append(curve.key)
                continue
            points = _points(path, curve)
            if len(points):
                contours.append(Contour(kind, points, curve.key in CLOSED, image.key, source=f"{path}:{curve.line}: {curve.key}"))
    return contours, others


def _tree(content: bytes) -> Element:
    """By hand and without namespaces: some exports use the prefixes Hash: and Point: without declaring them."""
    parser = expat.ParserCreate()
    root = Element("", "", 0)
    stack = [root]

    def start(name: str, attributes: dict[str, str]) -> None:
        if len(stack) > DEEPEST:
            raise _Refused(f"line {parser.CurrentLineNumber}: more than {DEEPEST} elements inside each other; this is no cvi42 workspace")
        element = Element(name, attributes.get("Hash:key", ""), parser.CurrentLineNumber)
        stack[-1].children.append(element)
        stack.append(element)

    def end(name: str) -> None:
        stack.pop()

    def text(data: str) -> None:
        stack[-1].text += data

    def doctype(*unused: object) -> None:
        raise _Refused(f"line {parser.CurrentLineNumber}: a document type (<!DOCTYPE), which no cvi42 workspace has")

    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    parser.StartDoctypeDeclHandler = doctype
    parser.Parse(content, True)
    return root


def _points(path: Path, curve: Element) -> np.ndarray:
    """[N, 2] in pixels of the image; N is 0 for a curve that was deleted."""
    listed = curve.child("Points")
    points = [tuple(_number(path, point, axis) for axis in ("Point:x", "Point:y")) for point in (listed.children if listed else [])]
    if not points:
        return np.empty((0, 2))
    finer = curve.child("SubpixelResolution")
    if finer is None or not finer.text.strip().isdecimal() or not 1 <= int(finer.text.strip()[:9]) <= 1000:
        given = "missing" if finer is None else repr(finer.text.strip()[:40])
        raise InputError(f"{path}:{curve.line}: {curve.key}: SubpixelResolution is {given}; it must be a whole number from 1 to 1000, "
                         "else the size of the contour is unknown; export the workspace again")  # fmt: skip
    return np.array(points, np.float64) / int(finer.text)


def _number(path: Path, point: Element, axis: str) -> float:
    text = next((element.text for element in point.all() if element.name == axis), "")
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{path}:{point.line}: {axis} is {text[:40]!r}; it must be a number; export the workspace again") from None
