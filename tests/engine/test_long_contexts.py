"""Chunks as long as an iteration may take, and KV that groups of devices share, against the reference, bit for bit."""

from collections import Counter
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsim
from jaxsim import InputError, Scenario
from jaxsim.analytic import long_context as lc
from jaxsim.analytic.lower import of_scenario
from jaxsim.engine import chunks, loop, lower
from jaxsim.engine.lower.long_contexts import make_kv_parallel
from jaxsim.policy.chunks import Chunks
from jaxsim.policy.kv_parallel import KvParallel
from jaxsim.spec.dims import Dims
from jaxsim.spec.model import load_model
from jaxsim.study.lanes import Lanes
from jaxsim.study.plan import plan
from jaxsim.study.study import Study
from jaxsim.workload import Workload
from tests.engine import cases as c
from tests.engine import test_compiled
from tests.reference import simulator
from tests.reference.long_contexts import Groups

pytestmark = pytest.mark.unoptimised

STAGES = 4


@dataclass
class Long:
    """A case with a time for iterations, the least tokens of a chunk, and groups that share KV."""

    case: c.Case
    target_s: float
    least: int
    groups: Groups

    def __len__(self) -> int:
        return len(self.case)

    def kept(self, mask: np.ndarray) -> "Long":
        return replace(self, case=self.case.kept(mask))


def draw(rng: np.random.Generator, case: c.Case) -> Long:
    """A time that some decodes and a chunk just take, or a bit less or more; in some lanes one that never binds, or
    groups that never share."""
    price, scale = c.dyadic_cost(case), max(case.coefficients[0][0], 2.0**-10)
    tokens, decodes = int(rng.integers(1, 30)), int(rng.integers(0, 8))
    history = int(rng.integers(0, 40))
    just = price(simulator.BatchStatsRef(decodes, decodes * int(rng.integers(1, 60)), 1, tokens,
                                         (history + tokens)**2 - history**2, history + tokens, decodes))
    target = float(rng.choice([1.0, 1.0, 1.0, 2.0])) * just + scale * float(rng.choice([-0.25, 0.0, 0.0, 0.25]))
    groups = Groups(int(rng.choice([1, 2, 4])), int(rng.integers(1, 30)),
                    *(scale * float(x) for x in rng.choice([0.0, 0.125, 0.5], 2) * (1.0, 0.125)))
    return Long(case, float(2.0**20 if rng.random() < 0.1 else target), int(rng.choice([1, 1, 2, 5])), groups)


def draw_many(seed: int, flags: simulator.Flags, dims: Dims) -> list[Long]:
    rng = np.random.default_rng([seed, 17])
    return [draw(rng, case) for case in c.draw_many(seed, flags, dims)]


def inputs(batch: list[Long], flags: simulator.Flags, dims: Dims, router: str, has_target: bool) -> tuple:
    """Arguments of `loop.run` for a batch, padded to `LANES`."""
    padded = batch + batch[:1] * (c.LANES - len(batch))
    params, requests = c.inputs([one.case for one in padded], flags, dims, router)

    def stacked(values, dtype):
        return jax.numpy.asarray(np.array(list(values)), dtype)

    more = {}
    if has_target:
        more["chunks"] = Chunks(stacked((one.target_s for one in padded), np.float32),
                                stacked((one.least for one in padded), np.int32))
    if dims.has_kv_parallel:
        more["kv_parallel"] = KvParallel(
            stacked((one.groups.groups for one in padded), np.int32),
            stacked((one.groups.tokens for one in padded), np.int32),
            stacked((one.groups.merge_s for one in padded), np.float32),
            stacked((one.groups.token_merge_s for one in padded), np.float32))
    group = replace(params.groups[0], batching=replace(params.groups[0].batching, **more))
    return replace(params, groups=(group,)), requests


def run(batch: list[Long], flags: simulator.Flags, dims: Dims, router: str, has_target: bool) -> list[dict]:
    """Engine results of a batch."""
    world = jax.device_get(loop.run(dims, *inputs(batch, flags, dims, router, has_target)))
    return [c.unpack(dims, world, lane, len(one)) for lane, one in enumerate(batch)]


def reference(one: Long, flags: simulator.Flags, dims: Dims, router: str, has_target: bool, **changes
              ) -> simulator.ReferenceResult:
    if has_target:
        changes = dict(target_s=one.target_s, min_chunk_tokens=one.least) | changes
    if dims.has_kv_parallel:
        changes = dict(kv_groups=one.groups) | changes
    return c.reference(one.case, replace(flags, **changes), dims, router)


def compare(seed: int, flags: simulator.Flags, dims: Dims, router: str, has_target: bool = True) -> Counter:
    """All cases of a seed agree; returns what they had in them."""
    def compared(batch):
        results, wrong = [], []
        for one, lane in zip(batch, run(batch, flags, dims, router, has_target), strict=True):
            try:
                result = reference(one, flags, dims, router, has_target)
            except ValueError:
                results.append(None)
                wrong.append(None)
                continue
            results.append(result)
            want = c.answer(result, dims.num_executors, one.case.limits["num_blocks"])
            if flags.stages > 1:
                want = {name: want[name] for name in (*c.REQUEST_FIELDS, "num_iterations", "peak_blocks")}
            wrong.append(c.differences(lane, want))
        return results, wrong

    batch, seen = draw_many(seed, flags, dims), Counter()
    for one, result in zip(batch, c.agree(seed, batch, compared), strict=True):
        if result is not None:
            seen += exercised(one, result, flags, dims, router, has_target)
    return seen


def exercised(one: Long, result: simulator.ReferenceResult, flags, dims, router, has_target) -> Counter:
    """Iterations whose chunk the time cut, that were longer than it all the same, in which several prompts shared it,
    or that were of contexts on several groups; runs that were others without either."""
    seen, limits = Counter(cases=1, preemptions=sum(r.preemptions for r in result.requests)), one.case.limits
    prompts = one.case.prompt
    for record in result.iterations:
        s = record.stats
        full = s.num_decode + s.prefill_tokens == limits["max_num_batched_tokens"]
        seen["cut"] += s.num_prefill > 0 and s.num_sampled < s.num_decode + s.num_prefill and not full
        seen["shared"] += s.num_prefill > 1
        seen["over"] += s.num_prefill > 0 and record.duration_s > one.target_s
        seen["at once"] += s.num_prefill > 0 and record.duration_s == one.target_s
        seen["spread"] += one.groups.groups > 1 and prompts[list(record.batch)].max() > one.groups.tokens
    if has_target:
        plain = reference(one, flags, dims, router, has_target, target_s=None)
        seen["others in time"] += [r.finish_s for r in plain.requests] != [r.finish_s for r in result.requests]
    if dims.has_kv_parallel:
        alone = reference(one, flags, dims, router, has_target, kv_groups=None)
        seen["others on groups"] += [r.finish_s for r in alone.requests] != [r.finish_s for r in result.requests]
    return seen


FLAGS, DIMS = simulator.preset("vllm-v1"), c.dims_of("vllm-v1", 3, has_kv_parallel=True)
"""Of the program that most tests here share."""


def test_engine_equals_reference():
    """Both at once, three instances, blocks that run short."""
    seen = Counter()
    for seed in c.seeds(1, of=6):
        seen += compare(seed, FLAGS, DIMS, "mixed")
    assert seen["cases"] > 50 and seen["cut"] > 200 and seen["shared"] > 20 and seen["preemptions"] > 5, seen
    assert seen["over"] > 20 and seen["at once"] > 20 and seen["spread"] > 100, seen
    assert seen["others in time"] > 10 and seen["others on groups"] > 10, seen


def alone(prompt: int, cost: lc.LongContext, *, most: int) -> c.Case:
    """One prompt and nothing behind its first token, at the coefficients of a closed form."""
    row = (float(cost.fixed_s), float(cost.token_s), 0.0, 0.0, float(cost.pair_s) / 2)
    limits = dict(max_num_seqs=4, max_num_batched_tokens=most, watermark_blocks=0, num_blocks=1 << 23,
                  max_model_len=1 << 25)
    one = np.ones(1, int)
    return c.Case(np.zeros(1), prompt * one, one, one, 0 * one, np.zeros((1, 2), np.float32), limits, (row,) * 3)


def test_chunks_are_those_of_the_closed_form():
    """As many, in the same time, of prompts alone, with pairs at a quarter of the price on four groups from the start;
    what groups merge is fixed."""
    rng, batch, want = np.random.default_rng(0), [], []
    for lane in range(c.LANES):
        groups = int(rng.choice([1, 2, 4]))
        merge_s = 2.0**-10 if groups > 1 else 0.0
        cost = lc.LongContext(2.0**-9, 2.0**-18, 2.0**-int(rng.integers(24, 30)), 0.0, 0.0, merge_s)
        prompt, target, least = int(rng.integers(500, 5000)), float(rng.choice([0.006, 0.01, 0.02])), lane % 3 + 1
        chunks = lc.adaptive_chunks(prompt, cost, target, least=least, most=4096, groups=groups)
        want.append((len(chunks), float(np.sum(cost.chunk_seconds(chunks, groups)))))
        batch.append(Long(alone(prompt, cost, most=4096), target, least, Groups(groups, 1, merge_s, 0.0)))
    lanes = run(batch, FLAGS, DIMS, "mixed", has_target=True)
    assert max(count for count, _ in want) > 30
    for lane, (count, seconds) in zip(lanes, want, strict=True):
        # A threshold of one token, and whole numbers where the root is near one.
        assert lane["fault"] == 0 and abs(lane["num_iterations"].sum() - count) <= 1
        assert lane["first_token_s"][0] == pytest.approx(seconds, rel=2e-3)


def test_ten_million_tokens():
    """Ten chunks of a million, then a decode: no sum runs over, on one group and on four that each take 2.5 million."""
    cost, prompt = lc.LongContext(1e-3, 1e-8, 1e-13, 0.0, 0.0), 10_000_000
    case = replace(alone(prompt, cost, most=1_000_000), output=np.array([3]), max_tokens=np.array([3]))
    batch = [Long(case, 2.0**20, 1, Groups(groups, 2_500_000)) for groups in (1, 4)]
    one, four = run(batch, FLAGS, DIMS, "mixed", has_target=True)
    for lane in (one, four):
        assert lane["fault"] == 0 and lane["num_iterations"].sum() == 12
    pairs = {1: prompt**2, 4: 2_500_000**2 + 2 * 2_500_000 * 7_500_000}
    for lane, groups in ((one, 1), (four, 4)):
        want = 10 * 1e-3 + 1e-8 * prompt + 0.5e-13 * pairs[groups]
        assert lane["first_token_s"][0] == pytest.approx(want, rel=1e-5)


def draw_run(rng: np.random.Generator, flags: simulator.Flags, dims: Dims) -> Long:
    """A few long prompts on costs whose chunks shrink as they go on; some wait, some arrive at the very end of a chunk
    of the first, or just before."""
    count = int(rng.integers(1, 4))
    row = (2.0**-6, 2.0**-9, 2.0**-12, 0.0, 2.0 ** -float(rng.integers(14, 18)))
    prompt = np.where(rng.random(count) < 0.6, rng.integers(100, 400, count), rng.integers(1, 30, count))
    arrival = np.cumsum(rng.integers(0, rng.choice([2, 40, 400]), count) * 2.0**-4)
    output = np.where(rng.random(count) < 0.7, 1, rng.integers(2, 6, count))
    need = -(-int((prompt + output).max()) // dims.block_size)
    limits = dict(max_num_seqs=int(rng.integers(1, 4)), max_num_batched_tokens=int(rng.integers(8, 64)),
                  watermark_blocks=0, num_blocks=need + int(rng.integers(0, need)), max_model_len=1024)
    case = c.Case(arrival, prompt, output, output, np.zeros(count, int),
                  rng.random((count, 2)).astype(np.float32), limits, (row,) * 3,
                  router=int(rng.choice([0, len(c.MIXED) - 1])))
    target = 2.0**-6 + 2.0**-9 * int(rng.integers(4, 40))
    groups = Groups(int(rng.choice([1, 1, 2, 4])), int(rng.integers(20, 200)), 2.0**-8, 2.0**-11)
    drawn = Long(case, target, int(rng.choice([1, 1, 3, 8])), groups)
    if rng.random() < 0.5:
        first = reference(drawn.kept(np.arange(count) < 1), flags, dims, "first", has_target=True)
        ends = [record.end_s for record in first.iterations]
        case.arrival_s[1:] = np.sort(rng.choice(ends, count - 1) - rng.choice([0.0, 0.0, 2.0**-10], count - 1))
    return drawn


def compare_runs(seed: int, flags: simulator.Flags, dims: Dims, count: int = 40) -> Counter:
    """Cases of long prompts, by the engine and step by step by the reference; how many chunks had no step of their
    own, behind another of the same size or one more, and which arrivals came while a run could have gone on."""
    rng, seen = np.random.default_rng([seed, 23]), Counter()
    batch = [draw_run(rng, flags, dims) for _ in range(count)]
    for one, lane in zip(batch, run(batch, flags, dims, "mixed", has_target=True), strict=True):
        result = reference(one, flags, dims, "mixed", has_target=True)
        want = c.answer(result, dims.num_executors, one.case.limits["num_blocks"])
        assert c.differences(lane, want) == [], one
        alone = [(r.instance, r.stats, r.start_s, r.start_s + r.duration_s) for r in result.iterations
                 if r.stats.num_prefill == 1 and r.stats.num_sampled == 0]
        seen["chunks"] += len(alone)
        seen["ties"] += len({end for *_, end in alone} & set(one.case.arrival_s))
        seen["arrivals within"] += sum(any(a < t < b for *_, a, b in alone) for t in one.case.arrival_s)
        seen["without a step"] += max(len(result.iterations) - lane["steps"], 0)
        sizes = [stats.prefill_tokens for _, stats, *_ in alone]
        for before, after in zip(sizes, sizes[1:], strict=False):
            seen["equal" if before == after else "one less" if before == after + 1 else "others"] += 1
    return seen


def test_several_chunks_in_a_step_equal_the_reference():
    """In the program that tests here share: bit for bit, with arrivals in between, and at the very end of a chunk."""
    seen = Counter()
    for seed in c.seeds(1, of=6):
        seen += compare_runs(seed, FLAGS, DIMS)
    assert seen["chunks"] > 500 and seen["without a step"] > 300, seen
    assert seen["equal"] > 100 and seen["one less"] > 30 and seen["others"] > 10, seen
    assert seen["arrivals within"] > 5 and seen["ties"] > 3, seen


@pytest.mark.slow
@pytest.mark.parametrize("name, changes", [("vllm-v1-async", {}), ("sarathi", {}), ("vllm-v1", dict(max_jump=3))])
def test_other_engines_take_several_chunks_in_a_step(name, changes):
    flags, dims, seen = simulator.preset(name), c.dims_of(name, 1, has_kv_parallel=True, **changes), Counter()
    for seed in c.seeds(2, of=4):
        seen += compare_runs(seed, flags, dims)
    assert seen["without a step"] > 100 and seen["equal"] > 100 and seen["one less"] > 30, seen


@pytest.mark.slow
def test_a_step_of_several_chunks_is_as_many_steps():
    """Integrals over time too, of prompts with one token of output, behind which no decodes jump."""
    flags, rng = simulator.preset("vllm-v1"), np.random.default_rng(5)
    batch = [draw_run(rng, flags, DIMS) for _ in range(c.LANES)]
    batch = [replace(one, case=replace(one.case, output=0 * one.case.output + 1, max_tokens=0 * one.case.output + 1))
             for one in batch]
    many, single = (run(batch, flags, replace(DIMS, max_jump=most), "mixed", has_target=True) for most in (2048, 1))
    for ours, theirs in zip(many, single, strict=True):
        assert ours["steps"] <= theirs["steps"]
        for name, value in theirs.items():
            assert name == "steps" or np.array_equal(ours[name], value), name
    assert sum(lane["steps"] for lane in many) < 0.5 * sum(lane["steps"] for lane in single)


@jax.jit
@jax.vmap
def sized(table, target, last, least, most):
    """The most tokens that fit by a table of seconds: as a pass asks, and by the search alone."""
    def seconds(tokens):
        return table[jnp.clip(tokens, 0, table.shape[0] - 1)]

    close = chunks.near(target, seconds, last, jnp.minimum(least, most), most)
    return close, chunks.search(target, seconds, most)


def test_looking_nearby_finds_what_the_search_finds():
    """Of any cost that takes no less for more tokens, against a count of all that fit: wherever it says that it knows,
    and it does next to the answer."""
    rng, lanes, width = np.random.default_rng(0), 4096, 600
    tables = np.sort(rng.integers(0, 60, (lanes, width)), axis=1).astype(np.float32)
    target = rng.integers(0, 62, lanes).astype(np.float32)
    most, least = rng.integers(1, width - 1, lanes), rng.integers(1, 40, lanes)
    fitting = np.minimum((tables[:, 1:] <= target[:, None]).sum(1), most)
    last = np.where(rng.random(lanes) < 0.7, fitting + rng.integers(-2, 3, lanes), rng.integers(0, width, lanes))
    close, found = jax.tree.map(np.asarray, sized(*map(jnp.asarray, (tables, target, last, least, most))))
    assert np.array_equal(found, fitting)
    least = np.minimum(least, most)
    chunk, is_known = np.maximum(fitting, least), close.is_known
    assert np.array_equal(np.maximum(close.most, least)[is_known], chunk[is_known])
    assert np.array_equal((close.most >= least)[is_known], (fitting >= least)[is_known])
    assert np.array_equal(close.seconds[is_known], tables[np.arange(lanes), chunk][is_known])
    is_next = (last == chunk) | (last == chunk + 1)
    assert is_known[is_next].all() and is_next.sum() > 1000 and (~is_known).sum() > 100
    assert (fitting[is_known] < least[is_known]).sum() > 50 and (fitting == most)[is_known].sum() > 50


@pytest.mark.slow
@pytest.mark.parametrize("name, changes, stages, has_kv", [
    ("sarathi", {}, 1, False), ("vllm-v1-async", {}, 1, False), ("vllm-v1-priority-tail", {}, 1, True),
    ("vllm-v1", {}, STAGES, True),
    ("sarathi", dict(pass_on_arrival=True, max_batch_seqs=8), STAGES, False)])
def test_other_engines_equal_the_reference(name, changes, stages, has_kv):
    """Blocks for whole prompts, a pass that does not see everybody, a sorted queue, chunks that follow each other
    through stages."""
    flags = replace(simulator.preset(name), stages=stages, **changes)
    sizes = dict(num_stages=STAGES, num_batches=STAGES) if stages > 1 else {}
    dims, seen = c.dims_of(name, 1, has_kv_parallel=has_kv, **sizes), Counter()
    for seed in c.seeds(2, of=4):
        seen += compare(seed, flags, dims, "round_robin")
    assert seen["cases"] > 100 and seen["cut"] > 200 and seen["shared"] > 50, seen
    assert seen["over"] > 20 and seen["others in time"] > 10, seen


@pytest.mark.slow
def test_groups_without_a_time():
    flags, dims = simulator.preset("vllm-v1"), c.dims_of("vllm-v1", 1, has_kv_parallel=True)
    seen = compare(3, flags, dims, "round_robin", has_target=False)
    assert seen["cases"] > 50 and seen["others on groups"] > 20, seen


@pytest.mark.slow
def test_the_loop_body_copies_nothing_large():
    """Nor has it a transcendental."""
    large, small = test_compiled.large_shapes(DIMS, c.LANES)
    assert len(large) >= 5 and not large & small
    arguments = inputs(draw_many(0, FLAGS, DIMS), FLAGS, DIMS, "mixed", has_target=True)
    assert test_compiled.problems(loop.run.lower(DIMS, *arguments).compile().as_text(), large) == []


# ---- scenarios


LONG = {"schema_version": 1, "num_seeds": 1, "model": {"name": "llama-3-8b", "max_position": 1_000_000},
        "device": {"name": "h100"}, "cost": {"kind": "roofline", "split_kv": True},
        "engine": {"preset": "vllm-v1@0.9", "tensor_parallel_size": 8, "max_num_seqs": 8,
                   "max_num_batched_tokens": 4096},
        "workload": {"kind": "poisson", "rate_rps": 2.0, "num_requests": 8, "input": 100, "output": 20}}

TARGET, GROUPS = {"target_batch_time_ms": 20.0}, {"kv_parallel_size": 4, "kv_parallel_tokens": 100_000}


def scenario(engine: dict, **sections) -> Scenario:
    return Scenario.from_dict(LONG | sections | {"engine": LONG["engine"] | engine})


FITTED = {"kind": "fitted", "prefill": {"a": 0.01}, "decode": {"a": 0.01}}


@pytest.mark.parametrize("engine, sections, field, problem", [
    ({"min_chunk_tokens": 4}, {}, "engine.min_chunk_tokens", "no effect"),
    ({"kv_parallel_tokens": 4}, {}, "engine.kv_parallel_tokens", "no effect"),
    ({"kv_parallel_size": 2}, {}, "engine.kv_parallel_tokens", "missing"),
    ({"kv_parallel_size": 1024, "kv_parallel_tokens": 1 << 24}, {}, "engine.kv_parallel_tokens", "counted"),
    (TARGET | {"enable_prefix_caching": True}, {}, "engine.enable_prefix_caching", "target_batch_time_ms"),
    (TARGET | {"preset": "vllm-v0", "max_num_batched_tokens": 8192}, {}, "engine.phase_mix", "unified"),
    (TARGET | {"preset": "orca"}, {}, "engine.target_batch_time_ms", "not chunked"),
    (TARGET | {"scheduling_policy": "priority"}, {}, "engine.victim", "last_admitted"),
    (TARGET | {"max_num_batched_tokens": 1 << 20}, {}, "engine.max_num_batched_tokens", "1,048,575"),
    (TARGET | {"min_chunk_tokens": 5000}, {}, "engine.min_chunk_tokens", "4096"),
    (TARGET | {"reserve": "max_tokens"}, {}, "engine.reserve", "'prompt'"),
    (GROUPS, {"cluster": {"pools": [{"replicas": 2}]}}, "cluster.pools", "kv_parallel_size"),
    (GROUPS, {"cluster": {"admission": {"max_waiting": 9}}}, "workload.client", "kv_parallel_size"),
    (GROUPS | {"preset": "sarathi", "pipeline_parallel_size": 2}, {}, "engine.preset", "as requests arrive"),
    (GROUPS, {"cost": FITTED | {"exact": True}}, "cost.exact", "not simulated"),
    (GROUPS | {"num_gpu_blocks_override": 64, "max_model_len": 512}, {"cost": FITTED, "model": None}, "model", "merge"),
    (GROUPS | {"pipeline_parallel_size": 2}, {"cluster": {"num_devices": 60}}, "engine.kv_parallel_size",
     "needs 64 devices (4 KV groups x 2 pipeline stages x 8 tensor-parallel ranks), and there are 60"),
    ({}, {"cluster": {"num_devices": 4}}, "cluster.num_devices", "needs 8 devices"),
    ({"prefill_context_parallel_size": 2, "tensor_parallel_size": 4}, {"cluster": {"num_devices": 7}},
     "cluster.num_devices", "needs 8 devices (2 prefill context-parallel groups x 4 tensor-parallel ranks)"),
    (GROUPS | {"num_gpu_blocks_override": 4 * 6249, "max_model_len": 200_000}, {}, "engine.kv_parallel_tokens",
     "24,996 KV blocks of 16 tokens are 99,984 tokens on each of 4 groups"),
    (GROUPS | {"kv_parallel_tokens": 1 << 24, "max_model_len": 8_000_000, "gpu_memory_utilization": 0.5},
     {"model": {"name": "llama-3-8b", "max_position": 8_000_000}}, "engine.kv_parallel_tokens", "more than a group"),
    (TARGET | {"scheduling_policy": "least_slack", "slack_output_ms": 20.0}, {
        "slo": {"e2e_ms": 1000.0}, "workload": LONG["workload"] | {"prediction": {"sigma": 0.0}}},
     "engine.scheduling_policy", "target_batch_time_ms"),
    ({"target_batch_time_ms": 9.0}, {"cost": FITTED}, "engine.target_batch_time_ms",
     "less than the 10 ms of an iteration of 1 prompt token and nothing else"),
    (GROUPS | {"kv_parallel_tokens": 10_000}, {"model": {"name": "mistral-7b"}}, "engine.kv_parallel_size", "windowed"),
])
def test_refused(engine, sections, field, problem):
    with pytest.raises(InputError) as caught:
        jaxsim.simulate(scenario(engine, **sections))
    assert caught.value.field == field and problem in str(caught.value)


def test_a_point_whose_time_is_too_short_is_refused_alone():
    """Before anything runs, so that those which share its program are kept."""
    tree = scenario(TARGET, cost=FITTED).to_dict()
    study = Study.from_dict({"schema_version": 1, "scenario": tree,
                             "axes": {"engine.target_batch_time_ms": [9.0, 20.0, 30.0]}})
    made = plan(study, Lanes())
    assert made.num_programs == 1 and len(made.refusals) == 1
    assert "is less than the 10 ms" in str(made.refusals)


@pytest.mark.parametrize("engine, field", [(TARGET, "target_batch_time_ms"), (GROUPS, "kv_parallel_tokens")])
def test_no_steady_state_in_closed_form(engine, field):
    with pytest.raises(InputError, match=f"engine.{field} = .*: has no closed form"):
        of_scenario(scenario(engine))


def test_contexts_whose_sum_is_beyond_32_bits():
    made = scenario({"max_model_len": 1_000_000, "kv_accounting": True, "num_gpu_blocks_override": 1 << 28,
                     "max_num_seqs": 4096})
    work = Workload(np.zeros(3000), np.full(3000, 900_000), np.full(3000, 2))
    with pytest.raises(InputError, match="tokens of context together"):
        lower.check_sums(c.dims_of("vllm-v1", 1, num_slots=4096), lower.resolve_system(made), work)


def test_the_pool_is_that_of_all_groups():
    one, four = (lower.resolve_system(scenario(engine)) for engine in ({}, GROUPS))
    assert four.num_blocks == 4 * one.num_blocks and four.plan.num_devices == 4 * one.plan.num_devices == 32


def test_a_group_has_room_for_its_part_of_a_context():
    """Exactly: a block less a group is one too few; contexts that are shorter than the part need no more than that."""
    blocks = {"num_gpu_blocks_override": 4 * 6250, "max_model_len": 200_000}
    assert lower.resolve_system(scenario(GROUPS | blocks)).num_blocks == 25_000
    shorter = scenario(GROUPS | {"num_gpu_blocks_override": 4 * 64, "max_model_len": 1024})
    assert lower.resolve_system(shorter).num_blocks == 256


def test_what_a_merge_of_latent_attention_takes():
    """Outputs are sums of latents: 512 numbers of a head come back for 512 and 64 that went there."""
    made = scenario({"kv_parallel_size": 2, "kv_parallel_tokens": 1000, "num_gpu_blocks_override": 4096,
                     "max_model_len": 4096}, model={"name": "deepseek-v3"}, cost={"kind": "roofline"})
    rule = make_kv_parallel(made, lower.resolve_system(made))
    size = 128 // 8 * (2 * (512 + 64 + 512) + 4)
    assert float(rule.token_merge_s) == pytest.approx(61 * size / 36e9, rel=1e-6)


def test_what_a_merge_takes():
    """Two messages in each of 32 layers, of 20 us between nodes; of a token what four heads of 128 have, to and from
    three groups: 4 x 128 numbers of two bytes each way, and four sums, over 36 of 50 GB/s."""
    made = lower.make_params(*(lambda s: (s, lower.resolve_system(s), None, 1))(scenario(GROUPS)))
    rule = made.groups[0].batching.kv_parallel
    assert load_model("llama-3-8b").layers == 32
    assert float(rule.merge_s) == pytest.approx(64 * 20e-6)
    assert float(rule.token_merge_s) == pytest.approx(32 * 3 * (4 * 128 * 4 + 4 * 4) / 36e9, rel=1e-6)
