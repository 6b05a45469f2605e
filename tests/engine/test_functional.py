"""The pure functions inside other people's transformations."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsim
from jaxsim import Scenario
from jaxsim.engine import functional, loop
from jaxsim.engine.environment import Action, Environment
from jaxsim.state import world as w

pytestmark = pytest.mark.unoptimised

FORM = {"a": 0.01, "b": 1e-5, "c": 1e-7, "d": 1e-5}


def scenario(**workload) -> Scenario:
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 1, "cluster": {"replicas": 2},
        "engine": {"max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 256,
                   "num_gpu_blocks_override": 24},
        "workload": {"kind": "poisson", "rate_rps": 8.0, "num_requests": 24, "input": 60,
                     "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 80}} | workload,
        "cost": {"kind": "fitted", "prefill": FORM, "decode": FORM}})


@pytest.fixture(scope="module")
def made():
    return functional.inputs(scenario())


def test_it_gives_what_simulate_gives(made):
    dims, params, requests = made
    ours = functional.latencies(dims, params, requests, functional.simulate(dims, params, requests))
    frame = jaxsim.simulate(scenario()).requests.query("seed == 0")
    for name in ("ttft_s", "tpot_s", "e2e_s", "queue_s"):
        assert np.allclose(getattr(ours, name), frame[name], rtol=1e-6, atol=1e-7, equal_nan=True), name
    assert ours.is_finished.all() and np.array_equal(ours.preemptions, frame["preemptions"])


def test_another_seed_is_another_workload(made):
    _, _, other = functional.inputs(scenario(), seed=1)
    assert not np.array_equal(other.arrival, made[2].arrival)


def slower(params, factor):
    """Every cost times a factor."""
    return eqx.tree_at(lambda p: p.groups[0].cost, params, replace_fn=lambda cost: jax.tree.map(
        lambda x: x * factor, cost))


def test_vmap_makes_lanes_of_one_loop(made, monkeypatch):
    """Also twice, with one argument shared: never a loop under vmap."""
    dims, params, requests = made
    lanes, run = [], loop.run

    def spy(dims, params, requests):
        lanes.append(requests.count.shape[0])
        return run(dims, params, requests)

    monkeypatch.setattr(functional.loop, "run", spy)

    def finish(max_num_seqs, factor):
        changed = slower(params, factor)
        changed = eqx.tree_at(lambda p: p.groups[0].batching.max_num_seqs, changed, max_num_seqs)
        return functional.latencies(dims, params, requests, functional.simulate(dims, changed, requests)).e2e_s

    seqs, factors = jnp.array([2, 5, 8]), jnp.array([1.0, 2.0])
    grid = jax.jit(jax.vmap(jax.vmap(finish, (None, 0)), (0, None)))(seqs, factors)
    assert lanes[-1] == 6 and grid.shape == (3, 2, 24)
    for i, j in ((0, 1), (2, 0)):
        assert np.array_equal(grid[i, j], finish(seqs[i], factors[j]))
    assert grid[0].mean() > grid[2].mean() and np.all(grid[:, 1].mean(1) > grid[:, 0].mean(1))


@pytest.mark.slow
def test_forward_mode_where_all_arrive_at_once():
    """Costs times s are times times s, so the derivative of a time by s is the time over s. `jacfwd` over lanes has
    the columns of `jvp`."""
    dims, params, requests = functional.inputs(scenario(kind="batch", rate_rps=None))

    def end_s(factors):
        changed = slower(params, factors[0] * factors[1])
        return functional.latencies(dims, changed, requests, functional.simulate(dims, changed, requests)).e2e_s

    at = jnp.array([[1.0, 1.0], [2.0, 0.5], [0.5, 3.0]])
    (times, by_first), (_, by_second) = (jax.jvp(end_s, (at[1],), (direction,)) for direction in jnp.eye(2))
    columns = jnp.stack([by_first, by_second], axis=1)
    assert np.all(times > 0) and np.allclose(columns * at[1], times[:, None], rtol=1e-4)
    lanes = jax.jit(jax.vmap(jax.jacfwd(end_s)))(at)
    assert np.allclose(lanes[1], columns, rtol=1e-5)
    assert np.allclose(lanes[:, :, 0] * at[:, :1], lanes[:, :, 1] * at[:, 1:], rtol=1e-4)


def test_forward_mode_is_at_a_fixed_schedule(made):
    """Requests arrive over time: with all costs a share longer every latency is so much longer, and no more, as the
    path of a run would have it; alone, over lanes and over directions."""
    dims, params, requests = made

    def times(factors):
        changed = slower(params, factors[0] * factors[1])
        world = functional.simulate(dims, changed, requests)
        met = functional.latencies(dims, changed, requests, world)
        return jnp.stack([met.queue_s, met.ttft_s, met.e2e_s]), busy_s(dims, world)

    at = jnp.array([1.0, 1.0])
    (seconds, busy), (moved, more) = jax.jit(lambda x: jax.jvp(times, (x,), (jnp.array([1.0, 0.0]),)))(at)
    assert np.all(seconds[2] > 0) and seconds[0].max() > 0.005
    assert np.allclose(moved, seconds, rtol=1e-5, atol=1e-6) and np.allclose(more, busy, rtol=1e-5)
    lanes, _ = jax.jit(jax.vmap(jax.jacfwd(times)))(jnp.stack([at, jnp.array([2.0, 1.0])]))
    assert np.allclose(lanes[0], np.stack([seconds, seconds], -1), rtol=1e-5, atol=1e-6)
    assert np.allclose(lanes[1][..., 1], 2 * lanes[1][..., 0], rtol=1e-5, atol=1e-6)


def test_forward_mode_by_other_numbers_is_refused(made):
    dims, params, requests = made

    def ends(given, stretch):
        there = eqx.tree_at(lambda r: r.arrival, given, given.arrival * stretch)
        return functional.simulate(dims, params, there).finished

    with pytest.raises(ValueError, match=r"requests.arrival: only costs .* total derivative"):
        jax.jvp(lambda x: ends(requests, x), (1.0,), (1.0,))

    def many(stages, factor):
        sizes = dataclasses.replace(dims, num_batches=stages, num_stages=stages)
        return functional.simulate(sizes, slower(params, factor), requests).finished

    with pytest.raises(ValueError, match="num_stages = 2: iterations overlap"):
        jax.jvp(lambda x: many(2, x), (1.0,), (1.0,))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about kernels on CPU")
def test_numbers_of_lanes_may_be_constants_of_a_program():
    """XLA on CPU aborts on a kernel that reads large constants, and the process with it."""
    one = Scenario.from_dict({
        "schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
        "engine": {"max_num_seqs": 8, "max_model_len": 1024},
        "workload": {"kind": "poisson", "rate_rps": 4.0, "num_requests": 12, "input": 100, "output": 20}})
    dims, *numbers = functional.inputs(one)
    numbers = jax.tree.map(lambda x: jnp.stack([x] * 8), numbers)
    found = jax.jit(lambda: jax.vmap(lambda *lane: functional.simulate(dims, *lane).num_finished)(*numbers))()
    assert np.array_equal(found, np.full(8, 12))


def test_integers_and_tangents_may_have_one_axis():
    """Lanes that differ in a whole number and in the direction of the derivative: one value a lane. No engine."""
    def batched(_, count, seconds, table):
        return {"end": seconds**2 * count + table.sum(-1), "count": count + 1}

    def along(dims, structure, leaves, given):
        def of_floats(moved):
            result = batched(dims, *structure.unflatten([moved.get(at, leaf) for at, leaf in enumerate(leaves)]))
            return eqx.filter(result, eqx.is_inexact_array), result

        _, slopes, result = jax.jvp(of_floats, ({at: leaves[at] for at in given},), (given,), has_aux=True)
        return result, slopes

    def end(count, seconds):
        return functional.in_lanes(batched, None, (count, seconds, jnp.arange(3.0)), along)["end"]

    def slope(count, seconds, direction):
        return jax.jvp(lambda x: end(count, x), (seconds,), (direction,))[1]

    count, seconds, direction = jnp.array([1, 2, 3]), jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 1.0, 2.0])
    expected = np.array([2.0, 8.0, 36.0])
    assert np.array_equal(jax.vmap(slope)(count, seconds, direction), expected)
    for axes in ((0, 0, None), (0, None, 0), (None, 0, 0), (0, None, None), (None, None, 0)):
        given = [x if axis == 0 else x[1] for x, axis in zip((count, seconds, direction), axes, strict=True)]
        lanes = [np.broadcast_to(x, 3) for x in given]
        assert np.array_equal(jax.vmap(slope, axes)(*given), 2 * lanes[0] * lanes[1] * lanes[2]), axes
    twice = jax.vmap(jax.vmap(slope, (None, 0, 0)), (0, None, None))(count, seconds, direction)
    assert np.array_equal(twice, 2 * np.outer(count, seconds * direction))
    assert np.array_equal(jax.vmap(jax.jacfwd(end, 1))(count, seconds), 2 * count * seconds)


# --- the tape -----------------------------------------------------------------------------------------------


ROWS = 200


@pytest.fixture(scope="module")
def lanes(made):
    """Three, the second with costs twice as high, the third with iterations of few tokens: more than there are rows."""
    dims, params, requests = made

    def run(factor, max_num_batched_tokens):
        changed = eqx.tree_at(lambda p: p.groups[0].batching.max_num_batched_tokens, slower(params, factor),
                              max_num_batched_tokens)
        world, tape = functional.simulate_recorded(dims, changed, requests, ROWS)
        return world, tape, functional.record_seconds(dims, changed, tape)

    return jax.device_get(jax.jit(jax.vmap(run))(jnp.array([1.0, 2.0, 1.0]), jnp.array([256, 256, 8])))


@pytest.fixture(scope="module")
def recorded(lanes):
    """Those whose tape is whole."""
    return jax.tree.map(lambda x: x[:2], lanes)


def busy_s(dims, world):
    return w.clock_rows(dims).everything(world.clocks).executor.busy.hi.sum(axis=-1)


def test_the_tape_changes_nothing(made, recorded):
    dims, params, requests = made
    world, tape, _ = recorded
    plain = functional.simulate(dims, params, requests)
    for name in ("finished", "first_tokens", "scheduled", "progress"):
        assert np.array_equal(getattr(world, name)[0, :24], getattr(plain, name)[:24]), name
    assert not tape.is_full.any() and np.all(tape.count > 24)


def test_records_add_up_to_the_run(made, recorded):
    """And are priced again as they were priced."""
    dims, _, _ = made
    world, tape, seconds = recorded
    assert np.allclose(tape.duration_s.sum(1), busy_s(dims, world), rtol=1e-5)
    assert np.allclose(seconds, tape.duration_s, rtol=1e-6, atol=1e-7)
    iterations = w.count_rows(dims).everything(world.counts).executor.num_iterations.sum(axis=-1)
    assert np.array_equal(tape.iterations.sum(1), iterations)
    assert np.any(tape.iterations < tape.planned) and np.all(tape.iterations <= tape.planned)


def test_requests_point_at_their_records(made, recorded):
    dims, _, requests = made
    world, tape, _ = recorded
    arrival = np.asarray(requests.arrival)[:24, 1].astype(np.float64)

    def when(stamps):
        return stamps[:, 1].astype(np.float64) + stamps[:, 2]

    for lane in range(2):
        mine = jax.tree.map(lambda x, lane=lane: x[lane], tape)
        start, end = when(mine.start), when(mine.end)
        assert np.array_equal(end[mine.last], when(world.finished[lane, :24]))
        assert np.array_equal(start[mine.joined], when(world.scheduled[lane, :24]))
        first_token = when(world.first_tokens[lane])[world.placed[lane, :24, 0]]
        assert np.allclose(start[mine.first_token] + mine.first_s[mine.first_token], first_token, rtol=0, atol=1e-6)
        is_met = mine.met >= 0
        assert is_met.any() and not is_met.all()
        met = mine.met[is_met]
        assert np.all((start[met] <= arrival[is_met]) & (arrival[is_met] <= end[met]))
        # Where nothing was in flight, the request starts one; it waits for nothing else.
        alone = ~is_met & (mine.instance[mine.joined] >= 0)
        assert np.array_equal(start[mine.joined][alone], arrival[alone])
        count = int(mine.count)
        contiguous = np.flatnonzero(mine.is_contiguous)
        assert contiguous.max() < count and np.array_equal(start[contiguous], end[mine.previous[contiguous]])
        begins = np.flatnonzero(~mine.is_contiguous[:count])
        assert set(start[begins]) <= set(arrival)
        assert np.array_equal(mine.instance[mine.previous[contiguous]], mine.instance[contiguous])


def test_reverse_mode_over_the_tape_is_forward_mode(made, recorded):
    """Total busy time, and seconds from first iterations to ends, by the coefficients of the cost: a scan over the tape
    chains the records, everything else is at the recorded schedule."""
    dims, params, requests = made
    at = params.groups[0].cost.coefficients

    def priced(coefficients):
        return eqx.tree_at(lambda p: p.groups[0].cost.coefficients, params, coefficients)

    def by_loop(coefficients):
        changed = priced(coefficients)
        world = functional.simulate(dims, changed, requests)
        met = functional.latencies(dims, changed, requests, world)
        return jnp.stack([busy_s(dims, world), jnp.nansum(met.e2e_s - met.queue_s)])

    def by_tape(coefficients, tape=None):
        changed = priced(coefficients)
        if tape is None:
            _, tape = functional.simulate_recorded(dims, changed, requests, ROWS)
        seconds = functional.record_seconds(dims, changed, tape)

        def start(ends, record):
            index, start_s, own_s, previous, is_contiguous = record
            begin = jnp.where(is_contiguous, ends[previous], start_s)
            return ends.at[index].set(begin + own_s), begin

        start_s = tape.start[:, 1] + tape.start[:, 2]
        records = jnp.arange(ROWS), start_s, seconds, tape.previous, tape.is_contiguous
        ends, begins = jax.lax.scan(start, jnp.zeros(ROWS), records)
        return jnp.stack([seconds.sum(), jnp.sum(ends[tape.last[:24]] - begins[tape.joined[:24]])])

    forward = jax.jit(jax.jacfwd(by_loop))(at)
    reverse = jax.jit(jax.jacrev(by_tape))(at)
    assert np.count_nonzero(forward[0]) > 8 and np.count_nonzero(forward[1]) > 8
    assert np.allclose(reverse, forward, rtol=1e-4)
    schedule = jax.tree.map(lambda x: x[0], recorded[1])
    assert np.allclose(jax.jit(jax.jacfwd(by_tape))(at, schedule), forward, rtol=1e-4)


def test_lost_records_are_not_silent(lanes):
    _, tape, seconds = jax.tree.map(lambda x: x[2], lanes)
    assert tape.is_full and tape.num_lost == tape.count - ROWS
    assert np.isnan(seconds).all()
    assert np.any(tape.last == -1) and np.any(tape.last >= 0) and np.all(tape.last < ROWS)


def test_repeated_calls_compile_once(made):
    """Whatever the numbers, called as they are."""
    dims, params, requests = made
    functional.simulate(dims, params, requests)
    before = loop.run._cache_size()
    for factor in (1.5, 3.0):
        functional.simulate(dims, slower(params, factor), functional.inputs(scenario(), seed=4)[2])
    assert loop.run._cache_size() == before


def test_64_bit_mode_changes_no_type(made):
    """Traced only. A caller in that mode may also come with numbers of 64 bits."""
    dims, params, requests = made
    env = Environment(scenario(), tick_s=0.5)

    def types(tree):
        return [(jnp.shape(x), x.dtype) for x in jax.tree.leaves(tree)]

    def both(factor):
        changed = slower(params, factor)
        _, tape = functional.simulate_recorded(dims, changed, requests, ROWS)
        return functional.simulate(dims, changed, requests), functional.record_seconds(dims, params, tape)

    def tick(state):
        return env.step(state, Action(is_active=jnp.array([True, False])))

    state = env.reset(requests)
    plain, before = types(jax.eval_shape(both, np.float32(2))), types(state)
    assert types(jax.eval_shape(tick, state[0])[:2]) == before
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        assert (2.0 * jnp.ones(1)).dtype == jnp.float64
        assert types(jax.eval_shape(both, np.float64(2))) == plain
        state = env.reset(requests)
        assert types(state) == types(jax.eval_shape(tick, state[0])[:2]) == before


# --- devices ------------------------------------------------------------------------------------------------


ON_DEVICES = """
import json, re
import jax, jax.numpy as jnp, numpy as np
flags = dict(jax.config.values)
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxsim.engine import functional, loop
from jaxsim.engine.environment import Action, Environment
from tests.engine.test_functional import scenario, slower

dims, params, requests = functional.inputs(scenario())
env = Environment(scenario(), tick_s=0.5)
assert {k: v for k, v in jax.config.values.items() if k in flags} == flags, "a flag was changed"

def end_s(factor):
    changed = slower(params, factor)
    return functional.latencies(dims, changed, requests, functional.simulate(dims, changed, requests)).e2e_s

def recorded(factor):
    changed = slower(params, factor)
    world, _ = functional.simulate_recorded(dims, changed, requests, 200)
    return functional.latencies(dims, changed, requests, world).e2e_s

def in_ticks(factor):
    changed = slower(env.params, factor)
    def tick(carry, _):
        return env.step(carry[0], Action())[:2], None
    (state, _), _ = jax.lax.scan(tick, env.reset(requests, changed), length=30)
    return functional.latencies(env.dims, changed, requests, state.world).e2e_s

factors = jnp.linspace(0.5, 2.0, 8)
mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
sharded = jax.device_put(factors, NamedSharding(mesh, P("devices")))
whole = jax.jit(jax.vmap(end_s))(factors)
split = jax.jit(jax.vmap(end_s))(sharded)
said = dict(split=bool(np.array_equal(split, whole)), is_finite=bool(np.isfinite(whole).all()))
batch = jax.tree.map(lambda x: jnp.stack([x, x]), (params, requests))
said["are_kernels"] = ["xla_cpu_small_call" in jax.jit(run, static_argnums=0).lower(dims, *batch).as_text()
                       for run in (loop.run, loop.run_on_one_device)]
for function in (end_s, recorded, in_ticks):
    over = jax.shard_map(jax.vmap(function), mesh=mesh, in_specs=P("devices"), out_specs=P("devices"))
    compiled = jax.jit(over).lower(sharded).compile()
    said[function.__name__] = dict(
        same=bool(np.array_equal(compiled(sharded), whole)),
        collectives=re.findall("all-reduce|all-gather|collective|all-to-all", compiled.as_text()))
assert dict(jax.config.values) == flags | {k: v for k, v in jax.config.values.items() if k not in flags}
print("REPORT", json.dumps(said))
"""


@pytest.mark.slow
def test_shards_run_their_own_loops_quietly():
    """Over four devices: the same bits, no collective, no flag, no word."""
    root = Path(__file__).parents[2]
    # Without the programs kept by others: where one is loaded, XLA may have a word to say.
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment = kept | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu",
                                "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", ON_DEVICES], capture_output=True, text=True, env=environment, cwd=root,
                          timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    assert line.startswith("REPORT") and done.stderr == ""
    said = json.loads(line.removeprefix("REPORT"))
    alone = {"same": True, "collectives": []}
    # A kernel cannot be partitioned: only what stays on one device is one.
    assert said.pop("are_kernels") == [False, True]
    assert said == {"split": True, "is_finite": True, "end_s": alone, "recorded": alone, "in_ticks": alone}
