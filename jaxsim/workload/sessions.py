"""Sessions: conversations and agentic loops, whose turns wait for answers.

A session begins when an open process says so. Its first prompt is what all sessions share (a system prompt) and new
tokens; every later one is the prompt before it, the answer to it, and new tokens: what a user types, or what a tool
returned. A later turn comes a think time, or a tool's latency, after the last token of the answer before it, so its
arrival is a result of the simulation. A session ends after the turns it has drawn, or before the first turn whose
prompt and output would pass the context limit.

Known gaps: turns, times and tokens are drawn independently of each other and of the session; the context only grows (no
compaction, no hidden reasoning taken out of it); the text of an answer comes back token for token; a client's turns
are one after the other.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from jaxsim._core.errors import InputError
from jaxsim.workload.arrivals import check_rate, round_to_grid
from jaxsim.workload.durations import AbstractDuration
from jaxsim.workload.generator import Generator, check_count
from jaxsim.workload.lengths import AbstractLength, AbstractLengths
from jaxsim.workload.streams import Stream, routing_uniforms, stream_key, uniforms
from jaxsim.workload.workload import Workload

MOST_TURNS = 1 << 16
"""Turns a session may draw."""

FEWEST_SESSIONS = 64
"""Sessions drawn at first; twice as many each time that they have too few turns."""


class AbstractTurns(eqx.Module):
    """The law of the number of turns."""

    @abc.abstractmethod
    def quantile(self, levels: Float[np.ndarray, " sessions"]) -> Int[np.ndarray, " sessions"]:
        """Turns at the given levels in (0, 1), non-decreasing in the level, at least 1."""


class FixedTurns(AbstractTurns):
    """The same for every session."""

    turns: int

    def __check_init__(self):
        _check_turns("turns", self.turns)

    def quantile(self, levels: Float[np.ndarray, " sessions"]) -> Int[np.ndarray, " sessions"]:
        """The constant."""
        return np.full(np.shape(levels), int(self.turns))


class ContinuingTurns(AbstractTurns):
    """After turn k there is another one with probability shares[k - 1]; the last share holds from there on.

    `max_turns`: what lies beyond piles up there.
    """

    shares: tuple[float, ...] = eqx.field(converter=lambda x: tuple(float(v) for v in x))
    max_turns: int = MOST_TURNS

    def __check_init__(self):
        if not self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise InputError("shares", self.shares, "are not shares", "give numbers from 0 to 1")
        if self.shares[-1] == 1 and self.max_turns == MOST_TURNS:
            raise InputError("shares", self.shares, "never end", "give a last share below 1, or max_turns")
        _check_turns("max_turns", self.max_turns)

    def quantile(self, levels: Float[np.ndarray, " sessions"]) -> Int[np.ndarray, " sessions"]:
        """The smallest k with P(turns > k) <= 1 - u."""
        left, rest, last = np.cumprod(self.shares), 1.0 - np.asarray(levels), self.shares[-1]
        turns = 1 + np.searchsorted(-left, -rest, side="left")
        is_beyond = turns > len(left)
        if last == 1:
            turns = np.where(is_beyond, self.max_turns, turns)
        elif is_beyond.any():
            # There P(turns > k) falls by a factor of the last share a turn.
            more = np.ceil(np.log(rest[is_beyond] / left[-1]) / math.log(last))
            turns[is_beyond] = len(left) + np.maximum(more, 1).astype(np.int64)
        return np.minimum(turns, self.max_turns)


class GeometricTurns(AbstractTurns):
    """At least one, and after each another one with the same probability: 1 - 1 / mean_turns."""

    mean_turns: float
    max_turns: int = MOST_TURNS

    def __check_init__(self):
        if not 1 <= self.mean_turns <= MOST_TURNS:
            raise InputError(
                "mean_turns", self.mean_turns, f"is not between 1 and {MOST_TURNS}", "give the mean number of turns"
            )
        _check_turns("max_turns", self.max_turns)

    def quantile(self, levels: Float[np.ndarray, " sessions"]) -> Int[np.ndarray, " sessions"]:
        """That of `ContinuingTurns` with one share."""
        return ContinuingTurns((1.0 - 1.0 / self.mean_turns,), self.max_turns).quantile(levels)


def _check_turns(field: str, value: int) -> None:
    if isinstance(value, bool) or value != int(value) or not 1 <= value <= MOST_TURNS:
        raise InputError(field, value, f"is not a whole number from 1 to {MOST_TURNS}", "give turns, 1 or more")


class SessionGenerator(eqx.Module):
    """Draws workloads of sessions; `base` says when they begin, and the lengths of first turns.

    base: its rate is of sessions. later: new tokens and output tokens of later turns. think: from an answer to the
    next turn. shared_tokens: prompt tokens that all sessions begin with, on top of `base`'s. context_limit: of prompt
    and output (as the engine is told it) together, in tokens.
    """

    base: Generator
    turns: AbstractTurns
    think: AbstractDuration
    later: AbstractLengths
    context_limit: int
    shared_tokens: int = 0

    def __check_init__(self):
        if not 0 <= self.shared_tokens < self.context_limit:
            raise InputError(
                "shared_tokens",
                self.shared_tokens,
                f"leaves no room for a prompt below context_limit = {self.context_limit}",
                "lower it, or raise context_limit",
            )

    def sample(
        self, seed: int | PRNGKeyArray, num_requests: int, *, rate_rps: float | None = None
    ) -> Workload:
        """As many sessions, in order of their arrival, as have `num_requests` turns; of the last one those that fit.

        Requests are in order of the earliest times that they could come, if answers took no time.
        """
        count, rate_rps = check_count(num_requests), check_rate(self.base.rate_rps if rate_rps is None else rate_rps)
        # Sessions have at least one turn each; far fewer than `count` do where they have many.
        num_sessions = min(FEWEST_SESSIONS, count)
        drawn = self._draw(seed, num_sessions)
        while drawn.is_in.sum() < count:
            num_sessions = min(2 * num_sessions, count)
            drawn = self._draw(seed, num_sessions)
        kept = np.flatnonzero(drawn.is_in)[:count]
        session, turn = drawn.session[kept], drawn.turn[kept]
        last = int(session[-1])
        start_s = round_to_grid(self.base.arrivals.unit_times(seed, last + 1) / rate_rps)
        think_s = np.where(turn > 0, round_to_grid(drawn.think_s[kept]), 0.0)
        waited = np.cumsum(think_s)
        earliest_s = start_s[session] + waited - waited[turn == 0][session]
        order = np.argsort(earliest_s, kind="stable")
        tenant = self.base.tenants_of(seed, last + 1)[session]
        is_limited = drawn.is_limited[: last + 1].copy()
        is_limited[last] &= len(kept) == drawn.is_in[: np.searchsorted(drawn.session, last, side="right")].sum()
        columns = {
            "arrival_s": earliest_s,
            "input_tokens": drawn.prompt[kept],
            "output_tokens": drawn.output[kept],
            "max_tokens": drawn.limit[kept],
            "priority": np.array([t.priority for t in self.base.tenants])[tenant],
            "tenant": tenant,
            "uniforms": routing_uniforms(seed, count),
            "session": session,
            "turn": turn,
            "think_s": think_s,
        }
        return Workload(
            **{name: values[order] for name, values in columns.items()},
            tenant_names=tuple(t.name for t in self.base.tenants),
            shared_tokens=self.shared_tokens,
            num_context_limited=int(is_limited.sum()),
            provenance={
                "generator": self.base.name,
                "num_sessions": last + 1,
                "num_context_limited": int(is_limited.sum()),
            },
        )

    def _draw(self, seed: int | PRNGKeyArray, num_sessions: int) -> "_Drawn":
        turns = self.turns.quantile(uniforms(stream_key(seed, Stream.TURNS), num_sessions)[:, 0])
        ends = np.cumsum(turns)
        count, begins = int(ends[-1]), ends - turns
        session = np.repeat(np.arange(num_sessions), turns)
        turn = np.arange(count) - begins[session]
        levels = uniforms(stream_key(seed, Stream.LENGTHS), count, 2)
        pairs = zip(self.base.lengths.pairs(levels), self.later.pairs(levels), strict=True)
        new, output = (np.where(turn == 0, first, later).astype(np.int64) for first, later in pairs)
        limit = output
        if self.base.output_limit is not None:
            limit = np.full(count, self.base.output_limit)
            output = np.minimum(output, limit)
        grown = np.cumsum(new + output)
        # Contexts of the session alone; what was there before its first turn is taken away.
        prompt = self.shared_tokens + grown - output - (grown - new - output)[begins][session]
        is_out = prompt + limit > self.context_limit
        if is_out[begins].any():
            at = begins[int(np.argmax(is_out[begins]))]
            raise InputError(
                "workload.sessions.context_limit",
                self.context_limit,
                f"is passed by the first turn of session {session[at]}, of {prompt[at]} prompt and {limit[at]} output"
                " tokens",
                "raise it, or give workload.input and workload.output a max_tokens",
            )
        passed = np.cumsum(is_out)
        is_in = passed - np.where(begins > 0, passed[begins - 1], 0)[session] == 0
        kept = np.add.reduceat(is_in, begins)
        think_s = self.think.quantile(uniforms(stream_key(seed, Stream.THINKING), count)[:, 0])
        return _Drawn(session, turn, prompt, output, limit, think_s, is_in, kept < turns)


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """Turns of sessions, one session after the other; is_in: within the context limit; is_limited: of sessions."""

    session: np.ndarray
    turn: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    limit: np.ndarray
    think_s: np.ndarray
    is_in: np.ndarray
    is_limited: np.ndarray


def later_lengths(first: AbstractLengths, new: AbstractLength | None) -> AbstractLengths:
    """Lengths of later turns: those of first ones, with another law of new tokens."""
    if new is None:
        return first
    if not hasattr(first, "input"):
        raise InputError(
            "new_tokens", new, "comes with lengths in pairs", "leave it out, or give laws"
        )
    return dataclasses.replace(first, input=new)


PRESETS: Mapping[str, Mapping[str, Any]] = {
    # A chat service with long documents. Mooncake's conversation trace (FAST'25): chain positions 1 to 4 hold 0.61,
    # 0.19, 0.08 and 0.04 of the requests, and the share that goes on rises to 0.60; one block of 512 tokens is in
    # every prompt; prompts have 6,909 tokens at the median and 27,367 at the 90th percentile (of all requests: those
    # of first turns alone are not known), fresh tokens of a continued one 829 and 9,741, outputs 350 and 597; 123 and
    # 483 s from one turn's arrival to the next one's, so the answer's own time is in them, and taken as thinking
    # here. The limits are ours.
    "conversation": {
        "turns": {"kind": "continuing", "shares": (0.31, 0.42, 0.51, 0.60)},
        "think_s": {"kind": "log-normal", "median_s": 123.0, "sigma": 1.07, "max_s": 3600.0},
        "input": {"kind": "log-normal", "mu": math.log(6909 - 512), "sigma": 1.07, "max_tokens": 120_000},
        "new_tokens": {"kind": "log-normal", "mu": math.log(829), "sigma": 1.92, "max_tokens": 120_000},
        "output": {"kind": "log-normal", "mu": math.log(350), "sigma": 0.417, "max_tokens": 8192},
        "shared_tokens": 512,
        "context_limit": 131_072,
    },
    # One request to a coding agent: steps with a tool call between each and the next. TraceLab (4,265 sessions,
    # 357,161 steps): 8.8 steps a request; 870 tokens appended at the median and 6,500 on average, 220 and 523
    # generated; a first prompt of 78,000 (the median when nothing is cached; its spread is not known, so it is
    # fixed); tools take 18.4 s on average: 70 % of the calls less than 1 s, 4 % more than 60 s, which carry 85 % of
    # the time. The quantile at 0.92 is ours, as are the split of the shared tokens and the limit, that of many models.
    "agent": {
        "turns": {"kind": "geometric", "mean_turns": 8.8},
        "think_s": {
            "kind": "quantiles",
            "levels": (0.0, 0.7, 0.92, 0.96, 1.0),
            "seconds": (0.0, 1.0, 8.0, 60.0, 719.0),
        },
        "input": 70_000,
        "new_tokens": {"kind": "log-normal", "mu": math.log(870), "sigma": 2.0, "max_tokens": 100_000},
        "output": {"kind": "log-normal", "mu": math.log(220), "sigma": 1.32, "max_tokens": 16_384},
        "shared_tokens": 8_000,
        "context_limit": 131_072,
    },
}
"""Sessions by name, of which any number can be replaced: they begin as a Poisson process."""
