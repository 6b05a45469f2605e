"""Prompts partly computed side by side, by deadlines, slack and relative slack, against the reference, bit for bit."""

import re
import tomllib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsim import Environment, InputError, Scenario, simulate
from jaxsim.analytic import long_context as lc
from jaxsim.cost.fitted import fitted
from jaxsim.engine import loop, lower
from jaxsim.engine.lower import workloads
from jaxsim.engine.lower.alone import most_chunks, prefill_seconds
from jaxsim.policy.chunks import Chunks
from jaxsim.policy.kv_parallel import KvParallel
from jaxsim.policy.partial_prefills import ORDERS, PARTS, WORK_STEPS, PartialPrefills
from jaxsim.state import world as w
from jaxsim.study.lanes import Lanes
from jaxsim.study.plan import plan
from jaxsim.study.study import Study
from jaxsim.workload import Workload
from tests.engine import cases as c
from tests.engine import test_compiled
from tests.reference import simulator
from tests.reference.long_contexts import Groups
from tests.reference.partial_prefills import Seen, SideBySide

pytestmark = pytest.mark.unoptimised

ROWS, WINDOW, STAGES, WORK_BITS = 2, 30, 4, 2


@dataclass
class Crowd:
    """A case with a time for iterations, the least tokens of a chunk, rules of prompts side by side, and groups that
    share KV, for programs that have them."""

    case: c.Case
    target_s: float
    least: int
    rules: SideBySide
    max_batch_seqs: int
    groups: Groups
    seen: Seen = field(default_factory=Seen)

    def __len__(self) -> int:
        return len(self.case)

    def kept(self, mask: np.ndarray) -> "Crowd":
        return replace(self, case=self.case.kept(mask))


def draw(rng: np.random.Generator, case: c.Case, rows: int) -> Crowd:
    """A time for some decodes and some tokens; few different prompts and limits, so that there are ties; works about
    those of the cost."""
    price, count = c.dyadic_cost(case), len(case)
    # Little time, and prompts of two kinds.
    short, long = int(rng.integers(1, 12)), int(rng.integers(12, 50))
    prompt = np.where(rng.random(count) < 0.35, long, np.where(rng.random(count) < 0.5, short, case.prompt))
    output = np.minimum(case.output, int(rng.integers(1, 20)))
    tokens, decodes = int(rng.integers(2, 30)), int(rng.integers(0, 4))
    target = price(simulator.BatchStatsRef(decodes, 20 * decodes, 1, tokens, tokens**2, tokens, decodes))
    alone = [price(simulator.BatchStatsRef(0, 0, 1, n, n**2, n, 1)) for n in range(1, 70, 1 << WORK_BITS)]
    works = np.maximum.accumulate(np.rint(PARTS * np.array(alone) * float(rng.choice([0.5, 1.0, 4.0]))) + rng.integers(
        0, 3, len(alone))).astype(int)
    limit_s = float(works[5]) / PARTS * rng.integers(0, 8, count) * float(rng.choice([0.0, 0.25, 4.0]))
    arrival_s, long_tokens = case.arrival_s, int(rng.integers(short, long))
    if rng.random() < 0.25:
        # None is long, and all are cut.
        long_tokens, tokens = 64, 4
        prompt, target = np.maximum(prompt, 6), price(simulator.BatchStatsRef(0, 0, 1, tokens, tokens**2, tokens, 0))
    if rng.random() < 0.5:
        # Several come together, with the same to do.
        arrival_s = arrival_s[np.arange(count) // 4 * 4]
        prompt, limit_s = prompt[np.arange(count) // 2 * 2], limit_s[np.arange(count) // 2 * 2]
    most = int(rng.choice([rows - 1, rows, 1]))
    rules = SideBySide(rows, ORDERS[int(rng.choice([0, 1, 2, 3, 3, 3]))], long_tokens, most,
                       float(np.float32(rng.choice([0.0, 0.25, 0.4, 0.75]))),
                       float(rng.choice([0.0, 0.5, 1.6, 2.0, 8.0])), tuple(works.tolist()), 1 << WORK_BITS)
    blocks = -(-int((prompt + output).max()) // 4)
    seqs = max(case.limits["max_num_seqs"], min(4, count))
    limits = case.limits | dict(
        max_num_seqs=seqs, max_num_batched_tokens=max(case.limits["max_num_batched_tokens"], seqs + 8),
        max_model_len=int((prompt + output).max()), num_blocks=blocks * int(rng.integers(1, seqs + 1)))
    case = replace(case, arrival_s=arrival_s, prompt=prompt, output=output, max_tokens=output, limits=limits,
                   limit_s=np.round(limit_s * PARTS) / PARTS)
    other = np.random.default_rng([count, long])
    groups = Groups(int(other.choice([2, 4])), int(other.integers(1, 30)), *(case.coefficients[0][0] * other.choice(
        [0.0, 0.125], 2) * (1.0, 0.125)))
    return Crowd(case, target, int(rng.choice([1, 1, 2, 4])), rules, int(rng.integers(2, 12)), groups)


def draw_many(seed: int, flags: simulator.Flags, dims) -> list[Crowd]:
    rng = np.random.default_rng([seed, 29])
    return [draw(rng, case, dims.num_partial) for case in c.draw_many(seed, flags, dims)]


def inputs(batch: list[Crowd], flags: simulator.Flags, dims, router: str) -> tuple:
    """Arguments of `loop.run` for a batch, padded to `LANES`."""
    params, requests = [], []
    for one in batch + batch[:1] * (c.LANES - len(batch)):
        mine = replace(flags, max_batch_seqs=one.max_batch_seqs) if flags.stages > 1 else flags
        rules, i, x = one.rules, np.int32, np.float32
        made = c.make_params(one.case, replace(mine, reserve="none"), router)
        partial = PartialPrefills(
            i(ORDERS.index(rules.order)), i(rules.long_tokens), i(rules.most_long), x(rules.most_slack),
            x(rules.factor), np.array(rules.works, i), i(WORK_BITS))
        batching = replace(made.groups[0].batching, reserve=flags.reserve, partial=partial,
                           chunks=Chunks(x(one.target_s), i(one.least)))
        if dims.has_kv_parallel:
            cut = one.groups
            batching = replace(batching, kv_parallel=KvParallel(
                i(cut.groups), i(cut.tokens), x(cut.merge_s), x(cut.token_merge_s)))
        params.append(replace(made, groups=(replace(made.groups[0], batching=batching),)))
        case = one.case
        work = Workload(case.arrival_s, case.prompt, case.output, case.max_tokens, uniforms=case.uniforms,
                        limit_s=case.limit_s)
        requests.append(lower.make_requests(work, dims))
    return c.stack(params), c.stack(requests)


def run(batch: list[Crowd], flags: simulator.Flags, dims, router: str) -> list[dict]:
    """Engine results of a batch."""
    world = jax.device_get(loop.run(dims, *inputs(batch, flags, dims, router)))
    return [c.unpack(dims, world, lane, len(one)) for lane, one in enumerate(batch)]


def reference(one: Crowd, flags: simulator.Flags, dims, router: str, **changes) -> simulator.ReferenceResult:
    if flags.stages > 1:
        flags = replace(flags, max_batch_seqs=one.max_batch_seqs)
    if dims.has_kv_parallel:
        flags = replace(flags, kv_groups=one.groups)
    rules = replace(one.rules, seen=one.seen, **changes)
    return c.reference(one.case, replace(flags, target_s=one.target_s, min_chunk_tokens=one.least, side_by_side=rules),
                       dims, router)


def compare(seed: int, flags: simulator.Flags, dims, router: str) -> Counter:
    """All cases of a seed agree; returns what they had in them."""
    def compared(batch):
        results, wrong = [], []
        for one, lane in zip(batch, run(batch, flags, dims, router), strict=True):
            try:
                result = reference(one, flags, dims, router)
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
        if result is None:
            continue
        seen += Counter(cases=1, shares=len(one.seen.shares - {1.0}), **{
            name: getattr(one.seen, name)
            for name in ("passed", "passed_long", "one_long_only", "no_time", "no_row", "shared", "tied")})
        seen[f"order {one.rules.order}"] += 1
        if one.rules.order != "fcfs":
            plain = reference(replace(one, seen=Seen()), flags, dims, router, order="fcfs")
            seen[f"others {one.rules.order}"] += ends(plain) != ends(result)
        if one.rules.order == "lars":
            other = reference(replace(one, seen=Seen()), flags, dims, router, order="lrs")
            seen["others than slack"] += ends(other) != ends(result)
    return seen


def ends(result: simulator.ReferenceResult) -> list[float]:
    return [request.finish_s for request in result.requests]


FLAGS = simulator.preset("vllm-v1", reserve="max_tokens")


def dims_of(executors: int = 1, window: int = WINDOW, **sizes):
    return replace(c.dims_of("vllm-v1", 2, **sizes), num_executors=executors, num_partial=ROWS, line_window=window)


def test_engine_equals_reference():
    """All orders and routers in one batch, two instances, short of blocks, time and rows."""
    seen = Counter()
    for seed in c.seeds(1, of=12):
        seen += compare(seed + 1, FLAGS, dims_of(2), "mixed")
    check(seen)


@pytest.mark.slow
def test_three_instances_to_choose_from():
    check(compare(3, FLAGS, dims_of(3), "mixed"), but="no_row")


def check(seen: Counter, but: str = "") -> None:
    """All of it happened, a number of times; but for what cannot."""
    least = dict(cases=60, passed=20, passed_long=10, one_long_only=100, no_time=100, no_row=2, shared=60, shares=20,
                 tied=50)
    least |= {f"others {order}": 1 for order in ORDERS[1:]} | {"others than slack": 5, "order fcfs": 3}
    rare = {name: int(seen[name]) for name, number in least.items() if seen[name] <= number and name != but}
    assert not rare, rare


@pytest.mark.slow
@pytest.mark.parametrize("name, changes", [("vllm-v1", {}), ("sarathi", dict(pass_on_arrival=True))])
def test_pipelines_equal_the_reference(name, changes):
    """The next chunk of each follows in the batch behind."""
    flags = simulator.preset(name, reserve="max_tokens", decode_needs_free_block="crossing", stages=STAGES, **changes)
    dims, seen = dims_of(num_stages=STAGES, num_batches=STAGES), Counter()
    for seed in c.seeds(2, of=8):
        seen += compare(seed, flags, dims, "round_robin")
    check(seen)


@pytest.mark.slow
def test_on_groups_that_share_kv():
    """What a batch takes is then of contexts on several groups; works are of anything."""
    check(compare(7, FLAGS, replace(dims_of(), has_kv_parallel=True), "round_robin"))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [3, 4])
def test_other_sizes(rows):
    """Of the table, with blocks for the longest there may be."""
    flags, dims = replace(FLAGS, reserve="max_model_len"), replace(dims_of(), num_partial=rows)
    seen = compare(5, flags, dims, "round_robin") + compare(6, flags, dims, "round_robin")
    check(seen, but="no_row")


@pytest.mark.slow
def test_beyond_the_window_is_a_fault():
    """Beyond the window a run stops; lanes in which fewer wait are as ever."""
    dims, batch = dims_of(2, window=2), draw_many(0, FLAGS, dims_of(2))
    lanes = run(batch, FLAGS, dims, "round_robin")
    faults = [lane["fault"] for lane in lanes]
    assert set(faults) == {0, w.LINE_FULL} and 3 < sum(map(bool, faults)) < len(faults) - 3
    for one, lane in zip(batch, lanes, strict=True):
        if not lane["fault"]:
            np.testing.assert_array_equal(lane["finish_s"], ends(reference(one, FLAGS, dims, "round_robin")))


@pytest.mark.slow
def test_the_loop_body_copies_nothing_large():
    """Nor has it a transcendental."""
    dims = dims_of(2)
    large, small = test_compiled.large_shapes(dims, c.LANES)
    assert len(large) >= 5 and not large & small
    arguments = inputs(draw_many(0, FLAGS, dims), FLAGS, dims, "round_robin")
    assert test_compiled.problems(loop.run.lower(dims, *arguments).compile().as_text(), large) == []


def rules_of(**changes) -> PartialPrefills:
    numbers = dict(order=np.int32(3), long_tokens=np.int32(1000), most_long=np.int32(1), most_slack=np.float32(0.4),
                   deadline_factor=np.float32(0), works=np.arange(5, dtype=np.int32) * 64, work_bits=np.int32(2))
    return PartialPrefills(**(numbers | changes))


def test_relative_slack_of_the_published_example():
    """Medha: work of 10 s due in 16 s has 0.6, work of 0.5 s due in 1 s has 1.0; so the long one is first, and leaves
    0.4 of the time, the most it may, to short ones."""
    rules = rules_of()
    rho = [float(rules.relative(PARTS * np.float32(due - work), np.float32(PARTS * work)))
           for work, due in ((10.0, 16.0), (0.5, 1.0))]
    assert rho == pytest.approx([0.6, 1.0])
    for slack, share in ((rho[0], 0.6), (0.25, 0.75), (-3.0, 1.0)):
        assert float(rules.share(np.float32(slack), np.bool_(True))) == pytest.approx(share)
        assert float(rules.share(np.float32(slack), np.bool_(False))) == 1.0


def test_keys_of_every_order():
    """Request, time left, slack, relative slack: of these four prompts each has an order of its own; negative floats in
    theirs."""
    request, left, work = np.array([[0, 1, 2, 3], [50, 30, 40, -10], [10, 1, 100, 20]], np.int32)
    slack = left - work
    for order, want in enumerate(([0, 1, 2, 3], [3, 1, 2, 0], [2, 3, 1, 0], [3, 2, 0, 1])):
        keys = rules_of(order=np.int32(order)).key(request, left, slack, work)
        assert np.argsort(np.asarray(keys)).tolist() == want, ORDERS[order]


def test_works_lie_on_straight_lines():
    rules = rules_of(works=jax.numpy.array([10, 30, 70, 70, 71], np.int32))
    assert np.asarray(rules.work(jax.numpy.arange(13))).tolist() == [10, 15, 20, 25, 30, 40, 50, 60, 70, 70, 70, 70, 70]


@pytest.mark.parametrize("stages", [1, 2])
def test_prefill_seconds_are_those_of_the_closed_form(stages):
    """Of chunks as long as 20 ms allow; in two stages of half of it each, a chunk holds up the next for that."""
    cost, longest, bits = lc.LongContext(2.0**-9, 2.0**-18, 2.0**-30, 0.0, 0.0), 60_000, 4
    row = (float(cost.fixed_s), float(cost.token_s), 0.0, 0.0, float(cost.pair_s) / 2)
    # Of a longer one, whose last chunk is further on.
    chunks = lc.adaptive_chunks(2 * longest, cost, 0.02, least=8, most=4096)
    seconds = np.asarray(cost.chunk_seconds(chunks))
    want = np.cumsum(seconds) / stages + seconds * (1 - 1 / stages)
    got = prefill_seconds(fitted(row, row), stages, Chunks(np.float32(0.02), np.int32(8)), None, 4096, longest, bits)
    tokens = np.arange(WORK_STEPS + 1) << bits
    inside = (tokens > chunks[0]) & (tokens <= longest)
    np.testing.assert_allclose(got[inside], np.interp(tokens[inside], np.cumsum(chunks), want), rtol=2e-4)
    nearer = prefill_seconds(fitted(row, row), stages, Chunks(np.float32(0.02), np.int32(8)), None, 4096, 20_001, bits)
    np.testing.assert_array_equal(nearer[:20_001 // 16 + 2], got[:20_001 // 16 + 2])
    alone = tokens[(tokens > 0) & (tokens <= chunks[0])].astype(float)
    np.testing.assert_allclose(got[1:len(alone) + 1], row[0] + row[1] * alone + row[4] * alone**2, rtol=1e-5)
    assert len(chunks) > 10 and got[0] == pytest.approx(row[0] + row[1] + row[4], rel=1e-5)


def test_chunks_are_counted_before_the_run():
    """No fewer than there are, nor many more; of a prompt of one chunk, too."""
    cost, rules = lc.LongContext(2.0**-9, 2.0**-18, 2.0**-30, 0.0, 0.0), Chunks(np.float32(0.02), np.int32(8))
    row = (float(cost.fixed_s), float(cost.token_s), 0.0, 0.0, float(cost.pair_s) / 2)
    prompts = np.array([10, 60_000, 300_000])
    want = sum(len(lc.adaptive_chunks(int(n), cost, 0.02, least=8, most=4096)) for n in prompts)
    got = most_chunks(fitted(row, row), rules, None, 4096, prompts)
    assert want > 300 and want <= got <= 1.1 * want + 10


# ---- scenarios


ENGINE = {"preset": "vllm-v1@0.9", "max_num_seqs": 8, "max_num_batched_tokens": 512, "max_model_len": 40_000,
          "num_gpu_blocks_override": 4096, "reserve": "max_tokens", "target_batch_time_ms": 40.0,
          "max_num_partial_prefills": 3, "long_prompt_tokens": 2000, "scheduling_policy": "lars",
          "deadline_work_factor": 1.6}

BASE = {"schema_version": 1, "num_seeds": 1,
        "cost": {"kind": "fitted", "prefill": {"a": 0.01, "b": 1e-4, "e": 1e-9}, "decode": {"a": 0.01, "d": 1e-4}},
        "engine": ENGINE, "slo": {"ttft_ms": 200.0},
        "workload": {"kind": "poisson", "rate_rps": 3.0, "num_requests": 40, "output": 8, "input": {
            "kind": "quantiles", "levels": [0.0, 0.8, 0.81, 1.0], "tokens": [10, 200, 8000, 30_000]}}}


def scenario(engine=(), without=(), **sections) -> Scenario:
    kept = {name: value for name, value in (ENGINE | dict(engine)).items() if name not in without}
    tree = BASE | {"engine": kept} | sections
    return Scenario.from_dict({name: value for name, value in tree.items() if value is not None})


@pytest.mark.slow
def test_short_prompts_pass_long_ones():
    """First come first served they stand behind 8,000 to 30,000 tokens; by slack alone behind the less urgent of them;
    by relative slack their median is less than that of any, and P99 a tenth of the convoy's."""
    orders = ("fcfs", "edf", "lrs", "lars")
    lanes = [simulate(scenario({"scheduling_policy": order})).lanes[0][0] for order in orders]
    p50, p99 = {}, {}
    for order, lane in zip(orders, lanes, strict=True):
        assert lane.fault == "" and np.isfinite(lane.finish_s).all()
        waits = (lane.first_token_s - lane.arrival_s)[lane.input_tokens <= 200]
        p50[order], p99[order] = np.quantile(waits, [0.5, 0.99])
    assert p50["lars"] < min(p50[order] for order in orders[:-1]), p50
    assert p99["lars"] < 0.1 * p99["fcfs"] and p99["lars"] < min(p99["edf"], p99["lrs"]), p99


@pytest.mark.parametrize("engine, without, sections, field, problem", [
    ({"max_num_partial_prefills": 5}, (), {}, "engine.max_num_partial_prefills", "more than the 4"),
    ({"enable_chunked_prefill": False, "max_num_batched_tokens": 40_000}, ("target_batch_time_ms",), {},
     "engine.max_num_partial_prefills", "not chunked"),
    ({}, ("target_batch_time_ms",), {}, "engine.target_batch_time_ms", "share the time"),
    ({}, ("deadline_work_factor",), {"slo": None}, "engine.deadline_work_factor", "goes by deadlines"),
    ({"scheduling_policy": "edf"}, ("deadline_work_factor",), {"slo": None}, "slo.e2e_ms", "goes by deadlines"),
    ({"scheduling_policy": "priority"}, (), {}, "engine.scheduling_policy", "is not simulated with"),
    ({"scheduling_policy": "least_slack", "slack_output_ms": 10.0}, (), {"workload": BASE["workload"] | {
        "prediction": {"sigma": 0.0}}}, "engine.scheduling_policy", "is not simulated with"),
    ({}, ("reserve",), {}, "engine.reserve", "nobody is preempted"),
    ({"async_scheduling": True}, (), {}, "engine.async_scheduling", "is not simulated with"),
    ({"max_long_partial_prefills": 4}, (), {}, "engine.max_long_partial_prefills", "more than"),
    *(({}, (), {"cluster": {"replicas": 2, "router": name}}, "cluster.router", "nobody is the first")
      for name in ("llumnix_load", "remaining_steps")),
    ({"enable_prefix_caching": True}, (), {}, "engine.enable_prefix_caching", "not as set here"),
    ({}, (), {"workload": {"kind": "closed-loop", "concurrency": 2, "input": 10, "output": 2}}, "workload.kind",
     "arrivals that are results"),
    ({}, (), {"cluster": {"pools": [{"replicas": 2}]}}, "cluster.pools", "is not simulated with"),
    ({"data_parallel_size": 2}, (), {}, "engine.data_parallel_size", "is not simulated with"),
    ({}, (), {"cluster": {"admission": {"max_waiting": 9}}}, "workload.client", "is not simulated with"),
    ({}, (), {"cluster": {"replicas": 2, "migration": {}}}, "cluster.migration", "is not simulated with"),
    ({"scheduling_policy": "lars"}, ("max_num_partial_prefills", "deadline_work_factor", "long_prompt_tokens",
                                     "reserve"), {}, "engine.scheduling_policy", "partly computed"),
    *(({name: 2, "scheduling_policy": "fcfs"}, tuple(
        other for other in ("max_num_partial_prefills", "deadline_work_factor", "long_prompt_tokens", "reserve")
        if other != name), {}, f"engine.{name}", "one partly computed prompt at a time")
      for name in ("long_prompt_tokens", "max_long_partial_prefills", "deadline_work_factor")),
    ({"scheduling_policy": "fcfs", "most_relative_slack": 0.3}, (
        "max_num_partial_prefills", "deadline_work_factor", "long_prompt_tokens", "reserve"), {},
     "engine.most_relative_slack", "one partly computed prompt at a time"),
])
def test_refused(engine, without, sections, field, problem):
    with pytest.raises(InputError) as caught:
        scenario(engine, without, **sections).checked()
    assert caught.value.field == field and problem in str(caught.value)


def test_orders_of_a_study_are_one_program():
    """The order is a number there."""
    study = Study.from_dict({"schema_version": 1, "scenario": scenario({"most_relative_slack": 0.3}).to_dict(),
                             "axes": {"engine.scheduling_policy": list(ORDERS)}})
    assert plan(study, Lanes()).num_programs == 1


def test_limits_of_the_first_token_come_first():
    """Side by side; else, under the order of deadlines, that of the last token does."""
    slo = {"ttft_ms": 200.0, "e2e_ms": 9000.0}
    workload = BASE["workload"] | {"tenants": [
        {"name": "plain"}, {"name": "late", "deadline_ms": 5000.0}, {"name": "soon", "ttft_ms": 50.0}]}
    one = scenario(slo=slo, workload=workload)
    names = ("plain", "late", "soon")
    assert workloads.limits_of(one, names) == [200.0, 200.0, 50.0]
    assert workloads.limits_of(scenario(slo={"e2e_ms": 9000.0}, workload=workload), names) == [9000.0, 5000.0, 50.0]
    without = ("max_num_partial_prefills", "deadline_work_factor", "reserve", "long_prompt_tokens")
    alone = scenario({"scheduling_policy": "edf", "victim": "last_admitted"}, without, slo=slo, workload=workload)
    assert workloads.limits_of(alone, names) == [9000.0, 5000.0, 50.0]


def test_a_router_of_a_class_is_refused_too():
    """That reads loads."""
    made = scenario(cluster={"replicas": 2, "router": "jaxsim.policy.routing.LlumnixLoad"}).checked()
    with pytest.raises(InputError, match="nobody is the first"):
        lower.resolve_system(made)


def of_the_page() -> dict:
    """The example of the documentation, with what it leaves out."""
    page = (Path(__file__).parents[2] / "docs" / "long-context.md").read_text()
    block = next(part for part in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "max_num_partial" in part)
    tree = tomllib.loads(block)
    own = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "max_model_len": 40_000, "num_gpu_blocks_override": 4096}
    return BASE | tree | {"engine": tree["engine"] | own}


def test_the_documented_example_is_accepted():
    """In every order, one program for all."""
    study = Study.from_dict({"schema_version": 1, "scenario": of_the_page(),
                             "axes": {"engine.scheduling_policy": list(ORDERS)}})
    assert plan(study, Lanes()).num_programs == 1


@pytest.mark.slow
def test_the_documented_example_runs():
    lane = simulate(Scenario.from_dict(of_the_page())).lanes[0][0]
    assert lane.fault == "" and np.isfinite(lane.finish_s).all()


@pytest.mark.slow
def test_a_tape_has_room_for_every_chunk():
    """Of prompts one at a time and side by side; of more than it could keep it says which number is to blame."""
    few = {"kind": "poisson", "rate_rps": 1.0, "num_requests": 8, "input": 8000, "output": 2}
    for without in ((), ("max_num_partial_prefills", "deadline_work_factor", "long_prompt_tokens", "reserve",
                         "scheduling_policy")):
        lane = simulate(scenario({"target_batch_time_ms": 12.0}, without, workload=few), record_steps=True).lanes[0][0]
        assert lane.fault == "" and lane.lost_steps == 0
        # More than eight a request, a thousand, and those of chunks as long as tokens alone allow.
        assert len(lane.steps["iterations"]) > 8 * 8 + 1000 + 8 * (8000 // 512)
    with pytest.raises(InputError, match="target_batch_time_ms.*cuts the prompts into"):
        simulate(scenario({"target_batch_time_ms": 11.0, "max_model_len": 16_000_000,
                           "num_gpu_blocks_override": 1_000_000}, workload={
            "kind": "poisson", "rate_rps": 1.0, "num_requests": 8, "input": 10_000_000, "output": 2}),
            record_steps=True)


def test_no_environment():
    with pytest.raises(InputError, match="max_num_partial_prefills = 3: is not part of an environment"):
        Environment(scenario(), 1.0)
