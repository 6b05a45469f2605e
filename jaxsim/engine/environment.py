"""The simulator as an environment: control ticks, at which a router, a scaler or a limit may change.

    env = Environment(scenario, tick_s=1.0)
    state, observation = env.reset(env.requests(seed=0))
    state, observation, outcome, is_done = env.step(state, Action(is_active=jnp.array([True, False])))

`reset` and `step` are pure functions of pytrees, for `jit`, `lax.scan`, `vmap` (states become lanes of one loop) and
`shard_map`; there is no other interface to fit. A step goes on exactly where the one before stopped: whatever the
ticks, as long as no action changes anything, every request meets with what it meets with in an uninterrupted run, bit
for bit.

A step simulates the events before its tick, and none at it: what an action changes holds for events at or after the
tick at which it is given. Requests that arrive are routed by the action's router, to the instances it leaves active;
those that wait or run where no more are taken are served there to their end. Limits hold from the next scheduling pass
on. Where decode iterations are under way that were planned as one jump, and a limit was eased that may have kept the
head of the queue waiting, the jump ends with the iteration in flight, as an arrival that could join cuts it; otherwise
no pass in it would admit anything, and it goes on. To derivatives a step is a constant, so that policy
gradients flow through what the caller computes.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsim._core.errors import InputError
from jaxsim.engine import ending, events, functional, loop, lower
from jaxsim.engine import simulate as engine
from jaxsim.engine.common import Params, span
from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.policy.arrivals import relative_to
from jaxsim.policy.routing import AbstractRouting
from jaxsim.spec.dims import Dims
from jaxsim.spec.scenario import Scenario
from jaxsim.spec.values import plain
from jaxsim.state import world as w
from jaxsim.state.requests import OUTPUT, PROMPT, Requests
from jaxsim.state.world import World


class Action(eqx.Module):
    """What changes at a tick and stays until changed again; None leaves it as it is.

    routing: a router of the environment's class with the same shapes, its numbers new. is_active: the instances that
    take requests from now on; if none is, all do. max_num_seqs, max_num_batched_tokens: of every instance, or one for
    each group of executors, kept between what the engine can go on with (1 sequence; tokens for every sequence that may
    run, and for a whole prompt where prompts are not chunked) and the scenario's own numbers, for which memory is made;
    not to be changed where prompts wait for others (TensorRT-LLM's batch waiting).
    """

    routing: AbstractRouting | None = None
    is_active: Bool[Array, " instances"] | None = None
    max_num_seqs: Int[Array, "#groups"] | Int[Array, ""] | None = None
    max_num_batched_tokens: Int[Array, "#groups"] | Int[Array, ""] | None = None


class Observation(eqx.Module):
    """What is to be seen at a tick, of every instance: requests that wait and run, KV blocks in use, requests that
    arrived and that ended since the last tick. time_s: of the tick."""

    time_s: Float[Array, ""]
    waiting: Int[Array, " instances"]
    running: Int[Array, " instances"]
    used_blocks: Int[Array, " instances"]
    arrived: Int[Array, " instances"]
    completed: Int[Array, " instances"]


class Outcome(eqx.Module):
    """What a reward can be made of: of the requests that ended since the last tick, summed by instance.

    ttft_s, e2e_s: latencies, the scenario's `front_end_s` included; tpot_s: seconds per output token after the first, 0
    for a request with one; output_tokens; attained: requests within all limits of the scenario's `slo`.
    """

    ttft_s: Float[Array, " instances"]
    tpot_s: Float[Array, " instances"]
    e2e_s: Float[Array, " instances"]
    output_tokens: Int[Array, " instances"]
    attained: Int[Array, " instances"]


class State(eqx.Module):
    """An episode between two ticks. params: the last action included; any leaf may be another for this episode.

    is_reported: requests whose end an `Outcome` has counted; num_arrived: of every instance, so far. `world.fault` is 0
    or says what stopped the run, `jaxsim.functional.latencies` reads what requests have met with.
    """

    params: Params
    requests: Requests
    world: World
    is_reported: Bool[Array, " requests"]
    num_arrived: Int[Array, " instances"]


class Setting(eqx.Module):
    """Numbers of an environment: the scenario's, seconds between ticks, limits of TTFT, TPOT and end to end (infinite
    if there is none), seconds that every request spends outside the engine."""

    params: Params
    tick_s: Float[Array, ""]
    limits_s: Float[Array, " 3"]
    front_end_s: Float[Array, ""]


class Environment:
    """A scenario whose control is left to the caller.

    scenario: its router is the one that actions change, unless `routing` gives one; its limits are the largest.
    tick_s: seconds between ticks, rounded to a multiple of 2^-20 s. routing: any router, with the shapes that actions
    will have.

    An instance is what a router chooses from: a replica, or each of its data-parallel ranks. Raises `InputError` for
    whatever is wrong with the scenario, and where its prompts share a prefix cache or it has pipeline stages.
    """

    def __init__(self, scenario: Scenario, tick_s: float, routing: AbstractRouting | None = None):
        if not isinstance(scenario, Scenario):
            raise InputError("scenario", type(scenario).__name__, "is not a Scenario",
                             "make one with Scenario.from_toml(path) or Scenario.from_dict(fields)")
        if not (routing is None or isinstance(routing, AbstractRouting)):
            raise InputError("routing", routing, "is not a router", "give an instance of a subclass of AbstractRouting")
        scenario = scenario.checked()
        if not 2.0**-20 <= tick_s < clock.EPOCH_S:
            raise InputError("tick_s", tick_s, "is not a time between ticks",
                             f"give seconds, from 1e-6 to {clock.EPOCH_S:.0f}")
        if scenario.engine.enable_prefix_caching:
            raise InputError("engine.enable_prefix_caching", True, "is not part of an environment yet",
                             "set it to false")
        if scenario.cluster.variants is not None:
            raise InputError("cluster.variants", scenario.cluster.variants, "is not part of an environment yet",
                             "leave it out")
        if scenario.engine.pipeline_parallel_size > 1:
            raise InputError("engine.pipeline_parallel_size", scenario.engine.pipeline_parallel_size,
                             "is not part of an environment yet", "use 1")
        if scenario.engine.swap is not None:
            raise InputError("engine.swap", plain(scenario.engine.swap), "is not part of an environment yet",
                             "leave it out")
        if (scenario.engine.max_num_partial_prefills or 1) > 1:
            raise InputError("engine.max_num_partial_prefills", scenario.engine.max_num_partial_prefills,
                             "is not part of an environment yet", "leave it out")
        if (policy := scenario.engine.scheduling_policy) in ("vtc", "least_slack"):
            raise InputError("engine.scheduling_policy", policy, "is not part of an environment yet", "use 'fcfs'")
        if scenario.cluster.pools:
            raise InputError("cluster.pools", [pool.role for pool in scenario.cluster.pools],
                             "are not part of an environment yet", "use cluster.replicas")
        for name in ("migration", "scaling", "headroom_blocks"):
            if getattr(scenario.cluster, name) is not None:
                raise InputError(f"cluster.{name}", getattr(scenario.cluster, name),
                                 "is not part of an environment yet", "leave it out")
        if scenario.has_clients:
            raise InputError("workload.client", None, "requests that end without an answer are not part of an"
                             " environment yet", "leave out workload.client, cluster.admission and cluster.failures")
        if scenario.workload.images is not None:
            raise InputError("workload.images", True, "are not part of an environment yet", "leave them out")
        (lane, *_) = engine.prepare(0, scenario, record_steps=False)
        if routing is not None:
            lower.check_routing(lane.dims, routing)
        if routing is not None and routing.reads_loads and not lane.dims.has_demands:
            raise InputError("routing", type(routing).__name__, "reads loads, which this scenario does not keep",
                             "give it cluster.router = 'llumnix_load'")
        # For any request that the engine takes, not only those of these seeds.
        cost = jax.device_get(lower.make_cost(scenario, lane.system, lane.dims.num_slots, lane.system.max_model_len))
        # Limits may be tight and workloads longer than the one at hand: as many steps again, several times over.
        max_steps = min(8 * int(lane.params.max_steps), np.iinfo(np.int32).max)
        params = lower.make_params(scenario, lane.system, cost, max_steps)
        params = replace(params, routing=routing or params.routing, is_active=np.ones(lane.dims.all_ranks, bool))
        limits = scenario.slo.ttft_ms, scenario.slo.tpot_ms, scenario.slo.e2e_ms
        self.dims, self.scenario = lane.dims, scenario
        self.setting = Setting(
            jax.tree.map(jnp.asarray, params),
            jnp.float32(np.round(tick_s / clock.ARRIVAL_GRID_S) * clock.ARRIVAL_GRID_S),
            jnp.array([np.inf if ms is None else ms / 1e3 for ms in limits], jnp.float32),
            jnp.float32(lane.front_end_s))

    @property
    def params(self) -> Params:
        """The scenario's policies and costs, what an episode begins with."""
        return self.setting.params

    def requests(self, seed: int | Sequence[int]) -> Requests:
        """Host: the workload of a seed, or of several, stacked along a first axis for `vmap` or a training loop.

        Raises `InputError` for requests that the engine cannot serve or that are more than there is room for.
        """
        if not isinstance(seed, (int, np.integer)):
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(self.requests(int(s)) for s in seed))
        system = lower.resolve_system(self.scenario)
        scenario = msgspec.structs.replace(
            self.scenario, workload=msgspec.structs.replace(self.scenario.workload, seed=int(seed)))
        workload = lower.make_workload(scenario, int(seed))
        lower.check_requests(system, workload)
        lower.check_counters(self.dims, [workload])
        if len(workload) > self.dims.num_requests:
            raise InputError("seed", seed, f"has {len(workload)} requests, there is room for {self.dims.num_requests}",
                             "set workload.num_requests, or give the scenario the seeds with the most (num_seeds)")
        return jax.tree.map(jnp.asarray, lower.make_requests(workload, self.dims, order=self.params.flags.order))

    def reset(self, requests: Requests | int, params: Params | None = None) -> tuple[State, Observation]:
        """Time zero, before any arrival. requests: those of an episode, or a seed (on the host).

        params: other numbers than the scenario's, for this episode. Raises `ValueError` for requests of several
        workloads or another environment.
        """
        if isinstance(requests, (int, np.integer)):
            requests = self.requests(requests)
        dims = self.dims
        if (not isinstance(requests, Requests) or jnp.shape(requests.count)
                or len(requests.table) != dims.num_requests + 1):
            raise ValueError(f"requests: not one workload of this environment, with room for {dims.num_requests};"
                             " make it with its requests(seed), and take several by vmap")
        params = self.params if params is None else jax.tree.map(jnp.asarray, params)
        is_active = jnp.ones(dims.all_ranks, bool) if params.is_active is None else params.is_active
        params = replace(params, is_active=_or_all(dims, "params", is_active))
        with functional.in_32_bits():
            world = loop.start(dims, params, params.source.prepare(requests), is_stepped=True)
            nobody = jnp.zeros(dims.all_ranks, jnp.int32)
            state = State(params, requests, world, jnp.zeros(dims.num_requests, bool), nobody)
            seen = Observation(jnp.float32(0), nobody, nobody, nobody, nobody, nobody)
            return loop.varying_with((params, requests), (state, seen))

    def step(self, state: State, action: Action) -> tuple[State, Observation, Outcome, Bool[Array, ""]]:
        """Take the action, and simulate up to the next tick.

        Returns the state there, what is to be seen, what became of requests since the last tick, and whether every
        request has ended (or a fault stopped the run; from then on a step changes nothing but the time). Raises
        `ValueError` for an action of shapes or types that do not fit; a number of the router that is NaN is the fault
        `NO_NUMBER`.
        """
        if not isinstance(action, Action):
            raise ValueError(f"action: a {type(action).__name__}, not an Action")
        state, action = jax.lax.stop_gradient((state, action))
        # Outside of the compiled step, so that this is one program for all actions, whatever they leave out.
        params = acted(self.dims, self.setting, state, action)
        with functional.in_32_bits():
            return _step(self.dims, self.setting, params, state)


@partial(jax.jit, static_argnums=0)
def _step(dims: Dims, setting: Setting, params: Params, state: State):
    world = cut_jumps(dims, state.params, params, state.requests, state.world)
    numbers = [leaf for leaf in jax.tree.leaves(params.routing) if eqx.is_inexact_array(leaf)]
    is_no_number = jnp.any(jnp.array([jnp.any(jnp.isnan(leaf)) for leaf in numbers]))
    is_broken = is_no_number & loop.is_live(state.requests, world)
    world = replace(world, until=_after(world.until, setting.tick_s),
                    fault=world.fault | jnp.where(is_broken, w.NO_NUMBER, 0))
    world = functional.in_lanes(loop.run_until, dims, (params, state.requests, world))
    state = replace(state, params=params, world=world)
    return *_observed(dims, setting, state), (world.num_finished >= state.requests.count) | (world.fault != 0)


def _after(stamp: Float[Array, " 3"], seconds: Float[Array, ""]) -> Float[Array, " 3"]:
    """A stamp so much later."""
    epoch, hi, lo = stamp
    moved = clock.add(Time(hi, lo), seconds)
    turn = jnp.floor(moved.hi / clock.EPOCH_S)
    moved = clock.add(moved, -turn * clock.EPOCH_S)
    return jnp.stack([epoch + turn, moved.hi, moved.lo])


def _or_all(dims: Dims, where: str, is_active) -> Bool[Array, " instances"]:
    """The active instances, all if none is. Raises `ValueError` for anything but a boolean of each."""
    is_active = jnp.asarray(is_active)
    if is_active.shape != (dims.all_ranks,) or is_active.dtype != bool:
        raise ValueError(f"{where}.is_active: {is_active.dtype}{list(is_active.shape)}, to be booleans of the"
                         f" {dims.all_ranks} instances")
    return is_active | ~jnp.any(is_active)


def acted(dims: Dims, setting: Setting, state: State, action: Action) -> Params:
    """The numbers from now on. Raises `ValueError` for an action that does not fit."""
    params = state.params
    routing, is_active = params.routing, params.is_active
    if action.routing is not None:
        like, given = (jax.tree.map(jnp.shape, router) for router in (routing, action.routing))
        if jax.tree.structure(routing) != jax.tree.structure(action.routing) or like != given:
            raise ValueError(f"action.routing: {given} is not of the class and shapes of the environment's, {like};"
                             " give Environment(..., routing=) one like it")
        routing = jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), routing, action.routing)
    if action.is_active is not None:
        is_active = _or_all(dims, "action", action.is_active)
    if params.flags.gathers and not (action.max_num_seqs is None and action.max_num_batched_tokens is None):
        raise ValueError("action: limits cannot change where prompts wait for others (batch_wait_timeout_iters)")
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        limit = getattr(action, name)
        if limit is not None and (jnp.shape(limit) not in ((), (1,), (len(params.groups),))
                                  or not jnp.issubdtype(jnp.result_type(limit), jnp.integer)):
            raise ValueError(f"action.{name}: {jnp.result_type(limit)}{list(jnp.shape(limit))}, to be one integer, or"
                             f" one for each group of executors, of which there are {len(params.groups)}")
    lengths = state.requests.table[:dims.num_requests]
    longest = jnp.max(lengths[:, PROMPT] + lengths[:, OUTPUT])
    groups = []
    for index, (group, own) in enumerate(zip(params.groups, setting.params.groups, strict=True)):
        def number(given, before, least, most, index=index):
            if given is None:
                return before
            given = jnp.broadcast_to(jnp.asarray(given), (len(params.groups),))[index]
            return jnp.clip(given, least, most).astype(before.dtype)

        rules, most = group.batching, own.batching
        fewest = most.max_num_seqs if rules.chunked_prefill else jnp.maximum(most.max_num_seqs, longest)
        groups.append(replace(group, batching=replace(
            rules,
            max_num_seqs=number(action.max_num_seqs, rules.max_num_seqs, 1, most.max_num_seqs),
            max_num_batched_tokens=number(action.max_num_batched_tokens, rules.max_num_batched_tokens, fewest,
                                          most.max_num_batched_tokens))))
    return replace(params, routing=routing, is_active=is_active, groups=tuple(groups))


def cut_jumps(dims: Dims, before: Params, after: Params, requests: Requests, world: World) -> World:
    """End the jumps under way at `World.until` in which a scheduling pass might admit somebody under the new limits.

    The head of the queue may have waited for a sequence to leave; or, where admission takes the blocks of a first
    chunk, for more blocks than a smaller chunk needs.
    """
    rules = after.flags
    if rules.admit == "when_empty":
        return world
    now = relative_to(world.epoch, world.until)
    counts, times = w.count_rows(dims).everything(world.counts), w.clock_rows(dims).everything(world.clocks)
    rank, batch = counts.rank, counts.batch

    def of_ranks(params, number):
        return jnp.broadcast_to(params.of_executors(number), dims.num_executors)[:, None]

    seqs, new_seqs = (of_ranks(params, lambda b: b.max_num_seqs) for params in (before, after))
    is_eased = rank.running >= seqs
    if rules.chunked_prefill and rules.reserve == "none":
        tokens, new_tokens = (of_ranks(params, lambda b: b.max_num_batched_tokens) for params in (before, after))
        is_eased = is_eased | (new_tokens < tokens)
    may_join = (rank.waiting > 0) & (rank.running < new_seqs) & is_eased
    one = replace(counts, batch=jax.tree.map(lambda x: x[:, 0, 0], batch))
    in_flight = replace(times, batch=jax.tree.map(lambda x: x[:, 0, 0], times.batch))
    is_jump = ((world.phase == w.ENDING) & (one.batch.extra > 0) & (one.batch.is_committed == 0)
               & (world.fault == 0))
    is_cut = is_jump & jnp.any(may_join, axis=1)
    cut, end = jax.vmap(lambda counts, times: ending.cut_jump(now, counts, times))(one, in_flight)
    extra = jnp.where(is_cut[:, None, None], jnp.minimum(batch.extra, cut.batch.extra[:, None, None]), batch.extra)
    if rules.async_scheduling:
        # A pass sees who waited when the last iteration before it started, which is another one now.
        own = in_flight.batch
        first_end = clock.add(own.start, own.first)
        behind = clock.add(first_end, span(own.pace, own.growth_s, jnp.maximum(cut.batch.extra - 1, 0)))
        start = clock.select(cut.batch.extra > 0, behind, own.start)
        stamps = after.source.arrivals(after.source.prepare(requests), world.due)[:dims.num_requests]
        arrival = jax.vmap(relative_to, (None, 0))(world.epoch, stamps)
        routed = world.routed[:dims.num_requests]
        place = jnp.maximum(routed, 0)
        executor = place // dims.num_ranks
        is_unseen = (routed >= 0) & (Time(start.hi[executor], start.lo[executor]) < arrival)
        unseen = jnp.zeros(dims.all_ranks, jnp.int32).at[place].add(is_unseen)
        visible = jnp.minimum(rank.visible, rank.waiting - unseen.reshape(rank.waiting.shape))
        rank = replace(rank, visible=jnp.where(is_cut[:, None], visible, rank.visible))
    counts = replace(counts, rank=rank, batch=replace(batch, extra=extra))
    wake = clock.select(is_cut, end, Time(world.wake_hi, world.wake_lo))
    return replace(world, counts=w.count_rows(dims).row(counts), wake_hi=wake.hi, wake_lo=wake.lo)


def _observed(dims: Dims, setting: Setting, state: State) -> tuple[State, Observation, Outcome]:
    """The state with what is reported now, and the report."""
    params, requests, world = state.params, state.requests, state.world
    ranks = w.count_rows(dims).everything(world.counts).rank
    now = relative_to(world.epoch, world.until)
    used = events.used_blocks_now(dims, world, now) if params.flags.grows else ranks.used_blocks.ravel()
    routed = world.routed[:dims.num_requests]
    met = functional.latencies(dims, params, requests, world)
    is_new = met.is_finished & ~state.is_reported
    ttft_s, e2e_s = met.ttft_s + setting.front_end_s, met.e2e_s + setting.front_end_s
    tpot_s = jnp.where(jnp.isnan(met.tpot_s), 0.0, met.tpot_s)
    is_within = jnp.stack([ttft_s, tpot_s, e2e_s], axis=1) <= setting.limits_s

    def by_instance(value, mask):
        place = jnp.where(mask, routed, dims.all_ranks)
        return jnp.zeros((dims.all_ranks, *value.shape[1:]), value.dtype).at[place].add(value, mode="drop")

    arrived = by_instance(jnp.ones_like(routed), routed >= 0)
    seconds = by_instance(jnp.stack([ttft_s, tpot_s, e2e_s], axis=1), is_new)
    output = requests.table[:dims.num_requests, OUTPUT]
    numbers = by_instance(jnp.stack([jnp.ones_like(output), output, jnp.all(is_within, axis=1)], axis=1), is_new)
    epoch, hi, _ = world.until
    seen = Observation(epoch * clock.EPOCH_S + hi, ranks.waiting.ravel(), ranks.running.ravel(), used,
                       arrived - state.num_arrived, numbers[:, 0])
    return (replace(state, is_reported=state.is_reported | is_new, num_arrived=arrived), seen,
            Outcome(*seconds.T, numbers[:, 1], numbers[:, 2]))
