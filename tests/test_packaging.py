"""The wheel holds every file of every mapped folder, under one import name."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]


def shipped():
    """Path in the wheel of every file that belongs into it."""
    for package, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("*"):
            hidden = {"__pycache__", ".ipynb_checkpoints"} & set(file.parts)
            if file.is_file() and not hidden and file.suffix != ".pyc":
                yield f"{package.replace('.', '/')}/{file.relative_to(ROOT / folder).as_posix()}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the working tree."""
    copy = tmp_path_factory.mktemp("source")
    for folder in set(FOLDERS.values()):
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(
        command, cwd=copy, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return frozenset(archive.namelist())


def test_every_mapped_folder_is_a_listed_package():
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(FOLDERS)
    for folder in FOLDERS.values():
        assert (ROOT / folder / "__init__.py").is_file()


def test_every_folder_with_code_is_mapped():
    apart = {"tests", "benchmarks", "docs"}
    folders = {file.parent.name for file in ROOT.glob("*/__init__.py")} - apart
    assert folders == set(FOLDERS.values())


def test_the_wheel_holds_exactly_the_files_of_the_folders(wheel):
    code = {name for name in wheel if ".dist-info/" not in name}
    assert code == set(shipped())


def test_nothing_is_importable_under_another_name(wheel):
    tops = {name.partition("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == {"society"}


def test_the_wheel_brings_the_command_and_the_licence(wheel):
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel)
    assert any(name.endswith("LICENSE") for name in wheel)


def test_constraints_pin_every_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in pin and "+" not in pin and "/" not in pin for pin in pins)
    names = {pin.partition("==")[0].lower().replace("_", "-") for pin in pins}
    extras = PROJECT["project"]["optional-dependencies"]["dev"]
    for wanted in [*PROJECT["project"]["dependencies"], *extras]:
        name = "".join(c for c in wanted.partition(">=")[0].partition("==")[0] if c not in " ")
        assert name.partition("[")[0].lower().replace("_", "-") in names, wanted
