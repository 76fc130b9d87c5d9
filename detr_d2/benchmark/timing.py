"""Times that can be compared: contestants take turns, so the machine's moods hit all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

Work = Callable[[], Any]


class Timing(NamedTuple):
    """Seconds of one contestant, one number per round."""

    name: str
    seconds: list[float]
    note: str = ""

    @property
    def median(self) -> float:
        return median(self.seconds)


class Section(NamedTuple):
    """One table of the report."""

    title: str
    timings: list[Timing]
    options: dict[str, Any] = {}
    """further arguments of `table`"""
    remarks: tuple[str, ...] = ()


def take_turns(
    contestants: Mapping[str, Work],
    rounds: int,
    warmup: int = 1,
    notes: Mapping[str, str] = {},
    pause: float = 0.2,
) -> list[Timing]:
    """Runs A B C A B C …; the first `warmup` rounds do not count. Seconds of pause before each: the
    threads of the one before stay awake for a while, and in the way."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(warmup + rounds):
        for name, work in contestants.items():
            time.sleep(pause)
            start = time.perf_counter()
            work()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return [Timing(name, each, notes.get(name, "")) for name, each in seconds.items()]


def fastest(work: Work, rounds: int = 5) -> float:
    """Seconds of the best round; for ceilings, which nothing but noise can make look lower."""
    (timing,) = take_turns({"": work}, rounds, warmup=2, pause=0)
    return min(timing.seconds)


def ratios(timing: Timing, reference: Timing) -> list[float]:
    """How many times faster than the reference, round by round, smallest first."""
    pairs = zip(reference.seconds, timing.seconds, strict=True)
    return sorted(theirs / ours for theirs, ours in pairs)


def table(
    timings: Sequence[Timing],
    reference: Timing | None = None,
    work: float | None = None,
    ceilings: Mapping[str, float] | None = None,
    per: str = "",
    amount: float = 1.0,
) -> str:
    """Markdown.

    Args:
        reference: whose time is 1; the first by default.
        work: GFLOP of one run; together with `ceilings`, GFLOP/s by name, the share reached of the
            ceiling whose name the contestant's note begins with.
        per, amount: what one run makes and how much of it, for rates instead of times.
    """
    reference = reference or timings[0]
    rows = []
    for timing in timings:
        spread = ratios(timing, reference)
        shown = f"{1e3 * timing.median:.1f} ms" if timing.median < 1 else f"{timing.median:.2f} s"
        row = [timing.name, shown]
        if per:
            row.append(f"{amount / timing.median:.1f} {per}")
        row.append(f"{median(spread):.2f} ({spread[0]:.2f} to {spread[-1]:.2f})")
        if work and ceilings:
            ceiling = next((v for k, v in ceilings.items() if timing.note.startswith(k)), None)
            row.append(f"{work / timing.median / ceiling:.0%}" if ceiling else "")
        rows.append([*row, timing.note])
    headers = ["contestant", "median", *([per] if per else []), f"times {reference.name}"]
    headers += ["of ceiling"] if work and ceilings else []
    return tabulate(rows, headers=[*headers, "note"], tablefmt="github", disable_numparse=True)


def fitted_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log(seconds) over log(sizes): 1 where twice as much takes twice as long."""
    x, y = ([math.log(v) for v in values] for values in (sizes, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def measure_ceilings() -> dict[str, float]:
    """What this machine does at best: GFLOP/s of matrix products and 3x3 convolutions, GB/s of
    copies."""
    results = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(1536, 1536, dtype=dtype) for _ in range(2))
        results[f"{name} matrix product"] = 2 * 1536**3 / 1e9 / fastest(lambda a=a, b=b: a @ b)
        x = torch.randn(1, 256, 96, 128, dtype=dtype).contiguous(memory_format=torch.channels_last)
        convolution = torch.nn.Conv2d(256, 256, 3, padding=1, dtype=dtype)
        convolution = convolution.to(memory_format=torch.channels_last)
        work = 2 * 256 * 256 * 9 * 96 * 128 / 1e9
        with torch.no_grad():
            seconds = fastest(lambda c=convolution, x=x: c(x))
        results[f"{name} convolution"] = work / seconds
    source = torch.empty(2**26)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source))
    results["copy, GB/s read and written"] = 2 * 4 * 2**26 / 1e9 / seconds
    return results
