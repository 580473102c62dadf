"""Which files belong to which patient and split, checked by name and header only; called by store.py and by submit.

Nothing here reads voxels or imports torch, so a wrong folder is told in seconds, before anything is queued."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medgen import csv_files
from medgen.data.splits import assign_splits
from medgen.data.stacks import Stack, open_stack, require_disjoint, require_subjects_of_every_class
from medgen.errors import InputError
from medgen.spec_data import PHANTOM_PATIENTS, SPLITS, DataSpec, SplitFractions

if TYPE_CHECKING:
    from medgen.cardiac.tree import Entry
    from medgen.data.jsonl_lines import Line

MASK = "seg"  # the role of the mask beside the channel names; the spec keeps this name free
SHOWN = 5  # how many of many problems a message lists


@dataclass(frozen=True)
class Source:
    """The files of one volume (or single slice) of one patient; `files` maps a channel name or "seg" to a path."""

    id: str
    patient: str
    split: str
    files: dict[str, Path]
    label: str | None = None
    caption: str | None = None
    number: int | None = None  # of a stack: which slice of its file this is ...
    label_number: int | None = None  # ... and the number that its labels.csv gives the class
    entry: Entry | None = None  # of a cardiac image: all that its files say
    line: Line | None = None  # of a JSONL file: the line, with the masks of the image

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file that decides what the slices are."""
        masks = (self.line.masks or {}).values() if self.line is not None else ()
        return (*self.files.values(), *(self.entry.contour_files[1:] if self.entry is not None else ()), *masks)

    @property
    def has_mask(self) -> bool:
        """False where nothing is known, which a line of a JSONL file may say."""
        return self.line.masks is not None if self.line is not None else MASK in self.files

    @property
    def place(self) -> int | None:
        """Which image of its file this is, where there are several."""
        return self.entry.header.frame if self.entry is not None else self.number


@dataclass(frozen=True)
class HeaderReport:
    """What a look at the headers tells; `shapes` and `spacings_mm` in RAS order, `slices` before any filter."""

    patients: dict[str, int]
    volumes: int
    slices: int
    shapes: list[tuple[int, ...]]
    spacings_mm: list[tuple[float, ...]]
    notes: list[str]
    classes: tuple[str, ...] = ()
    masked: tuple[int, int] | None = None  # images of the training split with a mask and without one, in data where that differs

    def text(self) -> str:
        """One line for the terminal."""
        splits = ", ".join(f"{count} {split}" for split, count in self.patients.items())
        shapes = " or ".join("x".join(str(count) for count in shape) for shape in self.shapes[:3])
        more = f" (and {len(self.shapes) - 3} other shapes)" if len(self.shapes) > 3 else ""
        return f"{sum(self.patients.values())} patients ({splits}), {self.slices} slices, {'images' if self.slices == self.volumes else 'volumes'} {shapes}{more}"


def check_headers(data: DataSpec, seed: int) -> HeaderReport:
    """Find every file and read its header. Raises InputError naming the patient or line for anything unusable."""
    if data.format == "phantom":
        return _phantom_report(data, seed)
    from medgen.data.volumes import Header, read_header, require_same_grid

    if data.format == "jsonl":
        return _jsonl_report(data, seed)
    sources, notes = read_index(data, seed)
    if data.format == "stack":
        return HeaderReport(patients_per_split(sources), len(sources), len(sources), [(data.size, data.size, 1)], [], notes, _classes(sources))
    if data.format == "cardiac":
        return _cardiac_report(sources, notes)
    first_headers: list[Header] = []
    slices = 0
    for source in sources:
        headers = [read_header(path) for path in source.files.values()]
        require_same_grid(f"patient {source.patient}", headers[0], headers[1:])
        first_headers.append(headers[0])
        slices += len(wanted_slices(data, source, headers[0].shape[headers[0].slice_axis(data.axis)]))
    return HeaderReport(
        patients=patients_per_split(sources),
        volumes=len(sources),
        slices=slices,
        shapes=[shape for shape, _ in Counter(header.shape for header in first_headers).most_common()],
        spacings_mm=sorted({tuple(round(step, 3) for step in header.spacing_mm) for header in first_headers}),
        notes=notes,
        classes=_classes(sources),
    )


def _cardiac_report(sources: list[Source], notes: list[str]) -> HeaderReport:
    headers = [source.entry.header for source in sources if source.entry is not None]
    shapes = Counter((header.columns, header.rows, 1) for header in headers)
    spacings = sorted({(round(header.spacing_mm[1], 3), round(header.spacing_mm[0], 3)) for header in headers})
    return HeaderReport(patients_per_split(sources), len(sources), len(sources), [shape for shape, _ in shapes.most_common()], list(spacings), notes, _classes(sources))


def _jsonl_report(data: DataSpec, seed: int) -> HeaderReport:
    from medgen.data.jsonl_index import read_checked

    assert data.root is not None, "the spec wants one"
    notes: list[str] = []
    sources, shapes = read_checked(data, data.root, seed, notes)
    masked = [source.has_mask for source in sources if source.split == "train"]
    in_order = [shape for shape, _ in Counter(shapes).most_common()]
    return HeaderReport(patients_per_split(sources), len(sources), len(sources), in_order, [], notes, _classes(sources), (sum(masked), len(masked) - sum(masked)))


def wanted_slices(data: DataSpec, source: Source, count: int) -> range:
    """Which slices along the axis are looked at. Raises InputError if the volume has not all that are asked for."""
    if data.slices is None:
        return range(0, count, data.every)
    first, last = data.slices
    if last >= count:
        raise InputError(f"patient {source.patient}: data.slices: [{first}, {last}], but {next(iter(source.files.values()))} has {count} slices, 0 to {count - 1}; "
                         "give a range that all volumes have, or content: the share of a slice that is not background")  # fmt: skip
    return range(first, last + 1, data.every)


def _classes(sources: list[Source]) -> tuple[str, ...]:
    """The labels there are: in the order of their numbers where a stack gives them some, else as `numbers_first` has them."""
    numbers = {source.label: source.label_number or 0 for source in sources if source.label is not None}
    return tuple(sorted(numbers, key=lambda label: (numbers[label], *numbers_first(label))))


def numbers_first(label: str) -> tuple[float, str]:
    """0, 1, 2, 10, AD, CN: labels that count are in the order of what they count."""
    try:
        return float(label), label
    except ValueError:
        return math.inf, label


def _phantom_report(data: DataSpec, seed: int) -> HeaderReport:
    from medgen.data.phantoms import DEFAULT_SHAPE, FIELD_OF_VIEW_MM, patient_names

    patients = phantom_patients(data)
    splits = assign_splits(patient_names(patients), data.splits.model_dump(), seed)
    spacing = tuple(field / count for field, count in zip(FIELD_OF_VIEW_MM, DEFAULT_SHAPE, strict=True))
    counts = {split: list(splits.values()).count(split) for split in SPLITS if split in splits.values()}
    slices = patients * DEFAULT_SHAPE[data.axis]
    return HeaderReport(counts, patients, slices, [DEFAULT_SHAPE], [spacing], [])


def phantom_patients(data: DataSpec) -> int:
    return data.patients if data.patients is not None else PHANTOM_PATIENTS


def patients_per_split(sources: list[Source]) -> dict[str, int]:
    return {
        split: len({source.patient for source in sources if source.split == split})
        for split in SPLITS
        if any(source.split == split for source in sources)
    }


def read_index(data: DataSpec, seed: int, root: Path | None = None) -> tuple[list[Source], list[str]]:
    """Every source in a fixed order, and notes for the user about what was assumed. `root` replaces data.root.

    Raises InputError if a file or column is missing, a patient is in two splits, an id stands twice or a split is empty."""
    place = root or data.root
    assert place is not None, "the spec gives every format but phantom a root"
    place = place.expanduser().absolute()
    notes: list[str] = []
    try:
        read = {"csv": _csv_sources, "stack": _stack_sources, "nifti": _folder_sources, "phantom": _folder_sources, "cardiac": _cardiac_sources, "jsonl": _jsonl_sources}[data.format]
        sources = read(data, place, seed, notes)
        _require_files(sources, place)
    except OSError as error:  # no permission, a network disk that is gone
        raise InputError(f"{error.filename or place}: cannot be read: {error.strerror}") from None
    return sources, notes


def roles(data: DataSpec) -> dict[str, str]:
    """File name or column of every channel and of the mask."""
    return {**data.images, **({MASK: data.mask} if data.mask is not None else {})}


# folders


def _folder_sources(data: DataSpec, root: Path, seed: int, notes: list[str]) -> list[Source]:
    if not root.is_dir():
        raise InputError(f"data.root: {root} is {'not a folder' if root.exists() else 'missing'}; give the folder that holds the patients")
    split_folders = [split for split in SPLITS if (root / split).is_dir()]
    if split_folders:
        folders = [(split, folder) for split in split_folders for folder in _patient_folders(root / split)]
        for split in split_folders:
            if not any(own == split for own, _ in folders):
                raise InputError(f"{root / split}: the split {split} is empty; put patient folders into it or remove it")
        notes += _unused_splits(data, f"{root} has the folders {', '.join(split_folders)}") if data.format != "phantom" else []
        if "train" not in split_folders:
            raise InputError(f"{root}: there is {', '.join(split_folders)} but no folder train; add it, or use no split folders at all")
    else:
        patients = _patient_folders(root)
        if not patients:
            raise InputError(f"{root}: no patient folders; expected {root}/<patient>/{next(iter(roles(data).values()))} or the same below train, val, test")
        drawn = assign_splits([folder.name for folder in patients], data.splits.model_dump(), seed)
        folders = sorted(((drawn[folder.name], folder) for folder in patients), key=lambda item: (SPLITS.index(item[0]), item[1].name))
        notes.append(f"{root} has no train, val and test folders: patients were split by data.splits and the seed")
    sources = [
        Source(folder.name, folder.name, split, {role: folder / name for role, name in roles(data).items()})
        for split, folder in folders
    ]
    _require_disjoint(sources, root)
    return sources


def _unused_splits(data: DataSpec, given: str) -> list[str]:
    """A note if shares were asked for and the data have their own."""
    if data.splits == SplitFractions():
        return []
    return [f"{given}: that decides the splits, and data.splits is not used"]


def _patient_folders(root: Path) -> list[Path]:
    """Folders in name order; stray files and hidden folders do not count."""
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


# CSV


def _csv_sources(data: DataSpec, path: Path, seed: int, notes: list[str]) -> list[Source]:
    if not path.is_file():
        raise InputError(f"data.root: {path} is {'not a file' if path.exists() else 'missing'}; format: csv needs the CSV file")
    lines = csv_files.read_rows(path)
    columns = list(lines[0][1])
    csv_files.require_columns(path, columns, roles(data))
    if "patient" in columns and data.patient_pattern is not None:
        raise InputError(f"data.patient_pattern has no effect: {path} has a column patient; remove one of them")
    if "patient" not in columns and data.patient_pattern is None:
        notes.append(f"{path} has no column patient: each file name counts as a patient of its own")
        _require_different_names(data, path, lines)
    patients = [_csv_patient(data, path, number, row) for number, row in lines]
    if "split" in columns:
        splits = [_csv_split(path, number, row) for number, row in lines]
        notes += _unused_splits(data, f"{path} has a column split")
    else:
        drawn = assign_splits(patients, data.splits.model_dump(), seed)
        splits = [drawn[patient] for patient in patients]
        notes.append(f"{path} has no column split: patients were split by data.splits and the seed")
    sources = []
    single = Counter(patients)
    for (number, row), patient, split in zip(lines, patients, splits, strict=True):
        source_files = {role: _csv_file(path, number, column, row[column]) for role, column in roles(data).items()}
        stem = _stem(next(iter(source_files.values())))
        name = row.get("id") or (patient if single[patient] == 1 or stem == patient else f"{patient}_{stem}")
        sources.append(Source(name, patient, split, source_files, row.get("label") or None, row.get("caption") or None))
    _require_disjoint(sources, path)
    _require_unique(path, [number for number, _ in lines], sources)
    if not any(source.split == "train" for source in sources):
        raise InputError(f"{path}: no line has split train; the splits there are: {', '.join(sorted(set(splits)))}")
    return sorted(sources, key=lambda source: SPLITS.index(source.split))


def _csv_patient(data: DataSpec, path: Path, number: int, row: dict[str, str]) -> str:
    if "patient" not in row:
        file = Path(row[_first_column(data)])
        return _stem(file) if data.patient_pattern is None else _patient_in(file, data.patient_pattern, path, number)
    if not row["patient"]:
        raise InputError(f"{path}:{number}: the patient is empty; splits are by patient, so every line needs one")
    return row["patient"]


def _first_column(data: DataSpec) -> str:
    """Of the file that tells the patient, where nothing else does."""
    return next(iter(roles(data).values()))


def _require_different_names(data: DataSpec, path: Path, lines: list[tuple[int, dict[str, str]]]) -> None:
    """sub-01/T1.nii.gz and sub-02/T1.nii.gz are two patients, or two visits of one: only who wrote the table knows."""
    first: dict[str, tuple[int, str]] = {}
    for number, row in lines:
        text = row[_first_column(data)]
        line, other = first.setdefault(_stem(Path(text)), (number, text))
        if other != text:
            raise InputError(f"{path}:{number}: {text} and {other} in line {line} have one name, so that it cannot tell whose they are; "
                             "give the table a column patient, or write data.patient_pattern, such as '(sub-[0-9]+)', which is also searched in the folders")  # fmt: skip


def _patient_in(file: Path, pattern: str, path: Path, number: int) -> str:
    """In the file's name, else in its path as the table has it."""
    for text in (file.name, str(file)):
        found = re.search(pattern, text)
        if found is not None and found[1]:
            return found[1]
    raise InputError(f"{path}:{number}: data.patient_pattern {pattern!r} finds no patient in '{file}'")


def _csv_split(path: Path, number: int, row: dict[str, str]) -> str:
    if row["split"] not in SPLITS:
        raise InputError(f"{path}:{number}: split is {row['split']!r}; write one of {', '.join(SPLITS)}")
    return row["split"]


def _csv_file(path: Path, number: int, column: str, text: str) -> Path:
    """Paths count from the folder of the CSV file."""
    if not text:
        raise InputError(f"{path}:{number}: {column} is empty; give a file or remove the line")
    return path.parent / Path(text).expanduser()


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[0] or path.name


# stacks


def _stack_sources(data: DataSpec, root: Path, seed: int, notes: list[str]) -> list[Source]:
    """One source per slice, in the order of the files."""
    sides = _stack_sides(root)
    stacks = {split: open_stack(folder) for split, folder in sides.items()}
    for first, second in itertools.combinations(stacks.values(), 2):
        require_disjoint(first, second)
    require_subjects_of_every_class(stacks["train"], 2 if data.splits.val > 0 and "val" not in stacks else 1)
    sources = []
    for split, stack in stacks.items():
        if stack.channels != len(data.images):
            raise InputError(f"data.images names {len(data.images)} channels, the slices of {stack.folder} have {stack.channels}; "
                             "write {image: 0} for grey ones, {red: 0, green: 1, blue: 2} for coloured ones")
        if data.size not in stack.files:
            raise InputError(f"data.size: {stack.folder} has no slices of {data.size} px; the sizes there are: {', '.join(map(str, stack.sizes))}")
        drawn = _drawn_by_class(stack, data, seed, tuple(stacks)) if split == "train" else dict.fromkeys(stack.subjects, split)
        sources += [
            Source(f"{split}_{number:06d}", subject, drawn[subject], dict.fromkeys(data.images, stack.files[data.size]), stack.class_names[label], None, number, int(label))
            for number, (subject, label) in enumerate(zip(stack.subjects, stack.labels, strict=True))
        ]
    if "val" not in stacks and data.splits.val > 0:
        notes.append(f"{root} has no val side: {data.splits.val:.0%} of the training subjects of each class were drawn for it by data.splits and the seed")
    return sorted(sources, key=lambda source: SPLITS.index(source.split))


def _stack_sides(root: Path) -> dict[str, Path]:
    """The folder of each split: the root alone, or train, val and test in it, or <name>_train and <name>_test."""
    if (root / "labels.csv").is_file():
        return {"train": root}
    if not root.is_dir():
        raise InputError(f"data.root: {root} is {'not a folder' if root.exists() else 'missing'}; give the folder with labels.csv, or with train and test")
    sides: dict[str, Path] = {}
    for split in SPLITS:
        found = sorted(path for path in root.iterdir() if path.is_dir() and (path.name == split or path.name.endswith(f"_{split}")))
        if len(found) > 1:
            raise InputError(f"{root}: {found[0].name} and {found[1].name} could both be the side {split}; keep one")
        sides |= {split: found[0]} if found else {}
    if "train" not in sides:
        raise InputError(f"{root}: neither labels.csv nor a folder train or <name>_train; `medgen prepare stack` makes them")
    return sides


def _drawn_by_class(stack: Stack, data: DataSpec, seed: int, sides: tuple[str, ...]) -> dict[str, str]:
    """The split of each subject of the training side: what has no side of its own is drawn from every class alike, whole subjects."""
    shares = {split: getattr(data.splits, split) if split == "train" or split not in sides else 0.0 for split in SPLITS}
    shares["test"] = 0.0  # never drawn in silence: what is to be a test is set aside before anything is looked at
    class_of = {subject: int(label) for subject, label in zip(stack.subjects, stack.labels, strict=True)}  # of the last slice, if they differ
    drawn: dict[str, str] = {}
    for label in sorted(set(class_of.values())):
        drawn |= assign_splits([subject for subject in class_of if class_of[subject] == label], {name: share / sum(shares.values()) for name, share in shares.items()}, seed)
    return drawn


# cardiac images with contours


def _cardiac_sources(data: DataSpec, root: Path, seed: int, notes: list[str]) -> list[Source]:
    """One source per image; its type is its label."""
    from medgen.cardiac.tree import read_tree

    index = read_tree(root)
    entries = [entry for entry in index.entries if data.types is None or entry.header.type in data.types]
    if not entries:
        there = ", ".join(sorted({entry.header.type for entry in index.entries})) or "none"
        wanted = f" of type {' or '.join(data.types)}" if data.types is not None else ""
        raise InputError(f"{index.report()}\n{root}: no image{wanted} with contours is left; the types there are: {there}")
    notes += index.notes
    if index.skipped:
        counted = ", ".join(f"{count} {reason}" for reason, count in index.reasons().items())
        notes.append(f"{len(index.skipped)} files were left out: {counted}; `medgen data` lists each with its reason")
    drawn = assign_splits([entry.patient for entry in entries], data.splits.model_dump(), seed)
    sources = [
        Source(entry.id, entry.patient, drawn[entry.patient], {"image": entry.header.source, MASK: entry.contour_files[0]}, entry.header.type, entry=entry)
        for entry in entries
    ]
    return sorted(sources, key=lambda source: SPLITS.index(source.split))


# images with captions


def _jsonl_sources(data: DataSpec, root: Path, seed: int, notes: list[str]) -> list[Source]:
    """One source per line."""
    from medgen.data.jsonl_index import read_sources

    return read_sources(data, root, seed, notes)


# checks


def _require_files(sources: list[Source], root: Path) -> None:
    missing = [(source, role, path) for source in sources for role, path in source.files.items() if not path.is_file()]
    if missing:
        listed = "\n".join(f"  patient {source.patient}, {role}: {path}" for source, role, path in missing[:SHOWN])
        more = f"\n  and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise InputError(f"{root}: {len(missing)} file(s) are missing:\n{listed}{more}\nAdd them, or remove these patients")


def _require_disjoint(sources: list[Source], root: Path) -> None:
    seen: dict[str, str] = {}
    for source in sources:
        if seen.setdefault(source.patient, source.split) != source.split:
            raise InputError(
                f"{root}: patient {source.patient} is in {seen[source.patient]} and in {source.split}; "
                "the test result would be too good: keep each patient in one split"
            )


def _require_unique(path: Path, numbers: list[int], sources: list[Source]) -> None:
    names: dict[str, int] = {}
    images: dict[Path, int] = {}
    for number, source in zip(numbers, sources, strict=True):
        first_file = next(iter(source.files.values()))
        if images.setdefault(first_file, number) != number:
            raise InputError(f"{path}:{number}: {first_file} stands in line {images[first_file]} already; keep one of them")
        if names.setdefault(source.id, number) != number:
            raise InputError(f"{path}:{number}: the id {source.id} stands in line {names[source.id]} already; give each line its own in a column id")
