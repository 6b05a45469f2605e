"""The example that APEX+ is published with, by its own rules: Llama-3-70B on two H100, three plans.

Rules are those of `jaxsim.cost.apex`, quirks included; seconds of iterations are jaxsim's roofline's without a host, as
APEX+ has none, and decodes read 16 tokens of context, whatever they have. Its trace is not public. From its figures:
requests a second times seconds are 100 requests; tokens made and processed a second are 209 of output and 1,198 of
prompt on average; P50 and P95 of completion, at its TPOT, are outputs of 171 and 465 tokens; that the last leave P95 of
completion after the last arrival makes 2.4 requests a second.

    TP2      one queue, each iteration over both devices
    copied   a queue for each device's attention, one FFN over both: an iteration starts when both are ready
    PP2      a queue for each of two batches, whose clock runs by one stage's seconds; together as `pipeline_seconds`

Batches of a pipeline take turns, so all iterations together take twice as long as the clock by which requests arrive:
however fast its tokens are, it comes out at about half of the tokens a second, and twice the energy, of TP2.

Source: README of microsoft/apex_plus. Known gaps: how its copies of attention wait for each other is not published, nor
the spread of prompts, which is taken to be that of outputs.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsim.cost import apex
from jaxsim.cost.apex import ApexRequest, Iteration, ParallelPlan, Queue
from jaxsim.cost.base import BatchStats
from jaxsim.cost.rank import Roofline
from jaxsim.cost.roofline import roofline
from jaxsim.cost.tabulated import TabulatedCost
from jaxsim.planning import cells
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan

MODEL, DEVICE, DEVICE_BYTES = "llama-3-70b", "h100", 80 * apex.GIB

TP2, COPIED, PP2 = "TP2", "attention copied", "PP2"

PLANS = {TP2: ParallelPlan(1, 1, 1, 2, 1, 2), COPIED: ParallelPlan(1, 1, 2, 1, 1, 2),
         PP2: ParallelPlan(1, 2, 1, 1, 1, 1)}


class Figures(NamedTuple):
    """TTFT and TPOT, ms; output tokens/s; requests an iteration, of a batch of the pipeline; seconds that all
    iterations take, and those of them in which a stage waits for another."""

    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float
    requests: float
    total_s: float
    idle_s: float = 0.0


PUBLISHED = {TP2: Figures(200.707, 44.064, 336.752, 14.4, 62.06), COPIED: Figures(348.1, 50.885, 243.242, 15.4, 85.92),
             PP2: Figures(279.278, 62.767, 163.343, 5.6, 127.95, 10.46)}
"""Source: README of microsoft/apex_plus."""

PUBLISHED_KJ = {TP2: 75.69, COPIED: 85.91, PP2: 158.52}

PARAMETER_GIB = {TP2: 63.8, COPIED: 75.0, PP2: 63.8}

NUM_REQUESTS, RATE_RPS = 100, 2.4

PROMPT_TOKENS, OUTPUT_TOKENS, SIGMA = 1198.0, 209.0, 0.61
"""Means, and standard deviation of the logarithm: 465 / 171 = exp(1.645 sigma). The rate: 100 / (62.06 s - 20.69 s)."""

DECODE_CONTEXT = 16
"""Tokens that a decode's attention is looked up with. Source: released code of APEX+."""


def trace(seed: int) -> list[ApexRequest]:
    """Poisson arrivals, log-normal lengths."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / RATE_RPS, NUM_REQUESTS))
    prompts, outputs = (np.maximum(np.round(mean * np.exp(SIGMA * rng.standard_normal(NUM_REQUESTS) - SIGMA**2 / 2)), 1)
                        for mean in (PROMPT_TOKENS, OUTPUT_TOKENS))
    return [ApexRequest(float(t), int(p), int(o)) for t, p, o in zip(arrivals, prompts, outputs, strict=True)]


def num_fits() -> int:
    """Plans of two devices that hold the model and a token, by its rule of memory."""
    model = load_model(MODEL)
    return sum(apex.capacity_tokens(model, plan, DEVICE_BYTES) > 0 for plan in apex.candidate_plans(model, 2))


def parameter_gib(name: str) -> float:
    """Of a device, by its rule."""
    return apex.parameter_bytes(load_model(MODEL), PLANS[name]) / apex.GIB


def capacity(name: str) -> int:
    """KV tokens of a queue, by its rule."""
    return apex.capacity_tokens(load_model(MODEL), PLANS[name], DEVICE_BYTES)


Seconds = Callable[[Iteration], float]


def tables(plan: Plan) -> Roofline:
    """Of a plan, without a host."""
    return roofline(load_model(MODEL), load_device(DEVICE), plan, "bfloat16", host="none", all_reduce="nccl")


SIZES = (apex.MAX_INPUT_TOKENS, 128)
"""Most tokens and sequences of an iteration that are priced; more sequences cost as the most."""


def _stats(iteration: Iteration) -> tuple[int, int, int, float]:
    """Decodes, prompts, tokens of these, and their squares."""
    prompts = [tokens for tokens, context in zip(iteration.inputs, iteration.contexts, strict=True) if not context]
    return len(iteration.inputs) - len(prompts), len(prompts), sum(prompts), float(sum(p * p for p in prompts))


@functools.cache
def pricing() -> dict[str, tuple[Seconds, Callable[[bool, int, int], float]]]:
    """By plan, seconds of one queue's iteration on its devices (of one stage), and what all queues do together."""
    plans = Plan(), Plan(tensor_parallel_size=2), Plan(pipeline_parallel_size=2)
    # Operator by operator, as a table is read more often than made.
    with jax.disable_jit():
        single, tensor, pipeline = map(tables, plans)
        made = {TP2: tensor.tabulate(*SIZES), COPIED: cells.cell_tables(single, tensor, *SIZES),
                PP2: pipeline.tabulate(*SIZES)}
    return {name: _priced(table, PLANS[name].stages) for name, table in made.items()}


def _priced(table: TabulatedCost, stages: int) -> tuple[Seconds, Callable[[bool, int, int], float]]:
    @jax.jit
    def own(decodes, prompts, tokens, pairs):
        return table.iteration(BatchStats(decodes, decodes * DECODE_CONTEXT, prompts, tokens, tokens, pairs,
                                          decodes + prompts, jnp.int32(0), jnp.int32(DECODE_CONTEXT))) / stages

    shared = jax.jit(lambda is_decode, tokens, most: table.together_seconds(is_decode, tokens, most))
    # Most iterations are decodes alone, whose contexts do not matter.
    own_s, shared_s = (functools.cache(lambda *what, ask=ask: float(ask(*what))) for ask in (own, shared))
    return lambda iteration: own_s(*_stats(iteration)), shared_s


def figures(name: str, requests: Sequence[ApexRequest]) -> Figures:
    """Of a plan of the example under these requests."""
    own, shared = pricing()[name]
    plan = PLANS[name]
    shares = [requests[i::plan.stages] for i in range(plan.stages)]
    if plan.attention_replicas > 1:
        runs = [in_step([requests[i::plan.attention_replicas] for i in range(plan.attention_replicas)],
                        capacity(name), own, shared)]
    else:
        runs = [apex.replay(share, capacity(name), own, stages=plan.stages) for share in shares]
    in_turn = [t for pair in itertools.zip_longest(*(run.iteration_seconds for run in runs)) for t in pair if t]
    total_s = float(apex.pipeline_seconds(np.array(in_turn), plan.stages)) if plan.stages > 1 else sum(in_turn)
    tokens = [seconds for run in runs for seconds in run.token_seconds]
    rest = [t for seconds in tokens for t in seconds[1:]]
    made = sum(map(len, tokens))
    return Figures(1e3 * float(np.mean([seconds[0] for seconds in tokens])), 1e3 * float(np.mean(rest)), made / total_s,
                   made / len(in_turn), total_s, total_s - sum(in_turn))


def in_step(shares: Sequence[Sequence[ApexRequest]], tokens: int, own: Seconds,
            shared: Callable[[bool, int, int], float]) -> apex.Replayed:
    """Queues that iterate together: the slowest's own seconds, and those of what they share.

    tokens: KV of each. Raises `InputError` as `apex.replay` does, of each queue by itself.
    """
    for share in shares:
        apex.replay(share, tokens, lambda iteration: 1.0)
    queues, clock, times = [Queue()] * len(shares), 0.0, []
    seconds_of = [[[] for _ in share] for share in shares]
    while any(queue.joined < len(share) or queue.running or queue.stopped
              for queue, share in zip(queues, shares, strict=True)):
        made = [apex.next_iteration(share, queue, clock, tokens, max_input_tokens=apex.MAX_INPUT_TOKENS // len(shares))
                for share, queue in zip(shares, queues, strict=True)]
        iterations = [iteration for _, iteration in made if iteration.requests]
        queues = [queue for queue, _ in made]
        if not iterations:
            clock = min(share[queue.joined].arrival_s for share, queue in zip(shares, queues, strict=True)
                        if queue.joined < len(share))
            continue
        sizes = [sum(iteration.inputs) for iteration in iterations]
        is_decode = all(all(iteration.contexts) for iteration in iterations)
        times.append(max(map(own, iterations)) + shared(is_decode, sum(sizes), max(sizes)))
        clock += times[-1]
        for place, (share, (queue, iteration)) in enumerate(zip(shares, made, strict=True)):
            for request in iteration.requests:
                seconds_of[place][request].append(times[-1])
            queues[place] = apex.finish_iteration(share, queue)[0]
    return apex.Replayed(tuple(tuple(s) for mine in seconds_of for s in mine), tuple(times), clock)


def example(num_seeds: int) -> dict[str, Figures]:
    """Means over traces, by plan."""
    traces = [trace(seed) for seed in range(num_seeds)]
    return {name: Figures(*np.mean([figures(name, requests) for requests in traces], axis=0).tolist())
            for name in PLANS}
