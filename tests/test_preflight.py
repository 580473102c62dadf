"""What is known before anything is queued: each fault is told with the line to change. Slurm's commands are stand-ins here; tests/slurm asks a real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY_NET, tiny_spec

from medgen import checks, models, planning, room, sbatch_options, spec
from medgen.checks import shapes, trial
from medgen.errors import Exit, InputError, MedgenError
from medgen.launch import preflight, record, slurm_checks, space, submit
from medgen.launch.findings import Finding
from medgen.launch.slurm import NodeSet
from medgen.launch.submit import Prepared

Medgen = Callable[..., subprocess.CompletedProcess[str]]
WriteSpec = Callable[[dict[str, Any]], Path]
GIB = 2**30
NODES = "GPUQ*|up|7-00:00:00|2|8|8000|gpu:a100:4|a100,gpu40g\nGPUQ*|up|7-00:00:00|1|64|256000|gpu:h100:2|h100,gpu80g\nCPUQ|up|30:00|4|16|64000|(null)|(null)\nold|down|1-00:00:00|1|8|8000|gpu:4|p100\n"
PROFILE = {
    "name": "lab", "scheduler": "slurm", "cpus": 8, "gpus": 4, "cpus_per_gpu": 2, "mem": "2G", "partitions": {"gpu": "GPUQ", "cpu": "GPUQ"},
    "features": {"a100": "40G", "h100": "80G", "v100": "32G"}, "grace": "60s",
}  # fmt: skip
WOULD_START = 'echo "sbatch: Job 7 to start at $(date +%s) using 1 processors on nodes n1 in partition GPUQ" >&2'


class Lab:
    """A spec, a profile, and stand-ins for Slurm's commands that come first on PATH."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.bin, self.monkeypatch = folder, folder / "bin", monkeypatch
        self.bin.mkdir()
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")
        monkeypatch.setattr(slurm_checks, "PAUSE_SECONDS", 0.0)
        monkeypatch.chdir(folder)
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
            monkeypatch.delenv(name)
        (folder / "nodes.txt").write_text(NODES)
        self.command("sinfo", f"cat {folder}/nodes.txt")
        self.command("scontrol", 'echo "AccountingStorageEnforce = associations,limits"; echo "SLURM_VERSION = 22.05.8"')
        self.command("sacctmgr", 'case "$*" in *qos*) ;; *) echo mine; echo ours ;; esac')
        self.command("sbatch", f'echo "$@" >> {folder}/calls; env > {folder}/env; {WOULD_START}')
        for name in ("squeue", "scancel", "srun"):
            self.command(name, "exit 1")
        self.profile(PROFILE)
        self.spec(tiny_spec())

    def command(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.bin / name).chmod(0o755)

    def refuse(self, words: str) -> None:
        self.command("sbatch", f"echo {words!r} >&2; exit 1")

    def profile(self, values: dict[str, Any]) -> None:
        (self.folder / "lab.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def spec(self, values: dict[str, Any]) -> None:
        (self.folder / "spec.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def prepare(self, *overrides: str) -> list[Prepared]:
        return submit.prepare(Path("spec.yaml"), overrides, "lab.yaml", self.folder / "runs", False)

    def check(self, *overrides: str) -> list[str]:
        return preflight.check(self.prepare(*overrides))

    def refused(self, *overrides: str) -> str:
        with pytest.raises(InputError) as refused:
            self.check(*overrides)
        return str(refused.value)

    def line(self, text: str) -> str:
        """`spec.yaml:12` or `lab.yaml:3`: where this line stands."""
        for name in ("spec.yaml", "lab.yaml"):
            for number, line in enumerate((self.folder / name).read_text().splitlines(), 1):
                if line.strip().startswith(text):
                    return f"{name}:{number}:"
        raise AssertionError(f"no line {text}")


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(tmp_path, monkeypatch)


# --- what Slurm says -------------------------------------------------------------------------------------------------


def test_slurm_is_asked_once_for_each_set_of_options_and_nothing_is_written(lab: Lab) -> None:
    told = lab.check()
    assert "Slurm expects to start train_seg, train_bravo at once" in told
    calls = (lab.folder / "calls").read_text().splitlines()
    assert all(call.startswith("--test-only ") for call in calls)
    distinct = {(stage.time_minutes, stage.threads, stage.gpus_per_node) for stage in lab.prepare()[0].plan.stages}
    assert len(calls) == len(distinct) == 4 < 8
    assert not (lab.folder / "runs").exists()


def test_points_of_a_sweep_with_equal_options_are_asked_about_once(lab: Lab) -> None:
    lab.spec({**tiny_spec(), "sweep": {"stages.train_seg.config.lr": [1.0e-4, 2.0e-4, 3.0e-4]}})
    assert len(lab.prepare()) == 3
    told = lab.check()
    assert len((lab.folder / "calls").read_text().splitlines()) == 4
    assert len(told) == len(set(told))


def test_a_stage_that_is_done_is_not_asked_about(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from medgen.rundir import RunDir

    monkeypatch.setattr(RunDir, "is_done", lambda *_: True)
    lab.check()
    assert not (lab.folder / "calls").exists()


REFUSALS = [  # sbatch's words, overrides, where the fault stands, what else is told
    ("allocation failure: Invalid feature specification", ['stages.train_seg.resources={gpus: 1, gpu: {any_of: [v100]}, cpus: 1}'],
     "-o stages.train_seg.resources=", ["resources.gpu:", "(v100)", "features of GPUQ: a100, gpu40g, gpu80g, h100"]),
    ("sbatch: error: invalid partition specified: nope", ["site.partitions.cpu=nope"], "-o site.partitions.cpu=nope: partitions.cpu:", ["partitions here: GPUQ, CPUQ, old"]),
    ("User's group not permitted to use this partition", [], "lab.yaml:", ["partitions.cpu:", "partitions here"]),
    ("Invalid account or account/partition combination specified", ["site.account=theirs"], "-o site.account=theirs: account:", ["(theirs)", "your accounts: mine, ours"]),
    ("Invalid qos specification", ["site.qos=fast"], "-o site.qos=fast: qos:", ["Invalid qos"]),
    ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", [], "spec.yaml:", ["resources", "submit limit"]),
    ("Requested reservation is invalid", ["site.reservation=r"], "-o site.reservation=r: reservation:", []),
    ("Requested time limit is invalid (missing or exceeds some limit)", ["stages.train_seg.resources.time=5d"], "-o stages.train_seg.resources.time=5d:", ["resources.time"]),
    ("Invalid node name specified", ["site.exclude=[{nodes: zz, reason: broken, until: 2100-01-01}]"], "-o site.exclude=", ["exclude:"]),
    ("unrecognized option '--foo'", ['stages.train_seg.resources.slurm=["--foo=1"]'], "-o stages.train_seg.resources.slurm=", ["--foo"]),
    ("Invalid license specification", ['stages.train_seg.resources.slurm=["--licenses=x"]'], "-o stages.train_seg.resources.slurm=", ["slurm.0"]),
    ("Invalid account", ['stages.train_seg.resources.slurm=["-A theirs"]'], "-o stages.train_seg.resources.slurm=", ["slurm.0", "(theirs)"]),
    ("Your job needs a project code", [], "spec.yaml:", ["stages.", "resources", "project code"]),
]


@pytest.mark.parametrize(("words", "overrides", "place", "told"), REFUSALS, ids=[row[0][:40] for row in REFUSALS])
def test_a_refusal_is_told_at_the_key_that_caused_it(lab: Lab, words: str, overrides: list[str], place: str, told: list[str]) -> None:
    lab.refuse(words)
    message = lab.refused(*overrides)
    assert any(line.startswith(place) and all(part in line for part in told) for line in message.splitlines()), message


def test_a_value_of_the_file_is_told_with_its_line(lab: Lab) -> None:
    lab.profile({**PROFILE, "account": "theirs"})
    lab.refuse("Invalid account or account/partition combination specified")
    assert lab.refused().startswith(lab.line("account:"))
    assert len(lab.refused().splitlines()) == 1, "one fault is told once, however many jobs it stops"


NODE_FAULTS = [
    ("resources={gpus: 5, cpus: 5, time: 10m}", "gpus:", "5 GPUs on one node, its nodes have 4 at most"),
    ("resources={gpus: 3, cpus: 3, time: 10m, gpu: {any_of: [h100]}}", "gpus:", "3 GPUs on one node, nodes with h100 have 2 at most"),
    ("resources={cpus: 65, time: 10m}", "cpus:", "65 CPUs on one node, its nodes have 64 at most"),
    ("resources={cpus: 1, mem: 300G, time: 10m}", "mem:", "300G of memory on one node"),
    ("resources={cpus: 1, nodes: 4, time: 10m}", "nodes:", "4 nodes, GPUQ has 3 of them"),
    ("resources={gpus: 1, cpus: 1, time: 10m, gpu: {any_of: [v100]}}", "gpu:", "no node of GPUQ has v100"),
]


@pytest.mark.parametrize(("override", "key", "told"), NODE_FAULTS, ids=[row[2] for row in NODE_FAULTS])
def test_what_no_node_can_give_is_told_with_what_they_have(lab: Lab, override: str, key: str, told: str) -> None:
    lab.refuse("allocation failure: Requested node configuration is not available")
    lab.spec({"version": 1, "name": "one", "stages": {"train_seg": {"kind": "command", "run": "true"}}})
    message = lab.refused(f"stages.train_seg.{override}")
    assert f"stages.train_seg.resources.{key} {told}" in message
    assert "GPUQ has: 2 nodes with 8 CPUs, 7.812G, 4 GPUs (a100, gpu40g); 1 node with 64 CPUs" in message


def test_memory_that_the_profile_asks_for_is_the_profiles_fault(lab: Lab) -> None:
    lab.profile({**PROFILE, "mem": "900G"})
    lab.refuse("Memory specification can not be satisfied")
    assert lab.refused().startswith(lab.line("mem:"))


def test_a_time_that_slurm_takes_and_never_starts_is_refused(lab: Lab) -> None:
    """Without EnforcePartLimits sbatch says yes, and the job waits for ever."""
    lab.spec({**tiny_spec(), "stages": {"train": {"kind": "train", "config": {**TINY_NET, "mode": "seg"}, "resources": {"time": "8d", "cpus": 1}}}})
    assert lab.refused().startswith(f"{lab.line('time:')}7: stages.train.resources.time: 8 days is more than GPUQ gives a job (7 days)")
    assert "save and go on with segments" in lab.refused()
    assert lab.check("stages.train.resources.time=7d")


def test_a_partition_that_is_down_is_a_warning(lab: Lab) -> None:
    assert any("partition old takes jobs and starts none now" in line for line in lab.check("site.partitions.cpu=old"))


def test_a_cluster_that_checks_no_accounts_is_told(lab: Lab) -> None:
    lab.command("scontrol", 'echo "AccountingStorageEnforce = none"')
    [line] = [line for line in lab.check("site.account=typo") if "checks no accounts" in line]
    assert "account typo" in line
    assert not [line for line in lab.check() if "checks no accounts" in line], "nothing to mistype"


def test_what_an_enclosing_job_has_set_is_kept_from_the_question(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_CPU_BIND": "x", "SBATCH_PARTITION": "nope", "SLURM_CONF": "/etc/here", "MY_TOKEN": "t"}.items():
        monkeypatch.setenv(name, value)
    assert any("this is inside job 7" in line for line in lab.check())
    seen = dict(line.split("=", 1) for line in (lab.folder / "env").read_text().splitlines() if "=" in line)
    assert seen["SLURM_CONF"] == "/etc/here"
    assert not {"SLURM_JOB_ID", "SLURM_CPU_BIND", "SBATCH_PARTITION", "MY_TOKEN"} & set(seen)
    assert os.environ["MY_TOKEN"] == "t", "and this process keeps its own"


# --- Slurm in trouble ------------------------------------------------------------------------------------------------


def test_missing_commands_are_named(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = lab.prepare()
    for tool in ("bash", "git", "env", "cat", "date"):
        (lab.bin / tool).symlink_to(str(shutil.which(tool)))
    (lab.bin / "sinfo").unlink()
    (lab.bin / "scancel").unlink()
    monkeypatch.setenv("PATH", str(lab.bin))
    with pytest.raises(InputError, match="scancel, sinfo: not on PATH, and lab is a Slurm cluster"):
        preflight.check(prepared)


@pytest.mark.parametrize("command", ["sinfo", "scontrol", "sbatch"])
def test_a_command_that_fails_without_a_word_stops_everything(lab: Lab, command: str) -> None:
    prepared = lab.prepare()
    lab.command(command, "exit 1")
    with pytest.raises(MedgenError, match=f"^{command} .*: exit code 1; nothing was queued") as stopped:
        preflight.check(prepared)
    assert stopped.value.exit_code == Exit.FAILED, "not the user's fault"


@pytest.mark.parametrize("command", ["sinfo", "scontrol", "sbatch"])
def test_a_command_that_hangs_is_killed_and_told(lab: Lab, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = lab.prepare()
    lab.command(command, f"echo $$ > {lab.folder}/pid; sleep 600")
    monkeypatch.setattr(slurm_checks, "PATIENCE_SECONDS", 0.5)
    with pytest.raises(MedgenError, match=f"^{command} .*did not answer within .*; nothing was queued"):
        preflight.check(prepared)
    assert not Path(f"/proc/{(lab.folder / 'pid').read_text().strip()}").exists()


def test_a_slurm_that_is_busy_does_not_stop_a_submit_which_tries_again_itself(lab: Lab) -> None:
    lab.command("sbatch", 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1')
    assert any("too busy to say whether it would take train_seg" in line for line in lab.check())


def test_words_of_other_versions_are_understood(lab: Lab) -> None:
    lab.command("sbatch", 'echo "sbatch: Job 4711 to start at 2099-01-01T10:00:00 a using 8 processors on nodes n[1-2] in partition GPUQ" >&2')
    assert any("Slurm expects to start train_seg, train_bravo at 2099-01-01 10:00 at the latest" in line for line in lab.check())
    lab.command("sbatch", "true")
    assert not any("expects to start" in line for line in lab.check()), "a Slurm that gives no time"


@pytest.mark.parametrize(("text", "minutes"), [("90", 90), ("1:30", 2), ("1:30:00", 90), ("1:00:01", 61), ("1-12", 2160), ("2-00:00:00", 2880), ("1-0:5", 1445), ("UNLIMITED", None), ("", None)])
def test_durations_as_sbatch_reads_them(text: str, minutes: int | None) -> None:
    assert sbatch_options.minutes(text) == minutes


@pytest.mark.parametrize(("constraint", "fits"), [
    ("", True), ("a", True), ("c", False), ("c|a", True), ("(a)&(c|b)", True), ("(a)&(c|d)", False), ("a&b", True), ("[x*2&y]", True),
])  # fmt: skip
def test_constraints_against_the_features_of_a_node(constraint: str, fits: bool) -> None:
    assert slurm_checks.satisfies(constraint, ["a", "b"]) is fits


def test_nodes_in_words() -> None:
    assert slurm_checks.describe_nodes([NodeSet(1, 4, 2048, 0, ()), NodeSet(3, 8, 4096, 2, ("a",))]) == "3 nodes with 8 CPUs, 4G, 2 GPUs (a); 1 node with 4 CPUs, 2G, no GPU"
    assert slurm_checks.describe_nodes([]) == "no nodes"


# --- the environment of jobs -----------------------------------------------------------------------------------------


def venv(folder: Path, activate: str, says: str = "3.11.2") -> Path:
    """An environment whose python answers like this."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "activate").write_text(f"{activate}\nexport PATH={folder}/bin:$PATH\n")
    (folder / "bin" / "python").write_text(f"#!/bin/bash\necho {says}\n")
    (folder / "bin" / "python").chmod(0o755)
    return folder


def environment_finding(lab: Lab, **environment: Any) -> Finding:
    lab.profile({**PROFILE, "environment": environment})
    [found] = [item for item in preflight.look_here(lab.prepare()) if item.topic == "environment" and "may not see" not in item.text]
    return found


def test_a_missing_environment_is_refused_with_its_line(lab: Lab) -> None:
    found = environment_finding(lab, venv=str(lab.folder / "none"))
    assert found.mark == "wrong" and found.text.startswith(f"{lab.line('venv:')}3: environment.venv: no such file: {lab.folder}/none/bin/activate")
    assert environment_finding(lab, apptainer="/none.sif").text.startswith(lab.line("apptainer:"))


def test_an_environment_that_works(lab: Lab) -> None:
    assert environment_finding(lab, venv=str(venv(lab.folder / "good", "true"))).mark == "fine"
    assert environment_finding(lab).mark == "fine", "the interpreter of these tests has everything"


@pytest.mark.parametrize(("activate", "says", "mark", "told"), [
    ("echo 'no licence left' >&2; false", "3.11.2", "wrong", "setting it up fails here, and would in every job: no licence left"),
    ("true", "3.11.2 torch monai", "wrong", "its interpreter lacks torch, monai"),
    ("true", "3.8.1", "wrong", "its Python is 3.8.1; medgen needs 3.10"),
    ("module load x", "3.11.2", "warning", "cannot be tried on this machine"),
])  # fmt: skip
def test_an_environment_that_does_not_work(lab: Lab, activate: str, says: str, mark: str, told: str) -> None:
    found = environment_finding(lab, venv=str(venv(lab.folder / "v", activate, says)))
    assert found.mark == mark and told in found.text


def test_an_environment_that_hangs_is_killed_and_told(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "ENVIRONMENT_SECONDS", 0.5)
    found = environment_finding(lab, venv=str(venv(lab.folder / "v", f"echo $$ > {lab.folder}/pid; sleep 600")))
    assert found.mark == "warning" and "was not ready after" in found.text
    assert not Path(f"/proc/{(lab.folder / 'pid').read_text().strip()}").exists()


# --- what a stage asks for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "told"), [
    ("--ntasks=4", "--ntasks=4 is not what train_seg is planned for (1); write resources.nodes"),
    ("--ntasks-per-node 2", "write resources.gpus_per_node or processes instead"),
    ("-N2", "write resources.nodes instead"),
    ("--gres=gpu:a100:2", "is not what train_seg is planned for (1); write resources.gpus_per_node instead"),
    ("--gpus=2", "write resources.gpus instead"),
    ("--error=/none/x.err", "no such folder: /none"),
    ("--chdir=/none", "no such folder: /none"),
])  # fmt: skip
def test_directives_that_contradict_the_plan_or_name_no_folder(lab: Lab, line: str, told: str) -> None:
    message = lab.refused(f'stages.train_seg.resources.slurm=["{line}"]')
    assert "stages.train_seg.resources.slurm.0: " in message and told in message


@pytest.mark.parametrize("line", ["--ntasks=1", "-N 1", "--error=here/%j.err", "--nice=10", "--gres=tmp:1"])
def test_directives_that_harm_nothing(lab: Lab, line: str) -> None:
    (lab.folder / "here").mkdir()
    lab.check(f'stages.train_seg.resources.slurm=["{line}"]')


def test_a_batch_that_ranks_cannot_share_is_refused_with_its_line(lab: Lab) -> None:
    message = lab.refused("stages.train_seg.resources={processes: 3, cpus: 3}")
    assert f"{lab.line('batch_size:')}" in message and "8 cannot be shared evenly by 3 ranks" in message


@pytest.mark.parametrize("options", [["--local"], ["--local", "--dry-run"], ["--dry-run"]])
def test_no_submit_takes_an_uneven_batch(options: list[str], write_spec: WriteSpec, medgen: Medgen, tmp_path: Path) -> None:
    path = write_spec(tiny_spec())
    said = medgen("submit", path, *options, "-o", "stages.train_bravo.resources={processes: 3, cpus: 3}", expect=2).stderr
    assert said.startswith(f"medgen: {path}:") and "batch_size: 8 cannot be shared evenly by 3 ranks; use a multiple" in said
    assert not (tmp_path / "runs").exists()


def test_of_a_family_with_a_batch_per_phase_every_one_is_looked_at() -> None:
    knob, sizes = spec.family_config({"model": "pacgan", **models.config_class("pacgan").examples()["grey"], "batch_sizes": [8, 8, 4]}).global_batch_sizes
    assert knob == "batch_sizes" and planning.uneven_batch(sizes, 4) is None
    assert planning.uneven_batch(sizes, 8) == "4 cannot be shared evenly by 8 ranks; use a multiple"


def known(prepared: Prepared, stage: str, checkpoint_bytes: int, seconds: float | None = 0.1) -> None:
    record.write(prepared.run, record.Record(time.time(), {stage: record.StageRecord(checkpoint_bytes, seconds)}))


def test_a_grace_too_short_to_save_is_a_warning(lab: Lab) -> None:
    [prepared] = lab.prepare()
    assert not [line for line in lab.check("site.grace=5s") if "the grace of" in line], "nobody knows how large a checkpoint is"
    known(prepared, "train_seg", 10**9)
    [line] = [line for line in lab.check() if "the grace of" in line]
    assert "train_seg: the grace of 60 s is short for a step (0.0 s), a checkpoint (10.0 s)" in line and "-o site.grace=99s gives enough" in line
    assert not [line for line in lab.check("site.grace=99s") if "the grace of" in line]


def test_the_pace_of_an_earlier_attempt_counts(lab: Lab) -> None:
    [prepared] = lab.prepare("site.grace=100s")
    known(prepared, "train_seg", 10**8)
    prepared.run.stage("train_seg").mkdir(parents=True)
    log = prepared.run.training_log("train_seg")
    log.write_text('{"step": 1, "seconds_per_step": 2.5}\n{"step": 2, "seconds_per_step": 50.0}\n{"val_loss": 1}\n{"cut')
    assert prepared.run.slowest_step_seconds("train_seg") == 50.0
    assert any("a step (50.0 s), a checkpoint (1.0 s)" in line for line in lab.check("site.grace=100s"))


def test_a_job_shorter_than_its_grace_is_a_warning(lab: Lab) -> None:
    assert any("the warning comes 600 s before the limit, so at once" in line for line in lab.check("site.grace=10m", "stages.train_seg.resources.time=10m"))


def test_submit_tells_that_nothing_was_tried_until_it_was(lab: Lab) -> None:
    assert "no model of this spec has been tried: medgen check spec.yaml takes one step of each" in lab.check()
    [prepared] = lab.prepare()
    known(prepared, "train_seg", 1)
    assert not any("medgen check" in line for line in lab.check())
    record.path_of(prepared.run).write_text("[]")
    assert any("medgen check" in line for line in lab.check()), "a damaged record is none"


def test_a_dirty_checkout_is_a_note(lab: Lab) -> None:
    for arguments in (["init", "-q"], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *arguments], cwd=lab.folder, check=True)
    assert any(f"{lab.folder} has " in line and "changed file" in line for line in lab.check())


# --- room ------------------------------------------------------------------------------------------------------------


def test_room_is_counted_from_the_plan(lab: Lab) -> None:
    [prepared] = lab.prepare("stages.masks.count=1000", "stages.images.count=1000", "data.size=128")
    known(prepared, "train_seg", 10**9)
    need = space.total_need([prepared])
    # masks: 16 KiB; images: 32 KiB and the mask again; two folders and the files of each
    assert need.images_bytes == 1000 * (4 + 2) * 4096 + 1000 * (8 + 4 + 2) * 4096
    assert need.files == 1000 * 3 + 1000 * 4 + 500 + 40
    assert need.checkpoint_bytes == 4 * 10**9, "two are kept, the best one, and one is being written"
    assert need.unknown == ("train_bravo",)
    slices = 6 * 48
    assert need.cache_bytes == slices * 128**2 * (3 * 4 + 1)


def test_what_is_there_already_needs_no_room(lab: Lab) -> None:
    [prepared] = lab.prepare()
    known(prepared, "train_seg", 10**6)
    before = space.total_need([prepared]).checkpoint_bytes
    folder = prepared.run.checkpoints("train_seg") / "step-000001"
    folder.mkdir(parents=True)
    (folder / "commit.json").write_text("{}")
    (folder / "network.pt").write_bytes(b"0" * (2 * 10**6 - 2))
    after = space.total_need([prepared]).checkpoint_bytes
    assert (before, after) == (4 * 10**6, 3 * 2 * 10**6), "the real size counts, and what is there is not needed again"


def test_equal_data_of_a_sweep_share_a_cache(lab: Lab) -> None:
    one = space.total_need(lab.prepare()).cache_bytes
    lab.spec({**tiny_spec(), "sweep": {"stages.train_seg.config.lr": [1.0e-4, 2.0e-4]}})
    assert space.total_need(lab.prepare()).cache_bytes == one > 0


@pytest.mark.parametrize(("free_bytes", "free_files", "mark"), [(100, 100, "fine"), (19, 100, "warning"), (9, 100, "wrong"), (100, 9, "wrong"), (100, 19, "warning"), (100, None, "fine")])
def test_room_that_is_short_or_tight(free_bytes: int, free_files: int | None, mark: str) -> None:
    found = space.compare({"images": 9 * GIB, "checkpoints": GIB // 2, "the rest": GIB // 2}, 10, room.Free(Path("/x"), free_bytes * GIB, free_files))
    assert found.mark == mark and "10.0 GiB (images 9.0 GiB) and 10 files; /x has " in found.text


def test_a_quota_is_named_where_it_is_what_is_short() -> None:
    found = space.compare({"images": 9 * GIB}, 10, room.Free(Path("/x"), GIB, 100, "quota of user 1000"))
    assert found.mark == "wrong" and "/x has 1.0 GiB and 100 files free under the quota of user 1000; free some" in found.text


def test_what_is_kept_is_told_with_its_size(lab: Lab) -> None:
    lab.spec({**tiny_spec(), "sweep": {"stages.train_seg.config.lr": [1.0e-4, 2.0e-4]}})
    unknown = [f"{name} keeps its 2 newest checkpoints and the best of each metric: at most 4 at a time, of a size that `medgen check spec.yaml` measures" for name in ("train_seg", "train_bravo")]
    assert space.retention(lab.prepare()) == unknown, "points of a sweep say it once"
    lab.spec(tiny_spec())
    [prepared] = lab.prepare("stages.train_bravo.config.loop.keep=3")
    known(prepared, "train_bravo", 74 * 2**20)
    assert space.retention([prepared])[1] == (
        "train_bravo keeps its 3 newest checkpoints and the best of each metric: at most 5 x 74 MiB = 370 MiB, with the one that is being written"
    )


@pytest.mark.fault("F40")
def test_a_disk_without_files_left_is_refused_by_check(lab: Lab, private_mounts: list[str], environment: dict[str, str], tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Bytes are there, inodes are not: what a quota on files looks like."""
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=500m,nr_inodes=64 none disk; export MEDGEN_RUNS=$PWD/disk; "$0" -m medgen check spec.yaml --local; echo "check $?"; ls -A disk'
    done = subprocess.run([*private_mounts, "bash", "-c", script, sys.executable], env=environment, cwd=tmp_path, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    record_property("fired", next(line for line in lines if "not enough room" in line))
    assert lines[-1] == "check 2", "and nothing stays on the disk"
    assert any(line.startswith("  ✘ space") and "not enough room" in line and "files free" in line for line in lines), done.stdout + done.stderr


def test_a_runs_folder_that_cannot_be_written_is_refused(lab: Lab) -> None:
    prepared = submit.prepare(Path("spec.yaml"), [], "lab.yaml", Path("/proc/medgen"), False)
    with pytest.raises(InputError, match=r"/proc/medgen/tiny-\w+: cannot be written: .*MEDGEN_RUNS"):
        preflight.check(prepared)


def test_places_that_only_this_node_sees() -> None:
    assert "usually a disk of each node" in str(space.why_only_here(Path("/tmp")))
    assert space.why_only_here(Path("/usr")) is None
    if " /dev/shm tmpfs " in Path("/proc/mounts").read_text():
        assert "memory of this machine" in str(space.why_only_here(Path("/dev/shm/x")))


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(lab: Lab, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("MEDGEN_CACHE", str(cache))
    monkeypatch.setenv("MEDGEN_RUNS", str(lab.folder / "runs"))
    return lab


def told(overrides: list[str] | None = None, local: bool = True) -> checks.Told:
    return checks.check(Path("spec.yaml"), overrides or [], None if local else "lab.yaml", local)


def only(answer: checks.Told, topic: str) -> dict[str, Any]:
    [found] = [item for item in answer.record["checks"] if item["topic"] == topic]
    return found


def test_check_lists_what_it_measured_and_leaves_a_record(here: Lab, medgen: Medgen, environment: dict[str, str]) -> None:
    said = medgen("check", here.folder / "spec.yaml", "--local")
    for mark, topic in (("✔", "data"), ("✔", "train_seg"), ("✔", "train_bravo"), ("✔", "space"), ("✔", "environment")):
        assert any(line.startswith(f"  {mark} {topic} ") for line in said.stdout.splitlines()), said.stdout
    assert "step, validation, sampling and save work" in said.stdout and "nothing speaks against it" in said.stdout
    [prepared] = submit.prepare(here.folder / "spec.yaml", [], None, here.folder / "runs", True)
    kept = record.read(prepared.run)
    assert kept is not None and set(kept.stages) == {"train_seg", "train_bravo"}
    assert kept.stages["train_seg"].checkpoint_bytes > 4 * 3 * 40_000 and kept.stages["train_seg"].save_seconds is not None
    assert not (here.folder / "runs").exists(), "nothing but the cache is changed"
    assert not list(prepared.run.cache.glob(".check.*"))


def test_check_as_json_gives_everything_that_is_wrong_at_once(here: Lab, medgen: Medgen) -> None:
    said = medgen("check", here.folder / "spec.yaml", "--local", "--json", "-o", "site.environment.venv=/none", expect=2)
    answer = json.loads(said.stdout)
    assert not answer["fine"]
    wrong = {item["topic"] for item in answer["checks"] if item["mark"] == "wrong"}
    assert "environment" in wrong
    assert answer["models"]["train_bravo"]["parameters"] > 40_000, "and the rest was tried all the same"


def test_check_tells_slurms_answer_beside_the_rest(here: Lab) -> None:
    here.refuse("Invalid qos specification")
    answer = told(["site.qos=fast"], local=False)
    assert answer.exit == Exit.BAD_INPUT
    assert only(answer, "Slurm")["text"].startswith("-o site.qos=fast: qos: ")
    assert "✘ Slurm" in answer.text and "1 thing must be mended" in answer.text


def test_check_without_slurm_goes_on(here: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_checks, "COMMANDS", ("no-such-sbatch",))
    answer = told(local=False)
    assert answer.exit == Exit.DONE and only(answer, "Slurm")["mark"] == "warning"
    monkeypatch.setattr(slurm_checks, "COMMANDS", ("sbatch",))
    here.command("sinfo", 'echo "slurm_load_partitions: Unable to contact slurm controller" >&2; exit 1')
    monkeypatch.setattr(slurm_checks, "PATIENCE_SECONDS", 1.0)
    answer = told(local=False)
    assert answer.exit == Exit.DONE and "does not answer: sinfo" in only(answer, "Slurm")["text"]


def test_points_of_a_sweep_with_equal_models_are_tried_once(here: Lab) -> None:
    here.spec({**tiny_spec(), "sweep": {"stages.masks.accept.tries": [20, 30]}})
    answer = told()
    assert set(answer.record["models"]) == {"train_seg", "train_bravo"} and len(answer.record["runs"]) == 2
    for item in submit.prepare(Path("spec.yaml"), [], None, here.folder / "runs", True):
        assert record.read(item.run) is not None, "every point counts as checked"
    here.spec({**tiny_spec(), "sweep": {"stages.train_seg.config.lr": [1.0e-4, 2.0e-4]}})
    assert set(told().record["models"]) == {"train_seg", "train_bravo", "train_seg (lr=0.0002)"}


def test_a_fault_in_ones_own_code_is_told_with_its_line(here: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    (here.folder / "broken_flow.py").write_text(
        "from medgen.models.diffusion.strategies import RFlow\n\n\nclass Broken(RFlow):\n    def noised(self, *arguments):\n        return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(str(here.folder))
    answer = told(["stages.train_seg.config.strategy=broken_flow:Broken"])
    found = only(answer, "train_seg")
    assert found["mark"] == "wrong" and "one step fails: ZeroDivisionError" in found["text"] and "broken_flow.py:6" in found["text"]
    assert only(answer, "train_bravo")["mark"] == "fine"


def test_a_model_too_large_for_this_machine_is_tried_in_shape(here: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    real = told().record["models"]["train_seg"]
    monkeypatch.setattr(trial, "free_memory_bytes", lambda: 2**20)
    answer = told()
    found = only(answer, "train_seg")
    assert "its shapes fit; not tried with numbers: it takes about" in found["text"]
    facts = found["facts"]
    assert facts["parameters"] == real["parameters"] and facts["first_loss"] is None and real["first_loss"] > 0
    assert abs(facts["checkpoint_bytes"] - real["checkpoint_bytes"]) < 0.3 * real["checkpoint_bytes"]
    monkeypatch.setattr(trial, "free_memory_bytes", lambda: 64 * GIB)
    monkeypatch.setattr(trial, "TRIAL_SECONDS", 0.0)
    assert "it would take about" in only(told(), "train_seg")["text"]


def tiny_trial(here: Lab) -> trial.Trial:
    [item] = submit.prepare(Path("spec.yaml"), [], None, here.folder / "runs", True)
    stores, _ = checks._open_all([item])
    stage = item.spec.stages["train_bravo"]
    assert stage.kind == "train"
    return trial.Trial(item, "train_bravo", stage, next(iter(stores.values())), "train_bravo")


def test_memory_measured_in_shape_is_that_of_a_real_step_and_grows_with_the_batch(here: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_trial(here)
    rows = model.store.select("train", True)
    in_shape = trial._measure_shapes(model).activations
    _, real = trial._one_round(model, rows)
    assert in_shape is not None and abs(in_shape - real) < 0.15 * real
    monkeypatch.setattr(trial, "TRIAL_SAMPLES", 8)
    _, real_of_eight = trial._one_round(model, rows)
    assert abs(real_of_eight - real) < 0.15 * real, "per sample it is the same, so it may be scaled"


def test_what_autograd_keeps_is_counted_like_by_hand() -> None:
    import torch
    from torch import nn

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

    class Family:
        def modules(self) -> dict[str, nn.Module]:
            return {"two": module}

    module = Two()
    kept = shapes.Kept(Family())  # type: ignore[arg-type]
    values = torch.ones(1000)
    for _ in range(3):
        with kept.counting():
            loss = ((values * module.weight) ** 2).sum()  # keeps `values` and the product, not the weight
            assert kept._bytes == 8000
            loss.backward()
        del loss
    assert kept.peak == 8000 and kept._bytes == 0, "a step's memory is free again after it"


def test_a_gpu_that_may_be_too_small_is_a_warning_with_the_line(here: Lab) -> None:
    net = {**TINY_NET, "mode": "bravo", "batch_size": 64}
    here.spec({**tiny_spec(), "stages": {"train": {"kind": "train", "config": net, "resources": {"gpus": 1, "time": "1h"}}}})
    here.profile({**PROFILE, "features": {"a100": "40G", "toy": "1G", "odd": []}})
    found = only(told(local=False), "train")
    assert found["mark"] == "warning" and "may not fit a GPU of 1.0 GiB, which it may get; ask for gpu: {memory: 2G}" in found["text"]
    assert here.line("resources:") in found["text"] and "micro_batch" in found["text"]
    for enough in ("{memory: 40G}", "{any_of: [a100]}"):
        assert only(told([f"stages.train.resources.gpu={enough}"], local=False), "train")["mark"] == "fine"
