"""Numbers in words, for the screens and the messages of watch."""

from __future__ import annotations

import time


def percent(fraction: float) -> str:
    """Rounded down: 100% only when it is complete."""
    return f"{int(fraction * 100 + 1e-9)}%"


def duration(seconds: float) -> str:
    """`42s`, `3m 05s`, `2h 10m`, `3d 4h`: two units at most."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def clock(moment: float, now: float) -> str:
    """`14:03`, `tomorrow 14:03`, `Tue 14:03`, `24 Nov`: a moment to come, in local time."""
    there, here = time.localtime(moment), time.localtime(now)
    if there[:3] == here[:3]:
        return time.strftime("%H:%M", there)
    if there[:3] == time.localtime(now + 86400)[:3]:
        return time.strftime("tomorrow %H:%M", there)
    if moment - now < 6 * 86400:
        return time.strftime("%a %H:%M", there)
    return time.strftime("%d %b", there).lstrip("0")
