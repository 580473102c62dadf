"""Where the slices of a published configuration lie, and what there is to do if medgen cannot read them from there. Used by job.py."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medgen.data.stacks import LABELS
from medgen.published.options import Note, Options


@dataclass(frozen=True)
class Data:
    """`root`: what data.root is to be; `name`: of the data set; `has_test`: a test side is there."""

    root: str
    name: str
    has_test: bool
    notes: tuple[Note, ...]


def data_of(options: Options) -> Data:
    """The common folder of NAME_train and NAME_test as it is; of anything else a folder of links, with the commands that make it."""
    train, test = options.data_train_directory, options.data_test_directory
    name = PurePosixPath(train).name.removesuffix("_train") or "data"
    ends = _labels_stand_beside(train, options.label_train_directory) and (not test or _labels_stand_beside(test, options.label_test_directory))
    if not test and ends:
        note = Note("DATA_TEST_DIRECTORY", "not given: there is no test side")
        return Data(train, name, False, (note,))
    parent = PurePosixPath(train).parent
    if ends and parent == PurePosixPath(test).parent and _is_side(train, "train") and _is_side(test, "test") and not Path(parent, LABELS).is_file():
        return Data(str(parent), name if name != "train" else parent.name or "data", True, ())
    root = f"data/{name}_linked"  # a folder of its own: beside NAME_train another train would be one too many
    commands = _links(root, "train", train, options.label_train_directory)
    commands += _links(root, "test", test, options.label_test_directory) if test else []
    note = Note("DATA_TRAIN_DIRECTORY", f"medgen reads train and test with a {LABELS} each from one folder; make it:\n" + "\n".join(commands))
    return Data(root, name, bool(test), (note,))


def _is_side(folder: str, side: str) -> bool:
    name = PurePosixPath(folder).name
    return name == side or name.endswith(f"_{side}")


def _labels_stand_beside(folder: str, labels: str) -> bool:
    """Nothing said is taken for yes: submit tells if it is not so."""
    return labels in ("", folder) or PurePosixPath(labels) == PurePosixPath(folder) / LABELS


def _links(root: str, side: str, folder: str, labels: str) -> list[str]:
    target = f"{root}/{side}"
    if _labels_stand_beside(folder, labels):
        return [f"mkdir -p {shlex.quote(root)} && ln -sr {shlex.quote(folder)} {shlex.quote(target)}"]
    table = labels if labels.endswith(".csv") else f"{labels}/{LABELS}"
    return [
        f"mkdir -p {shlex.quote(target)} && ln -sr {shlex.quote(folder)}/Real*.nii* {shlex.quote(target)}/",
        f"ln -sr {shlex.quote(table)} {shlex.quote(f'{target}/{LABELS}')}",
    ]
