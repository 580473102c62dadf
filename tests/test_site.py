"""Site profiles: those in cluster/ load, the example explains every key, specs that people copy hold no words of any site."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import REPOSITORY, tiny_spec
from pydantic import BaseModel

from medgen import planning, site, spec
from medgen.document import Document
from medgen.errors import InputError
from medgen.site import Environment, Site

PROFILES = sorted((REPOSITORY / "cluster").glob("*.yaml"))
MODELS_OF_GPUS = {"p100", "v100", "a100", "h100"}  # a GPU has one name everywhere; how a site calls its memory is the site's


@pytest.fixture
def profile(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write(values: dict[str, Any]) -> Path:
        path = tmp_path / "lab.yaml"
        path.write_text(yaml.safe_dump({"name": "lab", "scheduler": "slurm", "cpus": 8, "gpus": 4, **values}, sort_keys=False))
        return path

    return write


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_loads_and_names_nobody(path: Path) -> None:
    loaded = site.load(str(path))
    assert loaded.name == path.stem
    assert not re.search(r"/home/\w|/cluster/(home|work)/\w|@\w", path.read_text()), "a profile is for everybody"
    assert loaded.notify.mail is None


def test_the_profile_of_idun(write_spec: Callable[..., Path]) -> None:
    idun = site.load(str(REPOSITORY / "cluster" / "idun.yaml"))
    resources = "stages.train_seg.resources={gpus: 1, gpu: {any_of: [a100, h100], memory: 80G}}"
    checked = spec.load(write_spec(tiny_spec()), [resources])
    planned = planning.make_plan(checked, idun)
    assert planned.stage("train_seg").directives[:3] == ["--partition=GPUQ", "--account=share-ie-idi", "--constraint=h100"]
    assert planned.stage("train_seg").threads == 8 and planned.stage("train_seg").mem_mebibytes == 32 * 1024
    assert planned.stage("report").directives[:1] == ["--partition=CPUQ"]
    assert "--account=other" in planning.make_plan(checked, site.load("idun", ["site.account=other"])).stage("report").directives
    assert idun.environment.lines()[1:] == [
        "module purge", "module load Anaconda3/2024.02-1", 'source "$(conda info --base)/etc/profile.d/conda.sh"', "conda activate medgen",
    ]  # fmt: skip


def keys_of(model: type[BaseModel], inside: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key a user may write, nested ones after their parent."""
    for name, field in model.model_fields.items():
        yield (*inside, name)
        found = [field.annotation, *get_args(field.annotation)]
        for inner in found:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from keys_of(inner, (*inside, name))


@pytest.mark.parametrize("keys", list(keys_of(Site)), ids=".".join)
def test_the_example_explains_every_key_in_its_line(keys: tuple[str, ...]) -> None:
    lines = (REPOSITORY / "cluster" / "example.yaml").read_text().splitlines()
    inside = lines
    if len(keys) > 1:
        start = next(number for number, line in enumerate(lines) if line.startswith(f"{keys[0]}:"))
        length = next((number for number, line in enumerate(lines[start + 1 :]) if re.match(r"\w", line)), len(lines))
        inside = lines[start : start + 1 + length]
    found = [line for line in inside if re.search(rf"(^|[\s{{#-]){keys[-1]}:", line)]
    assert found, f"{'.'.join(keys)} is missing"
    if len(keys) == 1:
        assert re.search(r"\s# \S", found[0]), f"{found[0]}: say what it is"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_specs_that_people_copy_hold_no_words_of_a_site(path: Path) -> None:
    words = {"partition", "account", "qos", "sbatch"}
    for profile_path in PROFILES:
        loaded = site.load(str(profile_path))
        words |= {word for word in (loaded.partitions.gpu, loaded.partitions.cpu, loaded.account, loaded.reservation) if word}
        words |= {*loaded.environment.modules, *(set(loaded.features) - MODELS_OF_GPUS)}
    text = path.read_text()
    found = [word for word in words - {"gpu", "cpu"} if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text, re.IGNORECASE)]
    assert not found, f"{path.name} can be used at one site only: {found}"
    stages = yaml.safe_load(text)["stages"].values()
    assert not any("slurm" in stage["resources"] for stage in stages if "resources" in stage)


def test_an_unknown_key_is_told_with_its_line(profile: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"lab\.yaml:5:1: acount: unknown key; did you mean 'account'"):
        site.load(str(profile({"acount": "x"})))


def test_errors_of_a_loaded_profile_say_where_the_key_stands(profile: Callable[..., Path]) -> None:
    path = profile({"account": "x", "partitions": {"gpu": "a"}})
    assert str(site.load(str(path)).error(("account",), "no")) == f"{path}:5:1: account: no"
    assert str(site.load(str(path), ["site.account=y"]).error(("account",), "no")) == "-o site.account=y: account: no"
    assert str(site.load(str(path)).error(("partitions", "cpu"), "no")).startswith(f"{path}:6:1: ")
    assert str(Site(name="made").error(("account",), "no")) == "the profile of made: account: no"


def test_a_key_given_with_o_keeps_its_place_only_for_itself(profile: Callable[..., Path]) -> None:
    path = profile({"account": "x", "qos": "q"})
    assert str(site.load(str(path), ["site.account=y"]).error(("qos",), "no")) == f"{path}:6:1: qos: no"


@pytest.mark.parametrize(("given", "seconds"), [("10m", 600), ("90s", 90), (0, 0), ("0s", 0), (20, 20)])
def test_how_long_a_silent_rank_is_waited_for(profile: Callable[..., Path], given: Any, seconds: int) -> None:
    assert site.load(str(profile({"lost": given}))).lost == seconds
    assert site.load(str(profile({"lost": given})), local=True).lost == seconds


@pytest.mark.parametrize(("given", "told"), [("5s", r"lost: 5 s: write 0 for never, or at least 20s"), (-1, "at least 20s"), ("soon", "not a number of seconds")])
def test_a_patience_that_would_end_healthy_jobs_is_refused(profile: Callable[..., Path], given: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        site.load(str(profile({"lost": given})))


def test_an_exclusion_needs_a_reason_and_a_day(profile: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"exclude\.0.*'reason' is missing"):
        site.load(str(profile({"exclude": [{"nodes": "n1", "until": "2030-01-01"}]})))


def test_words_of_a_cluster_are_refused_for_a_machine() -> None:
    with pytest.raises(InputError, match="account: these are words of a cluster"):
        site.load(str(REPOSITORY / "cluster" / "local.yaml"), ["site.account=x"])


def test_one_thing_brings_the_interpreter() -> None:
    with pytest.raises(ValueError, match="conda and venv each bring an interpreter"):
        Environment(conda="a", venv=Path("b"))


def test_a_cluster_finds_its_profile_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command, text in (("sbatch", ""), ("scontrol", 'echo "ClusterName             = here"')):
        (tmp_path / command).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / command).chmod(0o755)
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text("name: mine\nscheduler: slurm\ncluster: here\ncpus: 2\ngpus: 1\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("MEDGEN_SITE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert site.load(None).name == "mine"
    assert site.load(None, local=True).scheduler == "local"
    (tmp_path / "cluster" / "mine.yaml").unlink()
    assert site.load(None).name == "here", "a Slurm without a profile is one all the same"


def test_a_cluster_profile_used_here_keeps_its_environment_alone() -> None:
    here = site.load("idun", local=True)
    assert here.scheduler == "local" and here.environment.conda == "medgen" and here.account is None


def test_a_document_that_was_overridden_tells_the_right_option(medgen: Callable[..., subprocess.CompletedProcess[str]], write_spec: Callable[..., Path]) -> None:
    said = medgen("submit", write_spec(tiny_spec()), "--site", REPOSITORY / "cluster" / "idun.yaml", "-o", "site.cpus=none", "--dry-run", expect=2).stderr
    assert "-o site.cpus=none: cpus:" in said


def test_a_document_without_a_file_is_told_by_its_name() -> None:
    assert str(Document("somewhere", {}).error(("a", "b"), "no")) == "somewhere: a.b: no"
