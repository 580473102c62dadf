"""From a spec to a run folder that a backend can start: made once, found again by the same science.

Called by the submit verb; the backend takes over from here."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from pydantic import ValidationError

from medgen import commits, document, files, plan, planning, redact, rundir, site, spec
from medgen.errors import InputError, MedgenError
from medgen.launch import nodes, snapshot
from medgen.launch.fit import Limits, fit_shards, fit_to_cluster, fit_to_machine
from medgen.launch.limits import read_limits
from medgen.launch.queued import queued_tasks, was_queued
from medgen.launch.supervisor import living_supervisor
from medgen.models.settings import FamilyConfig
from medgen.plan import Plan, PlannedStage
from medgen.rundir import RunDir
from medgen.spec_data import SPLITS, DataSpec
from medgen.spec_evaluate import EvaluateStage
from medgen.spec_stages import GenerateStage, TrainStage
from medgen.spec_utility import StructureStage, UtilityStage

RESOURCE_FIELDS = (
    "nodes", "ranks_per_node", "gpus_per_node", "threads", "time_minutes", "mem_mebibytes", "parallel", "segments", "chain", "launcher", "setup", "command_setup", "directives", "left_out",
)  # fmt: skip
LOCK_SECONDS = 60
FORM_IN_WORDS = {"ema": "averages of the weights (ema, ema.more):"}  # where a key of `form` is not told by its name and value


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
    bad_nodes = nodes.believed_here(rundir.cache_root(runs_root.absolute())) if profile.scheduler == "slurm" else []
    prepared = [_prepare_point(point, profile, limits, bad_nodes, spec_path, runs_root) for point in points]
    return [dataclasses.replace(item, notes=[*notes, *item.notes]) for item in prepared]


def _prepare_point(
    point: spec.Point, profile: site.Site, limits: Limits, bad_nodes: list[nodes.Entry], spec_path: Path, runs_root: Path
) -> Prepared:  # fmt: skip
    try:
        checked, notes = point.spec, list[str]()
        planned = planning.make_plan(checked, profile)
        if profile.scheduler == "slurm":
            checked, notes = fit_shards(checked, planned, limits)
            fitted, more = fit_to_cluster(planning.make_plan(checked, profile), profile, limits, datetime.date.today(), bad_nodes)
        else:
            fitted, more = fit_to_machine(planned, profile)
    except planning.Unplannable as problem:
        raise point.document.error(problem.path, problem.message) from None
    run = RunDir(runs_root.absolute() / fitted.run_id)
    before = _plan_before(run)
    if before is not None:
        fitted = _keep_finished_shards(run, before, fitted)
    return Prepared(run, fitted, dataclasses.replace(point, spec=checked), profile, limits, spec_path, [*notes, *more])


def _plan_before(run: RunDir) -> Plan | None:
    """The plan of an earlier submit; None if there is none, or a damaged one, which is a pure function of spec and site and written anew."""
    if not run.plan.exists():
        return None
    try:
        return plan.read(run)
    except plan.DamagedPlan:
        return None


def check_data(checked: spec.Spec) -> str:
    """Look at every file's header before anything is queued, and at the weights of networks; returns one line about the data.

    Raises InputError for unusable files, if a stage names a split that has no patients, or a checkpoint that is none."""
    from medgen.data.index import check_headers

    for name, stage in checked.stages.items():
        if isinstance(stage, TrainStage):
            config = spec.family_config(stage.config)
            assert checked.data is not None  # a train stage is there
            _check_start(name, stage.config["model"], config, checked.data.size)
            _check_weights(name, config)
        for needed in stage.weights_files() if isinstance(stage, EvaluateStage) else ():
            needed.verified()
    if checked.data is None:
        return "no data to read: every stage is a command"
    report = check_headers(checked.data, checked.seed)
    for name, stage in checked.stages.items():
        if isinstance(stage, TrainStage):
            _check_patients(name, spec.family_config(stage.config), report.patients.get("train", 0))
            _check_masks(name, spec.family_config(stage.config), checked.data, report.masked)
        if isinstance(stage, TrainStage) and stage.repeat is not None and not report.patients.get("val"):
            raise InputError(f"stages.{name}.repeat: {stage.repeat} would have no val split to choose its epochs by; give the data one, such as data.splits.val: 0.2")
        if isinstance(stage, GenerateStage) and stage.per_class is not None and len(stage.per_class) != len(report.classes):
            raise InputError(f"stages.{name}.per_class: {stage.per_class} counts {len(stage.per_class)} classes, the data have {len(report.classes)}: {', '.join(report.classes)}")
        wanted = [stage.condition] if isinstance(stage, GenerateStage) and stage.condition in SPLITS else []
        wanted += [stage.against] if isinstance(stage, EvaluateStage | StructureStage) else []
        wanted += ["val", "test"] if isinstance(stage, UtilityStage) else []
        if isinstance(stage, UtilityStage) and stage.task == "classification" and len(report.classes) < 2:
            raise InputError(f"stages.{name}.task: a classification tells at least two classes apart, and the labels of the data are: {', '.join(report.classes) or 'none'}")
        for split in wanted:
            if not report.patients.get(str(split)):
                have = ", ".join(f"{count} {known}" for known, count in report.patients.items())
                raise InputError(f"stages.{name} uses the {split} split, which has no patients; the data have: {have}")
    return report.text()


def _check_patients(name: str, config: FamilyConfig, patients: int) -> None:
    try:
        config.check_patients(patients)
    except ValueError as error:
        raise InputError(f"stages.{name}.config: {error}") from None


def _check_masks(name: str, config: FamilyConfig, data: DataSpec, masked: tuple[int, int] | None) -> None:
    """An image whose mask nobody knows is none without a lesion: a model that learns masks, or from them, would take it for one."""
    if masked is None or "seg" not in config.input_channels:
        return
    given, unmasked = masked
    if not given:
        raise InputError(f"stages.{name}: its model is trained on masks, and no training image has one; give lines of {data.root} a mask_path")
    if unmasked and "masked" not in config.input_channels and not config.trains_positive_only(data):
        raise InputError(f"stages.{name}: its model is trained on masks, and {unmasked} training images have none (mask_path: null); leave these lines out, "
                         "give them masks (a black one where there is nothing), or write data.positive_only: true")  # fmt: skip


def _check_start(name: str, model: str, config: FamilyConfig, size: int) -> None:
    """What can be told without its weights. size: pixels per side of this training's images."""
    if config.start_from is None:
        return
    where = f"stages.{name}.config.start_from: {config.start_from}"
    try:
        commits.read(config.start_from)
        state: dict[str, Any] = files.read_json(config.start_from / commits.STATE)
        there: dict[str, Any] = state["config"]
        their_size = state["size"] if config.weights_of_one_size else size
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{where} is no checkpoint; name a folder such as runs/<run>/<stage>/ckpt/step-001000, which holds a {commits.COMMIT}") from None
    if there["model"] != model:
        raise InputError(f"{where} is a checkpoint of the model {there['model']}, not {model}")
    try:
        theirs = {**spec.family_config(there).form, "data.size": their_size}
    except ValidationError as error:
        raise InputError(f"{where} was trained with a configuration that this medgen does not read: {document.told(error)}") from None
    different = [f"{FORM_IN_WORDS.get(key, key)} {_plain(theirs[key])} there, {_plain(value)} here" for key, value in {**config.form, "data.size": size}.items() if theirs[key] != value]
    if different:
        raise InputError(f"{where} is of a network of another shape: {'; '.join(different)}; give the same")


def _check_weights(name: str, config: FamilyConfig) -> None:
    """Not after days in the queue."""
    for needed in config.weights_files.values():
        try:
            needed.verified()
        except InputError as error:
            raise InputError(f"stages.{name}.config.{error}") from None


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def create(prepared: Prepared) -> list[str]:
    """Write what is missing of the run folder; returns notes in words for the user. Safe to call twice, or at once."""
    run = prepared.run
    configs = [stage.config for stage in prepared.spec.stages.values() if isinstance(stage, TrainStage)]
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
    run = prepared.run
    notes = _keep_code(prepared, packages)
    if not _spec_is_whole(run):
        if run.spec.exists():
            notes.append(f"{run.spec} was damaged; it is written anew")
            run.event("spec_renewed")
        _write_spec(prepared)
    notes += _write_plan(prepared)
    for stage in prepared.plan.stages:
        for task in stage.tasks:
            run.batch_log(stage.name, task.shard).parent.mkdir(parents=True, exist_ok=True)
    return notes


def _keep_code(prepared: Prepared, packages: list[Path]) -> list[str]:
    """The copy of the code and the manifest that names its hash: made once, and made good again if one of them is damaged.

    Raises InputError if the copy is damaged and there is only other code to replace it with: that is never done unasked."""
    run, installed, notes = prepared.run, snapshot.code_sha256(packages), []
    known, promised = snapshot.read_manifest(run), snapshot.promised_code(run)
    names = [package.name for package in packages]
    if not run.code.exists():
        if known is not None:  # before the code: a crash in between leaves no code that the manifest does not name
            fresh = snapshot.manifest(prepared.site.name, installed, prepared.spec_path)
            files.write_json(run.manifest, {**known, **{name: fresh[name] for name in snapshot.CODE_FACTS}})
            run.event("code_renewed", code_sha256=installed)
        snapshot.copy_code(run.code, packages)
    elif promised is not None and snapshot.copied_sha256(run.code, names) != promised:
        if installed != promised:
            raise InputError(
                f"{run.code} is not what was copied when this run was made, and the code here is another by now; "
                f"to go on with the code that is here: rm -r {shlex.quote(str(run.code))}"
            )
        aside = snapshot.set_code_aside(run)
        snapshot.copy_code(run.code, packages)
        run.event("code_renewed", code_sha256=installed, cause="the copy was damaged")
        notes.append(f"{run.code} was damaged; it was moved to {aside.name} and copied again, the same code as before")
    elif promised not in (None, installed):
        notes.append(f"the code has changed since this run was made; the run keeps its copy (remove {run.code} to take the new code)")
    if known is None:
        if run.manifest.exists():
            notes.append(f"{run.manifest} was damaged; it is written anew and describes this submit")
        facts = snapshot.manifest(prepared.site.name, snapshot.copied_sha256(run.code, names), prepared.spec_path)
        files.write_json(run.manifest, {**facts, "sweep": redact.value(prepared.point.values)})
        run.event("manifest_written", code_sha256=facts["code_sha256"])
    return notes


def _spec_is_whole(run: RunDir) -> bool:
    """True if spec.yaml reads back as a spec of this very run."""
    try:
        kept = spec.check(document.parse(run.spec.read_text(), str(run.spec), spec.BASH_KEYS))
    except (OSError, ValueError, MedgenError):
        return False
    return planning.run_id_of(kept) == run.run_id


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
        if isinstance(stage, TrainStage):
            record["stages"][name]["config"] = stage.config if stage.repeat is None else {}  # null is a value there
    return yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=120)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _write_plan(prepared: Prepared) -> list[str]:
    """Write plan.json if it is new, damaged, or other resources were asked for; never under jobs that were started with the old ones.

    Returns notes for the user."""
    run = prepared.run
    before = _plan_before(run)
    if before is None:
        damaged = run.plan.exists()
        files.write_json(run.plan, plan.to_json(prepared.plan))
        run.event("plan_renewed" if damaged else "created", run_id=prepared.plan.run_id, tasks=sum(len(stage.tasks) for stage in prepared.plan.stages))
        return [f"{run.plan} was damaged; it is written anew"] if damaged else []
    changes = resource_changes(before, prepared.plan)
    if plan.to_json(before) == plan.to_json(prepared.plan):
        return []
    if living_supervisor(run) is not None or (was_queued(run) and queued_tasks(run)):
        raise InputError(
            f"{run.run_id} is queued or running with other resources ({'; '.join(changes) or 'another site'}); "
            f"leave them as they are, or `medgen cancel {run.run_id}` first"
        )
    files.write_json(run.plan, plan.to_json(prepared.plan))
    run.event("resources_changed", changes=changes, site=prepared.plan.site)
    return []


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
