"""Images encoded on executors of their own, or beside the model, against the reference."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim.cost.fitted import fitted
from jaxsim.engine import loop
from jaxsim.engine.common import Group
from jaxsim.engine.outcomes import embedded, handed_over
from jaxsim.policy import routing
from jaxsim.policy.arrivals import PartArrivals
from jaxsim.policy.encoding import Encoder, Encoding
from jaxsim.state.requests import Images, pack_requests
from tests.engine import cases as c
from tests.engine import test_compiled, test_hand_over
from tests.engine.link_cases import over_each
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

EXECUTORS = 6
MOST_REQUESTS, MOST_IMAGES = 12, 3
"""With all their parts fewer than the rows of a program."""


def draw_roles(rng: np.random.Generator) -> list[str]:
    """An encode executor, and somebody for prompts and outputs."""
    pair = [["prefill", "decode"], ["mixed"]][rng.integers(2)]
    others = ["encode", "prefill", "decode", "mixed"] if len(pair) == 2 else ["encode", "mixed"]
    roles = ["encode", *pair]
    roles += rng.choice(others, EXECUTORS - len(roles)).tolist()
    rng.shuffle(roles)
    return [str(role) for role in roles]


def draw_rules(rng: np.random.Generator) -> simulator.Encoding:
    scale = 2.0 ** int(rng.integers(-6, 1))
    return simulator.Encoding(
        is_split=bool(rng.integers(2)), dealing=test_hand_over.PLAIN_ROUTERS[rng.integers(4)],
        max_batch=int(rng.choice([1, 2, 8])), cache_tiles=int(rng.choice([12, 15, 64])),
        waiting_share=float(rng.choice([0.05, 0.25, 1.0])), base_s=scale * int(rng.integers(0, 3)),
        tile_s=scale * 2.0**-2, bytes_per_tile=float(rng.choice([0.0, 1.0, 4.0])))


def draw_tiles(rng: np.random.Generator, case: c.Case) -> list[tuple[int, ...]]:
    """Up to 12 tiles of a request, of none to a few images."""
    return [tuple(rng.integers(1, 5, rng.integers(0, MOST_IMAGES + 1)).tolist()) for _ in range(len(case))]


def draw(seed: int, flags: simulator.Flags, dims) -> list[tuple]:
    """(case, rules of roles, rules of encoding, tiles) of every lane."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(c.LANES):
        case = c.draw(rng, MOST_REQUESTS, dims.num_slots, dims.block_size, flags)
        case = replace(case, router=int(rng.integers(len(test_hand_over.PLAIN_ROUTERS))))
        rules = replace(test_hand_over.draw_rules(rng), roles=tuple(draw_roles(rng)))
        drawn.append((case, rules, draw_rules(rng), draw_tiles(rng, case)))
    return drawn


def params_of(case: c.Case, rules: simulator.Disaggregation, encoding: simulator.Encoding, flags: simulator.Flags,
              dims):
    """What the engine is told of a case whose images others encode."""
    i, x = np.int32, np.float32
    params = test_hand_over.params_of(case, rules, flags)
    roles = np.array(rules.roles)
    encodes = roles == "encode"
    (group,) = params.groups
    batching = replace(group.batching, max_num_seqs=i(encoding.max_batch), max_num_batched_tokens=i(1 << 20),
                       num_blocks=i(encoding.cache_tiles), watermark_blocks=i(0))
    row = (encoding.base_s, encoding.tile_s / dims.block_size, 0, 0, 0)
    most = np.resize(params.hand_over.most_held, EXECUTORS)
    return replace(
        params, groups=(group, Group(batching, fitted(row, row))), group_of=encodes.astype(i), source=PartArrivals(),
        hand_over=replace(params.hand_over, computes_prompts=(roles == "prefill") | encodes, most_held=most),
        encoding=Encoding(
            encodes, c.AnyRouter(i(test_hand_over.PLAIN_ROUTERS.index(encoding.dealing)),
                                 routing.Score(*map(x, case.score))),
            np.full(EXECUTORS, encoding.cache_tiles, i),
            np.full(EXECUTORS, math.ceil(encoding.waiting_share * encoding.cache_tiles), i),
            over_each(rules, encoding.bytes_per_tile)))


def requests_of(case: c.Case, tiles: list[tuple[int, ...]], is_split: bool, dims, has_parts: bool = True):
    each = [[(sum(t),) if t and not is_split else t][0] for t in tiles] if has_parts else [()] * len(tiles)
    part_of = np.repeat(np.arange(len(case)), [len(t) for t in each])
    part_tiles = np.array([n for t in each for n in t], int)
    return pack_requests(case.arrival_s, case.prompt, case.output, case.max_tokens, case.uniforms, dims.num_requests,
                         images=Images(np.array([sum(t) for t in tiles], int), part_of, part_tiles, dims.block_size))


def refer(case, rules, encoding, tiles, flags, dims, **more):
    """The reference's answer."""
    requests = [simulator.Request(i, float(case.arrival_s[i]), int(case.prompt[i]), int(case.output[i]),
                                  int(case.max_tokens[i]), 0, tuple(map(float, case.uniforms[i])),
                                  tiles=tiles[i]) for i in range(len(case))]
    flags = replace(flags, **case.limits, block_size=dims.block_size)
    return simulator.simulate(requests, flags, EXECUTORS, c.MIXED[case.router], c.dyadic_cost(case),
                              disaggregation=rules, encoding=encoding, **more)


def compare(drawn, flags, dims) -> dict[str, int]:
    """Bit for bit; returns what the cases had in them."""
    seen = dict(cases=0, parts=0, split=0, preemptions=0, moved=0, waited=0, queued=0, batches=0, mixed=0, text=0)
    params = c.stack([params_of(case, rules, encoding, flags, dims) for case, rules, encoding, _ in drawn])
    requests = c.stack([requests_of(case, tiles, encoding.is_split, dims) for case, _, encoding, tiles in drawn])
    world = jax.device_get(loop.run(dims, params, requests))
    for lane, (case, rules, encoding, tiles) in enumerate(drawn):
        try:
            result = refer(case, rules, encoding, tiles, flags, dims)
        except ValueError:
            continue
        got, name = c.unpack(dims, world, lane, len(case)), f"lane {lane} {rules} {encoding}"
        c.compare_requests(got, result, name)
        moved = [r for r in result.requests if r.decode_instance is not None]
        ours = handed_over(world, np.s_[lane, :len(case)])
        for field in ("accepted_s", "delivered_s", "decode_instance"):
            assert [ours[field][r.id] for r in moved] == [getattr(r, field) for r in moved], (name, field)
        assert (ours["decode_instance"] >= 0).sum() == len(moved), name
        parts = embedded(world, lane, np.s_[len(case):len(case) + len(result.parts)])
        for field in ("owner", "started_s", "encoded_s", "accepted_s", "delivered_s"):
            np.testing.assert_array_equal(parts[field], [getattr(p, field) for p in result.parts], f"{name} {field}")
        for instance in range(EXECUTORS):
            mine = [r for r in result.iterations if r.instance == instance]
            count, busy_s = len(mine), sum(r.duration_s for r in mine)
            count, busy_s = result.encode_iterations.get(instance, (count, busy_s))
            assert (got["num_iterations"][instance], got["busy_s"][instance]) == (count, busy_s), (name, instance)
        assert np.array_equal(got["used_blocks"], world.returned[lane][:-1]), name
        seen["cases"] += 1
        seen["parts"] += len(result.parts)
        seen["split"] += len(result.parts) - len({p.request for p in result.parts})
        seen["batches"] += len(result.parts) - sum(n for n, _ in result.encode_iterations.values())
        seen["queued"] += sum(p.started_s > result.requests[p.request].arrival_s for p in result.parts)
        seen["preemptions"] += int(got["preemptions"].sum())
        seen["moved"] += len(moved)
        seen["waited"] += result.encode_waits
        seen["mixed"] += "mixed" in rules.roles
        seen["text"] += sum(not t for t in tiles)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vllm-v1", "sarathi"])
def test_parts_encoded_elsewhere_are_as_in_the_reference(name):
    flags, dims = simulator.preset(name), c.dims_of(name, EXECUTORS, has_roles=True, has_parts=True)
    seen = compare(draw(1, flags, dims), flags, dims)
    assert seen["cases"] > 40 and min(seen.values()) > 5, seen


@pytest.mark.parametrize("name", ["vllm-v1", pytest.param("vllm-v0", marks=pytest.mark.slow)])
def test_an_encoder_beside_the_model_is_as_in_the_reference(name):
    """Iterations are longer that begin prompts with images: prompt-first engines, jumps, preemptions included."""
    flags, dims, replicas = simulator.preset(name), c.dims_of(name, 3, has_encoder=True), 3
    rng = np.random.default_rng(2)
    drawn = [(case, draw_tiles(rng, case), rng.integers(0, 3, (replicas, 2)) * 2.0 ** -int(rng.integers(2, 5)))
             for case in c.draw_many(2, flags, dims)]
    params = c.stack([replace(c.make_params(case, flags, "mixed"),
                              encoder=Encoder(*seconds.T.astype(np.float32))) for case, _, seconds in drawn])
    requests = c.stack([requests_of(case, tiles, True, dims, has_parts=False) for case, tiles, _ in drawn])
    world = jax.device_get(loop.run(dims, params, requests))
    seen = dict(preemptions=0, slower=0, jumps=0)
    for lane, (case, tiles, seconds) in enumerate(drawn):
        got = c.unpack(dims, world, lane, len(case))
        asked = [simulator.Request(i, float(case.arrival_s[i]), int(case.prompt[i]), int(case.output[i]),
                                   int(case.max_tokens[i]), 0, tuple(map(float, case.uniforms[i])), tiles=tiles[i])
                 for i in range(len(case))]
        rules = replace(flags, **case.limits, block_size=dims.block_size)
        router = c.MIXED[case.router]
        router = {"score": c.score_reference(rules.num_blocks, case.score), "first": lambda *_: 0}.get(router, router)
        result = simulator.simulate(asked, rules, replicas, router, c.dyadic_cost(case), encoder=seconds.tolist())
        c.compare_requests(got, result, f"lane {lane}")
        for instance in range(replicas):
            mine = [r for r in result.iterations if r.instance == instance]
            assert (got["num_iterations"][instance], got["busy_s"][instance]) == (
                len(mine), sum(r.duration_s for r in mine)), lane
        seen["preemptions"] += int(got["preemptions"].sum())
        seen["slower"] += sum(r.duration_s > c.dyadic_cost(case)(r.stats) for r in result.iterations)
        seen["jumps"] += max(len(result.iterations) - got["steps"], 0)
    assert min(seen.values()) > 5, seen


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the text of a CPU program")
@pytest.mark.slow
def test_the_loop_body_copies_nothing_large():
    """Nor is anything transcendental in it."""
    flags, dims = simulator.preset("vllm-v1"), c.dims_of("vllm-v1", EXECUTORS, has_roles=True, has_parts=True)
    drawn = draw(1, flags, dims)
    params = c.stack([params_of(case, rules, encoding, flags, dims) for case, rules, encoding, _ in drawn])
    requests = c.stack([requests_of(case, tiles, encoding.is_split, dims) for case, _, encoding, tiles in drawn])
    large, small = test_compiled.large_shapes(dims, c.LANES)
    assert len(large) >= 5 and not large & small
    text = loop.run.lower(dims, params, requests).compile().as_text()
    assert test_compiled.problems(text, large) == []
