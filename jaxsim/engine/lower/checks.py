"""Workloads that a system cannot serve are refused before anything is compiled."""

import dataclasses

import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.engine.common import MAX_SPAN_S
from jaxsim.engine.fair_links import MOST_S
from jaxsim.engine.loop import REBASE_COUNTER, STEPS_BETWEEN_REBASES
from jaxsim.engine.lower.failures import outages_of_run
from jaxsim.engine.lower.links import Ways, flights_of, is_max_min, transfer_rates, ways_of
from jaxsim.engine.lower.prefixes import Prefixes
from jaxsim.engine.lower.systems import System
from jaxsim.engine.lower.workloads import ANY_STEPS, WATCHED_S
from jaxsim.engine.max_min import LEAST_SHARE, WHOLE
from jaxsim.policy.routing import AbstractRouting
from jaxsim.spec.dims import Dims
from jaxsim.spec.scenario import Scenario
from jaxsim.workload.workload import Workload


def check_requests(system: System, workload: Workload) -> None:
    """Refuse requests that no schedule can serve. Raises `InputError` for the first."""
    for pool in system.pools:
        if pool.role == "encode":
            continue
        # A prompt is all that a prefill engine holds, unless another fails whose tokens it computes again.
        one = np.ones_like(workload.output_tokens)
        prompts = dataclasses.replace(workload, output_tokens=one, max_tokens=one)
        is_prompt = pool.role == "prefill" and not system.has_restarts
        check_requests(pool.system, prompts if is_prompt else workload)
    if system.pools:
        return
    s = system.scheduler
    if workload.num_images is not None and (s.num_stages > 1 or system.num_ranks > 1):
        raise InputError("workload.images", int(workload.num_images.max()),
                         "are not simulated with pipeline stages or ranks that iterate together",
                         "use engine.pipeline_parallel_size = 1 and no expert parallelism")
    if not workload.arrival_s[-1] <= MAX_ARRIVAL_S:
        raise InputError("workload", f"last arrival at {workload.arrival_s[-1]:.3g} s",
                         f"is beyond the {MAX_ARRIVAL_S:.0g} s that are simulated", "raise the rate, or replay less")
    prompt = workload.input_tokens.astype(np.int64)
    output, limit = workload.output_tokens.astype(np.int64), workload.max_tokens.astype(np.int64)

    def refuse(is_bad, value, problem, remedy):
        if is_bad.any():
            i = int(np.argmax(is_bad))
            raise InputError(f"workload request {i}", f"{prompt[i]} prompt + {limit[i]} output tokens",
                             problem(int(value[i])), remedy)

    is_all = system.model is not None and system.max_model_len >= system.model.max_position
    refuse(prompt + limit > system.max_model_len, prompt + limit,
           lambda n: f"{n} tokens exceed max_model_len = {system.max_model_len}",
           ("" if is_all else "raise engine.max_model_len, ")
           + "cut outputs with workload.output_limit, or leave such requests out")
    recomputed = prompt + output - 1 if s.reserve in ("none", "prompt", "expected") else prompt
    if not s.chunked_prefill:
        refuse(recomputed > s.max_num_batched_tokens, recomputed,
               lambda n: f"{n} tokens in one iteration exceed max_num_batched_tokens ="
                         f" {s.max_num_batched_tokens}, and prompts are not chunked",
               "raise engine.max_num_batched_tokens, or set engine.enable_chunked_prefill = true")
    if s.decode_context_limit is not None:
        refuse(prompt + output > s.decode_context_limit, prompt + output,
               lambda n: f"{n} tokens of context exceed decode_context_limit = {s.decode_context_limit}, so it would"
                         " never decode", "raise engine.decode_context_limit, or leave such requests out")
    if not s.kv_accounting:
        return
    held = {"max_tokens": prompt + limit, "max_model_len": np.full_like(prompt, system.max_model_len),
            "expected": prompt + limit + s.retract_free_tokens}.get(s.reserve, prompt + output - 1)
    # Who comes back from host memory wants a block beyond its own.
    blocks = -(-held // s.block_size) + (system.swap is not None)
    if system.swap is not None and system.swap.redraw is not None and len(prompt) >= MOST_DRAWN:
        raise InputError("engine.swap.redraw", len(prompt), f"requests are more than the {MOST_DRAWN - 1} whose"
                         " priorities can be drawn", "leave it out, or simulate in parts")
    room = system.num_blocks - s.watermark_blocks(system.num_blocks)
    refuse(blocks > room, blocks,
           lambda n: f"needs {n} KV blocks of {s.block_size} tokens, the pool has {room}",
           "raise engine.gpu_memory_utilization or engine.num_gpu_blocks_override, or leave such requests out")


def check_contexts(system: System, prefixes: list[Prefixes]) -> None:
    """Refuse contexts that are longer than an iteration, in which some layers of them would be recomputed. Raises
    `InputError`."""
    budget, size = system.scheduler.max_num_batched_tokens, system.scheduler.block_size
    longest = max(int(prefix.bounds[:, -1].max(initial=0)) for prefix in prefixes) * size
    if longest > budget:
        raise InputError("engine.max_num_batched_tokens", budget,
                         f"is fewer than the {longest} tokens of the longest context, some layers of which"
                         " engine.context_reuse recomputes in one iteration",
                         f"raise it to {longest} or more, or shorten contexts (workload.sessions.context_limit)")


MOST_DRAWN = 1 << 18
"""Requests whose priority and order of arrival are one word."""

MAX_ARRIVAL_S = 1e9
"""Thirty years."""


def counter_room(dims: Dims) -> int:
    """Output tokens that the packed completion keys can hold; negative where there are too many slots for any."""
    # A counter runs on for so long before it is wound back.
    return (1 << (31 - dims.slot_bits)) - STEPS_BETWEEN_REBASES * dims.max_jump - 2 * REBASE_COUNTER


def check_counters(dims: Dims, workloads: list[Workload]) -> None:
    """Refuse outputs that the packed completion keys cannot hold. Raises `InputError`."""
    room = counter_room(dims)
    longest = max(int(workload.output_tokens.max()) for workload in workloads)
    check_tracked(dims, workloads)
    if longest > room:
        raise InputError("workload.output", longest,
                         f"output tokens are more than the {max(room, 0)} that {dims.num_slots}"
                         " sequences at once leave room for", "shorten outputs, or lower engine.max_num_seqs")


TREE_TOKENS = 1 << 24
"""Tokens that the tree of `cache_aware` holds of an instance: SGLang's 2^26 characters, at four a token."""


def check_tracked(dims: Dims, workloads: list[Workload]) -> None:
    """Refuse workloads that a router cannot follow. Raises `InputError`."""
    for workload in workloads:
        if dims.route_by == "session" and workload.session is None:
            raise InputError("cluster.router", "session_affinity", "needs sessions, and the workload has none",
                             "give workload.sessions, or use 'prefix_hash'")
        tokens = int(workload.input_tokens.astype(np.int64).sum())
        if dims.tracks_sent and tokens > TREE_TOKENS * dims.all_ranks and _distinct_tokens(workload) > TREE_TOKENS:
            raise InputError("workload.num_requests", len(workload),
                             f"has prompts of more than the {TREE_TOKENS:,} distinct tokens that the router's tree of"
                             " an instance holds before it forgets, which is not simulated", "simulate fewer")


def _distinct_tokens(workload: Workload) -> int:
    """Of all prompts, at most: blocks that several have in common count once."""
    tokens = int(workload.input_tokens.astype(np.int64).sum())
    if workload.prefix_hashes is None:
        return tokens
    repeated = len(workload.prefix_hashes) - len(np.unique(workload.prefix_hashes))
    return tokens - repeated * workload.prefix_block_size


def routing_dims(routing: AbstractRouting | None, dims: Dims) -> Dims:
    """Sizes with what a router reads, where there is anything to choose."""
    if routing is None or dims.all_ranks == 1:
        return dims
    return dataclasses.replace(dims, tracks_prefill=bool(routing.reads_prefill), tracks_sent=bool(routing.reads_sent),
                               has_noise=bool(routing.reads_noise), route_by=routing.route_by)


def check_routing(dims: Dims, routing: AbstractRouting) -> None:
    """Refuse a router that reads what a run made for another does not keep. Raises `InputError`."""
    is_there = (dims.num_segments or not routing.reads_cache) and routing_dims(routing, dims) == dims
    if dims.all_ranks > 1 and not is_there:
        raise InputError("routing", type(routing).__name__, "reads what this scenario does not keep",
                         "give the scenario that router, or one that reads no caches, sessions or noise")


def check_transfers(scenario: Scenario, system: System, workload: Workload) -> None:
    """Refuse links so slow that the clock cannot tell when a transfer ends. Raises `InputError`."""
    if not system.has_roles:
        return
    given, ways, field = scenario.cluster.transfer, ways_of(scenario, system), "cluster.transfer"
    if ways is None:
        bytes_per_token, bytes_per_s = transfer_rates(scenario, system)
        latency_s = 1e-6 * given.latency_us if given else 0.0
        seconds = latency_s + _moved_tokens(system, workload) * (bytes_per_token / bytes_per_s)
    else:
        seconds, field = _slowest_way(ways, _moved_tokens(system, workload))
    for what, value, most in (("one transfer", seconds.max(), MAX_SPAN_S),
                              ("all transfers, one after the other", seconds.sum(), MAX_ARRIVAL_S)):
        if not value <= most:
            raise InputError(field, f"{value:.3g} s for {what}",
                             f"is beyond the {most:g} s that are simulated",
                             f"raise {field}.gb_per_s, or lower {field}.latency_us")
    most = flights_of(scenario)
    # Of max-min fairness a part is rounded down, to LEAST_SHARE / (LEAST_SHARE + 1) of an equal one at worst.
    shares = most * (LEAST_SHARE + 1) / LEAST_SHARE if is_max_min(scenario) else most
    if not shares * seconds.max() <= MOST_S:
        raise InputError(field, f"{seconds.max():.3g} s for one transfer",
                         f"is beyond the {MOST_S / shares:g} s that are simulated where {most} may share a link",
                         f"raise {field}.gb_per_s, or lower cluster.transfer.most_at_once")
    if ways is not None and is_max_min(scenario):
        units = ways.units
        pair = min(ways.fields, key=lambda pair: units[pair])
        if units[pair] < LEAST_SHARE * most:
            raise InputError(f"{ways.fields[pair]}.gb_per_s", 1e-9 * ways.bytes_per_s[pair],
                             f"is less than one part in {WHOLE // (LEAST_SHARE * most):,} of the fastest link, too"
                             f" little to be shared by {most}",
                             "raise it, or lower cluster.transfer.most_at_once")


def check_outages(scenario: Scenario, system: System, workload: Workload) -> None:
    """Refuse outages that end so long behind the last arrival that a controller of roles, whose turns go on while
    somebody may wait for an engine to come back, has more until then than a run is granted (`step_limit`, of which the
    first thousand are anybody's). Raises `InputError`."""
    given, switching = scenario.cluster.failures, scenario.cluster.role_switching
    if given is None or switching is None:
        return
    ends = [one.end_s for seed in scenario.seeds for one in outages_of_run(given, system.num_executors, seed)]
    last_s = float(workload.arrival_s[-1])
    behind_s, a_second = max(ends, default=0.0) - last_s, sum(
        1 / period_s for period_s in (switching.sample_s, switching.decide_s, switching.poll_s))
    turns, most = behind_s * a_second, ANY_STEPS + (last_s + WATCHED_S) * a_second
    if turns > most:
        raise InputError("cluster.failures", f"an outage that ends {behind_s:.3g} s behind the last arrival",
                         f"may leave [cluster.role_switching] {turns:.3g} turns with nobody there, more than the"
                         f" {most:.3g} of {last_s + WATCHED_S:.4g} s that are simulated",
                         "end it sooner (an engine that is not to come back needs no longer than the run), or raise"
                         " sample_s, decide_s and poll_s")


def _moved_tokens(system: System, workload: Workload) -> np.ndarray:
    """Of each request, whose KV may go over at most."""
    tokens = workload.input_tokens.astype(np.int64)
    return tokens + workload.output_tokens if system.has_restarts else tokens


def _slowest_way(ways: Ways, tokens: np.ndarray) -> tuple[np.ndarray, str]:
    """Seconds of the transfer of each request over the way on which the longest takes longest, and its field."""
    per_token = ways.seconds(ways.bytes_per_token)
    longest = int(tokens.max())
    pair = max(ways.fields, key=lambda pair: ways.latency_s[pair] + longest * per_token[pair])
    return ways.latency_s[pair] + tokens * per_token[pair], ways.fields[pair]
