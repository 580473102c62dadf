"""The layout of the Sunnybrook Cardiac Data: link.csv, a folder of frames per patient_id, text contours per original_id; called by tree.py."""

from __future__ import annotations

import re
from pathlib import Path

from medgen import csv_files
from medgen.cardiac.candidates import FOREIGN, NO_IMAGE, Candidate, Offer, Skip
from medgen.cardiac.contours_sunnybrook import NAME
from medgen.cardiac.dicom import Told

LINK = "link.csv"
COLUMNS = {"the folder of frames": "patient_id", "the folder of contours": "original_id"}
NUMBER = re.compile(r"(\d+)$")


def recognises(root: Path) -> bool:
    return (root / LINK).is_file()


def offer(root: Path) -> Offer:
    """All frames are cine. Contours belong to the frame whose name ends in their number. Raises InputError if link.csv is damaged."""
    rows = csv_files.read_rows(root / LINK)
    csv_files.require_columns(root / LINK, list(rows[0][1]), COLUMNS)
    patient_of = {row["original_id"]: row["patient_id"] for _, row in rows}
    files = sorted(path for path in root.rglob("*") if path.is_file())
    frames: dict[tuple[str, int], list[Path]] = {}
    contours: dict[tuple[str, int], list[Path]] = {}
    skipped: list[Skip] = []
    for path in files:
        folders = path.relative_to(root).parts[:-1]
        patient = next((name for name in folders if name in patient_of.values()), None)
        original = next((name for name in folders if name in patient_of), None)
        number, named = NUMBER.search(path.stem), NAME.fullmatch(path.name)
        if patient and number and path.suffix.lower() == ".dcm":
            frames.setdefault((patient, int(number[1])), []).append(path)
        elif original and named and named[2].lower() in ("i", "o"):
            contours.setdefault((patient_of[original], int(named[1])), []).append(path)
        else:
            skipped.append(Skip(path, FOREIGN, "neither a frame nor a contour of the endocardium or epicardium of a patient of link.csv"))
    for key, paths in contours.items():
        if key not in frames:
            skipped += [Skip(path, NO_IMAGE, f"patient {key[0]} has no frame {key[1]}") for path in paths]
    candidates = [
        Candidate(path, patient, Told(type="cine"), tuple(contours.get((patient, number), ())), str(number))
        for (patient, number), paths in frames.items()
        for path in paths
    ]
    return Offer("sunnybrook", candidates, skipped)
