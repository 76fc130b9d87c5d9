"""Setting up from nothing: what can be tested without a network and without filling a disk."""

import ast
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
# Modules whose names differ from those of the packages that bring them.
PACKAGE_OF = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


@pytest.fixture
def setup_env(monkeypatch):
    """tools/setup_env.py as a module whose commands are recorded instead of run."""
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.commands, module.really_run = [], module.run
    monkeypatch.setattr(module, "ensure_pip", lambda python: None)
    monkeypatch.setattr(
        module, "run", lambda command, cwd=None: module.commands.append([str(x) for x in command])
    )
    return module


@pytest.fixture
def declared(monkeypatch):
    """The arguments that setup.py hands to setuptools."""
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: arguments.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def make_environment(folder: Path) -> Path:
    """An empty folder with an interpreter in the place where an environment has it."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    return python


def mark_ready(setup_env, venv: Path, **changes) -> None:
    state = {"fingerprint": setup_env.fingerprint(), "python": sys.version_info[:2], "files": []}
    (venv / setup_env.READY).write_text(json.dumps({**state, **changes}))


# --- which Python ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(2, 7), (3, 9), (3, 14)])
def test_unsupported_python_is_refused(setup_env, version):
    with pytest.raises(SystemExit, match=rf"Python {version[0]}\.{version[1]} .*PYTHON=python3"):
        setup_env.require_supported_python(version, 64, "/usr/bin/python")


def test_32_bit_python_is_refused(setup_env):
    with pytest.raises(SystemExit, match="32 bit"):
        setup_env.require_supported_python((3, 11), 32, "/usr/bin/python")


def test_setup_and_packaging_name_the_same_oldest_python(setup_env, declared):
    for version in ((3, 10), (3, 11), (3, 12), (3, 13)):
        assert setup_env.require_supported_python(version, 64, "python") is None
    assert declared["python_requires"] == ">={}.{}".format(*setup_env.OLDEST)


def test_old_pythons_can_read_the_script():
    """Python 3.6 to 3.9 must get as far as the message that refuses them."""
    tree = ast.parse((ROOT / "tools" / "setup_env.py").read_text(), feature_version=(3, 7))
    imported = {name for name, _ in imported_modules(tree)}
    assert imported <= sys.stdlib_module_names
    assert "__future__" not in imported  # annotations came with 3.7


def test_python_asked_for_by_name_must_be_that_of_the_environment(setup_env, tmp_path):
    make_environment(tmp_path)
    mark_ready(setup_env, tmp_path, python=[3, 1])
    assert setup_env.is_ready(tmp_path, match_python=False)
    with pytest.raises(SystemExit, match=r"holds Python 3\.1\."):
        setup_env.is_ready(tmp_path, match_python=True)


def test_folder_of_somebody_else_is_not_filled(setup_env, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="not a Python environment"):
        setup_env.create(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    assert setup_env.commands == []


# --- the marker -----------------------------------------------------------------------------------


def test_ready_environment_runs_no_command(setup_env, tmp_path):
    make_environment(tmp_path)
    mark_ready(setup_env, tmp_path)
    setup_env.main(["--venv", str(tmp_path)])
    assert setup_env.commands == []


@pytest.mark.parametrize("loss", ["marker", "half a marker", "python", "torch", "other checkout"])
def test_environment_with_something_missing_is_not_ready(setup_env, tmp_path, monkeypatch, loss):
    python = make_environment(tmp_path)
    torch = tmp_path / "torch.py"
    torch.touch()
    mark_ready(setup_env, tmp_path, files=[str(torch)])
    assert setup_env.is_ready(tmp_path, match_python=False)
    if loss == "marker":
        (tmp_path / setup_env.READY).unlink()
    elif loss == "half a marker":
        (tmp_path / setup_env.READY).write_text('{"fingerprint": "')
    elif loss == "other checkout":
        shutil.copy(ROOT / "setup.py", tmp_path)
        monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    else:
        {"python": python, "torch": torch}[loss].unlink()
    assert not setup_env.is_ready(tmp_path, match_python=False)


@pytest.mark.parametrize("file", ["setup.py", "detectron2.txt", "detectron2-wheel.txt"])
def test_changed_requirements_are_installed(setup_env, tmp_path, monkeypatch, file):
    before = setup_env.fingerprint()
    names = {"detectron2.txt": "NEEDS", "detectron2-wheel.txt": "WHEEL"}
    if file in names:
        changed = tmp_path / file
        changed.write_text((ROOT / "requirements" / file).read_text() + "one-more\n")
        monkeypatch.setattr(setup_env, names[file], changed)
    else:
        read = Path.read_bytes
        monkeypatch.setattr(
            Path, "read_bytes", lambda self: read(self) + b"#" * (self.name == "setup.py")
        )
    assert setup_env.fingerprint() != before


# --- what is there stays --------------------------------------------------------------------------


def test_torch_that_is_there_is_left_alone(setup_env):
    versions = {"torch": "2.5.1+cpu", "torchvision": "0.20.1"}
    setup_env.install_torch(Path("python"), versions, "torch==2.9")
    setup_env.install_torchvision(Path("python"), versions)
    assert setup_env.commands == []


def test_torchvision_follows_the_torch_that_is_there(setup_env):
    setup_env.install_torchvision(Path("python"), {"torch": "2.5.1+cpu"})
    assert "torch==2.5.1+cpu" in setup_env.commands[0]


def test_no_later_installation_exchanges_torch(setup_env, tmp_path, monkeypatch):
    make_environment(tmp_path)
    found = {
        "python": sys.version_info[:2], "bits": 64, "packages": str(tmp_path), "files": [],
        "detectron2": "/somewhere/detectron2/__init__.py",
        "versions": {"torch": "2.5.1+cpu", "torchvision": "0.20.1"},
    }  # fmt: skip
    monkeypatch.setattr(setup_env, "inspect", lambda python: found)
    setup_env.main(["--venv", str(tmp_path)])
    with_dependencies = [
        command for command in setup_env.commands if "-e" in command and "--no-deps" not in command
    ]
    assert len(with_dependencies) == 1
    assert {"torch==2.5.1+cpu", "torchvision==0.20.1"} <= set(with_dependencies[0])
    assert not any("detectron2-wheel.txt" in word for c in setup_env.commands for word in c)
    assert setup_env.is_ready(tmp_path, match_python=True)
    assert not (tmp_path / setup_env.UNFINISHED).exists()


def test_set_up_that_fails_is_not_ready(setup_env, tmp_path, monkeypatch):
    make_environment(tmp_path)
    failing = [sys.executable, "-c", "raise SystemExit(7)"]
    monkeypatch.setattr(setup_env, "pip", lambda python, *words: setup_env.really_run(failing))
    with pytest.raises(SystemExit, match="exit code 7.*SystemExit(.|\n)*goes on from here"):
        setup_env.main(["--venv", str(tmp_path)])
    assert (tmp_path / setup_env.UNFINISHED).exists()
    assert not setup_env.is_ready(tmp_path, match_python=False)


def test_torch_that_is_too_old_is_named_and_not_replaced(setup_env):
    with pytest.raises(SystemExit, match=r"torch 2\.3\.1 .* torch>=2\.4"):
        setup_env.install_torch(Path("python"), {"torch": "2.3.1", "torchvision": "0.18"}, "")
    assert setup_env.commands == []
    setup_env.install_torch(Path("python"), {"torch": "2.14.1", "torchvision": "0.29"}, "")


def test_torch_can_be_named(setup_env):
    setup_env.install_torch(Path("python"), {}, "torch==2.9.1 --index-url https://example.org/cpu")
    assert setup_env.commands[0][-3:] == ["torch==2.9.1", "--index-url", "https://example.org/cpu"]


@pytest.mark.parametrize("present", ["/somewhere/detectron2/__init__.py", None])
def test_detectron2_is_taken_from_where_it_is_named(setup_env, tmp_path, present):
    source = "git+https://example.org/detectron2.git"
    found = {"detectron2": present, "packages": str(tmp_path)}
    setup_env.install_detectron2(Path("python"), tmp_path, found, source, [])
    if present:
        assert setup_env.commands == []
    else:
        assert setup_env.commands[0][-2:] == ["--no-build-isolation", source]


def test_wheel_of_detectron2_is_pinned_and_loses_its_compiled_file(
    setup_env, tmp_path, monkeypatch
):
    stage, packages = tmp_path / "stage", tmp_path / "packages"
    packages.mkdir()

    def unpack(command, cwd=None):
        setup_env.commands.append([str(word) for word in command])
        for file in (
            "detectron2/__init__.py", "detectron2/_C.cpython-310-x86_64-linux-gnu.so",
            "tools/__init__.py", "sal_detectron2-0.7.2.dist-info/METADATA",
        ):  # fmt: skip
            (stage / file).parent.mkdir(parents=True, exist_ok=True)
            (stage / file).touch()

    monkeypatch.setattr(setup_env, "run", unpack)
    setup_env.install_wheel(Path("python"), stage, packages)
    files = sorted(
        str(file.relative_to(packages)) for file in packages.rglob("*") if file.is_file()
    )
    assert files == ["detectron2/__init__.py", "sal_detectron2-0.7.2.dist-info/METADATA"]
    assert not stage.exists()
    assert "--require-hashes" in setup_env.commands[0]
    assert "--hash=sha256:" in setup_env.WHEEL.read_text()


def test_half_installed_package_is_forgotten_and_others_are_kept(setup_env, tmp_path):
    started = 1_000_000.0
    for name, mtime, whole in [("old", -1, False), ("half", 1, False), ("whole", 1, True)]:
        metadata = tmp_path / f"{name}-1.0.dist-info"
        metadata.mkdir()
        if whole:
            (metadata / "INSTALLER").touch()
        os.utime(metadata, (started + mtime, started + mtime))
    setup_env.forget_half_installed(tmp_path, started)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [
        "old-1.0.dist-info",
        "whole-1.0.dist-info",
    ]


def test_pip_writes_the_installer_file_that_the_recovery_relies_on():
    import importlib.metadata

    assert importlib.metadata.distribution("pytest").read_text("INSTALLER")


# --- what is declared and shipped -----------------------------------------------------------------


def imported_modules(tree):
    """(top-level name, line) of every absolute import of a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], node.lineno


@pytest.mark.parametrize("folder", ["detr_d2", "tools", "configs", "tests"])
def test_every_import_is_declared(declared, folder):
    extras = [r for group in declared["extras_require"].values() for r in group]
    names = {Requirement(r).name.lower() for r in [*declared["install_requires"], *extras]}
    # detectron2 cannot be declared; what it brings itself need not be.
    brought = {"detectron2", "hydra", "matplotlib", "omegaconf", "opencv-python-headless"}
    brought |= {"packaging", "pyyaml", "setuptools", "tensorboard", "termcolor", "tqdm", "yacs"}
    local = {"detr_d2", "tests"}
    undeclared = [
        f"{file.relative_to(ROOT)}:{line}: {module}"
        for file in (ROOT / folder).rglob("*.py")
        for module, line in imported_modules(ast.parse(file.read_text(encoding="utf-8")))
        if module not in sys.stdlib_module_names
        and PACKAGE_OF.get(module, module).lower() not in names | brought | local
    ]
    assert undeclared == []


def test_every_requirement_has_a_lower_bound_that_is_met_here(declared):
    """What the tests run with is what setup.py promises to work with."""
    from importlib.metadata import PackageNotFoundError, version

    extras = [r for group in declared["extras_require"].values() for r in group]
    for requirement in map(Requirement, [*declared["install_requires"], *extras]):
        assert [bound.operator for bound in requirement.specifier] == [">="], str(requirement)
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            assert str(requirement) in extras, f"{requirement} is not installed"
            continue
        assert requirement.specifier.contains(installed, prereleases=True), str(requirement)


def test_extras_of_the_set_up_exist(setup_env, declared):
    assert set(setup_env.EXTRAS.split(",")) <= set(declared["extras_require"])
    assert set(declared["extras_require"]["all"]) == {
        requirement
        for name, group in declared["extras_require"].items()
        for requirement in group
        if name != "all"
    }
    assert setup_env.TORCH in declared["install_requires"]
    assert setup_env.TORCHVISION in declared["install_requires"]


def test_wheel_holds_all_modules_and_configs(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("detr_d2", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
         "--quiet", "--wheel-dir", tmp_path, source],
        check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("detr_d2-*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info/" not in name}
    expected = {str(f.relative_to(ROOT).as_posix()) for f in (ROOT / "detr_d2").rglob("*.py")}
    expected |= {
        f"detr_d2/{file.relative_to(ROOT).as_posix()}"
        for file in (ROOT / "configs").rglob("*")
        if file.suffix in {".yaml", ".py", ".safetensors"}
    }
    assert shipped == expected


# --- the commands of the README -------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_names_a_python_that_is_missing(target, tmp_path):
    done = subprocess.run(
        ["make", target, "PYTHON=python-that-is-not-there", f"VENV={tmp_path / 'new'}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert '"python-that-is-not-there" is no Python 3 here' in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_continuous_integration_calls_the_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    assert "make test" in script.read_text()
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")
