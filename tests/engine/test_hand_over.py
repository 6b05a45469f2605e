"""Prompts and outputs on different executors, against the reference: roles, hand-over, links, back-pressure."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim.engine import loop
from jaxsim.engine.outcomes import handed_over
from jaxsim.policy import routing
from jaxsim.policy.hand_over import HandOver
from tests.engine import cases as c
from tests.engine.link_cases import with_links
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

EXECUTORS = 4
PLAIN_ROUTERS = tuple(c.ROUTERS)


def draw_rules(rng: np.random.Generator) -> simulator.Disaggregation:
    """One of each role at least; links from slow to none at all."""
    roles = ["prefill", "decode", *rng.choice(["prefill", "decode", "mixed"], EXECUTORS - 2, p=[0.4, 0.4, 0.2])]
    rng.shuffle(roles)
    return simulator.Disaggregation(
        roles=tuple(map(str, roles)), decode_router=PLAIN_ROUTERS[rng.integers(len(PLAIN_ROUTERS))],
        hand_over=str(rng.choice(["pull", "push"])), waiting_block_share=float(rng.choice([0.05, 0.5, 1.0])),
        bytes_per_token=float(rng.choice([0.0, 1.0, 1.0])), bandwidth=2.0 ** int(rng.choice([5, 9, 12])),
        latency_s=float(rng.choice([0.0, 0.0, 2.0**-7])), overlap_layers=int(rng.choice([0, 0, 4])))


def params_of(case: c.Case, rules: simulator.Disaggregation, flags: simulator.Flags):
    """What the engine is told of a case with roles."""
    i, x = np.int32, np.float32
    params = c.make_params(case, flags, "mixed")
    most = 2**30
    if rules.hand_over == "pull":
        most = math.ceil(rules.waiting_block_share * case.limits["num_blocks"])
    roles = np.array(rules.roles)
    return replace(params, hand_over=with_links(rules, HandOver(
        computes_prompts=roles == "prefill", decodes=roles == "decode",
        routing=c.AnyRouter(i(PLAIN_ROUTERS.index(rules.decode_router)), routing.Score(*map(x, case.score))),
        most_held=np.full(EXECUTORS, most, np.int32), seconds_per_token=x(rules.bytes_per_token / rules.bandwidth),
        latency_s=x(rules.latency_s), layers=i(rules.overlap_layers))))


def draw(seed: int, flags: simulator.Flags, dims) -> list[tuple[c.Case, simulator.Disaggregation]]:
    rng = np.random.default_rng(seed)
    cases = c.draw_many(seed, flags, dims)
    return [(replace(case, router=int(rng.integers(len(PLAIN_ROUTERS)))), draw_rules(rng)) for case in cases]


def compare(drawn, flags, dims) -> dict[str, int]:
    """Bit for bit; returns what the cases had in them."""
    seen = dict(cases=0, preemptions=0, moved=0, jumps=0, waited=0)
    params = c.stack([params_of(case, rules, flags) for case, rules in drawn])
    _, requests = c.inputs([case for case, _ in drawn], flags, dims, "mixed")
    world = jax.device_get(loop.run(dims, params, requests))
    for lane, (case, rules) in enumerate(drawn):
        try:
            result = c.reference(case, flags, dims, "mixed", disaggregation=rules)
        except ValueError:
            assert world.fault[lane], f"lane {lane}: served, which the reference says it cannot be"
            continue
        got = c.unpack(dims, world, lane, len(case))
        c.compare_requests(got, result, f"lane {lane} {rules}")
        moved = [r for r in result.requests if r.decode_instance is not None]
        ours = handed_over(world, np.s_[lane, :len(case)])
        for name in ("accepted_s", "delivered_s", "decode_instance"):
            assert [ours[name][r.id] for r in moved] == [getattr(r, name) for r in moved], (lane, name)
        assert (ours["decode_instance"] >= 0).sum() == len(moved)
        for instance in range(EXECUTORS):
            mine = [r for r in result.iterations if r.instance == instance]
            assert got["num_iterations"][instance] == len(mine)
            assert got["busy_s"][instance] == sum(r.duration_s for r in mine)
        assert np.array_equal(got["used_blocks"], world.returned[lane][:-1])
        seen["cases"] += 1
        seen["preemptions"] += int(got["preemptions"].sum())
        seen["moved"] += len(moved)
        seen["waited"] += sum(r.accepted_s > r.first_token_s for r in moved)
        seen["jumps"] += len(result.iterations) - got["steps"]
    return seen


@pytest.mark.parametrize("name", [
    "vllm-v1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vllm-v1-async", "sarathi"))])
def test_engine_equals_reference(name):
    flags, dims = simulator.preset(name), c.dims_of(name, EXECUTORS, has_roles=True)
    seen = compare(draw(1, flags, dims), flags, dims)
    assert seen["cases"] > 40 and seen["moved"] > 200 and seen["preemptions"] > 5 and seen["waited"] > 20, seen
