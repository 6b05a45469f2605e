"""Columns of a table for a steady state: what a study in closed form and a search for plans say of each system."""

import math
from typing import Any

from jaxsim.analytic.steady import Steady

STATE = ("running", "utilisation", "kv_share", "capacity_rps", "output_tokens_per_s")
"""Of a steady state, besides latencies."""


def columns(state: Steady, rate_rps: float, output_tokens: float, num_devices: int, usd_per_h: float | None
            ) -> dict[str, Any]:
    """Mean latencies in ms, `STATE` and is_stable at the load's rate; rate_within_limits, and tokens/s of a device and
    dollars a million tokens at it.

    rate_rps: requests/s up to which limits are kept; output_tokens: of a request, on average; usd_per_h: of a device,
    None where it has no price.
    """
    tokens_per_s = rate_rps * output_tokens
    return {**{f"{name}_ms": 1e3 * float(getattr(state, f"{name}_s")) for name in ("ttft", "tpot", "e2e")},
            **{name: float(getattr(state, name)) for name in STATE}, "is_stable": bool(state.is_stable),
            "rate_within_limits": rate_rps, "output_tokens_per_s_per_device": tokens_per_s / num_devices,
            "usd_per_million_output_tokens":
                1e6 * usd_per_h / 3600 * num_devices / tokens_per_s if usd_per_h and tokens_per_s else math.nan}
