"""Routers that know prompts, for the reference: each looks at lists of requests and blocks, and at nothing else.

A router is a function (request, instances, requests routed so far) -> index, as in `routing`; those that remember what
they sent are objects, one a run.
"""

import math
from collections.abc import Sequence

import numpy as np

from .prefix_cache import Request as CacheRequest
from .state import Instance, Request

F = np.float32


def cached(request: Request, instance: Instance) -> int:
    """Tokens of its prompt that the instance would find now."""
    return instance.cache.lookup(CacheRequest(("routed", request.id), request.prefix_hashes, request.prompt))


def drawn(uniform: float, candidates: Sequence[int]) -> int:
    """One of them by a random number."""
    return candidates[min(int(F(uniform) * F(len(candidates))), len(candidates) - 1)]


def shortest_queue(instances: Sequence[Instance]) -> int:
    return min(range(len(instances)), key=lambda i: (instances[i].outstanding, i))


class CacheAware:
    """SGLang's: a set of all prefixes that were sent to each instance, in blocks."""

    def __init__(self, num_instances: int, block_size: int, threshold: float, balance_abs: float, balance_rel: float,
                 smallest_tree: bool):
        self.block_size, self.threshold, self.smallest_tree = block_size, threshold, smallest_tree
        self.balance_abs, self.balance_rel = balance_abs, balance_rel
        self.sent: list[set[tuple]] = [set() for _ in range(num_instances)]
        self.tokens = [0] * num_instances
        self.reasons: list[str] = []

    def __call__(self, request: Request, instances: Sequence[Instance], num_routed: int) -> int:
        loads = [i.outstanding for i in instances]
        hashes = request.prefix_hashes[: request.prompt // self.block_size]
        prefixes = [hashes[: n + 1] for n in range(len(hashes))]
        matched = [self.block_size * sum(p in sent for p in prefixes) for sent in self.sent]
        most = max(matched)
        if max(loads) - min(loads) > self.balance_abs and max(loads) > self.balance_rel * min(loads):
            chosen, why = shortest_queue(instances), "uneven"
        elif F(most) > F(self.threshold) * F(request.prompt):
            chosen, why = drawn(request.uniforms[0], [i for i, n in enumerate(matched) if n == most]), "match"
        elif self.smallest_tree:
            least = min(self.tokens)
            chosen, why = drawn(request.uniforms[0], [i for i, n in enumerate(self.tokens) if n == least]), "tree"
        else:
            chosen, why = shortest_queue(instances), "queue"
        self.sent[chosen].update(prefixes)
        self.tokens[chosen] += request.prompt - matched[chosen]
        self.reasons.append(why)
        return chosen


class PrefixHash:
    """SGLang's: the home of a request, unless too much is outstanding there."""

    def __init__(self, homes: Sequence[int], load_factor: float):
        self.homes, self.load_factor, self.reasons = homes, load_factor, []

    def __call__(self, request: Request, instances: Sequence[Instance], num_routed: int) -> int:
        loads, home = [i.outstanding for i in instances], int(self.homes[request.id])
        bound = F(self.load_factor) * (F(sum(loads) + 1) / F(len(loads)))
        if sum(loads) == 0 or loads[home] <= bound:
            self.reasons.append("home")
            return home
        fine = [i for i, load in enumerate(loads) if load <= bound]
        self.reasons.append("elsewhere")
        return min(fine, key=lambda i: (loads[i], i)) if fine else home


class KvAware:
    """The vLLM production stack's: the share found, less how far the load is above the mean."""

    def __init__(self, beta: float):
        self.beta, self.reasons = beta, []

    def __call__(self, request: Request, instances: Sequence[Instance], num_routed: int) -> int:
        loads, found = [i.outstanding for i in instances], [cached(request, i) for i in instances]
        mean = F(sum(loads)) / F(len(loads))
        scores = [F(self.beta) * ((F(load) - mean) / max(mean, F(1))) - F(tokens) / F(request.prompt)
                  for load, tokens in zip(loads, found, strict=True)]
        self.reasons.append("cached" if len(set(found)) > 1 else "alike")
        return int(np.argmin(scores))


class DynamoKV:
    """Dynamo's: blocks to compute before a first token, and in use; what was cached is asked when a prompt is sent."""

    def __init__(self, noise: np.ndarray, overlap_weight: float, temperature: float):
        self.noise, self.overlap_weight, self.temperature = noise, overlap_weight, temperature
        self.uncached: dict[int, int] = {}
        self.reasons: list[str] = []

    def cost(self, request: Request, instance: Instance) -> np.float32:
        def blocks(tokens):
            return math.ceil(tokens / instance.flags.block_size)

        jobs = [job for job in instance.waiting + instance.running if job.first_token is None]
        prefill = blocks(sum(self.uncached[job.request.id] for job in jobs)) + blocks(request.prompt)
        overlap = F(self.overlap_weight) * F(cached(request, instance) // instance.flags.block_size)
        used = instance.flags.num_blocks - instance.free_blocks
        return max(F(prefill) - overlap, F(0)) + F(used + blocks(request.prompt))

    def __call__(self, request: Request, instances: Sequence[Instance], num_routed: int) -> int:
        costs = np.array([self.cost(request, i) for i in instances], F)
        scaled = (costs - costs.min()) / max(costs.max() - costs.min(), F(1e-6))
        chosen = int(np.argmin(scaled - F(self.temperature) * self.noise[request.id].astype(F)))
        self.uncached[request.id] = request.prompt - cached(request, instances[chosen])
        self.reasons.append("least" if chosen == int(np.argmin(costs)) else "drawn")
        return chosen


class WeightedScorers:
    """llm-d's: shares of the prompt found, of the queue not there, of blocks free."""

    def __init__(self, prefix_weight: float, queue_weight: float, kv_weight: float):
        self.weights, self.reasons = (F(prefix_weight), F(queue_weight), F(kv_weight)), []

    def __call__(self, request: Request, instances: Sequence[Instance], num_routed: int) -> int:
        queues = [len(i.waiting) for i in instances]
        scores = []
        for instance, queue in zip(instances, queues, strict=True):
            span = max(queues) - min(queues)
            short = F(1) if not span else F(max(queues) - queue) / F(span)
            used = F(instance.flags.num_blocks - instance.free_blocks) / F(instance.flags.num_blocks)
            found = F(cached(request, instance)) / F(request.prompt)
            scores.append(self.weights[0] * found + self.weights[1] * short + self.weights[2] * (F(1) - used))
        best = [i for i, score in enumerate(scores) if score == max(scores)]
        self.reasons.append("tie" if len(best) > 1 else "best")
        return drawn(request.uniforms[0], best)
