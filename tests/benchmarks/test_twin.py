"""The C++ programs of benchmarks/ give the engine's answers, so that racing them compares the same work."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import cpp
from jaxsim.bench import cases as bench
from jaxsim.bench import engine, worker
from jaxsim.engine import loop
from jaxsim.kernels import clock

CASE = bench.Case("test", scenarios=12, requests=60, slots=8, num_blocks=60)
ROWS = tuple(tuple(m * x for x in (2.0**-6, 2.0**-9, 2.0**-12, 2.0**-8, 2.0**-14)) for m in (1, 2, 3))
DYADIC = ((*ROWS[0][:2], 0.0, *ROWS[0][3:]), (ROWS[1][0], 0.0, *ROWS[1][2:4], 0.0), ROWS[2])
CONSTANT = ((0.25, 0.0, 0.0, 0.0, 0.0),) * 3


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    if cpp.find_compiler() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cpp")
    return {name: cpp.build(name, folder) for name in cpp.PROGRAMS}


def crowded(rng: np.random.Generator) -> bench.Drawn:
    """Short requests on a coarse grid of arrivals: ties, full slots, a tight pool."""
    shape = (CASE.scenarios, CASE.requests)
    grid = 2.0 ** rng.integers(-6, 1, (CASE.scenarios, 1))
    arrival = np.cumsum(rng.integers(0, 12, shape) * grid, axis=1)
    longest = rng.integers(4, 400, (CASE.scenarios, 1))
    prompt = 1 + (rng.random(shape) * longest).astype(int)
    output = 1 + (rng.random(shape) * longest).astype(int)
    return bench.Drawn(arrival, prompt, output, np.zeros((*shape, 2), np.float32))


def run_cpp(program, folder, drawn, coefficients, **limits) -> cpp.Answers:
    workload = cpp.write_workload(
        folder / "workload", drawn.arrival_s, drawn.prompt, drawn.output, coefficients, **limits)
    printed = cpp.run(program, workload, 1, folder / "answers")
    answers = cpp.read_answers(folder / "answers", drawn.arrival_s.shape)
    assert printed["checksum"] == answers.checksum()
    assert printed["preemptions"] == answers.preemptions.sum()
    return answers


@pytest.mark.parametrize("coefficients", [DYADIC, CONSTANT], ids=["dyadic", "constant"])
def test_twin_equals_the_engine(programs, tmp_path, coefficients):
    drawn = crowded(np.random.default_rng(5))
    params, requests = bench.engine_inputs(CASE, drawn, coefficients)
    world = loop.run(CASE.dims, params, requests)
    assert not np.any(np.asarray(world.fault))
    ours = cpp.Answers(*bench.engine_answers(world, CASE.requests))
    theirs = run_cpp(programs["twin"], tmp_path, drawn, coefficients, slots=CASE.slots,
                     num_blocks=CASE.num_blocks, budget=CASE.budget_tokens)
    # Something is at stake: preemptions and, with constant durations, arrivals at an iteration's very end.
    assert ours.preemptions.sum() > 20
    if coefficients is CONSTANT:
        arrival = drawn.arrival_s * cpp.TICKS_PER_S
        ends = np.concatenate([ours.first, ours.finish], axis=1)
        assert sum(np.isin(arrival[b], ends[b]).sum() for b in range(CASE.scenarios)) > 20
    np.testing.assert_array_equal(theirs.preemptions, ours.preemptions)
    np.testing.assert_array_equal(theirs.first, ours.first)
    np.testing.assert_array_equal(theirs.finish, ours.finish)
    assert theirs.checksum() == ours.checksum()


def test_bare_loop_equals_the_twin_where_nothing_binds(programs, tmp_path):
    drawn = crowded(np.random.default_rng(6))
    limits = dict(slots=CASE.slots, num_blocks=1 << 24, budget=1 << 24)
    twin, bare, native = (run_cpp(programs[name], tmp_path, drawn, DYADIC, **limits)
                          for name in ("twin", "bare", "bare_native"))
    np.testing.assert_array_equal(bare.first, twin.first)
    np.testing.assert_array_equal(bare.finish, twin.finish)
    assert bare.checksum() == native.checksum() == twin.checksum()


def test_twin_differs_where_rules_differ(programs, tmp_path):
    drawn = crowded(np.random.default_rng(5))
    tight, wide = (run_cpp(programs["twin"], tmp_path, drawn, DYADIC, slots=CASE.slots, num_blocks=blocks)
                   for blocks in (CASE.num_blocks, 1 << 24))
    assert tight.checksum() != wide.checksum()
    assert wide.preemptions.sum() == 0


def test_workload_is_as_stated():
    case = replace(bench.Case("test"), scenarios=64)
    drawn = bench.draw(case)
    assert (drawn.prompt.min(), drawn.prompt.max()) == (256, 767)
    assert (drawn.output.min(), drawn.output.max()) == (64, 191)
    rates = case.requests / drawn.arrival_s[:, -1]
    assert np.all(np.diff(drawn.arrival_s) >= 0)
    assert 3.4 < rates.min() < 5 and 11 < rates.max() < 13.5
    np.testing.assert_array_equal(drawn.arrival_s, clock.round_arrivals_reference(drawn.arrival_s))
    # Eight replicas get eight times the load.
    more = bench.draw(replace(case, replicas=8))
    np.testing.assert_allclose(more.arrival_s[:, -1] * 8, drawn.arrival_s[:, -1], rtol=1e-4)


def test_the_reference_is_found():
    """The plain-Python simulator is a package of its own, outside of what is installed."""
    found = worker._time_reference(replace(bench.Case("test"), scenarios=1, requests=20))
    assert found["requests_per_s_per_core"] > 0


def test_report_without_sources(monkeypatch):
    """An installed package has neither the C++ sources nor the reference: null and a note, not an error."""
    monkeypatch.setattr(engine, "checkout", lambda relative: None)
    monkeypatch.setattr(engine, "_measure_quickly", lambda jobs, began, report: [
        report(engine._empty(bench.Case(**case), "not run")) for job in jobs for case in job.cases])
    report = engine.main(quick=True)
    assert [r["name"] for r in report["results"]][:len(bench.MAIN_CASES)] == [c.name for c in bench.MAIN_CASES]
    assert report["ratios"] == {"vs_cpp": None, "vs_python": None}
    assert any("C++" in note for note in report["notes"])
    assert any("Python" in note for note in report["notes"])
    engine.show(report)


def test_unknown_case_is_refused():
    with pytest.raises(ValueError, match="replicas_1"):
        engine.main(only=["replicas_2"])


def test_worker_that_fails_is_reported(tmp_path):
    job = worker.Job("engine", [{"name": "broken", "no_such_field": 1}], 1, str(tmp_path))
    started = engine._try_start(job, engine._cores()[0])
    assert isinstance(started, str) and "no_such_field" in started
