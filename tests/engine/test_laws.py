"""Laws on random scenarios of every preset, and on runs long enough that iteration counters are wound back."""

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jaxsim.engine import loop
from jaxsim.kernels import histogram
from tests.engine import cases as c
from tests.engine.laws import broken_laws
from tests.metrics.lanes import token_gaps
from tests.reference import simulator

PRESETS = [pytest.param(name, id=f"{name}-3", marks=[] if name in (
    "vllm-v1", "vllm-v0") else pytest.mark.slow) for name in c.PRESETS]

SEEDS = settings(max_examples=2, derandomize=True, deadline=None, database=None,
                 phases=(Phase.explicit, Phase.generate))


@pytest.mark.parametrize("name", PRESETS)
def test_laws_hold(name):
    flags, dims = simulator.preset(name), c.dims_of(name, 3)

    @SEEDS
    @given(st.integers(0, 2**32))
    def check(seed):
        batch = c.draw_many(seed, flags, dims)
        for case, lane in zip(batch, c.simulate(batch, flags, dims, "mixed"), strict=True):
            assert broken_laws(case, lane, dims.num_executors) == [], case

    check()


@pytest.mark.parametrize("name", PRESETS)
def test_every_token_after_the_first_has_its_gap(name):
    """Tokens in = tokens out: the histogram of gaps holds one for each, across preemptions too.

    Exactly those of the reference where an iteration never averages over several: decode times that do not depend
    on the context, no preemptions, no prompts while others wait.
    """
    flags, dims = simulator.preset(name), c.dims_of(name, 3)
    batch = c.draw_many(8, flags, dims)
    num_exact = 0
    for case, lane in zip(batch, c.simulate(batch, flags, dims, "mixed"), strict=True):
        assert lane["itl"].min() >= 0
        assert lane["itl"].sum() == (case.output - 1).sum(), case
        is_constant = all(row[1:] == (0,) * 4 for row in case.coefficients)
        if is_constant and flags.phase_mix == "unified" and not lane["preemptions"].any():
            gaps = token_gaps(c.reference(case, flags, dims, "mixed"), case.prompt)
            assert np.array_equal(lane["itl"], np.histogram(gaps, histogram.edges())[0]), case
            num_exact += 1
    assert num_exact >= 5 or flags.phase_mix != "unified"


def long_cases(flags: simulator.Flags) -> list[c.Case]:
    """Outputs of tens of thousands of tokens, and many shorter ones one after the other; dyadic and exact."""
    rng = np.random.default_rng(4)
    batch = []
    for k in range(6):
        is_long = k < 4
        count = 4 if is_long else c.MOST_REQUESTS
        output = rng.integers(15_000, 25_000, count) if is_long else rng.integers(400, 900, count)
        prompt = rng.integers(1, 60, count)
        arrival = np.cumsum(rng.integers(0, 4000 if is_long else 40, count) * 2.0**-4)
        largest = int(np.max(prompt + output))
        need = -(-largest // 16) + 1
        # Contexts enter only where float32 stays exact over a jump.
        context = 0.0 if is_long else 2.0**-14
        row = (2.0**-6, 2.0**-9, context, 2.0**-8, 0.0)
        budget = int(rng.integers(8, 40)) if flags.chunked_prefill else largest
        limits = dict(max_num_seqs=2 + k % 2, max_num_batched_tokens=budget, watermark_blocks=0,
                      num_blocks=need + int(rng.integers(0, need // 2)), max_model_len=largest)
        batch.append(c.Case(arrival, prompt, output, output, np.zeros(count, int), np.zeros((count, 2), np.float32),
                            limits, (row,) * 3))
    return batch


@pytest.mark.parametrize("name", ["vllm-v1", "vllm-v0"], ids=lambda name: f"{name}-1")
@pytest.mark.slow
def test_counters_wind_back(name):
    """Iteration counters far beyond where they are wound back, preemptions at contexts of thousands of tokens."""
    flags, dims = simulator.preset(name), c.dims_of(name, 1)
    batch = long_cases(flags)
    preemptions = 0
    for case, lane in zip(batch, c.simulate(batch, flags, dims, "mixed", lanes=c.LANES), strict=True):
        result = c.reference(case, flags, dims, "mixed")
        assert c.differences(lane, c.answer(result, 1, case.limits["num_blocks"])) == []
        assert broken_laws(case, lane, 1) == []
        preemptions += lane["preemptions"].sum()
        assert lane["num_iterations"].max() > loop.REBASE_COUNTER
        assert lane["counter"].max() < lane["num_iterations"].max()
    assert preemptions > 0
