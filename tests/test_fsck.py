"""`medgen fsck` through the command line: it finds every damage, says what submit really does, and deletes only what nothing needs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_spec
from test_damage import flip_last_byte
from test_pipeline import Medgen, only_run, tree

from medgen import checkpoint, files
from medgen.rundir import RunDir

SPEC = "fscked.yaml"
DAMAGED, UNFINISHED = "damaged", "unfinished"


def _spec() -> dict[str, Any]:
    stages = tiny_spec()["stages"]
    chosen = {name: stages[name] for name in ("train_seg", "masks")}
    chosen["train_seg"]["config"]["loop"] = {**chosen["train_seg"]["config"]["loop"], "checkpoint_steps": 1}
    chosen["masks"]["shards"] = 2
    return tiny_spec(name="fscked", stages={**chosen, "report": {"kind": "report"}})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A finished run: training with three checkpoints, two shards of masks, report."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / SPEC).write_text(yaml.safe_dump(_spec(), sort_keys=False))
    environment = {**os.environ, "MEDGEN_RUNS": str(folder / "runs"), "MEDGEN_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "medgen", "submit", SPEC, "--local"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return only_run(folder)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    shutil.copy(whole.parent.parent / SPEC, tmp_path / SPEC)
    copied: Path = shutil.copytree(whole, tmp_path / "runs" / whole.name)
    return copied


def examine(medgen: Medgen, run: Path, expect: int) -> dict[str, Any]:
    """The JSON of fsck, its parts by name."""
    record: dict[str, Any] = json.loads(medgen("fsck", run, "--json", expect=expect).stdout)
    return {**record, "parts": {part["name"]: part for part in record["parts"]}}


def only_problem(record: dict[str, Any], part: str) -> dict[str, Any]:
    assert [name for name, found in record["parts"].items() if found["problems"]] == [part]
    (problem,) = record["parts"][part]["problems"]
    return dict(problem)


def steps(run: Path) -> list[Path]:
    return sorted((run / "train_seg" / "ckpt").glob("step-*"))


def test_a_whole_run_verifies_and_reading_it_changes_nothing(run: Path, medgen: Medgen) -> None:
    before = tree(run)
    shown = medgen("fsck", run).stdout
    assert "everything verifies" in shown and "Nothing is left over" in shown and "✗" not in shown
    record = examine(medgen, run, expect=0)
    assert {part["state"] for part in record["parts"].values()} == {"whole"} and record["safe"] == [] and record["at_work"] is None
    assert list(record["parts"])[:5] == ["spec", "plan", "manifest", "code", "events"]
    assert record["files_read"] >= 14 + 2 + 1 + 2 * 5
    assert tree(run) == before


def test_every_damage_is_found_and_submit_does_what_fsck_says(run: Path, tmp_path: Path, medgen: Medgen) -> None:
    expected = tree(run / "masks" / "dataset")
    flip_last_byte(steps(run)[-1] / "modules.ema.pt")
    flip_last_byte(run / "masks" / "shards" / "00001" / "images" / "000009" / "seg.nii.gz")
    shutil.rmtree(run / "masks" / "dataset" / "images" / "000003")
    (run / "outcome" / "report.0.json").write_text("[")
    (run / "manifest.json").write_text('{"half')
    (run / "spec.yaml").write_text((run / "spec.yaml").read_text()[:150])
    (run / "code" / "medgen" / "rng.py").unlink()
    (run / ".supervisor.json").write_bytes(b"\xff\x00garbage")
    with (run / "events.jsonl").open("ab") as events:
        events.write(b'\xfe\xff{"time": 3\n{"event": "task_started", "ti')
    found = examine(medgen, run, expect=1)["parts"]
    assert [name for name, part in found.items() if part["state"] == DAMAGED] == ["spec", "manifest", "code", "train_seg", "masks", "collect_masks", "report"]
    assert "goes on from step" in found["train_seg"]["problems"][0]["next"]
    assert "images/000009/seg.nii.gz does not match its sha256" in found["masks"]["problems"][0]["what"]
    assert "2 lines" in found["events"]["text"] and found["events"]["state"] == "told"
    assert not any(problem["command"] for part in found.values() for problem in part["problems"]), "all of it heals by itself"

    said = medgen("submit", SPEC, "--local").stderr
    assert all(f"{name} was damaged" in said for name in ("manifest.json", "spec.yaml", "code")), said
    assert tree(run / "masks" / "dataset") == expected
    record = examine(medgen, run, expect=0)
    aside = {item["path"].split("/")[-1].partition(".")[0] for item in record["safe"]}
    assert {"dataset", "00001", "code", f"bad-{steps(run)[-1].name}"} <= aside, "what was set aside is safe once its place is filled"

    listed = record["safe"]
    before = tree(run)
    told = medgen("fsck", run, "--clean").stdout
    assert all(item["path"] in told for item in listed)
    emptied = {item["path"] for item in listed if item["is_emptied"]}
    gone = {path for path in before if not (run / path).exists()}
    assert gone == {path for path in before if any(path == item["path"] or path.startswith(item["path"] + "/") for item in listed)} - emptied
    assert all((run / path).read_bytes() == b"" for path in emptied)
    left = examine(medgen, run, expect=0)
    assert left["safe"] == []
    again = medgen("submit", SPEC, "--local")
    assert "0 tasks to run" in again.stderr + again.stdout


@pytest.mark.parametrize("content", ['{"version": 4, "stages": 3}', '{"version": 2, "sta', "[]", ""])
def test_a_half_written_plan_is_written_anew(run: Path, medgen: Medgen, content: str) -> None:
    before = (run / "plan.json").read_bytes()
    (run / "plan.json").write_text(content)
    record = examine(medgen, run, expect=1)
    assert "written anew" in only_problem(record, "plan")["next"] and record["safe"] == []
    assert "plan.json was damaged" in medgen("submit", SPEC, "--local").stderr
    assert (run / "plan.json").read_bytes() == before and (run / "outcome" / "report.0.json").stat().st_mtime < (run / "plan.json").stat().st_mtime
    examine(medgen, run, expect=0)


def test_a_plan_of_another_version_is_no_damage_and_stays(run: Path, medgen: Medgen) -> None:
    (run / "plan.json").write_text('{"version": 1}')
    assert "made by another version of medgen" in medgen("fsck", run, expect=2).stderr
    assert "made by another version of medgen" in medgen("submit", SPEC, "--local", expect=2).stderr
    assert (run / "plan.json").read_text() == '{"version": 1}'


def test_damaged_code_is_never_replaced_by_other_code_unasked(run: Path, medgen: Medgen) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "code_sha256": "0" * 64}))  # neither the copy nor what is installed
    assert "stops and gives the command" in only_problem(examine(medgen, run, expect=1), "code")["next"]
    refused = medgen("submit", SPEC, "--local", expect=2).stderr
    subprocess.run(shlex.split(refused.strip().rpartition(": ")[2]), check=True)
    medgen("submit", SPEC, "--local")
    examine(medgen, run, expect=0)


def test_no_checkpoint_that_verifies_takes_one_command_and_never_a_silent_restart(run: Path, medgen: Medgen) -> None:
    expected = tree(run / "masks" / "dataset")
    for step in steps(run):
        flip_last_byte(step / "modules.ema.pt")
    problem = only_problem(examine(medgen, run, expect=1), "train_seg")
    assert "never begins again from zero unasked" in problem["next"]
    (run / "outcome" / "train_seg.0.json").unlink()
    assert problem["command"] in medgen("train", run, expect=2).stderr, "the training itself gives the same command"
    subprocess.run(shlex.split(problem["command"]), check=True)
    medgen("submit", SPEC, "--local")
    assert tree(run / "masks" / "dataset") == expected
    assert "train_seg/bad-ckpt" in {item["path"] for item in examine(medgen, run, expect=0)["safe"]}


@pytest.mark.slow
def test_a_lost_best_checkpoint_takes_one_command(run: Path, medgen: Medgen) -> None:
    older = steps(run)[0]
    commit = json.loads((older / "commit.json").read_text())
    (older / "commit.json").write_text(json.dumps(files.with_own_hash({**commit, "metrics": {"val": {"value": 0.001, "better": "lower"}}})))
    (run / "outcome" / "train_seg.0.json").unlink()
    medgen("train", run)
    flip_last_byte(older / "modules.ema.pt")
    problem = only_problem(examine(medgen, run, expect=1), "train_seg")
    assert "best-val was this one" in problem["next"]
    (run / "outcome" / "train_seg.0.json").unlink()
    assert "best-val checkpoint cannot be used" in medgen("train", run, expect=1).stderr
    subprocess.run(shlex.split(problem["command"]), check=True)
    medgen("submit", SPEC, "--local")
    examine(medgen, run, expect=0)


def test_a_damaged_checkpoint_that_nothing_uses_is_safe_only_beside_whole_ones(run: Path, medgen: Medgen) -> None:
    flip_last_byte(steps(run)[0] / "modules.ema.pt")
    record = examine(medgen, run, expect=1)
    assert "nothing uses this checkpoint" in only_problem(record, "train_seg")["next"]
    assert [item["path"] for item in record["safe"]] == [str(steps(run)[0].relative_to(run))]
    flip_last_byte(steps(run)[-1] / "modules.ema.pt")
    assert examine(medgen, run, expect=1)["safe"] == []


def add_checkpoint(run: Path, step: int) -> Path:
    """A copy of the newest that says it is of another step, and has no metric."""
    extra: Path = shutil.copytree(steps(run)[-1], steps(run)[-1].with_name(f"step-{step:06d}"))
    commit = json.loads((extra / "commit.json").read_text())
    (extra / "commit.json").write_text(json.dumps(files.with_own_hash({**commit, "step": step, "metrics": {}})))
    return extra


def test_more_checkpoints_than_the_policy_keeps(run: Path, medgen: Medgen) -> None:
    """One that is older than all, whole, and not the best: what `prune` would have deleted. The spare stays."""
    extra = add_checkpoint(run, 1)
    (item,) = examine(medgen, run, expect=0)["safe"]
    assert item["path"] == "train_seg/ckpt/step-000001" and "nothing selects it" in item["why"]
    medgen("fsck", run, "--clean")
    assert extra not in steps(run) and len(steps(run)) == 2


def test_one_too_many_is_what_the_training_would_delete(run: Path, medgen: Medgen) -> None:
    """It counts its newest by their commits: one whose weights are damaged takes the place of an older one."""
    older = steps(run)[0]
    flip_last_byte(add_checkpoint(run, 9) / "modules.ema.pt")
    found = [item["path"] for item in examine(medgen, run, expect=1)["safe"] if "nothing selects it" in item["why"]]
    assert [run / path for path in found] == checkpoint.prune(older.parent, keep=2) == [older]


def test_on_slurm_it_says_what_a_submit_cannot_see(run: Path, medgen: Medgen) -> None:
    (run / "plan.json").write_text((run / "plan.json").read_text().replace('"scheduler": "local"', '"scheduler": "slurm"'))
    image = run / "masks" / "shards" / "00000" / "images" / "000003" / "seg.nii.gz"
    flip_last_byte(image)
    problem = only_problem(examine(medgen, run, expect=1), "masks")
    assert "compares sizes only" in problem["next"] and problem["command"] == f"rm {run}/outcome/masks.0.json"
    image.write_bytes(b"short")
    problem = only_problem(examine(medgen, run, expect=1), "masks")
    assert "moved to quarantine" in problem["next"] and problem["command"] is None


def test_nothing_is_safe_where_slurm_cannot_be_asked(run: Path, medgen: Medgen, environment: dict[str, str]) -> None:
    leave_temporaries(run)
    with (run / "events.jsonl").open("a") as events:
        events.write(json.dumps({"event": "job_intent", "time": 3, "host": "h", "name": "x", "stage": "masks", "offset": 0, "shards": [0]}) + "\n")
    environment["PATH"] = "/nonexistent"
    record = examine(medgen, run, expect=0)
    assert "cannot be seen from here" in record["at_work"] and record["safe"] == []
    assert "Somebody may work on this run now" in medgen("fsck", run).stdout
    medgen("fsck", run, "--clean")
    assert (run / "outcome" / ".x.json.0123abcd.tmp").exists()


def leave_temporaries(run: Path) -> set[str]:
    """What killed writers leave, and what only looks like it."""
    (run / "masks" / "shards" / ".00000.deadbeef.tmp" / "images").mkdir(parents=True)
    for name in ("outcome/.x.json.0123abcd.tmp", "hb/masks.0.4711.tmp", ".plan.json.89abcdef.tmp", "notes.tmp", "masks/my.tmp"):
        (run / name).write_text("text")
    return {"masks/shards/.00000.deadbeef.tmp", "outcome/.x.json.0123abcd.tmp", "hb/masks.0.4711.tmp", ".plan.json.89abcdef.tmp"}


def test_temporaries_go_and_what_is_somebody_elses_stays(run: Path, tmp_path: Path, medgen: Medgen) -> None:
    temporaries = leave_temporaries(run)
    (run / "my_notes").mkdir()
    (run / "my_notes" / "ideas.txt").write_text("keep")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".x.0123abcd.tmp").write_text("not of this run")
    (run / "linked").symlink_to(tmp_path / "elsewhere")
    (run / "round").symlink_to(run)
    assert {item["path"] for item in examine(medgen, run, expect=0)["safe"]} == temporaries
    medgen("fsck", run, "--clean")
    assert not any((run / name).exists() for name in temporaries)
    assert (run / "my_notes" / "ideas.txt").exists() and (run / "notes.tmp").exists() and (tmp_path / "elsewhere" / ".x.0123abcd.tmp").exists()


def test_a_stage_that_the_plan_no_longer_has(run: Path, medgen: Medgen) -> None:
    outcome = json.loads((run / "outcome" / "report.0.json").read_text())
    (run / "outcome" / "gone.0.json").write_text(json.dumps({**outcome, "stage": "gone"}))
    (run / "gone").mkdir()
    (run / "gone" / "metrics.json").write_text("{}")
    assert {item["path"] for item in examine(medgen, run, expect=0)["safe"]} == {"gone", "outcome/gone.0.json"}


def test_while_somebody_works_nothing_is_safe_and_nothing_is_a_lie(run: Path, tmp_path: Path, medgen: Medgen, environment: dict[str, str]) -> None:
    leave_temporaries(run)
    shutil.rmtree(run / "masks" / "dataset")
    for path in [*(run / "outcome").glob("*masks*"), run / "outcome" / "report.0.json"]:
        path.unlink()
        stage, shard, _ = path.name.split(".")
        RunDir(run).event("outcome_withdrawn", stage=stage, shard=int(shard), cause="a test")
    shutil.rmtree(run / "masks" / "shards" / "00000")
    armed = {**environment, "MEDGEN_FAULT": "site=shard.write,shard=0,nth=3,action=stop"}
    with subprocess.Popen([sys.executable, "-m", "medgen", "submit", SPEC, "--local"], cwd=tmp_path, env=armed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list((run / "masks" / "shards").glob(".00000.*.tmp/images/000002")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        record = examine(medgen, run, expect=0)
        assert "supervised by process" in record["at_work"] and record["safe"] == []
        assert record["parts"]["masks"]["state"] == "working" and record["parts"]["report"]["state"] == UNFINISHED
        assert "Nothing is called safe" in medgen("fsck", run, "--clean").stdout
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while (record := examine(medgen, run, expect=0))["at_work"] is not None:
        assert time.monotonic() < deadline, record["at_work"]
    left = [item["path"] for item in record["safe"] if item["path"].startswith("masks/shards/.00000.")]
    assert len(left) == 1 and "deadbeef" not in left[0], "the older one was swept when the shard began"


KILLED = ";".join(
    f"site={site},stage={stage},attempt={attempt},action=kill9"
    for stage, sites in (("train_seg", ("start", "step", "ckpt.write", "ckpt.commit", "ckpt.load", "outcome.write")), ("masks", ("shard.write", "shard.commit")))
    for attempt, site in enumerate(sites)
)


@pytest.mark.slow
def test_after_every_kill_the_same_submit_goes_on(whole: Path, tmp_path: Path, medgen: Medgen, environment: dict[str, str]) -> None:
    """Killed at every place where something is written: no flag, no cleaning, the same images; and fsck calls none of it damage."""
    spec = _spec()
    spec["stages"]["masks"]["shards"] = 1
    (tmp_path / SPEC).write_text(yaml.safe_dump(spec, sort_keys=False))
    environment |= {"MEDGEN_FAULT": KILLED, "MEDGEN_FAULT_LOG": str(tmp_path / "faults")}
    for _ in range(8):  # each takes the next ones, as far as its tries go
        code = subprocess.run([sys.executable, "-m", "medgen", "submit", SPEC, "--local"], cwd=tmp_path, env=environment, capture_output=True, timeout=300).returncode
        assert code in (0, 1)
        if code == 0:
            break
        assert all(part["state"] in ("whole", UNFINISHED) for part in examine(medgen, only_run(tmp_path), expect=0)["parts"].values())
    fired = [line.split()[0] for line in (tmp_path / "faults").read_text().splitlines()]
    assert fired == ["start", "step", "ckpt.write", "ckpt.commit", "ckpt.load", "outcome.write", "shard.write", "shard.commit"]
    medgen("submit", SPEC, "--local")
    run = only_run(tmp_path)
    assert tree(run / "masks" / "dataset") == tree(whole / "masks" / "dataset")
    medgen("fsck", run, "--clean")
    assert examine(medgen, run, expect=0)["safe"] == []


def test_records_that_are_lost_after_the_events_called_them_done(run: Path, medgen: Medgen) -> None:
    shutil.rmtree(run / "outcome")
    parts = examine(medgen, run, expect=1)["parts"]
    stages = [part for name, part in parts.items() if name in ("train_seg", "masks", "collect_masks", "report")]
    assert len(stages) == 4 and all(part["state"] == DAMAGED for part in stages)
    assert all("done according to the events, but its record outcome/" in problem["what"] for part in stages for problem in part["problems"])
    assert "goes on to its end" in parts["train_seg"]["problems"][0]["next"] and "made again" in parts["masks"]["problems"][0]["next"]
    medgen("submit", SPEC, "--local")
    assert {part["state"] for part in examine(medgen, run, expect=0)["parts"].values()} == {"whole"}


def test_what_medgen_itself_took_back_is_not_lost(run: Path, medgen: Medgen) -> None:
    (run / "outcome" / "report.0.json").unlink()
    RunDir(run).event("outcome_withdrawn", stage="report", shard=0, cause="a file does not match the sha256 it was written with")
    assert examine(medgen, run, expect=0)["parts"]["report"]["text"] == "not done"


@pytest.mark.parametrize("content", ["", "garbage\n"])
def test_events_that_are_there_and_tell_nothing(run: Path, medgen: Medgen, content: str) -> None:
    (run / "events.jsonl").write_text(content)
    assert "begins anew" in only_problem(examine(medgen, run, expect=1), "events")["next"]


def test_an_outcome_of_an_earlier_attempt_is_not_told(run: Path, medgen: Medgen) -> None:
    file = run / "outcome" / "report.0.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "status": "interrupted", "cause": "stopped by SIGTERM", "files": []}))
    assert examine(medgen, run, expect=0)["parts"]["report"]["text"] == "interrupted: stopped by SIGTERM"
    RunDir(run).event("task_started", stage="report", shard=0, attempt=7, devices=1, from_step=0)
    assert examine(medgen, run, expect=0)["parts"]["report"]["text"] == "attempt 7 has begun, and told no end"
    RunDir(run).event("task_ended", stage="report", shard=0, attempt=7, seconds=1, status="failed", next="not tried again", again=False, cause="ValueError: no", rc=1)
    assert examine(medgen, run, expect=0)["parts"]["report"]["text"] == "failed: ValueError: no"


def test_a_submit_that_was_stopped_early_is_no_damage(run: Path, medgen: Medgen) -> None:
    for path in run.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "not a run folder" in medgen("fsck", run, expect=2).stderr
    (run / ".prepare.lock").touch()
    (run / ".code.0123abcd.tmp").mkdir()
    record = examine(medgen, run, expect=0)
    assert {part["state"] for part in record["parts"].values()} == {UNFINISHED} and record["safe"] == []


def test_what_is_no_run_is_told_in_words(run: Path, tmp_path: Path, medgen: Medgen) -> None:
    assert "no such run" in medgen("fsck", "nothing", expect=2).stderr
    assert "not a run folder" in medgen("fsck", tmp_path, expect=2).stderr
    moved = run.rename(run.with_name("fscked-0000000000"))
    problem = examine(medgen, moved, expect=1)["parts"]["plan"]["problems"][0]
    assert problem["command"] == f"mv {moved} {run}"


def test_garbage_never_gives_a_traceback(run: Path, medgen: Medgen) -> None:
    """Any record, replaced by what a bad disk gives."""
    records = [*(run / "outcome").glob("*.json"), *(run / "hb").glob("*.json"), *(run / "masks").rglob("manifest.json"), steps(run)[0] / "commit.json",
               run / "manifest.json", run / "spec.yaml", run / "events.jsonl", run / ".supervisor.json"]  # fmt: skip
    for raw in (b"\xff\xfe\x00", b"null", b'{"files": 3, "facts": [], "step": {}, "metrics": 1}', None):
        for path in records:
            path.unlink(missing_ok=True)
            path.symlink_to(path.name) if raw is None else path.write_bytes(raw)
        shown = medgen("fsck", run, expect=1)
        assert "Traceback" not in shown.stderr + shown.stdout and "✗" in shown.stdout
    assert "events.jsonl cannot be read: Too many levels of symbolic links" in shown.stdout


def examine_as_another(run: Path, tmp_path: Path, environment: dict[str, str]) -> dict[str, Any]:
    """`examine` a run with damage as an ordinary user. Root reads everything: then another user looks."""
    as_another = ["setpriv", "--reuid", "65534", "--clear-groups"] if os.geteuid() == 0 else []
    if as_another:
        for folder in (run, run.parent, tmp_path, *tmp_path.parents[:3]):
            folder.chmod(0o755)
    command = [*as_another, sys.executable, "-m", "medgen", "fsck", str(run), "--json"]
    shown = subprocess.run(command, cwd=run, env=environment, capture_output=True, text=True, timeout=120)
    if "Traceback" in shown.stderr and "PermissionError" in shown.stderr and str(run) not in shown.stderr:
        pytest.skip("the interpreter itself is not readable for others here")
    assert shown.returncode == 1, shown.stderr
    record: dict[str, Any] = json.loads(shown.stdout)
    return {**record, "parts": {part["name"]: part for part in record["parts"]}}


def test_what_may_not_be_read_is_not_called_changed(run: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    newest = steps(run)[-1]
    for path in newest.iterdir():
        path.chmod(0)
    problem = only_problem(examine_as_another(run, tmp_path, environment), "train_seg")
    assert "cannot be read: Permission denied" in problem["what"]
    assert problem["command"] == f"chmod -R u+rX {newest}"


@pytest.mark.parametrize(("mode", "closed", "not_known"), [
    (0, ["outcome"], ["train_seg", "masks", "collect_masks", "report"]),
    (0o600, ["outcome"], ["train_seg", "masks", "collect_masks", "report"]),
    (0, ["train_seg/ckpt", "code/medgen/data", "hb", "masks/quarantine"], ["train_seg"]),
    (0o600, ["train_seg"], ["train_seg"]),
])  # fmt: skip
def test_a_folder_that_may_not_be_read_is_told_and_the_rest_is_looked_at(run: Path, tmp_path: Path, medgen: Medgen, environment: dict[str, str],
                                                                          mode: int, closed: list[str], not_known: list[str]) -> None:  # fmt: skip
    leave_temporaries(run)
    for name in closed:
        (run / name).mkdir(exist_ok=True)
        (run / name).chmod(mode)
    record = examine_as_another(run, tmp_path, environment)
    problems = record["parts"]["folders"]["problems"]
    commands = {problem["command"] for problem in problems}
    assert commands == {f"chmod -R u+rX {run / name}" for name in closed} and all("Permission denied" in problem["what"] for problem in problems)
    assert [name for name, part in record["parts"].items() if "not known" in part["text"]] == not_known
    assert record["safe"] == [], "who works on it and what is used cannot be told"
    for command in commands:
        subprocess.run(shlex.split(command), check=True)
    assert len(examine(medgen, run, expect=0)["safe"]) == 4


def test_a_checkpoint_that_may_not_be_read_is_skipped_by_the_training(run: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    older, newest = steps(run)
    (run / "outcome" / "train_seg.0.json").unlink()
    newest.chmod(0)
    problems = examine_as_another(run, tmp_path, environment)["parts"]["train_seg"]["problems"]
    [problem] = [item for item in problems if item["command"]]  # that the record of its end is lost is told beside it
    assert f"goes on from step {int(older.name[5:])}" in problem["next"] and problem["command"] == f"chmod -R u+rX {newest}"
