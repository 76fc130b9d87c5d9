"""What the README says can be typed, can be typed."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from detr_d2.data import parse_register_argument
from detr_d2.engine.launch import argument_parser
from detr_d2.engine.main import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shell_commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


TRAIN_NET = [c for c in shell_commands() if c[:2] == ["python", "tools/train_net.py"]]


def test_there_are_commands_to_check():
    assert len(TRAIN_NET) >= 3
    assert ["make", "demo"] in shell_commands() and ["make", "test"] in shell_commands()


@pytest.mark.parametrize("command", TRAIN_NET, ids=" ".join)
def test_configs_and_keys_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = argument_parser().parse_args(command[2:])
    if args.config_file.startswith("output/"):  # what a training before it leaves there
        earlier = shell_commands()[: shell_commands().index(command)]
        folder = str(Path(args.config_file).parent)
        assert any(("OUTPUT_DIR", folder) in pairwise(c) for c in earlier)
        weights = args.opts[args.opts.index("MODEL.WEIGHTS") + 1]
        assert str(Path(weights).parent) == folder
        return
    cfg = load_config(args.config_file, args.opts)
    for registration in args.register:
        name, _, _ = parse_register_argument(registration)
        assert name in [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_into_the_repository_exist(target):
    assert target.startswith("https://") or (ROOT / target).exists()


def test_commands_in_sentences_are_on_one_line():
    """What is copied from the file runs as it is."""
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert [line for line in text.splitlines() if line.count("`") % 2] == []


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_python_examples_compile():
    blocks = python_blocks()
    assert len(blocks) >= 2
    for block in blocks:
        compile(block, "README.md", "exec")
        for module, names in re.findall(r"^from (detr_d2\S*) import (.+)$", block, re.MULTILINE):
            imported = __import__(module, fromlist=["*"])
            for name in names.split(","):
                assert hasattr(imported, name.strip())
