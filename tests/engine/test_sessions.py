"""Turns of sessions: the engine against the reference, bit for bit; prefixes that go on through answers; scenarios."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsim
from jaxsim import Scenario
from jaxsim._core.errors import InputError
from jaxsim.analytic.lower import load_of_scenario
from jaxsim.engine import loop, lower
from jaxsim.kernels import clock
from jaxsim.planning import search as planning
from jaxsim.policy.arrivals import ClosedLoop, Sessions
from jaxsim.study import goodput, runner
from jaxsim.workload import Workload
from tests.engine import cases as c
from tests.engine.test_compiled import large_shapes, problems
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

SIZES = dict(num_segments=64, path_width=16, log_size=2048)
"""Room for the segments of every case."""

PROGRAMS = [pytest.param("vllm-v1", 1, False, marks=pytest.mark.slow),
            pytest.param("vllm-v1", 2, False, marks=pytest.mark.slow),
            pytest.param("vllm-v0", 2, False, marks=pytest.mark.slow), ("vllm-v1", 2, True),
            pytest.param("vllm-v1-async", 1, True, marks=pytest.mark.slow)]
"""Preset, instances, prefix caching."""


def draw(rng: np.random.Generator, flags: simulator.Flags, dims) -> tuple[c.Case, Workload, float]:
    """A crowded case whose requests are turns of sessions, its workload, and the time outside the engine.

    Think times are dyadic and often zero, so that turns tie with ends and with each other.
    """
    case = c.draw(rng, c.MOST_REQUESTS, dims.num_slots, dims.block_size, flags)
    count, largest = len(case), int(np.max(case.prompt + case.max_tokens))
    shared = int(rng.integers(0, max(largest // 3, 1)))
    few, goes_on = int(rng.integers(2, 12)), rng.random()
    contexts, turns, longest_think = [], [], int(rng.integers(1, 40))
    prompt, output, session, turn = (np.zeros(count, int) for _ in range(4))
    slack = np.where(rng.random(count) < 0.3, 2, 0)
    for i in range(count):
        new, output[i] = rng.integers(1, few, 2)
        output[i] = min(output[i], largest - shared - 1)
        room = [s for s, context in enumerate(contexts) if context + new + output[i] + slack[i] <= largest]
        if room and rng.random() < goes_on:
            session[i] = rng.choice(room)
            turns[session[i]] += 1
            prompt[i] = contexts[session[i]] + new
        else:
            session[i] = len(contexts)
            contexts.append(0)
            turns.append(0)
            prompt[i] = shared + rng.integers(1, max(largest - shared - output[i], 1) + 1)
            slack[i] = min(slack[i], largest - prompt[i] - output[i])
        turn[i] = turns[session[i]]
        contexts[session[i]] = prompt[i] + output[i]
    grid = 2.0 ** -int(rng.integers(0, 6))
    think = np.where(rng.random(count) < 0.4, 0, rng.integers(0, longest_think, count) * grid)
    if rng.random() < 0.2:
        # Days between turns: several epochs of the clock.
        think = think * 2.0 ** 14
    outside = float(rng.choice([0, 0, 0.25]))
    workload = Workload(case.arrival_s, prompt, output, output + slack, session=session, turn=turn, think_s=think,
                        shared_tokens=shared, uniforms=case.uniforms)
    hashes = [tuple(("all", b) if (b + 1) * dims.block_size <= shared else (int(session[i]), b)
                    for b in range((prompt[i] + output[i] - 1) // dims.block_size)) for i in range(count)]
    case = replace(case, prompt=prompt, output=output, max_tokens=output + slack, prefixes=hashes,
                   priority=np.zeros(count, int))
    return case, workload, outside


def reference(case: c.Case, workload: Workload, outside: float, flags: simulator.Flags, dims) -> dict:
    """Answers of the reference, with arrivals."""
    after = np.full(len(case), -1)
    for i in range(len(case)):
        earlier = [j for j in range(i) if workload.session[j] == workload.session[i]]
        after[i] = earlier[-1] if earlier else -1
    requests = [simulator.Request(
        i, float(case.arrival_s[i]), int(case.prompt[i]), int(case.output[i]), int(case.max_tokens[i]),
        uniforms=tuple(map(float, case.uniforms[i])), prefix_hashes=case.prefixes[i],
        after=None if after[i] < 0 else int(after[i]), think_s=float(workload.think_s[i]) + outside)
        for i in range(len(case))]
    flags = replace(flags, **case.limits, block_size=dims.block_size)
    router = c.MIXED[case.router]
    rule = {"score": c.score_reference(flags.num_blocks, case.score), "first": lambda *_: 0}.get(router, router)
    result = simulator.simulate(requests, flags, dims.all_ranks, rule, c.dyadic_cost(case), ranks=dims.num_ranks)
    want = c.answer(result, dims.all_ranks, case.limits["num_blocks"])
    want["arrival_s"] = np.array([r.arrival_s for r in result.requests])
    want["returned"] = sum(r.hit_tokens - r.cached_tokens for r in result.requests)
    if flags.prefix_caching:
        want["cached_tokens"] = np.array([r.cached_tokens for r in result.requests])
    return want


def simulate(drawn: list, flags: simulator.Flags, dims) -> list[dict]:
    """Engine results of drawn cases, in one program."""
    params = c.stack([replace(c.make_params(case, flags, "mixed"), source=Sessions(np.float32(outside)))
                      for case, _, outside in drawn])
    prefixes = [lower.shared_prefixes(w, dims.block_size) if dims.num_segments else None for _, w, _ in drawn]
    assert all(p is None or p.num_segments < dims.num_segments for p in prefixes)
    requests = c.stack([lower.make_requests(w, dims, p) for (_, w, _), p in zip(drawn, prefixes, strict=True)])
    world = jax.device_get(loop.run(dims, params, requests))
    lanes = []
    for lane, (case, *_) in enumerate(drawn):
        lanes.append(c.unpack(dims, world, lane, len(case)))
        lanes[-1]["arrival_s"] = clock.join_reference(*world.due[lane, :len(case)].T)
        if dims.num_segments:
            lanes[-1]["held"] = world.references[lane, :, :-1].sum()
    return lanes


@pytest.mark.parametrize("name, num_executors, caches", PROGRAMS)
def test_sessions_equal_the_reference(name, num_executors, caches):
    """Arrivals, times, preemptions and cached tokens of every request; later turns wait for answers."""
    flags = replace(simulator.preset(name), prefix_caching=caches)
    dims = c.dims_of(name, num_executors, block_size=4, **(SIZES if caches else {}))
    rng = np.random.default_rng(num_executors + 10 * caches)
    seen = dict.fromkeys(("cases", "turns", "ties", "preemptions", "found_in_answers", "returned"), 0)
    for _ in range(3):
        drawn, want = [], []
        while len(drawn) < c.LANES:
            one = draw(rng, flags, dims)
            try:
                want.append(reference(*one, flags, dims))
            except ValueError:
                continue
            drawn.append(one)
        for (case, workload, outside), ours, theirs in zip(drawn, simulate(drawn, flags, dims), want, strict=True):
            returned = theirs.pop("returned")
            assert c.differences(ours, theirs) == [], (case, workload.session, workload.think_s)
            successors = workload.successors()
            is_answered = np.flatnonzero(successors >= 0)
            later = successors[is_answered]
            arrival = theirs["arrival_s"]
            np.testing.assert_array_equal(
                arrival[later], theirs["finish_s"][is_answered] + workload.think_s[later] + outside)
            seen["cases"] += 1
            seen["turns"] += len(later)
            seen["ties"] += len(arrival) - len(np.unique(arrival)) + np.isin(arrival[later], theirs["finish_s"]).sum()
            seen["preemptions"] += theirs["preemptions"].sum()
            seen["returned"] += returned
            if caches:
                assert ours["held"] == 0
                seen["found_in_answers"] += (theirs["cached_tokens"][later] > case.prompt[is_answered]).sum()
    assert seen["cases"] == 3 * c.LANES and seen["turns"] > 500 and seen["ties"] > 100, seen
    assert seen["preemptions"] > 20, seen
    assert not caches or (seen["found_in_answers"] > 50 and seen["returned"] > 50), seen


@pytest.mark.parametrize("source", ["sessions", "closed loop"])
def test_an_end_elsewhere_brings_an_arrival_before_the_pass(source):
    """Iterations of two instances end at one instant; the second end's next turn joins the pass of the first."""
    flags, dims = simulator.preset("vllm-v1"), c.dims_of("vllm-v1", 2, block_size=4)
    limits = dict(max_num_seqs=4, max_num_batched_tokens=64, watermark_blocks=0, num_blocks=64, max_model_len=64)
    # Requests 0 and 1 start at once on an instance each; 1 ends with the first token of 0, and 2 follows it to 0.
    case = c.Case(np.array([0.0, 0.0, 0.0]), np.array([8, 8, 12]), np.array([5, 1, 3]), np.array([5, 1, 3]),
                  np.zeros(3, int), np.zeros((3, 2), np.float32), limits, ((0.25, 0.0, 0.0, 0.0, 0.0),) * 3,
                  router=c.MIXED.index("round_robin"), prefixes=[()] * 3)
    workload = Workload(case.arrival_s, case.prompt, case.output, session=[0, 1, 1], turn=[0, 0, 1],
                        think_s=np.zeros(3), uniforms=case.uniforms)
    want = reference(case, workload, 0.0, flags, dims)
    assert want["arrival_s"].tolist() == [0, 0, 0.25] and want["scheduled_s"].tolist() == [0, 0, 0.25]
    assert want["instance"].tolist() == [0, 1, 0]
    if source == "sessions":
        ours = simulate([(case, workload, 0.0)] * c.LANES, flags, dims)[0]
        assert c.differences(ours, {k: v for k, v in want.items() if k != "returned"}) == []
        return
    params, requests = c.inputs([case] * c.LANES, flags, dims, "mixed")
    params = replace(params, source=ClosedLoop(jnp.full(c.LANES, 2, jnp.int32), jnp.zeros(c.LANES)))
    ours = c.unpack(dims, jax.device_get(loop.run(dims, params, requests)), 0, 3)
    assert ours["scheduled_s"].tolist() == [0, 0, 0.25] and ours["instance"].tolist() == [0, 1, 0]


def test_the_loop_body_copies_nothing_large():
    """Also what is due is written in place."""
    flags, dims = replace(simulator.preset("vllm-v1"), prefix_caching=True), c.dims_of("vllm-v1", 2, **SIZES)
    rng = np.random.default_rng(0)
    batch = [draw(rng, flags, dims) for _ in range(c.LANES)]
    params = c.stack([replace(c.make_params(case, flags, "mixed"), source=Sessions(np.float32(0)))
                      for case, *_ in batch])
    requests = c.stack([lower.make_requests(w, dims, lower.shared_prefixes(w, dims.block_size)) for _, w, _ in batch])
    due = jax.eval_shape(jax.vmap(params.source.start), requests)[1]
    large = large_shapes(dims, c.LANES)[0] | {tuple(sorted(due.shape))}
    if jax.default_backend() != "cpu":
        pytest.skip("reads the text of a CPU program")
    assert problems(loop.run.lower(dims, params, requests).compile().as_text(), large) == []


FORM = {"a": 0.01, "b": 1e-5, "c": 1e-7, "d": 1e-5}


def scenario(prefix_caching: bool = True, **sessions) -> Scenario:
    """Two replicas; sessions come in bursts."""
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 2, "cluster": {"replicas": 2},
        "engine": {"max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 1024,
                   "num_gpu_blocks_override": 4000, "enable_prefix_caching": prefix_caching},
        "workload": {"kind": "gamma", "cv": 2.0, "rate_rps": 1.0, "num_requests": 200, "input": 60,
                     "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 80},
                     "sessions": {"turns": {"kind": "geometric", "mean_turns": 4.0}, "new_tokens": 30,
                                  "think_s": {"kind": "exponential", "mean_s": 2.0}, "shared_tokens": 100,
                                  "context_limit": 600, **sessions}},
        "cost": {"kind": "fitted", "prefill": FORM, "decode": FORM, "front_end_s": 0.125}})


def test_from_a_scenario_to_frame_and_summary():
    """What a frame says of sessions, and what the summary makes of it; the same table from a sweep."""
    made = scenario()
    result = jaxsim.simulate(made)
    assert not result.faults
    duration_s, completed = [], []
    for seed, frame in result.requests.groupby("seed"):
        frame = frame.sort_values(["session", "turn"])
        before = frame.groupby("session").shift(1)
        later = frame["turn"] > 0
        waited = frame["arrival_s"] - (before["arrival_s"] + before["e2e_s"])
        drawn = lower.make_workload(made, seed)
        assert np.allclose(waited[later], drawn.think_s[frame["request_id"][later]], atol=1e-6)
        assert np.all(frame["input_tokens"][later]
                      == (before["input_tokens"] + before["output_tokens"])[later] + 30)
        # Nothing is evicted, so a turn that comes to the same instance finds all whole blocks of what it extends.
        context = (before["input_tokens"] + before["output_tokens"] - 1)[later] // 16 * 16
        same = frame["instance"][later] == before["instance"][later]
        assert same.sum() > 30 and np.all(frame["cached_tokens"][later][same] == context[same])
        sessions = frame.groupby("session")
        assert sessions.ngroups == drawn.provenance["num_sessions"]
        ends = (frame["arrival_s"] + frame["e2e_s"]).groupby(frame["session"]).max()
        duration_s.append(np.percentile(ends - sessions["arrival_s"].min(), 99))
        completed.append(sessions.ngroups)
    group = result.metrics[0]["sessions"]
    assert group["completed"] == np.mean(completed) and group["failed"] == 0 and group["context_limited"] > 0
    assert group["p99_duration_s"] == pytest.approx(np.mean(duration_s), rel=1e-6)
    assert group["mean_turns"] == pytest.approx(np.mean([200 / n for n in completed]))
    assert list(result.requests.columns[-2:]) == ["session", "turn"]
    swept, refused = runner.table([made])
    assert not refused
    for key in ("mean_ttft_ms", "p99_e2el_ms", "duration", "request_throughput"):
        assert swept[key].mean() == pytest.approx(result.metrics[0][key], rel=1e-5), key
    for key, value in group.items():
        assert swept[f"sessions.{key}"].mean() == pytest.approx(value, rel=1e-6), key


@pytest.mark.parametrize("needs_a_rate", [
    load_of_scenario, lambda made: goodput.search([made]), lambda made: planning.search(made, [("h100", 4)])])
def test_what_needs_a_rate_of_requests_refuses_sessions(needs_a_rate):
    made = Scenario.from_dict({
        "schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"}, "slo": {"ttft_ms": 500.0},
        "workload": {"kind": "conversation", "rate_rps": 0.1}})
    with pytest.raises(InputError) as error:
        needs_a_rate(made)
    assert error.value.field == "workload.sessions" and "answers come out" in str(error.value)


def test_later_turns_need_less_with_a_cache():
    """The context of a later turn is computed again without one."""
    with_cache, without = (jaxsim.simulate(scenario(on)) for on in (True, False))
    assert without.requests["cached_tokens"].sum() == 0
    late = [r.requests[r.requests["turn"] >= 3] for r in (with_cache, without)]
    assert late[0]["prefill_s"].mean() < late[1]["prefill_s"].mean()


@pytest.mark.slow
def test_a_workload_of_sessions_can_be_given():
    """Whatever the scenario draws: the second turn waits for the first answer, the third for the second."""
    made = Scenario.from_dict({**scenario(False).to_dict(), "num_seeds": 1, "workload": {"kind": "batch"}})
    given = Workload([0.0, 1.0, 2.0, 5.0], [10, 30, 60, 10], [4, 4, 4, 4], session=[7, 7, 7, 1], turn=[0, 2, 5, 0],
                     think_s=[9.0, 1.0, 1e5, 0.0])
    lane = jaxsim.simulate(made, workload=given).lanes[0][0]
    out = lane.finish_s + lane.front_end_s
    assert lane.arrival_s.tolist() == [0.0, out[0] + 1.0, out[1] + 1e5, 5.0]
    open_loop = jaxsim.simulate(made, workload=replace(given, think_s=None)).lanes[0][0]
    assert open_loop.arrival_s.tolist() == [0.0, 1.0, 2.0, 5.0]
    assert open_loop.session.tolist() == [7, 7, 7, 1]


def test_a_run_replayed_in_a_closed_loop_is_that_run(tmp_path):
    """The sessions of `requests.parquet`: on the system they were run on every turn comes when it came; on a slower
    one later, but the first turns."""
    made = scenario(False)
    first = jaxsim.simulate(made)
    path = str(tmp_path / "requests.parquet")
    first.requests.to_parquet(path)
    replay = {**made.to_dict(), "num_seeds": 1, "workload": {
        "kind": "trace", "trace": path, "replay": "sessions", "sort": True, "slice": {"run": 0}}}
    again = jaxsim.simulate(Scenario.from_dict(replay)).requests
    slower = {**replay, "cost": {**replay["cost"], "decode": {**FORM, "a": 0.02}}}
    late = jaxsim.simulate(Scenario.from_dict(slower)).requests
    want = first.requests[first.requests["seed"] == 0].sort_values("arrival_s", kind="stable", ignore_index=True)
    for column in ("arrival_s", "ttft_s", "e2e_s"):
        np.testing.assert_allclose(again[column], want[column], atol=1e-4)
    is_first = again["turn"] == 0
    assert np.array_equal(late["arrival_s"][is_first], again["arrival_s"][is_first])
    assert np.all(late["arrival_s"][~is_first] > again["arrival_s"][~is_first])
