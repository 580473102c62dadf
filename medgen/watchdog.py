"""Every rank of a task keeps an eye on the next one's beats, and ends the task when that one is given up. Called by the beating thread of task.py.

Clocks of nodes differ: silence is how long a file has not changed, by the watcher's own clock, while the watcher itself made no step."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import NoReturn

from medgen.activity import LEAVING, WITH_OTHERS
from medgen.rundir import RankBeat, RunDir

SILENT_SECONDS = 90.0  # a shared file system may show a beat a minute late
LOOK_SECONDS = 5.0  # between two looks; a longer gap is the watcher's own sleep, and no sign of anything
EXIT_CODE = 71


@dataclass(frozen=True)
class Seat:
    """Which rank of which attempt this process is. `lost_seconds`: of silence after which a rank is given up; 0: never."""

    run: RunDir
    stage: str
    shard: int
    attempt: int
    rank: int
    world_size: int
    lost_seconds: float

    def read(self, rank: int) -> RankBeat | None:
        """The beat of a rank in this very attempt."""
        beat = self.run.read_rank_beat(self.stage, self.shard, rank)
        return beat if beat is not None and beat.attempt == self.attempt else None

    def describe(self, rank: int) -> str:
        """`rank 3 on n2`, as far as it has told."""
        beat = self.read(rank)
        return beat.name if beat is not None else f"rank {rank}"

    def behind(self) -> str:
        """The other ranks that have not come to where ranks wait for each other, as far as they have told."""
        beats = [beat for rank in range(self.world_size) if rank != self.rank and (beat := self.read(rank)) is not None]
        return "; ".join(f"{beat.name} has not come; {stood_at(beat)}" for beat in beats if beat.doing not in (*WITH_OTHERS, *LEAVING))

    def lost_cause(self) -> str | None:
        """Why a rank of this attempt has been given up, if one has."""
        mine = [event for event in self.run.events() if event["event"] == "rank_lost"]
        return next((event["cause"] for event in mine if (event["stage"], event["shard"], event["attempt"]) == (self.stage, self.shard, self.attempt)), None)

    def tell(self, event: str, beat: RankBeat, **facts: object) -> None:
        # `host` is where an event is written
        self.run.event(event, stage=self.stage, shard=self.shard, attempt=self.attempt, rank=beat.rank, node=beat.host, pid=beat.pid,
                       step=beat.step, doing=beat.doing, told_by=self.rank, **facts)  # fmt: skip


class Watchdog:
    """`look` every few seconds."""

    def __init__(self, seat: Seat):
        self.seat = seat
        self._watched = (seat.rank + 1) % seat.world_size
        self._beat: RankBeat | None = None
        self._own_step: int | None = None
        self._quiet_seconds = 0.0
        self._looked = time.monotonic()
        self._told = False

    def look(self, own_step: int, can_write: bool) -> None:
        """Does not return if the watched rank is given up. Ranks step together: who advances itself has proof that all live.

        `can_write`: the watcher's own beat has just been written; a file system that is away proves nothing."""
        moment = time.monotonic()
        passed, self._looked = min(moment - self._looked, 2 * LOOK_SECONDS), moment
        beat = self.seat.read(self._watched)
        if beat is None or not can_write:
            return
        if beat != self._beat or own_step != self._own_step or beat.doing in LEAVING:
            self._beat, self._own_step, self._quiet_seconds, self._told = beat, own_step, 0.0, False
            return
        self._quiet_seconds += passed
        limit_seconds = self.seat.lost_seconds
        try:
            if not self._told and self._quiet_seconds >= min(SILENT_SECONDS, limit_seconds or SILENT_SECONDS):
                self._told = True
                self.seat.tell("rank_silent", beat, seconds=round(self._quiet_seconds))
            if limit_seconds and self._quiet_seconds >= limit_seconds:
                give_up(self.seat, beat, f"{beat.name} has not been heard of for {_duration(self._quiet_seconds)}; {stood_at(beat)}")
        except OSError:
            return


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def stood_at(beat: RankBeat) -> str:
    return f"it was last heard of at step {beat.step}, {beat.doing}"


def give_up(seat: Seat, beat: RankBeat, cause: str) -> NoReturn:
    """Raises OSError, and does not end the process, if it cannot be written."""
    seat.tell("rank_lost", beat, cause=cause)
    end(seat, cause)


def end(seat: Seat, cause: str) -> NoReturn:
    """End this process hard, so that srun, torchrun or local_srun ends the others and the GPUs are free: the main thread may hang in a collective."""
    print(f"{seat.stage}: failed: {cause}", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)
