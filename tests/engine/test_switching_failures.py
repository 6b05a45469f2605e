"""Instances that go down while they change their role: the engine equals the reference bit for bit, ties included.

As in `test_pool_failures`; outages begin while instances are told to move, drain and load, too.
"""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim.engine import loop
from jaxsim.kernels import clock
from tests.engine import cases as c
from tests.engine import client_cases as cc
from tests.engine import failure_cases as fc
from tests.engine import pool_failure_cases as pc
from tests.engine import test_role_switching as switches
from tests.reference import clients as client_rules
from tests.reference import failures as failure_rules
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised


def dims_of(preset: str):
    """As of pools whose instances fail, with roles that change."""
    return fc.dims_of(preset, switches.EXECUTORS, has_roles=True, has_role_switching=True)


def draw_many(seed: int, flags: simulator.Flags, dims) -> list[tuple]:
    """(a case of pools, rules of switching) of every lane."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < c.LANES:
        for case, rules, _, tiles, switching in switches.draw(int(rng.integers(2**31)), flags, dims):
            try:
                for one in switching.flags.values():
                    c.reference(replace(case, limits=case.limits | dict(
                        num_blocks=one.num_blocks, max_num_seqs=one.max_num_seqs)), flags,
                        replace(dims, num_executors=1), "mixed")
                calm = switches.refer(case, rules, None, tiles, switching, flags, dims)
            except ValueError:
                continue
            outages = aimed(rng, calm)
            behind = outages[0][1] if rng.random() < 0.7 else 0.0
            outages += [(i, start, end) for i, start, end in fc.draw_outages(rng, dims, calm)
                        if start > behind and all(i != j or end < a or b < start for j, a, b in outages)]
            never = np.full(len(case), np.inf)
            clients = cc.ClientCase(case, never, never, (2.0**-4,) * int(rng.integers(0, cc.SENDINGS)))
            most = float(rng.choice([0.0, 1.0, np.inf, np.inf]))
            failing = fc.FailureCase(clients, tuple(outages[:fc.ROWS // 2 - 1]), most)
            found.append((pc.PoolCase(failing, rules), switching))
    return found[:c.LANES]


def aimed(rng: np.random.Generator, calm: simulator.ReferenceResult) -> list[tuple[int, float, float]]:
    """An outage of an instance on its way to another role, at some point of it, or of either end of a transfer."""
    if not calm.switches or rng.random() < 0.4:
        found = pc.aimed(rng, calm)
        return found or [(0, 0.0, 2.0**-4)]
    one = calm.switches[rng.integers(len(calm.switches))]
    known = [t / 2**30 for t in (one.decided, one.stopped, one.emptied, one.changed) if t is not None]
    at = float(rng.choice(known + [(a + b) / 2 for a, b in zip(known, known[1:], strict=False)]))
    start = float(clock.round_arrivals_reference(np.array([at]))[0])
    return [(one.instance, start, start + 2.0 ** -int(rng.integers(0, 8)))]


def simulate(batch, flags: simulator.Flags, dims):
    """The world of all cases, in one program."""
    params, requests = pc.inputs([one for one, _ in batch], flags, dims)
    made = c.stack([switches.params_of(one.case, one.rules, simulator.Encoding(), switching, flags, dims)
                    for one, switching in batch])
    return jax.device_get(loop.run(dims, replace(made, clients=params.clients, failures=params.failures), requests))


def reference(one: pc.PoolCase, switching, flags: simulator.Flags, dims) -> simulator.ReferenceResult:
    """The reference's answer."""
    case = one.case
    requests = [simulator.Request(n, float(case.arrival_s[n]), int(case.prompt[n]), int(case.output[n]),
                                  int(case.max_tokens[n]), 0, tuple(map(float, case.uniforms[n])))
                for n in range(len(case))]

    def of_each(given):
        return [given["decode" if role == "decode" else "prefill"] for role in one.rules.roles]

    return simulator.simulate(
        requests, of_each(switching.flags), switches.EXECUTORS, c.MIXED[case.router], of_each(switching.cost),
        disaggregation=one.rules, switching=switching, clients=client_rules.Clients(one.failing.clients.backoff_s),
        failures=failure_rules.Failures(one.failing.outages, one.failing.most_restarts))


@pytest.mark.slow
def test_engine_equals_reference():
    flags, dims, seen = simulator.preset("vllm-v1"), dims_of("vllm-v1"), Counter()
    for seed in c.seeds(3, of=12):
        batch = draw_many(seed, flags, dims)
        world = simulate(batch, flags, dims)
        for lane, (one, switching) in enumerate(batch):
            try:
                result = reference(one, switching, flags, dims)
            except ValueError as error:
                assert "nothing will ever" in str(error) and world.fault[lane] == c.w.STARVED, (seed, lane)
                continue
            got = pc.unpack(dims, world, lane, len(one))
            assert pc.differences(got, pc.answer(result, one)) == [], (seed, lane, one, switching)
            switches.compare_switches(world, lane, result, f"seed {seed} lane {lane}")
            seen += pc.exercised(one, result)
            for switch in result.switches:
                for instance, start, _ in one.failing.outages:
                    if instance == switch.instance:
                        times = [t and t / 2**30 for t in (switch.decided, switch.stopped, switch.changed)]
                        seen["down when told"] += times[0] <= start < (times[1] or np.inf)
                        seen["down as it drains"] += times[1] is not None and times[1] <= start < (times[2] or np.inf)
                seen["switches"] += switch.changed is not None
                seen["changed while down"] += switch.changed is not None and any(
                    i == switch.instance and start <= switch.changed / 2**30 < end
                    for i, start, end in one.failing.outages)
    print(seen)
    assert seen["down when told"] > 2 and all(seen[what] > 10 for what in (
        "switches", "down as it drains", "changed while down", "taken by another", "preemptions",
        "lost in transfer", "lost unaccepted", "lost as it ran by decode", "handed over after a restart")), seen
