"""Every preset against the reference and traces by hand, as in `test_parity`, in programs that are compiled quickly:
numbers are dyadic, and no rounding decides."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim.engine import loop
from tests.engine import cases as c
from tests.engine import test_parity
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

PROGRAMS = [("vllm-v1", 1), *((name, 3) for name in c.PRESETS if name not in test_parity.IN_CROWDS)]
"""What `test_parity` leaves to its slow tests."""


def step_by_step(name: str):
    """Sizes of one instance without jumps, and with a tape."""
    return replace(c.dims_of(name, 1), max_jump=1, num_records=200)


@pytest.mark.parametrize("name, num_executors", PROGRAMS)
def test_engine_equals_reference(name, num_executors):
    test_parity.check_seeds(name, num_executors)


def test_jumps_change_nothing():
    dims = c.dims_of("vllm-v1", 3)
    test_parity.check_jumps(simulator.preset("vllm-v1"), dims, replace(dims, max_jump=1))


def test_prompts_that_wait_come_later():
    """What the cases of batch waiting test: most of them are others without it."""
    flags, dims = simulator.preset("tensorrt-llm-waiting"), c.dims_of("tensorrt-llm-waiting", 3)
    cases = c.draw_many(0, flags, dims)
    at_once = [replace(case, limits=case.limits | dict(batch_wait_timeout_iters=0)) for case in cases]
    delays = [np.mean([a.ttft_s - b.ttft_s for a, b in zip(*(c.reference(one, flags, dims, "mixed").requests
                                                            for one in pair), strict=True)])
              for pair in zip(cases, at_once, strict=True)]
    assert np.mean(np.array(delays) > 0) > 0.3


TRACE = c.Case(
    arrival_s=np.array([0.0, 0.0, 3.0]), prompt=np.array([40, 50, 30]), output=np.array([30, 20, 40]),
    max_tokens=np.array([30, 20, 40]), priority=np.zeros(3, int), uniforms=np.zeros((3, 2), np.float32),
    limits=dict(max_num_seqs=4, watermark_blocks=0, num_blocks=10, max_model_len=128),
    coefficients=((1.0, 0, 0, 0, 0),) * 3)
"""Ten blocks of 16 tokens, an iteration a second."""


@pytest.mark.parametrize("name, budget, preemptions, last_step", [
    pytest.param("vllm-v1", 64, [0, 0, 1], 54, id="vllm-v1"),
    pytest.param("vllm-v0", 128, [0, 0, 4], 56, id="vllm-v0")])
def test_golden_trace(name, budget, preemptions, last_step):
    """Traces derived by hand from the schedulers of vLLM V1 and V0."""
    flags, dims = simulator.preset(name), c.dims_of(name, 1)
    trace = replace(TRACE, limits=TRACE.limits | {"max_num_batched_tokens": budget})
    (lane,) = c.simulate([trace], flags, dims, "mixed", lanes=c.LANES)
    assert lane["fault"] == 0
    assert lane["preemptions"].tolist() == preemptions
    assert lane["finish_s"].max() == last_step + 1
    assert lane["num_iterations"].tolist() == [last_step + 1]
    # Request 0 is never disturbed by the other two.
    assert lane["first_token_s"][0] == 1 and lane["peak_blocks"].tolist() == [10]


@pytest.mark.parametrize("name, budget, facts", [
    # iteration: (prompt tokens, decodes, blocks that are free while it runs)
    pytest.param("vllm-v1", 64, {
        0: (64, 0, 5), 1: (26, 1, 3), 2: (0, 2, 3), 3: (30, 2, 1), 6: (0, 3, 0), 9: (0, 2, 2),
        21: (36, 1, None), 54: (0, 1, None)}, id="vllm-v1"),
    pytest.param("vllm-v0", 128, {
        0: (90, 0, 3), 3: (30, 0, None), 7: (0, 2, None), 8: (34, 0, None), 9: (0, 2, None), 10: (35, 0, None),
        11: (0, 2, None), 12: (36, 0, None), 13: (0, 2, None), 24: (37, 0, None), 56: (0, 1, None)}, id="vllm-v0")])
def test_golden_trace_step_by_step(name, budget, facts):
    """What serving systems' schedulers do in the iterations that the traces speak of, from the tape."""
    flags, dims = simulator.preset(name), step_by_step(name)
    trace = replace(TRACE, limits=TRACE.limits | {"max_num_batched_tokens": budget})
    world = jax.device_get(loop.run(dims, *c.inputs([trace] * c.LANES, flags, dims, "mixed")))
    assert int(world.num_recorded[0]) == max(facts) + 1
    for iteration, (prompt_tokens, decodes, free) in facts.items():
        _, _, _, used, count, tokens, decoding = world.tape_counts[0, iteration]
        assert (count, tokens, decoding) == (1, prompt_tokens, decodes), iteration
        assert free is None or 10 - used == free, iteration
