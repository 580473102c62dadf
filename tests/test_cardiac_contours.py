"""Contour files of every format to the same curve, by their content; and everything that can be wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medgen.cardiac import contours_cvi42, contours_medis
from medgen.cardiac.contour_files import FIRST_PIXEL_CENTRE, read_contours
from medgen.cardiac.contours import Contour, OtherSizeError, SwappedError, on_image, polygon_area
from medgen.errors import InputError

EPICARDIUM = np.array([[10, 20], [30, 21.5], [28, 40], [9.5, 38]])  # column, row
ENDOCARDIUM = np.array([[14, 24], [25, 25], [24, 35], [14.5, 34.25]])
UID = "1.2.826.0.1.3680043.8.498.1"
ROWS, COLUMNS = 64, 48


def json_text(**changes: object) -> str:
    arrays: dict[str, object] = {
        "epicardial_contours_x": EPICARDIUM[:, 0].tolist(), "epicardial_contours_y": EPICARDIUM[:, 1].tolist(),
        "endocardial_contours_x": ENDOCARDIUM[:, 0].tolist(), "endocardial_contours_y": ENDOCARDIUM[:, 1].tolist(),
    }  # fmt: skip
    return json.dumps({key: value for key, value in {**arrays, **changes}.items() if value != "absent"})


def cvi42_curve(name: str, points: np.ndarray, finer: str = "4") -> str:
    listed = "".join(f"<List:item><Point:x>{x * 4:.0f}</Point:x><Point:y>{y * 4:.0f}</Point:y></List:item>" for x, y in points)
    size = f'<Hash:item Hash:key="SubpixelResolution">{finer}</Hash:item>' if finer else ""
    return f'<Hash:item Hash:key="{name}"><Hash:item Hash:key="Points">{listed}</Hash:item>{size}</Hash:item>'


def cvi42_text(*curves: str, declared: bool = True) -> str:
    """With and without declared prefixes: both are about."""
    names = ' xmlns:Hash="urn:hash" xmlns:List="urn:list" xmlns:Point="urn:point"' if declared else ""
    image = f'<Hash:item Hash:key="{UID}"><Hash:item Hash:key="Contours">{"".join(curves)}</Hash:item></Hash:item>'
    return f'<?xml version="1.0"?>\n<Workspace{names}>\n<Hash:item Hash:key="ImageStates">{image}</Hash:item></Workspace>'


def medis_text(blocks: list[tuple[int, np.ndarray]], resolution: str = "Image_resolution=192x256") -> str:
    lines = ["Study_id=1", resolution, "Slicethickness=8 mm"]
    for kind, points in blocks:
        lines += ["[XYCONTOUR]", f"2 13 {kind} 1.0", str(len(points)), *(f"{x * 4} {y * 4}" for x, y in points)]
    return "\n".join([*lines, "[POINT]", "0 0"])


def table_text(points: np.ndarray = EPICARDIUM, kind: str = "epicardium", extra: tuple[str, str] = ("", "")) -> str:
    return "\n".join([f"kind,column_px,row_px{extra[0]}", *(f"{kind},{x},{y}{extra[1]}" for x, y in points)]) + "\n"


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def the_epicardium(path: Path) -> Contour:
    return next(contour for contour in read_contours(path).contours if contour.kind == "epicardium")


FILES = {
    "json": ("Contours.json", json_text()),
    "sunnybrook": ("IM-0001-0048-ocontour-manual.txt", "\r\n".join(f"{x + 1:.2f} {y + 1:.2f} " for x, y in EPICARDIUM)),
    "cvi42": ("patient.cvi42wsx", cvi42_text(cvi42_curve("saepicardialContour", EPICARDIUM), cvi42_curve("saendocardialContour", ENDOCARDIUM))),
    "medis": ("patient.con", medis_text([(0, ENDOCARDIUM), (1, EPICARDIUM)])),
    "csv": ("contours.csv", table_text()),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("renamed", [False, True])
def test_every_format_gives_the_same_curve_by_its_content(tmp_path: Path, name: str, renamed: bool) -> None:
    file_name, text = FILES[name]
    found = read_contours(write(tmp_path, file_name if not renamed or name == "sunnybrook" else "unnamed.dat", text))
    contour = next(contour for contour in found.contours if contour.kind == "epicardium")
    assert found.format == name and contour.closed
    np.testing.assert_allclose(on_image(contour, ROWS, COLUMNS).points, EPICARDIUM, atol=1e-12)


def test_which_image_a_curve_belongs_to_is_kept(tmp_path: Path) -> None:
    images = {name: {contour.image for contour in read_contours(write(tmp_path, *FILES[name])).contours} for name in FILES}
    assert images == {"json": {""}, "sunnybrook": {"48"}, "cvi42": {UID}, "medis": {"2/13"}, "csv": {""}}


def test_only_sunnybrook_counts_from_one_and_the_user_may_say_otherwise(tmp_path: Path) -> None:
    assert {name for name, centre in FIRST_PIXEL_CENTRE.items() if centre != 0} == {"sunnybrook"}
    path = write(tmp_path, *FILES["csv"])
    np.testing.assert_allclose(read_contours(path, first_pixel_centre=0.5).contours[0].points, EPICARDIUM - 0.5)
    np.testing.assert_allclose(read_contours(write(tmp_path, *FILES["sunnybrook"]), first_pixel_centre=0).contours[0].points, EPICARDIUM + 1)


def test_open_and_foreign_curves_of_a_workspace(tmp_path: Path) -> None:
    curves = [cvi42_curve("saepicardialOpenContour", EPICARDIUM), cvi42_curve("lalaContour", ENDOCARDIUM), cvi42_curve("saendocardialContour", ENDOCARDIUM[:0], "")]
    for declared in (True, False):
        found = read_contours(write(tmp_path, "a.cvi42wsx", cvi42_text(*curves, declared=declared)))
        assert [(contour.kind, contour.closed) for contour in found.contours] == [("epicardium", False)] and found.ignored == {"lalaContour": 1}


def test_the_right_ventricle(tmp_path: Path) -> None:
    files = [("a.json", json_text(right_ventricular_contours_x=[1, 2, 1], right_ventricular_contours_y=[1, 1, 2])),
             ("b.con", medis_text([(5, ENDOCARDIUM), (2, EPICARDIUM)])),
             ("c.cvi42wsx", cvi42_text(cvi42_curve("sarvendocardialContour", EPICARDIUM)))]  # fmt: skip
    for name, text in files:
        assert "right_ventricle" in [contour.kind for contour in read_contours(write(tmp_path, name, text)).contours]
    assert read_contours(tmp_path / "b.con").ignored == {"right ventricular epicardium": 1}


def test_open_curves_and_several_images_in_a_table(tmp_path: Path) -> None:
    text = "kind,column_px,row_px,image,closed\n" + "".join(
        f"{kind},{x},{y},{image},{closed}\n" for image, kind, closed in (("a", "epicardium", "no"), ("b", "epicardium", "yes")) for x, y in EPICARDIUM
    )
    first, second = read_contours(write(tmp_path, "t.csv", text)).contours
    assert (first.image, first.closed, second.image, second.closed) == ("a", False, "b", True)


BROKEN = {
    "cut JSON": ("Contours.json", json_text()[:-20], "not readable JSON"),
    "JSON without y": ("Contours.json", json_text(epicardial_contours_y="absent"), "epicardial_contours_x is there, epicardial_contours_y is not"),
    "JSON of two lengths": ("Contours.json", json_text(endocardial_contours_x=[1, 2, 3]), "has 3 numbers, endocardial_contours_y has 4"),
    "JSON with words": ("Contours.json", json_text(epicardial_contours_x=[1, "two", 3, 4]), "epicardial_contours_x: entry 2 is 'two'"),
    "JSON with a huge number": ("Contours.json", json_text().replace("21.5", "1" + "0" * 400), "epicardial_contours_y: entry 2"),
    "JSON not a number": ("Contours.json", json_text().replace("21.5", "NaN"), r"point 2 is \(30, nan\)"),
    "JSON no object": ("Contours.json", '{"a": 1}', "unknown key 'a'; the keys are: epicardial_contours_x"),
    "JSON nested deeply": ("Contours.json", '{"a":' + "[" * 200_000, "not readable JSON"),
    "two points": ("IM-0001-0048-ocontour-manual.txt", "1 2\n3 4\n1 2\n", "at least 3 different points"),
    "points on a line": ("IM-0001-0048-ocontour-manual.txt", "1 2\n3 4\n5 6\n", "lie on one line"),
    "points without end": ("IM-0001-0048-ocontour-manual.txt", "1 2\n3 4\n5 9\n" * 7000, "has 21000 points, at most 20000"),
    "text line": ("IM-0001-0048-ocontour-manual.txt", "1 2\n3 4\nfive 6\n", r"manual.txt:3: expected two numbers"),
    "text of no kind": ("contour.txt", "1 2\n3 4\n5 7\n", "the name does not say which contour"),
    "papillary muscle": ("IM-0001-0048-p1contour-manual.txt", "1 2\n3 4\n5 7\n", "the name does not say which contour"),
    "Medis without size": ("a.con", medis_text([(1, EPICARDIUM)], "nothing"), "no line Image_resolution"),
    "Medis cut": ("a.con", medis_text([(1, EPICARDIUM)]).split("\n112")[0], r"a.con:\d+: the file ends"),
    "Medis heading": ("a.con", medis_text([(1, EPICARDIUM)]).replace("2 13 1", "2 x 1"), "a.con:5: expected `slice phase type`"),
    "Medis promise": ("a.con", medis_text([(1, EPICARDIUM)]).replace("\n4\n", "\n9\n"), r"line 6 promises 9 points"),
    "table kind": ("a.csv", table_text(kind="epi"), "a.csv:2: kind is 'epi'"),
    "table number": ("a.csv", table_text().replace("30.0", "thirty"), "a.csv:3: column_px is 'thirty'"),
    "table column": ("a.csv", table_text(extra=(",colour", ",red")), "unknown column 'colour'"),
    "table closed": ("a.csv", table_text(extra=(",closed", ",perhaps")), "closed is 'perhaps'; write yes or no"),
    "table size": ("a.csv", table_text(extra=(",image_rows", ",64")), "image_rows and image_columns"),
    "table of two minds": ("a.csv", table_text(extra=(",closed", ",yes")).replace("30.0,21.5,yes", "30.0,21.5,no"), "a.csv:3: closed is 'no', but 'yes' in line 2"),
    "XML cut": ("a.cvi42wsx", FILES["cvi42"][1][:-40], r"a.cvi42wsx:\d+: not readable XML"),
    "XML of another kind": ("a.cvi42wsx", "<svg></svg>", "no ImageStates"),
    "XML without scale": ("a.cvi42wsx", cvi42_text(cvi42_curve("saepicardialContour", EPICARDIUM, "")), "SubpixelResolution is missing"),
    "XML scale 0": ("a.cvi42wsx", cvi42_text(cvi42_curve("saepicardialContour", EPICARDIUM, "0")), "SubpixelResolution is '0'"),
    "XML point": ("a.cvi42wsx", FILES["cvi42"][1].replace("<Point:x>40<", "<Point:x>left<"), "Point:x is 'left'"),
    "XML nested deeply": ("a.cvi42wsx", "<a>" * 100_000, "more than 200 elements inside each other"),
    "empty": ("Contours.json", "\n", "the file is empty"),
    "binary workspace": ("a.cvi42ws", b"\x00\x01\x02binary", "export it as .cvi42wsx"),
    "a picture": ("a.json", b"\x89PNG\r\n", "no known contour format; the formats are:"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_told_with_its_place(tmp_path: Path, what: str) -> None:
    name, text, message = BROKEN[what]
    with pytest.raises(InputError, match=message) as error:
        read_contours(write(tmp_path, name, text))
    assert str(tmp_path / name) in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_contours(tmp_path / "Contours.json")


def test_an_entity_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    """Ten to the tenth letters would follow."""
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "lol"}">' for n in range(11))
    bomb = f'<?xml version="1.0"?><!DOCTYPE a [{entities}]><a Hash:key="ImageStates">&e10;</a>'
    outside = '<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>'
    for text in (bomb, outside):
        with pytest.raises(InputError, match="document type"):
            read_contours(write(tmp_path, "a.cvi42wsx", text))


@pytest.mark.parametrize("cut", range(0, 600, 23))
def test_a_file_cut_anywhere_ends_in_a_message_or_in_contours(tmp_path: Path, cut: int) -> None:
    for name, text in FILES.values():
        path = write(tmp_path, name, text[:cut])
        try:
            assert all(len(contour.points) >= 3 for contour in read_contours(path).contours)
        except InputError as error:
            assert str(path) in str(error)


def test_a_contour_of_another_image(tmp_path: Path) -> None:
    contour = the_epicardium(write(tmp_path, *FILES["json"]))
    with pytest.raises(OtherSizeError, match=r"reaches from column 9\.5 to 30 and from row 20 to 40, its image has 20 rows and 20 columns"):
        on_image(contour, 20, 20)
    with pytest.raises(SwappedError, match="rows and columns seem exchanged"):
        on_image(contour, 32, 48)  # 48 rows and 32 columns would do
    medis = the_epicardium(write(tmp_path, *FILES["medis"]))
    assert medis.grid_shape == (256, 192)
    for rows, columns, kind in ((48, 64, SwappedError), (60, 45, OtherSizeError), (64, 64, OtherSizeError), (512, 384, OtherSizeError)):
        with pytest.raises(kind, match="drawn on an image of 256 rows and 192 columns"):
            on_image(medis, rows, columns)
    table = write(tmp_path, "a.csv", table_text(extra=(",image_rows,image_columns", ",48,64")))
    with pytest.raises(SwappedError):
        on_image(the_epicardium(table), ROWS, COLUMNS)


def test_a_repeated_end_point_is_dropped() -> None:
    closed = Contour("epicardium", np.vstack([EPICARDIUM, EPICARDIUM[:1]]))
    np.testing.assert_array_equal(closed.points, EPICARDIUM)
    assert polygon_area(EPICARDIUM) == pytest.approx(353.5) and not closed.points.flags.writeable
    with pytest.raises(InputError, match="unknown kind 'aorta'; the kinds are: epicardium"):
        Contour("aorta", EPICARDIUM)  # type: ignore[arg-type]


def test_the_real_contours(sunnybrook: Path) -> None:
    """142 files: every one is read, and lies in its image of 256 x 256."""
    read = [read_contours(path) for path in sorted(sunnybrook.glob("contourfiles/*/*/*.txt"))]
    kinds = [contour.kind for file in read for contour in file.contours]
    assert (kinds.count("endocardium"), kinds.count("epicardium")) == (96, 46)
    for file in read:
        assert file.format == "sunnybrook" and file.contours[0].image == str(int(file.path.name[8:12]))
        raw = np.loadtxt(file.path)
        np.testing.assert_allclose(on_image(file.contours[0], 256, 256).points[:3], raw[:3] - 1)


def test_the_formats_know_what_is_in_them() -> None:
    assert contours_medis.KIND_OF == {0: "endocardium", 1: "epicardium", 5: "right_ventricle"}
    assert contours_cvi42.OPEN["saendocardialOpenContour"] == "endocardium"
