#!/usr/bin/env python
"""Writes a trained model as .pt2 (torch.export), .onnx or .xml (OpenVINO), and compares it.

    python tools/export_model.py --config-file output/config.yaml --output model.onnx \\
        MODEL.WEIGHTS output/model_final.pth
"""

import argparse
import sys

from detr_d2.engine.launch import one_line
from detr_d2.engine.main import export
from detr_d2.errors import UserError

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--output",
        required=True,
        help="file to write: .onnx, .xml (OpenVINO) or .pt2 (torch.export)",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args()
    try:
        export(args.config_file, args.output, args.opts)
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
