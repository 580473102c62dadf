"""A synthetic map as a DICOM file: values in its unit, geometry, identifiers of its own, and words that say what it is. Called by exports.py.

MR Image Storage, single frame, 12 of 16 bits as scanners write maps; what a stored value means stands in RescaleSlope, RescaleIntercept and RescaleType.
The same arguments give the same bytes. pydicom is loaded by the function."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np

from medgen.cardiac.map_type import UNIT, UNSCALED, MapType

LARGEST_STORED = 4095  # 12 bits
UID_ROOT = "2.25."  # of UIDs that are 128 random bits and need no registration (DICOM PS3.5, B.2)
DERIVATION = "synthetic: drawn by a diffusion model on the contours of a real slice"


@dataclass(frozen=True)
class Synthetic:
    """One image. values: float [rows, columns] in its unit, `highest` the largest that can occur; affine: 4 x 4, (row, column, 0) to the patient's mm, RAS.

    identity: what no other image has, for its UIDs; name: what stands where a patient would."""

    type: MapType
    values: np.ndarray
    highest: float
    affine: np.ndarray
    identity: str
    name: str


def scale_of(kind: MapType, highest: float) -> float:
    """The unit per stored value: as scanners have it, or coarser where 12 bits do not reach that far."""
    if kind == "cine":
        return highest / LARGEST_STORED
    return max(UNSCALED[kind], highest / LARGEST_STORED)


def stored_of(image: Synthetic) -> np.ndarray:
    """uint16 [rows, columns], 0 to 4095."""
    return np.rint(image.values / scale_of(image.type, image.highest)).clip(0, LARGEST_STORED).astype(np.uint16)


def uid_of(identity: str, what: str) -> str:
    return UID_ROOT + str(int.from_bytes(hashlib.sha256(f"{identity}/{what}".encode()).digest()[:16], "big"))


def name_of(identity: str, name: str) -> str:
    """What stands where a patient would: an archive takes files of one name for one patient's, whatever run they come from."""
    return f"synthetic_{hashlib.sha256(identity.encode()).hexdigest()[:8]}_{name}"


def dicom_bytes(image: Synthetic) -> bytes:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage

    stored = stored_of(image)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, MRImageStorage
    meta.MediaStorageSOPInstanceUID = UID(uid_of(image.identity, "image"))
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    shown = int(np.percentile(stored, 99)) or 1
    values: dict[str, object] = {
        "SpecificCharacterSet": "ISO_IR 100", "ImageType": ["DERIVED", "SECONDARY", _type_word(image.type), "SYNTHETIC"],
        "SOPClassUID": MRImageStorage, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID, "StudyDate": "", "StudyTime": "", "AccessionNumber": "",
        "Modality": "MR", "Manufacturer": "medgen", "ReferringPhysicianName": "", "SeriesDescription": f"{_series_word(image.type)}, synthetic",
        "DerivationDescription": DERIVATION, "PatientName": image.name, "PatientID": image.name, "PatientBirthDate": "", "PatientSex": "",
        "BodyPartExamined": "HEART",
        "ScanningSequence": "RM", "SequenceVariant": "NONE", "ScanOptions": "", "MRAcquisitionType": "2D", "RepetitionTime": "", "EchoTime": "", "EchoTrainLength": "",
        "StudyInstanceUID": uid_of(image.identity, "study"), "SeriesInstanceUID": uid_of(image.identity, "series"), "StudyID": "1", "SeriesNumber": "1",
        "InstanceNumber": "1", "FrameOfReferenceUID": uid_of(image.identity, "frame of reference"), "PositionReferenceIndicator": "", **_geometry(image.affine),
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": stored.shape[0], "Columns": stored.shape[1],
        "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0, "SmallestImagePixelValue": int(stored.min()), "LargestImagePixelValue": int(stored.max()),
        **_rescale(image), **_display(image, shown), "PixelData": stored.astype("<u2").tobytes(),
    }  # fmt: skip
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _type_word(kind: MapType) -> str:
    return "CINE" if kind == "cine" else f"{kind} MAP"


def _series_word(kind: MapType) -> str:
    return "cine" if kind == "cine" else f"{kind} map"


def _rescale(image: Synthetic) -> dict[str, object]:
    """Of maps: cine frames have no unit."""
    if UNIT[image.type] != "ms":
        return {}
    return {"RescaleIntercept": "0", "RescaleSlope": f"{scale_of(image.type, image.highest):.10g}", "RescaleType": "ms"}


def _display(image: Synthetic, shown: int) -> dict[str, object]:
    """Window of the display, in the unit after the rescale: from 0 to what 99 of 100 pixels stay below."""
    scale = scale_of(image.type, image.highest) if UNIT[image.type] == "ms" else 1.0
    width = max(1.0, shown * scale)
    return {"WindowCenter": f"{width / 2:.6g}", "WindowWidth": f"{width:.6g}"}


def _geometry(affine: np.ndarray) -> dict[str, object]:
    """DICOM counts in LPS: the first two axes of RAS turn round."""
    to_lps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3]
    row_mm, column_mm, thickness_mm = np.linalg.norm(affine[:3, :3], axis=0)
    along_rows, along_columns = to_lps[:, 0] / row_mm, to_lps[:, 1] / column_mm
    return {
        "ImageOrientationPatient": [f"{value:.10f}" for value in (*along_columns, *along_rows)], "ImagePositionPatient": [f"{value:.6f}" for value in to_lps[:, 3]],
        "PixelSpacing": [f"{row_mm:.8g}", f"{column_mm:.8g}"], "SliceThickness": f"{thickness_mm:.6g}",
    }  # fmt: skip
