"""Generated images as files for others: in their unit, without padding, as DICOM and NIfTI, the labels beside them. Called by generate.py.

The images that medgen itself goes on with stay what they are: squares in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medgen import files
from medgen.cardiac.dicom_writing import DERIVATION, Synthetic, dicom_bytes, name_of, scale_of, stored_of
from medgen.cardiac.map_type import TYPES, UNIT, MapType
from medgen.conditions import Condition
from medgen.data.image_files import nifti_bytes
from medgen.data.store import SliceStore
from medgen.spec_data import DataSpec

CINE_HIGHEST = 1.0  # cine frames have no unit: white is 1


@dataclass(frozen=True)
class Exports:
    """What is written of each image. `only_type`: of models that are not told the kind, of data with one."""

    formats: tuple[str, ...]
    data: DataSpec
    only_type: MapType | None
    identity: str  # of the run's stage and checkpoint: images of others have other UIDs

    @classmethod
    def of(cls, formats: Sequence[str], data: DataSpec, store: SliceStore, identity: str) -> Exports:
        """Where types are several the model is told which: conditions.require_possible has seen to that."""
        types = [kind for kind in TYPES if kind in set(store.rows["label"])]
        return cls(tuple(formats), data, types[0] if len(types) == 1 else None, identity)

    def write(self, folder: Path, below: Path, image: np.ndarray, condition: Condition, label: str | None, name: str) -> dict[str, dict[str, str]]:
        """Files of one image [H, W] in [0, 1], and their hashes, by what they are. `label`: its class."""
        if not self.formats:
            return {}
        kind = next(known for known in TYPES if known == (label or self.only_type))
        assert condition.inside is not None, "a slice of real data"
        top, bottom, left, right = condition.inside
        assert condition.affine is not None, "the spec exports what is drawn on slices alone"
        affine = condition.affine.copy()
        affine[:3, 3] += affine[:3, :2] @ [top, left]
        low, high = self.data.windows_ms[kind] if kind != "cine" else (0.0, CINE_HIGHEST)
        values = low + (high - low) * image[top:bottom, left:right].astype(np.float64)
        made = Synthetic(kind, values, high, affine, f"{self.identity}/{name}", name_of(self.identity, name))
        contents: dict[str, tuple[str, bytes]] = {}
        if "dicom" in self.formats:
            contents["dicom"] = "map.dcm", dicom_bytes(made)
        if "nifti" in self.formats:
            contents["nifti"] = "map.nii.gz", map_nifti_bytes(made)
        contents["labels"] = "labels.nii.gz", nifti_bytes(condition.channels["seg"][top:bottom, left:right].astype(np.uint8), affine)
        written = {}
        for what, (file, content) in contents.items():
            files.write_bytes(folder / below / file, content)
            written[what] = {"path": str(below / file), "sha256": files.sha256_bytes(content)}
        return written


def map_nifti_bytes(image: Synthetic) -> bytes:
    """The stored values of the DICOM file, with the slope that makes them the image's unit."""
    unit = "" if UNIT[image.type] != "ms" else " in ms"
    return nifti_bytes(stored_of(image), image.affine, scale_of(image.type, image.highest), f"{image.type}{unit}, {DERIVATION}")

