"""What a spec, a path or a name can do: nothing but what it says. What leaves a run: no secret and no patient's name."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import re
import shlex
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY, TINY_NET, tiny_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch_stub import build

from medgen import document, files, names, planning, redact, sbatch_options, spec
from medgen.data import array_files
from medgen.data.image_files import read_slice
from medgen.data.phantoms import write_phantoms
from medgen.errors import InputError, MedgenError
from medgen.launch import notify
from medgen.launch.attempt import _taken_by_slurm, job_facts
from medgen.launch.script import render_script, whole_stage
from medgen.site import Environment, Site
from medgen.spec_data import DataSpec
from medgen.watch.tensorboard import job_script

Medgen = Callable[..., subprocess.CompletedProcess[str]]
WriteSpec = Callable[[dict[str, Any]], Path]
CANARY = "canary"
SPELLS = [f"$(touch {CANARY})", f"`touch {CANARY}`", f"; touch {CANARY};", f"' ; touch {CANARY} '", f'" ; touch {CANARY} "', f"& touch {CANARY} &", f"|touch {CANARY}",
          f"\ntouch {CANARY}\n", f"a\n#SBATCH --array=0-9\ntouch {CANARY}", "-rf", "--version", "%t%A%%", "#", "* ?", "~", "\\", "🧠 é", "${HOME}", "a b", f"$((`touch {CANARY}`))"]  # fmt: skip


def commands(name: str = "plain", **stage: Any) -> dict[str, Any]:
    """A job without a network: seconds to run."""
    return {"version": 1, "name": name, "stages": {"work": {"kind": "command", "run": "true", "resources": {"cpus": 1}, **stage}}}


def only_run(tmp_path: Path) -> Path:
    (found,) = [path.parent for path in (tmp_path / "runs").glob("*/plan.json")]
    return found


# --- specs are data --------------------------------------------------------------------------------------------------

PLAIN = yaml.safe_dump(commands())
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
HOSTILE = {
    "python object": (f"x: !!python/object/apply:os.system ['touch {CANARY}']\n", "the tag"),
    "python name": ("x: !!python/name:os.system\n", "the tag"),
    "own tag": ("x: !include /etc/passwd\n", "the tag"),
    "billion laughs": (BOMB, "aliases"),
    "a list that holds itself": ("x: &x [*x]\n", "aliases"),
    "depth in brackets": ("x: " + "[" * 200_000 + "\n", "levels of nesting"),
    "depth in dashes": ("x:\n" + "".join("  " * n + "- \n" for n in range(1, 500)), "levels of nesting"),
    "merge keys": ("x: &x {a: 1}\ny:\n  <<: *x\n", "merge keys"),
    "a list as a key": ("? [a, b]\n: c\n", "a key is one word"),
    "a huge number": ("x: 0x" + "f" * 6000 + "\n", "more than 64 bits"),
    "a number of many digits": ("x: " + "9" * 6000 + "\n", "YAML cannot read"),
    "a null byte": ("x: a\0b\n", "not valid YAML"),
    "an escape sequence": ("x: \x1b]0;owned\x07\n", "not valid YAML"),
    "a value sign": ("x: =\n", "YAML cannot read ="),
    "no day": ("x: 2026-13-45\n", "YAML cannot read"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_spec_is_refused_in_words_and_runs_nothing(case: str, tmp_path: Path, medgen: Medgen) -> None:
    """In a process of its own: some of these used to end it without a word."""
    text, words = HOSTILE[case]
    (tmp_path / "hostile.yaml").write_text(PLAIN + text)
    for verb in (["submit", "hostile.yaml", "--local", "--dry-run"], ["check", "hostile.yaml"], ["submit", "hostile.yaml", "--local"])[: 3 if "python" in case else 1]:
        said = medgen(*verb, expect=2, timeout=60).stderr
        assert said.startswith("medgen: hostile.yaml") and words in said and len(said) < 1000
    assert not (tmp_path / CANARY).exists() and not (tmp_path / "runs").exists()


def test_a_file_of_a_hundred_megabytes_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "big.yaml").open("wb") as handle:
        handle.truncate(100 * 2**20)
    for path in (tmp_path / "big.yaml", Path("/dev/zero")):
        with pytest.raises(InputError, match="larger than 32 MB, which is no spec"):
            document.load(path)


def test_many_problems_are_told_shortly(tmp_path: Path) -> None:
    (tmp_path / "many.yaml").write_text(yaml.safe_dump({**commands(), **{f"unknown{n}": n for n in range(3000)}}))
    with pytest.raises(InputError, match="and 2980 more problems"):
        spec.load(tmp_path / "many.yaml")


def test_a_sweep_of_a_million_points_is_refused(write_spec: WriteSpec) -> None:
    numbers = list(range(100))
    with pytest.raises(InputError, match="more than 1,000 points"):
        spec.load(write_spec({**commands(), "sweep": {"seed": numbers, "stages.work.run": numbers, "stages.work.env.A": numbers}}))


def test_anchors_that_mean_little_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("version: 1\nname: a\nstages:\n  one: &one {kind: command, run: 'true'}\n  two: *one\n")
    assert list(spec.load(tmp_path / "a.yaml").stages) == ["one", "two"]


def test_a_variable_is_text_whatever_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", "x, seed: 7}\nseed: 8\n!!python/object:os.system ${HOME}")
    (tmp_path / "v.yaml").write_text("version: 1\nname: v\nstages:\n  a: {kind: command, run: 'true', outputs: [ ${GIVEN} ], env: {A: '${GIVEN}'}}\n")
    read = spec.load(tmp_path / "v.yaml")
    assert read.seed == 42 and read.stages["a"].outputs == [os.environ["GIVEN"]]  # type: ignore[union-attr]


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system [x]", "[*a]", "[&a [1], *a]", "[" * 100_000, "0x" + "f" * 6000, "=", "{? [a] : b}"])
def test_a_hostile_override_is_refused(value: str, tmp_path: Path, write_spec: WriteSpec) -> None:
    with pytest.raises(InputError, match=r"^-o seed=") as refused:
        spec.load(write_spec(commands()), [f"seed={value}"])
    assert len(str(refused.value)) < 500


def test_a_users_module_runs_when_the_spec_is_read_and_only_if_it_is_named(tmp_path: Path, write_spec: WriteSpec, medgen: Medgen) -> None:
    """The only code that comes from a spec before a job starts; docs/security.md says so."""
    (tmp_path / "mine.py").write_text(f"open('{CANARY}', 'w').close()\n")
    other = write_spec(tiny_spec())
    medgen("submit", other, "--local", "--dry-run")
    assert not (tmp_path / CANARY).exists()
    named = tiny_spec(name="named")
    named["stages"]["train_bravo"]["config"]["strategy"] = "mine:Strategy"
    said = medgen("submit", write_spec(named), "--local", "--dry-run", expect=2).stderr
    assert (tmp_path / CANARY).exists() and "has no Strategy" in said
    assert "imports it" in (REPOSITORY / "docs" / "security.md").read_text()


# --- nothing reaches a shell -----------------------------------------------------------------------------------------


def run_script(text: str, folder: Path, **variables: str) -> list[list[str]]:
    """Run a job script with stand-ins for what it calls; returns the words of every call. The folder must stay free of canaries."""
    stubs = folder / "stubs"
    stubs.mkdir(exist_ok=True)
    for name in ("srun", "scontrol", "module", "conda", "apptainer", "stub-python", "hostname"):
        (stubs / name).write_text(f"#!/bin/bash\nfor word in {name} \"$@\"; do printf '%s\\0' \"$word\"; done >> {shlex.quote(str(folder / 'calls'))}\nprintf '\\1\\0' >> {shlex.quote(str(folder / 'calls'))}\n")
        (stubs / name).chmod(0o755)
    (folder / "job.sh").write_text(text)
    environment = {"PATH": f"{stubs}:/usr/bin:/bin", "HOME": str(folder), "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_NODELIST": "n1", **variables}
    subprocess.run(["bash", str(folder / "job.sh")], cwd=folder, env=environment, capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert not list(folder.rglob(CANARY)), text
    if not (folder / "calls").exists():
        return []
    made = (folder / "calls").read_bytes().decode(errors="surrogateescape").split("\1\0")
    return [call.split("\0")[:-1] for call in made if call]


ODD_NAMES = st.lists(st.one_of(st.sampled_from(SPELLS), st.text(alphabet="$`;'&|<>()*?[]{}!~# %=é-\"\\\n:ab", max_size=6)), min_size=1, max_size=3).map("".join)


@settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(ODD_NAMES, st.sampled_from(["train", "images", "work"]))
def test_no_path_becomes_a_command_in_a_script(name: str, which: str) -> None:
    """The runs folder is called anything: it is refused, or the script run by a real bash hands it on word for word."""
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there)
        try:
            runs = names.runs_folder(folder / "w" / name.replace("/", "_")[:100])
        except InputError as error:
            assert "MEDGEN_RUNS" in str(error)
            return
        run, plan = build(runs, [
            {"name": "train", "kind": "train", "ranks": 2}, {"name": "images", "kind": "generate", "tasks": 3}, {"name": "work", "kind": "command", "launcher": "none"},
        ])  # fmt: skip
        stage = plan.stage(which)
        text = render_script(plan, stage, whole_stage(stage, 1), run.root, "stub-python")
        header = text.split("\n\n")[0].splitlines()
        assert header[0] == "#!/bin/bash" and all(line.startswith("#SBATCH --") for line in header[1:])
        assert all("%" not in part.replace("%%", "").replace("s%a/", "").replace("%3", "") for part in header if not part.startswith("#SBATCH --array"))
        calls = run_script(text, folder, MEDGEN_SUPERVISED="1")
        expected = [str(run.code), stage.kind, str(run.root)]
        assert any(call[index : index + 3] == expected for call in calls for index in range(len(call))), calls


SPELL_FIELDS = [("account", str), ("qos", str), ("reservation", str), ("mail", str), ("gpu", str), ("cpu", str), ("feature", str), ("nodes", str)]


@pytest.mark.parametrize("spell", [text for text in SPELLS if re.search(r"[\s\"'\\#`$;]", text)], ids=ascii)
@pytest.mark.parametrize("field", [name for name, _ in SPELL_FIELDS])
def test_a_word_for_sbatch_is_one_word(field: str, spell: str, tmp_path: Path) -> None:
    profile: dict[str, Any] = {"name": "x", "scheduler": "slurm", "cpus": 1, "gpus": 1}
    if field == "mail":
        profile["notify"] = {"mail": spell}
    elif field in ("gpu", "cpu"):
        profile["partitions"] = {field: spell}
    elif field == "feature":
        profile["features"] = {spell: "40G"}
    elif field == "nodes":
        profile["exclude"] = [{"nodes": spell, "reason": "broken", "until": "2090-01-01"}]
    else:
        profile[field] = spell
    with pytest.raises(ValueError, match="one word"):
        Site.model_validate(profile)


@pytest.mark.parametrize("where", ["any_of", "prefer", "slurm"])
def test_a_newline_in_a_spec_makes_no_directive(where: str, write_spec: WriteSpec) -> None:
    evil = f"a100\n#SBATCH --array=0-9\ntouch {CANARY}"
    resources = {"slurm": [f"--comment={evil}"]} if where == "slurm" else {"gpus": 1, "gpu": {where: [evil] if where == "any_of" else evil}}
    with pytest.raises(InputError, match=f"resources.*{where}"):
        spec.load(write_spec(commands(resources=resources)))
    with pytest.raises(InputError, match="control characters"):
        sbatch_options.directive_line(f"--account={evil}")


def test_the_words_of_a_site_are_quoted(tmp_path: Path) -> None:
    """Modules, environments, containers and their options: names, not commands."""
    for number, spell in enumerate(spell for spell in SPELLS if spell != "~"):
        folder = tmp_path / str(number)
        folder.mkdir()
        for environment in (
            Environment(modules=[spell], conda=spell), Environment(modules=[spell], venv=Path("/nowhere") / spell), Environment(apptainer=Path("/nowhere") / spell, apptainer_options=[spell]),
        ):  # fmt: skip
            checked = spec.Spec.model_validate(commands(env={"A": spell}, foreach=[spell], outputs=[spell]))
            site = Site(name="x", scheduler="slurm", cpus=1, gpus=0, environment=environment, secrets=Path("/nowhere") / spell)
            plan = planning.make_plan(checked, site)
            text = render_script(plan, plan.stages[0], whole_stage(plan.stages[0], 1), folder / "runs" / plan.run_id, "stub-python")
            run_script(text, folder, MEDGEN_SUPERVISED="1")
            board = job_script(site, folder / "a b$(touch canary)", None, plan.run_id)
            assert board.split("set -E")[0].count("\n#SBATCH ") == board.count("#SBATCH ") - spell.count("#SBATCH") * board.count(spell)
            run_script(board, folder)


def test_a_whole_run_in_a_folder_with_an_odd_name(tmp_path: Path, write_spec: WriteSpec, medgen: Medgen, environment: dict[str, str]) -> None:
    environment["MEDGEN_RUNS"] = str(tmp_path / f"it's $(touch {CANARY}) & 100%t `touch {CANARY}`; 🧠 *")
    items = [text for text in SPELLS if "${" not in text]  # that one is a variable, and medgen's own to fill in
    medgen("submit", write_spec(commands(run="printf %s \"$MEDGEN_ITEM$SPELL\" > \"$MEDGEN_OUT/said\"", foreach=items, env={"SPELL": SPELLS[0]})), "--local")
    (run,) = Path(environment["MEDGEN_RUNS"]).glob("plain-*")
    assert [(run / "work" / "made" / f"{number:05}" / "said").read_text() for number in range(len(items))] == [item + SPELLS[0] for item in items]
    medgen("logs", f"$(touch {CANARY})", expect=2)
    medgen("tensorboard", f"`touch {CANARY}`", expect=2)
    medgen("logs", run)
    assert not list(tmp_path.rglob(CANARY))


@pytest.mark.parametrize("name", ["a:b", "a\nb", 'a"b', "a\\b"])
def test_a_runs_folder_that_path_or_slurm_would_misread_is_refused(name: str, tmp_path: Path, write_spec: WriteSpec, medgen: Medgen, environment: dict[str, str]) -> None:
    environment["MEDGEN_RUNS"] = str(tmp_path / name)
    assert "set MEDGEN_RUNS to another folder" in medgen("submit", write_spec(commands()), "--local", expect=2).stderr


@pytest.mark.parametrize("name", ["../../escaped", "/abs", "a/b", "", "affines", "a\nb", "-rf"])
def test_a_channel_cannot_name_a_file_elsewhere(name: str, write_spec: WriteSpec) -> None:
    with pytest.raises(InputError, match="channel names are"):
        spec.load(write_spec({**tiny_spec(), "data": {"format": "nifti", "root": "/x", "images": {name: "a.nii.gz"}}}))


def test_a_job_cannot_be_taken_for_ended_by_its_own_words(tmp_path: Path) -> None:
    run, plan = build(tmp_path, [{"name": "a", "kind": "train"}])
    line = "JobId=7 JobName=x JobState=RUNNING Restarts=0 Command=/a/b WorkDir=/home/x JobState=CANCELLED Restarts= Comment=Restarts=9"
    assert _taken_by_slurm(run, plan.stages[0], job_facts(line), 1.0) is None
    assert _taken_by_slurm(run, plan.stages[0], job_facts("JobState=RUNNING Restarts="), 1.0) is None


def test_a_message_that_cannot_be_sent_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = build(tmp_path, [{"name": "a", "kind": "train"}])
    assert notify._command(run, "true", "fail", "a\0b") == "command: ValueError"
    for address in ("file:///etc/passwd", "http://[", "http://a b", "ftp://x"):
        monkeypatch.setenv("HOOK", address)
        said = notify._webhook("HOOK", "fail", "text")
        assert said is not None and said.startswith("webhook: ") and address not in said


# --- what is loaded --------------------------------------------------------------------------------------------------


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return (open, (str(self.canary), "w"))


def test_a_checkpoint_with_code_is_refused_when_training_resumes(tmp_path: Path, write_spec: WriteSpec, medgen: Medgen) -> None:
    medgen("submit", write_spec({**tiny_spec(), "stages": {"train": {"kind": "train", "config": {**TINY_NET, "mode": "seg", "strategy": "rflow"}, "resources": {"cpus": 1}}}}), "--local")
    run = only_run(tmp_path)
    for folder in (run / "train" / "ckpt").glob("step-*"):  # sealed as if it were ours
        commit = json.loads((folder / "commit.json").read_text())
        for name in [name for name in commit["files"] if name.endswith(".pt")]:
            (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / CANARY)))
            commit["files"][name]["sha256"] = files.sha256_file(folder / name)
            for size in [key for key in commit["files"][name] if "size" in key]:
                commit["files"][name][size] = (folder / name).stat().st_size
        (folder / "commit.json").write_text(json.dumps(files.with_own_hash(commit)))
    (run / "outcome" / "train.0.json").unlink()
    said = medgen("train", run, expect=1)
    record = json.loads((run / "outcome" / "train.0.json").read_text())
    assert record["status"] == "failed" and record["cause"] and "eights" in record["cause"] + said.stderr + said.stdout
    assert not (tmp_path / CANARY).exists()


def test_arrays_with_code_are_refused(tmp_path: Path) -> None:
    trap = np.empty(1, dtype=object)
    trap[0] = Trap(tmp_path / CANARY)
    np.save(tmp_path / "images.npy", trap, allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        read_slice(tmp_path / "images.npy")
    with pytest.raises(MedgenError, match="damaged"):
        array_files.mapped(tmp_path, "images")
    assert not (tmp_path / CANARY).exists()


LOADERS = {"torch.load(": "weights_only=True", "np.load(": "allow_pickle=False"}
NEVER = re.compile(r"\b(pickle\.loads?|shell=True|os\.system|os\.popen|(?<!\.)eval\(|(?<![.\w])exec\(|yaml\.(load|unsafe_load|full_load)\(|marshal\.loads?|read_pickle|joblib)")


def test_no_module_loads_objects_or_starts_a_shell() -> None:
    for path in (REPOSITORY / "medgen").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not NEVER.search(line.partition("#")[0]), f"{path}: {line}"
            for call, wanted in LOADERS.items():
                assert call not in line or wanted in line, f"{path}: {line}"


# --- who may look ----------------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_a_run_belongs_to_its_user_whatever_the_umask(mask: int, tmp_path: Path, write_spec: WriteSpec, environment: dict[str, str]) -> None:
    environment["MEDGEN_CACHE"] = str(tmp_path / "cache")
    path = write_spec(commands())

    def medgen(*words: object) -> None:
        command = [sys.executable, "-m", "medgen", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, umask=mask, timeout=120)
        assert done.returncode == 0, done.stderr

    medgen("submit", path, "--local")
    run = only_run(tmp_path)
    assert mode(tmp_path / "runs") == mode(run) == 0o700
    if mask == 0:
        medgen("data", write_spec({"version": 1, "name": "d", "data": {"format": "phantom", "patients": 3, "size": 16}, "stages": commands()["stages"]}), "--out", tmp_path / "pictures")
        assert mode(tmp_path / "cache") == mode(tmp_path / "pictures") == 0o700
    run.chmod(0o750)  # its owner shares it: this is not undone
    medgen("submit", path, "--local", "-o", "stages.work.resources.time=2h")
    assert mode(run) == 0o750


def test_a_runs_folder_that_is_there_keeps_its_rights(tmp_path: Path, write_spec: WriteSpec, medgen: Medgen) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o775)
    medgen("submit", write_spec(commands()), "--local")
    assert mode(tmp_path / "runs") == 0o775 and mode(only_run(tmp_path)) == 0o700


# --- what is shown ---------------------------------------------------------------------------------------------------

HUSH = "hush-4711"


@pytest.mark.parametrize("text", [
    f"API_KEY={HUSH}", f"export api_key='{HUSH} {HUSH}'", f"-o stages.x.env.My_Token={HUSH}", f"--password {HUSH}", f"--db-pass={HUSH}", f'"SECRET_THING": "{HUSH}"', f"WANDB_API_KEY: {HUSH}",
    f"password: {HUSH}", f"https://me:{HUSH}@host/x", f"a=1 PASSWD=\"a \\\" {HUSH}\" b=2", f"{{token: {HUSH}}}", f"PGPASSWORD={HUSH}; psql", f"aws_secret_access_key = {HUSH}",
])  # fmt: skip
def test_secrets_are_hidden_in_texts(text: str) -> None:
    assert HUSH not in redact.text(text) and redact.HIDDEN in redact.text(text)


@pytest.mark.parametrize("text", [
    "jobs/x.yaml:8:7: stages.train.keys: unknown key; did you mean 'key'?", "KeyError: 'x'", "the key stands twice", "exit code 1: pass", "https://host:8080/x", "if a == key: b", "n_tokens is 5",
    "scripts/compass.py --lr 1", "stages.x.env.API_KEY: is missing",
])  # fmt: skip
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redact.text(text) == text


@pytest.mark.parametrize("name", ["API_KEY", "APIKEY", "apikey", "access-token", "PASSWORD", "passwd", "db_pass", "dbpass", "secretKey", "PGPASSWORD", "My.Token", "WANDB_KEY_2", "githubtoken", "KEYFRAMES"])
def test_a_name_with_a_secret_word_as_a_part_is_one_of_a_secret(name: str) -> None:
    assert redact.is_secret(name) and redact.value({name: HUSH}) == {name: redact.HIDDEN}


@pytest.mark.parametrize("name", ["monkey", "passes", "passed", "keyframes", "tokenizer", "compass", "bypass_rate", "n_keypoints", "KeyError"])
def test_a_secret_word_inside_another_word_is_none(name: str) -> None:
    assert not redact.is_secret(name) and redact.text(f"{name}=left") == f"{name}=left"


@pytest.mark.parametrize("text", [
    "passes=3 tokens=512 keyframes=7 monkey=4", "no column 'passed': found 3", "/etc/passwd: expected `key: value` lines", "tokens: 1.5e6, key_norm=0.25, use_token=true", "--tokens 512 --tokenizer bert",
    "-o foo: write NAME.SUBNAME=VALUE", "an unexpected token: found one",
])  # fmt: skip
def test_harmless_words_of_logs_stay(text: str) -> None:
    assert redact.text(text) == text


PARTS = st.sampled_from(["db", "my", "wandb", "aws", "x", "n1"])
SECRET_WORDS = st.sampled_from(["key", "token", "secret", "pass", "password", "passwd", "apikey"])
JOINED = st.sampled_from([str.lower, str.upper, str.title])
WRITTEN = st.sampled_from(["{}={}", "export {}='{}'", "--env={}={}", "--{} {}", '{{"{}": "{}"}}', '{{"a": 1, "{}": "{}"}}', "{}: {}", "a: 1\n  {}: {}\n", "- {}: {}", "-H '{}: {}'", "INFO the {}: {}", "a=b {} = {}"])


@settings(deadline=None, max_examples=300)
@given(st.lists(PARTS, max_size=2), SECRET_WORDS, st.lists(PARTS, max_size=2), st.sampled_from(["_", "-"]), JOINED, WRITTEN)
def test_a_secret_is_hidden_whatever_its_name_is_made_of(before: list[str], word: str, behind: list[str], between: str, spell: Callable[[str], str], written: str) -> None:
    text = written.format(between.join(spell(part) for part in [*before, word, *behind]), HUSH)
    assert HUSH not in redact.text(text) and redact.HIDDEN in redact.text(text), text


@pytest.mark.parametrize("verb", [["submit", "/etc/passwd", "--local"], ["submit", "tiny.yaml", "--local", "-o", "foo"]])
def test_medgens_own_messages_hide_nothing(verb: list[str], tmp_path: Path, medgen: Medgen) -> None:
    (tmp_path / "tiny.yaml").write_text(PLAIN)
    said = medgen(*verb, expect=2).stderr
    assert redact.HIDDEN not in said and ("`key: value` lines" in said or "write NAME.SUBNAME=VALUE" in said)


def test_secrets_reach_the_job_and_nothing_that_is_shown(tmp_path: Path, write_spec: WriteSpec, medgen: Medgen) -> None:
    given = commands(
        run=f"printf %s \"$API_KEY\" > seen; export DB_PASSWORD={HUSH}; echo \"login with token={HUSH} to https://me:{HUSH}@host failed\"; printf '\\033]0;owned\\007\\n'; exit 3",
        env={"API_KEY": "to be overridden"}, resources={"cpus": 1, "setup": [f"export SETUP_SECRET={HUSH}"]},
    )  # fmt: skip
    path, override = write_spec(given), f"stages.work.env.API_KEY={HUSH}"
    shown = [medgen("submit", path, "--local", "--dry-run", "-o", override).stdout, medgen("submit", path, "--local", "--dry-run", "--json", "-o", override).stdout]
    ended = medgen("submit", path, "--local", "-o", override, expect=1)
    run = only_run(tmp_path)
    assert (tmp_path / "seen").read_text() == HUSH, "the job got it"
    shown += [ended.stdout, ended.stderr, (run / "manifest.json").read_text(), (run / "events.jsonl").read_text(), (run / "outcome" / "work.0.json").read_text()]
    for verb in (["watch", run, "--once"], ["watch", run, "--json"], ["why", run], ["why", run, "--json"], ["usage", run, "--json"], ["logs", run], ["logs", "-f", run]):
        done = subprocess.run([sys.executable, "-m", "medgen", *map(str, verb)], cwd=tmp_path, env={**os.environ, "MEDGEN_RUNS": str(tmp_path / "runs")}, capture_output=True, text=True)
        shown += [done.stdout, done.stderr]
    for wrong in ([f"stages.work.env={{API_KEY: [{HUSH}]}}"], [f"stages.work.env.API_KEY=[{HUSH}]"], [f"stages.work.env.API_KEY.deeper={HUSH}"], [f"stages.work.envy.API_KEY={HUSH}"]):
        shown.append(medgen("submit", path, "--local", "-o", wrong[0], expect=2).stderr)
    assert [text for text in shown if HUSH in text] == []
    assert not any("\033" in text for text in shown), "a log steers no terminal"
    assert sum(redact.HIDDEN in text for text in shown) >= 10
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["command"][-1] == "stages.work.env.API_KEY=***" and not {"environment", "env"} & manifest.keys()
    assert json.loads((run / "plan.json").read_text())["stages"][0]["settings"]["env"]["API_KEY"] == HUSH


def test_a_message_moves_no_cursor(tmp_path: Path, medgen: Medgen) -> None:
    (tmp_path / "x.yaml").write_text('version: 1\nname: x\n"\\e]0;owned\\a\\e[2J": 1\nstages: {a: {kind: command, run: "true"}}\n')
    said = medgen("submit", "x.yaml", "--dry-run", "--local", expect=2).stderr
    assert "unknown key" in said and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said)


# --- patients --------------------------------------------------------------------------------------------------------

IN_HEADER, IN_FOLDER = "DOE^JOHN", "MUSTERMANN^ERIKA"


@pytest.fixture(scope="module")
def named_patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes whose every free header field and whose folders hold names, as exports from a clinic do."""
    import nibabel

    folder = tmp_path_factory.mktemp("clinic") / "data"
    write_phantoms(folder, 6, 1)
    patients = [path for split in sorted(folder.iterdir()) for path in sorted(split.iterdir()) if path.is_dir()]
    for number, patient in enumerate(patients):
        for path in patient.glob("*.nii.gz"):
            image: Any = nibabel.load(path)
            made = nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header)
            for field in ("descrip", "db_name", "aux_file", "intent_name"):
                made.header[field] = f"{IN_HEADER} {number}"[: made.header[field].dtype.itemsize]
            for code in ("comment", "dicom"):
                extension = nibabel.nifti1.Nifti1Extension(code, f"(0010,0010) PN {IN_HEADER} 1950-01-0{number}".encode())
                made.header.extensions.append(extension)
            nibabel.save(made, path)
        patient.rename(patient.with_name(f"{IN_FOLDER}_{number}"))
    assert IN_HEADER.encode() in gzip.decompress(next(folder.rglob("*.nii.gz")).read_bytes())
    return folder


def names_in(folder: Path) -> list[str]:
    """Files below it in which a name stands, unpacked where they are packed; or whose own name holds one."""
    found = []
    for path in [folder, *folder.rglob("*")]:
        content = path.read_bytes() if path.is_file() else b""
        content += gzip.decompress(content) if content[:2] == b"\x1f\x8b" else b""
        if any(name.encode() in content or name in path.name for name in (IN_HEADER, IN_FOLDER, IN_FOLDER.replace("^", "&#94;"))):
            found.append(str(path))
    return found


def test_outputs_carry_no_names(tmp_path: Path, named_patients: Path, write_spec: WriteSpec, medgen: Medgen) -> None:
    wanted = {
        "version": 1, "name": "clinic",
        "data": {"format": "nifti", "root": str(named_patients), "images": {"bravo": "bravo.nii.gz"}, "mask": "seg.nii.gz", "size": 16, "positive_only": True, "every": 2},
        "stages": {
            "train": {"kind": "train", "config": {**TINY_NET, "strategy": "ddpm", "mode": "bravo"}, "resources": {"cpus": 1}},
            **{form: {"kind": "generate", "from": "train", "condition": "test", "count": 4, "chunk": 2, "format": form, "sampling": {"sampler": "ddim", "steps": 2}} for form in ("nifti", "png")},
            "evaluate": {"kind": "evaluate", "of": "nifti", "metrics": ["mae", "psnr"]},
            "report": {"kind": "report"},
        },
    }  # fmt: skip
    medgen("submit", write_spec(wanted), "--local")
    run = only_run(tmp_path)
    for part in ("nifti", "png", "train", "evaluate", "report", "logs", "outcome", "events.jsonl"):
        assert names_in(run / part) == [], part
    index = (run / "nifti" / "dataset" / "index.csv").read_text()
    assert len(re.findall(r"real_[0-9a-f]{16}", index)) == 4, "evaluate finds the slice all the same"
    scores = json.loads((run / "evaluate" / "metrics.json").read_text())
    assert scores["counts"]["pairs"] == 4 and {item["metric"] for item in scores["scores"]} >= {"mae", "psnr"}
    assert (run / "report" / "index.html").read_text().count("real_") >= 1
    for path in (run / "png" / "dataset").rglob("*.png"):
        assert set(re.findall(rb"[A-Za-z]{4}(?=.{4}|$)", b"".join(chunk_names(path)))) <= {b"IHDR", b"IDAT", b"IEND"}


def chunk_names(path: Path) -> list[bytes]:
    content, place, found = path.read_bytes(), 8, []
    while place < len(content):
        found.append(content[place + 4 : place + 8])
        place += 12 + int.from_bytes(content[place : place + 4], "big")
    return found


def test_an_alias_cannot_be_guessed_from_a_list_of_names(tmp_path: Path, named_patients: Path) -> None:
    from medgen.data.store import open_store

    data = DataSpec.model_validate({"root": named_patients, "images": {"bravo": "bravo.nii.gz"}, "mask": "seg.nii.gz", "size": 16})
    store = open_store(data, 42, tmp_path / "cache", lambda text: None)
    assert len(set(store.aliases)) == len(store.rows)
    for name, alias in zip(store.rows["id"], store.aliases, strict=True):
        guesses = [hashlib.blake2b(name.encode(), key=key, digest_size=8).hexdigest() for key in (b"", store.fingerprint.encode(), bytes.fromhex(store.fingerprint))]
        assert alias not in {f"real_{guess}" for guess in guesses}
    moved = tmp_path / "elsewhere"
    moved.symlink_to(named_patients)
    again = open_store(data.model_copy(update={"root": moved}), 42, tmp_path / "cache", lambda text: None)
    assert list(again.aliases) == list(store.aliases), "equal data, equal outputs"
