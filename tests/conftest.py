"""Fixtures every test may use."""

import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Known without pytest-xdist too: with `-n 2 --dist loadgroup` a group runs in one process and compiles once."""
    config.addinivalue_line("markers", "xdist_group(name): tests that share a compiled program")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of measured data: $JAXSIM_SHARED_DATA, or ../shared/data beside the repository."""
    named = os.environ.get("JAXSIM_SHARED_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no measured data at {folder} (set JAXSIM_SHARED_DATA)")
    return folder
