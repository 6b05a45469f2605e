"""Routers: plain functions (request, instances, requests routed so far) -> index."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from .migration import demand, headroom
from .state import Instance, Request


def round_robin(request: Request, instances: Sequence[Instance], num_routed: int) -> int:
    """In turn."""
    return num_routed % len(instances)


def random_choice(request: Request, instances: Sequence[Instance], num_routed: int) -> int:
    """By the request's first uniform."""
    return math.floor(request.uniforms[0] * len(instances))


def least_outstanding(request: Request, instances: Sequence[Instance], num_routed: int) -> int:
    """Fewest outstanding requests, whatever they wait for, ties to the lowest index."""
    return min(range(len(instances)), key=lambda i: (instances[i].outstanding, i))


def power_of_two(request: Request, instances: Sequence[Instance], num_routed: int) -> int:
    """The less loaded of two different instances drawn by the request's uniforms, ties to the first drawn."""
    if len(instances) == 1:
        return 0
    first = math.floor(request.uniforms[0] * len(instances))
    second = math.floor(request.uniforms[1] * (len(instances) - 1))
    if second >= first:
        second += 1
    return second if instances[second].outstanding < instances[first].outstanding else first


def least_kv(request: Request, instances: Sequence[Instance], num_routed: int) -> int:
    """Most free blocks, which are the fewest used where pools are of equal size; ties to the lowest index."""
    return min(range(len(instances)), key=lambda i: (-instances[i].free_blocks, i))


def fewest_prefills(request: Request, instances: Sequence[Instance], num_routed: int) -> int:
    """Fewest prompts that wait or are in the first stage, ties to the lowest index (simdistserve)."""

    def prefills(instance: Instance) -> int:
        return len(instance.waiting) + sum(not job.is_prefilled for job, _ in instance.on_first_stage)

    return min(range(len(instances)), key=lambda i: (prefills(instances[i]), i))


def fewest_queued_decodes(request: Request, instances: Sequence[Instance], num_routed: int) -> int:
    """Fewest decodes that are in no stage, ties to the lowest index (simdistserve)."""

    def queued(instance: Instance) -> int:
        in_no_stage = sum(not job.pending for job in instance.running)
        return in_no_stage + len(instance.unaccepted) + len(instance.in_transfer)

    return min(range(len(instances)), key=lambda i: (queued(instances[i]), i))


def freest(request: Request, instances: Sequence[Instance], num_routed: int) -> int:
    """Most blocks a running request when the head of the queue has its own (Llumnix), ties to the lowest index."""

    def freeness(instance: Instance) -> Fraction:
        wanted = sum(demand(job, instance) for job in instance.waiting[:1])
        wanted += headroom(instance)
        return Fraction(instance.free_blocks - wanted, max(1, len(instance.running) + len(instance.ready)))

    return max(range(len(instances)), key=lambda i: (freeness(instances[i]), -i))


def most_remaining_steps(request: Request, instances: Sequence[Instance], num_routed: int) -> int:
    """Most blocks a request when all that wait have theirs; an empty instance first; ties to the lowest index."""

    def steps(instance: Instance) -> Fraction | float:
        number = len(instance.running) + len(instance.ready) + len(instance.waiting)
        wanted = sum(demand(job, instance) for job in instance.waiting)
        return Fraction(instance.free_blocks - wanted, number) if number else math.inf

    return max(range(len(instances)), key=lambda i: (steps(instances[i]), -i))


Router = Callable[[Request, Sequence[Instance], int], int]
ROUTERS: dict[str, Router] = {
    "round_robin": round_robin,
    "random": random_choice,
    "least_outstanding": least_outstanding,
    "power_of_two": power_of_two,
    "least_kv": least_kv,
    "llumnix_load": freest,
    "remaining_steps": most_remaining_steps,
}
