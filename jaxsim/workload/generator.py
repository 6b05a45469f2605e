"""A generator: an arrival process, a joint length law and a rate, sampled into a `Workload`."""

import dataclasses
import math

import equinox as eqx
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from jaxsim._core.errors import InputError
from jaxsim.workload.arrivals import AbstractArrivals, check_rate
from jaxsim.workload.lengths import LARGEST_WALL_TOKENS, AbstractLengths
from jaxsim.workload.streams import Stream, routing_uniforms, stream_key, uniforms
from jaxsim.workload.workload import Workload

MAX_REQUESTS = 1 << 27
"""More in one draw is refused: it would need gigabytes on the host."""


@dataclasses.dataclass(frozen=True)
class Tenant:
    """A class of requests: its share of them and its priority (smaller is more urgent)."""

    name: str = "default"
    share: float = 1.0
    priority: int = 0


class Generator(eqx.Module):
    """Draws workloads. Arrivals, lengths, tenants and routing use separate streams of the seed.

    `output_limit` is the client's max_tokens: outputs are cut there and the engine is told that limit.
    Without it the engine is told the exact output length, as benchmarks with ignore_eos do.
    """

    arrivals: AbstractArrivals
    lengths: AbstractLengths
    rate_rps: float
    output_limit: int | None = None
    tenants: tuple[Tenant, ...] = eqx.field(default=(Tenant(),), converter=tuple, static=True)
    name: str = eqx.field(default="custom", static=True)

    def __check_init__(self):
        check_rate(self.rate_rps)
        if self.output_limit is not None and not 1 <= self.output_limit <= LARGEST_WALL_TOKENS:
            raise InputError(
                "output_limit",
                self.output_limit,
                "is not a positive number of tokens",
                "give the client's max_tokens, or leave it out",
            )
        if not self.tenants:
            raise InputError("tenants", self.tenants, "is empty", "give at least one Tenant")
        for tenant in self.tenants:
            if not (tenant.share > 0 and math.isfinite(tenant.share)):
                raise InputError(
                    f"tenants[{tenant.name}].share",
                    tenant.share,
                    "is not positive",
                    "give relative shares; they need not sum to 1",
                )

    def sample(
        self, seed: int | PRNGKeyArray, num_requests: int, *, rate_rps: float | None = None
    ) -> Workload:
        """`num_requests` requests. At another `rate_rps` the same seed gives the same requests, stretched."""
        count = check_count(num_requests)
        rate_rps = check_rate(self.rate_rps if rate_rps is None else rate_rps)
        unit_times = self.arrivals.unit_times(seed, count)
        input_tokens, output_tokens = self.lengths.pairs(uniforms(stream_key(seed, Stream.LENGTHS), count, 2))
        max_tokens = output_tokens
        if self.output_limit is not None:
            output_tokens = np.minimum(output_tokens, self.output_limit)
            max_tokens = np.full(count, self.output_limit)
        tenant = self.tenants_of(seed, count)
        return Workload(
            arrival_s=unit_times / rate_rps,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            max_tokens=max_tokens,
            priority=np.array([t.priority for t in self.tenants])[tenant],
            tenant=tenant,
            tenant_names=tuple(t.name for t in self.tenants),
            uniforms=routing_uniforms(seed, count),
            unit_times=unit_times,
            rate_rps=rate_rps,
            provenance={"generator": self.name},
        )

    def tenants_of(self, seed: int | PRNGKeyArray, count: int) -> Int[np.ndarray, " requests"]:
        """Index of each request's tenant, or of each session's."""
        if len(self.tenants) == 1:
            return np.zeros(count, np.int64)
        edges = np.cumsum([t.share for t in self.tenants])
        draws = uniforms(stream_key(seed, Stream.TENANTS), count)[:, 0]
        return np.searchsorted(edges[:-1] / edges[-1], draws, side="right")


def check_count(num_requests: int) -> int:
    """The number, if so many requests can be drawn."""
    is_whole = isinstance(num_requests, (int, np.integer)) and not isinstance(num_requests, bool)
    if not is_whole or not 1 <= num_requests <= MAX_REQUESTS:
        raise InputError(
            "num_requests",
            num_requests,
            f"is not a whole number from 1 to {MAX_REQUESTS}",
            "give how many requests to draw",
        )
    return int(num_requests)
