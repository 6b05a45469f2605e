"""Routers that know prompts: the engine against the reference, rules one by one, what is refused."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Int

from jaxsim._core.errors import InputError
from jaxsim.engine import loop, prefix
from jaxsim.engine.environment import Environment
from jaxsim.engine.simulate import simulate
from jaxsim.policy import cache_routing, routing
from jaxsim.spec.scenario import Scenario
from jaxsim.workload import ring
from tests.engine import cases as c
from tests.engine.test_compiled import large_shapes, problems
from tests.engine.test_lockstep import has_whole_twins
from tests.engine.test_prefix import draw
from tests.reference import cache_routing as theirs
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

SIZES = dict(block_size=4, num_segments=256, path_width=24, log_size=4096, tracks_prefill=True, tracks_sent=True,
             has_noise=True, route_by="prefix")

NAMES = ("cache_aware", "prefix_hash", "kv_aware", "dynamo_kv", "weighted_scorers")

HASHED_TOKENS = 8
"""Instead of 256: two blocks."""


class AnyCacheRouter(routing.AbstractRouting):
    """Any of `NAMES` by number: every rule is asked, one answer is taken."""

    which: Int[Array, ""]
    rules: tuple[routing.AbstractRouting, ...]
    reads_kv = True
    reads_waiting = True
    reads_prompt = True
    reads_cache = True
    reads_sent = True
    reads_prefill = True
    reads_noise = True
    route_by = "prefix"

    def choose(self, view: routing.View) -> Int[Array, ""]:
        return jnp.stack([rule.choose(view) for rule in self.rules])[self.which]


def numbers_of(rng: np.random.Generator) -> tuple[dict[str, float], ...]:
    """Dyadic numbers for each of `NAMES`, by which every branch is taken somewhere."""
    def one(*values):
        return float(rng.choice(values))

    return (dict(cache_threshold=one(0.25, 0.5), balance_abs=one(1, 1, 2), balance_rel=one(1.0, 1.5),
                 smallest_tree=one(0, 1)),
            dict(load_factor=one(1.25, 1.0)), dict(beta=one(0.0, 0.5, 1.0)),
            dict(overlap_weight=one(0.0, 1.0, 2.0), temperature=one(0.0, 0.25, 1.0)),
            dict(prefix_weight=one(1.0, 4.0), queue_weight=one(0.0, 2.0), kv_weight=one(0.0, 2.0)))


def their_router(which: int, numbers: dict, dims, homes: np.ndarray, noise: np.ndarray):
    """The reference's, made anew for a run."""
    if which == 0:
        threshold, *balance, smallest = numbers.values()
        return theirs.CacheAware(dims.all_ranks, dims.block_size, threshold, *balance, bool(smallest))
    return {1: lambda: theirs.PrefixHash(homes, **numbers), 2: lambda: theirs.KvAware(**numbers),
            3: lambda: theirs.DynamoKV(noise, **numbers), 4: lambda: theirs.WeightedScorers(**numbers)}[which]()


def inputs(batch, chosen, flags, dims):
    """Arguments of the loop, with homes and noise as the reference has them too."""
    params, requests, tables = [], [], []
    for case, (which, numbers) in zip(batch, chosen, strict=True):
        rules = tuple(routing.routers()[name](**{k: np.float32(v) for k, v in own.items()})
                      for name, own in zip(NAMES, numbers, strict=True))
        params.append(replace(c.make_params(case, flags, "round_robin"),
                              routing=AnyCacheRouter(np.int32(which), rules)))
        found = c.segments(case, replace(dims, has_noise=False, route_by=""))
        keys = ring.prefix_keys(np.where(found["paths"] == dims.num_segments, -1, found["paths"]), found["bounds"],
                                case.prompt, HASHED_TOKENS, dims.block_size)
        homes, noise = ring.homes(keys, dims.all_ranks), ring.gumbels(case.uniforms, dims.all_ranks)
        tables.append((homes, noise.astype(np.float32)))
        requests.append(c.pack_requests(
            case.arrival_s, case.prompt, case.output, case.max_tokens, case.uniforms, num_requests=dims.num_requests,
            priority=case.priority, home=homes, noise=noise, **found))
    return c.stack(params), c.stack(requests), tables


def crowded(case: c.Case, dims, rng: np.random.Generator) -> c.Case:
    """The same in hardly more memory than its longest request needs: what nobody holds is soon evicted."""
    need = -(-int(np.max(case.prompt + case.max_tokens)) // dims.block_size)
    return replace(case, limits=case.limits | dict(num_blocks=need + int(rng.integers(0, need // 2 + 2))))


def served(case: c.Case, flags, dims, rule) -> simulator.ReferenceResult | None:
    """The reference's answer; None for what can never be served."""
    try:
        return c.reference(case, flags, dims, rule)
    except ValueError:
        return None


@pytest.mark.parametrize("name", ["vllm-v1", pytest.param("vllm-v1-async", marks=pytest.mark.slow)])
def test_engine_equals_reference(monkeypatch, name):
    """Places and times bit for bit: what is cached where, queues, sums of prompts, trees, ties and draws.

    A look at one entry of the log does not cover what jumps have evicted, so arrivals wait for steps that settle it.
    """
    monkeypatch.setattr(prefix, "LOOKS", 1)
    flags = replace(simulator.preset(name), prefix_caching=True)
    dims = c.dims_of(name, 3, **SIZES)
    seen = Counter()
    for seed in c.seeds(2, of=3):
        rng = np.random.default_rng(seed)
        batch = [crowded(case, dims, rng) for case in draw(seed, flags, dims) if not has_whole_twins(case, dims)]
        # One that cannot be served would go round until the limit of steps, and all others with it.
        batch = [case for case in batch if served(case, flags, dims, "round_robin")]
        chosen = [(i % len(NAMES), numbers_of(rng)) for i in range(len(batch))]
        full = c.LANES - len(batch)
        params, requests, tables = inputs(batch + batch[:1] * full, chosen + chosen[:1] * full, flags, dims)
        world = jax.device_get(loop.run(dims, params, requests))
        for lane, (case, (which, numbers)) in enumerate(zip(batch, chosen, strict=True)):
            rule = their_router(which, numbers[which], dims, *tables[lane])
            result = served(case, flags, dims, rule)
            ours = c.unpack(dims, world, lane, len(case))
            c.compare_requests(ours, result, f"{NAMES[which]} {seed} {lane}")
            np.testing.assert_array_equal(ours["cached_tokens"], [r.cached_tokens for r in result.requests])
            if which == 0:
                tree = c.w.count_rows(dims).everything(world.counts[lane]).rank.tree_tokens.ravel()
                np.testing.assert_array_equal(tree, rule.tokens)
            assert not c.w.count_rows(dims).everything(world.counts[lane]).rank.prefill_tokens.any()
            seen[NAMES[which]] += 1
            seen.update(f"{NAMES[which]} {why}" for why in rule.reasons)
    expected = {*NAMES, "cache_aware uneven", "cache_aware match", "cache_aware tree", "cache_aware queue",
                "prefix_hash home", "prefix_hash elsewhere", "kv_aware cached", "dynamo_kv least", "dynamo_kv drawn",
                "weighted_scorers tie", "weighted_scorers best"}
    assert min(seen[key] for key in expected) > 5, seen


# ---- rules one by one


def view(**fields) -> routing.View:
    """Three instances with nothing to do, and what is given."""
    count = len(next(iter(fields.values())))
    zeros = jnp.zeros(count, jnp.int32)
    fields = {name: jnp.asarray(value) for name, value in fields.items()}
    given = dict(outstanding=zeros, waiting=zeros, used_blocks=zeros, num_blocks=zeros + 100, num_routed=jnp.int32(0),
                 uniforms=jnp.zeros(2), prompt_tokens=jnp.int32(160), cached_tokens=zeros, matched_tokens=zeros,
                 tree_tokens=zeros, prefill_tokens=zeros, home=jnp.int32(0), noise=jnp.zeros(count))
    return routing.View(**(given | fields), block_size=16)


def test_dynamos_worked_example():
    """Ten blocks of prompt, of which 2, 5 and 8 are cached: 18, 10 and 11 blocks, so the second worker."""
    rule = cache_routing.DynamoKV()
    # The request's own ten blocks are among those to decode: the documentation's 10, 5 and 9 hold them.
    seen = view(cached_tokens=[32, 80, 128], used_blocks=[0, -5, -1])
    assert rule.cost(seen).tolist() == [18, 10, 11] and int(rule.choose(seen)) == 1


def test_dynamos_temperature_is_a_softmax():
    """Shares of draws are those of softmax(-scaled cost / temperature)."""
    count, temperature = 20_000, 0.5
    noise = ring.gumbels(np.random.default_rng(0).random((count, 2)), 3)
    seen = view(cached_tokens=[32, 80, 128], used_blocks=[0, -5, -1])
    rule = cache_routing.DynamoKV(temperature=np.float32(temperature))
    chosen = jax.vmap(lambda own: rule.choose(replace(seen, noise=own)))(jnp.asarray(noise, jnp.float32))
    weights = np.exp(-np.array([1.0, 0.0, 1 / 8]) / temperature)
    np.testing.assert_allclose(np.bincount(chosen, minlength=3) / count, weights / weights.sum(), atol=0.012)


@pytest.mark.parametrize("load, matched, chosen", [
    ([0, 64, 0], [0, 100, 0], 1),  # not beyond 64: the match
    ([3, 68, 4], [0, 100, 0], 0),  # beyond both gates: the shortest queue
    ([130, 194, 131], [0, 100, 0], 1),  # 194 is less than 1.5 x 130
    ([2, 1, 3], [0, 48, 0], 1),  # 0.3 of the prompt is not enough, the shortest queue is
    ([2, 1, 3], [49, 0, 0], 0)])
def test_sglangs_gates(load, matched, chosen):
    """Both must be passed; a match must be more than the threshold."""
    assert int(cache_routing.CacheAware().choose(view(outstanding=load, matched_tokens=matched))) == chosen


def test_sglangs_smallest_tree():
    rule = cache_routing.CacheAware(smallest_tree=np.float32(1))
    assert int(rule.choose(view(outstanding=[0, 5, 9], tree_tokens=[900, 800, 100]))) == 2


@pytest.mark.parametrize("load, chosen", [([0, 0, 0], 2), ([2, 2, 3], 2), ([2, 2, 4], 0), ([1, 0, 9], 1)])
def test_prefix_hash_bounds_the_load(load, chosen):
    """1.25 x (outstanding + 1) / 3: 3 is within 3.33, 4 not within 3.75."""
    assert int(cache_routing.PrefixHash().choose(view(outstanding=load, home=np.int32(2)))) == chosen


def test_load_counts_against_a_match():
    """Load 3 of a mean of 1 costs 2 x beta, more than a whole match."""
    seen = view(outstanding=[3, 0, 0], cached_tokens=[144, 0, 0])
    assert int(cache_routing.KvAware().choose(seen)) == 1
    assert int(cache_routing.KvAware(np.float32(0.25)).choose(seen)) == 0


def test_scorers_add_up():
    """3 x 0.9 for the prefix is less than 2 for the queue and 2 x 0.5 for memory."""
    seen = view(cached_tokens=[144, 0, 0], waiting=[5, 0, 5], used_blocks=[50, 0, 0])
    assert int(cache_routing.WeightedScorers().choose(seen)) == 1
    assert int(cache_routing.WeightedScorers(np.float32(4)).choose(seen)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_inactive_instances_get_nothing(name):
    """Whatever speaks for them."""
    rule = routing.routers()[name]()
    seen = view(is_active=[False, True, True], outstanding=[0, 2, 1], cached_tokens=[160, 0, 0],
                matched_tokens=[160, 0, 0], noise=[9.0, 0.0, 0.0])
    if name != "prefix_hash":  # its home stays, and the engine moves on from there
        assert int(rule.choose(seen)) in (1, 2)


# ---- homes


def test_homes_are_of_what_prompts_begin_with():
    """Equal first 256 tokens, equal homes; a prompt that shares less has a home of its own."""
    paths = np.array([[0, 1], [0, 2], [0, -1], [3, -1], [4, -1], [4, -1]])
    bounds = np.array([[0, 16, 40], [0, 16, 20], [0, 16, 16], [0, 8, 8], [0, 8, 8], [0, 8, 8]])
    tokens = np.array([700, 400, 256, 300, 140, 130])
    keys = ring.prefix_keys(paths, bounds, tokens, 256, 16)
    assert keys[0] == keys[1] == keys[2] and len(set(keys[2:5].tolist())) == 3 and keys[4] == keys[5]


def test_a_ring_is_even_and_stays():
    """Instances have about equal shares; with one more, only keys that go to it move."""
    keys = np.arange(40_000)
    eight, nine = ring.homes(keys, 8), ring.homes(keys, 9)
    assert np.all((eight == nine) | (nine == 8)) and 0.08 < np.mean(nine == 8) < 0.15
    # Of 160 places each, a share has a deviation of 1 / sqrt(160) of itself.
    np.testing.assert_allclose(np.bincount(eight) / len(keys), 1 / 8, rtol=0.3)


@pytest.mark.parametrize("count", [50, 100, 400])
def test_few_sessions_spread_over_a_ring(count):
    """Numbers of sessions are small, as those of places are: they have nothing to do with each other."""
    shares = np.bincount(ring.homes(np.arange(count), 8), minlength=8) / count
    assert shares.max() < 0.3 and np.count_nonzero(shares) == 8


# ---- scenarios


def scenario(router: str, caching: bool = True, **changes) -> Scenario:
    form = {"a": 0.01, "b": 1e-4}
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 1,
        "engine": {"preset": "vllm-v1", "enable_prefix_caching": caching, "max_model_len": 1024, "max_num_seqs": 8,
                   "max_num_batched_tokens": 512, "num_gpu_blocks_override": 200},
        "cluster": {"replicas": 3, "router": router},
        "workload": {"kind": "poisson", "rate_rps": 20.0, "num_requests": 200, "input": 30, "output": 4,
                     "prefix_groups": {"number": 9, "tokens": 480}},
        "cost": {"kind": "fitted", "prefill": form, "decode": form}}).with_values(changes)


@pytest.mark.parametrize("router, least", [
    pytest.param("cache_aware", 0.8, marks=pytest.mark.slow), ("prefix_hash", 0.7)])
@pytest.mark.slow
def test_affinity_finds_what_blind_routing_does_not(router, least):
    """Nine prefixes of thirty blocks: a cache has room for six, of nine blind routing brings to each."""
    result = simulate([scenario(router, **({} if router != "cache_aware" else
                                           {"cluster.router_weights": {"smallest_tree": 1.0}})),
                       scenario("round_robin")])
    found = [np.mean(lanes[0].cached_tokens >= 480) for lanes in result.lanes]
    assert found[0] > least > found[1] + 0.1, found


@pytest.mark.parametrize("changes, text", [
    (dict(router="cache_aware", caching=False), "without prefix caching"),
    (dict(router="kv_aware", caching=False), "without prefix caching"),
    (dict(router="session_affinity"), "needs sessions"),
    ({"router": "cache_aware", "engine.pipeline_parallel_size": 2}, "pipeline stages"),
    ({"router": "round_robin", "workload.prefix_groups.tokens": 500}, "whole KV blocks"),
    ({"router": "round_robin", "workload.prefix_groups.exponent": 1.2}, "no effect"),
    ({"router": "round_robin", "workload.prefix_groups.tokens": 1024}, "the longest request needs"),
    ({"router": "round_robin", "workload.kind": "conversation"}, "prefix_groups")])
def test_what_is_refused(monkeypatch, changes, text):
    def reached(*_):
        raise AssertionError("a bad input reached the compiled loop")

    monkeypatch.setattr(loop, "run", reached)
    with pytest.raises(InputError, match=text):
        simulate(scenario(**changes))


def test_a_tree_that_would_forget_is_refused(monkeypatch):
    monkeypatch.setattr("jaxsim.engine.lower.checks.TREE_TOKENS", 5_000)
    with pytest.raises(InputError, match="before it forgets"):
        simulate(scenario("cache_aware"))


@pytest.mark.slow
def test_the_loop_body_copies_nothing_large():
    """What routers keep is written in place; nothing transcendental in a step."""
    flags = replace(simulator.preset("vllm-v1"), prefix_caching=True)
    # Paths of a width that no array over slots or requests has.
    dims = c.dims_of("vllm-v1", 3, **(SIZES | dict(path_width=40)))
    batch = draw(1, flags, dims)
    rng = np.random.default_rng(1)
    params, requests, _ = inputs(batch, [(i % len(NAMES), numbers_of(rng)) for i in range(len(batch))], flags, dims)
    large, _ = large_shapes(dims, c.LANES)
    assert problems(loop.run.lower(dims, params, requests).compile().as_text(), large) == []


def test_routers_are_refused_where_nothing_is_kept_for_them():
    """Decode engines, ranks that iterate together, an environment made for another router."""
    system = {"schema_version": 1, "num_seeds": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
              "engine": {"max_model_len": 4096},
              "workload": {"kind": "poisson", "rate_rps": 8.0, "num_requests": 60, "input": 900, "output": 9}}
    pools = {"pools": [{"role": "prefill"}, {"role": "decode", "replicas": 2}], "transfer": {"router": "kv_aware"}}
    with pytest.raises(InputError, match="decode engines do not keep"):
        simulate(Scenario.from_dict(system | {"cluster": pools}))
    together = {"engine": {"max_model_len": 4096, "data_parallel_size": 2, "enable_expert_parallel": True,
                           "enable_prefix_caching": True}, "model": {"name": "qwen3-30b-a3b"},
                "cluster": {"router": "kv_aware"}}
    with pytest.raises(InputError, match="iterate together"):
        simulate(Scenario.from_dict(system | together))
    with pytest.raises(InputError, match="does not keep"):
        Environment(Scenario.from_dict(system | {"cluster": {"replicas": 2}}), 1.0, cache_routing.KvAware())
