"""A workload: the requests of one scenario, as arrays."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, PRNGKeyArray

from jaxsim._core.errors import InputError
from jaxsim.workload.arrivals import check_rate, round_to_grid
from jaxsim.workload.streams import Stream, routing_uniforms, stream_key, uniforms

_INT32_MAX = 2**31 - 1

MAX_THINK_S = 1e9
"""Thirty years: as far as arrivals are simulated."""


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """The requests of one scenario, in order of arrival. Arrays are copied, checked and made read-only.

    arrival_s: seconds, non-decreasing, rounded to 2^-20 s.
    input_tokens, output_tokens: prompt tokens and tokens generated, at least 1.
    max_tokens: the limit the engine is told, at least output_tokens (default: equal).
    priority: smaller is more urgent (default 0). tenant: index into tenant_names (default 0).
    prefix_hashes: chained ids of each prompt's blocks of prefix_block_size tokens, flat; those of request i
    are prefix_hashes[prefix_offsets[i]:prefix_offsets[i + 1]]. Two prompts share a prefix as long as their
    ids agree.
    session, turn: whose turn a request is, and its number; a session's turns stand in order. think_s: with them, a
    closed loop within each session: its first request comes at its arrival_s, every other one think_s after the
    answer to the one before, whatever its arrival_s (generated: the earliest that it could come; of a trace: when
    it came).
    predicted_tokens: output tokens as a scheduler that goes by them is told; limit_s: from each arrival to where the
    request is due, for a scheduler that goes by that.
    variant: which fine-tune of a base each is for.
    shared_tokens: prompt tokens that all sessions begin with. num_context_limited: sessions that ended at a context
    limit.
    num_images: of each request, of tiles_per_image each, whose tokens are part of the prompt; None without any.
    uniforms: two random numbers per request for routers (default: those of seed 0).
    unit_times: unrounded positions at unit mean rate and rate_rps their scale, when the workload was
    generated, so that `with_rate` does not accumulate rounding. provenance: where it came from, for reports.
    """

    arrival_s: Float[np.ndarray, " requests"]
    input_tokens: Int[np.ndarray, " requests"]
    output_tokens: Int[np.ndarray, " requests"]
    max_tokens: Int[np.ndarray, " requests"] | None = None
    priority: Int[np.ndarray, " requests"] | None = None
    tenant: Int[np.ndarray, " requests"] | None = None
    tenant_names: tuple[str, ...] = ("default",)
    prefix_offsets: Int[np.ndarray, " requests+1"] | None = None
    prefix_hashes: Int[np.ndarray, " blocks"] | None = None
    prefix_block_size: int | None = None
    session: Int[np.ndarray, " requests"] | None = None
    turn: Int[np.ndarray, " requests"] | None = None
    think_s: Float[np.ndarray, " requests"] | None = None
    predicted_tokens: Int[np.ndarray, " requests"] | None = None
    limit_s: Float[np.ndarray, " requests"] | None = None
    variant: Int[np.ndarray, " requests"] | None = None
    shared_tokens: int = 0
    num_context_limited: int = 0
    num_images: Int[np.ndarray, " requests"] | None = None
    tiles_per_image: int = 0
    uniforms: Float[np.ndarray, "requests 2"] | None = None
    unit_times: Float[np.ndarray, " requests"] | None = None
    rate_rps: float | None = None
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        arrival_s = _numbers("arrival_s", self.arrival_s, None)
        count = len(arrival_s)
        if count == 0:
            raise InputError("arrival_s", [], "holds no requests", "give at least one")
        _refuse(
            "arrival_s", arrival_s, arrival_s < 0, "is negative", "shift the arrivals to start at 0 or later"
        )
        arrival_s = round_to_grid(arrival_s)
        late = np.concatenate([[False], np.diff(arrival_s) < 0])
        _refuse(
            "arrival_s",
            arrival_s,
            late,
            "is before the arrival in front of it",
            "sort the requests by arrival",
        )
        tokens = {}
        for name in ("input_tokens", "output_tokens", "max_tokens"):
            given = getattr(self, name)
            given = self.output_tokens if given is None and name == "max_tokens" else given
            tokens[name] = _integers(name, given, count, low=1)
        _refuse(
            "max_tokens",
            tokens["max_tokens"],
            tokens["max_tokens"] < tokens["output_tokens"],
            "is below the request's output_tokens",
            "raise it, or shorten the output",
        )
        total = tokens["input_tokens"].astype(np.int64) + tokens["max_tokens"]
        _refuse(
            "input_tokens",
            tokens["input_tokens"],
            total > _INT32_MAX,
            "plus max_tokens does not fit 32 bits",
            "shorten the request",
        )
        zeros = np.zeros(count, np.int32)
        priority = _integers(
            "priority", zeros if self.priority is None else self.priority, count, low=-(2**31)
        )
        tenant = _integers("tenant", zeros if self.tenant is None else self.tenant, count, low=0)
        names = tuple(str(n) for n in self.tenant_names)
        _refuse(
            "tenant",
            tenant,
            tenant >= len(names),
            f"has no name (tenant_names has {len(names)})",
            "name every tenant",
        )
        draws = routing_uniforms(0, count) if self.uniforms is None else np.asarray(self.uniforms, np.float32)
        if draws.shape != (count, 2):
            raise InputError("uniforms", draws.shape, f"is not ({count}, 2)", "give two numbers per request")
        _refuse("uniforms", draws, ~((draws >= 0) & (draws < 1)), "is not in [0, 1)", "draw uniforms")
        unit_times = self.unit_times
        if unit_times is not None:
            unit_times = _numbers("unit_times", unit_times, count)
            _refuse(
                "unit_times",
                unit_times,
                np.concatenate([unit_times[:1] < 0, np.diff(unit_times) < 0]),
                "is negative or out of order",
                "give cumulative positions",
            )
            check_rate(self.rate_rps if self.rate_rps is not None else math.nan)
        fields = dict(
            tokens,
            arrival_s=arrival_s,
            priority=priority,
            tenant=tenant,
            tenant_names=names,
            uniforms=draws,
            unit_times=unit_times,
            provenance=dict(self.provenance),
        )
        fields.update(self._checked_prefixes(count, tokens["input_tokens"]))
        fields.update(self._checked_sessions(count))
        if self.num_images is not None:
            fields["num_images"] = _integers("num_images", self.num_images, count, low=0)
        if self.predicted_tokens is not None:
            fields["predicted_tokens"] = _integers("predicted_tokens", self.predicted_tokens, count, low=1)
        if self.variant is not None:
            fields["variant"] = _integers("variant", self.variant, count, low=0)
        if self.limit_s is not None:
            limit_s = _numbers("limit_s", self.limit_s, count)
            _refuse("limit_s", limit_s, limit_s < 0, "is negative", "give seconds from the arrival")
            fields["limit_s"] = limit_s
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                value = np.array(value)
                value.flags.writeable = False
            object.__setattr__(self, name, value)

    def _checked_prefixes(self, count: int, input_tokens: np.ndarray) -> dict[str, Any]:
        given = (
            self.prefix_offsets is not None,
            self.prefix_hashes is not None,
            self.prefix_block_size is not None,
        )
        if not any(given):
            return {}
        if not all(given):
            raise InputError(
                "prefix_offsets",
                None,
                "prefix_offsets, prefix_hashes and prefix_block_size go together",
                "give all three or none",
            )
        size = self.prefix_block_size
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise InputError(
                "prefix_block_size", size, "is not a positive number of tokens", "give tokens per hash"
            )
        offsets = np.asarray(self.prefix_offsets)
        hashes = np.asarray(self.prefix_hashes)
        if offsets.shape != (count + 1,) or offsets.dtype.kind not in "iu" or offsets[0] != 0:
            raise InputError(
                "prefix_offsets",
                offsets,
                f"is not {count + 1} integers from 0",
                "give the cumulative number of hashes",
            )
        if hashes.ndim != 1 or (hashes.dtype.kind not in "iu" and len(hashes)):
            raise InputError("prefix_hashes", hashes, "is not a flat list of integers", "number the blocks")
        per_request = np.diff(offsets)
        _refuse("prefix_offsets", offsets[1:], per_request < 0, "goes backwards", "give cumulative counts")
        if offsets[-1] != len(hashes):
            raise InputError(
                "prefix_offsets",
                int(offsets[-1]),
                f"does not end at the {len(hashes)} hashes",
                "give the cumulative number of hashes",
            )
        _refuse(
            "prefix_offsets",
            offsets[1:],
            per_request > -(-input_tokens.astype(np.int64) // size),
            f"gives the request more blocks of {size} tokens than its prompt has",
            "check prefix_block_size",
        )
        return {
            "prefix_offsets": offsets.astype(np.int64),
            "prefix_hashes": hashes.astype(np.int64),
            "prefix_block_size": int(size),
        }

    def _checked_sessions(self, count: int) -> dict[str, Any]:
        if (self.session is None) != (self.turn is None) or self.session is None and self.think_s is not None:
            raise InputError("session", None, "session, turn and think_s go together", "give session and turn")
        if self.session is None:
            return {}
        session, turn = (_integers(name, getattr(self, name), count, low=0) for name in ("session", "turn"))
        order = np.argsort(session, kind="stable")
        is_wrong = (np.diff(session[order]) == 0) & (np.diff(turn[order]) <= 0)
        _refuse(
            "turn",
            turn,
            np.isin(np.arange(count), order[1:][is_wrong]),
            "is not behind the turn of its session before it",
            "number turns in their order",
        )
        found = {"session": session, "turn": turn}
        if self.think_s is not None:
            think_s = _numbers("think_s", self.think_s, count)
            _refuse("think_s", think_s, think_s < 0, "is negative", "give 0 for a turn at once")
            _refuse("think_s", think_s, think_s > MAX_THINK_S, f"is above {MAX_THINK_S:g} s", "lower it")
            found["think_s"] = round_to_grid(think_s)
        return found

    def __len__(self) -> int:
        return len(self.arrival_s)

    def successors(self) -> Int[np.ndarray, " requests"]:
        """The next turn of each request's session, -1 behind the last one and without sessions."""
        found = np.full(len(self), -1)
        if self.session is not None:
            order = np.argsort(self.session, kind="stable")
            is_next = np.diff(self.session[order]) == 0
            found[order[:-1][is_next]] = order[1:][is_next]
        return found

    @property
    def num_requests(self) -> int:
        """How many requests there are."""
        return len(self.arrival_s)

    @property
    def span_s(self) -> float:
        """Seconds from the first to the last arrival."""
        return float(self.arrival_s[-1] - self.arrival_s[0])

    @property
    def mean_rate_rps(self) -> float:
        """Arrivals per second: gaps over the span; infinite if all come at once."""
        return (len(self) - 1) / self.span_s if self.span_s > 0 else math.inf

    @property
    def num_prefix_blocks(self) -> int:
        """Prefix block ids of all requests together; 0 without."""
        return 0 if self.prefix_hashes is None else len(self.prefix_hashes)

    def prefix_of(self, request: int) -> Int[np.ndarray, " blocks"]:
        """Block ids of one request's prompt, empty without."""
        if self.prefix_hashes is None:
            return np.zeros(0, np.int64)
        return self.prefix_hashes[self.prefix_offsets[request] : self.prefix_offsets[request + 1]]

    def take(self, rows: slice | np.ndarray) -> "Workload":
        """Some of the requests (a slice, a mask or increasing indices), each with its own random numbers."""
        if isinstance(rows, tuple) or np.ndim(rows) == 0 and not isinstance(rows, slice):
            raise InputError("rows", rows, "is not a slice, a mask or a list of indices", "use slice(i, j)")
        index = np.arange(len(self))[rows]
        if len(index) == 0:
            raise InputError("rows", rows, f"picks none of the {len(self)} requests", "widen the selection")
        changes: dict[str, Any] = {
            name: getattr(self, name)[index]
            for name in (
                "arrival_s",
                "input_tokens",
                "output_tokens",
                "max_tokens",
                "priority",
                "tenant",
                "uniforms",
            )
        }
        for name in ("unit_times", "session", "turn", "think_s", "num_images", "predicted_tokens", "limit_s",
                     "variant"):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name)[index]
        if self.prefix_hashes is not None:
            changes["prefix_offsets"], changes["prefix_hashes"] = take_ragged(
                self.prefix_offsets, self.prefix_hashes, index
            )
        return dataclasses.replace(self, **changes)

    def from_zero(self) -> "Workload":
        """The same requests, the first at time 0."""
        unit_times = None if self.unit_times is None else self.unit_times - self.unit_times[0]
        return dataclasses.replace(self, arrival_s=self.arrival_s - self.arrival_s[0], unit_times=unit_times)

    def with_rate(self, rate_rps: float) -> "Workload":
        """The same requests at another mean rate: the pattern is stretched, nothing is redrawn.

        A generated workload is scaled from its unit positions (mean rate in expectation); any other about its
        first arrival, so that (n - 1) / span is `rate_rps`.
        """
        rate_rps = check_rate(rate_rps)
        self._refuse_sessions("rate_rps", rate_rps)
        if self.unit_times is not None:
            return dataclasses.replace(self, arrival_s=self.unit_times / rate_rps, rate_rps=rate_rps)
        if math.isinf(self.mean_rate_rps):
            return self
        start = self.arrival_s[0]
        return dataclasses.replace(
            self,
            arrival_s=start + (self.arrival_s - start) * (self.mean_rate_rps / rate_rps),
            rate_rps=rate_rps,
        )

    def scaled(self, rate_scale: float) -> "Workload":
        """The same requests, `rate_scale` times as fast."""
        if not (rate_scale > 0 and math.isfinite(rate_scale)):
            raise InputError(
                "rate_scale", rate_scale, "is not positive and finite", "1 keeps the rate, 2 doubles it"
            )
        self._refuse_sessions("rate_scale", rate_scale)
        if self.unit_times is not None and self.rate_rps is not None:
            return self.with_rate(self.rate_rps * rate_scale)
        rate = None if self.rate_rps is None else self.rate_rps * rate_scale
        return dataclasses.replace(self, arrival_s=self.arrival_s / rate_scale, rate_rps=rate)

    def _refuse_sessions(self, field: str, value: float) -> None:
        if self.think_s is not None:
            raise InputError(
                field,
                value,
                "cannot stretch sessions: their later turns come when answers are out",
                "draw them at that rate, or leave think_s out",
            )

    def thinned(self, keep: float, seed: int | PRNGKeyArray = 0) -> "Workload":
        """A random share of the requests, at their times: one instance's part of a service's trace.

        A request kept at one share is kept at every larger one.
        """
        if not 0 < keep <= 1:
            raise InputError(
                "keep", keep, "is not above 0 and at most 1", "give the share of requests to keep"
            )
        kept = uniforms(stream_key(seed, Stream.THINNING), len(self))[:, 0] < keep
        if self.think_s is not None:
            # Whole sessions, each by the draw of its first turn.
            _, first, of = np.unique(self.session, return_index=True, return_inverse=True)
            kept = kept[first][of]
        if not kept.any():
            raise InputError("keep", keep, f"keeps none of the {len(self)} requests", "give a larger share")
        # Unit positions of the survivors no longer have unit rate.
        thin = dataclasses.replace(self, unit_times=None, rate_rps=None)
        return thin.take(kept)

    def to_frame(self) -> pd.DataFrame:
        """One row per request: the columns of a plain trace, which `jaxsim.traces.read_trace` reads back."""
        frame = pd.DataFrame(
            {
                "arrival_s": self.arrival_s,
                "input_tokens": self.input_tokens,
                "output_tokens": self.output_tokens,
                "max_tokens": self.max_tokens,
                "priority": self.priority,
                "tenant": np.asarray(self.tenant_names, dtype=object)[self.tenant],
            }
        )
        for name in ("session", "turn", "think_s", "predicted_tokens"):
            if getattr(self, name) is not None:
                frame[name] = getattr(self, name)
        if self.prefix_hashes is not None:
            frame["prefix_block_ids"] = [" ".join(map(str, self.prefix_of(i))) for i in range(len(self))]
            frame["prefix_block_size"] = self.prefix_block_size
        return frame

    def summary(self) -> dict[str, float | int]:
        """Counts, rate and length statistics, for reports."""
        stats: dict[str, float | int] = {
            "num_requests": len(self),
            "span_s": self.span_s,
            "mean_rate_rps": self.mean_rate_rps,
            "total_input_tokens": int(self.input_tokens.sum(dtype=np.int64)),
            "total_output_tokens": int(self.output_tokens.sum(dtype=np.int64)),
        }
        for name in ("input_tokens", "output_tokens"):
            values = getattr(self, name)
            stats[f"mean_{name}"] = float(values.mean())
            for level in (50, 90, 99):
                stats[f"p{level}_{name}"] = float(np.percentile(values, level))
            stats[f"max_{name}"] = int(values.max())
        return stats


def take_ragged(
    offsets: Int[np.ndarray, " rows+1"], flat: Int[np.ndarray, " items"], index: Int[np.ndarray, " picked"]
) -> tuple[Int[np.ndarray, " picked+1"], Int[np.ndarray, " items"]]:
    """Rows `index` of a ragged array held as offsets and a flat list."""
    lengths = (offsets[1:] - offsets[:-1])[index]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    source = np.repeat(offsets[:-1][index] - ends[:-1], lengths) + np.arange(ends[-1])
    return ends, flat[source]


def _refuse(field: str, values: np.ndarray, bad: np.ndarray, problem: str, remedy: str) -> None:
    if np.any(bad):
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        place = ", ".join(map(str, at))
        raise InputError(f"{field}[{place}]", values[at].item(), problem, remedy)


def _numbers(field: str, values: Any, count: int | None) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iuf" and len(array)):
        raise InputError(field, values, "is not a flat list of numbers", "give one number per request")
    if count is not None and len(array) != count:
        raise InputError(field, len(array), f"entries for {count} requests", "give one per request")
    array = array.astype(np.float64)
    _refuse(field, array, ~np.isfinite(array), "is not a finite number", "fix or leave out the request")
    return array


def _integers(field: str, values: Any, count: int, low: int) -> np.ndarray:
    array = _numbers(field, values, count)
    _refuse(field, array, array != np.rint(array), "is not a whole number", "round it")
    _refuse(
        field,
        array,
        (array < low) | (array > _INT32_MAX),
        f"is not between {low} and {_INT32_MAX}",
        "fix or leave out the request",
    )
    return array.astype(np.int32)
