"""Which requests, and how much of their service, are measured."""

import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxsim.metrics.lane import LaneResult


def measured_span_s(arrival_s: Float[np.ndarray, " requests"], warmup_s: float, cooldown_s: float
                    ) -> tuple[float, float]:
    """From when to when requests must arrive to be measured; without a cool-down, however late."""
    if not len(arrival_s):
        return 0.0, math.inf
    return float(arrival_s[0]) + warmup_s, float(np.nanmax(arrival_s)) - cooldown_s if cooldown_s else math.inf


def is_measured(lane: LaneResult, warmup_s: float, cooldown_s: float = 0.0) -> Bool[np.ndarray, " requests"]:
    """Requests that metrics are made of: those that arrive neither in the warm-up nor in the cool-down."""
    _, end_s = measured_span_s(lane.arrival_s, warmup_s, cooldown_s)
    return (lane.arrival_s - lane.arrival_s[:1] >= warmup_s) & (lane.arrival_s <= end_s)


def share_inside(first_s: Any, last_s: Any, start_s: Any, end_s: Any) -> Any:
    """Share of the time from first to last that lies in a window; of an instant, whether it does. NaN stays NaN."""
    length = last_s - first_s
    inside = np.minimum(last_s, end_s) - np.maximum(first_s, start_s)
    return np.where(length > 0, np.maximum(inside, 0.0) / np.where(length > 0, length, 1.0),
                    np.where(np.isnan(length), np.nan, inside >= 0))
