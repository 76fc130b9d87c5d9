"""What the command-line tools share: arguments, processes, and errors a user can read."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..errors import UserError


def argument_parser(description: str | None = None) -> argparse.ArgumentParser:
    """detectron2's arguments, and `--register`."""
    parser = default_argument_parser(description)
    parser.description = description
    parser.epilog = "Without a GPU, --num-gpus is the number of CPU processes."
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
    alone = args.num_gpus * args.num_machines <= 1  # and without a group
    try:
        check_num_gpus(args.num_gpus)
        launch(
            main if alone else run_in_group,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,) if alone else (main, args),
        )
    except KeyboardInterrupt:
        print(
            "Interrupted. --resume goes on from the last checkpoint, if one was saved.",
            file=sys.stderr,
        )
        sys.exit(130)
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
    except ProcessRaisedException as error:
        # One of several processes, which could only hand over its traceback as text.
        text = str(error).strip()
        message = message_for_users(text)
        if not message:
            print(text, file=sys.stderr)
        sys.exit(f"error: {message or text.splitlines()[-1]}")
    except ProcessExitedException as error:
        sys.exit(f"error: {error} (SIGKILL: most often for lack of memory).")


def check_num_gpus(num_gpus: int) -> None:
    """
    Raises:
        UserError: there are GPUs, but not so many; detectron2 would end in a bare assertion.
    """
    present = torch.cuda.device_count()
    if 0 < present < num_gpus and torch.cuda.is_available():
        raise UserError(
            f"--num-gpus is {num_gpus}, but this machine shows {present} GPU(s): lower it, or make "
            "more of them visible (CUDA_VISIBLE_DEVICES)."
        )


def run_in_group(main: Callable[..., Any], *args: Any) -> None:
    """Runs `main(*args)` in one of several processes, then destroys the process group: its threads,
    if left alive, sometimes abort Python at exit. Not after an error, since that could wait for
    processes still at work.

    The processes share the cores; by default each would use all of them.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(torch.get_num_threads() // comm.get_local_size(), 1))
    main(*args)
    distributed.destroy_process_group()


def message_for_users(traceback: str) -> str:
    """The message of the `UserError` that ends a traceback, on one line; "" where none does.

    Data loaders' workers and training processes hand over a traceback in place of an exception.
    Only classes of this package's own are looked for: those that get out are `UserError`s.
    """
    if "Traceback (most recent call last):" not in traceback:
        return ""
    # Up to the next line that could begin another exception of a chain.
    last = re.split(r"^([\w.]+)(?:: |$)", traceback, flags=re.MULTILINE)[-2:]
    is_own = last[0].startswith(f"{__package__.split('.')[0]}.")
    return " ".join(last[1].split()) if is_own else ""


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program with the one line of a `UserError`, without a traceback."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")


def one_line(error: UserError | str) -> str:
    return message_for_users(str(error)) or " ".join(str(error).split())
