"""DICOM files as scanners write them, for the tests of medgen/cardiac and of images with captions: one frame, or enhanced multi-frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

ORIENTATION, POSITION = [1, 0, 0, 0, 0.8, -0.6], [-120.5, -90.25, 33.0]


def values(rows: int = 24, columns: int = 20) -> np.ndarray:
    """From 900 to 4000, so that 12 bits hold them; no two neighbours are equal."""
    return np.linspace(900, 4000, rows * columns).astype(np.uint16).reshape(rows, columns)


def map_dataset(pixels: np.ndarray | None = None, image_type: tuple[str, ...] = ("DERIVED", "PRIMARY", "T1 MAP"), **attributes: Any) -> FileDataset:
    """As a Siemens scanner writes a T1 map: 12 of 16 bits, no rescale. An attribute of None is left out."""
    pixels = values() if pixels is None else pixels
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, MRImageStorage, generate_uid()
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.PatientID, dataset.PatientName, dataset.StudyDate = "MR", "P17", "Nobody", "20221122"
    dataset.ImageType, dataset.SeriesDescription = list(image_type), "MOCO"
    dataset.PixelSpacing, dataset.SliceThickness = [1.40625, 1.5], 8
    dataset.ImageOrientationPatient, dataset.ImagePositionPatient = ORIENTATION, POSITION
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    if pixels.dtype.kind == "f":
        dataset.BitsAllocated, dataset.FloatPixelData = 32, pixels.astype(np.float32).tobytes()
    else:
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12 if pixels.dtype == np.uint16 else 16, 11 if pixels.dtype == np.uint16 else 15
        dataset.PixelRepresentation, dataset.PixelData = int(pixels.dtype.kind == "i"), pixels.tobytes()
    for keyword, value in attributes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


def save(path: Path, dataset: FileDataset) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def item(**attributes: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def sequence(*items: Dataset) -> Sequence:
    return Sequence(items)


def real_world(unit: str, slope: float, intercept: float = 0.0) -> Sequence:
    code = item(CodeValue=unit, CodingSchemeDesignator="UCUM", CodeMeaning=unit)
    return sequence(item(RealWorldValueFirstValueMapped=0, RealWorldValueLastValueMapped=4095, RealWorldValueSlope=slope, RealWorldValueIntercept=intercept,
                         MeasurementUnitsCodeSequence=sequence(code), LUTLabel="map"))  # fmt: skip


def enhanced_dataset(frames: np.ndarray, **attributes: Any) -> FileDataset:
    """[n, H, W]: spacing and scale shared by all frames, positions and types of each its own, as in enhanced MR."""
    dataset = map_dataset(frames, ("DERIVED", "PRIMARY"), PixelSpacing=None, ImageOrientationPatient=None, ImagePositionPatient=None, SliceThickness=None)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    dataset.NumberOfFrames = len(frames)
    dataset.SharedFunctionalGroupsSequence = sequence(item(
        PixelMeasuresSequence=sequence(item(PixelSpacing=[1.875, 1.75], SliceThickness=6)),
        PlaneOrientationSequence=sequence(item(ImageOrientationPatient=ORIENTATION)),
        ReferencedImageSequence=sequence(item(PixelSpacing=[9, 9])),
        PixelValueTransformationSequence=sequence(item(RescaleSlope="0.5", RescaleIntercept="-10", RescaleType="ms")),
    ))  # fmt: skip
    dataset.PerFrameFunctionalGroupsSequence = Sequence([
        item(PlanePositionSequence=sequence(item(ImagePositionPatient=[0, 0, 24 * number])), MRImageFrameTypeSequence=sequence(item(FrameType=["DERIVED", "PRIMARY", kind])))
        for number, kind in zip(range(len(frames)), ["T1 MAP", "T2 MAP"] * len(frames), strict=False)
    ])  # fmt: skip
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset
