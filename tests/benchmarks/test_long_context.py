"""What `jaxsim bench --suite long-context` measures: a long prompt among short ones, to its end."""

import pytest

from jaxsim.bench import long_context

pytestmark = [pytest.mark.unoptimised, pytest.mark.slow]


@pytest.mark.parametrize("name, lanes", [("lanes_8", 2), ("stages_4", 1)])
def test_a_case_ends_and_is_shown(name, lanes):
    row = long_context.measured(name, 1, tokens=300_000, short=20, lanes=lanes, target_ms=5.0)
    assert row["faults"] == 0 and row["lanes"] == lanes and len(row["seconds"]) == 1
    # Chunks of a prompt that is alone have no step of their own, those of a pipeline do.
    assert min(row["iterations"]) > 1000
    assert max(row["steps"]) < 1000 if name == "lanes_8" else min(row["steps"]) >= 1000
    report = {"results": [row, {"name": "slower", "error": "ended with 1"}], "duration_s": 1.0,
              "machine": {"cpu": "a processor", "jax": "1", "python": "3",
                          "load_average": {"before": None, "after": (1.0, 1.0, 1.0)}}}
    long_context.show(report)
