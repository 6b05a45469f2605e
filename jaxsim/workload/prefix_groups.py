"""Groups of requests whose prompts begin alike: system prompts, tools, documents that many ask about.

A request belongs to a group, drawn independently of all else; its prompt is the group's tokens and then its own. All
groups are equally likely, or the k-th is so in proportion to k^-exponent (Zipf's law).
"""

import dataclasses

import equinox as eqx
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from jaxsim._core.errors import InputError
from jaxsim.workload.generator import Generator
from jaxsim.workload.streams import Stream, stream_key, uniforms
from jaxsim.workload.workload import Workload

MOST_GROUPS = 1 << 24

DISTRIBUTIONS = ("uniform", "zipf")


class PrefixGroups(eqx.Module):
    """So many groups, the tokens that the prompts of one begin with, and how requests spread over them.

    exponent: of Zipf's law; of no effect with "uniform".
    """

    number: int
    tokens: int
    distribution: str = eqx.field(static=True, default="uniform")
    exponent: float = 1.0

    def __check_init__(self):
        if not 1 <= self.number <= MOST_GROUPS:
            raise InputError("number", self.number, f"is not between 1 and {MOST_GROUPS}", "give a number of groups")
        if self.tokens < 1:
            raise InputError("tokens", self.tokens, "is not a positive number of tokens", "give a length")
        if self.distribution not in DISTRIBUTIONS:
            raise InputError("distribution", self.distribution, "is unknown", "use 'uniform' or 'zipf'")
        if not self.exponent >= 0:
            raise InputError("exponent", self.exponent, "is negative", "give 0 or more; 1 is usual")

    def of(self, seed: int | PRNGKeyArray, count: int) -> Int[np.ndarray, " requests"]:
        """The group of each request."""
        exponent = self.exponent if self.distribution == "zipf" else 0.0
        shares = np.cumsum(np.arange(1, self.number + 1, dtype=np.float64) ** -exponent)
        draws = uniforms(stream_key(seed, Stream.PREFIX_GROUPS), count)[:, 0]
        return np.searchsorted(shares[:-1] / shares[-1], draws, side="right")


class GroupedGenerator(eqx.Module):
    """Draws workloads of `base`, whose prompts begin with those of their groups."""

    base: Generator
    groups: PrefixGroups

    def sample(
        self, seed: int | PRNGKeyArray, num_requests: int, *, rate_rps: float | None = None
    ) -> Workload:
        """As the base's, prompts longer by the group's tokens, which one id stands for."""
        made = self.base.sample(seed, num_requests, rate_rps=rate_rps)
        count = len(made)
        return dataclasses.replace(
            made,
            input_tokens=made.input_tokens.astype(np.int64) + self.groups.tokens,
            prefix_offsets=np.arange(count + 1),
            prefix_hashes=self.groups.of(seed, count),
            prefix_block_size=self.groups.tokens,
            provenance={**made.provenance, "prefix_groups": self.groups.number},
        )
