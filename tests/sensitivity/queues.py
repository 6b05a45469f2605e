"""A single server whose waiting times theory knows, as scenarios.

One request at a time, in the order of arrival; a request is one prompt, and its service takes a time for each of its
tokens. Poisson arrivals and a law of lengths are M/G/1 (Pollaczek and Khinchine): with load u = rate E[S],

    W = rate E[S^2] / (2 (1 - u)),    d ln W / d ln rate = 1 / (1 - u),    d ln W / d ln S = 2 + u / (1 - u)
"""

import math

import numpy as np

from jaxsim.spec.scenario import Scenario

TOKENS, TOKEN_S = 256, 2.0**-15
SERVICE_S = TOKENS * TOKEN_S
LEVELS = np.concatenate([np.linspace(0, 1, 129)[:-1], 1 - 2.0 ** -np.arange(8.0, 12.0), [1.0]])
"""Of the quantiles of a nearly exponential law, finer in the tail."""


def exponential_table() -> dict:
    tail = np.append(-np.log1p(-LEVELS[:-1]), -math.log(2.0**-12))
    return {"kind": "quantiles", "levels": LEVELS.tolist(),
            "tokens": np.maximum(np.round(TOKENS * tail), 1).astype(int).tolist()}


LAWS = {"M/D/1": TOKENS, "M/G/1": {"kind": "uniform", "min_tokens": 1, "max_tokens": 2 * TOKENS - 1},
        "M/M/1": exponential_table()}


def moments(law: str) -> tuple[float, float]:
    """Mean and mean square of the tokens: exact, of a quantile function linear between its knots, rounding apart."""
    if law == "M/D/1":
        return TOKENS, TOKENS**2
    if law == "M/G/1":
        count = 2 * TOKENS - 1
        return TOKENS, TOKENS**2 + (count**2 - 1) / 12
    low, high = (np.array(LAWS[law]["tokens"], float)[at] for at in (slice(None, -1), slice(1, None)))
    weight = np.diff(LEVELS)
    return float(weight @ (low + high) / 2), float(weight @ (low**2 + low * high + high**2) / 3)


def scenario(law: str = "M/D/1", load: float = 0.5, *, kind: str = "poisson", num_requests: int = 1000,
             num_seeds: int = 8, seed: int = 0, **fields) -> Scenario:
    mean, _ = moments(law)
    return Scenario.from_dict({
        "schema_version": 1, "name": f"{law} {load}", "num_seeds": num_seeds,
        "engine": {"preset": "vllm-v1", "max_num_seqs": 1, "max_num_batched_tokens": 4096, "max_model_len": 4096,
                   "num_gpu_blocks_override": 1024, "async_scheduling": False},
        "workload": {"kind": kind, "rate_rps": load / (mean * TOKEN_S), "num_requests": num_requests, "seed": seed,
                     "input": LAWS[law], "output": 1},
        "cost": {"kind": "fitted", "prefill": {"b": TOKEN_S}, "decode": {"a": TOKEN_S}}} | fields)


def wait_s(law: str, load: float, rate: float = 1.0, service: float = 1.0) -> float:
    """Mean waiting time with rate and service so many times those of `load`."""
    mean, square = moments(law)
    u = load * rate * service
    return rate * load / (mean * TOKEN_S) * square * (TOKEN_S * service) ** 2 / (2 * (1 - u))


def time_s(law: str, load: float, rate: float = 1.0, service: float = 1.0) -> float:
    """Mean time in the system."""
    return wait_s(law, load, rate, service) + moments(law)[0] * TOKEN_S * service


def elasticity(law: str, load: float, metric: str, field: str, step: float) -> float:
    """Of the theory, by a central difference with the same step; the derivative itself where the step is 0."""
    form = wait_s if metric == "queueing.mean_ms" else time_s
    moved = "rate" if field == "workload.rate_rps" else "service"
    if step:
        up, down = (form(law, load, **{moved: math.exp(sign * step)}) for sign in (1, -1))
        return math.log(up / down) / (2 * step)
    of_wait = 1 / (1 - load) + (moved == "service")
    if form is wait_s:
        return of_wait
    whole = time_s(law, load)
    return (wait_s(law, load) * of_wait + (whole - wait_s(law, load)) * (moved == "service")) / whole
