"""Executors that change their role, against the reference: drains, parts handed on, transfers under way."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim.engine import loop
from jaxsim.engine.common import Group
from jaxsim.engine.outcomes import embedded, handed_over, role_changes
from jaxsim.policy.arrivals import SortedArrivals
from jaxsim.policy.role_switching import ROLES, RoleSwitching
from jaxsim.state import world as w
from tests.engine import cases as c
from tests.engine import test_compiled, test_encode, test_hand_over
from tests.engine.test_encode import EXECUTORS
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

MOST_REQUESTS = 26
"""With all their parts fewer than the rows of a program; where there are many, of one image at most."""


def draw_roles(rng: np.random.Generator, stages: list[str]) -> list[str]:
    """One of each at least."""
    roles = [*stages, *rng.choice(stages, EXECUTORS - len(stages)).tolist()]
    rng.shuffle(roles)
    return [str(role) for role in roles]


def draw_switching(rng: np.random.Generator, case: c.Case, flags: simulator.Flags, dims) -> simulator.RoleSwitching:
    """Periods that tie with each other and with arrivals, and fit some dozens of times in the case; decodes with limits
    and costs of their own."""
    iteration_s = c.dyadic_cost(case)(simulator.BatchStatsRef(2, 20, 0, 0, 0, 0, 2))
    span_s = case.arrival_s[-1] + iteration_s * case.output.sum() / 4
    base = 2.0 ** (math.floor(math.log2(span_s)) - int(rng.integers(4, 7)))
    sample = base * int(rng.integers(1, 3))
    poll = base * int(rng.choice([1, 2, 3, 7]))
    prefill = replace(flags, **case.limits, block_size=dims.block_size)
    seqs = int(rng.integers(1, min(dims.num_slots, int(rng.choice([3, 99])), prefill.max_num_batched_tokens) + 1))
    decode = replace(prefill, max_num_seqs=seqs, num_blocks=prefill.num_blocks + int(rng.integers(0, 9)))
    slower = replace(case, coefficients=tuple(tuple(2 * x for x in row) for row in case.coefficients))
    return simulator.RoleSwitching(
        flags={"prefill": prefill, "decode": decode},
        cost={"prefill": c.dyadic_cost(case), "decode": c.dyadic_cost(slower if rng.integers(2) else case)},
        sample_s=sample, decide_s=sample * int(rng.integers(1, 5)), poll_s=poll,
        drain_check_s=base * int(rng.integers(1, 3)), switch_s=float(rng.choice([0.0, 0.0, 3 * base])),
        deals_anew=bool(rng.integers(2)))


def draw(seed: int, flags: simulator.Flags, dims) -> list[tuple]:
    """(case, rules of roles, of encoding, tiles, rules of switching) of every lane."""
    rng = np.random.default_rng(seed)
    drawn = []
    for lane in range(c.LANES):
        most = MOST_REQUESTS if lane % 2 else test_encode.MOST_REQUESTS
        case = c.draw(rng, most, dims.num_slots, dims.block_size, flags)
        case = replace(case, router=int(rng.integers(len(test_hand_over.PLAIN_ROUTERS))))
        # Crowded, so that queues differ.
        case = replace(case, arrival_s=case.arrival_s * float(rng.choice([0.0, 0.25, 1.0])))
        has_images = dims.has_parts and lane % 8 > 0
        stages = list(ROLES) if has_images else list(ROLES[1:])
        rules = replace(test_hand_over.draw_rules(rng), roles=tuple(draw_roles(rng, stages)))
        tiles = test_encode.draw_tiles(rng, case)
        if len(case) > test_encode.MOST_REQUESTS:
            tiles = [of_one[:1] for of_one in tiles]
        elif lane % 4 == 0:
            tiles = [tuple(rng.integers(1, 5, 3).tolist()) for _ in tiles]
        tiles = tiles if has_images else [()] * len(case)
        switching = draw_switching(rng, case, flags, dims)
        # An image takes about as long as the rest.
        tile_s = switching.sample_s * 2.0 ** -int(rng.integers(0, 6))
        encoding = replace(test_encode.draw_rules(rng), tile_s=tile_s, base_s=tile_s * int(rng.integers(0, 3)),
                           is_split=bool(rng.integers(4)))
        drawn.append((case, rules, encoding, tiles, switching))
    return drawn


def params_of(case, rules, encoding, switching: simulator.RoleSwitching, flags, dims):
    """What the engine is told of a case whose executors change their role."""
    i, x = np.int32, np.float32
    params = test_encode.params_of(case, rules, encoding, flags, dims)
    prefill, encode = params.groups
    own = switching.flags["decode"]
    slower = switching.cost["decode"] is not None and _is_slower(case, switching)
    cost = c.fitted(*(tuple((1 + slower) * value for value in row) for row in case.coefficients))
    decode = Group(replace(prefill.batching, max_num_seqs=i(own.max_num_seqs), num_blocks=i(own.num_blocks)), cost)
    most = 2**30 if rules.hand_over == "push" else math.ceil(rules.waiting_block_share * own.num_blocks)
    roles = np.array([ROLES.index(role) for role in rules.roles], np.int32)
    # By role: encode, prefill, decode.
    group_of = np.array([2, 0, 1], np.int32)
    groups, more = (prefill, decode, encode), {}
    if not dims.has_parts:
        group_of, groups, more = np.array([0, 0, 1], np.int32), groups[:2], dict(encoding=None, source=SortedArrivals())
    return replace(
        params, groups=groups, group_of=group_of[roles],
        hand_over=replace(params.hand_over, most_held=np.full(EXECUTORS, most, np.int32)),
        switching=RoleSwitching(*map(x, (switching.sample_s, switching.decide_s, switching.poll_s,
                                         switching.drain_check_s, switching.switch_s)), np.bool_(switching.deals_anew),
                                roles, group_of, np.arange(3, dtype=i) if rules.named_links else None), **more)


def _is_slower(case: c.Case, switching: simulator.RoleSwitching) -> bool:
    alone = simulator.BatchStatsRef(1, 1, 0, 0, 0, 0, 1)
    return switching.cost["decode"](alone) > switching.cost["prefill"](alone)


def refer(case, rules, encoding, tiles, switching, flags, dims):
    """The reference's answer."""
    requests = [simulator.Request(n, float(case.arrival_s[n]), int(case.prompt[n]), int(case.output[n]),
                                  int(case.max_tokens[n]), 0, tuple(map(float, case.uniforms[n])),
                                  tiles=tiles[n]) for n in range(len(case))]

    def of_each(given):
        return [given["decode" if role == "decode" else "prefill"] for role in rules.roles]

    return simulator.simulate(
        requests, of_each(switching.flags), EXECUTORS, c.MIXED[case.router], of_each(switching.cost),
        disaggregation=rules, encoding=encoding if dims.has_parts else None, switching=switching)


def inputs(drawn, dims, flags):
    """Arguments of `loop.run`, one scenario a lane."""
    params = [params_of(case, rules, encoding, switching, flags, dims) for case, rules, encoding, _, switching in drawn]
    packed = [test_encode.requests_of(case, tiles, encoding.is_split, dims) for case, _, encoding, tiles, _ in drawn]
    if not dims.has_parts:
        packed = [replace(one, images=None, order=None) for one in packed]
    return c.stack(params), c.stack(packed)


def compare(drawn, flags, dims, world=None) -> dict[str, int]:
    """Bit for bit; returns what the cases had in them. world: of the engine, where it is known."""
    seen = dict.fromkeys((
        "cases", "switches", "unfinished", "dealt_again", "dealt_anew", "with_parts_at_work", "with_parts_elsewhere",
        "loaded", "with_transfers_out", "with_running", "with_waiting", "to_and_fro", "beside_others", "plain",
        "preemptions", *(f"{a}_to_{b}" for a in ROLES for b in ROLES if a != b)), 0)
    world = jax.device_get(loop.run(dims, *inputs(drawn, dims, flags))) if world is None else world
    for lane, (case, rules, encoding, tiles, switching) in enumerate(drawn):
        name = f"lane {lane} {rules} {encoding} {switching}"
        try:
            result = refer(case, rules, encoding, tiles, switching, flags, dims)
        except ValueError as error:
            # What can never be served; where parts wait for each other in full caches both say so.
            assert "nothing will ever" not in str(error) or world.fault[lane] == w.STARVED, name
            continue
        got = c.unpack(dims, world, lane, len(case))
        c.compare_requests(got, result, name)
        moved = [r for r in result.requests if r.decode_instance is not None]
        ours = handed_over(world, np.s_[lane, :len(case)])
        for field in ("accepted_s", "delivered_s", "decode_instance"):
            assert [ours[field][r.id] for r in moved] == [getattr(r, field) for r in moved], (name, field)
        parts = embedded(world, lane, np.s_[len(case):len(case) + len(result.parts)])
        for field in ("owner", "started_s", "encoded_s", "accepted_s", "delivered_s"):
            np.testing.assert_array_equal(parts[field], [getattr(p, field) for p in result.parts], f"{name} {field}")
        for instance in range(EXECUTORS):
            mine = [r for r in result.iterations if r.instance == instance]
            count, busy_s = result.encode_iterations.get(instance, (0, 0.0))
            count, busy_s = count + len(mine), busy_s + sum(r.duration_s for r in mine)
            assert (got["num_iterations"][instance], got["busy_s"][instance]) == (count, busy_s), (name, instance)
        assert np.array_equal(got["used_blocks"], world.returned[lane][:-1]), name
        compare_switches(world, lane, result, name)
        tally(seen, case, tiles, encoding, result, got, switching)
    return seen


def compare_switches(world, lane: int, result: simulator.ReferenceResult, name: str) -> None:
    """Who, from which role to which, and when."""
    theirs = result.switches
    ours = role_changes(world, lane)
    want = np.array([[s.instance, ROLES.index(s.source), ROLES.index(s.target),
                      *(np.nan if t is None else t * 2.0**-30 for t in (s.decided, s.stopped, s.emptied, s.changed))]
                     for s in theirs]).reshape(-1, 7)
    np.testing.assert_array_equal(ours, want, f"{name} switches")
    roles = world.roles
    assert roles.num_switches[lane] == len(theirs), name
    assert roles.num_changed[lane] == sum(s.changed is not None for s in theirs), name
    assert roles.num_handed[lane] == result.dealt_again, name


def tally(seen: dict, case, tiles, encoding, result, got, switching) -> None:
    """What one case had in it."""
    seen["cases"] += 1
    seen["plain"] += bool(result.switches) and not any(tiles)
    seen["preemptions"] += int(got["preemptions"].sum())
    done = [s for s in result.switches if s.changed is not None]
    seen["switches"] += len(done)
    seen["unfinished"] += len(result.switches) - len(done)
    seen["dealt_again"] += sum(s.dealt for s in result.switches)
    seen["dealt_anew"] += result.dealt_again - sum(s.dealt for s in result.switches)
    seen["loaded"] += sum(s.changed > s.emptied for s in done)
    seen["to_and_fro"] += len(done) - len({s.instance for s in done})
    seen["beside_others"] += sum(a is not b and a.decided < b.decided < a.changed for a in done for b in done)
    for s in done:
        seen[f"{s.source}_to_{s.target}"] += 1
        waiting, at_work, leaving = s.had
        seen["with_waiting"] += waiting > 0
        seen["with_running"] += s.source != "encode" and at_work > 0
        seen["with_parts_at_work"] += s.source == "encode" and at_work > 0
        seen["with_transfers_out"] += leaving > 0
        stopped_s = s.stopped * 2.0**-30
        held = {p.request for p in result.parts if p.owner == s.instance and p.encoded_s <= stopped_s < p.delivered_s}
        seen["with_parts_elsewhere"] += any(
            p.request in held and p.owner != s.instance and p.encoded_s > stopped_s for p in result.parts)


def test_roles_change_as_in_the_reference():
    flags, dims = simulator.preset("vllm-v1"), c.dims_of(
        "vllm-v1", EXECUTORS, has_roles=True, has_parts=True, has_role_switching=True)
    seen: dict[str, int] = {}
    for seed in c.seeds(2, of=3):
        for name, number in compare(draw(seed, flags, dims), flags, dims).items():
            seen[name] = seen.get(name, 0) + number
    print(seen)
    assert seen["cases"] > 100 and min(seen.values()) > 2, seen


@pytest.mark.slow
@pytest.mark.parametrize("name, has_parts", [("vllm-v1", False), ("sarathi", True)])
def test_other_engines_change_their_role_too(name, has_parts):
    """Prefill and decode engines alone, and other rules."""
    flags, dims = simulator.preset(name), c.dims_of(
        name, EXECUTORS, has_roles=True, has_parts=has_parts, has_role_switching=True)
    seen = compare(draw(11, flags, dims), flags, dims)
    print(seen)
    assert seen["cases"] > 40 and seen["switches"] > 20 and seen["with_running"] > 2, seen


@pytest.mark.slow
def test_a_run_in_which_nothing_can_happen_any_more_is_stopped():
    """Nobody has room for the embeddings of any request: turns alone go on for ever."""
    flags, dims = simulator.preset("vllm-v1"), c.dims_of(
        "vllm-v1", EXECUTORS, has_roles=True, has_parts=True, has_role_switching=True)
    drawn = draw(1, flags, dims)
    params, requests = inputs(drawn, dims, flags)
    none = replace(params.encoding, cache_tiles=jnp.zeros_like(params.encoding.cache_tiles))
    world = jax.device_get(loop.run(dims, replace(params, encoding=none), requests))
    has_images = np.array([any(tiles) for _, _, _, tiles, _ in drawn])
    assert 0 < has_images.sum() < len(drawn)
    np.testing.assert_array_equal(world.fault, np.where(has_images, w.STARVED, 0))
    for lane, (_, _, _, tiles, _) in enumerate(drawn):
        assert world.num_finished[lane] == sum(not of_one for of_one in tiles), lane


def test_the_rule():
    """Queues and engines of encode, prefill and decode, and who moves where."""
    rule = RoleSwitching(*[jnp.float32(1)] * 5, jnp.bool_(False), jnp.zeros(3, jnp.int32))
    for queued, engines, move in (
            ((9, 0, 0), (1, 1, 4), (2, 0)),   # the demo's beginning
            ((9, 5, 5), (1, 1, 4), None),     # all are at least half as long
            ((9, 5, 4), (1, 1, 4), (2, 0)),
            ((8, 4, 4), (1, 1, 4), None),     # exactly half
            ((0, 0, 0), (2, 2, 2), None),
            ((0, 7, 1), (3, 2, 3), (0, 1)),   # ties of sources: the earlier stage
            ((7, 7, 0), (3, 3, 2), (2, 0)),   # ties of targets: the earlier one, and not from who is as long
            ((0, 0, 9), (1, 1, 1), None),     # nobody has more than one
            ((0, 3, 9), (0, 4, 1), (1, 2))):  # no stage without engines
        is_any, source, target = rule.decide(jnp.array(queued), jnp.array(engines))
        assert ((int(source), int(target)) if is_any else None) == move, (queued, engines)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the text of a CPU program")
def test_the_loop_body_copies_nothing_large():
    """Nor is anything transcendental in it."""
    flags, dims = simulator.preset("vllm-v1"), c.dims_of(
        "vllm-v1", EXECUTORS, has_roles=True, has_parts=True, has_role_switching=True)
    arguments = inputs(draw(1, flags, dims), dims, flags)
    large, small = test_compiled.large_shapes(dims, c.LANES)
    assert len(large) >= 5 and not large & small
    text = loop.run.lower(dims, *arguments).compile().as_text()
    assert test_compiled.problems(text, large) == []
