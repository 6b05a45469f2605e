"""Random scenarios with dyadic numbers, for the engine and the reference alike.

A whole batch of them is one program: limits, costs and even the router are numbers of a lane. Tests share sizes
(`dims_of`) and a batch width (`LANES`), so a preset and a number of instances compile once a session.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxsim.kernels import clock, packed
from jaxtyping import Array, Int

from jaxsim.cost.fitted import fitted
from jaxsim.engine import loop
from jaxsim.engine.step import Params
from jaxsim.policy import routing
from jaxsim.policy.batching import Batching
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.requests import Requests, pack_requests
from tests.reference import simulator

LANES = 64
"""Scenarios in one batch; fewer are padded with copies."""

NUM_REQUESTS, NUM_SLOTS = 24, 8

ROUTERS = {
    "round_robin": routing.RoundRobin, "random": routing.Random,
    "least_outstanding": routing.LeastOutstanding, "power_of_two": routing.PowerOfTwo,
    "least_kv": routing.LeastKV,
}

MIXED = [*ROUTERS, "score", "first"]
"""Routers a lane may have in a batch of `AnyRouter`."""


class AnyRouter(routing.AbstractRouting):
    """Any router by number, so that one program compares them all: every rule is asked, one answer is taken."""

    which: Int[Array, ""]
    reads_kv = True
    reads_waiting = True

    def choose(self, view: routing.View) -> Int[Array, ""]:
        if view.used_blocks is None:
            view = replace(view, used_blocks=jnp.zeros_like(view.outstanding))
        answers = [rule().choose(view) for rule in ROUTERS.values()]
        answers += [routing.Score(*SCORE).choose(view), jnp.int32(0)]
        return jnp.stack(answers)[self.which]


SCORE = tuple(np.float32(x) for x in (0, 1, 1, 3, 1))
"""Waiting requests and the share of used blocks, until the outstanding ones are more than 3 apart."""


def score_reference(request, instances, num_routed) -> int:
    """`Score(*SCORE)` in NumPy."""
    load = [i.outstanding for i in instances]
    if max(load) - min(load) > SCORE[3] and max(load) > SCORE[4] * min(load):
        return int(np.argmin(load))
    used = [np.float32(i.used_blocks) / np.float32(max(i.num_blocks, 1)) for i in instances]
    return int(np.argmin([np.float32(len(i.waiting)) + share for i, share in zip(instances, used, strict=True)]))


@dataclass
class Case:
    """One scenario: requests (arrival, prompt, output, max_tokens, priority), limits, cost coefficients."""

    arrival_s: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    max_tokens: np.ndarray
    priority: np.ndarray
    uniforms: np.ndarray
    limits: dict
    coefficients: tuple  # rows (a, b, c, d, e) for prefill, decode, mixed
    extra: dict = field(default_factory=dict)


def draw(rng: np.random.Generator, num_requests: int, num_slots: int, block_size: int, flags: simulator.Flags) -> Case:
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
    budget = int(rng.integers(seqs, seqs + 40)) if flags.chunked_prefill else largest + seqs + int(rng.integers(0, 60))
    if flags.phase_mix == "unified" and not flags.chunked_prefill:
        budget = simulator.UNLIMITED if flags.max_num_batched_tokens == simulator.UNLIMITED else budget
    need = -(-(model_len if flags.reserve in ("max_model_len", "expected") else largest) // block_size)
    watermark = int(rng.integers(0, 3)) if flags.reserve == "prompt" else 0
    if flags.reserve == "expected":
        need = need + flags.retract_free_tokens * seqs // block_size
    blocks = need + watermark + int(rng.integers(0, 2 * need * min(seqs, 4)))
    a, b = 2.0**-6, 2.0**-9
    c, d, e = 2.0**-12, 2.0**-8, 2.0**-14
    scale = 2.0 ** int(rng.integers(-3, 3))
    rows = tuple(tuple(scale * m * x for x in (a, b, c, d, e)) for m in rng.integers(1, 5, 3))
    if rng.random() < 0.3:
        rows = tuple((scale, 0.0, 0.0, 0.0, 0.0) for _ in range(3))
    return Case(arrival, prompt, output, max_tokens, rng.integers(0, 3, count), rng.random((count, 2)).astype(np.float32),
                dict(max_num_seqs=seqs, max_num_batched_tokens=budget, watermark_blocks=watermark, num_blocks=blocks,
                     max_model_len=model_len), rows)


def make_params(case: Case, flags: simulator.Flags, router: str, max_steps: int = 1_000_000) -> Params:
    i, x = jnp.int32, jnp.float32
    batching = Batching(
        i(case.limits["max_num_seqs"]), i(case.limits["max_num_batched_tokens"]), i(case.limits["max_model_len"]),
        i(case.limits["num_blocks"]), i(case.limits["watermark_blocks"]), i(flags.decode_context_limit or 0),
        x(flags.new_token_ratio_init), x(flags.new_token_ratio_floor), x(flags.new_token_ratio_decay),
        i(flags.expected_clip), i(flags.retract_free_tokens),
        phase_mix=flags.phase_mix, chunked_prefill=flags.chunked_prefill, reserve=flags.reserve,
        decode_needs_free_block=flags.decode_needs_free_block, victim=flags.victim,
        waiting_blocked_after_preempt=flags.waiting_blocked_after_preempt, order=flags.order, admit=flags.admit,
        async_scheduling=flags.async_scheduling, kv_accounting=flags.track_blocks,
        has_context_limit=flags.decode_context_limit is not None)
    return Params(batching, ROUTERS[router](), fitted(*case.coefficients), i(max_steps))


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *trees)


def simulate(cases: list[Case], flags: simulator.Flags, dims: Dims, router: str) -> list[dict]:
    """Engine results of all cases, in one program."""
    params = stack([make_params(c, flags, router) for c in cases])
    requests = [pack_requests(c.arrival_s, c.prompt, c.output, c.max_tokens, c.uniforms,
                              num_requests=dims.num_requests, priority=c.priority) for c in cases]
    world = loop.run(dims, params, stack(requests))
    return [unpack(world, b, len(c.arrival_s)) for b, c in enumerate(cases)]


def unpack(world, lane: int, count: int) -> dict:
    def times(array):
        return clock.join_reference(*np.asarray(array[lane]).T)

    placed = np.asarray(world.placed[lane, :count])
    return dict(
        instance=placed[:, 1], scheduled_s=times(world.scheduled)[:count],
        first_token_s=times(world.first_tokens)[placed[:, 0]], finish_s=times(world.finished)[:count],
        stalled_s=times(world.stalled)[:count], preemptions=np.asarray(world.progress[lane, :count, 1]),
        fault=int(world.fault[lane]), steps=int(world.steps[lane]), finished=int(world.num_finished[lane]))


def reference(case: Case, flags: simulator.Flags, dims: Dims, router: str) -> simulator.ReferenceResult:
    """The reference's answer, with the fitted form in float64."""
    from dataclasses import replace

    prefill, decode, mixed = case.coefficients

    def cost(s):
        a, b, c, d, e = decode if not s.num_prefill else prefill if not s.num_decode else mixed
        return a + b * s.prefill_tokens + c * s.decode_context + d * (s.num_decode + s.num_prefill) + e * s.prefill_pairs

    requests = [simulator.Request(i, float(case.arrival_s[i]), int(case.prompt[i]), int(case.output[i]),
                                  int(case.max_tokens[i]), int(case.priority[i]),
                                  tuple(float(u) for u in case.uniforms[i])) for i in range(len(case.arrival_s))]
    flags = replace(flags, **case.limits, block_size=dims.block_size)
    return simulator.simulate(requests, flags, dims.num_instances, router, cost)


__all__ = ["Case", "Requests", "draw", "make_params", "reference", "simulate", "stack", "unpack"]
