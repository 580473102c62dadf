"""What the ranks of one task tell of themselves: who is silent, who keeps the others waiting, who is slow. Pure; called by judge.py and state.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medgen.activity import LEAVING, WITH_OTHERS
from medgen.rundir import Heartbeat, RankBeat
from medgen.watch.words import duration

STEP_SLACK_SECONDS = 10  # two beats: a step may end just after a rank was last heard of


def silent(ranks: Sequence[RankBeat], now: float, limit_seconds: float) -> list[RankBeat]:
    """Those not heard of for so long. Ranks step together: a step that another has made since proves that all live."""
    last_step = max((beat.last_advance for beat in ranks), default=0.0)
    return [beat for beat in ranks if now - beat.heard > limit_seconds and beat.doing not in LEAVING and last_step <= beat.heard + STEP_SLACK_SECONDS]


def silence_in_words(quiet: Sequence[RankBeat], ranks: Sequence[RankBeat], now: float) -> str:
    """`nothing was heard of rank 3 on n2 for 2m 10s; ...`"""
    first = min(quiet, key=lambda beat: beat.heard)
    others = "the others live" if len(quiet) < len(ranks) else "nor of any other rank"
    return f"nothing was heard of {_names(quiet)} for {duration(now - first.heard)}; last heard of at step {first.step}, {first.doing}; {others}"


def guilty_in_words(ranks: Sequence[RankBeat]) -> str | None:
    """Who stands where while the others wait; None where there is one rank."""
    if len(ranks) < 2:
        return None
    here = [beat for beat in ranks if beat.doing not in LEAVING]
    behind = [beat for beat in here if beat.doing not in WITH_OTHERS]
    if not behind or len(behind) == len(here):  # words do not tell them apart: their steps may
        last = min((beat.step for beat in here), default=0)
        behind = [beat for beat in here if beat.step == last]
    if not behind or len(behind) == len(here):
        return f"all {len(ranks)} ranks stand at the same place, {ranks[0].doing}"
    places = ", ".join(sorted({beat.doing for beat in behind}))
    return f"{_names(behind)} {'stands' if len(behind) == 1 else 'stand'} at {places}, and the others wait for it"


def unwell_in_words(beat: Heartbeat, ranks: Sequence[RankBeat]) -> str | None:
    """What is not well though it runs: slow ranks, skipped steps; None if nothing is."""
    skipped = f"{beat.skipped['steps']} of the last {beat.skipped['of']} steps were skipped; `medgen why` says more" if beat.skipped else None
    return "; ".join(part for part in (slow_in_words(beat, ranks), skipped) if part) or None


def slow_in_words(beat: Heartbeat, ranks: Sequence[RankBeat]) -> str | None:
    """`rank 3 on n2 is 2.4 times slower than the others`; None if none is."""
    hosts = {item.rank: item.name for item in ranks}
    told = [f"{hosts.get(rank, f'rank {rank}')} is {factor:g} times slower than the others" for rank, factor in beat.slow]
    return "; ".join(told) or None


def to_json(ranks: Sequence[RankBeat], beat: Heartbeat | None, now: float) -> list[dict[str, Any]]:
    factors = dict(beat.slow) if beat is not None else {}
    return [
        {
            "rank": item.rank, "host": item.host, "pid": item.pid, "step": item.step, "doing": item.doing, "silent_seconds": round(now - item.heard, 1),
            "still_seconds": round(now - item.last_advance, 1), "times_slower": factors.get(item.rank),
        }
        for item in ranks
    ]  # fmt: skip


def _names(ranks: Sequence[RankBeat]) -> str:
    return ", ".join(beat.name for beat in ranks[:4]) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
