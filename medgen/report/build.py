"""Assembles the report of a run: page, table of scores, a dataset card for each set. Called by __init__.py.

What is on the page and in which words: summary.py, evaluations.py, gallery.py, trainings.py; the cards: card.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from medgen import __version__, collected, files, redact
from medgen import plan as plans
from medgen.dp import card as privacy
from medgen.errors import MedgenError
from medgen.evaluate import scores
from medgen.evaluate.inputs import MASK, Dataset, read_dataset
from medgen.plan import Plan
from medgen.report import card, evaluations, gather, page, summary, words
from medgen.report.card import Fact, Subject
from medgen.report.evaluations import Evaluation
from medgen.report.gallery import Painter, StagePictures, stage_pictures, without_training_images
from medgen.report.gather import StageFacts
from medgen.report.selection import Selection, selection, sentences
from medgen.report.summary import ImageSet, Measurement
from medgen.report.trainings import training_section
from medgen.rundir import RunDir
from medgen.spec_data import DataSpec, Window

if TYPE_CHECKING:
    from medgen.data.store import SliceStore

Say = Callable[[str], None]
MEASURING = ("evaluate", "structure", "utility")


@dataclass(frozen=True)
class GeneratedSection:
    """One generate stage on the page."""

    facts: StageFacts
    title: str
    dataset: Dataset | None
    problem: str | None
    pictures: StagePictures | None
    evaluations: list[Evaluation]
    images: ImageSet
    card: str  # empty without a dataset
    selection: Selection | None = None


@dataclass(frozen=True)
class Source:
    """What every part of the report looks things up in."""

    run: RunDir
    plan: Plan
    stages: list[StageFacts]
    store: SliceStore | None
    say: Say

    def stage(self, name: str) -> StageFacts | None:
        return next((stage for stage in self.stages if stage.name == name), None)


def build_report(run: RunDir, stage_name: str, cache_root: Path, say: Say) -> list[Path]:
    """Write `report/index.html`, one file that needs nothing else, scores.csv and a dataset card for each set beside it; returns them, the page first.

    Works on what is there: stages that are missing, failed or not evaluated are named as such. Raises InputError if the
    folder is no run."""
    plan = plans.read(run)
    stages = gather.all_stages(run, plan)
    source = Source(run, plan, stages, _store(plan, cache_root, say), say)
    generated = sorted((_generated(source, stage) for stage in stages if stage.kind == "generate"), key=_masks_last)
    files.write_text(run.report, _page(source, stage_name, generated))
    records = [item.record for section in generated for item in section.images.measurements if item.record is not None]
    files.write_text(run.report_table, scores.to_csv(records))
    carded = [section for section in generated if section.card]
    for section in carded:
        files.write_text(run.dataset_card(section.facts.name), section.card)
    say(f"report: {run.report} ({run.report.stat().st_size / 2**20:.1f} MiB)")
    return [run.report, run.report_table, *(run.dataset_card(section.facts.name) for section in carded)]


def _page(source: Source, stage_name: str, generated: list[GeneratedSection]) -> str:
    run, plan, stages, store = source.run, source.plan, source.stages, source.store
    return page.render(
        "run.html",
        run_id=run.run_id,
        name=plan.name,
        stage_name=stage_name,
        lead=words.lead(plan, stages, store),
        answers=summary.answers([section.images for section in generated]),
        has_masks=plan.data["mask"] is not None if store is None else store.has_masks,
        regions=() if store is None else store.regions,
        verdict=words.verdict(stages),
        tiles=words.headline_facts(plan, stages, store),
        generated=generated,
        training=[section for stage in stages if stage.kind == "train" and (section := training_section(run, stage, source.say)) is not None],
        splits=words.split_table(store),
        stages=stages,
        timeline=words.timeline(stages),
        troubles=gather.troubles(run),
        provenance=_provenance(run, plan, store),
        plan_text=yaml.safe_dump(redact.value(plans.to_json(plan)), sort_keys=False, allow_unicode=True, width=110),
        spec_text=redact.text(_text(run.spec)),
        phantom=plan.data["format"] == "phantom",
    )


def _store(plan: Plan, cache_root: Path, say: Say) -> SliceStore | None:
    """The real data; None (and a word) if they are gone: a report of old results must still be possible."""
    from medgen.data.store import open_store

    try:
        return open_store(DataSpec.model_validate(plan.data), plan.seed, cache_root, say)
    except MedgenError as error:
        say(f"real pictures are left out: {error}")
        return None


def _generated(source: Source, facts: StageFacts) -> GeneratedSection:
    images = ImageSet(facts.name, [_measurement(source, stage) for stage in source.stages if stage.kind in MEASURING and stage.settings["of"] == facts.name], summary.IN_A_JOB)
    shown = [evaluations.evaluation(item.stage, item.record) for item in images.measurements if item.record is not None]
    first = next((item.record for item in images.measurements if item.kind == "evaluate" and item.record is not None), None)
    try:
        dataset = read_dataset(source.run, facts.name)
    except MedgenError as error:
        source.say(f"{facts.name}: no pictures: {error}")
        return GeneratedSection(facts, facts.name, None, str(error), None, shown, images, "")
    title, text = words.dataset_title(dataset), _card(source, facts, dataset, images)
    painter = Painter(dataset, source.store)
    try:
        pictures = stage_pictures(painter, source.plan.seed, first)
        if _guarantee(source, facts) is not None:
            pictures = without_training_images(pictures, first)
        selected = selection(source.run, source.plan.stage(facts.name), collected.read(dataset.folder)[1], painter)
    except MedgenError as error:
        source.say(f"{facts.name}: no pictures: {error}")
        return GeneratedSection(facts, title, None, str(error), None, shown, images, text)
    return GeneratedSection(facts, title, dataset, None, pictures, shown, images, text, selected)


def _guarantee(source: Source, facts: StageFacts) -> privacy.Card | None:
    """Of the model behind a generate stage."""
    trained = source.stage(facts.settings["from"])
    return privacy.from_record(trained.facts["privacy"]) if trained is not None and "privacy" in trained.facts else None


def _measurement(source: Source, stage: StageFacts) -> Measurement:
    record = gather.read_metrics(source.run, stage.name)
    return Measurement(stage.name, stage.kind, record, summary.missing_stage(stage.name, stage.status), tuple(stage.causes))


def _masks_last(section: GeneratedSection) -> bool:
    """Images first: they are what people open the report for."""
    return section.dataset is not None and not section.dataset.image_channels


# --- the card ---------------------------------------------------------------------------------------------------------


def _card(source: Source, facts: StageFacts, dataset: Dataset, images: ImageSet) -> str:
    title = words.dataset_title(dataset)
    return card.dataset_card(Subject(
        title=f"{source.plan.name}: {title}",
        lead=f"{title}, drawn by the stage `{facts.name}` of the run `{source.run.run_id}`. {words.lead(source.plan, source.stages, source.store)}",
        count=len(dataset.index),
        contents=_contents(source, facts, dataset),
        made=_made(source, facts, dataset),
        source=_data(source, facts),
        limits=_limits(source, facts, dataset),
        images=summary.without_causes(images),
    ))  # fmt: skip


def _contents(source: Source, facts: StageFacts, dataset: Dataset) -> list[Fact]:
    index = dataset.index
    spacing = [", ".join(sorted(set(index[name])))[:200] for name in ("spacing_y_mm", "spacing_x_mm", "thickness_mm") if name in index.columns]
    found = [
        ("images", f"{len(index):,}"), ("channels that were drawn", ", ".join(dataset.outputs)), ("channels with files", ", ".join(dataset.files)),
        ("size", f"{source.plan.data['size']} x {source.plan.data['size']} pixels, values 0 to 1 (masks: {_labels(source.store)})"),
        ("spacing between rows, columns, slices (mm)", " x ".join(spacing) or card.UNKNOWN),
        ("classes", _counted(index["label"].tolist()) if "label" in index.columns else "none"),
        ("conditions", _conditions(index["condition_kind"].tolist())),
        ("file format", ", ".join(sorted({"".join(Path(name).suffixes) for name in index[dataset.files[0]]}))),
        ("index", f"index.csv, a row for each image with the sha256 of each file; its own sha256 is {dataset.index_sha256}"),
    ]  # fmt: skip
    return [*found, *((name.replace("_", " "), f"{value:,}") for name, value in facts.facts.items() if name.startswith(("drawn", "accepted", "rejected")) and isinstance(value, int))]


def _counted(values: list[str]) -> str:
    return ", ".join(f"{name} {values.count(name):,}" for name in dict.fromkeys(values))


def _conditions(kinds: list[str]) -> str:
    meaning = {"none": "drawn from nothing but noise", "synthetic": "drawn on synthetic masks", "real": "drawn on masks of real slices"}
    return ", ".join(f"{meaning.get(kind, kind)} {kinds.count(kind):,}" for kind in dict.fromkeys(kinds))


def _made(source: Source, facts: StageFacts, dataset: Dataset) -> list[Fact]:
    settings = facts.settings
    trained = source.stage(settings["from"])
    config = {} if trained is None else trained.settings["config"]
    found = [("model", ", ".join(str(config[name]) for name in ("model", "strategy", "mode") if name in config) or card.UNKNOWN), ("trained in stage", settings["from"])]
    found += [] if trained is None else [(f"training: {name.replace('_', ' ')}", words.plain(value)) for name, value in trained.facts.items() if isinstance(value, int | float)]
    found.append(("checkpoint (sha256)", ", ".join(dataset.index["checkpoint_sha256"].unique()) if "checkpoint_sha256" in dataset.index.columns else card.UNKNOWN))
    found += [(f"sampling: {name}", words.plain(value)) for name, value in words.flat(settings["sampling"])] if settings.get("sampling") else []
    found += [("seed", str(source.plan.seed)), ("spec", f"spec.yaml of the run {source.run.run_id}, whose last digits are its hash"), ("code", _code(source.run))]
    return found


def _code(run: RunDir) -> str:
    try:
        git = files.read_json(run.manifest)["git"]["medgen"]
        return f"medgen {__version__}, commit {git['commit']}" + (" and changes that were not committed" if git["dirty"] else "")
    except (OSError, ValueError, KeyError, TypeError):
        return f"medgen {__version__}, commit {card.UNKNOWN}"


def _data(source: Source, facts: StageFacts) -> list[Fact]:
    store = source.store
    if store is None:
        return [("real data", "no longer there")]
    counts_slices = _guarantee(source, facts) is None  # their number less that of all other patients would be one patient's
    shown = "with a lesion" if len(store.regions) < 2 else "with contours"
    rows = [
        (f"split {row['split']}", f"{row['patients']} patients" + (f", {row['slices']} slices, {shown}: {row['positive']}" if counts_slices else ""))
        for row in words.split_table(store)
    ]
    told = _windows(DataSpec.model_validate(source.plan.data), store)
    return [*rows, ("seen by the model", " and ".join(source.plan.trained_on(facts.name))), ("window that is 0 to 1", told), ("fingerprint", source.run.data_mark(store.fingerprint))]


def _labels(store: SliceStore | None) -> str:
    if store is None or len(store.regions) < 2:
        return "0 and 1"
    return ", ".join(["0 background", *(f"{number} {name}" for number, name in enumerate(store.regions, 1))])


def _windows(data: DataSpec, store: SliceStore) -> str:
    """Maps have one for each type that there is, in ms."""
    there = set(store.rows["label"]) if data.windows_ms else set()
    fixed = [f"{kind} {low:g} to {high:g} ms" for kind, (low, high) in data.windows_ms.items() if kind in there]
    if not fixed:
        return _window(data.window)
    return ", ".join([*fixed, *([f"cine {_window(data.window)}"] if "cine" in there else [])])


def _window(window: Window) -> str:
    if window.percentiles is None:
        assert window.fixed is not None, "the spec wants one of the two"
        return f"{window.fixed[0]:g} to {window.fixed[1]:g}"
    told = f"percentiles {window.percentiles[0]:g} to {window.percentiles[1]:g} of each {window.per}"
    return told if window.joint is None else f"{told}; {' and '.join(window.joint)} of a patient share the widest"


def _limits(source: Source, facts: StageFacts, dataset: Dataset) -> list[str]:
    told = ["Single slices: two of them never belong to one volume."]
    if source.plan.data["format"] == "phantom":
        told.append("The model was trained on computer-drawn phantoms: nothing here shows a patient.")
    index, manifest = collected.read(dataset.folder)
    if len(collected.file_columns(index)) > len(collected.channels(index)):
        told.append(f"The exported DICOM and NIfTI files have the contours, and the place in the body, of real slices of the {facts.settings['condition']} split: whoever has them has those.")
    guarantee = _guarantee(source, facts)
    if guarantee is not None:
        told.append(f"Differential privacy: {guarantee.words()[0]}; what it does not cover stands in the report.")
    if source.store is not None:
        seen = source.store.rows["split"].isin(source.plan.trained_on(facts.name))
        told.append(f"The model has seen {source.store.rows['patient'][seen].nunique():,} patients: what they do not show, the images cannot.")
    if MASK in dataset.files and not dataset.image_channels:
        told.append("Masks only.")
    return [*told, *(sentences(manifest) if manifest.get("gate") else [])]


# --- training and provenance -------------------------------------------------------------------------------------------


def _provenance(run: RunDir, plan: Plan, store: SliceStore | None) -> list[tuple[str, str]]:
    """Everything in the manifest, and the identities that tie the numbers to code, data and weights."""
    rows = [("run", run.run_id), ("seed", str(plan.seed)), ("site", plan.site)]
    if store is not None:
        rows.append(("data fingerprint", run.data_mark(store.fingerprint)))
    for stage in plan.stages:
        if stage.kind == "generate":
            rows += _checkpoint_of(run, stage.name)
    try:
        rows += words.flat(redact.value(files.read_json(run.manifest)))
    except (FileNotFoundError, ValueError):
        rows.append(("manifest", "missing"))
    return rows


def _checkpoint_of(run: RunDir, stage: str) -> list[tuple[str, str]]:
    try:
        digests = read_dataset(run, stage).index["checkpoint_sha256"].unique()
    except (MedgenError, KeyError):
        return []
    return [(f"checkpoint of {stage}", ", ".join(digests))]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return "missing"
