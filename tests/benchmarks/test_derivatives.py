"""What `jaxsim bench --suite derivatives` reports."""

import io

import pytest
from rich.console import Console

from jaxsim import Scenario
from jaxsim.bench import derivatives
from tests.sensitivity.test_costs import system

pytestmark = [pytest.mark.unoptimised, pytest.mark.slow]


def test_the_suite_reports_every_task(monkeypatch):
    monkeypatch.setattr(Scenario, "named", lambda name: system("dense").with_values({"num_seeds": 2}))
    monkeypatch.setattr(derivatives, "measured", lambda tasks, repeats: {
        name: (task() and 0.5, 0.25) for name, task in tasks.items()})
    report = derivatives.report(quick=True)
    names = [row["name"] for row in report["results"]]
    assert names[:2] == ["plain", "recorded"] and names[-1].startswith("reverse") and len(names) == 3 + len(
        derivatives.FIELDS)
    assert report["records"] > report["requests"] and [row.get("goal") for row in report["results"]] == [
        None, None, 1.15, 1.75, 4.0, 2.0]
    text = io.StringIO()
    derivatives.show(report, Console(file=text, width=100))
    assert "forward, 20 fields" in text.getvalue()
