"""What `jaxsim bench` measures: workloads, and the same of them for the engine and for the programs beside it."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxsim.cost.fitted import fitted
from jaxsim.engine.common import Group, Params
from jaxsim.kernels import clock
from jaxsim.policy import routing
from jaxsim.policy.batching import Batching
from jaxsim.policy.hand_over import HandOver
from jaxsim.spec.dims import Dims
from jaxsim.state.requests import pack_requests

COEFFICIENTS = tuple(tuple(float(np.float32(x)) for x in row) for row in (
    (6.0e-3, 2.5e-5, 0.0, 2.0e-5, 6.6e-10),
    (6.0e-3, 0.0, 5.0e-8, 2.0e-5, 0.0),
    (6.0e-3, 2.5e-5, 5.0e-8, 2.0e-5, 6.6e-10),
))
"""Fitted cost of an 8-billion-parameter Llama 3 on one H100 SXM in bf16: seconds of prefill-only,
decode-only and mixed iterations, as (a, b, c, d, e). a: 16 GB of weights at 80 % of 3.35 TB/s, rounded; b:
16 GFLOP a token at 65 % of 989 TFLOP/s; c: 131,072 bytes of KV a token (8 heads of 128, 32 layers, bf16) at
80 %; d: host and sampling time a sequence; e: 2.6e5 FLOP a unit of attention pairs at 40 %. Round figures,
not a calibration."""

KV_BYTES_PER_TOKEN, LINK_BYTES_PER_S = 131_072, 50e9
"""Of the same model, and a link of 400 Gbit/s, between engines of different roles."""

COST_NOTE = "fitted, about Llama-3-8B in bf16 on one H100 SXM"
RATES_RPS = (4.0, 12.0)
"""Arrivals a second and replica, spread evenly over the scenarios."""

TICKS_PER_S = float(1 << 30)


@dataclass(frozen=True)
class Case:
    """One workload: `scenarios` of `requests` each on `replicas`, least outstanding first, as `vllm-v1`.

    prefill: how many of the replicas compute prompts only, the others then decode only.
    """

    name: str
    replicas: int = 1
    prefill: int = 0
    scenarios: int = 256
    requests: int = 1000
    slots: int = 128
    num_blocks: int = 3750  # of 16 tokens: 60,000
    seed: int = 0

    @property
    def budget_tokens(self) -> int:
        """max_num_batched_tokens: 512, or more where a token for every slot needs it."""
        return max(512, self.slots)

    @property
    def total(self) -> int:
        """Requests of all scenarios."""
        return self.scenarios * self.requests

    @property
    def dims(self) -> Dims:
        """Static sizes; cases of equal sizes share a program."""
        return Dims(self.requests, self.replicas, self.slots, has_roles=self.prefill > 0)


MAIN_CASES = (
    Case("replicas_1"), Case("preempting", num_blocks=500), Case("replicas_8", replicas=8),
    Case("replicas_32", replicas=32), Case("prefill_4_decode_4", replicas=8, prefill=4),
    Case("single_100k", scenarios=1, requests=100_000),
)
REQUEST_CASES = tuple(Case(f"requests_{label}", scenarios=1, requests=count) for label, count in
                      (("1k", 1000), ("10k", 10_000), ("100k", 100_000), ("1M", 1_000_000)))
SLOT_CASES = tuple(Case(f"slots_{count}", slots=count) for count in (64, 128, 256, 512, 1024))
ALIASES = {"requests_100k": "single_100k", "slots_128": "replicas_1"}
"""Scaling cases that are a main case under another name; measured once."""


@dataclass(frozen=True)
class Drawn:
    """Host arrays `(scenarios, requests)`: arrival (seconds, on its grid), prompt and output (tokens)."""

    arrival_s: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    uniforms: np.ndarray


def draw(case: Case) -> Drawn:
    """The workload of a case: Poisson arrivals, prompts of 256-767 and outputs of 64-191 tokens, uniform."""
    rng = np.random.default_rng(case.seed)
    shape = (case.scenarios, case.requests)
    low, high = RATES_RPS
    rates = low + (high - low) * (np.arange(case.scenarios) + 0.5) / case.scenarios
    gaps = rng.exponential(size=shape) / (rates * case.replicas)[:, None]
    arrival = clock.round_arrivals_reference(np.cumsum(gaps, axis=1))
    return Drawn(arrival, rng.integers(256, 768, shape), rng.integers(64, 192, shape),
                 rng.random((*shape, 2)).astype(np.float32))


def engine_inputs(case: Case, drawn: Drawn, coefficients=COEFFICIENTS):
    """`(params, requests)` of a case, each leaf with a leading axis of scenarios."""
    i, x = jnp.int32, jnp.float32
    batching = Batching(
        max_num_seqs=i(case.slots), max_num_batched_tokens=i(case.budget_tokens), max_model_len=i(4096),
        num_blocks=i(case.num_blocks), watermark_blocks=i(0), decode_context_limit=i(0), ratio_start=x(0.7),
        ratio_floor=x(0.098), ratio_decay=x(0.001), reserve_clip_tokens=i(4096), retract_free_tokens=i(20))
    one = Params((Group(batching, fitted(*coefficients)),), routing.LeastOutstanding(), i(2**31 - 1))
    if case.prefill:
        is_prefill = jnp.arange(case.replicas) < case.prefill
        most_held = jnp.full(case.replicas, math.ceil(0.05 * case.num_blocks), jnp.int32)
        one = replace(one, hand_over=HandOver(
            is_prefill, ~is_prefill, routing.LeastOutstanding(), most_held, x(KV_BYTES_PER_TOKEN / LINK_BYTES_PER_S),
            x(0), i(0)))
    params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (case.scenarios, *leaf.shape)), one)
    packed = [pack_requests(drawn.arrival_s[b], drawn.prompt[b], drawn.output[b], uniforms=drawn.uniforms[b])
              for b in range(case.scenarios)]
    return params, jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *packed)


def engine_answers(world, num_requests: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First token and finish (int64 ticks of 2^-30 s) and preemptions, each `(scenarios, requests)`."""
    def seconds(times):
        return clock.join_reference(*np.moveaxis(np.asarray(times), -1, 0))

    def ticks(times_s):
        return np.rint(times_s * TICKS_PER_S).astype(np.int64)

    rows = np.asarray(world.placed)[:, :num_requests, 0]
    first = ticks(np.take_along_axis(seconds(world.first_tokens), rows, axis=1))
    finish = ticks(seconds(world.finished)[:, :num_requests])
    return first, finish, np.asarray(world.progress)[:, :num_requests, 1]


def checksum(first: np.ndarray, finish: np.ndarray, preemptions: np.ndarray) -> str:
    """One number for all answers, requests in order; the C++ programs print the same for the same answers."""
    columns = [np.asarray(a).ravel().astype(np.uint64) for a in (first, finish, preemptions)]
    weights = (np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x9E3779B97F4A7C15), np.uint64(1))
    one = sum(column * weight for column, weight in zip(columns, weights, strict=True))
    odd = 2 * np.arange(one.size, dtype=np.uint64) + np.uint64(1)
    return f"{int(np.sum(one * odd, dtype=np.uint64)):016x}"
