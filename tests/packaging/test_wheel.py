"""What gets installed: every package and all data, nothing at the top level but `jaxsim`."""

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("jaxsim", "kernels", "scenarios", "pyproject.toml", "README.md", "LICENSE")
MAPPED = {"jaxsim": "jaxsim", "kernels": "jaxsim/kernels", "scenarios": "jaxsim/scenarios"}
DATA_SUFFIXES = (".toml", ".json", ".csv")


def packages_on_disk() -> set[str]:
    """Folders with Python files, by import name."""
    found = set()
    for folder, target in MAPPED.items():
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.parent.relative_to(ROOT / folder)
            found.add(".".join([*target.split("/"), *relative.parts]))
    return found


def expected_files() -> set[str]:
    """Every source and data file, by its place in an installation."""
    found = set()
    for folder, target in MAPPED.items():
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT / folder)
            if path.suffix == ".py" or path.name == "py.typed" or (
                    folder == "scenarios" and path.suffix in DATA_SUFFIXES):
                if "__pycache__" not in relative.parts:
                    found.add(f"{target}/{relative.as_posix()}")
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what a release is built from: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_package_list_is_complete():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    listed = settings["packages"]
    assert len(set(listed)) == len(listed)
    assert set(listed) == packages_on_disk()


def test_every_folder_with_code_is_a_package():
    for folder in MAPPED:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"


def run(*command: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def check_contents(files: set[str]) -> None:
    expected = expected_files()
    assert sum(name.endswith(".toml") for name in expected) >= 20
    assert expected - files == set()
    assert {name.split("/")[0] for name in files} == {"jaxsim"}
    assert not [name for name in files - expected if not name.endswith(".pyc")]


def test_a_build_has_every_file(sources, tmp_path):
    """By the build backend's own rules, without making an archive (which older ones need a helper for)."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    run("-c", "import setuptools; setuptools.setup()", "-q", "build", "--build-base", str(tmp_path),
        "--build-lib", str(tmp_path / "lib"), folder=sources)
    library = tmp_path / "lib"
    check_contents({p.relative_to(library).as_posix() for p in library.rglob("*") if p.is_file()})


def can_make_wheels() -> bool:
    try:
        version = tuple(int(part) for part in metadata.version("setuptools").split(".")[:2])
    except metadata.PackageNotFoundError:
        return False
    return version >= (70, 1) or importlib.util.find_spec("wheel") is not None


@pytest.mark.skipif(not can_make_wheels(), reason="needs setuptools >= 70.1, or the wheel package")
@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip")
def test_a_wheel_has_every_file(sources, tmp_path):
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path),
        str(sources), folder=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    about = [name for name in names if ".dist-info/" in name]
    check_contents(set(names) - set(about))
    scripts = zipfile.ZipFile(wheel).read(next(n for n in about if n.endswith("entry_points.txt"))).decode()
    assert "jaxsim = jaxsim.__main__:main" in scripts


def test_nothing_else_is_importable(tmp_path):
    """`import kernels` and `import scenarios` do not find ours, away from the source tree."""
    code = ("import importlib.util as u, jaxsim.kernels, jaxsim.scenarios\n"
            "assert u.find_spec('kernels') is None and u.find_spec('scenarios') is None")
    run("-c", code, folder=tmp_path)


def test_importing_jaxsim_is_light(tmp_path):
    """`jaxsim --help` must answer at once: importing the package and its command line loads no JAX."""
    code = ("import sys, jaxsim, jaxsim.cli\n"
            "heavy = {'jax', 'pandas', 'matplotlib', 'equinox'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    run("-c", code, folder=tmp_path)


def test_a_checkout_works_where_it_lies():
    """Python started in the root finds the sources first, however the package is installed."""
    code = ("import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)];"
            "import jaxsim.kernels.clock, jaxsim; print(jaxsim.Scenario.named('default').name)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "default\n", done.stderr
