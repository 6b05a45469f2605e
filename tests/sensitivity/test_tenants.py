"""Figures of single tenants: those of the summary, their derivatives, and what is refused."""

import numpy as np
import pytest

from jaxsim import InputError
from jaxsim.engine.simulate import simulate
from jaxsim.metrics.summary import lane_metrics
from jaxsim.sensitivity import metrics, tenants
from jaxsim.sensitivity.total import sensitivity
from jaxsim.study.lanes import Lanes
from tests.sensitivity import queues as q

pytestmark = pytest.mark.unoptimised

OF_BOTH = ["mean_ttft_ms", "p99_e2el_ms", "completed", "attainment"]


@pytest.fixture(scope="module")
def queue():
    """One server, with two tenants whose limits differ."""
    return q.scenario("M/G/1", 0.6, num_requests=200, num_seeds=3, slo={"ttft_ms": 40.0}).with_values({
        "workload.tenants": [{"name": "paid.eu", "share": 1.0, "ttft_ms": 15.0}, {"name": "free", "share": 2.0}]})


def test_names_are_of_a_tenant_and_a_figure():
    assert tenants.parts("tenants.paid.eu.p99_ttft_ms") == ("paid.eu", "p99_ttft_ms")
    assert tenants.parts("slo.attainment") is None is tenants.parts("tenants.requests")
    assert metrics.kind("tenants.paid.p99_ttft_ms") == metrics.kind("tenants.paid.completed") == "percentile"
    assert metrics.kind("tenants.paid.mean_e2el_ms") == "mean"


@pytest.mark.parametrize("name, says", [
    ("tenants.gold.mean_ttft_ms", "tenants are paid.eu, free"),
    ("tenants.free.service_share", "of a tenant there are requests"),
    ("tenants.free.mean_tpot_ms", "every answer is one token"),
])
def test_what_no_run_has_is_refused(queue, name, says):
    with pytest.raises(InputError, match=says):
        metrics.chosen([queue], [name], Lanes())
    with pytest.raises(InputError, match="no tenants to tell apart"):
        metrics.chosen([q.scenario(num_requests=20, num_seeds=2)], ["tenants.free.completed"], Lanes())


@pytest.mark.slow
def test_they_are_those_of_the_summary_with_derivatives(queue):
    names = [f"tenants.{name}.{figure}" for name in ("paid.eu", "free") for figure in OF_BOTH]
    found = sensitivity(queue, ["cost.prefill.b"], [*names, "mean_ttft_ms"], num_seeds=3)
    rows = {row.metric: row for row in found.rows}
    lanes = simulate(queue).lanes[0]
    each = [lane_metrics(lane, queue.slo, tenants=queue.workload.tenants)["tenants"] for lane in lanes]
    for name in names:
        tenant, figure = tenants.parts(name)
        assert rows[name].metric_value == pytest.approx(np.mean([one[tenant][figure] for one in each]), rel=1e-6), name
    # Sums over all requests are sums over those of each tenant; of the fixed schedule too.
    sums = sum(sum(one[name]["completed"] * one[name]["mean_ttft_ms"] for one in each) for name in ("paid.eu", "free"))
    assert sums == pytest.approx(sum(lane_metrics(lane)["mean_ttft_ms"] for lane in lanes) * 200, rel=1e-6)
    for name in ("paid.eu", "free"):
        mean, tail = rows[f"tenants.{name}.mean_ttft_ms"], rows[f"tenants.{name}.p99_e2el_ms"]
        # All of a time is service, whole or begun; and queues grow with it.
        assert mean.direct == pytest.approx(1.0, abs=1e-4) and tail.direct == pytest.approx(1.0, abs=1e-4)
        assert mean.total > 1.2 and tail.total > 1.2
    assert rows["tenants.paid.eu.attainment"].direct is None and rows["tenants.paid.eu.attainment"].total < 0
    assert rows["tenants.free.completed"].total == 0
