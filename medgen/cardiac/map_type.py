"""Whether an image is a T1 map, a T2 map or a cine frame, and what its values mean; called by dicom.py and tree.py. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from medgen.errors import InputError

MapType = Literal["T1", "T2", "cine"]
Region = Literal["apex", "mid", "base"]
TYPES: tuple[MapType, ...] = get_args(MapType)
REGIONS: tuple[Region, ...] = get_args(Region)

UNIT: dict[MapType, str] = {"T1": "ms", "T2": "ms", "cine": "1"}
# What one stored value means where the file itself says nothing. Siemens maps have no rescale tags: T1 is stored in ms (blood about 1475),
# T2 in tenths of a ms (muscle about 510, so 51 ms; a muscle of 510 ms does not exist). A manifest says otherwise in its column ms_per_value.
UNSCALED: dict[MapType, float] = {"T1": 1.0, "T2": 0.1, "cine": 1.0}

# What half of a myocardium's pixels can have, in ms, whatever the disease, the field strength or contrast agent: a unit that is wrong by ten lies outside
PLAUSIBLE_MS: dict[MapType, tuple[float, float]] = {"T1": (150.0, 3000.0), "T2": (15.0, 250.0)}

_IN_IMAGE_TYPE = re.compile(r"T([12])[ _-]?MAP")  # the whole value: T2* and T1RHO maps are other quantities
_IN_TEXT = re.compile(r"t([12])[ _-]*map|map[a-z]*[ _-]*t([12])(?![a-z0-9*])(?![ _-]*star)", re.IGNORECASE)  # not of T2*
_CINE = re.compile(r"(?<![a-z])cine(?![a-z])", re.IGNORECASE)
_REGION: dict[Region, re.Pattern[str]] = {
    "apex": re.compile(r"(?<![a-z])ap(?:ex|ical)(?![a-z])", re.IGNORECASE),
    "mid": re.compile(r"(?<![a-z])mid(?:dle|ventricular)?(?![a-z])", re.IGNORECASE),
    "base": re.compile(r"(?<![a-z])bas(?:e|al)(?![a-z])", re.IGNORECASE),
}


@dataclass(frozen=True)
class TypeFound:
    """`by`: manifest, ImageType, SeriesDescription or folder; `contradicted_by`: what a weaker source says instead, in words."""

    type: MapType
    by: str
    contradicted_by: str | None = None


def find_type(where: str, told: MapType | None, image_type: Sequence[str], description: str, folders: Sequence[str]) -> TypeFound:
    """The first of manifest, ImageType, SeriesDescription and folder that says it; `folders` are those below the data's root, the innermost first.

    Raises UnknownTypeError if none does, if the one that decides says two things, or if a name calls an acquired image a map."""
    says = {
        "manifest": {told} if told else set(),
        "ImageType": _of_image_type(image_type),
        "SeriesDescription": _of_text(description),
        "folder": next((found for found in map(_of_text, folders) if found), set()),
    }
    deciding = next((by for by, found in says.items() if found), None)
    if deciding is None:
        raise UnknownTypeError(f"{where}: neither T1 map, T2 map nor cine: ImageType is {'/'.join(image_type) or 'empty'}, SeriesDescription {description or 'empty'!r}, the folders are "
                               f"{', '.join(folders) or 'none'}; write its type into a manifest (columns image, contours, patient, type)")  # fmt: skip
    if len(says[deciding]) > 1:
        raise UnknownTypeError(f"{where}: {deciding} says both {' and '.join(sorted(says[deciding]))}; write its type into a manifest")
    (found,) = says[deciding]
    if found != "cine" and deciding in ("SeriesDescription", "folder") and "ORIGINAL" in image_type:
        raise UnknownTypeError(f"{where}: {deciding} says {found}, but ImageType is {'/'.join(image_type)}: an acquired image, such as the weighted ones that a map is computed from, "
                               "and no map; if it is one, write its type into a manifest")  # fmt: skip
    others = [f"{by} says {' and '.join(sorted(other))}" for by, other in says.items() if other and other != {found}]
    return TypeFound(found, deciding, ", ".join(others) or None)


class UnknownTypeError(InputError):
    """Nothing says, or several things say, what an image shows."""


def _of_image_type(values: Sequence[str]) -> set[MapType]:
    matched = (_IN_IMAGE_TYPE.fullmatch(value.strip().upper()) for value in values)
    return {"T1" if match[1] == "1" else "T2" for match in matched if match}


def _of_text(text: str) -> set[MapType]:
    found: set[MapType] = {"T1" if "1" in match.groups() else "T2" for match in _IN_TEXT.finditer(text)}
    return found or ({"cine"} if _CINE.search(text) else set())


def find_region(texts: Sequence[str]) -> Region | None:
    """The slice level that the first text with one names: file name, folder, description."""
    for text in texts:
        found = [region for region, pattern in _REGION.items() if pattern.search(text.replace("_", " "))]
        if len(found) == 1:
            return found[0]
    return None
