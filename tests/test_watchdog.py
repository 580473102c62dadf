"""Ranks that keep an eye on each other: silence, death and slowness of another rank are noticed, told and acted upon."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_NET, tiny_spec
from test_ranks import free_port
from torch.distributed import FileStore

from medgen import fault, lifeline, watchdog
from medgen.activity import Activity, Stragglers
from medgen.rundir import Heartbeat, RankBeat, RunDir
from medgen.watch.state import read_state, to_json
from medgen.watchdog import Seat, Watchdog

Medgen = Callable[..., subprocess.CompletedProcess[str]]
WriteSpec = Callable[[dict[str, Any]], Path]
TRAIN = {"kind": "train", "config": {**TINY_NET, "strategy": "ddpm", "mode": "bravo"}, "resources": {"cpus": 2, "processes": 2}}


class Clock:
    """The watcher's own clock, turned by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seconds = 1000.0
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.seconds)


class Ended(Exception):
    """Instead of the end of the test's own process."""


class Pair:
    """Rank 0's dog, and rank 1's beats."""

    def __init__(self, folder: Path, clock: Clock, lost_seconds: float = 600):
        self.run, self.clock = RunDir(folder / "run"), clock
        self.run.root.mkdir()
        self.dog = Watchdog(Seat(self.run, "train", 0, 2, rank=0, world_size=2, lost_seconds=lost_seconds))

    def beat(self, step: int = 7, doing: str = "reading data", attempt: int = 2) -> None:
        # a clock that is an hour wrong, on another node
        self.run.write_rank_beat("train", 0, RankBeat(1, attempt, step, 1.0, doing, time.time() - 3600 + self.clock.seconds, "n2", 4711))

    def look(self, seconds: float, own_step: int = 7, can_write: bool = True) -> list[str]:
        """Look every few seconds for so long; returns the events until now."""
        for _ in range(int(seconds / watchdog.LOOK_SECONDS)):
            self.clock.seconds += watchdog.LOOK_SECONDS
            self.dog.look(own_step, can_write)
        return [event["event"] for event in self.run.events()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(watchdog.os, "_exit", end)
    return Clock(monkeypatch)


def test_silence_is_told_once_and_then_ends_the_process(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    pair = Pair(tmp_path, clock)
    pair.beat()
    assert pair.look(80) == []
    assert pair.look(100) == ["rank_silent"]
    with pytest.raises(Ended, match="71"):
        pair.look(600)
    told, lost = pair.run.events()
    assert (told["rank"], told["node"], told["pid"], told["step"], told["doing"]) == (1, "n2", 4711, 7, "reading data")
    assert lost["cause"] == "rank 1 on n2 has not been heard of for 10 min; it was last heard of at step 7, reading data"
    assert lost["cause"] in capsys.readouterr().err


def test_a_rank_that_is_heard_of_again_is_forgiven(tmp_path: Path, clock: Clock) -> None:
    pair = Pair(tmp_path, clock)
    for _ in range(3):
        pair.beat()
        pair.look(500)
    assert [event["event"] for event in pair.run.events()] == ["rank_silent"] * 3


@pytest.mark.parametrize("why", ["own steps", "cannot write", "never", "ended", "unreadable", "missing", "another attempt"])
def test_what_is_no_proof_of_a_lost_rank_ends_nothing(tmp_path: Path, clock: Clock, why: str) -> None:
    pair = Pair(tmp_path, clock, lost_seconds=0 if why == "never" else 600)
    pair.beat(doing="ended" if why == "ended" else "reading data", attempt=1 if why == "another attempt" else 2)
    pair.look(5)
    path = pair.run.rank_beat_file("train", 0, 1)
    if why == "unreadable":
        path.write_text('{"rank": 1, ')
    if why == "missing":
        path.unlink()
    for number in range(400):
        events = pair.look(5, own_step=number // 10 if why == "own steps" else 7, can_write=why != "cannot write")
    assert events == (["rank_silent"] if why == "never" else [])


def test_a_watcher_that_was_asleep_itself_counts_none_of_it(tmp_path: Path, clock: Clock) -> None:
    pair = Pair(tmp_path, clock)
    pair.beat()
    pair.look(5)
    clock.seconds += 7200  # the whole job was suspended, and this rank wakes up first
    assert pair.look(60) == []


def test_a_watcher_that_cannot_tell_ends_nothing(tmp_path: Path, clock: Clock) -> None:
    pair = Pair(tmp_path, clock)
    pair.beat()
    pair.look(5)
    pair.run.events_file.mkdir()  # cannot be appended to, whoever tries
    for _ in range(200):
        clock.seconds += 5
        pair.dog.look(7, True)
    pair.run.events_file.rmdir()
    with pytest.raises(Ended):
        pair.look(10)


def test_rank_0_is_watched_by_its_heartbeat(tmp_path: Path, clock: Clock) -> None:
    run = RunDir(tmp_path)
    dog = Watchdog(Seat(run, "train", 0, 0, rank=2, world_size=3, lost_seconds=600))
    run.write_heartbeat(Heartbeat("train", 0, 0, 5, 10, "steps", None, time.time(), "n1", 1, time.time(), "saving"))
    with pytest.raises(Ended):
        for _ in range(200):
            clock.seconds += 5
            dog.look(5, True)
    assert run.events()[-1]["cause"].startswith("rank 0 on n1 has not been heard of for 10 min; it was last heard of at step 5, saving")


def test_after_a_collective_has_timed_out_who_has_not_come_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for rank, doing in ((1, "exchanging gradients"), (2, "reading data"), (3, "ended")):
        run.write_rank_beat("train", 0, RankBeat(rank, 0, 512, 1.0, doing, time.time(), f"n{rank}", 1))
    seat = Seat(run, "train", 0, 0, rank=0, world_size=5, lost_seconds=600)
    assert seat.behind() == "rank 2 on n2 has not come; it was last heard of at step 512, reading data"


# --- the line between the ranks --------------------------------------------------------------------------------------

MEMBER = """
import sys
from torch.distributed import FileStore
from medgen import lifeline
path, rank, world_size, port = sys.argv[1], *map(int, sys.argv[2:5])
with lifeline.held(rank, world_size, FileStore(path, world_size), ("127.0.0.1", port), lambda gone: print("gone", gone, flush=True)) as leave:
    print("held", flush=True)
    sys.stdin.readline()
    leave()
"""


class Lines:
    """Rank 0's end of the lines in this process, and the other ranks as real ones."""

    def __init__(self, folder: Path, world_size: int):
        self.gone: list[int] = []
        self.master = ("127.0.0.1", free_port())
        self.folder, self.world_size = folder, world_size
        self.members: dict[int, subprocess.Popen[str]] = {}

    def join(self, rank: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", MEMBER, str(self.folder / "store"), str(rank), str(self.world_size), str(self.master[1])]
        member = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.members[rank] = member
        return member

    def hear(self, rank: int) -> str:
        output = self.members[rank].stdout
        assert output is not None
        return output.readline().strip()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Lines]:
    made = Lines(tmp_path, 3)
    with socket.create_server(made.master):  # where the store would be
        store = FileStore(str(tmp_path / "store"), 3)
        with lifeline.held(0, 3, store, made.master, made.gone.append) as leave:
            for rank in (1, 2):
                made.join(rank)
            assert [made.hear(rank) for rank in (1, 2)] == ["held", "held"]
            yield made
            leave()
    for member in made.members.values():
        member.kill()
        member.wait()


def test_a_killed_rank_is_known_to_all_others(lines: Lines) -> None:
    time.sleep(0.5)
    lines.members[2].send_signal(signal.SIGKILL)
    assert lines.hear(1) == "gone 2"
    lines.wait_until(lambda: lines.gone == [2])


def test_who_leaves_in_peace_is_not_missed(lines: Lines) -> None:
    for rank in (1, 2):
        lines.members[rank].communicate("\n", timeout=30)
    time.sleep(1)
    assert lines.gone == []


def test_a_stranger_at_the_port_is_nobody(lines: Lines) -> None:
    _, port, _ = FileStore(str(lines.folder / "store"), 3).get(lifeline.KEY).decode().split()
    for words in (b"", b"hello\n", b"0 2\n", b"bye\n", b"\xff\xfe\n"):
        with socket.create_connection(("127.0.0.1", int(port))) as stranger:
            stranger.sendall(words)
    time.sleep(1)
    assert lines.gone == []
    lines.members[1].send_signal(signal.SIGKILL)
    lines.wait_until(lambda: lines.gone == [1])


def test_the_end_of_rank_0_is_known_too(tmp_path: Path) -> None:
    lines = Lines(tmp_path, 2)
    with socket.create_server(lines.master):
        lines.join(0)
        lines.join(1)
        assert [lines.hear(rank) for rank in (0, 1)] == ["held", "held"]
        time.sleep(0.5)
        lines.members[0].send_signal(signal.SIGKILL)
        assert lines.hear(1) == "gone 0"
    for member in lines.members.values():
        member.kill()
        member.communicate()


# --- slow ranks ------------------------------------------------------------------------------------------------------


def test_own_work_is_what_is_not_done_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(range(0, 1000, 10))
    monkeypatch.setattr("medgen.activity.time.monotonic", lambda: float(next(moments)))
    activity = Activity()
    for doing in ("reading data", "computing a step", "exchanging gradients", "computing a step", "waiting for the others", "validating", "saving"):
        activity.now(doing)  # type: ignore[arg-type]
    assert activity.take_own_seconds() == 30
    assert activity.take_own_seconds() == 0


def test_a_slow_rank_is_told_after_three_windows_and_until_it_recovers() -> None:
    stragglers = Stragglers()
    calm, slow = [0.10, 0.11, 0.09, 0.10], [0.10, 0.11, 0.09, 0.24]
    told = [stragglers.window(own, 0.3) for own in (calm, slow, slow, calm, slow, slow, slow, slow, calm)]
    assert told == [([], [])] * 6 + [([(3, 2.4)], [(3, 2.4)]), ([(3, 2.4)], []), ([], [])]


def test_of_two_ranks_too_one_is_the_slow_one() -> None:
    stragglers = Stragglers()
    assert [stragglers.window([0.5, 0.1], 0.6)[0] for _ in range(3)] == [[], [], [(0, 5.0)]]


def test_what_costs_nothing_is_not_told() -> None:
    stragglers = Stragglers()
    assert [stragglers.window([0.001, 0.005], 0.3)[0] for _ in range(5)] == [[]] * 5
    assert [stragglers.window([0.01, 0.04], 0.05)[0] for _ in range(5)] == [[]] * 5, "tens of milliseconds on a machine that is shared"


# --- a real training of two ranks ------------------------------------------------------------------------------------


def run_of(folder: Path) -> RunDir:
    [path] = (folder / "runs").glob("*-*")
    return RunDir(path)


def events_of(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == kind]


@pytest.mark.slow
def test_a_stopped_rank_is_given_up_and_the_training_goes_on_from_what_was_saved(
    tmp_path: Path, medgen: Medgen, environment: dict[str, str], write_spec: WriteSpec
) -> None:
    environment |= {fault.VARIABLE: "site=step,rank=1,step=2,attempt=0,action=stop", fault.LOG_VARIABLE: str(tmp_path / "fired")}
    medgen("submit", write_spec({**tiny_spec(name="stopped"), "stages": {"train": TRAIN}}), "--local", "-o", "site.lost=20s")
    run = run_of(tmp_path)
    assert "step stop" in (tmp_path / "fired").read_text()
    [silent], [lost] = events_of(run, "rank_silent"), events_of(run, "rank_lost")
    assert (silent["rank"], silent["told_by"], lost["attempt"]) == (1, 0, 0)
    first, last = events_of(run, "task_ended")
    assert (first["status"], first["next"], last["status"]) == ("failed", "will be tried again", "done")
    assert first["cause"] == lost["cause"] and "rank 1 on " in first["cause"] and "has not been heard of for 2" in first["cause"]
    with pytest.raises(ProcessLookupError):
        os.kill(silent["pid"], 0)


def test_every_rank_tells_what_it_does_and_a_slow_one_is_found(tmp_path: Path, medgen: Medgen, environment: dict[str, str], write_spec: WriteSpec) -> None:
    sleeps = [f"site=step,rank=1,step={step},action=sleep:0.7" for step in range(3, 12)]
    environment |= {fault.VARIABLE: ";".join(sleeps), fault.LOG_VARIABLE: str(tmp_path / "fired")}
    config = {**TRAIN["config"], "epochs": 10}  # type: ignore[dict-item]
    spec = write_spec({**tiny_spec(name="slow"), "stages": {"train": {**TRAIN, "config": config}}})
    seen: list[dict[str, Any]] = []
    over = threading.Event()

    def follow() -> None:
        while not over.wait(0.3):
            for path in (tmp_path / "runs").glob("*-*/plan.json"):
                seen.extend(to_json(read_state(RunDir(path.parent)))["stages"][0]["tasks"][0]["ranks"])

    watcher = threading.Thread(target=follow)
    watcher.start()
    try:
        medgen("submit", spec, "--local")
    finally:
        over.set()
        watcher.join()
    run = run_of(tmp_path)
    slow, *_ = [event for event in events_of(run, "slow_rank") if event["rank"] == 1]
    assert slow["factor"] > 2
    lines = [json.loads(line) for line in run.training_log("train").read_text().splitlines()]
    spread = {line["step"]: line["slowest_rank"] for line in lines if "slowest_rank" in line}
    assert len(fired := (tmp_path / "fired").read_text().splitlines()) == len(sleeps), fired
    assert max(spread[step] for step in range(3, 12)) > 1.3, "two ranks: the median is half of both"
    assert {item["rank"] for item in seen} == {0, 1}
    beat = run.read_rank_beat("train", 0, 1)
    assert beat is not None and beat.doing == "ended"
    first = run.read_heartbeat("train", 0)
    assert first is not None and 1 not in [rank for rank, _ in first.slow], "it has recovered"
