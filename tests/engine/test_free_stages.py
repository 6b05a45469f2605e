"""Roles in engines of whole prompts, against the reference: prompts first, decodes as a queue, stages that take a batch
whenever the first is free."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim.cost.fitted import fitted
from jaxsim.engine import loop
from jaxsim.engine.common import Group
from jaxsim.engine.outcomes import handed_over
from tests.engine import cases as c
from tests.engine import test_hand_over as roles
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

STAGES = (1, 2, 4)
"""Quarters of dyadic seconds are dyadic."""

SIZES = dict(has_roles=True, num_slots=32)


def draw(seed: int, flags: simulator.Flags, dims) -> list[tuple[c.Case, simulator.Disaggregation]]:
    """A decode engine of the public simulator takes all that come."""
    drawn = roles.draw(seed, flags, dims)
    if flags.decode_context_limit is None:
        return drawn
    return [(replace(case, limits=case.limits | dict(max_num_seqs=simulator.UNLIMITED)),
             replace(rules, overlap_layers=0)) for case, rules in drawn]


def compare(drawn, flags, dims, stages=None, heads=None) -> dict[str, int]:
    """Bit for bit; returns what the cases had in them. stages: of each executor; heads: seconds of a first stage beside
    an equal part, and for each token of context."""
    seen = dict(cases=0, preemptions=0, moved=0, jumps=0, waited=0, over=0, overlapping=0, merged=0)
    params, more = [], [{} for _ in drawn]
    for lane, (case, rules) in enumerate(drawn):
        one = roles.params_of(case, rules, flags)
        if stages is not None:
            group = replace(one.groups[0], cost=fitted(*case.coefficients, head=heads[lane]))
            groups = tuple(Group(replace(group.batching, num_stages=np.int32(n)), group.cost) for n in STAGES)
            of = np.array([STAGES.index(n) for n in stages[lane]], np.int32)
            one = replace(one, groups=groups, group_of=of)
            more[lane] = dict(stage_cost=[stage_cost(case, heads[lane], n) if n > 1 else None for n in stages[lane]])
        params.append(one)
    _, requests = c.inputs([case for case, _ in drawn], flags, dims, "mixed")
    world = jax.device_get(loop.run(dims, c.stack(params), requests))
    for lane, (case, rules) in enumerate(drawn):
        each = flags
        if stages is not None:
            each = [replace(flags, **case.limits, block_size=dims.block_size, stages=n, pass_when_stage_free=n > 1)
                    for n in stages[lane]]
        try:
            result = reference(case, each, dims, rules, **more[lane])
        except ValueError:
            assert world.fault[lane], f"lane {lane}: served, which the reference says it cannot be"
            continue
        got = c.unpack(dims, world, lane, len(case))
        c.compare_requests(got, result, f"lane {lane} {rules}")
        moved = [r for r in result.requests if r.decode_instance is not None]
        ours = handed_over(world, np.s_[lane, :len(case)])
        for name in ("accepted_s", "delivered_s", "decode_instance"):
            assert [ours[name][r.id] for r in moved] == [getattr(r, name) for r in moved], (lane, name)
        for instance in range(roles.EXECUTORS):
            mine = [r for r in result.iterations if r.instance == instance]
            assert got["num_iterations"][instance] == len(mine)
            busy, until = 0.0, -np.inf
            for record in mine:
                seen["overlapping"] += record.start_s < until
                busy += max(record.end_s - max(record.start_s, until), 0.0)
                until = max(until, record.end_s)
            assert got["busy_s"][instance] == busy
            decodes = [r for r in mine if r.stats.num_decode and not r.stats.num_prefill]
            for a, b in zip(decodes, decodes[1:], strict=False):
                # Somebody who could have gone on sat an iteration out; who came later went first.
                left = a.batch.keys() - b.batch.keys()
                alive = [i for i in left if result.requests[i].finish_s > b.start_s]
                seen["over"] += bool(alive) and b.start_s >= a.end_s
                seen["merged"] += bool(b.batch.keys() & a.batch.keys()) and bool(b.batch.keys() - a.batch.keys())
        seen["cases"] += 1
        seen["preemptions"] += int(got["preemptions"].sum())
        seen["moved"] += len(moved)
        seen["waited"] += sum(r.accepted_s > r.first_token_s for r in moved)
        seen["jumps"] += len(result.iterations) - got["steps"]
    return seen


def stage_cost(case: c.Case, head, stages: int):
    """The first stage takes its head and an equal part, others an equal part."""
    whole = c.dyadic_cost(case)

    def cost(stats: simulator.BatchStatsRef) -> list[float]:
        own = head[0] + head[1] * (stats.prefill_context + stats.decode_context - stats.num_decode)
        parts = [(whole(stats) - own) / stages] * stages
        parts[0] += own
        return [0.0, *parts]

    return cost


def reference(case: c.Case, flags, dims, rules, **options) -> simulator.ReferenceResult:
    if not isinstance(flags, list):
        return c.reference(case, flags, dims, "mixed", disaggregation=rules)
    rows = zip(case.arrival_s, case.prompt, case.output, case.max_tokens, case.uniforms, strict=True)
    requests = [simulator.Request(i, float(a), int(p), int(o), int(m), 0, tuple(map(float, u)))
                for i, (a, p, o, m, u) in enumerate(rows)]
    return simulator.simulate(requests, flags, roles.EXECUTORS, c.MIXED[case.router], c.dyadic_cost(case),
                              disaggregation=rules, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vllm-v0", "simdistserve-vllm"])
def test_engine_equals_reference(name):
    flags, dims = simulator.preset(name), c.dims_of(name, roles.EXECUTORS, **SIZES)
    seen = compare(draw(1, flags, dims), flags, dims)
    assert seen["cases"] > 40 and seen["moved"] > 200, seen
    if name == "vllm-v0":
        assert seen["preemptions"] > 5 and seen["waited"] > 20, seen
    else:
        assert seen["over"] > 100, seen


def test_free_stages_equal_reference():
    """Engines of one, two and four stages in one scenario."""
    name = "simdistserve-vllm"
    flags, dims = simulator.preset(name), c.dims_of(name, roles.EXECUTORS, **SIZES, num_stages=4)
    rng = np.random.default_rng(5)
    drawn = draw(7, flags, dims)
    stages = [rng.choice(STAGES, roles.EXECUTORS, p=[0.2, 0.4, 0.4]).tolist() for _ in drawn]
    heads = [(float(rng.choice([0.0, 2.0**-9])), float(rng.choice([0.0, 2.0**-16]))) for _ in drawn]
    seen = compare(drawn, flags, dims, stages, heads)
    assert seen["cases"] > 40 and seen["moved"] > 200 and seen["overlapping"] > 500, seen
    assert seen["over"] > 20 and seen["merged"] > 50, seen
