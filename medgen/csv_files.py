"""Tables as people save them, checked line by line; read by medgen/data, medgen/cardiac and medgen/prepare, written by medgen/prepare."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from medgen import files
from medgen.errors import InputError


def read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, cells by column) of every line that is not blank; there is at least one.

    Raises InputError unless every line has exactly the columns of the header."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle, strict=True)
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable CSV file ({error}); save it as UTF-8 with commas") from None
    if len(lines) < 2:
        raise InputError(f"{path}: the file has no rows below the header")
    header = lines[0][1]
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise InputError(f"{path}: the columns are not separated by commas; save it with commas")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"{path}: the column {twice[0]!r} stands twice in the header; rename or remove one of them")
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise InputError(f"{path}:{number}: this line does not have the {len(header)} columns of the header; quote values with commas")
    return [(number, dict(zip(header, cells, strict=True))) for number, cells in lines[1:]]


def require_columns(path: Path, found: Sequence[str], wanted: Mapping[str, str]) -> None:
    """Raises InputError unless every column of `wanted` (what it is for: its name) is among those found."""
    for purpose, column in wanted.items():
        if column not in found:
            raise InputError(f"{path}: no column {column!r} (for {purpose}); the columns are: {', '.join(found)}")


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """One line per row under a header; read_rows gives the same cells back."""
    cells = [list(columns), *([str(row[column]) for column in columns] for row in rows)]
    # with this line end the csv module does not quote a carriage return, which would then end a line
    returns = any("\r" in cell for line in cells for cell in line)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL).writerows(cells)
    files.write_text(path, text.getvalue())
