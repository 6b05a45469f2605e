"""What a run says about itself: latencies, throughput, limits met, queueing, memory, fairness, energy, stability.

`lane` is one run, `result` several; what the numbers mean is said in `summary`.
"""

from jaxsim.metrics.fairness import fair_shares, fairness_of, token_weights
from jaxsim.metrics.lane import FINISHED, STATUS_NAMES, UNFINISHED, LaneResult, request_frame, transfer_begin
from jaxsim.metrics.limits import limits_ms
from jaxsim.metrics.power import Devices, devices_of, energy
from jaxsim.metrics.result import Interval, Result, combine, flatten, interval
from jaxsim.metrics.stability import FEWEST_FOR_TREND, is_unstable, unstable_rows, waiting_and_running_until
from jaxsim.metrics.summary import ABORTS, LATENCIES, PERCENTILES, lane_metrics, outages, outcomes
from jaxsim.metrics.window import is_measured, share_inside

__all__ = [
    "ABORTS", "Devices", "FEWEST_FOR_TREND", "FINISHED", "Interval", "LATENCIES", "LaneResult", "PERCENTILES",
    "Result", "STATUS_NAMES", "UNFINISHED", "combine", "devices_of", "energy", "fair_shares", "fairness_of", "flatten",
    "interval", "is_measured", "is_unstable", "lane_metrics", "limits_ms", "outages", "outcomes", "request_frame",
    "share_inside", "token_weights", "transfer_begin", "unstable_rows", "waiting_and_running_until",
]
