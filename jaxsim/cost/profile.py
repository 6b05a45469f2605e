"""Measured operator times in memory: one table an operator, its axes, where it comes from, and how it is read.

A `Profile` belongs to one model, device and tensor-parallel degree. Its tables are lists of points, not
grids: published profiles are ragged (two grids laid over each other, limits that depend on another axis), so
`interpolate` reads them axis by axis, each slice over whatever it has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxsim._core.errors import InputError, suggest


class Operator(NamedTuple):
    """A kind of table: its axes, outermost first, and the operators of the roofline that it stands for."""

    axes: tuple[str, ...]
    covers: tuple[str, ...]


_LATENT = ("latent_down", "query_up", "latent_up", "attention_output", "rotary_and_cache_write")

OPERATORS: dict[str, Operator] = {
    **{name: Operator(("tokens",), (name,)) for name in (
        "embedding", "qkv", "attention_output", "latent_down", "query_up", "latent_up", "rotary_and_cache_write",
        "norms", "ffn_up", "ffn_down", "ffn_activation", "router", "shared_expert_up", "shared_expert_down")},
    "qk_norm": Operator(("tokens",), ()),
    "residual_add": Operator(("tokens",), ()),
    "experts": Operator(("tokens",), ("experts",)),
    "experts_touched": Operator(("tokens", "experts"), ("experts",)),
    **{name: Operator(("sequences",), (name,)) for name in ("final_norm", "lm_head", "sampler")},
    "all_reduce": Operator(("message_bytes",), ("all_reduce",)),
    "all_to_all": Operator(("message_bytes",), ("expert_exchange",)),
    "stage_hop": Operator(("message_bytes",), ("stage_hop",)),
    "attention_decode": Operator(("sequences", "context_tokens"), ()),
    "attention_prefill": Operator(("chunk_tokens", "keys_per_token"), ()),
    "attention_mixed": Operator(("chunk_tokens", "keys_per_token", "sequences", "context_tokens"), ()),
    "attention_decode_windowed": Operator(("sequences", "context_tokens"), ()),
    "attention_prefill_windowed": Operator(("chunk_tokens", "keys_per_token"), ()),
    "latent_decode": Operator(("sequences", "context_tokens"), _LATENT),
    "latent_prefill": Operator(("chunk_tokens", "keys_per_token"), _LATENT),
    "host_step": Operator(("sequences",), ()),
}
"""Every operator a profile may hold; seconds are of one call: of one layer, or of the one call an iteration makes.

tokens: of the iteration, on this rank; sequences: sampled (final_norm, lm_head, sampler), decoding (attention) or all
(host_step); experts: distinct ones touched on this rank; message_bytes: what a rank contributes.
context_tokens: KV tokens a decoding sequence reads, the new one included. chunk_tokens: new prompt tokens of all
chunks. keys_per_token: sum of (h + c)^2 - h^2 over the chunks, divided by chunk_tokens: 2 h + c for one chunk of c
tokens behind h cached ones, c for equal chunks of c tokens without history.
norms: all norms of a layer. latent_*: attention of MLA with its projections. *_windowed: layers with a
sliding window. host_step: host seconds of an iteration that do not overlap the device.
"""

SHORTEST_S = 2e-7
"""No kernel or collective is shorter (launching one takes the device about a microsecond)."""

LONGEST_SMALLEST_S = 0.05
"""No operator of one layer takes this long at the smallest size measured."""

LONGEST_S = 100.0


@dataclass(frozen=True)
class OperatorTable:
    """Seconds of one operator at measured points.

    points: one column an axis of `OPERATORS[name]`; seconds: of one call; rows: where each point stood in
    `source`, for errors. Repeated points are merged into their median.
    """

    name: str
    points: Float[np.ndarray, "points axes"]
    seconds: Float[np.ndarray, " points"]
    source: str = ""
    rows: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self):
        if self.name not in OPERATORS:
            raise InputError("profile.operator", self.name, "is not an operator of a profile",
                             suggest(self.name, OPERATORS))
        points = np.atleast_2d(np.asarray(self.points, np.float64))
        points = points.T if points.shape[0] == 1 and points.shape[1] == np.size(self.seconds) > 1 else points
        seconds = np.asarray(self.seconds, np.float64).reshape(-1)
        if seconds.size == 0:
            raise InputError(f"profile {self._where}", self.name, "holds no measurements",
                             "check the filters (device, TP, dtype) or give a table with at least one row")
        if points.shape != (seconds.size, len(self.axes)):
            raise InputError(f"profile {self._where}, {self.name}", points.shape,
                             f"should be {seconds.size} points of the axes {', '.join(self.axes)}")
        object.__setattr__(self, "points", points)
        object.__setattr__(self, "seconds", seconds)
        self._refuse(~np.isfinite(seconds) | (seconds <= 0), seconds, "seconds", "must be positive",
                     "fix or remove that row")
        self._refuse(seconds < SHORTEST_S, seconds, "seconds", "is shorter than any kernel",
                     "check the unit of the time column (ns, us, ms, s)")
        self._refuse(seconds > LONGEST_S, seconds, "seconds", "is longer than any operator of one layer",
                     "check the unit of the time column (ns, us, ms, s)")
        if seconds.min() > LONGEST_SMALLEST_S:
            self._refuse(seconds == seconds.min(), seconds, "seconds",
                         "is too long for the smallest size of an operator of one layer",
                         "check the unit of the time column (ns, us, ms, s): is it off by 1000?")
        for i, axis in enumerate(self.axes):
            self._refuse(~np.isfinite(points[:, i]) | (points[:, i] < 0), points[:, i], axis,
                         "must not be negative", "fix or remove that row")
        unique, inverse = np.unique(points, axis=0, return_inverse=True)
        if len(unique) < len(points):
            order = np.argsort(inverse.reshape(-1), kind="stable")
            groups = np.split(seconds[order], np.cumsum(np.bincount(inverse.reshape(-1)))[:-1])
            object.__setattr__(self, "points", unique)
            object.__setattr__(self, "seconds", np.array([np.median(g) for g in groups]))
            object.__setattr__(self, "rows", ())

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the columns of `points`."""
        return OPERATORS[self.name].axes

    @property
    def _where(self) -> str:
        return self.source or "table"

    def place(self, index: int) -> str:
        """How point `index` is called in errors."""
        if self.rows:
            return f"{self._where} {self.rows[index]}"
        at = ", ".join(f"{axis} {value:g}" for axis, value in zip(self.axes, self.points[index], strict=True))
        return f"{self._where} ({at})"

    def _refuse(self, is_bad: Bool[np.ndarray, " points"], values, what: str, problem: str, remedy: str) -> None:
        if is_bad.any():
            index = int(np.argmax(is_bad))
            raise InputError(f"profile {self.place(index)}, {self.name} {what}", float(values[index]), problem, remedy)


@dataclass(frozen=True)
class Profile:
    """Operator tables of one model on one device at one tensor-parallel degree.

    model, device: names (Hugging Face id; as the source calls it); dtype, kv_dtype: number formats measured.
    expert_parallel_size: ranks over which whole experts were spread in the expert tables.
    provenance: what else is known: files, engine and version, date, licence, filters.
    """

    tables: Mapping[str, OperatorTable]
    model: str = ""
    device: str = ""
    tensor_parallel_size: int = 1
    expert_parallel_size: int = 1
    dtype: str = "auto"
    kv_dtype: str = "auto"
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self):
        if not self.tables:
            raise InputError("profile", str(self.provenance.get("files", "")), "holds no tables",
                             "check the filters (device, model, TP, dtype)")
        for name, table in self.tables.items():
            if name != table.name:
                raise InputError("profile.tables", name, f"is the key of a table of {table.name}")

    def merged(self, other: "Profile") -> "Profile":
        """With the tables of `other` added; where both have one, that of `other`."""
        for name in ("model", "device", "tensor_parallel_size"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours and theirs and ours != theirs:
                raise InputError(f"profile.{name}", theirs, f"does not go with {ours}", "merge profiles of one system")
        return Profile({**self.tables, **other.tables}, self.model or other.model, self.device or other.device,
                       self.tensor_parallel_size, max(self.expert_parallel_size, other.expert_parallel_size),
                       self.dtype, self.kv_dtype, {**self.provenance, **other.provenance})


class Resampled(NamedTuple):
    """Seconds on a grid, and how many of them lie past the last measurement of some axis."""

    seconds: Float[np.ndarray, "..."]
    outside_s: Float[np.ndarray, "..."]


Rate = Callable[..., Float[np.ndarray, "..."]]


def interpolate(points: Float[np.ndarray, "points axes"], seconds: Float[np.ndarray, " points"],
                axes: Sequence[Float[np.ndarray, " knots"]], rate: Rate) -> Resampled:
    """Values on the tensor product of `axes`: linear inside the table, edge value x ratio of `rate` outside.

    The outermost axis is interpolated between its slices, each read over the points it has. `rate` maps one
    array an axis to the seconds of a roofline there; below the first measurement its ratio is taken as well,
    but not counted as outside (batches smaller than the smallest measured are near the floor).
    """
    return _nested(np.asarray(points, np.float64), np.asarray(seconds, np.float64),
                   [np.asarray(axis, np.float64) for axis in axes], rate, ())


def _nested(points, seconds, axes, rate: Rate, prefix: tuple) -> Resampled:
    levels, start = np.unique(points[:, 0], return_index=True)
    query, rest = axes[0], axes[1:]
    if rest:
        slices = [_nested(points[at][:, 1:], seconds[at], rest, rate, (*prefix, level))
                  for level in levels for at in [points[:, 0] == level]]
        values = np.stack([s.seconds for s in slices])
        outside = np.stack([s.outside_s for s in slices])
    else:
        values, outside = seconds[start], np.zeros(len(levels))
    clipped = np.clip(query, levels[0], levels[-1])
    low = np.clip(np.searchsorted(levels, clipped, side="right") - 1, 0, max(len(levels) - 2, 0))
    high = np.minimum(low + 1, len(levels) - 1)
    width = np.where(high > low, levels[high] - levels[low], 1.0)
    share = ((clipped - levels[low]) / width).reshape(-1, *[1] * len(rest))
    mixed, mixed_outside = (v[low] * (1 - share) + v[high] * share for v in (values, outside))
    if (clipped != query).any():
        ratio = (np.asarray(rate(*prefix, *_open_grid(query, rest)), np.float64)
                 / np.asarray(rate(*prefix, *_open_grid(clipped, rest)), np.float64))
        mixed, mixed_outside = mixed * ratio, mixed_outside * ratio
        is_past = (query > levels[-1]).reshape(-1, *[1] * len(rest))
        mixed_outside = np.where(is_past, mixed, mixed_outside)
    return Resampled(mixed, mixed_outside)


def _open_grid(first, rest):
    return np.ix_(first, *rest)
