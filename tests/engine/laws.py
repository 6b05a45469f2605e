"""What must hold of every result, by what the engine says alone."""

import numpy as np

from tests.engine.cases import Case


def busy_seconds(starts: np.ndarray, ends: np.ndarray) -> float:
    """Measure of the union of intervals."""
    total, reach = 0.0, -np.inf
    for start, end in sorted(zip(starts, ends, strict=True)):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total


def broken_laws(case: Case, lane: dict, num_executors: int, *, rounding: float = 0.0) -> list[str]:
    """Names of the laws a result breaks; `rounding` is the relative error allowed to sums of durations."""
    arrival, n = case.arrival_s, len(case)
    on = [lane["instance"] == i for i in range(num_executors)]
    in_system = np.array([busy_seconds(arrival[m], lane["finish_s"][m]) for m in on])
    running = np.array([(lane["finish_s"] - lane["scheduled_s"] - lane["stalled_s"])[m].sum() for m in on])

    def near(a, b):
        return bool(np.all(np.abs(a - b) <= rounding * np.abs(b)))

    num_blocks = case.limits["num_blocks"]
    stamps = (arrival, lane["scheduled_s"], lane["first_token_s"], lane["finish_s"])
    laws = {
        "no fault": lane["fault"] == 0,
        "every request finishes, once": lane["finished"] == n,
        "an instance of the cluster": bool(np.all((lane["instance"] >= 0) & (lane["instance"] < num_executors))),
        "clocks do not run back": all(bool(np.all(a <= b)) for a, b in zip(stamps, stamps[1:], strict=False)),
        "blocks at the end": bool(np.all(lane["used_blocks"] == 0)),
        "blocks within the pool": bool(np.all((lane["peak_blocks"] >= 0) & (lane["peak_blocks"] <= num_blocks))),
        "work conservation": near(lane["busy_s"], in_system),
        "Little's law": near(lane["running_s"], running),
        "blocks times seconds": bool(np.all(lane["held_block_s"] <= lane["peak_blocks"] * lane["busy_s"]
                                            * (1 + 1e-6))),
        "stalls are of the preempted": bool(np.all((lane["stalled_s"] > 0) <= (lane["preemptions"] > 0))),
        "stalls lie in the time served": bool(np.all(
            lane["stalled_s"] <= lane["finish_s"] - lane["scheduled_s"])),
        "an iteration computes something": bool(np.all(
            lane["num_iterations"] <= [case.output[m].sum() * (1 + lane["preemptions"][m].sum())
                                       + case.prompt[m].sum() * (1 + lane["preemptions"][m].sum()) for m in on])),
        "seats": max_concurrency(lane) <= case.limits["max_num_seqs"] * num_executors,
    }
    return [name for name, holds in laws.items() if not holds]


def max_concurrency(lane: dict) -> int:
    """Most sequences at once past their first admission, of those never preempted."""
    calm = lane["preemptions"] == 0
    starts, ends = np.sort(lane["scheduled_s"][calm]), np.sort(lane["finish_s"][calm])
    return max((int(np.searchsorted(starts, s, "right") - np.searchsorted(ends, s, "right")) for s in starts),
               default=0)
