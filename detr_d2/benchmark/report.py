"""A benchmark's report: printed tables, JSON, a picture."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch

from ..errors import UserError
from .timing import Section, Timing, ratios, table


def machine() -> str:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{name}, {capability}, {torch.get_num_threads()} threads, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def print_section(section: Section, ceilings: Mapping[str, float]) -> None:
    print(f"\n### {section.title}\n")
    if section.timings:
        # Convolutions are what a detector's time goes into.
        limits = {
            name.split()[0]: value for name, value in ceilings.items() if "convolution" in name
        }
        print(table(section.timings, ceilings=limits, **section.options), flush=True)
    for remark in section.remarks:
        print(f"- {remark}", flush=True)


def write_json(
    path: str | Path, sections: Sequence[Section], ceilings: Mapping[str, float]
) -> None:
    content = {
        "machine": machine(),
        "ceilings": dict(ceilings),
        "sections": [
            {
                "title": s.title,
                "seconds": {t.name: t.seconds for t in s.timings},
                "remarks": s.remarks,
            }
            for s in sections
        ],
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=1))


def draw(path: str | Path, sections: Sequence[Section]) -> None:
    """Bars of how many times faster than the first contestant each other is.

    Raises:
        UserError: no section has two of them.
    """
    shown = [s for s in sections if len(s.timings) > 1 and not s.title.startswith("Growth")]
    if not shown:
        raise UserError(
            f"There is no picture {path}, for nothing was timed against anything else: install "
            "what is to be compared with pip install -e '.[test,fast]', or leave --picture out."
        )
    heights = [len(s.timings) for s in shown]
    figure, axes = plt.subplots(
        len(shown),
        1,
        figsize=(8, 1 + 0.32 * sum(heights) + 0.5 * len(shown)),
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
    )
    for axis, section in zip(axes[:, 0], shown, strict=True):
        _draw_section(axis, section.title, section.timings)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_section(axis: plt.Axes, title: str, timings: Sequence[Timing]) -> None:
    names = [t.name for t in timings]
    values = [median(ratios(t, timings[0])) for t in timings]
    colours = ["tab:blue" if name.startswith("detr_d2") else "tab:gray" for name in names]
    bars = axis.barh(names, values, color=colours)
    axis.bar_label(bars, [f" {value:.2f}x" for value in values])
    axis.invert_yaxis()
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlim(0, 1.15 * max(values))
    axis.tick_params(labelsize=8)
