"""The punisher must be able to fail: a sound run passes all of its checks, and each kind of harm makes it speak."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from medgen.launch.script import folder_tag

from . import punisher
from .arena import Arena, Graph, Log, Observer
from .punisher import Bag, Game, Tally, environment_of, summary

SPEC = {"version": 1, "name": "small", "stages": {"a": {"kind": "command", "foreach": ["x", "y"], "run": "echo $MEDGEN_ITEM > $MEDGEN_OUT/item"}}}
EMPTY = "nothing is there"  # the digest of a dataset that this graph does not have


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Graph]:
    """A finished run of two tasks, and a squeue that says what the test writes into a file."""
    monkeypatch.setattr(punisher, "GONE_SECONDS", 3)
    shims = tmp_path / "bin"
    shims.mkdir()
    (tmp_path / "queue").touch()
    (shims / "squeue").write_text(f"#!/bin/bash\ncat {tmp_path}/queue\n")
    (shims / "squeue").chmod(0o755)
    spec = tmp_path / "small.yaml"
    spec.write_text(yaml.safe_dump(SPEC))
    environment = {**environment_of("/nowhere"), "PATH": f"{shims}:{os.environ['PATH']}"}
    arena = Arena(tmp_path, None, environment, Log(tmp_path / "log.jsonl"), random.Random(1))
    made = Graph(arena, 1, spec, "unknown", [])
    try:
        code, said = made.medgen("submit", spec, "--local", "--json")
        assert code == 0, said
        made.run = type(made.run)(made.runs / json.loads(said.splitlines()[-1])["run_id"])
        yield made
    finally:
        made.leave(keep=False)


def findings(graph: Graph, expected: str = EMPTY) -> list[str]:
    game = Game(graph.arena, graph, Tally(), Bag(graph.arena), expected, 40, 0)
    game.observer.start()
    try:
        game._check_the_end()
    finally:
        game.observer.ended.set()
        game.observer.join()
    return [finding["finding"] for finding in graph.arena.findings]


def rows(graph: Graph, *rows: tuple[int, str, str, str]) -> None:
    name = f"medgen.{graph.run.run_id}.a.1.0.{folder_tag(graph.run)}"
    lines = [f"{job}|{index}|{state}|{reason}|{name}" for job, index, state, reason in rows]
    (graph.arena.folder / "queue").write_text("\n".join([*lines, "7|N/A|RUNNING|None|medgen.other-0123456789.a.1.0.abcdef", "8|N/A|RUNNING|None|not.ours"]) + "\n")


def test_a_sound_run_holds_and_a_harmed_one_does_not(graph: Graph) -> None:
    assert findings(graph) == []
    result = graph.run.task_result("a", 1)
    result.write_text(result.read_text() + " ")
    (graph.run.root / "outcome" / ".a.0.json.0123abcd.tmp").touch()
    assert findings(graph, "another digest") == [
        "done, and the files do not verify", "all is done, and watch does not say so", "fsck finds damage", "temporary files are left",
        "the dataset is another than that of the undisturbed run",
    ]  # fmt: skip
    facts = summary(graph.arena, Tally(graphs=1, finished=1, equal=1), 1, 1.0)
    assert not facts["held"]
    graph.arena.findings.clear()
    rows(graph, (3, "1", "PENDING", "Priority"))
    assert "all is done, and jobs are left" in findings(graph)


def test_two_jobs_for_one_task_are_seen(graph: Graph) -> None:
    observer = Observer(graph.arena, graph)
    rows(graph, (3, "0", "RUNNING", "None"), (3, "1", "PENDING", "Resources"), (2, "1", "COMPLETING", "None"))
    observer.look()
    assert not graph.arena.findings, "the one that is ending has been replaced"
    rows(graph, (3, "0", "RUNNING", "None"), (3, "1", "PENDING", "Resources"), (4, "1", "PENDING", "Priority"))
    observer.look()
    observer.look()
    [found] = graph.arena.findings
    assert found["task"] == ("a", 1, 0) and len(found["jobs"]) == 2


@pytest.mark.parametrize(
    ("row", "is_still"),
    [
        ((3, "1", "PENDING", "JobHeldUser"), True), ((3, "1", "PENDING", "Dependency"), True), ((3, "1", "PENDING", "BeginTime"), False),
        ((3, "1", "RUNNING", "None"), False), (None, True),
    ],
)  # fmt: skip
def test_what_stands_still(graph: Graph, row: Any, is_still: bool) -> None:
    observer = Observer(graph.arena, graph)
    rows(graph, *([] if row is None else [row]))
    observer.look()
    assert (observer.still_seconds > 0) == is_still
    (graph.arena.folder / "bin" / "squeue").write_text("#!/bin/bash\nexit 1\n")
    observer.look()
    assert observer.still_seconds == 0, "a Slurm that does not answer says nothing of the run"
