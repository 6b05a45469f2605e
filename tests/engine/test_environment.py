"""The environment by control ticks: exact whatever the ticks, and actions take effect where they are said to."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim import InputError, Scenario
from jaxsim.engine import environment, events, functional
from jaxsim.engine import simulate as engine
from jaxsim.engine.common import Context
from jaxsim.engine.environment import Action, Environment, acted
from jaxsim.kernels.clock import Time
from jaxsim.policy import routing
from jaxsim.state import world as w

pytestmark = pytest.mark.unoptimised

DYADIC = {"a": 2.0**-6, "b": 2.0**-16, "c": 2.0**-22, "d": 2.0**-12}
"""Exact in float32: a jump takes what its iterations take one by one."""

SEEDS, TICKS = 8, 48


def scenario(preset: str = "vllm-v1", source: str = "poisson", **engine_fields) -> Scenario:
    """Two replicas with slots and memory for few."""
    numbers = {"poisson": {"rate_rps": 9.0}, "closed-loop": {"concurrency": 14, "think_s": 0.25}}[source]
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 1, "cluster": {"replicas": 2, "router": "round_robin"},
        "engine": {"preset": preset, "max_num_seqs": 6, "max_num_batched_tokens": 256, "max_model_len": 256,
                   "num_gpu_blocks_override": 40, **engine_fields},
        "workload": {"kind": source, "num_requests": 40,
                     "input": {"kind": "uniform", "min_tokens": 8, "max_tokens": 96},
                     "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 100}} | numbers,
        "slo": {"ttft_ms": 500.0}, "cost": {"kind": "fitted", "prefill": DYADIC, "decode": DYADIC}})


def rollout(env: Environment, actions, requests):
    """One episode under given actions: latencies, the world, and what every step gave."""
    def tick(state, action):
        state, *seen = env.step(state, action)
        return state, seen

    state, seen = jax.lax.scan(tick, env.reset(requests)[0], actions)
    return functional.latencies(env.dims, env.params, requests, state.world), state.world, seen


@jax.jit
def equal(a, b):
    return jax.tree.map(lambda x, y: jnp.array_equal(x, y, equal_nan=True), a, b)


def limits(rng: np.random.Generator, lanes: int, ticks: int) -> Action:
    """Limits that change at about every other tick, and replicas that come and go."""
    def held(values, is_new):
        at = np.maximum.accumulate(np.where(is_new, np.arange(ticks), 0), axis=1)
        return jnp.asarray(np.take_along_axis(values, at, axis=1))

    is_new = rng.random((2, lanes, ticks)) < 0.5
    return Action(max_num_seqs=held(rng.integers(1, 7, (lanes, ticks)), is_new[0]),
                  max_num_batched_tokens=held(rng.integers(16, 257, (lanes, ticks)), is_new[1]),
                  is_active=jnp.asarray(rng.random((lanes, ticks, 2)) < 0.7))


@pytest.mark.parametrize("preset, source", [
    pytest.param("vllm-v1@0.9", "closed-loop", marks=pytest.mark.slow),
    pytest.param("vllm-v1@0.19", "poisson", marks=pytest.mark.slow)])
def test_changes_take_effect_as_if_iterations_were_single(preset, source, monkeypatch):
    """Under actions that change all the time: cutting a jump is as exact as having none. And where nothing changes, the
    ticks change nothing."""
    changing = limits(np.random.default_rng(0), SEEDS, TICKS)
    still = Action(max_num_seqs=jnp.full((SEEDS, TICKS), 6), max_num_batched_tokens=jnp.full((SEEDS, TICKS), 256),
                   is_active=jnp.ones((SEEDS, TICKS, 2), bool))
    both = jax.tree.map(lambda *x: jnp.concatenate(x), changing, still)

    def run(env):
        requests = jax.tree.map(lambda x: jnp.concatenate([x, x]), env.requests(range(SEEDS)))
        return requests, *jax.jit(jax.vmap(lambda a, r: rollout(env, a, r)))(both, requests)

    env = Environment(scenario(preset, source), tick_s=0.3)
    requests, met, world, _ = run(env)
    whole = jax.jit(jax.vmap(lambda r: functional.simulate(env.dims, env.params, r)))(
        jax.tree.map(lambda x: x[SEEDS:], requests))
    plain = jax.vmap(lambda r, world: functional.latencies(env.dims, env.params, r, world))(
        jax.tree.map(lambda x: x[SEEDS:], requests), whole)
    assert all(jax.tree.leaves(equal(jax.tree.map(lambda x: x[SEEDS:], met), plain)))
    assert met.is_finished.all() and met.preemptions.sum() > 0 and not world.fault.any()
    assert np.array_equal(world.itl[SEEDS:], whole.itl)

    monkeypatch.setattr(engine, "dims_of", lambda *args, of=engine.dims_of: replace(of(*args), max_jump=1))
    single = Environment(scenario(preset, source), tick_s=0.3)
    assert single.dims.max_jump == 1
    _, by_one, slow, _ = run(single)
    assert (slow.steps.sum() > 1.5 * world.steps.sum()) and not np.array_equal(met.e2e_s[:SEEDS], met.e2e_s[SEEDS:])
    for name in ("ttft_s", "tpot_s", "e2e_s", "queue_s", "preemptions"):
        assert np.array_equal(getattr(met, name), getattr(by_one, name), equal_nan=True), name


@pytest.fixture(scope="module")
def steered():
    """An environment with a router to steer, and its rollout as one program over many lanes."""
    env = Environment(scenario(), tick_s=0.3, routing=routing.Linear(bias=np.zeros(2, np.float32)))
    return env, jax.jit(jax.vmap(lambda actions, requests: rollout(env, actions, requests)))


def test_a_replica_that_is_off_gets_nothing_and_drains(steered):
    env, run = steered
    is_active = np.ones((SEEDS, TICKS, 2), bool)
    is_active[:, 2:6, 0] = False
    is_active[:, 6:8, 1] = False
    is_active[:, 10:12] = False  # nobody: as if all
    bias = np.zeros((SEEDS, TICKS, 2), np.float32)
    bias[:, 8:10, 1] = 1e3
    router = jax.tree.map(lambda x: jnp.broadcast_to(x, (SEEDS, TICKS)), routing.Linear(bias=np.float32(0)))
    actions = Action(replace(router, bias=jnp.asarray(bias)), jnp.asarray(is_active))
    requests = env.requests(range(SEEDS))
    met, world, (seen, outcome, is_done) = run(actions, requests)
    arrived = np.asarray(seen.arrived)
    assert arrived[:, 2:6, 0].sum() == arrived[:, 6:8, 1].sum() == arrived[:, 8:10, 1].sum() == 0
    assert arrived[:, 2:6, 1].sum() > 50 and arrived[:, 8:10, 0].sum() > 20 and arrived[:, 10:12].sum(axis=(0, 1)).all()
    # Who was there is served there.
    there = np.asarray(seen.running + seen.waiting)[:, 1:6, 0]
    assert there[:, 0].sum() > there[:, -1].sum() and np.all(np.diff(there, axis=1) <= 0)
    assert np.array_equal(there[:, 0] - there[:, -1], seen.completed[:, 2:6, 0].sum(axis=1))
    assert met.is_finished.all() and is_done[:, -1].all()
    # What is reported adds up to what happened, by the tick.
    assert np.array_equal(arrived.sum(axis=(1, 2)), requests.count)
    assert np.array_equal(seen.completed.sum(axis=(1, 2)), requests.count)
    present = np.cumsum(arrived - seen.completed, axis=1)
    assert np.array_equal(present, seen.waiting + seen.running)
    assert np.allclose(outcome.ttft_s.sum(axis=(1, 2)), met.ttft_s.sum(1), rtol=1e-5)
    assert np.allclose(outcome.e2e_s.sum(axis=(1, 2)), met.e2e_s.sum(1), rtol=1e-5)
    assert np.array_equal(outcome.attained.sum(axis=(1, 2)), (met.ttft_s <= 0.5).sum(1))
    assert np.array_equal(outcome.output_tokens.sum(axis=(1, 2)), requests.table[:, :-1, 1].sum(1))
    assert np.all(seen.used_blocks <= 40) and np.array_equal(seen.used_blocks == 0, seen.running == 0)
    first_done = np.argmax(np.asarray(is_done), axis=1)
    assert np.array_equal(np.asarray(seen.completed).sum(2).cumsum(1) == 40, is_done) and first_done.max() < TICKS - 1


def test_blocks_are_those_of_the_instant(steered):
    """In the middle of a jump: as many as the tokens of those who run, to one boundary."""
    env, run = steered
    requests = jax.tree.map(lambda x: jnp.stack([x] * SEEDS), env.requests(3))
    still = jax.tree.map(lambda x: jnp.broadcast_to(x, (SEEDS, TICKS, *jnp.shape(x))), env.params.routing)
    _, _, (seen, _, _) = run(Action(still, jnp.ones((SEEDS, TICKS, 2), bool)), requests)
    used, running = np.asarray(seen.used_blocks[0]), np.asarray(seen.running[0])
    jumps = (np.diff(running, axis=0) == 0) & (running[1:] > 0) & (np.diff(used, axis=0) > 0)
    assert jumps.sum() > 5, "blocks grow while the same number run"


@pytest.mark.parametrize("rule", [routing.RoundRobin(), routing.Random(), routing.LeastOutstanding(),
                                  routing.PowerOfTwo(), routing.LeastKV(), routing.DataParallel(), routing.Score(),
                                  routing.Linear()], ids=lambda rule: type(rule).__name__)
def test_routers_keep_to_active_instances(rule):
    rng = np.random.default_rng(1)

    def view(is_active):
        return routing.View(
            jnp.asarray(rng.integers(0, 4, 5)), jnp.asarray(rng.integers(0, 3, 5)), jnp.asarray(rng.integers(0, 9, 5)),
            jnp.full(5, 9), jnp.int32(rng.integers(0, 99)), jnp.asarray(rng.random(2), jnp.float32), jnp.int32(10),
            is_active)

    chosen = []
    for _ in range(60):
        is_active = rng.random(5) < 0.5
        is_active[rng.integers(5)] = True
        chosen.append(int(rule.choose(view(jnp.asarray(is_active)))))
        assert is_active[chosen[-1]]
        everybody = view(None)
        assert int(rule.choose(everybody)) == int(rule.choose(replace(everybody, is_active=jnp.ones(5, bool))))
    assert len(set(chosen)) == 5


class Stubborn(routing.AbstractRouting):
    """Knows nothing of active instances."""

    def choose(self, view):
        return jnp.int32(0)


def test_other_routers_are_kept_to_them():
    env = Environment(scenario(), tick_s=1.0, routing=Stubborn())
    state, _ = env.reset(0)
    for is_active, chosen in (([False, True], 1), ([True, True], 0), ([False, False], 0)):
        params = acted(env.dims, env.setting, state, Action(is_active=jnp.array(is_active)))
        context = Context(env.dims, params, state.requests, state.world)
        assert events.route(context, jnp.int32(0), Time(jnp.float32(0), jnp.float32(0))) == chosen


def test_a_spread_of_loads_is_that_of_active_instances():
    """A replica that drains does not open the gates of `Score`, nor lower its mean."""
    view = routing.View(jnp.array([4, 5, 0]), jnp.zeros(3, int), jnp.array([9, 0, 0]), jnp.full(3, 9), jnp.int32(0),
                        jnp.zeros(2), None, jnp.array([True, True, False]))
    among_two = routing.View(view.outstanding[:2], view.waiting[:2], view.used_blocks[:2], view.num_blocks[:2],
                             view.num_routed, view.uniforms)
    # A spread of 1, with the third 5; and loads apart by 1 / 4.5, with the third by 1 / 3, against 0.3 of the blocks.
    for rule in (routing.Score(kv_weight=np.float32(9), balance_abs=np.float32(2)),
                 routing.Score(kv_weight=np.float32(0.3))):
        assert rule.choose(view) == rule.choose(among_two) == 1


def test_policy_gradients_pass_by_the_environment(steered):
    """A step is a constant, also to reverse mode."""
    env, _ = steered

    def loss(bias):
        state, _ = env.reset(requests)
        router = replace(env.params.routing, bias=bias)
        _, _, outcome, _ = env.step(state, Action(router))
        return jnp.sum(bias**2) + outcome.e2e_s.sum()

    requests = env.requests(0)
    assert np.array_equal(jax.grad(loss)(jnp.array([1.0, -2.0])), [2.0, -4.0])


def test_all_actions_are_one_program(steered):
    """Whatever they leave out, however their numbers are given, in the first step as in those behind it."""
    env, _ = steered
    state, _ = env.reset(1)
    env.step(state, Action())
    before = environment._step._cache_size()
    for action in (Action(), Action(is_active=[False, True]), Action(max_num_seqs=3),
                   Action(env.params.routing, np.array([True, True]), jnp.array([2]), np.int64(64))):
        state, *_ = env.step(state, action)
    assert environment._step._cache_size() == before
    assert state.params.groups[0].batching.max_num_seqs == 2 and not state.world.fault


def test_a_router_that_is_no_number_is_a_fault(steered):
    """And from then on nothing happens."""
    env, _ = steered
    state, *_ = env.step(env.reset(0)[0], Action())
    broken = replace(env.params.routing, bias=jnp.array([0.0, jnp.nan]))
    stopped, seen, outcome, is_done = env.step(state, Action(broken))
    assert is_done and stopped.world.fault == w.NO_NUMBER and not seen.arrived.any() and not outcome.e2e_s.any()
    again, seen, _, is_done = env.step(stopped, Action(env.params.routing))
    assert is_done and not seen.arrived.any() and np.isclose(seen.time_s, 0.9)
    assert np.array_equal(again.world.counts, stopped.world.counts)


def test_what_does_not_fit_is_refused(steered):
    env, _ = steered
    state, _ = env.reset(0)
    with pytest.raises(ValueError, match="class and shapes"):
        env.step(state, Action(routing.RoundRobin()))
    for is_active in (jnp.ones(3, bool), jnp.ones((1, 2), bool), jnp.array([0.3, 0.0]), True):
        with pytest.raises(ValueError, match="action.is_active: .* booleans of the 2 instances"):
            env.step(state, Action(is_active=is_active))
    for limit in (2.5, jnp.float32(jnp.nan), jnp.array([3, 4]), True):
        with pytest.raises(ValueError, match="action.max_num_seqs: .* one integer"):
            env.step(state, Action(max_num_seqs=limit))
    with pytest.raises(ValueError, match="not an Action"):
        env.step(state, None)
    shorter = jax.tree.map(lambda x: x[:5] if x.ndim else x, env.requests(0))
    for requests in (env.requests(range(2)), jnp.int32(0), shorter):
        with pytest.raises(ValueError, match="requests: not one workload"):
            env.reset(requests)
    with pytest.raises(ValueError, match="params.is_active"):
        env.reset(0, replace(env.params, is_active=jnp.ones(3, bool)))
    # Those of `functional.inputs`, and of nobody active.
    for is_active in (None, jnp.zeros(2, bool)):
        assert env.reset(0, replace(env.params, is_active=is_active))[0].params.is_active.all()
    with pytest.raises(InputError, match="Scenario.from_dict"):
        Environment({}, tick_s=1.0)
    with pytest.raises(InputError, match="routing .* instance of a subclass"):
        Environment(scenario(), tick_s=1.0, routing=routing.Linear)
    for tick_s in (-1.0, 2.0**16, float("nan")):
        with pytest.raises(InputError, match="tick_s"):
            Environment(scenario(), tick_s)
    with pytest.raises(InputError, match="tick_s"):
        Environment(scenario(), tick_s=0.0)
    with pytest.raises(InputError, match="enable_prefix_caching"):
        Environment(scenario(enable_prefix_caching=True), tick_s=1.0)
