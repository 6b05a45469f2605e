"""Cases of DistServe's public simulator, computed by the event engine: prefill and decode engines, and its vLLM.

Case A is one request, B eight, C three hundred with a pattern of lengths, D three hundred with heavy-tailed lengths,
of which the goodput per GPU is searched by bisection, as its tool does: in 0 to 5 requests/s and GPU down to a width
of 0.05, where P90 of TTFT and P90 of TPOT are, separately, under their limits. In A and B so many others follow when
all is over that every case has three hundred requests, and few programs are compiled.

An output of n tokens there is n + 1 here: it does not count the first. Lengths and arrivals of D are additive
recurrences through the quantiles of a normal and an exponential law.
"""

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from jaxsim.cost.simdistserve import CAPACITY, CHAT_LIMITS_MS, Degrees, Engines, cost_section, pair
from jaxsim.engine.simulate import simulate
from jaxsim.metrics import LaneResult
from jaxsim.reproduce.claim import RISES, Claim
from jaxsim.spec.scenario import Scenario

SOURCE = "its public simulator"

Plan = tuple[int, int, int, int] | int
"""TP and PP of prefill, then of decode; or TP of its vLLM."""

NUM_REQUESTS = 300
LATER_S = 1e4
"""When those come who only fill the arrays."""

WITHIN_MS = 1e-3
"""Of every published time of cases A to C; of the one that is shown, a hundred-thousandth is no more than that."""

SHOWN, DIGITS = 1e-5, 0.005
"""Relative tolerances: of that one; of case D, which has three digits, of rates that are at least 1.1 % apart."""

GOODPUT: tuple[tuple[str, Plan, float], ...] = (
    ("opt-13b", (1, 1, 1, 1), 3.320), ("opt-13b", (2, 1, 1, 1), 2.617), ("opt-13b", (1, 1, 2, 1), 2.188),
    ("opt-13b", (2, 1, 2, 1), 3.477), ("opt-66b", (4, 1, 2, 2), 0.586), ("opt-66b", (4, 1, 4, 1), 0.586),
    ("opt-13b", 1, 0.0), ("opt-13b", 2, 2.109), ("opt-13b", 4, 1.602), ("opt-66b", 4, 0.0), ("opt-66b", 8, 0.352))
"""Case D, requests/s and GPU."""

WIDEST, WIDTH = 5.0, 0.05


def claims() -> list[Claim]:
    """All cases, and the ratios that follow from D."""
    with tempfile.TemporaryDirectory() as name:
        folder, expected = Path(name), _expected()
        # Together, so that each program is compiled once.
        made = [replayed(folder, system(model, plan), *requests) for _, model, plan, requests, _, _ in _CASES]
        lanes = simulate([*made, *(_heavy_tailed_at(folder, *one) for one in expected)]).lanes
        known = dict(zip(expected, lanes[len(made):], strict=True))
        return [*_cases(lanes[:len(made)]), *_goodputs(folder, known)]


def system(model: str, plan: Plan, rate_rps: float = 1.0) -> Scenario:
    """The engines of a plan, with a workload that is to be replaced."""
    base = Scenario.from_dict({
        "schema_version": 1, "num_seeds": 1, "cost": cost_section("vllm", model, 4),
        "engine": {"preset": "distserve-sim-vllm", "num_gpu_blocks_override": 1, "max_model_len": 4096},
        "workload": {"kind": "deterministic", "rate_rps": rate_rps, "input": 1, "output": 1}})
    if isinstance(plan, int):
        tree = base.to_dict() | {"cost": cost_section("vllm", model, plan)}
        tree["engine"]["max_num_batched_tokens"] = CAPACITY[model, plan, 1]
        return Scenario.from_dict(tree)
    both = Degrees(*plan[:2]), Degrees(*plan[2:])
    # Its prefills are limited by the room of a prefill engine; the decode engine's is never asked for.
    tokens = CAPACITY[model, *both[0]]
    return pair(base, *((degrees, Engines(cost_section("distserve", model, *degrees), tokens)) for degrees in both))


def replayed(folder: Path, of: Scenario, arrival_s: Any, prompts: Any, outputs: Any) -> Scenario:
    """A system under these requests; outputs as the public simulator counts them."""
    path = folder / f"{len(list(folder.iterdir()))}.csv"
    pd.DataFrame({"arrival_s": arrival_s, "input_tokens": prompts, "output_tokens": np.asarray(outputs) + 1}).to_csv(
        path, index=False)
    tree = of.to_dict() | {"workload": {"kind": "trace", "trace": str(path)}}
    return Scenario.from_dict(tree)


def times_ms(lane: LaneResult) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """TTFT, decode time and TPOT of each request."""
    decode = 1e3 * (lane.finish_s - lane.first_token_s)
    return 1e3 * (lane.first_token_s - lane.arrival_s), decode, decode / (lane.output_tokens - 1)


def _padded(arrival_s: np.ndarray, prompts: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, ...]:
    more = NUM_REQUESTS - len(arrival_s)
    later = LATER_S + np.arange(more)
    return np.append(arrival_s, later), np.append(prompts, np.full(more, 8)), np.append(outputs, np.full(more, 1))


def _pattern(rate_rps: float) -> tuple[np.ndarray, ...]:
    i = np.arange(NUM_REQUESTS)
    return i / rate_rps, 64 + (397 * i) % 1900, 16 + (131 * i) % 400


def _quantiles(lane: LaneResult) -> tuple[float, ...]:
    ttft, _, tpot = times_ms(lane)
    return (*np.quantile(ttft, (0.5, 0.9)), *np.quantile(tpot, (0.5, 0.9)), 1e3 * lane.finish_s.max())


def _first(lane: LaneResult, count: int) -> tuple[float, ...]:
    ttft, decode, _ = times_ms(lane)
    return (*ttft[:count], *decode[:count])


_ONE = _padded(np.zeros(1), np.array([512]), np.array([4]))
_EIGHT = _padded(0.04 * np.arange(8), np.array([128, 1024] * 4), np.full(8, 16))
_SPLIT, _WIDE, _DEEP = (1, 1, 1, 1), (2, 1, 1, 1), (4, 1, 2, 2)

_CASES: tuple[tuple[str, str, Plan, tuple, Callable, tuple[float, ...]], ...] = (
    ("A, OPT-13B", "opt-13b", _SPLIT, _ONE, functools.partial(_first, count=1), (75.1999, 89.3885)),
    ("A, OPT-66B, prefill TP4, decode TP2 PP2", "opt-66b", _DEEP, _ONE, functools.partial(_first, count=1),
     (112.1655, 203.8072)),
    ("B, OPT-13B", "opt-13b", _SPLIT, _EIGHT, functools.partial(_first, count=8),
     (34.2768, 133.0313, 252.4112, 212.4112, 172.4112, 390.5456, 350.5456, 310.5456,
      362.3331, 390.0787, 400.2780, 400.2780, 400.2780, 402.3566, 402.3566, 402.3566)),
    ("C, OPT-13B, 2 requests/s", "opt-13b", _SPLIT, _pattern(2), _quantiles,
     (131.576, 223.660, 35.638, 37.962, 160539.045)),
    ("C, OPT-13B, prefill TP2, 2 requests/s", "opt-13b", _WIDE, _pattern(2), _quantiles,
     (89.717, 146.783, 35.639, 37.964, 160497.390)),
    ("C, OPT-13B, 4 requests/s", "opt-13b", _SPLIT, _pattern(4), _quantiles,
     (131.576, 223.660, 89.495, 114.917, 99217.459)),
    ("C, OPT-13B on its vLLM, 4 requests/s", "opt-13b", 1, _pattern(4), _quantiles,
     (205.345, 333.301, 376.598, 600.502, 151850.783)))
"""Cases A to C: name, model, plan, requests, which times are published, and these, ms."""


def _cases(runs: Sequence[list[LaneResult]]) -> list[Claim]:
    found = []
    for (name, _, _, _, read, want), lanes in zip(_CASES, runs, strict=True):
        got = read(lanes[0])
        # Of all numbers of a case, how far the worst is off.
        off = float(np.max(np.abs(np.subtract(got, want))))
        first, others = ("P50 of TTFT", "P90, TPOT and makespan") if read is _quantiles else ("TTFT", "all other times")
        found.append(Claim(
            system="distserve", claim=f"case {name}: {first}, ms; {others} within {WITHIN_MS:g} ms", source=SOURCE,
            paper=want[0], ours=float(got[0]) if off <= WITHIN_MS else float("nan"), tolerance=SHOWN,
            reason="" if off <= WITHIN_MS else f"{off:.3g} ms off"))
    return found


def heavy_tailed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrivals at one request/s, prompts and outputs of case D."""
    def uniform(step: float) -> np.ndarray:
        return (np.arange(1, NUM_REQUESTS + 1) * step) % 1.0

    normal = np.vectorize(NormalDist().inv_cdf)
    prompts = np.clip(np.exp(6.2 + 1.0 * normal(uniform(0.6180339887498949))), 4, 1800).astype(int)
    outputs = np.exp(4.9 + 0.9 * normal(uniform(0.7548776662466927)))
    outputs = np.minimum(np.maximum(outputs, 4), 2047 - prompts).astype(int)
    return np.cumsum(-np.log(1 - uniform(0.5698402909980532))), prompts, outputs


def bisected(is_met: Callable[[float], bool]) -> float:
    """The highest rate that is met, by bisection as the tool does it."""
    low, high = 0.0, WIDEST
    while high - low > WIDTH:
        middle = (low + high) / 2
        low, high = (middle, high) if is_met(middle) else (low, middle)
    return low


def num_gpus(plan: Plan) -> int:
    """Of all engines."""
    return plan if isinstance(plan, int) else plan[0] * plan[1] + plan[2] * plan[3]


def _heavy_tailed_at(folder: Path, model: str, plan: Plan, rate: float) -> Scenario:
    """Case D at a rate a GPU."""
    arrivals, prompts, outputs = heavy_tailed()
    return replayed(folder, system(model, plan), arrivals / (rate * num_gpus(plan)), prompts, outputs)


def _expected() -> list[tuple[str, Plan, float]]:
    """Rates on the way to the published answers."""
    expected: list[tuple[str, Plan, float]] = []
    for model, plan, published in GOODPUT:
        def follow(rate: float, model=model, plan=plan, published=published) -> bool:
            expected.append((model, plan, rate))
            return rate <= published + WIDTH / 4
        bisected(follow)
    return expected


def goodputs(folder: Path, known: dict[tuple[str, Plan, float], list[LaneResult]]) -> dict[tuple[str, Plan], float]:
    """Case D by system, requests/s and GPU; known: runs at some rates, any other that a bisection asks for is simulated
    when it does."""
    def is_met(model: str, plan: Plan, rate: float) -> bool:
        if (model, plan, rate) not in known:
            (known[model, plan, rate],) = simulate([_heavy_tailed_at(folder, model, plan, rate)]).lanes
        ttft, _, tpot = times_ms(known[model, plan, rate][0])
        limits = CHAT_LIMITS_MS[model]
        return bool(np.quantile(ttft, 0.9) < limits[0] and np.quantile(tpot, 0.9) < limits[1])

    return {(model, plan): bisected(functools.partial(is_met, model, plan)) for model, plan, _ in GOODPUT}


def _label(plan: Plan) -> str:
    if isinstance(plan, int):
        return f"its vLLM TP{plan}"
    return f"prefill {Degrees(*plan[:2])}, decode {Degrees(*plan[2:])}"


def _goodputs(folder: Path, known: dict[tuple[str, Plan, float], list[LaneResult]]) -> list[Claim]:
    found = goodputs(folder, known)
    claims = [Claim(
        system="distserve", claim=f"case D, {model.upper()}, {_label(plan)}: requests/s and GPU", source=SOURCE,
        paper=published, ours=found[model, plan], tolerance=DIGITS if published else 0.0)
        for model, plan, published in GOODPUT]
    for model in CHAT_LIMITS_MS:
        best = [max(found[m, plan] for m, plan in found if m == model and isinstance(plan, kind))
                for kind in (int, tuple)]
        claims += [
            Claim(system="distserve", claim=f"goodput of its vLLM, of DistServe, case D, {model.upper()}",
                  source="arXiv 2401.09670, order", paper=RISES, ours=tuple(best), tolerance=None,
                  reason="follows from the rows of case D above, whose lengths are not the paper's"),
            Claim(system="distserve", claim=f"ratio of the two, {model.upper()}; the paper: 2.0 to 4.6 on ShareGPT",
                  source="arXiv 2401.09670", paper=None, ours=best[1] / best[0], tolerance=None,
                  reason="the ratio depends on the lengths (theirs are not here; those of case D stand in)")]
    return claims
