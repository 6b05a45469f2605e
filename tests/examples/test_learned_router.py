"""The example of a learned router."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.unoptimised


@pytest.mark.slow
def test_the_example_learns():
    """A smaller version: it runs as it stands, and its trials get better."""
    path = Path(__file__).parents[2] / "examples" / "learned_router.py"
    spec = importlib.util.spec_from_file_location("learned_router", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    lines = []
    shares = example.main(generations=18, num_requests=96, num_ticks=5, train_seeds=16, test_seeds=16, log=lines.append)
    assert set(shares) == {"learned", "RoundRobin", "LeastOutstanding"} and len(lines) >= 14
    assert all(0.5 < share <= 1 for share in shares.values())
    assert shares["learned"] > max(shares["RoundRobin"], shares["LeastOutstanding"])
