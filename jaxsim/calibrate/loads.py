"""Tokens that each local expert of the busiest rank gets under a published law of expert load.

Source: the load generator of ai-dynamo/aiconfigurator (power laws and a balanced load), whose draws are not published:
tables scatter by 10 to 25 % around these below one token an expert.
"""

import functools

import numpy as np
from jaxtyping import Float

from jaxsim.spec.efficiency import EXPERT_ROWS

DRAWS, TRIES = 3, 20
BALANCED = "balanced"


@functools.lru_cache(maxsize=1 << 16)
def tiles(tokens: int, num_experts: int, per_token: int, ranks: int, law: str, spread_largest: bool = False
          ) -> tuple[float, ...]:
    """Distinct local experts of the busiest of `ranks` ranks, rows routed to them, then tiles of each height in
    `EXPERT_ROWS` that these fill.

    law: "balanced" or "power_law_ALPHA". spread_largest: what rounding leaves goes to the largest experts in turn (the
    generator before vLLM 0.19), instead of to random ones. Means over `DRAWS` draws, the same in every run.
    """
    if law == BALANCED:
        pairs = max(tokens * per_token / ranks, 1)
        touched = min(num_experts // ranks, max(1, np.ceil(min(num_experts, tokens * per_token) / ranks)))
        return float(touched), float(pairs), *(float(touched * np.ceil(pairs / touched / t)) for t in EXPERT_ROWS)
    rng, found = np.random.default_rng([tokens, num_experts, per_token, ranks]), []
    for _ in range(DRAWS):
        loads = power_law(tokens, num_experts, per_token, float(law.rpartition("_")[2]), rng, spread_largest)
        loads = loads.reshape(ranks, -1)
        loads = loads[loads.sum(1).argmax()]
        found.append([(loads > 0).sum(), loads.sum(), *(np.ceil(loads / t).sum() for t in EXPERT_ROWS)])
    return tuple(np.maximum(np.mean(found, axis=0), 1.0).tolist())


def power_law(tokens: int, num_experts: int, per_token: int, alpha: float, rng: np.random.Generator,
              spread_largest: bool = False) -> Float[np.ndarray, " experts"]:
    """Tokens of each expert, summing to tokens x per_token where none exceeds `tokens`."""
    total, power = tokens * per_token, 1 - alpha
    low, high = (1, tokens * 0.8) if total > num_experts else (0.01, 2)
    for _ in range(TRIES):
        x = ((high ** power - low ** power) * rng.random(num_experts) + low ** power) ** (1 / power)
        x = np.floor(x / x.sum() * total + 0.5)
        missing = int(total - x.sum())
        largest = np.argsort(-x, kind="stable")
        if missing > 0:
            into = (largest[np.arange(missing) % num_experts] if spread_largest
                    else rng.integers(0, num_experts, missing))
            np.add.at(x, into, 1)
        elif missing < 0:
            np.add.at(x, largest[:-missing], -1)
        x = np.maximum(x, 0)
        if x.max() <= tokens:
            break
    return np.minimum(x, tokens)
