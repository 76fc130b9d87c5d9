#!/usr/bin/env python
"""Writes a trained model as .pt2 (torch.export), .onnx or .xml (OpenVINO), and compares it.

    python tools/export_model.py --config-file output/config.yaml --output model.onnx \\
        MODEL.WEIGHTS output/model_final.pth
"""

import argparse

from detr_d2.engine.launch import user_errors
from detr_d2.engine.main import export

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
    with user_errors():
        export(args.config_file, args.output, args.opts)
