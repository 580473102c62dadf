"""DICOM files to maps in ms: scale, spacing, type and what each was taken from; real files of many encodings; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom.data
import pytest
from dicom_writing import (
    ORIENTATION,
    POSITION,
    enhanced_dataset,
    item,
    map_dataset,
    real_world,
    save,
    sequence,
    values,
)
from pydicom.uid import ImplicitVRLittleEndian, JPEGLSLossless

from medgen.cardiac.dicom import Header, Map, SpacingError, Told, UndecodableError, read_headers, read_map
from medgen.cardiac.map_type import UnknownTypeError, find_region, find_type
from medgen.errors import InputError

REAL = Path(pydicom.data.__file__).parent / "test_files"  # small files of pydicom's own, installed with it


def read(folder: Path, told: Told | None = None, **attributes: Any) -> Map:
    return read_map(read_headers(save(folder / "a.dcm", map_dataset(**attributes)), told or Told())[0])


def test_a_map_keeps_what_the_file_says(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert (found.type, found.type_from, found.unit, found.rows, found.columns) == ("T1", "ImageType", "ms", 24, 20)
    assert found.spacing_mm == (1.40625, 1.5) and found.spacing_from == "PixelSpacing" and found.slice_thickness_mm == 8
    assert found.orientation == tuple(ORIENTATION) and found.position_mm == tuple(POSITION)
    assert (found.patient, found.study_date, found.series_description) == ("P17", "20221122", "MOCO")
    assert found.pixels.dtype == np.float32 and found.pixels.shape == (24, 20)
    np.testing.assert_array_equal(found.pixels, values())


def test_the_scale_is_told_by_the_strongest_source(tmp_path: Path) -> None:
    t2 = ("DERIVED", "T2 MAP")
    cases: list[tuple[dict[str, Any], Told, float, float, str]] = [
        ({}, Told(), 1, 0, "the rule for T1"),
        ({"image_type": t2}, Told(), 0.1, 0, "the rule for T2 without scale: 0.1 ms"),
        ({"image_type": t2, "RescaleSlope": 1, "RescaleIntercept": 0, "RescaleType": "US"}, Told(), 0.1, 0, "the rule for T2"),  # says nothing
        ({"image_type": t2, "RescaleSlope": 1, "RescaleIntercept": 0, "RescaleType": "ms"}, Told(), 1, 0, "RescaleSlope, in ms"),
        ({"RescaleSlope": 2, "RescaleIntercept": -5}, Told(), 2, -5, "RescaleSlope, in ms as no unit is named"),
        ({"RescaleSlope": "0.0005", "RescaleIntercept": 0, "RescaleType": "s"}, Told(), 0.5, 0, "RescaleSlope, in s"),
        ({"RescaleSlope": 2, "RescaleIntercept": -5, "RealWorldValueMappingSequence": real_world("ms", 0.25, 3)}, Told(), 0.25, 3, "Real World"),
        ({"RealWorldValueMappingSequence": real_world("s", 0.002)}, Told(), 2, 0, "Real World"),
        ({"RealWorldValueMappingSequence": real_world("1", 7), "RescaleSlope": 3, "RescaleIntercept": 1}, Told(ms_per_value=0.5), 0.5, 0, "manifest"),
    ]
    for attributes, told, slope, intercept, said in cases:
        found = read(tmp_path, told, **attributes)
        np.testing.assert_allclose(found.pixels, values().astype(float) * slope + intercept, rtol=1e-6)
        assert found.unit_from.startswith(said) and found.unit == "ms"


@pytest.mark.parametrize(("attributes", "told", "message"), [
    ({"RealWorldValueMappingSequence": real_world("mm2/s", 7)}, Told(), "Real World Value Mapping has the unit mm2/s and no line to ms"),
    ({"RescaleSlope": 0, "RescaleIntercept": 0}, Told(), "RescaleSlope is 0; it must be above 0"),
    ({}, Told(type="cine", ms_per_value=0.1), "ms_per_value is given for a cine frame"),
])  # fmt: skip
def test_a_scale_that_cannot_be_is_refused(tmp_path: Path, attributes: dict[str, Any], told: Told, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, told, **attributes)


def test_signed_float_inverted_and_padded_pixels(tmp_path: Path) -> None:
    signed = values().astype(np.int16) - 1200
    np.testing.assert_array_equal(read(tmp_path, pixels=signed).pixels, signed)
    exact = values() + np.float32(0.625)
    np.testing.assert_array_equal(read(tmp_path, pixels=exact.astype(np.float32)).pixels, exact)
    np.testing.assert_array_equal(read(tmp_path, PhotometricInterpretation="MONOCHROME1").pixels, values())  # a map's values are no brightness
    np.testing.assert_array_equal(read(tmp_path, Told(type="cine"), PhotometricInterpretation="MONOCHROME1").pixels, 4095 - values().astype(int))
    np.testing.assert_array_equal(read(tmp_path, Told(type="cine"), pixels=signed, PhotometricInterpretation="MONOCHROME1").pixels, -1 - signed.astype(int))
    padded = signed.copy()
    padded[0, :4] = -2000
    np.testing.assert_array_equal(read(tmp_path, pixels=padded, PixelPaddingValue=-2000).pixels[0, :5], [0, 0, 0, 0, signed[0, 4]])
    with pytest.raises(InputError, match="1 pixels are no numbers"):
        read(tmp_path, pixels=np.where(exact == exact[3, 3], np.nan, exact).astype(np.float32))


def test_colours(tmp_path: Path) -> None:
    """A palette colours a map for display; coloured pixels, or a cine frame of palette numbers, have lost their values."""
    np.testing.assert_array_equal(read(tmp_path, PhotometricInterpretation="PALETTE COLOR").pixels, values())
    with pytest.raises(InputError, match="a cine frame with a palette"):
        read(tmp_path, Told(type="cine"), PhotometricInterpretation="PALETTE COLOR")
    with pytest.raises(InputError, match=r"a coloured picture \(RGB\): the values of the map are lost"):
        read(tmp_path, PhotometricInterpretation="RGB", SamplesPerPixel=3)


def test_enhanced_multi_frame(tmp_path: Path) -> None:
    """Frames of two types in one file; spacing, scale and orientation from the functional groups, positions from each frame's own."""
    frames = np.stack([values(), values() + 7, values() + 9])
    path = save(tmp_path / "a.dcm", enhanced_dataset(frames))
    headers = read_headers(path)
    assert [(header.frame, header.type, header.position_mm) for header in headers] == [(0, "T1", (0, 0, 0)), (1, "T2", (0, 0, 24)), (2, "T1", (0, 0, 48))]
    for header, stored in zip(headers, frames, strict=True):
        assert header.spacing_mm == (1.875, 1.75) and header.orientation == tuple(ORIENTATION) and header.slice_thickness_mm == 6
        np.testing.assert_allclose(read_map(header).pixels, stored * 0.5 - 10)
    per_frame = enhanced_dataset(frames)
    for number, group in enumerate(per_frame.PerFrameFunctionalGroupsSequence):
        group.RealWorldValueMappingSequence = real_world("ms", 1 + number)
        group.PixelMeasuresSequence = sequence(item(PixelSpacing=[1 + number, 2]))
    headers = read_headers(save(tmp_path / "b.dcm", per_frame))
    assert [header.spacing_mm[0] for header in headers] == [1, 2, 3] and [header.scale[0] for header in headers] == [1, 2, 3]
    with pytest.raises(InputError, match="NumberOfFrames is 3, but the functional groups are of 2 frames"):
        per_frame.PerFrameFunctionalGroupsSequence = per_frame.PerFrameFunctionalGroupsSequence[:2]
        read_headers(save(tmp_path / "c.dcm", per_frame))



@pytest.mark.parametrize(("view", "shape", "expected"), [
    ("FoV 315*360", (24, 20), None),  # neither order makes square pixels
    ("FoV 300*360", (20, 24), (15.0, 15.0)),
    ("FoV 360*300", (20, 24), (15.0, 15.0)),
    ("FoV 315.2*360", (21, 24), (315.2 / 21, 15.0)),
    ("unknown", (20, 24), None),
])  # fmt: skip
def test_spacing_of_private_tags_only(tmp_path: Path, view: str, shape: tuple[int, int], expected: tuple[float, float] | None) -> None:
    dataset = map_dataset(values(*shape), PixelSpacing=None)
    dataset.add_new(0x00510010, "LO", "SIEMENS MR HEADER")
    dataset.add_new(0x0051100B, "SH", "148p*256")
    dataset.add_new(0x0051100C, "SH", view)
    path = save(tmp_path / "a.dcm", dataset)
    if expected is None:
        with pytest.raises(SpacingError, match="no PixelSpacing"):
            read_headers(path)
    else:
        assert read_headers(path)[0].spacing_mm == expected and "private" in read_headers(path)[0].spacing_from
    dataset[0x00510010].value = "ANOTHER MAKER"
    with pytest.raises(SpacingError, match="without it no contour has a size"):
        read_headers(save(tmp_path / "b.dcm", dataset))


@pytest.mark.parametrize("spacing", [[0, 1.5], [1.5, -1], [1.5]])
def test_spacing_that_cannot_be(tmp_path: Path, spacing: list[float]) -> None:
    with pytest.raises(SpacingError, match="must be two numbers of mm above 0"):
        read(tmp_path, PixelSpacing=spacing)


def test_the_type_is_told_by_the_strongest_source() -> None:
    t1, t2, no = ["DERIVED", "T1 MAP"], ["DERIVED", "T2_MAP", "T1"], ["DERIVED", "T2* MAP", "T1"]
    assert find_type("a", "cine", t1, "T2_map", ()).by == "manifest"
    found = find_type("a", None, t1, "MyoT2_map", ("Apex", "T2_Mapping_"))
    assert (found.type, found.by, found.contradicted_by) == ("T1", "ImageType", "SeriesDescription says T2, folder says T2")
    assert find_type("a", None, t2, "", ()).type == "T2" and find_type("a", None, t2, "", ()).contradicted_by is None
    for text, kind in (("T1Map_LongT1_SAXs_MOCO_T1", "T1"), ("ShMOLLI_192i_T1map", "T1"), ("t2 maps", "T2"), ("MyoMaps_T2", "T2"), ("cine_SAX", "cine")):
        assert (find_type("a", None, no, text, ()).type, find_type("a", None, no, text, ()).by) == (kind, "SeriesDescription")
        assert find_type("a", None, no, "", ("x", text, "T1_Mapping_")).type == kind  # the innermost folder that says it
    for by, description, folders in (("SeriesDescription", "T1Map_LongT1_SAXs", ()), ("folder", "", ("T1_map_apex",))):
        with pytest.raises(UnknownTypeError, match=f"{by} says T1, but ImageType is ORIGINAL/PRIMARY/M: an acquired image"):  # what the map was computed from
            find_type("a", None, ["ORIGINAL", "PRIMARY", "M"], description, folders)
    assert find_type("a", "T1", ["ORIGINAL", "PRIMARY", "M"], "", ()).by == "manifest"
    for text in ("T2*_map", "T2star map", "map_T2star", "T1study", "medicine", ""):
        with pytest.raises(UnknownTypeError, match="neither T1 map, T2 map nor cine: ImageType is DERIVED"):
            find_type("a", None, no, text, (text,))
    with pytest.raises(UnknownTypeError, match="SeriesDescription says both T1 and T2"):
        find_type("a", None, no, "T1_map and T2_map", ())


def test_regions() -> None:
    cases = {"Apex": "apex", "Mid_2": "mid", "T1_map_base": "base", "SAX_basal": "base", "apical": "apex", "database": None, "apex to base": None, "amidst": None}
    assert {text: find_region([text]) for text in cases} == cases
    assert find_region(["apex to base", "T1_map_mid_"]) == "mid"


def test_a_contradiction_is_noted(tmp_path: Path) -> None:
    assert read(tmp_path, Told(folders=("T2_Mapping_",))).notes == ("taken as T1 by ImageType, but folder says T2",)


@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_expb.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm", "MR_small_padded.dcm"])
def test_encodings_of_one_image(name: str) -> None:
    """The same real image, signed, in six encodings."""
    found = read_map(read_headers(REAL / name, Told(type="T1"))[0])
    reference = read_map(read_headers(REAL / "MR_small.dcm", Told(type="T1"))[0])
    np.testing.assert_array_equal(found.pixels, reference.pixels)
    assert found.spacing_mm == (0.3125, 0.3125) and reference.pixels.max() == 2145


def test_a_file_without_preamble(tmp_path: Path) -> None:
    dataset = map_dataset()
    path = tmp_path / "bare.dcm"
    dataset.save_as(tmp_path / "whole.dcm", enforce_file_format=True)
    del dataset.file_meta, dataset.preamble
    dataset.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert path.read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(read_map(read_headers(path)[0]).pixels, values())


def test_compressed_without_a_decoder(tmp_path: Path) -> None:
    """Told from the header, before anything is trained."""
    dataset = map_dataset()
    path = save(tmp_path / "a.dcm", dataset)
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"\0\0"])
    try:
        read_headers(save(path, dataset))
    except UndecodableError as error:
        assert "compressed with JPEG-LS Lossless Image Compression (1.2.840.10008.1.2.4.80)" in str(error) and "pip install pylibjpeg pylibjpeg-libjpeg" in str(error)
    else:
        pytest.skip("this installation decodes JPEG-LS")


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "text.dcm").write_text("hello")
    (tmp_path / "empty.dcm").write_bytes(b"")
    for path, message in ((tmp_path / "none.dcm", "no such file"), (tmp_path / "text.dcm", "no DICOM image|not a readable"), (tmp_path / "empty.dcm", "no DICOM image|not a readable"),
                          (REAL / "rtplan.dcm", "Rows and Columns are missing"), (REAL / "badVR.dcm", "not a readable DICOM file")):  # fmt: skip
        with pytest.raises(InputError, match=message) as error:
            read_headers(path, Told(type="T1"))
        assert str(path) in str(error.value)
    with pytest.raises(InputError, match=r"cannot be decoded.*is the file cut short"):
        read_map(read_headers(REAL / "MR_truncated.dcm", Told(type="T1"))[0])
    with pytest.raises(InputError, match="the file has no pixels"):
        read(tmp_path, PixelData=None)


@pytest.mark.parametrize("share", [0.03, 0.2, 0.5, 0.8, 0.95])
def test_a_file_cut_anywhere_ends_in_a_message(tmp_path: Path, share: float) -> None:
    for name, dataset in (("a.dcm", map_dataset()), ("b.dcm", enhanced_dataset(np.stack([values()] * 2)))):
        path = save(tmp_path / name, dataset)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(InputError, match=name):
            read_map(read_headers(path)[0])


@pytest.mark.parametrize("orientation", [[2, 0, 0, 0, 2, 0], [0] * 6, [1, 0, 0, 1, 0, 0], [1, 0, 0, 0.5, 0.866, 0]])
def test_directions_that_are_none(tmp_path: Path, orientation: list[float]) -> None:
    """They would change the spacing, or leave the image without a place."""
    with pytest.raises(InputError, match=r"a.dcm: ImageOrientationPatient is .* two directions of length 1 at a right angle"):
        read(tmp_path, ImageOrientationPatient=orientation)


def test_rounded_directions_are_mended_and_no_thickness_is_none(tmp_path: Path) -> None:
    image = read(tmp_path, ImageOrientationPatient=[0.999, 0.003, 0, 0, 0.8, -0.6], SliceThickness=-8)
    assert image.orientation is not None and image.slice_thickness_mm is None
    assert np.allclose([np.linalg.norm(image.orientation[:3]), np.linalg.norm(image.orientation[3:])], 1, atol=1e-12)


def test_a_file_that_shrinks_between_header_and_pixels_says_so(tmp_path: Path) -> None:
    path = save(tmp_path / "a.dcm", map_dataset())
    (header,) = read_headers(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"a\.dcm: .*copy it again"):
        read_map(header)


def test_implicit_files_of_other_makers(tmp_path: Path) -> None:
    dataset = map_dataset()
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    dataset.save_as(tmp_path / "a.dcm", implicit_vr=True, little_endian=True, enforce_file_format=True)
    np.testing.assert_array_equal(read_map(read_headers(tmp_path / "a.dcm")[0]).pixels, values())


def test_the_real_frames(sunnybrook: Path) -> None:
    """Files of three makers, without a type: the user says cine."""
    paths = sorted(sunnybrook.glob("dicoms/*/*.dcm"))[::12]
    for path in paths:
        with pytest.raises(UnknownTypeError):
            read_headers(path, Told())
        header = read_headers(path, Told(type="cine"))[0]
        assert isinstance(header, Header) and (header.rows, header.columns, header.unit) == (256, 256, "1")
        assert header.spacing_mm[0] == header.spacing_mm[1] and 1.28 < header.spacing_mm[0] < 1.38 and header.patient == path.parent.name
        raw = pydicom.dcmread(path)
        np.testing.assert_array_equal(read_map(header).pixels, raw.pixel_array)
        assert header.position_mm == tuple(float(number) for number in raw.ImagePositionPatient)
