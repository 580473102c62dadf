"""`medgen classify`: the classes of images by a trained model, and how right it is where the truth is known. Called by cli.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medgen import checkpoint, commits, csv_files, files, plan, rundir, spec
from medgen.checkpoint import Checkpoint
from medgen.data import stacks
from medgen.errors import InputError
from medgen.evaluate import classification
from medgen.evaluate.classification import Classifier, Estimate, Performance
from medgen.prepare.page import Table
from medgen.rundir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PREDICTIONS, PERFORMANCE, PICTURE = "predictions.csv", "performance.json", "performance.png"
SEED = 42  # of the bootstrap
CURVE_BINS = 10  # of the calibration plot, of equal numbers of images


@dataclass(frozen=True)
class Truth:
    """labels: int64 [n], by the classes of the model; subjects [n]."""

    path: Path
    labels: np.ndarray
    subjects: np.ndarray


def classify(which: str, images: Path, stage: str | None, selector: str, labels: Path | None, out: Path) -> str:
    """Write predictions.csv into the new folder `out`, and how right they are where labels are known; returns that in words.

    which: a run, or the folder of a checkpoint. images: a NIfTI stack, or a folder of such. Raises InputError."""
    files.require_new(out)
    classifier = classification.load(_checkpoint(which, stage, selector))
    path = _file_of_size(images, classifier.model.judged_size)
    arrays = stacks.read_images(path)
    _check_shape(path, arrays, classifier)
    truth = _truth(path, labels, len(arrays), classifier.classes)
    probabilities = classifier.predict({name: (arrays[:, place] + 1) / 2 for place, name in enumerate(classifier.channels)})
    lines = [f"{len(arrays)} images of {path}, classified by {classifier.found.folder} ({classifier.model.judged_size} px)"]
    with files.folder_in_one_move(out) as folder:
        _write_predictions(folder / PREDICTIONS, classifier.classes, probabilities, truth)
        if truth is None:
            lines += ["", _counts(classifier.classes, probabilities).text(), "", f"{out}: {PREDICTIONS}"]
        else:
            found = classification.performance(truth.labels, probabilities, truth.subjects, SEED)
            files.write_json(folder / PERFORMANCE, _record(classifier, path, truth, found))
            _draw(folder / PICTURE, classifier.classes, probabilities, truth.labels, found)
            lines += [f"labels of {truth.path}", "", _confusion(classifier.classes, found).text(), "", *_in_words(found), "", f"{out}: {PREDICTIONS}, {PERFORMANCE}, {PICTURE}"]
    return "\n".join(lines)


# the model


def _checkpoint(which: str, stage: str | None, selector: str) -> Checkpoint:
    if (Path(which) / commits.COMMIT).exists():
        return checkpoint.open_verified(Path(which))
    run = rundir.find_run(which)
    return checkpoint.select(run.checkpoints(_classifying_stage(run, stage)), selector, print)


def _classifying_stage(run: RunDir, stage: str | None) -> str:
    """The only train stage whose model classifies, or the one asked for."""
    trained = [item for item in plan.read(run).stages if item.kind == "train"]
    fitting = [item.name for item in trained if spec.family_config(item.settings["config"]).classifies]
    if not fitting:
        raise InputError(f"{run.run_id}: none of its models tells classes apart; its train stages: {', '.join(item.name for item in trained) or 'none'}")
    if stage is None and len(fitting) > 1:
        raise InputError(f"{run.run_id}: several of its models classify; say which with --stage: {', '.join(fitting)}")
    if stage is not None and stage not in fitting:
        raise InputError(f"--stage {stage}: {run.run_id} has no such train stage that classifies; there is: {', '.join(fitting)}")
    return stage if stage is not None else fitting[0]


# images and labels


def _file_of_size(images: Path, size: int) -> Path:
    """Of a folder, the stack of the size that the checkpoint judges."""
    if not images.is_dir():
        return images
    found = [path for suffix in (".nii.gz", ".nii") if (path := images / f"Real{size}x{size}{suffix}").is_file()]
    if not found:
        there = ", ".join(sorted(path.name for path in images.iterdir() if stacks.STACK_NAME.fullmatch(path.name))) or "no stack"
        raise InputError(f"{images}: the checkpoint judges {size} px, and there is {there}; choose another with --checkpoint, or add Real{size}x{size}.nii.gz")
    return found[0]


def _check_shape(path: Path, arrays: np.ndarray, classifier: Classifier) -> None:
    size, channels = classifier.model.judged_size, len(classifier.channels)
    if arrays.shape[2:] != (size, size):
        raise InputError(f"{path}: holds images of {arrays.shape[3]} x {arrays.shape[2]} px, but {classifier.found.folder} judges {size} x {size}; "
                         f"give Real{size}x{size}.nii.gz (`medgen prepare stack` makes every size), or choose another with --checkpoint")  # fmt: skip
    if arrays.shape[1] != channels:
        raise InputError(f"{path}: has {arrays.shape[1]} channels, the model takes {channels}: {', '.join(classifier.channels)}")


def _truth(images: Path, labels: Path | None, count: int, classes: tuple[str, ...]) -> Truth | None:
    """From `labels`, else from labels.csv beside the images; None if there is none."""
    path = labels if labels is not None else images.parent / stacks.LABELS
    if labels is None and not path.exists():
        return None
    numbers, subjects = stacks.read_labels(path)
    if len(numbers) != count:
        raise InputError(f"{path}: has {len(numbers)} rows for the {count} images of {images}; every image needs one row, in the same order"
                         + ("; the labels of these images can be named with --labels" if labels is None else ""))  # fmt: skip
    if numbers.max() >= len(classes):
        raise InputError(f"{path}: has the Label {numbers.max()}, but the model knows {len(classes)} classes: {_numbered(classes)}")
    named = path.parent / stacks.CLASSES
    if named.exists() and (there := stacks.named_classes(named, len(classes))) != classes:
        raise InputError(f"{named}: the classes there are {_numbered(there)}, those of the model {_numbered(classes)}; number them alike")
    return Truth(path, numbers, np.array(subjects))


def _numbered(classes: Sequence[str]) -> str:
    return ", ".join(f"{number} {name}" for number, name in enumerate(classes))


# what comes of it


def _write_predictions(path: Path, classes: tuple[str, ...], probabilities: np.ndarray, truth: Truth | None) -> None:
    """index, prediction and a column per class; the label too where it is known."""
    rows = []
    for number, row in enumerate(probabilities):
        known = {"label": classes[truth.labels[number]]} if truth is not None else {}
        rows.append({"index": number, **known, "prediction": classes[int(row.argmax())], **{_column(name): f"{value:.6f}" for name, value in zip(classes, row, strict=True)}})
    csv_files.write_rows(path, list(rows[0]), rows)


def _column(name: str) -> str:
    """Of a class; one that is called like another column keeps its values apart from it."""
    return f"class {name}" if name in ("index", "label", "prediction") else name


def _counts(classes: tuple[str, ...], probabilities: np.ndarray) -> Table:
    predicted = np.bincount(probabilities.argmax(axis=1), minlength=len(classes))
    return Table("", ("", "images"), tuple((name, f"{count:,}") for name, count in zip(classes, predicted, strict=True)))


def _confusion(classes: tuple[str, ...], found: Performance) -> Table:
    rows = [(name, f"{sum(row):,}", *(f"{count:,}" for count in row), f"{100 * row[number] / sum(row):.0f} %" if sum(row) else "")
            for number, (name, row) in enumerate(zip(classes, found.confusion, strict=True))]  # fmt: skip
    return Table("", ("", "images", *(f"as {name}" for name in classes), "right"), tuple(rows))


def _in_words(found: Performance) -> list[str]:
    several = f"95 % interval over {found.subjects} subjects"
    return [
        f"  AUC {_number(found.auc)}, one class against the rest, averaged over classes; {several}" if found.auc.value is not None
        else "  no AUC: some class has no image here",
        f"  balanced accuracy {_number(found.balanced_accuracy)}, accuracy {found.accuracy:.3f}",
        f"  expected calibration error {found.calibration_error:.3f}, Brier score {found.brier:.3f}",
    ]  # fmt: skip


def _number(estimate: Estimate) -> str:
    if estimate.value is None:
        return "not known"
    return f"{estimate.value:.3f}" + (f" [{estimate.interval[0]:.3f}, {estimate.interval[1]:.3f}]" if estimate.interval is not None else " (no interval: fewer than 5 subjects)")


def _record(classifier: Classifier, path: Path, truth: Truth, found: Performance) -> dict[str, object]:
    return {
        "images": str(path), "images_sha256": files.sha256_file(path), "labels": str(truth.path), "labels_sha256": files.sha256_file(truth.path),
        "checkpoint": str(classifier.found.folder), "checkpoint_sha256": classifier.found.sha256, "classes": list(classifier.classes), **asdict(found),
        "protocol": "one class against the rest, averaged; 95% percentile bootstrap over subjects",
    }  # fmt: skip


# the picture


def _draw(path: Path, classes: tuple[str, ...], probabilities: np.ndarray, labels: np.ndarray, found: Performance) -> None:
    """ROC curves, confusion matrix and calibration side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.2, 4.8), dpi=150)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.05, right=0.985, top=0.92, bottom=0.15, wspace=0.3)
    roc, confusion, calibration = figure.subplots(1, 3)
    _draw_roc(roc, classes, probabilities, labels, found)
    _draw_confusion(confusion, classes, found)
    _draw_calibration(calibration, classes, probabilities, labels, found)
    for axes in (roc, confusion, calibration):
        axes.title.set_fontsize("medium")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _draw_roc(axes: Axes, classes: tuple[str, ...], probabilities: np.ndarray, labels: np.ndarray, found: Performance) -> None:
    from sklearn.metrics import auc, roc_curve

    for number, name in enumerate(classes):
        if 0 < (labels == number).sum() < len(labels):
            false_positive, true_positive, _ = roc_curve(labels == number, probabilities[:, number])
            axes.plot(false_positive, true_positive, label=f"{name} {auc(false_positive, true_positive):.2f}", drawstyle="steps-post")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
    axes.set(title=f"ROC, AUC {_number(found.auc)}", xlabel="false positives, share of the rest", ylabel="true positives, share of the class", aspect="equal", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.legend(loc="lower right", title="AUC against the rest", frameon=False)


def _draw_confusion(axes: Axes, classes: tuple[str, ...], found: Performance) -> None:
    counts = np.array(found.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*counts.shape):
        dark = shares[row, column] > 0.6
        axes.text(column, row, f"{counts[row, column]}\n{100 * shares[row, column]:.0f} %", ha="center", va="center", color="white" if dark else "0.15")
    axes.set(title=f"Balanced accuracy {_number(found.balanced_accuracy)}", xlabel="predicted", ylabel="true")
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes, rotation=90, va="center")


def _draw_calibration(axes: Axes, classes: tuple[str, ...], probabilities: np.ndarray, labels: np.ndarray, found: Performance) -> None:
    from sklearn.calibration import calibration_curve

    for number, name in enumerate(classes):
        observed, said = calibration_curve(labels == number, np.clip(probabilities[:, number], 0, 1), n_bins=CURVE_BINS, strategy="quantile")
        axes.plot(said, observed, marker="o", markersize=4, label=name)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
    axes.set(title=f"Calibration, expected error {found.calibration_error:.3f}", xlabel="probability that was said", ylabel="share that is of the class", aspect="equal", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.legend(loc="upper left", frameon=False)
