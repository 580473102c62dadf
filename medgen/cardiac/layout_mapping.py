"""The layout of the T1/T2 mapping cohorts: ROOT/<delivery date>/Patient (N)/T1_Mapping_/Apex.dcm with T1_map_apex/Contours.json; called by tree.py.

Without deliveries, ROOT/Patient (N)/..., it is the same. A map borrows the contours of the raw series of its level; the series itself is no map."""

from __future__ import annotations

import re
from pathlib import Path

from medgen.cardiac.candidates import (
    FOREIGN,
    NO_IMAGE,
    OTHER_OBSERVER,
    POST_CONTRAST,
    RAW_SERIES,
    SUPERSEDED,
    UNCORRECTED,
    Candidate,
    Offer,
    Skip,
)
from medgen.cardiac.dicom import Told
from medgen.cardiac.map_type import REGIONS, Region

DELIVERY = re.compile(r"\d{4}[_-]\d{2}[_-]\d{2}")
PATIENT = re.compile(r"Patient \((\d+)\)")
MAPS = re.compile(r"T([12])_Mapping_*", re.IGNORECASE)
SERIES = re.compile(r"T([12])_map_(apex|mid|base)_*", re.IGNORECASE)
LEFT_OUT = {"contrast": POST_CONTRAST, "uncorrected": UNCORRECTED}  # what the name of a folder ends in
CONTOURS = "Contours.json"
OTHER_CONTOURS = re.compile(r"Contours_\d+\.json")
AFTER_CONTRAST = re.compile(r"(apex|mid|base)_2", re.IGNORECASE)


def recognises(root: Path) -> bool:
    return any(_patients(folder) for folder in [root, *_deliveries(root)])


def offer(root: Path) -> Offer:
    """A patient in several deliveries is taken from the newest one as a whole, for its contours were drawn on those images."""
    folders: dict[str, list[Path]] = {}
    for place in [root, *_deliveries(root)]:
        for folder in _patients(place):
            folders.setdefault(folder.name, []).append(folder)
    candidates: list[Candidate] = []
    skipped: list[Skip] = []
    for older, newest in ((paths[:-1], paths[-1]) for paths in folders.values()):
        for folder in older:
            skipped += [Skip(path, SUPERSEDED, f"{newest.name} is in {newest.parent.name} too, which is newer") for path in _files(folder)]
        _sort_out(newest, candidates, skipped)
    inside = {folder for paths in folders.values() for folder in paths}
    skipped += [Skip(path, FOREIGN, "in no folder Patient (N)") for path in _files(root) if not inside & set(path.parents)]
    twice = sorted((name for name, paths in folders.items() if len(paths) > 1), key=lambda name: int(name[9:-1]))
    notes = [f"{len(twice)} patients are in several deliveries, the newest is used: {', '.join(twice[:5])}{' ...' if len(twice) > 5 else ''}"] if twice else []
    return Offer("mapping", candidates, skipped, notes)


def _deliveries(root: Path) -> list[Path]:
    """The oldest first."""
    found = [path for path in root.iterdir() if path.is_dir() and DELIVERY.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.name.replace("-", "_"), path.name))


def _patients(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_dir() and PATIENT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[9:-1]))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sort_out(folder: Path, candidates: list[Candidate], skipped: list[Skip]) -> None:
    """Every file of one patient goes into one of the two lists, but contours that a map takes."""
    files = _files(folder)
    contours = {key: path for path in files if path.name == CONTOURS for key in _series(path.parent.name)}
    taken: set[Path] = set()
    for path in files:
        place = path.parent.name
        reason = next((reason for ending, reason in LEFT_OUT.items() if place.rstrip("_").lower().endswith(ending)), None)
        mapping = MAPS.fullmatch(place)
        if reason:
            skipped.append(Skip(path, reason, f"the folder is {place}"))
        elif mapping and path.suffix.lower() == ".dcm":
            region = _region(path.stem)
            if AFTER_CONTRAST.fullmatch(path.stem):
                skipped.append(Skip(path, POST_CONTRAST, "a name that ends in _2 is the map after contrast"))
                continue
            own = [contours[key] for key in [(mapping[1], region)] if key in contours]
            taken.update(own)
            candidates.append(Candidate(path, folder.name, Told(region=region, folders=(place,)), tuple(own)))
        elif _series(place) and OTHER_CONTOURS.fullmatch(path.name):
            skipped.append(Skip(path, OTHER_OBSERVER, f"{CONTOURS} of the first observer is used"))
        elif _series(place) and path.name != CONTOURS and path.suffix.lower() in (".dcm", ""):
            skipped.append(Skip(path, RAW_SERIES, "the maps are in T1_Mapping_ and T2_Mapping_"))
        elif path not in contours.values():
            skipped.append(Skip(path, FOREIGN, "neither a map nor contours of one"))
    for key, path in contours.items():
        if path not in taken:
            skipped.append(Skip(path, NO_IMAGE, f"there is no T{key[0]}_Mapping_/{str(key[1]).capitalize()}.dcm"))


def _series(name: str) -> list[tuple[str, Region | None]]:
    """T1_map_mid_ is ("1", "mid"); nothing for a folder of another name."""
    found = SERIES.fullmatch(name)
    return [(found[1], _region(found[2]))] if found else []


def _region(name: str) -> Region | None:
    return next((region for region in REGIONS if region == name.lower()), None)
