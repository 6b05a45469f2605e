"""The engine as a queue that theory knows: one sequence at a time, waiting times within confidence bounds.

All laws share one program, many seeds each. An iteration takes a constant time, so a request of n output tokens is
served for n iterations: constant outputs give M/D/1, geometric ones M/G/1 (near M/M/1).
"""

import numpy as np
import pytest
from scipy import stats

from jaxsim.spec.dims import Dims
from tests.engine import cases as c
from tests.reference import simulator

FLAGS = simulator.preset("vllm-v1")
DIMS = Dims(num_requests=4000, num_executors=1, num_slots=c.NUM_SLOTS, block_size=16)
SEEDS = 16
WARMUP = 500
ITERATION_S = 2.0**-7
MEAN_OUTPUT = 16

SYSTEMS = [("constant", 0.5), ("constant", 0.7), ("geometric", 0.5), ("geometric", 0.7)]
"""Law of the output lengths, and load."""


def service_moments(law: str) -> tuple[float, float]:
    """Mean and mean square of the service time, seconds."""
    mean = MEAN_OUTPUT
    square = mean**2 if law == "constant" else mean * (2 * mean - 1)
    return mean * ITERATION_S, square * ITERATION_S**2


def draw(law: str, load: float, seed: int) -> c.Case:
    rng = np.random.default_rng([seed, SYSTEMS.index((law, load))])
    count = DIMS.num_requests
    mean_s, _ = service_moments(law)
    arrival = np.round(np.cumsum(rng.exponential(mean_s / load, count)) * 2**20) / 2**20
    output = np.full(count, MEAN_OUTPUT) if law == "constant" else rng.geometric(1 / MEAN_OUTPUT, count)
    ones = np.ones(count, int)
    limits = dict(max_num_seqs=1, max_num_batched_tokens=64, watermark_blocks=0, num_blocks=100, max_model_len=1000)
    return c.Case(arrival, ones, output, output, ones, np.zeros((count, 2), np.float32), limits,
                  ((ITERATION_S, 0.0, 0.0, 0.0, 0.0),) * 3)


@pytest.fixture(scope="module")
def results():
    batch = [draw(law, load, seed) for law, load in SYSTEMS for seed in range(SEEDS)]
    lanes = c.simulate(batch, FLAGS, DIMS, "round_robin")
    grouped = {}
    for system, at in zip(SYSTEMS, range(0, len(batch), SEEDS), strict=True):
        grouped[system] = list(zip(batch[at: at + SEEDS], lanes[at: at + SEEDS], strict=True))
    return grouped


@pytest.mark.parametrize("law, load", SYSTEMS, ids=[f"{law}-{load}" for law, load in SYSTEMS])
def test_mean_waiting_is_pollaczek_khinchine(results, law, load):
    """W = rate E[S^2] / (2 (1 - load)), within a 99.9 % interval over independent seeds."""
    mean_s, square = service_moments(law)
    want = load / mean_s * square / (2 * (1 - load))
    waits = [np.mean((lane["scheduled_s"] - case.arrival_s)[WARMUP:]) for case, lane in results[law, load]]
    error = np.std(waits, ddof=1) / np.sqrt(SEEDS)
    assert error < 0.06 * want, "too few requests to tell"
    assert abs(np.mean(waits) - want) < stats.t.ppf(0.9995, SEEDS - 1) * error
    if law == "geometric":
        # Almost exponential service: M/M/1 is near, M/D/1 is not.
        assert want == pytest.approx(load * mean_s / (1 - load), rel=0.05)


@pytest.mark.parametrize("law, load", SYSTEMS, ids=[f"{law}-{load}" for law, load in SYSTEMS])
def test_lindley_holds_request_by_request(results, law, load):
    """W' = max(0, W + S - gap), exactly: the server is never idle while somebody waits."""
    for case, lane in results[law, load]:
        assert lane["fault"] == 0
        service = case.output * ITERATION_S
        start = lane["scheduled_s"]
        free = np.concatenate([[0.0], (start + service)[:-1]])
        assert np.array_equal(start, np.maximum(case.arrival_s, free))
        assert np.array_equal(lane["finish_s"], start + service)


def test_waiting_has_the_right_spread_in_time(results):
    """A poll by Poisson arrivals sees the queue as it is: the share that waits is the load (PASTA)."""
    for (law, load), pairs in results.items():
        shares = [np.mean((lane["scheduled_s"] > case.arrival_s)[WARMUP:]) for case, lane in pairs]
        error = np.std(shares, ddof=1) / np.sqrt(SEEDS)
        assert abs(np.mean(shares) - load) < stats.t.ppf(0.9995, SEEDS - 1) * error, (law, load)
