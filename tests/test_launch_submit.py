"""From a spec to a run folder: made once, found again, changed only where that is safe."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_stub import REPOSITORY, create_run, events

from medgen import files, plan, planning, site, spec
from medgen.errors import Exit, InputError
from medgen.launch import snapshot
from medgen.launch.fit import fit_to_machine
from medgen.launch.submit import create, prepare, spec_yaml
from medgen.launch.supervisor import register
from medgen.launch.verbs import submit
from medgen.rundir import Outcome, RunDir
from medgen.site import Site
from medgen.watch import live

SPEC = """
version: 1
name: tiny
seed: 7
data: {format: phantom, patients: 4, size: 32}
stages:
  train_seg: {kind: train, config: {model: diffusion, strategy: rflow, mode: seg, epochs: 2, warmup_epochs: 1, channels: [32, 64, 64], head_channels: 32}, resources: {gpus: 1, time: 90m, mem: 4G}}
  masks: {kind: generate, from: train_seg, count: 32, shards: 2, chunk: 8, parallel: 1, accept: {min_pixels: 2}, checkpoint: best-val}
  report: {kind: report}
"""


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


def make(spec_path: Path, *overrides: str) -> tuple[RunDir, plan.Plan]:
    return create_run(spec_path, overrides)


def finish(run: RunDir, task: plan.Task) -> None:
    now = time.time()
    made = run.shard(task.stage, task.shard) / "x"
    made.parent.mkdir(parents=True)
    made.write_text("x")
    run.write_outcome(Outcome(run.run_id, task.stage, task.shard, task.hash, 0, "done", None, "here", "cpu", 1, now, now, [run.produced(made)]))


def test_the_folder_holds_spec_plan_manifest_and_code(spec_path: Path) -> None:
    run, planned = make(spec_path)
    assert plan.read(run) == planned
    assert spec.load(run.spec) == spec.load(spec_path)
    manifest = files.read_json(run.manifest)
    assert manifest["packages"]["pydantic"]
    assert manifest["code_sha256"] == snapshot.code_sha256([])
    assert (run.code / "medgen" / "spec.py").read_bytes() == (REPOSITORY / "medgen" / "spec.py").read_bytes()
    assert not list(run.code.rglob("__pycache__"))
    assert run.batch_log("masks", 1).parent.is_dir()


@pytest.mark.fault("F29")
@pytest.mark.timeout(60)
def test_the_copy_of_the_code_runs_before_what_the_current_folder_holds(spec_path: Path, record_property: Callable[[str, object], None]) -> None:
    run, _ = make(spec_path)
    (run.code / "__main__.py").write_text("import medgen; print(medgen.__file__)")
    answer = subprocess.run([sys.executable, str(run.code)], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == str(run.code / "medgen" / "__init__.py")
    record_property("fired", "another medgen in the current folder")


def test_a_second_submit_keeps_everything(spec_path: Path) -> None:
    run, _ = make(spec_path)
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*") if path.is_file()}
    assert make(spec_path)[0].root == run.root
    after = {path: path.stat().st_mtime_ns for path in run.root.rglob("*") if path.is_file()}
    assert before == after


def test_two_creations_at_once_make_one_run(spec_path: Path) -> None:
    program = f"from pathlib import Path; from launch_stub import create_run; create_run(Path({str(spec_path)!r}))"
    both = [subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY / "tests") for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    [run_root] = (spec_path.parent / "runs").iterdir()
    assert len(events(RunDir(run_root), "created")) == 1


def test_other_resources_are_the_same_run_and_told(spec_path: Path) -> None:
    run, _ = make(spec_path)
    again, planned = make(spec_path, "stages.train_seg.resources.time=2h")
    assert again.root == run.root
    assert plan.read(run).stage("train_seg").time_minutes == 120 == planned.stage("train_seg").time_minutes
    [event] = events(run, "resources_changed")
    assert event["changes"] == ["train_seg.time_minutes 90 -> 120"]


def test_other_science_is_another_run(spec_path: Path) -> None:
    assert make(spec_path)[0].root != make(spec_path, "seed=8")[0].root


def test_shards_may_change_before_anything_is_made(spec_path: Path) -> None:
    run, _ = make(spec_path)
    make(spec_path, "stages.masks.shards=4")
    assert len(plan.read(run).stage("masks").tasks) == 4
    assert "masks.shards 2 -> 4" in events(run, "resources_changed")[0]["changes"]


def test_shards_of_a_half_done_stage_may_not_change(spec_path: Path) -> None:
    run, planned = make(spec_path)
    finish(run, planned.stage("masks").tasks[0])
    with pytest.raises(InputError, match="masks is half done in 2 shards and cannot go on in 4"):
        make(spec_path, "stages.masks.shards=4")
    assert len(plan.read(run).stage("masks").tasks) == 2


def test_a_finished_stage_keeps_its_shards(spec_path: Path) -> None:
    run, planned = make(spec_path)
    for task in planned.stage("masks").tasks:
        finish(run, task)
    _, after = make(spec_path, "stages.masks.shards=4", "stages.train_seg.resources.time=2h")
    assert after.stage("masks").tasks == planned.stage("masks").tasks
    assert plan.read(run).stage("train_seg").time_minutes == 120


@pytest.mark.fault("F29")
@pytest.mark.timeout(60)
def test_changed_code_is_told_and_the_copy_kept(spec_path: Path, record_property: Callable[[str, object], None]) -> None:
    run, _ = make(spec_path)
    with (run.code / "medgen" / "rng.py").open("a") as older:  # a copy that is whole, of another medgen than is installed
        older.write("# as it was\n")
    manifest = files.read_json(run.manifest)
    files.write_json(run.manifest, {**manifest, "code_sha256": snapshot.copied_sha256(run.code, [])})
    [note] = create(prepare(spec_path, [], None, spec_path.parent / "runs", True)[0])
    assert "the run keeps its copy" in note
    record_property("fired", note)


def test_a_stage_with_too_many_gpus_gets_what_there_is() -> None:
    checked = spec.check(spec.document.parse(SPEC, "here"))
    box = Site(name="box", cpus=8, gpus=0)
    fitted, notes = fit_to_machine(planning.make_plan(checked, box), box)
    assert fitted.stage("train_seg").gpus_per_node == 0
    assert notes == ["train_seg asks for 1 GPU; this machine has no GPU: it runs on the CPU"]
    assert fitted.run_id == planning.make_plan(checked, box).run_id


@pytest.mark.parametrize(
    "data",
    [
        "{format: nifti, root: /data, images: {bravo: a.nii.gz}, mask: seg.nii.gz, size: 32, mask_labels: [1, 4], window: {fixed: [0, 1]}}",
        "{format: phantom, size: 32}",
        "{format: csv, root: /data.csv, images: {bravo: '0123'}, mask: 'no', size: 32}",
    ],
)
def test_a_resolved_spec_reads_back_as_itself(data: str) -> None:
    text = SPEC.replace("{format: phantom, patients: 4, size: 32}", data)
    checked = spec.check(spec.document.parse(text, "here"))
    assert spec.check(spec.document.parse(spec_yaml(checked), "there")) == checked


def test_a_users_own_package_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_medgen_ideas"
    (package / "sub").mkdir(parents=True)
    (package / "sub" / "mine.py").write_text("class Mine: pass")
    (package / "scan.nii.gz").write_bytes(b"0" * 10)
    (tmp_path / "one_medgen_file.py").write_text("")
    monkeypatch.chdir(tmp_path)
    configs = [{"strategy": "my_medgen_ideas.sub.mine:Mine", "mode": "one_medgen_file:Mode"}, {"strategy": "ddpm"}, {"mode": "torch.nn:Module"}]
    packages = snapshot.user_packages(configs)
    assert packages == [package, tmp_path / "one_medgen_file.py"]
    snapshot.copy_code(tmp_path / "code", packages)
    assert (tmp_path / "code" / "my_medgen_ideas" / "sub" / "mine.py").exists()
    assert (tmp_path / "code" / "one_medgen_file.py").exists()
    assert not list((tmp_path / "code").rglob("*.nii.gz"))
    with pytest.raises(InputError, match="not_there_at_all"):
        snapshot.user_packages([{"mode": "not_there_at_all:X"}])


def test_git_state_tells_dirty_from_clean(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *arguments], check=True, capture_output=True)

    assert snapshot.git_state(tmp_path) is None
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "x")
    clean = snapshot.git_state(tmp_path)
    assert clean is not None
    assert not clean["dirty"]
    (tmp_path / "a").write_text("2")
    dirty = snapshot.git_state(tmp_path)
    assert dirty is not None
    assert dirty["dirty"]
    assert dirty["changed_files"] == ["a"]
    assert len(dirty["patch_sha256"]) == 64


def test_dry_run_writes_nothing(spec_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = spec_path.parent / "runs"
    assert submit(spec_path, [], None, runs, display=live.display, watch=live.watch, here=True, dry_run=True) == Exit.DONE
    assert "#SBATCH --job-name=medgen.tiny-" in capsys.readouterr().out
    assert submit(spec_path, [], None, runs, display=live.display, watch=live.watch, here=True, dry_run=True, as_json=True) == Exit.DONE
    assert json.loads(capsys.readouterr().out)["name"] == "tiny"
    assert not runs.exists()


def test_a_read_only_runs_folder_is_told_in_one_line(spec_path: Path) -> None:
    from medgen.errors import MedgenError

    (spec_path.parent / "runs").write_text("a file where the folder should be")
    with pytest.raises(MedgenError, match="cannot be written"):
        make(spec_path)


def test_a_run_that_is_going_on_is_watched_and_not_started_twice(spec_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = make(spec_path)
    register(run, False)  # this process passes for its supervisor
    watched: list[RunDir] = []

    def watch(seen: RunDir) -> Exit:
        watched.append(seen)
        return Exit.DONE

    arguments = (spec_path, [], None, spec_path.parent / "runs")
    assert submit(*arguments, display=live.display, watch=watch, here=True) == Exit.DONE
    assert [seen.root for seen in watched] == [run.root]
    assert submit(*arguments, display=live.display, watch=watch, here=True, detached=True) == Exit.DONE
    assert len(watched) == 1
    assert "already running here" in capsys.readouterr().err
    assert submit(*arguments, display=live.display, watch=lambda seen: Exit.UNFINISHED, here=True) == Exit.UNFINISHED, "Ctrl-C"
    assert f"the run goes on; `medgen cancel {run.run_id}` stops it" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"queued or running with other resources \(train_seg.time_minutes 90 -> 120\)"):
        make(spec_path, "stages.train_seg.resources.time=2h")
    assert not events(run, "submitted")


def test_the_local_profile_reads() -> None:
    assert site.load(str(REPOSITORY / "cluster" / "local.yaml")).name == "local"


def test_nothing_heavy_is_imported() -> None:
    program = "import sys, medgen.launch.verbs, medgen.watch.live, medgen.watch.state; print([m for m in ('torch', 'pandas', 'numpy', 'nibabel', 'rich') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
