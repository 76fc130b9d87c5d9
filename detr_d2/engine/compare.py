"""Trains several configs under one budget of time, and tells which had which AP when.

Every training is a run of `tools/train_net.py` with the schedule below: a warm-up, then a cosine
that ends with the budget. How many iterations that makes is measured first, design by design.
Minutes are those of one core at work (CPU time): what else runs on the machine does not count.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from ..errors import UserError

WARMUP = 100
# Trainings of two lengths: their difference is free of what starting costs.
SHORT_PROBE, LONG_PROBE = 40, 100


class Result(NamedTuple):
    """What a training came to."""

    name: str
    parameters: float
    """in millions"""
    iterations: int
    minutes: list[float]
    """of training, without evaluation, at each evaluation"""
    ap: list[float]
    ap50: list[float]


def compare(
    train_net: str, configs: Sequence[str], output: Path, minutes: float, evaluations: int = 4
) -> list[Result]:
    """Trains each config for as many minutes; what `output` holds already is not made again.

    Args:
        train_net: path of the training script.
        configs: yaml files.
        output: folder of the trainings and of `results.json`.
        minutes: of training each, evaluation aside.
        evaluations: at equal distances, the last one at the end.

    Raises:
        UserError: a training failed, or configs have one name, and so one folder.
    """
    names = [Path(config).stem for config in configs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"Two configs are called {twice[0]!r}: give them files of other names.")
    output.mkdir(parents=True, exist_ok=True)
    results = []
    for config, name in zip(configs, names, strict=True):
        folder = output / name
        file = folder / "result.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        if known.get("budget") != minutes:
            seconds = seconds_per_iteration(train_net, config, folder / "probe")
            iterations = max(round(60 * minutes / seconds), 1)
            train(train_net, config, folder, iterations, math.ceil(iterations / evaluations))
            known = {"budget": minutes, **summarise(folder, iterations, seconds)._asdict()}
            file.write_text(json.dumps(known))
        del known["budget"]
        results.append(Result(**known))
    (output / "results.json").write_text(json.dumps([r._asdict() for r in results], indent=1))
    return results


def train(train_net: str, config: str, folder: Path, iterations: int, period: int) -> float:
    """One training on one core; `period`: iterations between evaluations, 0 for none.

    Returns:
        seconds of CPU time.
    """
    schedule: dict[str, Any] = {
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
        "SOLVER.STEPS": "()",
        "SOLVER.WARMUP_ITERS": min(WARMUP, iterations // 2),
        "SOLVER.CHECKPOINT_PERIOD": 10**9,
        "TEST.EVAL_PERIOD": period,
        "DATALOADER.NUM_WORKERS": 0,
    }
    if not period:
        schedule["DATASETS.TEST"] = "()"
    command = [sys.executable, train_net, "--config-file", config, "OUTPUT_DIR", str(folder)]
    for key, value in schedule.items():
        command += [key, str(value)]
    folder.mkdir(parents=True, exist_ok=True)
    # A training adds to this file; after an interruption there are another training's lines in it.
    (folder / "metrics.json").unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = os.times()
    with open(folder / "console.txt", "w") as console:
        status = subprocess.run(
            command, stdout=console, stderr=subprocess.STDOUT, env=environment
        ).returncode
    after = os.times()
    if status:
        last = (folder / "console.txt").read_text().strip().splitlines()[-1:]
        raise UserError(f"The training of {config} ended with status {status}: {''.join(last)}")
    used = after.children_user + after.children_system
    return used - before.children_user - before.children_system


def seconds_per_iteration(train_net: str, config: str, folder: Path) -> float:
    """Of CPU time.

    Raises:
        UserError: this system does not tell it.
    """
    short = train(train_net, config, folder / "short", SHORT_PROBE, 0)
    long = train(train_net, config, folder / "long", LONG_PROBE, 0)
    if long <= short:
        raise UserError(
            f"{LONG_PROBE} iterations of {config} took no more CPU time than {SHORT_PROBE} "
            f"({long:.1f} and {short:.1f} s): this system does not tell it of child processes."
        )
    return (long - short) / (LONG_PROBE - SHORT_PROBE)


def summarise(folder: Path, iterations: int, seconds: float) -> Result:
    """`seconds`: of an iteration. The evaluation after the last one counts as one later."""
    metrics = read_metrics(folder)
    evaluated = [m for m in metrics if "bbox/AP" in m]
    log = (folder / "console.txt").read_text()
    parameters = float(log.partition("Built Detr with ")[2].split()[0])
    return Result(
        name=folder.name,
        parameters=parameters,
        iterations=iterations,
        minutes=[min(m["iteration"] + 1, iterations) * seconds / 60 for m in evaluated],
        ap=[m["bbox/AP"] for m in evaluated],
        ap50=[m["bbox/AP50"] for m in evaluated],
    )


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def table(results: Sequence[Result]) -> str:
    """Markdown, the best last."""
    rows = [
        (
            r.name,
            r.parameters,
            r.iterations,
            f"{r.minutes[-1]:.1f}",
            f"{r.ap[-1]:.1f}",
            f"{r.ap50[-1]:.1f}",
        )
        for r in sorted(results, key=lambda r: r.ap[-1])
    ]
    headers = ("design", "params (M)", "iterations", "minutes", "AP", "AP50")
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
