"""`medgen check` and `medgen data`: try a spec for real before it is queued. Called by cli.py.

check reads every volume, asks Slurm and the disk, and takes one small step of every model: what would fail in three hours fails now."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgen import rundir, spec
from medgen.checks.trial import data_key, try_models
from medgen.errors import Exit, InputError
from medgen.launch import preflight, slurm_checks, submit
from medgen.launch.findings import Finding, Mark, once
from medgen.launch.slurm import SlurmError
from medgen.launch.submit import Prepared
from medgen.spec import Spec
from medgen.spec_stages import GenerateStage, TrainStage
from medgen.spec_utility import UtilityStage

if TYPE_CHECKING:
    from medgen.data.store import SliceStore

GLYPHS: dict[Mark, str] = {"fine": "✔", "note": "·", "warning": "!", "wrong": "✘"}

LEFT_OUT = "left_out.csv"  # every file of a cohort that is not used


@dataclass(frozen=True)
class Told:
    """The same answer for scripts (`record`) and for people (`text`)."""

    record: dict[str, Any]
    text: str
    exit: Exit


def check(spec_path: Path, overrides: Sequence[str], site_name: str | None, local: bool) -> Told:
    """Spec, plan, data, place, Slurm and one step of every model, for every point of a sweep; all that is wrong, in one list.

    Raises InputError where there is nothing to go on with: a spec that does not read, a site that is not known."""
    prepared = submit.prepare(spec_path, overrides, site_name, rundir.runs_root(), local)
    first = prepared[0]
    tasks = sum(len(stage.tasks) for stage in first.plan.stages)
    findings = [Finding("spec", "fine", f"{len(first.plan.stages)} stages, {tasks:,} tasks on {first.site.name}"
                                        + (f", for each of {len(prepared)} points of the sweep" if len(prepared) > 1 else ""))]
    findings += [Finding("spec", "note", note) for note in dict.fromkeys(note for item in prepared for note in item.notes)]
    stores, found = _open_all(prepared)
    findings += [*found, *shortages(prepared, stores), *impossible(prepared, stores), *other_starts(prepared, stores), *try_models(prepared, stores, _say), *_launch(prepared)]  # sizes that a trial measures count in what follows
    findings = once(findings)
    wrong = sum(item.mark == "wrong" for item in findings)
    models = {item.topic: item.facts for item in findings if "parameters" in item.facts}
    summary = next((item.facts for item in found if item.facts), {})
    told = {
        "run_id": first.run.run_id, "runs": [item.run.run_id for item in prepared], "stages": len(first.plan.stages), "tasks": tasks, "fine": not wrong,
        "data": summary, "models": models, "checks": [asdict(item) for item in findings],
    }  # fmt: skip
    runs = first.run.run_id if len(prepared) == 1 else f"{first.run.run_id} and {len(prepared) - 1} more"
    verdict = "nothing speaks against it" if not wrong else "1 thing must be mended" if wrong == 1 else f"{wrong} things must be mended"
    return Told(told, "\n".join([f"{spec_path}: run {runs}", *_lines(findings), verdict]), Exit.BAD_INPUT if wrong else Exit.DONE)


def _lines(findings: list[Finding]) -> list[str]:
    width = min(24, max(len(item.topic) for item in findings))
    lines = []
    for item in findings:
        parts = item.text.splitlines()
        lines.append(f"  {GLYPHS[item.mark]} {item.topic.ljust(width)}  {parts[0]}")
        lines += [" " * (width + 6) + part for part in parts[1:]]
    return lines


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _launch(prepared: list[Prepared]) -> list[Finding]:
    """What submit looks at too."""
    findings = preflight.look_here(prepared)
    if prepared[0].site.scheduler != "slurm":
        return findings
    missing = slurm_checks.missing_commands()
    if missing:
        return [*findings, Finding("Slurm", "warning", f"not asked, because this machine has no {', '.join(missing)}; check again on a login node")]
    try:
        return [*findings, *slurm_checks.look(prepared)]
    except SlurmError as error:
        return [*findings, Finding("Slurm", "warning", f"not asked, because it does not answer: {error}")]


# --- data ------------------------------------------------------------------------------------------------------------


def show_data(spec_path: Path, overrides: Sequence[str], out: Path, as_json: bool) -> None:
    """Print what the data are and write contact_sheet.png and histogram.png into `out`."""
    import json

    from rich.console import Console

    from medgen import files
    from medgen.data import summary

    checked = spec.load(spec_path, overrides)
    store, facts = _open(checked)
    files.private_folder(out)  # it will hold pictures of patients
    left_out = _left_out(checked, out)
    summary.contact_sheet(store, out / "contact_sheet.png")
    if store.channels:
        summary.histogram(store, out / "histogram.png")
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    console = Console()
    summary.print_summary(store, console)
    if left_out:
        console.print(left_out, highlight=False, markup=False)
    console.print(f"pictures: {out / 'contact_sheet.png'}" + (f", {out / 'histogram.png'}" if store.channels else ""), highlight=False)


def _left_out(checked: Spec, out: Path) -> str:
    """Which files of a cardiac cohort are not used and why, in words; all of them in left_out.csv. Nothing of other data."""
    if checked.data is None or checked.data.format != "cardiac":
        return ""
    from medgen.cardiac.tree import read_tree

    assert checked.data.root is not None, "the spec wants one"
    index = read_tree(checked.data.root)
    if not index.skipped:
        return ""
    index.write_skipped(out / LEFT_OUT)
    return f"{index.left_out()}\nall of them: {out / LEFT_OUT}"


def _open_all(prepared: list[Prepared]) -> tuple[dict[str, SliceStore], list[Finding]]:
    """Every distinct data set of the points, by `data_key`; reads every volume unless its slices are in the cache."""
    stores: dict[str, SliceStore] = {}
    findings: list[Finding] = []
    for item in prepared:
        key = data_key(item.spec)
        if item.spec.data is None or key in stores:
            continue
        try:
            submit.check_data(item.spec)
            stores[key], facts = _open(item.spec)
        except InputError as error:
            findings.append(Finding("data", "wrong", str(error)))
            continue
        findings.append(Finding("data", "fine", _data_line(stores[key]), facts))
    return stores, findings


def shortages(prepared: list[Prepared], stores: dict[str, SliceStore]) -> list[Finding]:
    """Utility stages that would have too few synthetic images: how many are needed is known once the slices are."""
    from medgen.utility.sides import rows_of

    found = []
    for item in prepared:
        store = stores.get(data_key(item.spec))
        for name, stage in item.spec.stages.items() if store is not None else ():
            drawn = item.spec.stages[stage.of] if isinstance(stage, UtilityStage) else None
            if store is not None and isinstance(stage, UtilityStage) and isinstance(drawn, GenerateStage):
                try:
                    problem = stage.shortage(len(rows_of(store, "train", "labels" if stage.task == "classification" else "masks")), drawn.count)
                except InputError as error:
                    problem = str(error)
                found += [Finding(name, "wrong", problem)] if problem is not None else []
    return found


def impossible(prepared: list[Prepared], stores: dict[str, SliceStore]) -> list[Finding]:
    """Generate stages that ask for what the data cannot give, which they would say after the training."""
    from medgen.conditions import require_possible

    found = []
    for item in prepared:
        store = stores.get(data_key(item.spec))
        for name, stage in item.spec.stages.items() if store is not None else ():
            source = item.spec.stages[stage.source] if isinstance(stage, GenerateStage) else None
            if store is None or not isinstance(stage, GenerateStage) or not isinstance(source, TrainStage):
                continue
            try:
                require_possible(stage, spec.family_config(source.config), store)
            except InputError as error:
                found.append(Finding(name, "wrong", str(error)))
    return found


def other_starts(prepared: list[Prepared], stores: dict[str, SliceStore]) -> list[Finding]:
    """Trainings that start from weights of other classes or regions than the data have."""
    from medgen import commits, files
    from medgen.resume import same_meaning

    found = []
    for item in prepared:
        store = stores.get(data_key(item.spec))
        for name, stage in item.spec.stages.items() if store is not None else ():
            config = spec.family_config(stage.config) if isinstance(stage, TrainStage) and stage.repeat is None else None
            if store is None or config is None or config.start_from is None:
                continue
            try:
                notes = same_meaning(config, store, files.read_json(config.start_from / commits.STATE), config.start_from)
            except InputError as error:
                found.append(Finding(name, "wrong", str(error)))
            else:
                found += [Finding(name, "warning", note) for note in notes]
    return found


def _open(checked: Spec) -> tuple[SliceStore, dict[str, Any]]:
    from medgen.data import summary
    from medgen.data.store import open_store

    if checked.data is None:
        raise InputError("this spec has no data to look at: every stage is a command")
    store = open_store(checked.data, checked.seed, rundir.cache_root(rundir.runs_root()), _say)
    return store, summary.summarise(store)


def _data_line(store: SliceStore) -> str:
    groups = store.rows.groupby("split", sort=False)
    return ", ".join(f"{split} {group.patient.nunique()} patients, {len(group):,} slices" for split, group in groups)
