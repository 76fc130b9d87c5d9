#!/usr/bin/env python
"""Measures speed and memory against transformers, other runtimes and the machine's own ceiling.

python tools/benchmark.py inference train criterion data evaluation memory growth
python tools/benchmark.py --quick --json output/benchmark.json --picture output/benchmark.png
"""

import argparse

from detr_d2.benchmark.jobs import JOBS, WITHOUT_PICTURE
from detr_d2.benchmark.report import draw, machine, print_section, write_json
from detr_d2.benchmark.timing import measure_ceilings
from detr_d2.engine.launch import user_errors

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "jobs", nargs="*", metavar="JOB", help=f"what to measure: {', '.join(JOBS)}; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, sizes and contestants")
    parser.add_argument(
        "--rounds", type=int, help="rounds of contestants taking turns; default 5, with --quick 2"
    )
    parser.add_argument("--json", metavar="FILE", help="where to write all seconds")
    parser.add_argument("--picture", metavar="FILE", help="where to write the plot")
    args = parser.parse_args()
    if unknown := [job for job in args.jobs if job not in JOBS]:
        parser.error(f"there is no job {unknown[0]!r}; choose from {', '.join(JOBS)}")
    if args.picture and args.jobs and set(args.jobs) <= set(WITHOUT_PICTURE):
        parser.error(f"{', '.join(args.jobs)}: no picture shows it, leave --picture out")
    rounds = args.rounds or (2 if args.quick else 5)

    print(machine(), flush=True)
    ceilings = measure_ceilings()
    for name, value in ceilings.items():
        print(f"- {name}: {value:.0f}" + ("" if "GB" in name else " GFLOP/s"), flush=True)
    sections = []
    with user_errors():
        for job in args.jobs or JOBS:
            for section in JOBS[job](rounds, args.quick):
                print_section(section, ceilings)
                sections.append(section)
        if args.json:
            write_json(args.json, sections, ceilings)
        if args.picture:
            draw(args.picture, sections)
