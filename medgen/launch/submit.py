"""From a spec to a run folder that a backend can start: made once, found again by the same science.

Called by the submit verb; the backend takes over from here."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from medgen import document, files, plan, planning, redact, rundir, site, spec
from medgen.errors import InputError, MedgenError
from medgen.launch import nodes, snapshot
from medgen.launch.fit import Limits, fit_shards, fit_to_cluster, fit_to_machine
from medgen.launch.limits import read_limits
from medgen.launch.queued import queued_tasks, was_queued
from medgen.launch.supervisor import living_supervisor
from medgen.plan import Plan, PlannedStage
from medgen.rundir import RunDir

RESOURCE_FIELDS = (
    "nodes", "ranks_per_node", "gpus_per_node", "threads", "time_minutes", "mem_mebibytes", "parallel", "segments", "chain", "launcher", "setup", "command_setup", "directives", "left_out",
)  # fmt: skip
LOCK_SECONDS = 60


@dataclass(frozen=True)
class Prepared:
    """All that submit knows before it writes anything. `notes`: what differs from what was asked, in words."""

    run: RunDir
    plan: Plan
    point: spec.Point
    site: site.Site
    limits: Limits
    spec_path: Path
    notes: list[str]
    prepared_at: float = field(default_factory=time.time)  # unix seconds

    @property
    def spec(self) -> spec.Spec:
        return self.point.spec


def prepare(spec_path: Path, overrides: Sequence[str], site_name: str | None, runs_root: Path, local: bool) -> list[Prepared]:
    """Check everything and plan it, for every point of a sweep; writes nothing. `local`: for this machine, whatever there is.

    Raises InputError for anything wrong with spec, site or request."""
    points = spec.load_points(spec_path, site.spec_overrides(overrides))
    profile = site.load(site_name, overrides, local)
    limits, notes = read_limits(profile) if profile.scheduler == "slurm" else (Limits(), [])
    prepared = [_prepare_point(point, profile, limits, spec_path, runs_root) for point in points]
    return [dataclasses.replace(item, notes=[*notes, *item.notes]) for item in prepared]


def _prepare_point(point: spec.Point, profile: site.Site, limits: Limits, spec_path: Path, runs_root: Path) -> Prepared:
    try:
        checked, notes = point.spec, list[str]()
        planned = planning.make_plan(checked, profile)
        if profile.scheduler == "slurm":
            checked, notes = fit_shards(checked, planned, limits)
            fitted, more = fit_to_cluster(planning.make_plan(checked, profile), profile, limits, datetime.date.today(), nodes.believed(rundir.cache_root(runs_root.absolute())))
        else:
            fitted, more = fit_to_machine(planned, profile)
    except planning.Unplannable as problem:
        raise point.document.error(problem.path, problem.message) from None
    run = RunDir(runs_root.absolute() / fitted.run_id)
    if run.plan.is_file():
        fitted = _keep_finished_shards(run, plan.read(run), fitted)
    return Prepared(run, fitted, dataclasses.replace(point, spec=checked), profile, limits, spec_path, [*notes, *more])


def check_data(checked: spec.Spec) -> str:
    """Look at every file's header before anything is queued; returns one line about the data.

    Raises InputError for unusable files, or if a stage names a split that has no patients."""
    from medgen.data.index import check_headers

    if checked.data is None:
        return "no data to read: every stage is a command"
    report = check_headers(checked.data, checked.seed)
    for name, stage in checked.stages.items():
        wanted = [stage.condition] if isinstance(stage, spec.GenerateStage) and stage.condition in spec.SPLITS else []
        wanted += [stage.against] if isinstance(stage, spec.EvaluateStage) else []
        for split in wanted:
            if not report.patients.get(str(split)):
                have = ", ".join(f"{count} {known}" for known, count in report.patients.items())
                raise InputError(f"stages.{name} uses the {split} split, which has no patients; the data have: {have}")
    return report.text()


def create(prepared: Prepared) -> list[str]:
    """Write what is missing of the run folder; returns notes in words for the user. Safe to call twice, or at once."""
    run = prepared.run
    configs = [stage.config for stage in prepared.spec.stages.values() if isinstance(stage, spec.TrainStage)]
    packages = snapshot.user_packages(configs)
    try:
        files.private_folder(run.root)
        with FileLock(run.prepare_lock, timeout=LOCK_SECONDS):
            return _create_under_lock(prepared, packages)
    except TimeoutError:
        raise MedgenError(f"{run.prepare_lock}: another submit has been busy with this run for {LOCK_SECONDS} s; try again") from None
    except OSError as error:
        raise InputError(f"{run.root}: cannot be written: {error.strerror or error}; mend that, or set MEDGEN_RUNS to a folder that can") from None


def _create_under_lock(prepared: Prepared, packages: list[Path]) -> list[str]:
    run, notes = prepared.run, []
    code_hash = snapshot.code_sha256(packages)
    if not run.code.exists():
        snapshot.copy_code(run.code, packages)
        if run.manifest.exists():
            run.event("code_renewed", code_sha256=code_hash)
    elif run.manifest.exists() and files.read_json(run.manifest)["code_sha256"] != code_hash:
        notes.append(f"the code has changed since this run was made; the run keeps its copy (remove {run.code} to take the new code)")
    if not run.manifest.exists():
        facts = snapshot.manifest(prepared.site.name, code_hash, prepared.spec_path)
        files.write_json(run.manifest, {**facts, "sweep": redact.value(prepared.point.values)})
    if not run.spec.exists():
        _write_spec(prepared)
    _write_plan(prepared)
    for stage in prepared.plan.stages:
        for task in stage.tasks:
            run.batch_log(stage.name, task.shard).parent.mkdir(parents=True, exist_ok=True)
    return notes


def _write_spec(prepared: Prepared) -> None:
    """spec.yaml in its resolved form; read back before it counts, because every stage relies on it."""
    text = spec_yaml(prepared.spec)
    again = spec.check(document.parse(text, str(prepared.run.spec), spec.BASH_KEYS))
    if again != prepared.spec:
        raise MedgenError(f"{prepared.spec_path}: its resolved form does not read back as the same spec; please report this file")
    files.write_text(prepared.run.spec, text)


def spec_yaml(checked: spec.Spec) -> str:
    """A checked spec as YAML that `medgen.spec.load` reads back; defaults filled in, what is unset left out."""
    record = _without_none(checked.model_dump(mode="json", by_alias=True))
    for name, stage in checked.stages.items():
        if isinstance(stage, spec.TrainStage):
            record["stages"][name]["config"] = stage.config  # null is a value there
    return yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=120)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _write_plan(prepared: Prepared) -> None:
    """Write plan.json if it is new or other resources were asked for; never under jobs that were started with the old ones."""
    run = prepared.run
    if not run.plan.exists():
        files.write_json(run.plan, plan.to_json(prepared.plan))
        run.event("created", run_id=prepared.plan.run_id, tasks=sum(len(stage.tasks) for stage in prepared.plan.stages))
        return
    before = plan.read(run)
    changes = resource_changes(before, prepared.plan)
    if plan.to_json(before) == plan.to_json(prepared.plan):
        return
    if living_supervisor(run) is not None or (was_queued(run) and queued_tasks(run)):
        raise InputError(
            f"{run.run_id} is queued or running with other resources ({'; '.join(changes) or 'another site'}); "
            f"leave them as they are, or `medgen cancel {run.run_id}` first"
        )
    files.write_json(run.plan, plan.to_json(prepared.plan))
    run.event("resources_changed", changes=changes, site=prepared.plan.site)


def resource_changes(before: Plan, after: Plan) -> list[str]:
    """`stage.field old -> new` for everything that may change without making a new run."""
    changes = [] if before.site == after.site else [f"site {before.site} -> {after.site}"]
    for stage in after.stages:
        old = before.stage(stage.name)
        was_record, record = dataclasses.asdict(old), dataclasses.asdict(stage)
        for name in RESOURCE_FIELDS:
            was, becomes = was_record[name], record[name]
            if was != becomes:
                changes.append(f"{stage.name}.{name} {was} -> {becomes}")
        if len(old.tasks) != len(stage.tasks):
            changes.append(f"{stage.name}.shards {len(old.tasks)} -> {len(stage.tasks)}")
    return changes


def _keep_finished_shards(run: RunDir, before: Plan, after: Plan) -> Plan:
    """A stage that is finished keeps its shards; one that is half done must keep them; an untouched one may change.

    Raises InputError when a half-done stage is asked for another number of shards."""
    stages = []
    for stage in after.stages:
        old = before.stage(stage.name)
        if old.tasks == stage.tasks or not _touched(run, old):
            stages.append(stage)
        elif all(run.is_done(task.stage, task.shard, task.hash) for task in old.tasks):
            stages.append(dataclasses.replace(stage, tasks=old.tasks, parallel=min(stage.parallel, len(old.tasks)), settings=old.settings))
        else:
            raise InputError(
                f"{run.run_id}: {stage.name} is half done in {len(old.tasks)} shards and cannot go on in {len(stage.tasks)}; "
                f"use shards: {len(old.tasks)} (or remove {run.stage(stage.name)} and {run.outcome_file(stage.name, 0).parent}/{stage.name}.* to start it again)"
            )
    return dataclasses.replace(after, stages=stages)


def _touched(run: RunDir, stage: PlannedStage) -> bool:
    return any(run.outcome_file(stage.name, task.shard).exists() or run.shard(stage.name, task.shard).exists() for task in stage.tasks)
