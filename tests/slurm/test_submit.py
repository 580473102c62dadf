"""Submitting to a real Slurm: the graph, once, whatever happens between sbatch and the record of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from medgen.launch import attempt

Medgen = Callable[..., subprocess.CompletedProcess[str]]
SITE = {
    "name": "lab", "scheduler": "slurm", "cpus": 8, "gpus": 4, "cpus_per_gpu": 1, "mem": "400M", "grace": "30s",
    "partitions": {"gpu": "GPUQ", "cpu": "GPUQ"}, "features": {"a100": "40G", "h100": "80G", "gpu40g": "40G", "gpu80g": "80G"},
    "export": ["WANTED"],
}  # fmt: skip
# a: one task, b: an array after it, c: after all of b
GRAPH: dict[str, Any] = {
    "a": {"kind": "command", "run": "echo a > $MEDGEN_OUT/a"},
    "b": {"kind": "command", "needs": ["a"], "foreach": ["x", "y", "z"], "run": 'cat "$MEDGEN_RUN/a/made/00000/a"; echo $MEDGEN_ITEM > $MEDGEN_OUT/item'},
    "c": {"kind": "command", "needs": ["b"], "run": "cat $MEDGEN_RUN/b/made/*/item > $MEDGEN_OUT/all"},
}


class Lab:
    """A folder with a site profile, a spec and shims, on a real Slurm."""

    def __init__(self, folder: Path, slurm: Any, medgen: Medgen, environment: dict[str, str]):
        self.folder, self.slurm, self.medgen, self.environment = folder, slurm, medgen, environment
        environment.update(slurm.environment)
        self.seed = int.from_bytes(os.urandom(4), "big")  # a run of its own, also where this test ran before
        self.site(SITE)

    def site(self, profile: dict[str, Any]) -> None:
        (self.folder / "lab.yaml").write_text(yaml.safe_dump(profile))

    def spec(self, name: str, stages: dict[str, Any], **more: Any) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"version": 1, "name": name, "seed": self.seed, "stages": stages, **more}, sort_keys=False))
        return path

    def submit(self, spec: Path, *options: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        return self.medgen("submit", spec, "--site", self.folder / "lab.yaml", *options, expect=expect)

    def run(self, name: str) -> Path:
        [found] = (self.folder / "runs").glob(f"{name}-*")
        return found

    def jobs(self, name: str) -> list[dict[str, str]]:
        """What Slurm knows of the run: one row per job or element, ended ones too."""
        answer = self.slurm.run("squeue", "-h", "-r", "-t", "all", "-o", "%F|%K|%T|%r|%j|%E|%N")
        keys = ("id", "index", "state", "reason", "name", "dependency", "nodes")
        rows = [dict(zip(keys, line.split("|"), strict=True)) for line in answer.stdout.splitlines()]
        return [row for row in rows if row["name"].startswith(f"medgen.{self.run(name).name}.")]

    def alive(self, name: str) -> list[dict[str, str]]:
        return [row for row in self.jobs(name) if row["state"] in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")]

    def tasks(self, name: str) -> Counter[tuple[str, str]]:
        """(stage, index) -> how many jobs were ever made for it."""
        return Counter((row["name"].split(".")[2], row["index"]) for row in self.jobs(name))

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.run(name) / "events.jsonl").read_text().splitlines()]
        return [line for line in lines if line["event"] == kind]

    def wait(self, name: str, timeout_seconds: float = 120) -> None:
        self.slurm.wait_for(lambda: not self.alive(name), timeout_seconds)

    def outcome(self, name: str, stage: str, shard: int = 0) -> dict[str, Any] | None:
        path = self.run(name) / "outcome" / f"{stage}.{shard}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def assert_done(self, name: str) -> None:
        run = self.run(name)
        for stage in json.loads((run / "plan.json").read_text())["stages"]:
            for task in stage["tasks"]:
                found = self.outcome(name, stage["name"], task["shard"])
                logs = "\n".join(path.read_text() for path in sorted((run / "logs" / stage["name"]).rglob("*.log")))
                assert found is not None and found["status"] == "done", f"{stage['name']} {task['shard']}: {found}\n{logs}\n{self.jobs(name)}"

    def shim(self, command: str, text: str) -> Path:
        """A script that comes before Slurm's own command; $real is that one."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        real = shutil.which(command)
        question = 'case "$*" in *--test-only*) exec "$real" "$@" ;; esac'  # preflight only asks
        (folder / command).write_text(f"#!/bin/bash\nreal={real}\nfolder={folder}\n{question}\n{text}\n")
        (folder / command).chmod(0o755)
        self.environment["PATH"] = f"{folder}:{os.environ['PATH']}"
        return folder

    def unshim(self) -> None:
        self.environment["PATH"] = os.environ["PATH"]


@pytest.fixture
def lab(tmp_path: Path, slurm: Any, medgen: Medgen, environment: dict[str, str]) -> Any:
    made = Lab(tmp_path, slurm, medgen, environment)
    yield made
    for run in (tmp_path / "runs").glob("*-*"):
        subprocess.run(
            "squeue -h -o '%F %j' | awk -v name=medgen." + run.name + ". 'index($2, name) == 1 {print $1}' | xargs -r scancel",
            shell=True, env=environment, check=False,
        )  # fmt: skip


EVERY_TASK_ONCE = Counter({("a", "N/A"): 1, ("b", "0"): 1, ("b", "1"): 1, ("b", "2"): 1, ("c", "N/A"): 1})


def test_a_graph_runs_in_order_and_is_queued_once(lab: Lab) -> None:
    spec = lab.spec("graph", GRAPH)
    told = lab.submit(spec).stdout
    assert "b  3 tasks" in told
    again = lab.submit(spec).stdout
    assert "in the queue already" in again or "done already" in again
    lab.wait("graph")
    lab.assert_done("graph")
    assert (lab.run("graph") / "c" / "made" / "00000" / "all").read_text() == "x\ny\nz\n"
    assert lab.tasks("graph") == EVERY_TASK_ONCE
    assert "done already" in lab.submit(spec).stdout
    assert lab.tasks("graph") == EVERY_TASK_ONCE
    assert lab.medgen("watch", "graph", "--once").returncode == 0


def test_the_dry_run_shows_what_slurm_gets_byte_for_byte(lab: Lab) -> None:
    spec = lab.spec("bytes", {**GRAPH, "a": {**GRAPH["a"], "run": "sleep 30"}})
    shown = lab.submit(spec, "--dry-run").stdout
    assert not (lab.folder / "runs").exists()
    lab.submit(spec)
    for row in {row["id"]: row for row in lab.jobs("bytes")}.values():
        kept = lab.slurm.run("scontrol", "write", "batch_script", row["id"], "-").stdout
        assert kept.rstrip("\n") in shown
        stage = row["name"].split(".")[2]
        assert kept.rstrip("\n") == (lab.run("bytes") / "submissions" / "1" / f"{stage}.0.sh").read_text().rstrip("\n")
    lab.medgen("cancel", "bytes")


def test_a_script_may_be_given_to_sbatch_by_hand(lab: Lab) -> None:
    spec = lab.spec("hand", {"a": {"kind": "command", "run": "sleep 2; echo done > $MEDGEN_OUT/a"}})
    lab.submit(spec)
    lab.medgen("cancel", "hand")
    (lab.run("hand") / ".cancelled").unlink()
    lab.slurm.run("sbatch", str(lab.run("hand") / "submissions" / "1" / "a.0.sh"))
    lab.wait("hand")
    lab.assert_done("hand")


@pytest.mark.fault("F19")
@pytest.mark.timeout(180)
def test_a_lost_reply_of_sbatch_makes_no_second_job(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    folder = lab.shim("sbatch", '"$real" "$@"; echo >> $folder/lost; echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1')
    lab.submit(lab.spec("lost", GRAPH))
    lab.unshim()
    lost = len((folder / "lost").read_text().splitlines())
    record_property("fired", f"{lost} replies were lost")
    assert lost == 3, "each was asked for once"
    lab.wait("lost")
    lab.assert_done("lost")
    assert lab.tasks("lost") == EVERY_TASK_ONCE


@pytest.mark.fault("F19")
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_an_sbatch_that_did_nothing_is_tried_again(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    folder = lab.shim("sbatch", 'if [ ! -e $folder/tried ]; then touch $folder/tried; echo "sbatch: error: Socket timed out on send/recv operation" >&2; exit 1; fi; exec "$real" "$@"')
    lab.submit(lab.spec("again", GRAPH))
    lab.unshim()
    lab.wait("again")
    lab.assert_done("again")
    record_property("fired", (folder / "tried").stat().st_mtime)
    assert lab.tasks("again") == EVERY_TASK_ONCE


@pytest.mark.fault("F20")
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_submitter_that_dies_before_sbatch_replies_leaves_one_job_to_adopt(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    """Killed while it waits for the reply: nothing has started, and the next submit goes on."""
    kill_the_submitter = 'kill -9 $(ps -o ppid= -p $PPID)'  # this shim's parent is timeout(1), whose parent is medgen
    lab.shim("sbatch", f'echo >> $folder/calls; "$real" "$@" || exit 1; [ $(wc -l < $folder/calls) -ne 2 ] || {kill_the_submitter}')
    spec = lab.spec("killed", GRAPH)
    lab.submit(spec, expect=-9)
    assert len({row["id"] for row in lab.jobs("killed")}) == 2
    assert {row["state"] for row in lab.jobs("killed")} == {"PENDING"}, "nothing may start before everything is recorded"
    record_property("fired", "killed behind the second sbatch")
    lab.unshim()
    lab.submit(spec)
    lab.wait("killed")
    lab.assert_done("killed")
    assert lab.tasks("killed") == EVERY_TASK_ONCE


@pytest.mark.fault("F21")
@pytest.mark.timeout(180)
def test_four_submits_at_once_make_one_job_per_task(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    spec = lab.spec("four", GRAPH)
    command = [sys.executable, "-m", "medgen", "submit", str(spec), "--site", str(lab.folder / "lab.yaml")]
    submits = [subprocess.Popen(command, cwd=lab.folder, env=lab.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(4)]
    said = [submit.communicate(timeout=120)[0] for submit in submits]
    assert [submit.returncode for submit in submits] == [0, 0, 0, 0], said
    record_property("fired", "four processes, exit codes 0")
    lab.wait("four")
    lab.assert_done("four")
    assert lab.tasks("four") == EVERY_TASK_ONCE


@pytest.mark.fault("F31")
@pytest.mark.timeout(180)
def test_without_a_look_into_the_queue_nothing_is_submitted(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    spec = lab.spec("blind", GRAPH)
    lab.shim("squeue", 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1')
    said = lab.submit(spec, expect=1).stderr
    assert "nothing was submitted" in said and "Unable to contact slurm controller" in said
    record_property("fired", said.splitlines()[-1])
    lab.unshim()
    assert not lab.jobs("blind")


@pytest.mark.fault("F19")
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_lost_reply_that_cannot_be_looked_up_is_refused_and_held(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    spec = lab.spec("unsure", GRAPH)
    lab.shim("sbatch", '"$real" "$@"; touch $folder/submitted; echo "sbatch: error: Socket timed out on send/recv operation" >&2; exit 1')
    lab.shim("squeue", '[ ! -e $folder/submitted ] || { echo "squeue: error: Socket timed out" >&2; exit 1; }; exec "$real" "$@"')
    said = lab.submit(spec, expect=1).stderr
    assert "it is held and will not run" in said
    record_property("fired", "sbatch and squeue both without a reply")
    lab.unshim()
    assert [row["reason"] for row in lab.jobs("unsure")] == ["JobHeldUser"]
    lab.submit(spec)
    lab.wait("unsure")
    lab.assert_done("unsure")
    assert lab.tasks("unsure") == EVERY_TASK_ONCE


@pytest.mark.fault("F26", "F27")
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_failed_parent_takes_its_children_along_and_a_new_submit_heals(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    flag = lab.folder / "repaired"
    stages = {**GRAPH, "b": {**GRAPH["b"], "run": f'[ $MEDGEN_ITEM != y ] || [ -e {flag} ] || exit 7; echo $MEDGEN_ITEM > $MEDGEN_OUT/item'}}
    spec = lab.spec("heal", stages)
    lab.submit(spec)
    lab.wait("heal")
    assert {row["state"] for row in lab.jobs("heal") if ".c." in row["name"]} == {"CANCELLED"}
    assert "exit code 7" in str(lab.outcome("heal", "b", 1))
    record_property("fired", str(lab.outcome("heal", "b", 1)))
    assert lab.outcome("heal", "c") is None
    lab.medgen("watch", "heal", "--once", expect=1)
    flag.touch()
    before = lab.tasks("heal")
    lab.submit(spec)
    lab.wait("heal")
    lab.assert_done("heal")
    assert lab.tasks("heal") - before == Counter({("b", "1"): 1, ("c", "N/A"): 1}), "only what failed is redone"


@pytest.mark.fault("F26")
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_children_that_wait_for_a_dead_job_are_queued_anew(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    """An element is taken away while others of its array still run: what waits for the array could wait for ever."""
    stages = {**GRAPH, "b": {**GRAPH["b"], "run": 'sleep 8; echo $MEDGEN_ITEM > $MEDGEN_OUT/item'}}
    spec = lab.spec("doomed", stages)
    lab.submit(spec)
    lab.slurm.wait_for(lambda: sum(row["state"] == "RUNNING" and ".b." in row["name"] for row in lab.jobs("doomed")) == 3, 60)
    array = next(row["id"] for row in lab.jobs("doomed") if ".b." in row["name"])
    lab.slurm.run("scancel", f"{array}_1")
    lab.slurm.wait_for(lambda: any(row["state"] == "CANCELLED" for row in lab.jobs("doomed")), 30)
    record_property("fired", "one element is CANCELLED while the others run")
    lab.submit(spec)
    lab.wait("doomed")
    lab.assert_done("doomed")


def test_a_task_that_is_killed_outright_is_started_again_by_its_own_job(lab: Lab) -> None:
    mark = lab.folder / "killed_once"
    stages = {"a": {"kind": "command", "run": f"[ -e {mark} ] || {{ touch {mark}; kill -9 $PPID; }}; echo a > $MEDGEN_OUT/a"}}
    lab.submit(lab.spec("kill", stages))
    lab.wait("kill")
    lab.assert_done("kill")
    ends = lab.events("kill", "task_ended")
    assert [(end["status"], end["next"]) for end in ends] == [("failed", "will be tried again"), ("done", "done")]
    assert "SIGKILL" in ends[0]["cause"]
    assert lab.tasks("kill") == Counter({("a", "N/A"): 1}), "the same job, started again"


@pytest.mark.fault("F27")
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_element_starts_again_alone(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    """The last element of an array carries the array's own number: asked by that, Slurm would restart all of them."""
    run = "echo start >> $MEDGEN_OUT/starts; if [ $MEDGEN_ITEM = z ]; then [ -e $MEDGEN_OUT/again ] || { touch $MEDGEN_OUT/again; kill -9 $PPID; }; else sleep 12; fi"
    after = {"kind": "command", "needs": ["a"], "run": "cat $MEDGEN_RUN/a/made/*/starts > $MEDGEN_OUT/all"}
    lab.submit(lab.spec("alone", {"a": {"kind": "command", "foreach": ["x", "y", "z"], "run": run}, "collect": after}))
    lab.wait("alone")
    lab.assert_done("alone")
    starts = [(lab.run("alone") / "a" / "made" / f"{shard:05d}" / "starts").read_text().count("start") for shard in range(3)]
    assert starts == [1, 1, 2]
    assert (lab.run("alone") / "collect" / "made" / "00000" / "all").read_text() == "start\n" * 4, "it waited for all of them"
    [failed] = [end for end in lab.events("alone", "task_ended") if end["status"] != "done"]
    record_property("fired", f"shard {failed['shard']}: {failed['cause']}")
    assert (failed["shard"], failed["status"], failed["next"]) == (2, "failed", "will be tried again")
    assert not lab.events("alone", "requeue_refused")


@pytest.mark.slow
def test_one_spec_in_two_folders_makes_two_runs(lab: Lab) -> None:
    spec = lab.spec("twice", {**GRAPH, "a": {**GRAPH["a"], "run": "sleep 5; echo a > $MEDGEN_OUT/a"}})
    lab.submit(spec)
    first = lab.run("twice")
    lab.environment["MEDGEN_RUNS"] = str(lab.folder / "elsewhere")
    assert "b  3 tasks" in lab.submit(spec).stdout
    lab.wait("twice")
    lab.assert_done("twice")
    [second] = (lab.folder / "elsewhere").glob("twice-*")
    assert first.name == second.name
    assert (second / "c" / "made" / "00000" / "all").read_text() == "x\ny\nz\n"


@pytest.mark.slow
def test_a_squeue_that_answers_late_leaves_nothing_held(lab: Lab) -> None:
    lab.shim("squeue", "exit 0")
    lab.submit(lab.spec("cached", GRAPH))
    lab.unshim()
    lab.wait("cached")
    lab.assert_done("cached")
    assert lab.tasks("cached") == EVERY_TASK_ONCE


@pytest.mark.slow
def test_a_command_that_is_stopped_for_ever_is_given_up(lab: Lab) -> None:
    lab.submit(lab.spec("stopped", {"a": {"kind": "command", "run": "exit 143"}}))
    lab.wait("stopped", 240)
    assert lab.events("stopped", "task_ended")[-1]["next"].startswith("not tried again: stopped 6 times")


@pytest.mark.fault("F24")
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_arrays_are_cut_below_the_clusters_largest_index(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    count = int(lab.slurm.run("bash", "-c", "scontrol show config | awk '/MaxArraySize/ {print $3}'").stdout) + 6
    if count > 200:
        pytest.skip(f"this cluster takes arrays of {count - 6}")
    stages = {"a": {"kind": "command", "foreach": [str(number) for number in range(count)], "run": "echo $MEDGEN_ITEM > $MEDGEN_OUT/i", "resources": {"time": "5m", "mem": "100M"}}}
    spec = lab.spec("chunks", stages)
    folder = lab.shim("sbatch", 'echo >> $folder/calls; exec "$real" "$@"')
    lab.submit(spec, "-o", "stages.a.parallel=7")
    assert len((folder / "calls").read_text().splitlines()) == 2
    record_property("fired", f"an array of {count}, the cluster takes {count - 6}")
    rows = lab.jobs("chunks")
    shards = sorted(int(row["name"].split(".")[4]) + int(row["index"]) for row in rows)
    assert shards == list(range(count)), "the union is exact"
    assert {row["name"].split(".")[4] for row in rows} == {"0", str(count - 6)}
    assert any("afterany" in row["dependency"] for row in rows), "seven at once, not seven of each array"
    lab.medgen("cancel", "chunks")
    assert not lab.alive("chunks")


@pytest.mark.fault("F24")
@pytest.mark.timeout(120)
def test_shards_fit_the_number_of_jobs_that_the_cluster_takes(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    lab.site({**SITE, "limits": {"submitted": 8}})
    shown = lab.submit(_generation(lab, shards=30), "--dry-run")
    assert "this cluster takes 8 jobs of one user: fewer, larger shards" in shown.stderr
    record_property("fired", shown.stderr.splitlines()[-1])
    assert "#SBATCH --array=0-4%5" in shown.stdout
    lab.site({**SITE, "limits": {"submitted": 2}})
    assert "needs at least 4 jobs in the queue" in lab.submit(_generation(lab, shards=30), "--dry-run", expect=2).stderr


def _generation(lab: Lab, shards: int) -> Path:
    from conftest import TINY_NET

    stages = {
        "train": {"kind": "train", "config": {**TINY_NET, "strategy": "ddpm", "mode": "bravo"}},
        "images": {"kind": "generate", "from": "train", "condition": "test", "count": 60, "chunk": 2, "shards": shards, "sampling": {"sampler": "ddim", "steps": 2}},
        "report": {"kind": "report"},
    }
    return lab.spec("generation", stages, data={"format": "phantom", "patients": 6, "size": 16})


@pytest.mark.fault("F15")
def test_cancel_ends_everything_soon_and_the_run_can_go_on(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    stages = {**GRAPH, "a": {**GRAPH["a"], "run": "trap '' TERM; touch $MEDGEN_OUT/deaf; sleep 100; echo a > $MEDGEN_OUT/a"}}
    spec = lab.spec("cancel", stages)
    lab.submit(spec)
    lab.slurm.wait_for(lambda: (lab.run("cancel") / "a" / "made" / "00000" / "deaf").exists(), 60)
    began = time.monotonic()
    said = lab.medgen("cancel", "cancel").stdout
    assert "taken out of the queue" in said and not lab.alive("cancel")
    record_property("fired", "medgen cancel, while a task was deaf to SIGTERM")
    record_property("recovery_seconds", time.monotonic() - began)
    assert lab.events("cancel", "cancelled")[0]["left"] == 0
    lab.medgen("watch", "cancel", "--once", expect=4)
    lab.submit(spec)
    assert len(lab.alive("cancel")) == 5
    lab.medgen("cancel", "cancel")
    assert "nothing is queued" in lab.medgen("cancel", "cancel").stdout


@pytest.mark.parametrize(("command", "states"), [("scancel", ["CANCELLED"]), ("scontrol requeue", ["COMPLETED"])])
def test_what_slurm_was_told_holds(lab: Lab, command: str, states: list[str]) -> None:
    """A job that somebody cancels does not start itself again; one that is requeued starts once, by Slurm's own doing."""
    lab.submit(lab.spec("told", {"a": {"kind": "command", "run": "touch $MEDGEN_OUT/started; [ -e $MEDGEN_OUT/before ] || { touch $MEDGEN_OUT/before; sleep 60; }"}}))
    lab.slurm.wait_for(lambda: (lab.run("told") / "a" / "made" / "00000" / "started").exists(), 60)
    lab.slurm.run(*command.split(), lab.jobs("told")[0]["id"])
    lab.wait("told")
    assert [row["state"] for row in lab.jobs("told")] == states
    ended = lab.events("told", "task_ended")[0]
    assert ended["status"] == "interrupted"
    assert ended["next"] == {"scancel": "submit again to go on", "scontrol requeue": "goes on from what it saved"}[command]


def test_slurm_tells_of_a_preemption_before_it_takes_the_job_back(lab: Lab) -> None:
    """The steps of a job get TERM at the beginning of the grace; what its script then asks says that the job is preempted."""
    if "low" not in lab.slurm.run("sinfo", "-h", "-o", "%R").stdout.split():
        pytest.skip("this cluster has no preemptible partition called low")
    told, script = lab.folder / "told", lab.folder / "script.sh"
    wait = "trap 'exit 3' TERM; for _ in $(seq 600); do sleep 0.2; done"
    script.write_text(f'#!/bin/bash\ntrap : TERM\ntouch {told}.begins\nsrun bash -c "{wait}"\nscontrol show job --oneline $SLURM_JOB_ID > {told}\n'.replace("$(", "\\$("))
    room = ["--gres=gpu:4", "--mem=20", "--time=2", "--output=/dev/null"]
    first = lab.slurm.submit(*room, "--partition=low", script)
    rival = None
    try:
        lab.slurm.wait_for(lambda: told.with_name("told.begins").exists())
        assert not attempt._is_preempted(dict(re.findall(r"(\w+)=(\S*)", lab.slurm.run("scontrol", "show", "job", "--oneline", first).stdout)))
        lab.slurm.wait_for(lambda: f"{first}.0" in lab.slurm.run("squeue", "--steps", "-h", "-o", "%i").stdout)
        node = lab.slurm.run("squeue", "-h", "-j", first, "-o", "%N").stdout.strip()
        rival = lab.slurm.submit(*room, "--partition=GPUQ", f"--nodelist={node}", "--wrap=true")
        lab.slurm.wait_for(lambda: told.exists() and "JobId" in told.read_text())
        facts = dict(re.findall(r"(\w+)=(\S*)", told.read_text()))
        assert facts["JobState"] == "RUNNING" and attempt._is_preempted(facts), told.read_text()
    finally:
        lab.slurm.run("scancel", *filter(None, [first, rival]))


@pytest.mark.fault("F25")
@pytest.mark.timeout(180)
def test_jobs_get_the_allowed_variables_and_no_others(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    """Also from inside a job, whose own variables must not reach the new one."""
    lab.environment.update({
        "WANTED": "yes", "MY_SECRET_TOKEN": "hunter2", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3",
        "SBATCH_PARTITION": "no-such-partition", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "5", "SLURM_MEM_PER_CPU": "17",
    })  # fmt: skip
    secrets = lab.folder / "secrets.env"
    secrets.write_text("API_KEY=only-on-the-node\n")
    lab.site({**SITE, "secrets": str(secrets)})
    said = lab.submit(lab.spec("clean", {"a": {"kind": "command", "run": "env > $MEDGEN_OUT/env"}})).stderr
    assert "this is inside job 7" in said
    record_property("fired", "the variables of a job around submit")
    lab.wait("clean")
    lab.assert_done("clean")
    seen = (lab.run("clean") / "a" / "made" / "00000" / "env").read_text()
    assert "WANTED=yes\n" in seen and "API_KEY=only-on-the-node\n" in seen
    assert "hunter2" not in seen and "SLURM_ARRAY_JOB_ID" not in seen and "mask_cpu:0x1" not in seen and "SLURM_MEM_PER_CPU=17" not in seen
    for path in lab.run("clean").rglob("*"):
        if path.is_file() and path.name != "env":
            text = path.read_text(errors="replace")
            assert "hunter2" not in text and "only-on-the-node" not in text, path


@pytest.mark.fault("F44")
def test_two_jobs_on_one_node_share_no_gpu(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    stage = {"kind": "command", "run": "echo $CUDA_VISIBLE_DEVICES > $MEDGEN_OUT/gpus; sleep 4", "resources": {"gpus": 2, "gpu": {"any_of": ["h100"]}}}
    lab.submit(lab.spec("gpus", {"a": stage, "b": stage}))
    lab.wait("gpus")
    lab.assert_done("gpus")
    assert {row["nodes"] for row in lab.jobs("gpus")} == {"n2"}
    started = [lab.outcome("gpus", name) for name in "ab"]
    assert started[0] and started[1] and started[0]["started"] < started[1]["ended"] and started[1]["started"] < started[0]["ended"], "they ran at the same time"
    seen = [(lab.run("gpus") / name / "made" / "00000" / "gpus").read_text().strip().split(",") for name in "ab"]
    record_property("fired", str(seen))
    assert len(set(seen[0] + seen[1])) == 4, seen


def test_the_preferred_gpu_is_taken_when_it_is_free(lab: Lab) -> None:
    stage = {"kind": "command", "run": "true", "resources": {"gpus": 1, "gpu": {"any_of": ["a100", "h100"], "prefer": "h100"}}}
    memory = {"kind": "command", "run": "true", "resources": {"gpus": 1, "gpu": {"memory": "60G"}}}
    lab.submit(lab.spec("prefer", {"a": stage, "b": memory}))
    lab.wait("prefer")
    lab.assert_done("prefer")
    assert {row["nodes"] for row in lab.jobs("prefer")} == {"n2"}


def test_other_resources_wait_until_nothing_is_queued(lab: Lab) -> None:
    spec = lab.spec("busy", {"a": {"kind": "command", "run": "sleep 60"}})
    lab.submit(spec)
    said = lab.submit(spec, "-o", "stages.a.resources.time=2h", expect=2).stderr
    assert "queued or running with other resources (a.time_minutes 60 -> 120)" in said and "medgen cancel" in said
    assert "medgen cancel" in lab.medgen("submit", spec, "--local", expect=2).stderr
    lab.medgen("cancel", "busy")
    lab.submit(spec, "-o", "stages.a.resources.time=2h")
    lab.medgen("cancel", "busy")


@pytest.mark.fault("F28")
@pytest.mark.timeout(120)
def test_a_set_up_line_that_fails_stops_the_job_at_once(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    lab.site({**SITE, "setup": ["module-that-is-not-there load x"]})
    lab.submit(lab.spec("setup", {"a": {"kind": "command", "run": "true"}}))
    lab.wait("setup")
    assert [row["state"] for row in lab.jobs("setup")] == ["FAILED"]
    assert "medgen: set-up failed with exit code 127: module-that-is-not-there load x" in (lab.run("setup") / "logs" / "a" / "s0" / "batch.log").read_text()
    record_property("fired", "set-up failed with exit code 127")


@pytest.mark.fault("F30")
@pytest.mark.timeout(240)
def test_without_accounting_everything_works(tmp_path: Path, slurm_without_accounting: Any, medgen: Medgen, environment: dict[str, str], record_property: Callable[[str, object], None]) -> None:
    lab = Lab(tmp_path, slurm_without_accounting, medgen, environment)
    lab.submit(lab.spec("plain", GRAPH))
    lab.wait("plain")
    lab.assert_done("plain")
    medgen("watch", "plain", "--once")
    record_property("fired", "a cluster without slurmdbd")
