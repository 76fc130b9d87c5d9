#!/usr/bin/env python
"""Writes a checkpoint of any known format as another.

python tools/convert_weights.py detr-r50-e632da11.pth detr_r50.safetensors --to own
"""

import argparse

from detectron2.utils.logger import setup_logger

from detr_d2.checkpoint import WRITABLE, convert_checkpoint
from detr_d2.engine.launch import user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", help="file, Hugging Face directory, or URL")
    parser.add_argument(
        "output", help="file; .safetensors, or torch's format with any other ending"
    )
    parser.add_argument("--to", required=True, choices=list(WRITABLE), help="format to write")
    parser.add_argument("--half", action="store_true", help="matrices as float16, for small files")
    arguments = parser.parse_args()
    setup_logger(name="detr_d2")
    with user_errors():
        convert_checkpoint(arguments.input, arguments.output, arguments.to, arguments.half)


if __name__ == "__main__":
    main()
