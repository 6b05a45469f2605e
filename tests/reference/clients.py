"""Clients that do not wait for ever, clusters that refuse, instances that fail: the rules, and what a sending comes to.

A client sends its request, and again from scratch when a sending ended without an answer and it has sendings left.
Every sending is a job of its own, so that one whose client is gone can still be in a batch while the next one waits. A
request is then what its last sending came to, from the first one on.

Who waits and is given up leaves the queue. Who is in an iteration leaves when that ends, gives its blocks back and
emits nothing; between iterations it leaves at once.

Events at one instant: ends of iterations, timeouts by request, arrivals by request, scheduling passes.
"""

from dataclasses import dataclass

PHASE_TIMEOUT = 1.5  # behind the ends of iterations, before arrivals


@dataclass(frozen=True)
class Clients:
    """backoff_s: how long after each sending but the last that ended without an answer the next one comes. max_waiting:
    in the queue of an instance, and max_outstanding: anywhere in the cluster, beyond which who comes is refused."""

    backoff_s: tuple[float, ...] = ()
    max_waiting: float = float("inf")
    max_outstanding: float = float("inf")
