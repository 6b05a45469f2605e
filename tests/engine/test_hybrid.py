"""A GPU and its host in the event engine, against the reference with the same lanes in plain float64, bit for bit.

Numbers are dyadic and small, so that float32 is exact; which lane is the longest changes within a run of iterations.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim.cost.fitted import fitted
from jaxsim.cost.hybrid import HybridCost
from jaxsim.cost.tabulated import TOKENS
from jaxsim.kernels import octaves
from tests.engine import cases as c
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

LANE = 2.0**-14
"""Seconds that all numbers are multiples of."""

MOST_TOKENS = 256

NAMES = ("read_s", "stream_s", "in_s", "out_s", "prompt_in_s", "prompt_out_s", "history_in_s", "hand_over_s",
         "decode_hand_over_s")


def draw(rng: np.random.Generator, flags: simulator.Flags, dims, is_chained: bool) -> tuple[c.Case, dict]:
    """A crowded case, and the numbers of its lanes; some GPU lanes are slow, some links, some CPUs."""
    case = c.draw(rng, c.MOST_REQUESTS, dims.num_slots, dims.block_size, flags)
    # In half of the cases the GPU takes no time.
    scale = int(rng.integers(0, 2))
    case = replace(case, coefficients=tuple(tuple(scale * x for x in row) for row in case.coefficients))
    most = dict(read_s=2**5, stream_s=2**11, in_s=2**7, out_s=2**10, prompt_in_s=2**6, prompt_out_s=2**8,
                history_in_s=2**4, hand_over_s=2**10, decode_hand_over_s=2**10)
    numbers = {name: LANE * int(rng.integers(0, most[name] + 1)) * int(rng.integers(0, 2)) for name in NAMES}
    numbers["stream_s"] += LANE * 2**7
    numbers["contention"] = float(rng.choice([0.0, 0.25, 0.5, 1.0]))
    # Of experts, a line with a bend, at every knot a multiple.
    knots = octaves.knots(TOKENS, MOST_TOKENS)
    bend, slopes = int(rng.integers(1, 60)), rng.integers(0, 2**5, 2) * int(rng.integers(0, 2))
    numbers["experts"] = LANE * (slopes[0] * np.minimum(knots, bend) + slopes[1] * np.maximum(knots - bend, 0))
    # What the link loses to them is not in proportion: those bound by FLOP take nothing from it.
    numbers["expert_lost"] = LANE * int(rng.integers(0, 2**5)) * np.minimum(knots, bend) * bool(slopes.any())
    cost = HybridCost(gpu=jax.device_get(fitted(*case.coefficients)), is_chained=is_chained,
                      expert_s=numbers["experts"].astype(np.float32), contention=np.float32(numbers["contention"]),
                      expert_lost_s=numbers["expert_lost"].astype(np.float32),
                      **{name: np.float32(numbers[name]) for name in NAMES})
    return replace(case, cost=cost), numbers


def in_float64(case: c.Case, n: dict, is_chained: bool, seen: dict):
    """Seconds of an iteration as a sum or maximum of four lanes."""
    gpu = c.dyadic_cost(case)
    knots = octaves.knots(TOKENS, MOST_TOKENS)

    def seconds(s: simulator.BatchStatsRef) -> float:
        tokens = s.num_decode + s.prefill_tokens
        reads = n["read_s"] * s.decode_context
        lost = float(np.interp(tokens, knots, n["expert_lost"]))
        handed = n["hand_over_s"] + (n["decode_hand_over_s"] if s.num_decode else 0.0)
        experts = float(np.interp(tokens, knots, n["experts"]))
        moved = n["in_s"] * s.num_decode + n["prompt_in_s"] * s.prefill_tokens
        moved += n["history_in_s"] * (s.prefill_context - s.prefill_tokens)
        lanes = (gpu(s), handed + reads + experts, n["stream_s"] + moved + n["contention"] * reads + lost,
                 n["out_s"] * s.num_decode + n["prompt_out_s"] * s.prefill_tokens)
        assert tokens <= MOST_TOKENS
        seen["longest"][int(np.argmax(lanes))] += 1
        seen["contended"] += n["contention"] * reads > 0
        seen["lost_to_experts"] += lost > 0
        seen["handed_without_decodes"] += n["decode_hand_over_s"] > 0 and not s.num_decode
        seen["histories"] += n["history_in_s"] * (s.prefill_context - s.prefill_tokens) > 0
        return sum(lanes) if is_chained else max(lanes)

    return seconds


@pytest.mark.parametrize("is_chained", [pytest.param(False, id="overlapped"),
                                        pytest.param(True, id="chained", marks=pytest.mark.slow)])
def test_engine_equals_reference(is_chained):
    flags = simulator.preset("vllm-v1")
    dims = c.dims_of("vllm-v1", 1)
    seen = dict(longest=np.zeros(4, int), contended=0, lost_to_experts=0, handed_without_decodes=0, histories=0,
                preemptions=0, ties=0, switches=0, requests=0)
    for seed in c.seeds(2, 40):
        rng = np.random.default_rng(seed)
        drawn = [draw(rng, flags, dims, is_chained) for _ in range(c.LANES)]
        batch = [case for case, _ in drawn]

        def compared(some, drawn=drawn):
            ours = c.simulate(some, flags, dims, "round_robin", lanes=c.LANES)
            results, wrong = [], []
            for case, lane in zip(some, ours, strict=True):
                n = next(n for one, n in drawn if one.cost is case.cost)
                before = seen["longest"].copy()
                result = c.reference(case, flags, dims, "round_robin", in_float64(case, n, is_chained, seen))
                seen["switches"] += int((seen["longest"] > before).sum() > 1)
                results.append(result)
                wrong.append(c.differences(lane, c.answer(result, 1, case.limits["num_blocks"])))
            return results, wrong

        for result in c.agree(seed, batch, compared):
            seen["preemptions"] += sum(r.preemptions for r in result.requests)
            seen["ties"] += result.num_exact_ties
            seen["requests"] += len(result.requests)
    # Every lane is the longest somewhere, and another one later in many runs.
    assert (seen["longest"] > 400).all(), seen
    # A sum of four lanes seldom ends when somebody arrives.
    often = ("contended", "lost_to_experts", "handed_without_decodes", "histories", "preemptions",
             *(() if is_chained else ("ties",)))
    assert min(seen[name] for name in often) > 30, seen
    assert is_chained or seen["switches"] > seen["requests"] / 100, seen
