"""Assembles the report: reads the run, paints pictures and charts, renders template.html into one file. Called by __init__.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from markupsafe import Markup

from medgen import __version__, files, redact
from medgen import plan as plans
from medgen.errors import MedgenError
from medgen.evaluate import scores
from medgen.evaluate.inputs import Dataset, read_dataset
from medgen.plan import Plan
from medgen.report import charts, gather, words
from medgen.report.charts import Series, bar_chart, line_chart
from medgen.report.gallery import Painter, StagePictures, stage_pictures
from medgen.report.gather import StageFacts
from medgen.rundir import RunDir
from medgen.spec_data import DataSpec

if TYPE_CHECKING:
    from medgen.data.store import SliceStore

Say = Callable[[str], None]
FOLDER = Path(__file__).parent
SMOOTH_FROM_POINTS = 40
NOTHING = "-"


@dataclass(frozen=True)
class ScoreRow:
    """One line of the metric table, formatted."""

    score: scores.Score
    meaning: scores.Meaning
    value: str
    floor: str
    interval: str
    against_floor: str
    gauge: Markup
    note: int  # number of the protocol in the list below the table


@dataclass(frozen=True)
class ComparisonRow:
    """One line of a table by class: a value with its interval for each of scores.COMPARISONS."""

    group: str
    cells: list[tuple[str, str]]
    n: int


@dataclass(frozen=True)
class ComparisonTable:
    """One metric of one channel, all images together and then every class."""

    meaning: scores.Meaning
    channel: str
    rows: list[ComparisonRow]
    note: int


@dataclass(frozen=True)
class Evaluation:
    """What one evaluate stage says about a dataset."""

    name: str
    against: str
    record: dict[str, Any]
    rows: list[ScoreRow]
    comparisons: list[ComparisonTable]
    protocols: list[str]
    levels: list[dict[str, str]]
    curves: list[tuple[str, Markup]]
    skipped: list[tuple[str, str]]  # metrics, reason
    warning: str | None


@dataclass(frozen=True)
class GeneratedSection:
    """One generate stage on the page."""

    facts: StageFacts
    title: str
    dataset: Dataset | None
    problem: str | None
    pictures: StagePictures | None
    evaluations: list[Evaluation]


@dataclass(frozen=True)
class TrainingSection:
    facts: StageFacts
    loss: Markup
    bins: Markup
    last_loss: float | None
    last_val_loss: float | None
    best_val_loss: float | None


def build_report(run: RunDir, stage_name: str, cache_root: Path, say: Say) -> list[Path]:
    """Write `report/index.html`, one file that needs nothing else; returns it.

    Works on what is there: stages that are missing, failed or not evaluated are named as such. Raises InputError if the
    folder is no run."""
    plan = plans.read(run)
    stages = gather.all_stages(run, plan)
    store = _store(plan, cache_root, say)
    page = _environment().get_template("template.html").render(
        run_id=run.run_id,
        name=plan.name,
        stage_name=stage_name,
        lead=words.lead(plan, stages, store),
        has_masks=plan.data["mask"] is not None,
        verdict=words.verdict(stages),
        tiles=words.headline_facts(plan, stages, store),
        style=Markup((FOLDER / "style.css").read_text()),
        generated=sorted((_generated(run, plan, stage, store, say) for stage in stages if stage.kind == "generate"), key=_masks_last),
        training=[section for stage in stages if stage.kind == "train" and (section := _training(run, stage)) is not None],
        splits=words.split_table(store),
        stages=stages,
        timeline=words.timeline(stages),
        troubles=gather.troubles(run),
        provenance=_provenance(run, plan, store),
        plan_text=yaml.safe_dump(redact.value(plans.to_json(plan)), sort_keys=False, allow_unicode=True, width=110),
        spec_text=redact.text(_text(run.spec)),
        phantom=plan.data["format"] == "phantom",
        made=time.time(),
        version=__version__,
    )
    files.write_text(run.report, page)
    say(f"report: {run.report} ({len(page) / 2**20:.1f} MiB)")
    return [run.report]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": words.number, "duration": words.duration, "date": words.date, "plain": words.plain}
    return environment


def _store(plan: Plan, cache_root: Path, say: Say) -> SliceStore | None:
    """The real data; None (and a word) if they are gone: a report of old results must still be possible."""
    from medgen.data.store import open_store

    try:
        return open_store(DataSpec.model_validate(plan.data), plan.seed, cache_root, say)
    except MedgenError as error:
        say(f"real pictures are left out: {error}")
        return None


def _generated(run: RunDir, plan: Plan, facts: StageFacts, store: SliceStore | None, say: Say) -> GeneratedSection:
    records = [
        (stage.name, gather.read_metrics(run, stage.name))
        for stage in plan.stages if stage.kind == "evaluate" and stage.settings["of"] == facts.name
    ]
    evaluations = [_evaluation(name, record) for name, record in records if record is not None]
    try:
        dataset = read_dataset(run, facts.name)
        painter = Painter(run, plan, dataset, store)
        pictures = stage_pictures(painter, plan.seed, evaluations[0].record if evaluations else None)
    except MedgenError as error:
        say(f"{facts.name}: no pictures: {error}")
        return GeneratedSection(facts, facts.name, None, str(error), None, evaluations)
    return GeneratedSection(facts, words.dataset_title(dataset), dataset, None, pictures, evaluations)


def _masks_last(section: GeneratedSection) -> bool:
    """Images first: they are what people open the report for."""
    return section.dataset is not None and not section.dataset.image_channels


def _evaluation(name: str, record: dict[str, Any]) -> Evaluation:
    found = scores.from_json(record["scores"])
    protocols = list(dict.fromkeys(item.protocol for item in found))
    rows = [_score_row(item, protocols.index(item.protocol) + 1) for item in found if item.is_headline]
    levels = [
        {"channel": channel, "pixels": f"{level['pixels']} px", "value": words.number(level["value"]),
         "floor": NOTHING if level["floor"] is None else words.number(level["floor"])}
        for channel, channel_levels in record["details"]["swd_levels"].items() for level in channel_levels
    ]
    curves = _distribution_charts(record["details"]["curves"])
    skipped, warning = words.grouped_by_reason(record["skipped"]), words.few_patients(record["counts"])
    return Evaluation(name, record["against"], record, rows, _comparison_tables(found, protocols), protocols, levels, curves, skipped, warning)


def _comparison_tables(found: list[scores.Score], protocols: list[str]) -> list[ComparisonTable]:
    tables = []
    compared = [item for item in found if item.comparison is not None]
    for metric, channel in dict.fromkeys((item.metric, item.channel) for item in compared):
        of_table = [item for item in compared if (item.metric, item.channel) == (metric, channel)]
        rows = []
        for group in dict.fromkeys(item.group for item in of_table):
            of_row = {item.comparison: item for item in of_table if item.group == group}
            cells = [(words.number(of_row[name].value), _interval(of_row[name])) for name in scores.COMPARISONS]
            rows.append(ComparisonRow("all" if group is None else group, cells, of_row["real-synthetic"].n))
        tables.append(ComparisonTable(scores.MEANINGS[metric], channel, rows, protocols.index(of_table[0].protocol) + 1))
    return tables


def _interval(item: scores.Score) -> str:
    return NOTHING if item.ci is None else f"{words.number(item.ci[0])} to {words.number(item.ci[1])}"


def _score_row(item: scores.Score, note: int) -> ScoreRow:
    return ScoreRow(
        score=item,
        meaning=scores.MEANINGS[item.metric],
        value=words.number(item.value),
        floor=NOTHING if item.floor is None else words.number(item.floor),
        interval=_interval(item),
        against_floor=words.against_floor(item),
        gauge=charts.gauge(item.value, item.floor, item.ci),
        note=note,
    )


CURVE_LABELS = {
    "intensity": ("Grey values", "grey value in the window", "share of foreground pixels"),
    "spectrum": ("Power spectrum", "spatial frequency (cycles per pixel)", "log10 power"),
    "mask_area": ("Mask area", "area (% of the slice)", "share of masks"),
}


def _distribution_charts(curves: dict[str, Any]) -> list[tuple[str, Markup]]:
    drawn = []
    for channel, kinds in curves.items():
        for kind, curve in kinds.items():
            title, x_label, y_label = CURVE_LABELS[kind]
            filled = kind != "spectrum"
            series = [Series("real", curve["x"], curve["real"], "real", filled=filled),
                      Series("synthetic", curve["x"], curve["synthetic"], "synthetic")]
            drawn.append((f"{title}, {channel}", line_chart(series, x_label, y_label)))
    return drawn


def _training(run: RunDir, facts: StageFacts) -> TrainingSection | None:
    curves = gather.training_curves(run, facts.name)
    if curves is None or not curves.steps:
        return None
    noisy = len(curves.loss) >= SMOOTH_FROM_POINTS
    train = Series("training loss", curves.steps, curves.loss, "first", faint=noisy)
    lines = [train, Series("validation loss", curves.val_steps, curves.val_loss, "second")]
    if noisy:
        mean = gather.smoothed(curves.loss, max(2, len(curves.loss) // 25))
        lines.append(Series("training loss, running mean", curves.steps, mean, "first"))
    loss = line_chart(lines, "step", "loss", allow_logarithmic=True)
    bins = bar_chart(curves.bins, [str(number) for number in range(len(curves.bins))], "tenth of the noise levels (0: least noise)", "loss") if curves.bins else Markup("")
    return TrainingSection(
        facts, loss, bins, curves.loss[-1], curves.val_loss[-1] if curves.val_loss else None, min(curves.val_loss, default=None)
    )


def _provenance(run: RunDir, plan: Plan, store: SliceStore | None) -> list[tuple[str, str]]:
    """Everything in the manifest, and the identities that tie the numbers to code, data and weights."""
    rows = [("run", run.run_id), ("seed", str(plan.seed)), ("site", plan.site)]
    if store is not None:
        rows.append(("data fingerprint", store.fingerprint))
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
