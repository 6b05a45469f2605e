"""Fixtures every test may use."""

import os
import re
from pathlib import Path

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under `pytest -n`, tests that share a compiled program go to one process, which compiles it once.

    Tests of the engine name their program as PRESET-INSTANCES in brackets, or share it within the files of one
    subject (`test_real_*`). All others are distributed by file.
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByProgram(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            program = re.search(r"^tests/engine/.*\[([a-z0-9-]+-\d)\]$", nodeid)
            subject = re.search(r"^tests/engine/test_[a-z]+", nodeid)
            return program[1] if program else subject[0] if subject else nodeid.split("::")[0]

    return ByProgram(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of measured data: $JAXSIM_SHARED_DATA, or ../shared/data beside the repository."""
    named = os.environ.get("JAXSIM_SHARED_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no measured data at {folder} (set JAXSIM_SHARED_DATA)")
    return folder
