"""What the command-line tools share: arguments, processes, and errors a user can read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from detectron2.engine import default_argument_parser, launch
from torch.multiprocessing import ProcessRaisedException

from ..errors import UserError


def argument_parser(description: str | None = None) -> argparse.ArgumentParser:
    """detectron2's arguments, and `--register`. Without GPUs, `--num-gpus` counts CPU processes."""
    parser = default_argument_parser(description)
    parser.description, parser.epilog = description, None
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="NAME=ANNOTATIONS.json:IMAGE_DIR",
        help="register a data set in COCO format under NAME; repeatable",
    )
    return parser


def run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Starts `main(args)` in as many processes as asked for.

    A `UserError` becomes one line on standard error and exit status 1, without a traceback.
    """
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except UserError as error:
        # A data loader's worker wraps the message in its own traceback.
        sys.exit(f"error: {str(error).rpartition('Error: ')[2].strip()}")
    except ProcessRaisedException as error:
        # One of several processes: the text is its traceback, whose last line is the message.
        print(error, file=sys.stderr)
        sys.exit(f"error: {str(error).strip().rpartition(chr(10))[2]}")
