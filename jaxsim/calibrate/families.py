"""Measured rows of one operator family, and what the forms of `jaxsim.cost` say about them.

A family is a section of `jaxsim.spec.efficiency.Efficiency` ("gemm.bf16", "decode", "nccl.all_reduce"); its kind is the
first word. Columns by kind, a value a row (sizes of one call on one rank; B sequences, H query and K KV heads):

    gemm               m, n, k, weight_bytes (of the matrix)
    experts            tokens, per_token, num_experts, hidden, inner, number_bytes (of a weight), and either touched
                       (distinct experts) or ranks, law, spread_largest (`jaxsim.calibrate.loads`)
    decode             heads, kv_heads, head_dim, cache_bytes (of a number), window, sequences, context
    prefill            heads, kv_heads, head_dim, cache_bytes, window, tokens, chunks, pairs, keys, decodes, context
    latent             heads, latent, rope, nope, value, query_rank, hidden, cache_bytes, narrow, is_prefill, sequences,
                       length (context of decode, new tokens of prefill); whole modules, projections included
    elementwise        kernels, bytes
    nccl               ranks, message_bytes            custom_all_reduce   ranks, message_bytes

Sources and errors of the forms: docs/cost-model.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsim._core.errors import InputError
from jaxsim.calibrate import loads
from jaxsim.calibrate.least_squares import double_precision
from jaxsim.cost import attention as attend
from jaxsim.cost.collectives import WIRE, CustomAllReduce, Nccl
from jaxsim.cost.gemm import ExpertLoad, Experts, Gemm
from jaxsim.cost.rank import Elementwise
from jaxsim.cost.rates import Rates
from jaxsim.spec.device import NOMINAL_MULTIPROCESSORS, DeviceSpec
from jaxsim.spec.efficiency import EXPERT_ROWS, Efficiency

Seconds = Callable[[eqx.Module, Any], Float[Array, " rows"]]

COMPUTE = {"bf16": "bf16", "bf16_tuned": "bf16", "fp8": "fp8", "fp8_block": "fp8", "int4": "bf16", "mxfp4": "bf16"}
"""What products of a number format run in."""

SIZES = {"gemm": "m", "experts": "tokens", "decode": "sequences", "prefill": "tokens", "latent": "sequences",
         "elementwise": "bytes", "nccl": "message_bytes", "custom_all_reduce": "message_bytes"}
"""The column residuals are drawn over."""

GROUPS = {"gemm": ("n", "k"), "experts": ("hidden", "inner", "num_experts"),
          "decode": ("heads", "kv_heads", "head_dim"), "prefill": ("heads", "kv_heads", "head_dim"),
          "latent": ("heads",), "elementwise": ("kernels",), "nccl": ("ranks",), "custom_all_reduce": ("ranks",)}
"""Columns that make the shape which is held out together."""


@dataclass(frozen=True)
class Observations:
    """Rows of one family. rows: where each stands in its file, data rows from 1; left_out: rows dropped, by reason."""

    family: str
    columns: Mapping[str, np.ndarray]
    seconds: Float[np.ndarray, " rows"]
    rows: np.ndarray
    files: np.ndarray
    left_out: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def kind(self) -> str:
        """The form: the first word of the family."""
        return self.family.partition(".")[0]

    @property
    def groups(self) -> np.ndarray:
        """The shape of each row, as text."""
        names = GROUPS[self.kind]
        parts = [[f"{name} {value:.10g}" for value in self.columns[name]] for name in names]
        return np.array([", ".join(p) for p in zip(*parts, strict=True)])

    @property
    def sizes(self) -> np.ndarray:
        """How much a row does, for plots."""
        return self.columns[SIZES[self.kind]]

    def take(self, index: np.ndarray) -> "Observations":
        """Some rows: positions or a mask."""
        return replace(self, columns={k: v[index] for k, v in self.columns.items()}, seconds=self.seconds[index],
                       rows=self.rows[index], files=self.files[index])

    def sample(self, most: int, seed: int = 0) -> "Observations":
        """At most so many rows, drawn without replacement, in their order."""
        if len(self) <= most:
            return self
        return self.take(np.sort(np.random.default_rng(seed).choice(len(self), most, replace=False)))

    def place(self, index: int) -> str:
        """How a row is called in errors."""
        return f"{self.files[index]} row {self.rows[index]}"

    def joined(self, other: "Observations") -> "Observations":
        """Both, one after the other."""
        def both(one, two):
            return np.concatenate([one, two])

        # A column only one of them has says nothing about the rows of the other.
        missing = {name for name in self.columns.keys() ^ other.columns.keys()}
        if missing:
            raise InputError(f"calibration of {self.family}", sorted(missing), "stands in only some of the tables",
                             "calibrate with tables of one kind")
        reasons = {r: self.left_out.get(r, 0) + other.left_out.get(r, 0) for r in {**self.left_out, **other.left_out}}
        return Observations(self.family, {k: both(v, other.columns[k]) for k, v in self.columns.items()},
                            both(self.seconds, other.seconds), both(self.rows, other.rows),
                            both(self.files, other.files), reasons)


class Model(NamedTuple):
    """seconds(kernel, data): seconds of the rows, in their order; what is not an array is inside it."""

    seconds: Seconds
    data: Any


def section(record: Efficiency, family: str) -> Any:
    """The section of a family. Raises `InputError` where the record has none."""
    kind, _, name = family.partition(".")
    found = getattr(record, kind, None)
    found = found.get(name) if isinstance(found, dict) else found
    if found is None:
        raise InputError("calibration family", family, "is not in the device's record", "leave its table out")
    return found


def kernel(record: Efficiency, family: str) -> eqx.Module:
    """The form of a family with the constants of the record."""
    kind, _, name = family.partition(".")
    values = section(record, family)
    if kind == "nccl":
        return Nccl.of(values, name)
    if kind == "elementwise":
        return Elementwise(jnp.asarray(values.floor_s, float), jnp.asarray(values.efficiency, float))
    return {"gemm": Gemm, "experts": Experts, "decode": attend.Decode, "prefill": attend.Prefill,
            "latent": attend.Latent, "custom_all_reduce": CustomAllReduce}[kind].of(values)


def rates(device: DeviceSpec, compute: str = "bf16") -> Rates:
    """Datasheet peaks for products in `compute`."""
    return Rates(device.peak(compute).flops, device.memory_bytes_per_s,
                 float(device.num_multiprocessors or NOMINAL_MULTIPROCESSORS))


def model(observations: Observations, device: DeviceSpec, record: Efficiency) -> Model:
    """Seconds of these rows as a function of the family's kernel; `record` prices what else is in them."""
    return _MODELS[observations.kind](observations, device, record)


def predicted(observations: Observations, device: DeviceSpec, record: Efficiency) -> Float[np.ndarray, " rows"]:
    """Seconds of the rows with the constants of a record."""
    with double_precision():
        made = model(observations, device, record)
        data = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), made.data)
        # Compiled as a whole: operation by operation each shape of an array would be compiled anew.
        return np.asarray(jax.jit(made.seconds)(kernel(record, observations.family), data), np.float64)


def least_seconds(observations: Observations, device: DeviceSpec) -> Float[np.ndarray, " rows"]:
    """What the rows take at datasheet peaks: the larger of FLOP and bytes (message: of the link)."""
    c, kind = observations.columns, observations.kind
    peaks = rates(device, COMPUTE.get(observations.family.partition(".")[2], "bf16"))
    if kind == "gemm":
        flops, moved = 2 * c["m"] * c["n"] * c["k"], c["weight_bytes"]
    elif kind == "experts":
        touched = _expert_load(observations)[0]
        flops, moved = 0.0, 3 * c["hidden"] * c["inner"] * c["number_bytes"] * touched
    elif kind == "decode":
        context = np.where(c["window"] > 0, np.minimum(c["context"], c["window"]), c["context"])
        moved = 2 * c["sequences"] * context * c["kv_heads"] * c["head_dim"] * c["cache_bytes"]
        flops = 4 * c["sequences"] * context * c["heads"] * c["head_dim"]
    elif kind == "prefill":
        pairs = np.where(c["window"] > 0, np.minimum(c["pairs"], 2 * c["window"] * c["tokens"]), c["pairs"])
        flops, moved = 2 * c["heads"] * c["head_dim"] * pairs, 0.0
    elif kind == "latent":
        is_prefill = c["is_prefill"] > 0
        moved = np.where(is_prefill, 0.0, c["sequences"] * c["length"] * (c["latent"] + c["rope"]) * c["cache_bytes"])
        flops = np.where(is_prefill, c["sequences"] * c["length"] ** 2 * c["heads"]
                         * (c["nope"] + c["rope"] + c["value"]), 0.0)
    elif kind == "elementwise":
        flops, moved = 0.0, c["bytes"]
    else:
        wire = WIRE[observations.family.partition(".")[2]] if kind == "nccl" else 1.0
        return wire * (c["ranks"] - 1) / c["ranks"] * c["message_bytes"] / _link(device)
    return np.maximum(flops / peaks.flops, moved / peaks.bytes_per_s) + np.zeros(len(observations))


# ---- one kind each


def _link(device: DeviceSpec) -> float:
    if device.link_bytes_per_s is None:
        raise InputError("device.link_bytes_per_s", None, f"the link of {device.name} is not known",
                         "give it, or leave out tables of collectives")
    return device.link_bytes_per_s


def _by(observations: Observations, *names: str) -> list[tuple[tuple[float, ...], np.ndarray]]:
    """Values of the columns that a form branches on, and the rows that have them."""
    keys = np.stack([observations.columns[name] for name in names], axis=1).astype(np.float64)
    found, inverse = np.unique(keys, axis=0, return_inverse=True)
    return [(tuple(key), np.flatnonzero(inverse.reshape(-1) == i)) for i, key in enumerate(found.tolist())]


def _in_parts(parts: list[tuple[Callable[[Any, dict], Array], np.ndarray]], columns: Mapping[str, np.ndarray],
              names: tuple[str, ...]) -> Model:
    """A model that evaluates each group of rows by its own function and puts the rows in order again."""
    order = np.argsort(np.concatenate([index for _, index in parts]), kind="stable")

    def seconds(kernel, data):
        found = [function(kernel, chunk) for (function, _), chunk in zip(parts, data, strict=True)]
        return jnp.concatenate(found)[order]

    return Model(seconds, [{name: columns[name][index] for name in names} for _, index in parts])


def _gemm(observations: Observations, device: DeviceSpec, record: Efficiency) -> Model:
    peaks = rates(device, COMPUTE[observations.family.partition(".")[2]])

    def seconds(kernel, data):
        return kernel.seconds(data["m"], data["n"], data["k"], data["weight_bytes"], peaks)

    return Model(seconds, dict(observations.columns))


def _expert_load(observations: Observations) -> tuple[np.ndarray, ...]:
    """Distinct local experts, rows routed to them, and tiles of each height, by `EXPERT_ROWS`."""
    c = observations.columns
    if "touched" in c:
        each = np.maximum(c["tokens"] * c["per_token"] / c["touched"], 1)
        return c["touched"], c["touched"] * each, *(c["touched"] * np.ceil(each / t) for t in EXPERT_ROWS)
    names = ("tokens", "num_experts", "per_token", "ranks")
    rows = zip(*(c[name].astype(int).tolist() for name in names), c["law"].tolist(), (c["spread_largest"] > 0).tolist(),
               strict=True)
    return tuple(np.array([loads.tiles(*row) for row in rows]).T)


def _experts(observations: Observations, device: DeviceSpec, record: Efficiency) -> Model:
    c, peaks = observations.columns, rates(device, COMPUTE[observations.family.partition(".")[2]])
    touched, pairs, *blocks = _expert_load(observations)
    data = {name: c[name] for name in ("tokens", "per_token", "hidden", "inner")} | {
        "local_experts": c["num_experts"] / c.get("ranks", 1), "pairs": pairs,
        "weight_bytes": 3 * c["hidden"] * c["inner"] * c["number_bytes"] * touched,
        "blocks": dict(zip(map(str, EXPERT_ROWS), blocks, strict=True))}

    def seconds(kernel, data):
        return kernel.seconds(ExpertLoad(
            data["tokens"], data["pairs"], {t: data["blocks"][str(t)] for t in EXPERT_ROWS}, data["weight_bytes"],
            data["per_token"], data["local_experts"], data["hidden"], data["inner"]), peaks)

    return Model(seconds, data)


def _decode(observations: Observations, device: DeviceSpec, record: Efficiency) -> Model:
    peaks, parts = rates(device), []
    # FlashAttention 2 splits and swaps by the number of heads, which the form decides outside JAX.
    splits_always = record.decode.kernel == "fa3"
    branches = ("cache_bytes", "window") + (() if splits_always else ("heads", "kv_heads"))
    for key, index in _by(observations, *branches):
        def seconds(kernel, c, key=key):
            cached, window, *heads = key
            shape = attend.AttentionShape(*(heads or (c["heads"], c["kv_heads"])), c["head_dim"], cached, int(window))
            n, context = c["sequences"], c["context"]
            full = kernel.fixed_seconds(shape._replace(window=0), n, peaks)
            if not window:
                return full + kernel.slope(shape, n, peaks) * n * context
            fixed = jnp.where(context > window, kernel.fixed_seconds(shape, n, peaks), full)
            return fixed + kernel.slope(shape, n, peaks) * n * jnp.minimum(context, window + attend.WINDOW_TILE)

        parts.append((seconds, index))
    return _in_parts(parts, observations.columns, ("heads", "kv_heads", "head_dim", "sequences", "context"))


def _prefill(observations: Observations, device: DeviceSpec, record: Efficiency) -> Model:
    peaks, parts = rates(device), []
    for key, index in _by(observations, "head_dim", "cache_bytes", "window"):
        def coefficients(kernel, c, key=key):
            head_dim, cached, window = key
            return jax.vmap(lambda heads, kv_heads: kernel.coefficients(attend.AttentionShape(
                heads, kv_heads, int(head_dim), cached, int(window)), peaks))(c["heads"], c["kv_heads"])

        parts.append((coefficients, index))
    shapes = _in_parts(parts, observations.columns, ("heads", "kv_heads"))
    amounts = tuple(observations.columns[name] for name in ("tokens", "chunks", "pairs", "keys", "decodes", "context"))
    return Model(lambda kernel, data: kernel.floor_s + attend.chunk_seconds(shapes.seconds(kernel, data[0]), *data[1]),
                 (shapes.data, amounts))


def _latent(observations: Observations, device: DeviceSpec, record: Efficiency) -> Model:
    peaks, parts, columns = rates(device), [], dict(observations.columns)
    columns["besides"] = _besides_latent(observations, device, record)
    dims = ("latent", "rope", "nope", "value", "hidden")
    for key, index in _by(observations, "is_prefill", "cache_bytes", "narrow", *dims):
        def seconds(kernel, c, key=key):
            is_prefill, cached, narrow, latent, rope, nope, value, hidden = key
            n, length = c["sequences"], c["length"]

            def shape(heads):
                return attend.LatentShape(heads, latent, rope, nope, value, cached, bool(narrow), hidden)

            if not is_prefill:
                found = shape(c["heads"])
                return c["besides"] + kernel.fixed_seconds(found, n, peaks) + kernel.slope(found, n, peaks) * n * length
            coefficients = jax.vmap(lambda heads: kernel.coefficients(shape(heads), peaks))(c["heads"])
            return c["besides"] + kernel.prefill_floor_s + attend.chunk_seconds(
                coefficients, n * length, n, n * length ** 2, n * length, 0 * n, 0 * n)

        parts.append((seconds, index))
    return _in_parts(parts, columns, ("heads", "sequences", "length", "besides"))


def _besides_latent(observations: Observations, device: DeviceSpec, record: Efficiency) -> np.ndarray:
    """Seconds of the projections, and of rotary embedding and cache write as `jaxsim.cost.operators` counts them."""
    c = observations.columns
    tokens = c["sequences"] * np.where(c["is_prefill"] > 0, c["length"], 1.0)
    narrow, total = c["narrow"] > 0, np.zeros(len(observations))
    for family, mask in (("gemm.bf16", ~narrow), ("gemm.fp8_block", narrow)):
        if not mask.any():
            continue
        h = c["heads"]
        for k, n in ((c["hidden"], c["query_rank"] + c["latent"] + c["rope"]),
                     (c["query_rank"], h * (c["nope"] + c["rope"])), (c["latent"], h * (c["nope"] + c["value"])),
                     (h * c["value"], c["hidden"])):
            n, k = n[mask], k[mask]
            product = {"m": tokens[mask], "n": n, "k": k, "weight_bytes": n * k * np.where(narrow, 1.0, 2.0)[mask]}
            total[mask] += predicted(replace(observations, family=family, columns=product, seconds=n, rows=n, files=n),
                                     device, record)
    moved = tokens * (c["heads"] * c["value"] * 2 + 2 * 2 * (c["latent"] + c["rope"]))
    return total + 2 * record.elementwise.floor_s + moved / (device.memory_bytes_per_s * record.elementwise.efficiency)


def _elementwise(observations: Observations, device: DeviceSpec, record: Efficiency) -> Model:
    def seconds(kernel, data):
        return kernel.floor_s * data["kernels"] + data["bytes"] / (device.memory_bytes_per_s * kernel.efficiency)

    return Model(seconds, dict(observations.columns))


def _nccl(observations: Observations, device: DeviceSpec, record: Efficiency) -> Model:
    link = _link(device)
    return Model(lambda kernel, data: kernel.seconds(data["ranks"], data["message_bytes"], link),
                 dict(observations.columns))


def _custom_all_reduce(observations: Observations, device: DeviceSpec, record: Efficiency) -> Model:
    link = _link(device)
    parts = [(lambda kernel, c, ranks=int(key[0]): kernel.seconds(ranks, c["message_bytes"], link), index)
             for key, index in _by(observations, "ranks")]
    return _in_parts(parts, observations.columns, ("message_bytes",))


_MODELS = {"gemm": _gemm, "experts": _experts, "decode": _decode, "prefill": _prefill, "latent": _latent,
           "elementwise": _elementwise, "nccl": _nccl, "custom_all_reduce": _custom_all_reduce}
