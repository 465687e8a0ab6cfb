"""
The oldest and newest Python that AsyncFlow supports, each with AsyncFlow's dependencies.

The one that runs the tests is used as it is. The other is searched for on this machine; its
dependencies are installed into a virtual environment in the cache folder, once for each set of
pinned versions.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.debian import cache_folder

OLDEST, NEWEST = VERSIONS = ("3.11", "3.13")
REQUIREMENTS = Path(__file__).parents[2] / "requirements" / "runtime.txt"


class NoPython(Exception):
    """
    A version is not available on this machine; the message says why.
    """


def python(version: str) -> Path:
    """
    A Python of this version with AsyncFlow's dependencies.

    Raises:
        NoPython: It is not on this machine, or the dependencies cannot be installed.
    """
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return Path(sys.executable)
    pinned = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    folder = cache_folder() / f"python-{version}-{pinned}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"python-{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _make(folder, version)
    return folder / "bin" / "python"


def _make(folder: Path, version: str) -> None:
    # A virtual environment cannot be renamed, so a symlink marks a complete one.
    unfinished = folder.with_name(f"{folder.name}.made")
    shutil.rmtree(unfinished, ignore_errors=True)
    _run([_find(version), "-m", "venv", str(unfinished)], version)
    pip = [str(unfinished / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    options = ["--require-hashes", "--only-binary", ":all:", "--requirement", str(REQUIREMENTS)]
    _run([*pip, *options], version)
    folder.symlink_to(unfinished)


def _find(version: str) -> str:
    home = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    named = shutil.which(f"python{version}")
    candidates = [
        *([named] if named else []),
        *sorted(glob.glob(f"{home}/versions/{version}.*/bin/python{version}")),
    ]
    for candidate in candidates:
        # A pyenv shim on the PATH may point to a version that is not installed.
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    raise NoPython(f"no Python {version} on this machine")


def _run(command: list[str], version: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise NoPython(f"Python {version} is here, but not what AsyncFlow needs: {last}")
