"""Sets up the Python environment of this checkout: PyTorch, detectron2, this package, its tests.

    python tools/setup_env.py [--venv .venv] [--torch "torch torchvision"] [--detectron2 SOURCE]

`make demo` and `make test` call it first; on Windows, call it by hand. It creates the environment
if there is none, leaves a torch or detectron2 that is already in it alone, and goes on where it
stopped after an interruption. A marker file written last lets the next run return at once, until
what is to be installed changes.

Standard library only, and in syntax that an unsupported Python still reads, so that it can say so.
"""

import argparse
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST, NEWEST = (3, 10), (3, 13)
TORCH, TORCHVISION = "torch>=2.4", "torchvision>=0.19"
EXTRAS = "fast,digits,timm,finetune,export,test,dev"
WHEEL = ROOT / "requirements" / "detectron2-wheel.txt"
NEEDS = ROOT / "requirements" / "detectron2.txt"
READY, UNFINISHED, STAGE = ".detr_d2-ready", ".detr_d2-unfinished", ".detr_d2-stage"

# Both run in the environment's own Python, which need not be the one that runs this file.
INSPECT = """
import importlib.metadata, importlib.util, json, sys, sysconfig
versions = {str(d.metadata["Name"]).lower(): d.version for d in importlib.metadata.distributions()}
specs = [importlib.util.find_spec(name) for name in ("torch", "torchvision", "detectron2")]
print(json.dumps({
    "python": sys.version_info[:2],
    "bits": 64 if sys.maxsize > 2**32 else 32,
    "packages": sysconfig.get_paths()["purelib"],
    "files": [spec.origin for spec in specs if spec and spec.origin],
    "detectron2": specs[2].origin if specs[2] else None,
    "versions": versions,
}))
"""
CHECK = """
import torch, torchvision, pycocotools.mask, detectron2.modeling, detectron2.model_zoo
device = f"CUDA {torch.version.cuda}" if torch.cuda.is_available() else "no CUDA device"
print(f"torch {torch.__version__} ({device}), torchvision {torchvision.__version__}, "
      f"detectron2 {detectron2.__version__}")
"""


def main(arguments=None) -> None:
    """Sets up the environment that the arguments name; exits with one sentence where it cannot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--venv", default=str(ROOT / ".venv"), help="environment to fill, created if missing"
    )
    parser.add_argument(
        "--torch", default="", help='pip arguments: "torch==2.9.1 torchvision==0.24.1"'
    )
    parser.add_argument(
        "--detectron2", default="", help="pip arguments naming another detectron2, as a git URL"
    )
    parser.add_argument(
        "--match-python",
        action="store_true",
        help="refuse an environment that holds another Python version than the running one",
    )
    options = parser.parse_args(arguments)
    venv = Path(options.venv).expanduser().absolute()
    try:
        if not is_ready(venv, options.match_python):
            set_up(venv, options)
        elif options.torch or options.detectron2:
            say(f"{venv} is set up already; TORCH=... and DETECTRON2=... are for a new one")
    except KeyboardInterrupt:
        stop("interrupted. Run the same command again to go on from here.")


def is_ready(venv: Path, match_python: bool) -> bool:
    """Whether `venv` was set up to the end for this checkout as it is now."""
    try:
        state = json.loads((venv / READY).read_text())
    except (OSError, ValueError):
        return False
    if state["fingerprint"] != fingerprint():
        return False
    if find_python(venv) is None or not all(Path(file).exists() for file in state["files"]):
        return False
    if match_python:
        require_same_python(state["python"], venv)
    return True


def fingerprint() -> str:
    """Hash of all that decides what is installed, and of where the editable install points."""
    digest = hashlib.sha256(str(ROOT).encode())
    for file in [ROOT / "setup.py", Path(__file__), WHEEL, NEEDS]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def set_up(venv: Path, options) -> None:
    """Installs what is missing in steps that can all be repeated."""
    python = find_python(venv) or create(venv)
    found = inspect(python)
    require_supported_python(found["python"], found["bits"], str(python))
    if options.match_python:
        require_same_python(found["python"], venv)
    if (venv / UNFINISHED).exists():
        forget_half_installed(Path(found["packages"]), (venv / UNFINISHED).stat().st_mtime)
        found = inspect(python)
    (venv / UNFINISHED).write_text("the set-up did not reach its end\n")

    ensure_pip(python)
    pip(python, "-c", NEEDS, "setuptools", "wheel")
    install_torch(python, found["versions"], options.torch)
    install_torchvision(python, inspect(python)["versions"])
    versions = inspect(python)["versions"]
    # Named with every further installation, torch is not exchanged for the sake of another package.
    keep = ["-c", NEEDS, *(f"{name}=={versions[name]}" for name in ("torch", "torchvision"))]

    say("Installing this package and what it needs")
    uses_wheel = "sal-detectron2" in versions or not (found["detectron2"] or options.detectron2)
    needs = ["-r", NEEDS] if uses_wheel else []
    pip(python, *keep, *needs, "--no-build-isolation", "-e", f"{ROOT}[{EXTRAS}]")
    # lvis asks for opencv-python, which would replace the headless build and need a display.
    pip(python, "--no-deps", "lvis>=0.5.3")
    install_detectron2(python, venv, found, options.detectron2, keep)

    say("Checking that everything can be imported")
    run([python, "-c", CHECK], cwd=venv)
    found = inspect(python)
    state = {"fingerprint": fingerprint(), "python": found["python"], "files": found["files"]}
    (venv / READY).write_text(json.dumps(state))
    (venv / UNFINISHED).unlink()
    say(f"{venv} is ready")


def find_python(venv: Path):
    """The interpreter of an environment made by venv, virtualenv or conda, on any system."""
    names = ["bin/python", "Scripts/python.exe", "python.exe"]
    return next((venv / name for name in names if (venv / name).exists()), None)


def create(venv: Path) -> Path:
    """Makes an environment of the running Python and returns its interpreter."""
    require_supported_python(
        sys.version_info[:2], 64 if sys.maxsize > 2**32 else 32, sys.executable
    )
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        stop(f"{venv} is not a Python environment. Name another folder: VENV=...")
    say(f"Creating {venv} with Python {sys.version.split()[0]}")
    run([sys.executable, "-m", "venv", "--without-pip", venv])
    return find_python(venv)


def inspect(python: Path) -> dict:
    """The environment's Python version, package folder and installed versions."""
    command = [str(python), "-c", INSPECT]
    try:
        answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=str(python.parent))
    except (OSError, subprocess.CalledProcessError) as error:
        stop(f"{python} does not run ({error}). Remove that environment or name another: VENV=...")
    return json.loads(answer.stdout.decode())


def require_supported_python(version, bits: int, interpreter: str) -> None:
    """Stops where there are no wheels of what is needed, or nobody tried."""
    if OLDEST <= tuple(version) <= NEWEST and bits == 64:
        return
    stop(
        "{} is Python {}.{} ({} bit), but this project supports 64 bit Python {}.{} to {}.{}. "
        "Name one: make demo PYTHON=python3.12".format(
            interpreter, version[0], version[1], bits, *OLDEST, *NEWEST
        )
    )


def require_same_python(version, venv: Path) -> None:
    """Stops where another Python is asked for than the one that the environment holds."""
    if tuple(version) != sys.version_info[:2]:
        stop(
            "{} is Python {}.{}, but {} holds Python {}.{}. Leave out PYTHON=... to use that, or "
            "name a folder for a second environment: VENV=...".format(
                sys.executable, *sys.version_info[:2], venv, *version
            )
        )


def forget_half_installed(packages: Path, started: float) -> None:
    """Lets pip install again what it was writing when the last set-up was killed.

    pip takes a package for installed once its metadata is there, and writes the file INSTALLER
    after all others. Older folders are somebody else's.
    """
    for metadata in packages.glob("*.dist-info"):
        if metadata.stat().st_mtime >= started and not (metadata / "INSTALLER").exists():
            say(f"{metadata.name} was not installed to its end: once more")
            shutil.rmtree(str(metadata))


def ensure_pip(python: Path) -> None:
    """Puts pip into the environment if it is not there."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if subprocess.run([str(python), "-m", "pip", "--version"], **quiet).returncode == 0:
        return
    if subprocess.run([str(python), "-m", "ensurepip", "--upgrade"], **quiet).returncode != 0:
        stop(f"{python} has no pip and cannot make it. On Debian: apt install python3-venv")


def install_torch(python: Path, versions: dict, requested: str) -> None:
    """Installs torch where it is missing; a torch that is there is never replaced."""
    if "torch" not in versions:
        say("Installing PyTorch (with CUDA on Linux: 3 GB to fetch, 6 GB on the disk)")
        pip(python, "-c", NEEDS, *(shlex.split(requested) or [TORCH, TORCHVISION]))
    elif numbers(versions["torch"]) < numbers(TORCH):
        stop(f"torch {versions['torch']} is in this environment, {TORCH} is needed: upgrade it")
    else:
        say(f"torch {versions['torch']} is there and left alone")


def install_torchvision(python: Path, versions: dict) -> None:
    """Installs the torchvision that belongs to the torch that is there, if there is none."""
    if "torchvision" not in versions:
        pip(python, "-c", NEEDS, TORCHVISION, f"torch=={versions['torch']}")


def numbers(version: str) -> tuple:
    """Leading numbers of the first version in a text, for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def install_detectron2(python: Path, venv: Path, found: dict, source: str, keep: list) -> None:
    """Installs detectron2 where missing, from `source` or from the pinned wheel."""
    if found["detectron2"]:
        say("detectron2 is there and left alone: {}".format(found["detectron2"]))
        if source:
            say(f"To exchange it for {source}, uninstall it first: {python} -m pip uninstall ...")
    elif source:
        say(f"Building detectron2 from {source}")
        pip(python, "--no-build-isolation", *keep, *shlex.split(source))
    else:
        say("Installing detectron2")
        install_wheel(python, venv / STAGE, Path(found["packages"]))


def install_wheel(python: Path, stage: Path, packages: Path) -> None:
    """Installs the pinned wheel of detectron2, which is tagged for CPython 3.10, on any Python.

    Its Python files run everywhere; its compiled file is nobody's to trust and not needed, and its
    top-level package `tools` would shadow other people's. So both stay behind in `stage`, and the
    package moves last: an interruption leaves no half detectron2.
    """
    shutil.rmtree(str(stage), ignore_errors=True)
    anywhere = ["--only-binary=:all:", "--python-version", "3.10", "--implementation", "cp"]
    pip(
        python, "--no-deps", "--no-compile", *anywhere, "--target", stage, "--require-hashes",
        "-r", WHEEL,
    )  # fmt: skip
    for compiled in (stage / "detectron2").glob("_C*"):
        compiled.unlink()
    for metadata in stage.glob("*.dist-info"):
        shutil.rmtree(str(packages / metadata.name), ignore_errors=True)
        metadata.rename(packages / metadata.name)
    (stage / "detectron2").rename(packages / "detectron2")
    shutil.rmtree(str(stage))


def pip(python: Path, *arguments) -> None:
    """Runs `pip install` and lets its progress show."""
    run([python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *arguments])


def run(command: list, cwd=None) -> None:
    """Runs a command that never waits for input; stops with its name where it fails."""
    words = [str(word) for word in command]
    code = subprocess.run(words, stdin=subprocess.DEVNULL, cwd=cwd).returncode
    if code != 0:
        command_line = " ".join(shlex.quote(word) for word in words)
        stop(
            f"this command failed with exit code {code}, its message stands above: {command_line}\n"
            "When the cause is gone, run the set-up again: it goes on from here."
        )


def say(message: str) -> None:
    print(f"== {message}", flush=True)


def stop(message: str) -> None:
    sys.exit(f"set-up: {message}")


if __name__ == "__main__":
    main()
