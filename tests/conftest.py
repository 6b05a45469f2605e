"""Fixtures every test may use."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of measured data: $JAXSIM_SHARED_DATA, or ../shared/data beside the repository."""
    named = os.environ.get("JAXSIM_SHARED_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no measured data at {folder} (set JAXSIM_SHARED_DATA)")
    return folder
