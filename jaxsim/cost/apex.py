"""APEX+: its capacity, batching and plan rules as pure functions, and the serving runs it was checked on.

    tokens      floor((memory - parameters - 1 GiB) / KV bytes a token) // stages
    iteration   every running request one token (evicting the newest), then stopped ones, then arrived prompts, whole
    pipeline    each iteration as slow as the slowest in a window of `stages`

Rules are the released code's, quirks included, and each says so; jaxsim's own engines do not use them. Its operator
tables (GEMM, attention, energy) are not published, so iterations are priced by jaxsim's roofline or by `step_seconds`.

This is the simulator of parallel plans; a CPU-GPU hybrid engine of the same name is another system.

Source: APEX+, arXiv 2411.17651 v2, repository microsoft/apex_plus.
Known gaps: expert-parallel templates and capacity factors, encoders, energy tables, plans across nodes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsim._core.errors import InputError, suggest
from jaxsim.cost.base import BatchStats
from jaxsim.cost.roofline import FRONT_ENDS, roofline
from jaxsim.cost.tabulated import TabulatedCost
from jaxsim.spec.device import load_device
from jaxsim.spec.model import ModelSpec, load_model
from jaxsim.spec.plan import Plan

GIB = 1 << 30

WORKSPACE_BYTES = GIB
"""Memory of each device kept free of weights and KV. Source: apex_plus, simulator.py."""

MAX_INPUT_TOKENS = 65_536
"""Most tokens of an iteration, where new requests stop joining. Source: apex_plus, simulator.py."""

PRECISIONS = ("fp8", "fp16", "fp32")
"""Number types, narrow to wide."""

FP8_ATTENTION_SPEEDUP = 1.5
"""Attention in 8 bits is that of 16 bits over this. Source: apex_plus, comp_profile.py."""

TABLE_COLUMNS = 128
"""Columns of a product are rounded up to multiples of this before its table is read. Source: apex_plus."""


# Plans


class ParallelPlan(NamedTuple):
    """Copies of the model, stages, and for each kind of cell its copies in a stage and the ranks that share one."""

    replicas: int
    stages: int
    attention_replicas: int
    attention_ranks: int
    ffn_replicas: int
    ffn_ranks: int


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def candidate_plans(model: ModelSpec, num_devices: int) -> list[ParallelPlan]:
    """Every plan APEX+ scores, whether or not it fits memory.

    Replicas divide the devices; stages divide the rest and the layers; cell replicas divide the devices of a stage;
    replica counts of the two cells are coprime, and one divides the other; a rank has at least one head.
    Raises `InputError`.
    """
    if num_devices < 1:
        raise InputError("num_devices", num_devices, "is no count of devices", "give a whole number of at least 1")
    plans = []
    for replicas in _divisors(num_devices):
        for stages in _divisors(num_devices // replicas):
            if model.layers % stages:
                continue
            devices = num_devices // replicas // stages
            for attention in _divisors(devices):
                for ffn in _divisors(devices):
                    shares = attention % ffn == 0 or ffn % attention == 0
                    if math.gcd(attention, ffn) == 1 and shares and devices // attention <= model.heads:
                        plans.append(ParallelPlan(replicas, stages, attention, devices // attention, ffn,
                                                  devices // ffn))
    return plans


def _kv_heads(model: ModelSpec, ranks: int) -> int:
    return max(1, -(-model.kv_heads // ranks))


def _check_model(model: ModelSpec) -> None:
    if model.is_mla:
        raise InputError("model.name", model.name, "has latent attention, which APEX+ does not count",
                         "use jaxsim.spec.memory.kv_blocks")


def parameter_bytes(model: ModelSpec, plan: ParallelPlan, weight_bytes: float = 2) -> float:
    """Weight bytes of the fullest device: attention and FFN matrices only, embeddings and head are not counted.

    Replicated cells are held in full by every replica. Source: apex_plus, schedule.py and ir/tasks.
    """
    _check_model(model)
    heads = -(-model.heads // plan.attention_ranks)
    attention = 2 * (heads + _kv_heads(model, plan.attention_ranks)) * model.head_dim * model.hidden
    matrices = 3 if model.gated else 2
    dense = matrices * model.hidden * -(-model.ffn // plan.ffn_ranks)
    experts = matrices * model.hidden * model.experts * model.moe_ffn / plan.ffn_ranks
    ffn = model.num_dense_layers * dense + model.num_moe_layers * experts
    return (model.layers * attention + ffn) / plan.stages * weight_bytes


def capacity_tokens(model: ModelSpec, plan: ParallelPlan, memory_bytes: float, *, weight_bytes: float = 2,
                    kv_bytes: float = 2) -> int:
    """KV tokens for the requests of one stage's batch in one attention replica; 0 where the plan does not fit.

    memory_bytes: of a device; APEX+ takes "GB" for GiB and all of it.
    Source: apex_plus, simulator.py: a stage shares its device among `stages` batches in flight.
    """
    left = memory_bytes - WORKSPACE_BYTES - parameter_bytes(model, plan, weight_bytes)
    heads = _kv_heads(model, plan.attention_ranks)
    per_token = 2 * heads * model.head_dim * kv_bytes * (model.layers // plan.stages)
    return max(int(left // per_token), 0) // plan.stages


# Batching


class ApexRequest(NamedTuple):
    """When a request arrives and how many tokens it brings and makes."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


class Queue(NamedTuple):
    """Requests by id, in the order that rules read them.

    running: oldest first; stopped: evicted, they keep what they made; generated: tokens of each request so far;
    joined: how many requests ever started, in arrival order; cached_tokens: KV in use, by APEX+'s own count.
    """

    running: tuple[int, ...] = ()
    stopped: tuple[int, ...] = ()
    generated: tuple[int, ...] = ()
    joined: int = 0
    cached_tokens: int = 0


class Iteration(NamedTuple):
    """What an iteration runs: `inputs` and `contexts` (tokens cached before it) of each of `requests`; `evicted`."""

    requests: tuple[int, ...]
    inputs: tuple[int, ...]
    contexts: tuple[int, ...]
    evicted: tuple[int, ...]


def next_iteration(requests: Sequence[ApexRequest], queue: Queue, clock_s: float, capacity: int, *,
                   max_input_tokens: int = MAX_INPUT_TOKENS, max_batch: int | None = None
                   ) -> tuple[Queue, Iteration]:
    """The batch of the next iteration, and the queue with it in flight.

    In order: running requests take one token each, and where the next would exceed `capacity` the newest running one
    is evicted; stopped requests resume by id; if none is left stopped, requests join in arrival order while they have
    arrived, their KV fits, tokens stay within `max_input_tokens` and the batch below `max_batch`. The limit is on the
    tokens of all attention replicas: where there are several, give each its share.
    Quirks: prompts run whole beside decodes; a resumed request is not computed again, it costs one token.
    Source: apex_plus, simulator.py, `sub_simulate`.
    """
    def length(i):
        return requests[i].prompt_tokens + queue.generated[i]

    cached, waiting, kept, evicted = queue.cached_tokens, list(queue.running), [], []
    stopped = list(queue.stopped)
    while waiting:
        request = waiting.pop(0)
        while cached + 1 > capacity:
            victim = waiting.pop() if waiting else request
            evicted.append(victim)
            cached -= length(victim)
            if victim == request:
                break
        else:
            cached += 1
            kept.append(request)
    inputs, contexts = [1] * len(kept), [length(i) for i in kept]
    stopped = sorted(stopped + evicted)
    while stopped and cached + length(stopped[0]) + 1 <= capacity:
        request = stopped.pop(0)
        cached += length(request) + 1
        kept.append(request)
        inputs.append(1)
        contexts.append(length(request))
    joined, generated = queue.joined, list(queue.generated)
    while not stopped and joined < len(requests):
        new = requests[joined]
        if (cached + new.prompt_tokens > capacity or sum(inputs) + new.prompt_tokens > max_input_tokens
                or max_batch is not None and len(kept) >= max_batch or new.arrival_s > clock_s):
            break
        cached += new.prompt_tokens
        kept.append(joined)
        inputs.append(new.prompt_tokens)
        contexts.append(0)
        generated.append(0)
        joined += 1
    return (Queue(tuple(kept), tuple(stopped), tuple(generated), joined, cached),
            Iteration(tuple(kept), tuple(inputs), tuple(contexts), tuple(evicted)))


def finish_iteration(requests: Sequence[ApexRequest], queue: Queue) -> tuple[Queue, tuple[int, ...]]:
    """The queue after every running request has made its token, and those that are done and leave."""
    generated, cached, done = list(queue.generated), queue.cached_tokens, []
    for i in queue.running:
        generated[i] += 1
        if generated[i] >= requests[i].output_tokens:
            done.append(i)
            # The last token is never cached.
            cached -= requests[i].prompt_tokens + generated[i] - 1
    running = tuple(i for i in queue.running if i not in done)
    return Queue(running, queue.stopped, tuple(generated), queue.joined, cached), tuple(done)


class Replayed(NamedTuple):
    """Seconds of each token of each request, of each iteration, and when the last one ended."""

    token_seconds: tuple[tuple[float, ...], ...]
    iteration_seconds: tuple[float, ...]
    end_s: float

    @property
    def ttft_s(self) -> float:
        """Mean time to first token as APEX+ has it: the first iteration's seconds, without the wait before it."""
        return float(np.mean([tokens[0] for tokens in self.token_seconds]))

    @property
    def tpot_s(self) -> float:
        """Mean seconds of the tokens after the first, all requests together; nan where there are none."""
        rest = [seconds for tokens in self.token_seconds for seconds in tokens[1:]]
        return float(np.mean(rest)) if rest else math.nan


def replay(requests: Sequence[ApexRequest], capacity: int, seconds: Callable[[Iteration], float], *, stages: int = 1,
           max_input_tokens: int = MAX_INPUT_TOKENS, max_batch: int | None = None) -> Replayed:
    """Run a trace, sorted by arrival, through the rules; `seconds` prices one stage's part of an iteration.

    With stages, APEX+ runs one stage's share of the requests and multiplies the seconds of tokens by `stages`.
    Raises `InputError` where a request can never run.
    """
    for i, request in enumerate(requests):
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise InputError(f"requests[{i}]", request, "has no tokens", "give at least one of prompt and of output")
        # Its last decode caches all but the last token, the first of an evicted one needs one more.
        if (request.prompt_tokens + request.output_tokens > capacity or request.prompt_tokens > max_input_tokens):
            raise InputError(f"requests[{i}]", request, f"cannot run in {capacity} KV tokens and iterations of "
                             f"{max_input_tokens}", "raise the capacity or shorten it")
        if i and request.arrival_s < requests[i - 1].arrival_s:
            raise InputError(f"requests[{i}].arrival_s", request.arrival_s, "is before the one ahead of it",
                             "sort requests by arrival")
    queue, clock, times = Queue(), 0.0, []
    tokens: list[list[float]] = [[] for _ in requests]
    while queue.joined < len(requests) or queue.running or queue.stopped:
        queue, iteration = next_iteration(requests, queue, clock, capacity, max_input_tokens=max_input_tokens,
                                          max_batch=max_batch)
        if not iteration.requests:
            if queue.joined == len(requests) or requests[queue.joined].arrival_s <= clock:
                raise InputError("capacity", capacity, "leaves no request able to run", "raise it")
            clock = requests[queue.joined].arrival_s
            continue
        times.append(float(seconds(iteration)))
        clock += times[-1]
        for i in iteration.requests:
            tokens[i].append(times[-1] * stages)
        queue, _ = finish_iteration(requests, queue)
    return Replayed(tuple(map(tuple, tokens)), tuple(times), clock)


# Seconds


def pipeline_seconds(stage_seconds: Float[Array, " iterations"], stages: int) -> Float[Array, ""]:
    """Seconds of interleaved iterations of `stages` stages: the sum over windows of `stages` of the slowest in each.

    Quirk: a run no longer than a window is summed, and of a longer one the last window is left out.
    Source: apex_plus, simulator.py.
    """
    times = jnp.asarray(stage_seconds, float)
    if stages < 1:
        raise InputError("stages", stages, "is no count of stages", "give a whole number of at least 1")
    if len(times) <= stages:
        return jnp.sum(times)
    windows = jnp.stack([times[i:len(times) - stages + i] for i in range(stages)])
    return jnp.sum(jnp.max(windows, axis=0))


def expert_tokens(tokens: int, per_token: int, experts: int) -> int:
    """Tokens of each expert, of all of them alike: max(floor(m k / E), 1). So every expert is read, even at m = 1.

    jaxsim's `distinct_experts = "all"`. Source: apex_plus, simulator.py.
    """
    return max(tokens * per_token // experts, 1)


def compute_precision(*dtypes: str) -> str:
    """Number type of all arithmetic: the widest of weights, KV and activations, so W8A16 saves memory but no time."""
    for dtype in dtypes:
        if dtype not in PRECISIONS:
            raise InputError("dtype", dtype, "is not a number type of APEX+", suggest(dtype, PRECISIONS))
    if not dtypes:
        raise InputError("dtype", dtypes, "names no number type", "give those of weights, KV and activations")
    return max(dtypes, key=PRECISIONS.index)


def table_columns(columns: int) -> int:
    """Columns whose table entry a product reads."""
    return -(-columns // TABLE_COLUMNS) * TABLE_COLUMNS


def tabulated_seconds(message_bytes: Float[Array, "*shape"], sizes: Float[Array, " sizes"],
                      seconds: Float[Array, " sizes"]) -> Float[Array, "*shape"]:
    """Seconds of a collective from its table: linear between sizes (bytes, rising), and beyond the last as its slope.

    Source: apex_plus, comm_profile.py.
    """
    x, sizes, seconds = (jnp.asarray(a, float) for a in (message_bytes, sizes, seconds))
    slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
    return jnp.interp(x, sizes, seconds) + slope * jnp.maximum(x - sizes[-1], 0.0)


COLLECTIVES = {
    ("h100", "all_reduce", 2): (8.8e-6, 245e9), ("h100", "all_reduce", 4): (12.3e-6, 191e9),
    ("h100", "all_reduce", 8): (19.0e-6, 188e9),
    ("h100", "all_gather", 2): (7.9e-6, 402e9), ("h100", "all_gather", 4): (10.1e-6, 337e9),
    ("h100", "all_gather", 8): (13.4e-6, 291e9),
    ("h100", "reduce_scatter", 2): (7.6e-6, 371e9), ("h100", "reduce_scatter", 4): (9.7e-6, 333e9),
    ("h100", "reduce_scatter", 8): (13.2e-6, 317e9),
    ("h100", "all_to_all", 2): (8.8e-6, 465e9), ("h100", "all_to_all", 4): (10.6e-6, 359e9),
    ("h100", "all_to_all", 8): (14.7e-6, 330e9),
    ("h100", "send_recv", 2): (7.8e-6, 333e9), ("h200", "send_recv", 2): (6.2e-6, 332e9),
    ("h200", "all_reduce", 2): (6.7e-6, 239e9), ("h200", "all_reduce", 4): (10.2e-6, 193e9),
    ("h200", "all_reduce", 8): (16.9e-6, 169e9),
}
"""Seconds and bytes/s of t = alpha + bytes / B for NCCL over NVLink: device, collective, ranks.

Source: fits to the 16-bit rows of apex_plus's NCCL tables; mean error 3 to 17 %.
"""


def alpha_beta_seconds(device: str, collective: str, ranks: int, message_bytes: float) -> float:
    """Seconds of a collective of `message_bytes`, the buffer of a rank, by `COLLECTIVES`. Raises `InputError`."""
    key = (device, collective, ranks)
    if key not in COLLECTIVES:
        raise InputError("collective", key, "has no fit", suggest(str(key), map(str, COLLECTIVES)))
    alpha, rate = COLLECTIVES[key]
    return alpha + message_bytes / rate


# The measured table

REDUCE_S = {2: 8e-6, 4: 11e-6, 8: 17e-6}
"""Seconds of NCCL's all-reduce of one token's hidden state on H100 by ranks. Source: apex_plus's NCCL tables."""


def step_seconds(fixed_s: float, weight_bytes: float, ranks: int, bytes_per_s: float, efficiency: float,
                 reduces: int) -> float:
    """Seconds of a decode step over `ranks`: fixed + weights / (ranks BW eta) + all-reduces.

    Source: decomposition of the measured table.
    """
    return fixed_s + weight_bytes / (ranks * bytes_per_s * efficiency) + reduces * REDUCE_S[ranks]


class StepFit(NamedTuple):
    """What a column of the measured table says: fixed seconds, efficiency of weight reads, largest relative error."""

    fixed_s: float
    efficiency: float
    largest_error: float


def fit_step(tpot_s: dict[int, float], weight_bytes: float, bytes_per_s: float, reduces: int) -> StepFit:
    """Fixed seconds and efficiency by least squares on TPOT (seconds) by ranks, two at least.

    weight_bytes: of the model; bytes_per_s: of a device; reduces: all-reduces of a step. Raises `InputError`.
    """
    if len(tpot_s) < 2:
        raise InputError("tpot_s", tpot_s, "has too few ranks", "give two or more")
    ranks, measured = np.array(list(tpot_s)), np.array(list(tpot_s.values()))
    left = measured - reduces * np.array([REDUCE_S[n] for n in ranks])
    columns = np.stack([np.ones(len(ranks)), weight_bytes / (ranks * bytes_per_s)], axis=1)
    fixed, inverse = np.linalg.lstsq(columns, left, rcond=None)[0]
    error = (columns @ (fixed, inverse) - left) / measured
    return StepFit(float(fixed), float(1 / inverse), float(np.abs(error).max()))


class Steady(NamedTuple):
    """Seconds of a token after the first, of the first, and how many other requests decode beside one, on average."""

    tpot_s: Float[Array, ""]
    ttft_s: Float[Array, ""]
    others: Float[Array, ""]


def steady_state(prefill_s: float, decode_s: Float[Array, " batches"], rate_per_s: float, output_tokens: float,
                 front_end_s: float = 0.0) -> Steady:
    """Latency of a replica at a low Poisson rate, prompts first: the fixed point of

        TPOT = d(1 + n) + rate p TPOT,    n = rate output TPOT
        TTFT = front end + p + (rate p) p / 2 + (1 - exp(-n)) d / 2

    decode_s: seconds of a decode step at batches of 1, 2, ... (linear between); prefill_s: p, of a prompt's own
    iteration. A decoding request meets n others (arrivals see time averages) and waits for the prompts that come.
    Source: Little's law and mean residual times. Known gaps: no queue of prompts beyond the one in flight.
    Raises `InputError` where prompts alone fill the time, or the batch leaves `decode_s`.
    """
    busy = rate_per_s * prefill_s
    if not 0 <= busy < 1:
        raise InputError("rate_per_s", rate_per_s, "prompts alone take all the time", "lower it")
    decode_s = jnp.asarray(decode_s, float)
    batches = jnp.arange(1, len(decode_s) + 1, dtype=float)

    def improved(_, tpot):
        return jnp.interp(1 + rate_per_s * output_tokens * tpot, batches, decode_s) / (1 - busy)

    tpot = jax.lax.fori_loop(0, 200, improved, decode_s[0])
    others = rate_per_s * output_tokens * tpot
    if others + 1 > len(decode_s):
        raise InputError("decode_s", len(decode_s), "ends below the batch that the rate makes", "give larger batches")
    step = jnp.interp(1 + others, batches, decode_s)
    ttft = front_end_s + prefill_s + busy * prefill_s / 2 + (1 - jnp.exp(-others)) * step / 2
    return Steady(tpot, ttft, others)


class Workload(NamedTuple):
    """A trace of the measured table: requests/s, mean tokens of prompts and outputs as the engine served them."""

    rate_per_s: float
    prompt_tokens: int
    output_tokens: int


WORKLOADS = {
    "chat 0.25": Workload(0.244, 74, 76), "chat 0.5": Workload(0.506, 74, 76),
    "summarization 0.25": Workload(0.25, 3017, 143), "summarization 0.5": Workload(0.5, 3017, 143),
    "creation 0.25": Workload(0.245, 308, 1144), "creation 0.5": Workload(0.466, 308, 1144),
}
"""Source: apex_plus: Poisson traces and vLLM logs (chat stops early: 74 to 79 tokens; its prompts from the logs)."""

MEASURED_MS = {
    8: {"chat 0.25": (36.6, 13.83), "chat 0.5": (38.0, 14.14), "summarization 0.25": (231, 14.79),
        "summarization 0.5": (244, 15.92), "creation 0.25": (45.9, 15.61), "creation 0.5": (48.3, 17.72)},
    4: {"chat 0.25": (35.3, 20.14), "chat 0.5": (39.7, 19.86), "summarization 0.25": (274, 20.52),
        "summarization 0.5": (281, 21.00), "creation 0.25": (53.6, 20.66), "creation 0.5": (55.4, 21.37)},
    2: {"chat 0.25": (47.2, 31.78), "chat 0.5": (49.3, 31.79), "summarization 0.25": (373, 32.13),
        "summarization 0.5": (376, 32.84), "creation 0.25": (78.0, 32.42), "creation 0.5": (79.6, 33.34)},
}
"""Milliseconds of TTFT and TPOT by tensor ranks (8 / ranks replicas) and workload, means over replicas.

Llama-3.1-70B in bf16, vLLM 0.6.0, eight H100. Source: logs of apex_plus.
"""

MIXTRAL_MS = {
    False: {"chat 0.25": 49.3, "chat 0.5": 50.6, "summarization 0.25": 51.9, "summarization 0.5": 53.1,
            "creation 0.25": 49.2, "creation 0.5": 50.9},
    True: {"chat 0.25": 58.5, "chat 0.5": 61.8, "summarization 0.25": 64.3, "summarization 0.5": 68.3,
           "creation 0.25": 58.4, "creation 0.5": 61.1},
}
"""Ms of a request over its output tokens by workload, experts cut over all ranks or spread whole (True).

Mixtral-8x22B in bf16, SGLang 0.4.5 without CUDA graphs, eight H100. Source: logs of apex_plus. Claims about these
seconds are no gates, as the 30 us of `jaxsim.cost.roofline.LAUNCHES` lie between SKIP's and the 50 us that these runs
imply; claims about their ratios are.
"""

MAX_BATCH = 24
"""Decodes that predictions of the table go up to."""


@functools.cache
def _table(ranks: int) -> TabulatedCost:
    # The scripts disable vLLM's own all-reduce for two ranks.
    cost = roofline(load_model("llama-3.1-70b"), load_device("h100"), Plan(tensor_parallel_size=ranks), "bfloat16",
                    host="vllm-v0", all_reduce="nccl" if ranks == 2 else "custom")
    return cost.tabulate(4096, 32)


def predicted(ranks: int, workload: str, chunk_tokens: int | None = None) -> Steady:
    """What jaxsim's roofline says of a cell of `MEASURED_MS`, by `steady_state`.

    chunk_tokens: tokens a prompt is cut into; whole where None, as APEX+ has it. Raises `InputError`.
    """
    if ranks not in MEASURED_MS or workload not in WORKLOADS:
        raise InputError("workload", (ranks, workload), "was not measured",
                         f"ranks {', '.join(map(str, MEASURED_MS))}; {suggest(workload, WORKLOADS)}")
    table, load = _table(ranks), WORKLOADS[workload]
    context = load.prompt_tokens + load.output_tokens // 2
    decode = jax.vmap(lambda n: table.decode(n, n * context).first_s)(jnp.arange(1, MAX_BATCH + 1, dtype=jnp.int32))
    size = chunk_tokens or load.prompt_tokens
    prefill = 0.0
    for start in range(0, load.prompt_tokens, size):
        end = min(start + size, load.prompt_tokens)
        prefill += float(table.iteration(BatchStats.of(
            num_prefill=1, prefill_tokens=end - start, prefill_context=end,
            prefill_pairs=float(end ** 2 - start ** 2), num_sampled=int(end == load.prompt_tokens))))
    return steady_state(prefill, decode, load.rate_per_s * ranks / 8, load.output_tokens, FRONT_ENDS["vllm-v0"])
