"""Host and device lanes: the closed form against the recurrence, the recurrence in plain Python, its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim.analytic import launches

pytestmark = pytest.mark.unoptimised

US = 2.0**-20
"""About a microsecond; all numbers below are dyadic, so sums are exact."""


def replay(issue, launch, kernel):
    """Kernel by kernel: (latency, sum of start - call)."""
    called = end = waited = 0.0
    for c, d in zip(issue, kernel, strict=True):
        called += c
        start = max(called + launch, end)
        waited += start - called
        end = start + d
    return end, waited


@pytest.mark.parametrize(("issue", "kernel"), [(8, 2), (2, 8), (4, 4), (1, 0)])
def test_equal_kernels_in_closed_form(issue, kernel):
    for number in (1, 2, 100):
        ours = launches.alike(number, issue * US, 2 * US, kernel * US)
        scanned = launches.lanes(np.full(number, issue * US), 2 * US, np.full(number, kernel * US))
        latency, waited = replay([issue * US] * number, 2 * US, [kernel * US] * number)
        assert float(ours.latency_s) == float(scanned.latency_s) == latency
        assert float(ours.launch_and_queue_s) == float(scanned.launch_and_queue_s) == waited
        assert float(ours.idle_s) == float(scanned.idle_s) == latency - number * kernel * US
        assert float(scanned.mean_kernel_s) == kernel * US


def test_any_kernels():
    rng = np.random.default_rng(0)
    for number in (1, 3, 64):
        issue, kernel = (rng.integers(0, 16, number) * US for _ in range(2))
        ours = launches.lanes(issue, 3 * US, kernel)
        assert (float(ours.latency_s), float(ours.launch_and_queue_s)) == replay(issue, 3 * US, kernel)


def test_a_captured_pass_is_one_call():
    kernel = np.arange(1, 9) * US
    ours = launches.captured(8 * US, 2 * US, kernel, US / 2)
    assert float(ours.launch_and_queue_s) == 2 * US and float(ours.mean_kernel_s) == 4.5 * US
    assert float(ours.latency_s) == (8 + 2 + 36 + 7 / 2) * US and float(ours.idle_s) == (8 + 2 + 7 / 2) * US


def test_knee():
    """Time in the queue is that of the launches alone while the host is behind, and rises from the turn on."""
    batches = 2.0 ** np.arange(9)
    fixed, slope, issue = 1 * US, US / 2, 8 * US
    waited = np.asarray(launches.alike(64, issue, 2 * US, fixed + slope * batches).launch_and_queue_s)
    # From which on a kernel takes longer than issuing it.
    turn = (issue - fixed) / slope
    assert turn == 14
    assert (waited[batches <= turn] == 64 * 2 * US).all() and (np.diff(waited[batches >= turn]) > 0).all()
    assert waited[batches > turn].min() > waited[0]


def test_gradient_by_the_lane_that_limits():
    def latency(issue, kernel):
        return launches.lanes(issue * jnp.ones(100), 2.0, kernel * jnp.ones(100)).latency_s
    assert [float(x) for x in jax.grad(latency, (0, 1))(8.0, 1.0)] == [100, 1]
    assert [float(x) for x in jax.grad(latency, (0, 1))(1.0, 8.0)] == [1, 100]
