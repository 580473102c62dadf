"""Whatever stands in a spec, a profile, a script, Slurm's answers or a run folder: an answer or one message, never a traceback or a hang.

A few hundred fixed examples each. For a long run with new ones: MEDGEN_FUZZ=20000 pytest tests/test_fuzz.py"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch_stub import build

from medgen import document, files, names, planning, redact, sbatch_options, site, spec, units
from medgen.errors import InputError, MedgenError
from medgen.launch import slurm, tries
from medgen.launch.importing.verb import run_import
from medgen.launch.script import parse_job_name, render_script
from medgen.launch.slurm_backend import chunks
from medgen.rundir import RunDir
from medgen.site import Site
from medgen.watch import poll, slurm_jobs, state, usage, view, why
from medgen.watch.events import EventLog

WANTED = os.environ.get("MEDGEN_FUZZ")


def fuzz(examples: int) -> Callable[[Any], Any]:
    """The same examples each time, unless a long run was asked for. The deadline is for hangs, not for speed."""
    return settings(
        max_examples=int(WANTED or examples), derandomize=WANTED is None, database=None, deadline=timedelta(seconds=20),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


NASTY = [
    "", " ", "\0", "\n", "a\nb", "\x1b[31m", "\u2028", "é", "\U0001f9e0", "$(touch canary)", "`touch canary`", "; touch canary", "'", '"', "--help", "-rf",
    "%t", "%A", "${HOME}", "${NOT_SET_ANYWHERE}", "../../up", "/", "~", "~nobody_here/x", "a" * 300, "1e999h", "9" * 400 + "h", "9" * 400 + "G", "12h", "40G",
    "train", "masks", "*a", "&a", "!!python/object/apply:os.system", "no", "1e-4", "=", "<<", "0x_", "2026-13-45", "this:x", "a.b:c", "configs", "12:00:00",
    "--comment=\"open", "#SBATCH --array=0-9", "--array=0-9", "-p", "--nodes=2-4", "--nodes=²", "--nodes=" + "9" * 5000, "--gres=gpu:" + "9" * 30, "--time=" + "9" * 30, "--mem=" + "9" * 30 + "T",
]  # fmt: skip
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=20), st.sampled_from(NASTY))
junk = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.text(max_size=8), st.sampled_from(NASTY)), inner, max_size=4)), max_leaves=8
)
yaml_like = st.text(alphabet=st.one_of(st.sampled_from("[]{}:,&*!-|>'\"%#?@` \n\tab<=$01.~e_x"), st.characters(max_codepoint=0x2100)), max_size=120)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDGEN_RUNS", str(tmp_path / "runs"))


def full_spec() -> dict[str, Any]:
    """Every kind of stage and nearly every key."""
    made = tiny_spec()
    made["stages"]["extra"] = {
        "kind": "command", "run": "true", "foreach": ["a", "b"], "parallel": 1, "segments": 2, "env": {"A": "b"}, "outputs": ["x"], "needs": ["images"],
        "resources": {"time": "2h", "mem": "4G", "slurm": ["--partition=x"], "setup": ["true"], "gpus": 1, "gpu": {"any_of": ["a100"], "prefer": "a100", "memory": "40G"}},
    }  # fmt: skip
    made["stages"]["follows"] = {"kind": "structure", "of": "images", "against": "val", "channels": [8, 16], "seeds": 4, "steps": 9, "batch_size": 4, "lr": 0.01, "parallel": 2}
    made["stages"]["useful"] = {"kind": "utility", "of": "images", "task": "segmentation", "arms": ["real", "mixed"], "ratios": [0.5, 2], "channels": [8, 16], "seeds": 1, "allow_few_seeds": True}
    made["sweep"] = {"stages.train_seg.config.lr": [1e-3, 2e-3]}
    return made


def full_site() -> dict[str, Any]:
    return {
        "name": "here", "scheduler": "slurm", "cluster": "c", "cpus": 8, "gpus": 2, "mem": "8G", "partitions": {"gpu": "GPUQ", "cpu": "CPUQ"}, "account": "me",
        "qos": "q", "reservation": "r", "features": {"a100": "40G", "h100": ["80G"]}, "exclude": [{"nodes": "n1", "reason": "broken", "until": "2030-01-01"}],
        "limits": {"time": "3d", "array": 10, "submitted": 50}, "setup": ["true"], "export": ["X"], "secrets": "/s", "grace": "60s",
        "environment": {"modules": ["a/1"], "apptainer": "/i.sif", "apptainer_options": ["--nv"]},
        "notify": {"mail": "a@b.c", "webhook": "HOOK", "command": "true", "on": ["end"]},
    }  # fmt: skip


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in below for found in paths_of(item, (*path, key)))]


def with_value(root: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(root)
    target = changed
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return changed


@st.composite
def spoiled(draw: st.DrawFn, root: dict[str, Any]) -> Any:
    """The mapping with one to three of its values, or keys, replaced by anything."""
    for _ in range(draw(st.integers(1, 3))):
        paths = paths_of(root)
        path = draw(st.sampled_from(paths[1:] if len(paths) > 1 else paths))
        if path and isinstance(path[-1], str) and draw(st.booleans()) and draw(st.booleans()):
            path = (*path[:-1], draw(st.sampled_from(NASTY)))
        root = with_value(root, path, draw(junk))
        if not isinstance(root, dict):
            break
    return root


def written(value: Any) -> Path:
    path = Path("fuzzed.yaml")
    path.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
    return path


def rendered(checked: spec.Spec, profile: Site) -> None:
    """Every script of a plan; its options stand in lines of their own at the top and nowhere else."""
    plan = planning.make_plan(checked, profile)
    for stage in plan.stages:
        chunk = chunks(stage, [task.shard for task in stage.tasks][:5], 1, 10)[0]
        text = render_script(plan, stage, chunk, Path("/runs") / plan.run_id, "/usr/bin/python3")
        assert text.split("\n\n")[0].count("\n") == text.split("\n\n")[0].count("\n#SBATCH --") + text.split("\n\n")[0].count("\n#SBATCH -p")


# --- what a user writes ----------------------------------------------------------------------------------------------


@fuzz(600)
@given(yaml_like)
def test_any_text_is_a_document_or_one_message(text: str) -> None:
    with contextlib.suppress(InputError):
        document.parse(text, "x.yaml")


@fuzz(300)
@given(st.one_of(st.binary(max_size=200), yaml_like.map(str.encode), yaml_like.map(lambda text: b"version: 1\nname: x\nstages:\n  a: {kind: command, run: " + text.encode())))
def test_any_bytes_are_a_spec_or_one_message(content: bytes) -> None:
    Path("bytes.yaml").write_bytes(content)
    for read in (spec.load_points, lambda path: site.load(str(path))):
        with contextlib.suppress(InputError):
            read(Path("bytes.yaml"))


@fuzz(400)
@given(spoiled(full_spec()))
def test_a_spoiled_spec_is_planned_or_one_message(value: Any) -> None:
    try:
        points = spec.load_points(written(value))
    except InputError as error:
        assert str(error).startswith("fuzzed.yaml") or "home folder" in str(error), error
        return
    for profile in (Site(), Site.model_validate(full_site())):
        with contextlib.suppress(InputError):
            rendered(points[0].spec, profile)


@fuzz(250)
@given(spoiled(full_site()))
def test_a_spoiled_profile_is_used_or_one_message(value: Any) -> None:
    with contextlib.suppress(InputError):
        rendered(spec.load(written(tiny_spec())), site.load(str(written_profile(value))))


def written_profile(value: Any) -> Path:
    return written(value).rename("profile.yaml")


KEYS = [".".join(str(key) for key in path) for path in paths_of(full_spec())[1:]]


@fuzz(250)
@given(st.lists(st.one_of(
    st.text(max_size=30),
    st.tuples(st.one_of(st.sampled_from(KEYS), st.text(max_size=12)), st.one_of(yaml_like, st.sampled_from(NASTY), junk.map(lambda value: json.dumps(value, default=str)))).map("=".join),
), min_size=1, max_size=3))  # fmt: skip
def test_any_override_is_used_or_one_message(overrides: list[str]) -> None:
    with contextlib.suppress(InputError):
        spec.load_points(written(full_spec()), overrides)


@fuzz(400)
@given(st.one_of(st.text(), st.sampled_from(NASTY), st.integers(), st.floats(), st.none()))
def test_any_amount_is_a_number_or_a_value_error(value: Any) -> None:
    for parse in (units.parse_minutes, units.parse_memory, units.parse_seconds):
        with contextlib.suppress(ValueError):
            assert isinstance(parse(value), int)


@fuzz(400)
@given(st.text(alphabet=st.one_of(st.sampled_from("-=\"' #\\nptJC:,%0123456789gpu"), st.characters(max_codepoint=0x300)), max_size=60))
def test_any_line_of_options_is_read_or_a_value_error(line: str) -> None:
    with contextlib.suppress(ValueError):
        sbatch_options.amounts([line])
        sbatch_options.without([line], {"time"})


@fuzz(300)
@given(st.text(), junk)
def test_hiding_secrets_takes_anything(text: str, value: Any) -> None:
    shown = redact.text(text + " API_KEY=abcdefgh " + text)
    assert "abcdefgh" not in shown or "\"" in text or "'" in text or "\\" in text
    redact.value(value)
    redact.arguments([text, "-o", text])
    assert not names.CONTROL.search(names.printable(text).replace("\n", ""))


SCRIPT_LINES = [
    "#!/bin/bash", "#SBATCH --time=1:00:00", "#SBATCH --array=0-3", "#SBATCH -J 'x", "#SBATCH --gres=gpu:1", "module load a", "source activate x", "export A=b",
    "for i in 1 2 3; do", "python x.py --lr $i", "done", "srun python a.py \\", "if [ -z \"$A\" ]; then", "fi", "sbatch --dependency=afterok:$SLURM_JOB_ID $0",
    "trap 'x' USR1", "cat <<EOF", "EOF", "case $SLURM_ARRAY_TASK_ID in", "  0) A=1 ;;", "esac", "function f() {", "}", "A=(1 2 3)", "echo ${A[$SLURM_ARRAY_TASK_ID]}", "exit 1", "$(",
]  # fmt: skip


@fuzz(120)
@given(st.lists(st.one_of(st.sampled_from(SCRIPT_LINES), st.text(max_size=40)), max_size=14), st.booleans())
def test_any_script_is_imported_or_one_message(lines: list[str], portable: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "old.slurm"
        script.write_text("\n".join(["#!/bin/bash", "#SBATCH --job-name=x", *lines]))
        with contextlib.suppress(InputError):
            run_import([script], Path(folder) / "out", portable)


# --- what Slurm says -------------------------------------------------------------------------------------------------

SLURM_WORDS = [
    "", "|", "12", "12_3", "[0-9]", "[0-39999]", "[0-9999999]", "1-89:2%90", "...", "N/A", "PENDING", "RUNNING", "CANCELLED by 0", "None", "1700000000", "9" * 30, "2026-11-20T10:00:00", "0:0",
    "UNLIMITED", "1-00:00:00", "medgen.x-0123456789.a.1.0", "medgen.x-0123456789.a.1.0.abcdef", "cpu=8,gres/gpu=2", "gpu:a100:2(S:0-1)", "4Gn", "?", "1024K", "up", "infinite", "8+", "(null)",
    "-1", "٣", "²", "0-0-0", "99999999999-01:00", "\x00",
]  # fmt: skip
slurm_lines = st.lists(st.lists(st.one_of(st.sampled_from(SLURM_WORDS), st.text(max_size=10)), max_size=18).map("|".join), max_size=5).map("\n".join)


@fuzz(500)
@given(slurm_lines)
def test_any_answer_of_slurm_is_read(text: str) -> None:
    for row in slurm.parse_queue(text, ""):
        parse_job_name(row.name)
    slurm.parse_accounting(text)
    slurm.parse_partitions(text)
    slurm.parse_config(text.replace("|", " = "))
    for word in text.replace("\n", "|").split("|"):
        slurm.expand_tasks(word)
        slurm.parse_time(word), slurm.parse_elapsed(word), slurm.parse_mebibytes(word), slurm.parse_gpus(word), parse_job_name(word), sbatch_options.minutes(word)
    slurm_jobs.jobs_of(RunDir(Path("/x-0123456789")), text, slurm_jobs.read_submitted([]))


@fuzz(200)
@given(st.one_of(st.binary(max_size=60), junk.map(lambda value: json.dumps(value, default=str).encode()), st.fixed_dictionaries(
    dict.fromkeys(("text", "asked", "tried", "interval_seconds", "failing_since", "trouble"), scalars) | {"rows": junk}
).map(lambda value: json.dumps(value, default=str).encode())))  # fmt: skip
def test_any_kept_answer_is_used_or_forgotten(content: bytes) -> None:
    Path("kept.json").write_bytes(content)
    poll._kept_queue(Path("kept.json")).is_due(0.0, 0.0)
    poll._kept_accounting(Path("kept.json")).is_due({(1, None)}, 0.0)


# --- what lies in a run folder ---------------------------------------------------------------------------------------

FACTS = ("stage", "shard", "attempt", "name", "job_id", "job_ids", "shards", "offset", "tasks", "devices", "from_step", "seconds", "status", "next", "cause", "time", "rc", "log", "node", "host")
KINDS = ("submitted", "job_intent", "job_submitted", "jobs_released", "jobs_cancelled", "task_started", "task_ended", "requeue_refused", "cancelled", "finished", "rank_failed", "created")
plausible = st.one_of(st.sampled_from(["train", "images", "done", "failed", "interrupted", "goes on from what it saved", 0, 1, 2, 7, [1], [0, 1], 1700000000.0, None]), junk)
events = st.fixed_dictionaries({"event": st.sampled_from(KINDS), "time": st.sampled_from([1700000000.0, 1, "x"])}, optional={name: plausible for name in FACTS if name != "time"})
event_lines = st.lists(st.one_of(events.map(lambda event: json.dumps(event, default=str)), st.text(max_size=30), junk.map(lambda value: json.dumps(value, default=str))), max_size=8)
damaged = st.one_of(st.binary(max_size=40), junk.map(lambda value: json.dumps(value, default=str).encode()))


@st.composite
def records(draw: st.DrawFn, sound: dict[str, Any]) -> bytes:
    """A sound record with some values replaced, or no record at all."""
    if draw(st.booleans()):
        return draw(damaged)
    return json.dumps({**sound, **{name: draw(plausible) for name in draw(st.lists(st.sampled_from(sorted(sound)), max_size=2))}}, default=str).encode()


OUTCOME = {
    "run_id": "stub-0123456789", "stage": "train", "shard": 0, "task_hash": "train0", "attempt": 0, "status": "failed", "cause": "words", "host": "h", "device": "cpu",
    "devices": 1, "started": 1.0, "ended": 2.0, "files": [{"path": "x", "size_bytes": 1, "sha256": "0"}], "facts": {},
}  # fmt: skip
BEAT = {"stage": "train", "shard": 0, "attempt": 0, "step": 1, "total": 2, "unit": "steps", "loss": 0.5, "time": 1.0, "host": "h", "pid": 1, "advanced": 1.0}
STAGES = [{"name": "train", "kind": "train"}, {"name": "images", "kind": "generate", "tasks": 2, "needs": ["train"]}]


@fuzz(200)
@given(event_lines, records(OUTCOME), records(BEAT), damaged)
def test_any_damage_in_a_run_folder_is_shown_or_one_message(lines: list[str], outcome: bytes, beat: bytes, supervisor: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, _ = build(Path(folder), STAGES)
        run.events_file.write_text("\n".join(lines) + "\n")
        for path, content in ((run.outcome_file("train", 0), outcome), (run.heartbeat_file("train", 0), beat), (run.supervisor, supervisor)):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        log = EventLog(run)
        log.refresh()
        tries.read_tries(run.events())
        run.read_outcome("train", 0), run.read_heartbeat("train", 0), run.is_done("train", 0, "train0")
        with contextlib.suppress(MedgenError):
            seen = state.read_state(run)
            json.dumps(state.to_json(seen))
            view.render(seen)


@fuzz(60)
@given(event_lines, records(OUTCOME))
def test_why_and_usage_take_any_damage(lines: list[str], outcome: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, _ = build(Path(folder), STAGES)
        run.events_file.write_text("\n".join(lines) + "\n")
        run.outcome_file("train", 0).parent.mkdir()
        run.outcome_file("train", 0).write_bytes(outcome)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.suppress(MedgenError):
            why.why(run, True)
            why.why(run, False)
            usage.usage(run, True)
            usage.usage(run, False)


@fuzz(150)
@given(spoiled({"plan": {}}), damaged)
def test_any_plan_file_is_a_plan_or_one_message(value: Any, content: bytes) -> None:
    from medgen import plan

    with tempfile.TemporaryDirectory() as folder:
        run, _ = build(Path(folder), STAGES)
        record = files.read_json(run.plan)
        for text in (content, json.dumps({**record, **value} if isinstance(value, dict) else value, default=str).encode()):
            run.plan.write_bytes(text)
            with contextlib.suppress(InputError):
                plan.read(run)
