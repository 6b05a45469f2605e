"""Several partly computed prompts side by side: who gets the next chunk, and how much of an iteration's time."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

ORDERS = ("fcfs", "edf", "lrs", "lars")
"""By number: who came first, the earliest deadline, the least remaining slack, the least relative slack."""

FCFS, EDF, LRS, LARS = range(len(ORDERS))

PARTS = 1 << 16
"""Of a second, in which work and slack are counted."""

MOST_PARTS = 1 << 30
"""Time until a deadline beyond this, four and a half hours, counts as so much."""

WORK_STEPS = 1 << 12
"""Of the table of works, at most; each is of as many tokens, the least power of two with which they do."""


class PartialPrefills(eqx.Module):
    """Which prompt is next, of those partly computed and of those that wait, afresh for every chunk that is placed.

    order: by number, as in `ORDERS`. With w the work of a prompt, which is the time of its prefill alone, and remaining
    that of what is not computed,

        slack = arrival + limit + factor w - now - remaining        least slack first (LRS)
        rho = slack / w                                             least relative slack first (LARS)

    equal ones by arrival. deadline_factor: as there. long_tokens: prompts of more are long; an iteration has a chunk of
    one of them at most, and at most most_long are partly computed at a time. most_slack: by LARS, the chunk of a long
    one gets (1 - min(max(rho, 0), most_slack)) of the time for the iteration, so that short ones share it; any other
    all that is left. works: seconds of prompts alone in `PARTS`, of every 2^work_bits tokens, straight lines between
    them.

    Source: Medha (arXiv 2409.17264), length-aware relative slack; its table of prefill times has steps of 1,024 tokens.
    """

    order: Int[Array, ""]
    long_tokens: Int[Array, ""]
    most_long: Int[Array, ""]
    most_slack: Float[Array, ""]
    deadline_factor: Float[Array, ""]
    works: Int[Array, " steps+1"]
    work_bits: Int[Array, ""]

    def work(self, tokens: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """Of the first so many tokens of a prompt, alone; in `PARTS`."""
        low, fine = tokens >> self.work_bits, tokens & ((1 << self.work_bits) - 1)
        before, behind = (self.works.at[at].get(mode="promise_in_bounds") for at in (low, low + 1))
        return before + (((behind - before) * fine) >> self.work_bits)

    def limit(self, base: Int[Array, "*shape"], work: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """From arrival to deadline, of a prompt with its own limit and its work; all in `PARTS`."""
        more = jnp.minimum(jnp.round(self.deadline_factor * work.astype(jnp.float32)), MOST_PARTS - 1)
        return base + more.astype(jnp.int32)

    def relative(self, slack: Int[Array, "*shape"], work: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """rho."""
        return slack.astype(jnp.float32) / work.astype(jnp.float32)

    def key(self, request: Int[Array, "*shape"], left: Int[Array, "*shape"], slack: Int[Array, "*shape"],
            work: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """The smallest is next; left: until the deadline."""
        bits = lax.bitcast_convert_type(self.relative(slack, work), jnp.int32)
        # Floats in their own order.
        rising = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        return jnp.where(self.order == LARS, rising, jnp.where(
            self.order == LRS, slack, jnp.where(self.order == EDF, left, request)))

    def share(self, rho: Float[Array, ""], is_long: Array) -> Float[Array, ""]:
        """Of the time for an iteration, what a chunk may fill it up to."""
        own = 1.0 - jnp.clip(rho, 0.0, self.most_slack)
        return jnp.where((self.order == LARS) & is_long, own, 1.0)
