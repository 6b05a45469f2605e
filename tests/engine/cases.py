"""Random scenarios with dyadic numbers, for the engine and the reference alike.

A whole batch of them is one program: limits, costs and even the router are numbers of a lane. Tests share
sizes and a batch width (`LANES`), so that a preset at a number of instances compiles once a session.
"""

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Int

from jaxsim.cost.base import AbstractIterationCost
from jaxsim.cost.fitted import fitted
from jaxsim.engine import loop, lower
from jaxsim.engine.common import Group, Params
from jaxsim.kernels import clock
from jaxsim.policy import routing
from jaxsim.policy.batching import Batching
from jaxsim.policy.fairness import TokenCounters
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.requests import Requests, pack_requests
from jaxsim.workload.workload import Workload
from tests.reference import simulator

LANES = 64
"""Scenarios in a batch; fewer are padded with copies of the first."""

MOST_REQUESTS = 24
"""Requests of a drawn case; programs have room for more, a number that is the size of nothing else."""

NUM_REQUESTS, NUM_SLOTS = 56, 20

PRESETS = ("vllm-v1", "vllm-v1-async", "vllm-v1-priority", "vllm-v0", "sarathi", "orca", "static", "tensorrt-llm",
           "tensorrt-llm-waiting", "tensorrt-llm-sync-waiting", "sglang", "simdistserve-vllm")
"""Presets of the reference that the engine has too."""


def seeds(few: int, of: int) -> range:
    """Seeds of a comparison with the reference: a few, or with JAXSIM_THOROUGH=1 in the environment all."""
    return range(of if os.environ.get("JAXSIM_THOROUGH") == "1" else few)


def dims_of(preset: str, num_executors: int, **changes) -> Dims:
    """Sizes that tests share: blocks of 16 on one instance, so that the golden traces fit in, and of 4 on more."""
    block_size = 16 if num_executors == 1 else simulator.PRESETS[preset].get("block_size", 4)
    return replace(Dims(NUM_REQUESTS, num_executors, NUM_SLOTS, block_size), **changes)


ROUTERS = {
    "round_robin": routing.RoundRobin, "random": routing.Random,
    "least_outstanding": routing.LeastOutstanding, "power_of_two": routing.PowerOfTwo,
    "least_kv": routing.LeastKV,
}

FREEST = {"llumnix_load": routing.LlumnixLoad, "remaining_steps": routing.RemainingSteps}
"""Routers that read loads, for lanes whose router is "freest", by `Case.router`."""

SCORE = (0.0, 1.0, 1.0, 3.0, 1.0)
"""Weights of load, waiting requests and used blocks, and the two gates beyond which the shortest queue wins."""

MIXED = (*ROUTERS, "score", "first")
"""Routers of the lanes of a batch whose router is "mixed", by `Case.router`."""


class AnyRouter(routing.AbstractRouting):
    """Any router by number: every rule is asked, one answer is taken."""

    which: Int[Array, ""]
    score: routing.Score
    reads_kv = True
    reads_waiting = True

    def choose(self, view: routing.View) -> Int[Array, ""]:
        if view.used_blocks is None:
            view = replace(view, used_blocks=jnp.zeros_like(view.outstanding))
        answers = [rule().choose(view) for rule in ROUTERS.values()]
        answers += [self.score.choose(view), jnp.int32(0)]
        return jnp.stack(answers)[self.which]


class AnyFreest(routing.AbstractRouting):
    """Either router that reads loads, by number, or the first instance."""

    which: Int[Array, ""]
    reads_loads = True

    def choose(self, view: routing.View) -> Int[Array, ""]:
        return jnp.stack([*(rule().choose(view) for rule in FREEST.values()), jnp.int32(0)])[self.which % 3]


@dataclass
class Case:
    """One scenario: requests (arrival, prompt, output, max_tokens, priority), limits, cost coefficients.

    router: index into `MIXED`, for batches whose router is "mixed"; score: numbers of the router "score". cost:
    instead of the coefficients. prefixes: hashes of the leading full blocks of each prompt, for prefix caching.
    tenant, predicted, limit_s, prices: what orders go by, as of the reference.
    """

    arrival_s: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    max_tokens: np.ndarray
    priority: np.ndarray
    uniforms: np.ndarray
    limits: dict
    coefficients: tuple  # rows (a, b, c, d, e) for prefill, decode, mixed
    router: int = 0
    cost: AbstractIterationCost | None = None
    score: tuple = SCORE
    prefixes: list | None = None
    tenant: np.ndarray | None = None
    predicted: np.ndarray | None = None
    limit_s: np.ndarray | None = None
    prices: tuple | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)

    def kept(self, mask: np.ndarray) -> "Case":
        """The same with fewer requests."""
        rows = ("arrival_s", "prompt", "output", "max_tokens", "priority", "uniforms")
        prefixes = self.prefixes and [p for p, is_kept in zip(self.prefixes, mask, strict=True) if is_kept]
        rows += tuple(name for name in ("tenant", "predicted", "limit_s") if getattr(self, name) is not None)
        return replace(self, prefixes=prefixes, **{name: getattr(self, name)[mask] for name in rows})


def draw(rng: np.random.Generator, num_requests: int, num_slots: int, block_size: int,
         flags: simulator.Flags) -> Case:
    """A small, crowded scenario: ties, memory pressure, budgets that bind."""
    count = int(rng.integers(1, num_requests + 1))
    grid = 2.0 ** -int(rng.integers(0, 6))
    arrival = np.cumsum(rng.integers(0, rng.integers(2, 30), count) * grid)
    longest = int(rng.integers(4, 50))
    prompt = rng.integers(1, longest + 1, count)
    output = rng.integers(1, longest + 1, count)
    max_tokens = output + rng.integers(0, 8, count) * int(rng.integers(0, 2))
    seqs = int(rng.integers(1, num_slots + 1))
    largest = int(np.max(prompt + max_tokens))
    model_len = largest + int(rng.integers(0, 10))
    if flags.max_num_batched_tokens == simulator.UNLIMITED:
        budget = simulator.UNLIMITED
    elif flags.chunked_prefill:
        budget = int(rng.integers(seqs, seqs + 40))
    else:
        budget = largest + seqs + int(rng.integers(0, 60))
    need = -(-(model_len if flags.reserve in ("max_model_len", "expected") else largest) // block_size)
    watermark = int(rng.integers(0, 3)) if flags.reserve == "prompt" else 0
    extra = {}
    if flags.reserve == "expected":
        # Dyadic ratios, small enough that admission is too hopeful and running sequences are retracted.
        need += block_size > 1
        extra = dict(new_token_ratio_init=float(rng.choice([0.0, 0.25, 0.75])), new_token_ratio_floor=0.0,
                     new_token_ratio_decay=float(rng.choice([0.0, 2.0**-6])),
                     retract_free_tokens=int(rng.integers(0, 5)), expected_clip=int(rng.choice([8, 4096])))
    if flags.decode_context_limit is not None:
        extra = dict(decode_context_limit=largest + int(rng.integers(0, 3 * largest)))
    if flags.batch_wait_timeout_iters:
        extra = dict(batch_wait_timeout_iters=int(rng.integers(1, 12)),
                     batch_wait_max_tokens_ratio=float(rng.choice([0.125, 0.25, 0.5, 0.75, 1.0])))
    blocks = need + watermark + int(rng.integers(0, rng.choice([max(need, 1), 2 * need * min(seqs, 4)])))
    a, b = 2.0**-6, 2.0**-9
    c, d, e = 2.0**-12, 2.0**-8, 2.0**-14
    scale = 2.0 ** int(rng.integers(-3, 3))
    rows = tuple(tuple(scale * m * x for x in (a, b, c, d, e)) for m in rng.integers(1, 5, 3))
    if rng.random() < 0.3:
        rows = tuple((scale, 0.0, 0.0, 0.0, 0.0) for _ in range(3))
    return Case(arrival, prompt, output, max_tokens, rng.integers(0, 3, count),
                rng.random((count, 2)).astype(np.float32),
                dict(max_num_seqs=seqs, max_num_batched_tokens=budget, watermark_blocks=watermark,
                     num_blocks=blocks, max_model_len=model_len, **extra),
                rows, int(rng.integers(len(MIXED))), score=draw_score(rng))


def draw_score(rng: np.random.Generator) -> tuple:
    """Dyadic weights, some of them zero, and gates that sometimes decide."""
    weights = rng.choice([0.0, 0.25, 1.0, 2.0], 3)
    return (*weights.tolist(), float(rng.choice([1.0, 3.0, np.inf])), float(rng.choice([1.0, 1.5])))


def draw_long(rng: np.random.Generator, flags: simulator.Flags, dims: Dims) -> Case:
    """Outputs of thousands of tokens, so that jumps reach their bound and counters are wound back; contexts cost
    nothing, or float32 would round."""
    case = draw(rng, 24, dims.num_slots, dims.block_size, flags)
    output = rng.integers(1, 6000, len(case))
    longest = int(np.max(case.prompt + output))
    need = -(-longest // dims.block_size)
    limits = case.limits | dict(max_model_len=longest, num_blocks=need + int(rng.integers(0, need)))
    if flags.max_num_batched_tokens != simulator.UNLIMITED and not flags.chunked_prefill:
        limits["max_num_batched_tokens"] = longest + limits["max_num_seqs"]
    arrival = np.cumsum(rng.integers(0, 2000, len(case)) * 2.0**-4)
    rows = tuple((2.0 ** -int(k), 0.0, 0.0, 2.0**-8, 0.0) for k in rng.integers(3, 6, 3))
    return replace(case, arrival_s=arrival, output=output, max_tokens=output, limits=limits, coefficients=rows)


def draw_many(seed: int, flags: simulator.Flags, dims: Dims, count: int = LANES) -> list[Case]:
    """A batch of cases from one seed."""
    rng = np.random.default_rng(seed)
    return [draw(rng, MOST_REQUESTS, dims.num_slots, dims.block_size, flags) for _ in range(count)]


# --- the engine ---------------------------------------------------------------------------------------------


def make_params(case: Case, flags: simulator.Flags, router: str, max_steps: int = 1_000_000) -> Params:
    """What the engine is told of a case. Leaves are NumPy's: a batch is stacked on the host."""
    i, x, flags = np.int32, np.float32, replace(flags, **case.limits)
    more = {}
    if flags.batch_wait_timeout_iters:
        enough = math.ceil(flags.batch_wait_max_tokens_ratio * flags.max_num_batched_tokens)
        more = dict(batch_wait_timeout_iters=i(flags.batch_wait_timeout_iters), batch_wait_tokens=i(enough))
    if flags.stages > 1:
        more = dict(max_batch_seqs=i(flags.max_batch_seqs), pass_on_arrival=flags.pass_on_arrival)
    batching = Batching(
        i(flags.max_num_seqs), i(flags.max_num_batched_tokens), i(flags.max_model_len),
        i(flags.num_blocks), i(flags.watermark_blocks), i(flags.decode_context_limit or 0),
        x(flags.new_token_ratio_init), x(flags.new_token_ratio_floor), x(flags.new_token_ratio_decay),
        i(flags.expected_clip), i(flags.retract_free_tokens),
        phase_mix=flags.phase_mix, chunked_prefill=flags.chunked_prefill, reserve=flags.reserve,
        decode_needs_free_block=flags.decode_needs_free_block, victim=flags.victim,
        waiting_blocked_after_preempt=flags.waiting_blocked_after_preempt, order=flags.order,
        admit=flags.admit, async_scheduling=flags.async_scheduling, kv_accounting=flags.track_blocks,
        has_context_limit=flags.decode_context_limit is not None, prefix_caching=flags.prefix_caching, **more)
    chosen = AnyRouter(i(case.router), routing.Score(*map(x, case.score))) if router == "mixed" else (
        AnyFreest(i(case.router)) if router == "freest" else (ROUTERS | FREEST)[router]())
    counters = None
    if flags.order == "vtc":
        counters = TokenCounters(*np.array(case.prices, np.int32).T)
    return Params((Group(batching, case.cost or fitted(*case.coefficients)),), chosen, i(max_steps), counters=counters)


def segments(case: Case, dims: Dims) -> dict:
    """Shared prompts as the engine reads them, in arrays of the width of `dims`."""
    if not dims.num_segments:
        return {}
    made = Workload(
        case.arrival_s, case.prompt, case.output, prefix_block_size=dims.block_size,
        prefix_offsets=np.concatenate([[0], np.cumsum([len(p) for p in case.prefixes])]),
        prefix_hashes=np.array([h for p in case.prefixes for h in p], np.int64))
    prefixes = lower.shared_prefixes(made, dims.block_size)
    assert prefixes.num_segments < dims.num_segments
    packed = lower.make_requests(made, dims, prefixes)
    return dict(paths=packed.paths[:len(case)], bounds=packed.bounds[:len(case)], num_segments=dims.num_segments)


def order_key(case: Case, flags: simulator.Flags) -> np.ndarray:
    """What a sorted queue goes by."""
    key = {"sjf": case.predicted, "edf": None if case.limit_s is None else case.arrival_s + case.limit_s}
    return key.get(flags.order, case.priority)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack([np.asarray(x) for x in leaves])), *trees)


def inputs(cases: list[Case], flags: simulator.Flags, dims: Dims, router: str) -> tuple[Params, Requests]:
    """Arguments of `loop.run` for a batch."""
    params = stack([make_params(c, flags, router) for c in cases])
    requests = [pack_requests(c.arrival_s, c.prompt, c.output, c.max_tokens, c.uniforms,
                              num_requests=dims.num_requests, priority=order_key(c, flags),
                              is_urgent=c.priority < 0 if dims.has_urgent else None,
                              tenant=c.tenant if dims.num_tenants else None, **segments(c, dims))
                for c in cases]
    return params, stack(requests)


def simulate(cases: list[Case], flags: simulator.Flags, dims: Dims, router: str, *,
             lanes: int | None = None) -> list[dict]:
    """Engine results of all cases, in one program; padded to `lanes` if given."""
    padded = cases + cases[:1] * ((lanes or 0) - len(cases))
    world = jax.device_get(loop.run(dims, *inputs(padded, flags, dims, router)))
    return [unpack(dims, world, lane, len(c)) for lane, c in enumerate(cases)]


def unpack(dims: Dims, world: w.World, lane: int, count: int) -> dict:
    """What a lane says about its requests and its instances (`world` on the host)."""
    def times(array):
        return clock.join_reference(*np.asarray(array[lane]).T)

    def seconds(pair):
        return pair.hi.astype(float) + pair.lo

    counts = w.count_rows(dims).everything(world.counts[lane])
    clocks = w.clock_rows(dims).everything(world.clocks[lane])
    placed = world.placed[lane, :count]
    return dict(
        instance=placed[:, 1], scheduled_s=times(world.scheduled)[:count],
        first_token_s=times(world.first_tokens)[placed[:, 0]], finish_s=times(world.finished)[:count],
        stalled_s=clock.from_integers_reference(world.stalled[lane, :count]),
        preemptions=world.progress[lane, :count, 1],
        busy_s=seconds(clocks.executor.busy), num_iterations=counts.executor.num_iterations,
        running_s=seconds(clocks.rank.running).sum(1), held_block_s=seconds(clocks.rank.held).sum(1),
        peak_blocks=counts.rank.peak_blocks.max(1), used_blocks=counts.rank.used_blocks.sum(1),
        counter=counts.batch.counter.max((1, 2)),
        itl=world.itl[lane], fault=int(world.fault[lane]), steps=int(world.steps[lane]),
        finished=int(world.num_finished[lane]),
        **({} if world.cached is None else {"cached_tokens": world.cached[lane, :count]}))


# --- the reference ------------------------------------------------------------------------------------------


def dyadic_cost(case: Case) -> Callable[[simulator.BatchStatsRef], float]:
    """The fitted form in float64."""
    prefill, decode, mixed = case.coefficients

    def cost(s: simulator.BatchStatsRef) -> float:
        a, b, c, d, e = decode if not s.num_prefill else prefill if not s.num_decode else mixed
        return (a + b * s.prefill_tokens + c * s.decode_context + d * (s.num_decode + s.num_prefill)
                + e * s.prefill_pairs)

    return cost


def score_reference(num_blocks: int, weights: tuple) -> simulator.Router:
    """`Score(*weights)` in NumPy."""
    load_weight, queue_weight, kv_weight, balance_abs, balance_rel = map(np.float32, weights)

    def choose(request, instances, num_routed) -> int:
        load = [i.outstanding for i in instances]
        if max(load) - min(load) > balance_abs and max(load) > balance_rel * min(load):
            return int(np.argmin(load))
        mean = max(np.float32(sum(load)) / np.float32(len(load)), np.float32(1))
        return int(np.argmin([
            load_weight * np.float32(own) / mean + queue_weight * np.float32(len(i.waiting))
            + kv_weight * np.float32(num_blocks - i.free_blocks) / np.float32(num_blocks)
            for own, i in zip(load, instances, strict=True)]))

    return choose


def reference(case: Case, flags: simulator.Flags, dims: Dims, router: str,
              cost: Callable[[simulator.BatchStatsRef], float] | None = None, *, deadline_s: np.ndarray | None = None,
              first_token_deadline_s: np.ndarray | None = None, **options) -> simulator.ReferenceResult:
    """The reference's answer; more `options` as of `simulator.simulate`. Raises ValueError where a request can never be
    served."""
    requests = [simulator.Request(i, float(case.arrival_s[i]), int(case.prompt[i]), int(case.output[i]),
                                  int(case.max_tokens[i]), int(case.priority[i]),
                                  tuple(float(u) for u in case.uniforms[i]),
                                  tuple(case.prefixes[i]) if case.prefixes else (), **ordered(case, i))
                for i in range(len(case))]
    if deadline_s is not None:
        requests = [replace(one, deadline_s=float(last), first_token_deadline_s=float(first)) for one, last, first
                    in zip(requests, deadline_s, first_token_deadline_s, strict=True)]
    flags = replace(flags, **case.limits, block_size=dims.block_size)
    if case.prices is not None:
        flags = replace(flags, prices=case.prices)
    if router == "mixed":
        router = MIXED[case.router]
    if router == "freest":
        router = (*FREEST, "first")[case.router % 3]
    rule = {"score": score_reference(flags.num_blocks, case.score), "first": lambda *_: 0}.get(router, router)
    return simulator.simulate(requests, flags, dims.all_ranks, rule, cost or dyadic_cost(case), ranks=dims.num_ranks,
                              **options)


def ordered(case: Case, request: int) -> dict:
    """Of a request, what its order goes by."""
    given = {"tenant": case.tenant, "predicted": case.predicted, "limit_s": case.limit_s}
    return {name: values[request].item() for name, values in given.items() if values is not None}


def answer(result: simulator.ReferenceResult, num_executors: int, num_blocks: int) -> dict:
    """The reference's answer in the form of `unpack`, as far as both know it exactly."""
    fields = ("instance", "scheduled_s", "first_token_s", "finish_s", "preemptions")
    columns = {name: np.array([getattr(r, name) for r in result.requests]) for name in fields}
    stalled, since = np.zeros(len(result.requests)), {}
    busy, peak = np.zeros(num_executors), np.zeros(num_executors, int)
    num_iterations = np.zeros(num_executors, int)
    for record in result.iterations:
        for request in record.preempted:
            since[request] = record.start_s
        for request in record.batch:
            if request in since:
                stalled[request] += record.start_s - since.pop(request)
        busy[record.instance] += record.duration_s
        num_iterations[record.instance] += 1
        peak[record.instance] = max(peak[record.instance], num_blocks - record.free_blocks)
    return columns | dict(stalled_s=stalled, busy_s=busy, num_iterations=num_iterations, peak_blocks=peak)


REQUEST_FIELDS = ("instance", "scheduled_s", "first_token_s", "finish_s", "preemptions")
"""What the reference says about requests."""


def compare_requests(ours: dict, theirs: simulator.ReferenceResult, name: str) -> None:
    """Asserts that a lane ended well, and all its requests as in the reference, bit for bit."""
    assert ours["fault"] == 0, (name, ours["fault"])
    for field in REQUEST_FIELDS:
        want = np.array([getattr(request, field) for request in theirs.requests])
        np.testing.assert_array_equal(ours[field], want, err_msg=f"{name} {field}")


def differences(ours: dict, theirs: dict) -> list[str]:
    """Names of what is not exactly equal."""
    names = [name for name, value in theirs.items() if not np.array_equal(value, ours[name])]
    return (["fault"] if ours["fault"] else []) + names


def drawn_until_many(draw_one: Callable[[], Any]) -> list:
    """A batch of what `draw_one` draws, without what it gives up on (None)."""
    cases: list = []
    while len(cases) < LANES:
        case = draw_one()
        cases += [] if case is None else [case]
    return cases


def agree(seed: int, batch: list, compared: Callable[[list], tuple[list, list]]) -> list:
    """What the reference says of a batch with which the engine agrees; else fails with the smallest case that differs.

    compared: of some cases the reference's answers, and the names of what differs in each.
    """
    results, wrong = compared(batch)
    failing = [one for one, names in zip(batch, wrong, strict=True) if names]
    if failing:
        case = smallest(min(failing, key=len), lambda smaller: [bool(names) for names in compared(smaller)[1]])
        names = compared([case])[1][0]
        pytest.fail(f"seed {seed}: {len(failing)} of {len(batch)} differ; the smallest in {names}: {case}")
    return results


def agree_and_count(seed: int, batch: list, reference: Callable[[Any], Any], wrong: Callable[[list, list], list],
                    exercised: Callable[[Any, Any], Counter]) -> Counter:
    """What the cases of a batch exercised, with all of which the engine agrees, else fails as `agree` does.

    wrong: of some cases and what the reference says of them, the names of what differs in each.
    """
    def compared(some):
        results = [reference(one) for one in some]
        return results, wrong(some, results)

    results = agree(seed, batch, compared)
    return sum((exercised(one, result) for one, result in zip(batch, results, strict=True)), Counter())


def smallest(case: Case, are_failing: Callable[[list[Case]], list[bool]]) -> Case:
    """A failing case with as few requests as taking them away one at a time leads to, a batch at a time."""
    while len(case) > 1:
        keep = ~np.eye(len(case), dtype=bool)
        smaller = [case.kept(mask) for mask in keep]
        failing = are_failing(smaller)
        if not any(failing):
            return case
        case = smaller[int(np.argmax(failing))]
    return case
