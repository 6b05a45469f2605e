"""Operator tables of a device as observations by family; what cannot be measurements is refused with its row.

    aiconfigurator  kernel tables of many shapes: gemm, context_attention, generation_attention, moe, custom_allreduce,
                    nccl, mla_context, mla_generation (files of ai-dynamo/aiconfigurator, any time column)
    llmservingsim, vidur, plain    layers of one model (`jaxsim.profiles`), given with it
    profile         files written by `jaxsim import-profile`, each with its own model

Source: formats of the readers in `jaxsim.profiles`.

Known gaps: DeepEP tables; latent attention, windowed layers and host overheads in profiles of layers; expert layers of
profiles only where the experts that were touched are known (or routing is uniform over one rank).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsim._core.errors import InputError, suggest
from jaxsim.calibrate import families
from jaxsim.calibrate.families import Observations
from jaxsim.cost import operators
from jaxsim.cost.collectives import CUSTOM_RANKS
from jaxsim.cost.profile import SHORTEST_S, OperatorTable, Profile
from jaxsim.cost.profile_checks import check_device
from jaxsim.profiles import _table, importing, native
from jaxsim.spec.device import DeviceSpec, device_catalogue, load_device
from jaxsim.spec.model import ModelSpec, load_model
from jaxsim.spec.plan import Plan

AICONFIGURATOR, PROFILE = "aiconfigurator", "profile"
FORMATS = (AICONFIGURATOR, PROFILE, *sorted(set(importing.READERS) - {AICONFIGURATOR}))

_ALWAYS = ("device", "framework", "kernel_source", "op_name", "power_w", "version", "model", "tp_size", "attn_dtype",
           *_table.UNITS)
_ATTENTION = ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "kv_cache_dtype", "step")
_LATENT = ("kv_cache_dtype", "gemm_type", "num_heads", "batch_size", "isl", "step")
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gemm": (("gemm_dtype", "m", "n", "k"), ()),
    "context_attention": (_ATTENTION, ("window_size",)),
    "generation_attention": (_ATTENTION, ("window_size",)),
    "moe": (("moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size",
             "moe_ep_size", "distribution"), ()),
    "custom_allreduce": (("num_gpus", "message_size"), ("allreduce_dtype", "backend")),
    "nccl": (("op_name", "nccl_dtype", "num_gpus", "message_size"), ()),
    "mla_context": (_LATENT, ()), "mla_generation": (_LATENT, ()),
}
"""Columns of an aiconfigurator table by role: those needed, those that may be there (besides device, times, ...)."""

FORMATS_OF_NUMBERS = {"bfloat16": "bf16", "float16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "int4_wo": "int4",
                      "w4a16_mxfp4": "mxfp4"}
"""Names of number formats there, and of sections here."""

NUMBER_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "int4": 0.53, "mxfp4": 0.53125}
"""Of a weight, scales included."""

ELEMENT_BYTES = {"half": 2.0, "bfloat16": 2.0, "float16": 2.0, "float": 4.0, "float32": 4.0, "int8": 1.0, "fp8": 1.0}

LEAST_OF_PEAK = 0.2
"""A table whose median row takes less than this share of the time at datasheet peaks is in another unit."""

CHECKED_ROWS = 400

CACHED_BYTES = 1 << 20
"""Elementwise kernels that move more are not used: timed again and again they find their data in the L2 cache, which
they do not in an engine. So the tables tell the floor of such kernels and not their bandwidth."""

CACHED = f"elementwise kernels that move more than {CACHED_BYTES >> 20} MiB, from the cache"

DEEPSEEK = "deepseek-ai/DeepSeek-V3"


class Tables(NamedTuple):
    """What was read. digests: SHA-256 by file name; notes: what a reader of the report should know."""

    observations: tuple[Observations, ...]
    digests: Mapping[str, str]
    notes: tuple[str, ...]


def read(format: str, files: Iterable[str | Path], device: DeviceSpec, *, model: ModelSpec | str | None = None,
         plan: Plan | None = None) -> Tables:
    """Tables of one format, of one device, as observations by family.

    files: paths, or "role=path" where a name does not tell what the table holds. model, plan: of profiles of layers.
    Raises `InputError` with file, row, value and remedy.
    """
    if format not in FORMATS:
        raise InputError("calibration format", format, "is not known", suggest(format, FORMATS))
    files = [str(f) for f in files]
    if not files:
        raise InputError("calibration tables", [], "no file is given", "give at least one")
    notes: list[str] = []
    if format == AICONFIGURATOR:
        sheets = [_role(file) for file in files]
        digests = _table.digests([path for _, path in sheets], "calibration table")
        found = [o for role, path in sheets for o in _aiconfigurator(role, path, device, notes)]
    else:
        digests, found = _profiles(format, files, device, model, plan, notes)
    merged: dict[str, Observations] = {}
    for o in found:
        merged[o.family] = merged[o.family].joined(o) if o.family in merged else o
    if not merged:
        raise InputError("calibration tables", list(digests), "hold no rows that a form is for",
                         "; ".join(notes) or "give operator tables")
    for o in merged.values():
        check_units(o, device)
    return Tables(tuple(merged.values()), digests, tuple(notes))


def check_units(observations: Observations, device: DeviceSpec) -> None:
    """Refuse rows that are shorter than any kernel, and a table faster than the device can be. Raises `InputError`."""
    o = observations
    if o.seconds.min() < SHORTEST_S:
        at = int(np.argmin(o.seconds))
        raise InputError(f"{o.place(at)}, seconds", float(o.seconds[at]), "is shorter than any kernel",
                         "check the unit of the time column (ns, us, ms, s): is it off by 1000?")
    o = o.sample(CHECKED_ROWS)
    ratio = o.seconds / np.maximum(families.least_seconds(o, device), 1e-12)
    if (middle := float(np.median(ratio))) < LEAST_OF_PEAK:
        at = int(np.argmin(np.abs(ratio - middle)))
        raise InputError(f"{o.place(at)}, seconds", float(o.seconds[at]),
                         f"is {middle:.2g} times what the datasheet peaks of {device.name} allow, as is half of"
                         f" {o.family}", "the unit looks wrong: check the time column (ns, us, ms, s) and the device")


# ---- aiconfigurator


def _role(file: str) -> tuple[str, Path]:
    roles = importing.ROLES[AICONFIGURATOR]
    name, equals, path = file.partition("=")
    if equals and name in roles:
        return name, _table.as_path(path)
    low = Path(file).name.lower()
    for role, parts in roles.items():
        if any(part in low for part in parts):
            return role, _table.as_path(file)
    raise InputError("calibration table", file, "its name does not tell which table it is",
                     f"write ROLE={file}, with ROLE one of {', '.join(sorted(roles))}")


class _Sheet:
    """A table of one role: checked columns, and the rows that are still wanted."""

    def __init__(self, role: str, path: Path, device: DeviceSpec):
        needed, optional = COLUMNS[role]
        self.path = path
        self.frame = _table.read(path, needed, (*optional, *_ALWAYS))
        self.left_out: dict[str, int] = {}
        seconds = _table.times(self.frame, path)
        if (seconds <= 0).any():
            at = int(np.argmax(seconds <= 0))
            raise InputError(f"{path.name} row {at + 1}, time", float(seconds[at]), "is not positive",
                             "fix or remove that row")
        self.frame = self.frame.assign(_seconds=seconds)
        self._check_device(device)

    def _check_device(self, device: DeviceSpec) -> None:
        if "device" not in self.frame:
            return
        for name, rows in self.frame.groupby("device", sort=False):
            try:
                known = load_device(str(name)).name
            except InputError:
                continue
            if known != device.name and device.name in device_catalogue():
                raise InputError(f"{self.path.name} row {rows.index[0]}, device", name,
                                 f"is {known}, not {device.name}", "give tables of one device, or change --device")

    def text(self, name: str) -> np.ndarray:
        return self.frame[name].astype(str).to_numpy()

    def count(self, name: str, least: int = 1) -> np.ndarray:
        """A column of whole numbers."""
        found = _table.numbers(self.frame, name, self.path, is_count=True)
        if (found < least).any():
            at = int(np.argmax(found < least))
            raise InputError(f"{self.path.name} row {self.frame.index[at]}, {name}", float(found[at]),
                             f"is less than {least}", "fix or remove that row")
        return found

    def keep(self, wanted: np.ndarray, reason: str) -> "_Sheet":
        """Only the wanted rows."""
        dropped = int((~wanted).sum())
        if dropped:
            self.left_out[reason] = self.left_out.get(reason, 0) + dropped
            self.frame = self.frame[wanted]
        return self

    def observations(self, family: str | np.ndarray, columns: Mapping[str, np.ndarray]) -> list[Observations]:
        """The rows as families; a family for all, or one a row ("" = none)."""
        rows, seconds = self.frame.index.to_numpy(), self.frame["_seconds"].to_numpy()
        names = np.full(len(rows), family) if isinstance(family, str) else family
        whole = Observations("", columns, seconds, rows, np.full(len(rows), self.path.name, object), self.left_out)
        found = []
        for name in dict.fromkeys(names.tolist()):
            if name:
                part = whole.take(names == name)
                found.append(Observations(name, part.columns, part.seconds, part.rows, part.files, self.left_out))
        return found


def _aiconfigurator(role: str, path: Path, device: DeviceSpec, notes: list[str]) -> list[Observations]:
    sheet = _Sheet(role, path, device)
    found = _ROLES[role](sheet, device)
    notes += [f"{path.name}: {count:,} rows left out: {reason}" for reason, count in sheet.left_out.items()]
    return found


def _named(sheet: _Sheet, kind: str, column: str, device: DeviceSpec) -> np.ndarray:
    """Family of each row by its number format; rows of formats without a form go."""
    sections = getattr(device.kernel_efficiency(), kind)
    names = sheet.text(column)
    for name in dict.fromkeys(names.tolist()):
        if FORMATS_OF_NUMBERS.get(name) not in sections:
            sheet.keep(sheet.text(column) != name, f"no form for {column} {name}")
    return np.array([FORMATS_OF_NUMBERS[name] for name in sheet.text(column)], object)


def _gemm(sheet: _Sheet, device: DeviceSpec) -> list[Observations]:
    formats = _named(sheet, "gemm", "gemm_dtype", device)
    m, n, k = (sheet.count(name) for name in "mnk")
    weights = n * k * np.array([NUMBER_BYTES[f] for f in formats], np.float64)
    return sheet.observations("gemm." + formats, {"m": m, "n": n, "k": k, "weight_bytes": weights})


def _shape(sheet: _Sheet) -> dict[str, np.ndarray]:
    window = sheet.count("window_size", 0) if "window_size" in sheet.frame else np.zeros(len(sheet.frame))
    return {"heads": sheet.count("num_heads"), "kv_heads": sheet.count("num_key_value_heads"),
            "head_dim": sheet.count("head_dim"), "cache_bytes": _cache_bytes(sheet), "window": window}


def _cache_bytes(sheet: _Sheet) -> np.ndarray:
    return np.where(np.char.startswith(sheet.text("kv_cache_dtype").astype(str), "fp8"), 1.0, 2.0)


H200_WINDOW = "the harness did not apply the window (its rows take as long as those of full attention)"


def _is_h200(device: DeviceSpec) -> bool:
    return device.name.startswith("h200")


def _generation(sheet: _Sheet, device: DeviceSpec) -> list[Observations]:
    if _is_h200(device) and "window_size" in sheet.frame:
        sheet.keep(sheet.count("window_size", 0) == 0, H200_WINDOW)
        sheet.keep(sheet.count("num_key_value_heads") == 8,
                   "the harness set the number of KV splits as if there were 8 KV heads")
    return sheet.observations("decode", {**_shape(sheet), "sequences": sheet.count("batch_size"),
                                         "context": sheet.count("step", 0) + 1})


def _context(sheet: _Sheet, device: DeviceSpec) -> list[Observations]:
    sheet.keep(sheet.count("isl") > 1, "prompts of one token")
    if _is_h200(device) and "window_size" in sheet.frame:
        sheet.keep(sheet.count("window_size", 0) == 0, H200_WINDOW)
        sheet.keep(sheet.count("num_heads") == 2 * sheet.count("num_key_value_heads"),
                   "the harness set the query heads wrongly but where there are two for a KV head (a layer gets"
                   " faster with more of them)")
    count, new, history = sheet.count("batch_size"), sheet.count("isl"), sheet.count("step", 0)
    ends, zero = history + new, np.zeros(len(sheet.frame))
    return sheet.observations("prefill", {
        **_shape(sheet), "tokens": count * new, "chunks": count, "pairs": count * (ends ** 2 - history ** 2),
        "keys": count * ends, "decodes": zero, "context": zero})


def _experts(sheet: _Sheet, device: DeviceSpec) -> list[Observations]:
    formats = _named(sheet, "experts", "moe_dtype", device)
    whole = (sheet.count("num_experts") % sheet.count("moe_ep_size") == 0) & (
        sheet.count("inter_size") % sheet.count("moe_tp_size") == 0)
    sheet.keep(whole, "experts that do not divide among the ranks")
    laws = sheet.text("distribution")
    is_known = np.array([law == "balanced" or law.startswith("power_law_") for law in laws], bool)
    sheet.keep(is_known, "an unknown law of expert load")
    formats = formats[whole][is_known]
    is_cut = ~((formats == "mxfp4") & (sheet.count("moe_ep_size") > 1))
    sheet.keep(is_cut, "the harness ignored expert parallelism for mxfp4 (all degrees take the time of one rank)")
    formats = formats[is_cut]
    num_experts, inner = sheet.count("num_experts"), sheet.count("inter_size") / sheet.count("moe_tp_size")
    records = device.kernel_efficiency().experts
    local = num_experts / sheet.count("moe_ep_size")
    names = np.array([_tuned(records, f, e, i) for f, e, i in zip(formats, local, inner, strict=True)], object)
    return sheet.observations("experts." + names, {
        "tokens": sheet.count("num_tokens"), "per_token": sheet.count("topk"), "num_experts": num_experts,
        "hidden": sheet.count("hidden_size"), "inner": inner, "ranks": sheet.count("moe_ep_size"),
        "law": sheet.text("distribution").astype(object),
        "number_bytes": np.array([NUMBER_BYTES[f] for f in formats], np.float64),
        # The generator of the A100's tables (vLLM 0.14) is an older one.
        "spread_largest": np.full(len(sheet.frame), float(device.name.startswith("a100")))})


def _tuned(records: Mapping, name: str, local_experts: float, inner: float) -> str:
    tuned = records.get(name + "_tuned")
    return name + "_tuned" if tuned and (local_experts, inner) in tuned.configs else name


def _custom_all_reduce(sheet: _Sheet, device: DeviceSpec) -> list[Observations]:
    if "backend" in sheet.frame:
        is_graph = np.array(["graph" in name for name in sheet.text("backend")])
        sheet.keep(is_graph, "eager calls, which time the launch on the host")
    sheet.keep(np.isin(sheet.count("num_gpus"), CUSTOM_RANKS), f"ranks that are not {CUSTOM_RANKS}")
    width = _widths(sheet, "allreduce_dtype") if "allreduce_dtype" in sheet.frame else 2.0
    return sheet.observations("custom_all_reduce", {
        "ranks": sheet.count("num_gpus"), "message_bytes": sheet.count("message_size") * width})


def _nccl(sheet: _Sheet, device: DeviceSpec) -> list[Observations]:
    sections = device.kernel_efficiency().nccl
    for name in dict.fromkeys(sheet.text("op_name").tolist()):
        if _COLLECTIVES.get(name, name) not in sections:
            sheet.keep(sheet.text("op_name") != name, f"no form for {name}")
    sheet.keep(sheet.count("num_gpus") > 1, "one rank")
    names = np.array(["nccl." + _COLLECTIVES.get(name, name) for name in sheet.text("op_name")], object)
    return sheet.observations(names, {
        "ranks": sheet.count("num_gpus"), "message_bytes": sheet.count("message_size") * _widths(sheet, "nccl_dtype")})


_COLLECTIVES = {"alltoall": "all_to_all"}


def _widths(sheet: _Sheet, column: str) -> np.ndarray:
    names = sheet.text(column)
    for row, name in zip(sheet.frame.index, names, strict=True):
        if name not in ELEMENT_BYTES:
            raise InputError(f"{sheet.path.name} row {row}, {column}", name, "is not a number format",
                             suggest(name, ELEMENT_BYTES))
    return np.array([ELEMENT_BYTES[name] for name in names])


def _latent(is_prefill: bool) -> Callable[[_Sheet, DeviceSpec], list[Observations]]:
    def rows(sheet: _Sheet, device: DeviceSpec) -> list[Observations]:
        if is_prefill:
            sheet.keep(sheet.count("isl") >= 16, "prompts of fewer than 16 tokens")
        if "model" in sheet.frame:
            name = _table.only(sheet.frame, "model", sheet.path, "one model a table: model")
        else:
            name = DEEPSEEK
        model = load_model(name)
        many = {"latent": model.kv_lora_rank, "rope": model.qk_rope_head_dim, "nope": model.qk_nope_head_dim,
                "value": model.v_head_dim, "query_rank": model.q_lora_rank or model.hidden, "hidden": model.hidden,
                "is_prefill": is_prefill}
        return sheet.observations("latent", {
            "heads": sheet.count("num_heads"), "cache_bytes": _cache_bytes(sheet),
            "narrow": (sheet.text("gemm_type") != "bfloat16").astype(float), "sequences": sheet.count("batch_size"),
            "length": sheet.count("isl") if is_prefill else np.maximum(sheet.count("step", 0), 1),
            **{key: np.full(len(sheet.frame), float(value)) for key, value in many.items()}})

    return rows


_ROLES = {"gemm": _gemm, "context_attention": _context, "generation_attention": _generation, "moe": _experts,
          "custom_allreduce": _custom_all_reduce, "nccl": _nccl, "mla_context": _latent(True),
          "mla_generation": _latent(False)}


# ---- profiles of layers


def _profiles(format: str, files: list[str], device: DeviceSpec, model: ModelSpec | str | None, plan: Plan | None,
              notes: list[str]) -> tuple[dict[str, str], list[Observations]]:
    """Digests of the files, and their rows."""
    if format == PROFILE:
        paths = [_table.as_path(file) for file in files]
        digests, profiles = _table.digests(paths, "calibration table"), []
        for path in paths:
            profile = native.read(path)
            check_device(profile, device)
            base = importing.base_of(profile, load_model(profile.model), device,
                                     Plan(tensor_parallel_size=profile.tensor_parallel_size))
            profiles.append((profile, base))
    else:
        if model is None:
            raise InputError("--model", None, f"is needed to know the shapes in tables of the format {format}",
                             "give the model whose layers were timed")
        profile = importing.import_profile(format, files, model=model, device=device, plan=plan)
        base = importing.base_of(profile, load_model(profile.model) if isinstance(model, str) else model, device,
                                 plan or Plan())
        digests, profiles = profile.provenance["sha256"], [(profile, base)]
        notes += profile.provenance.get("notes", [])
    found = []
    for profile, base in profiles:
        for table in profile.tables.values():
            made = _layer(table, base, profile)
            if made is None:
                notes.append(f"{table.source}: {len(table.seconds):,} rows left out: no form is fitted to {table.name}")
            else:
                found.append(made)
                notes += [f"{table.source}, {table.name}: {count:,} rows left out: {reason}"
                          for reason, count in made.left_out.items() if count]
    return digests, found


def _layer(table: OperatorTable, base, profile: Profile) -> Observations | None:
    """One operator of a profile; None where no form is fitted to it."""
    places = [table.place(i).rpartition("row ")[2] for i in range(len(table.seconds))]

    def made(family, **columns):
        columns = {k: np.broadcast_to(np.asarray(v, np.float64), table.seconds.shape).copy()
                   for k, v in columns.items()}
        return Observations(family, columns, table.seconds, np.array(places, object),
                            np.full(len(places), table.source, object), {})

    def small(found):
        kept = found.columns["bytes"] <= CACHED_BYTES
        return replace(found.take(kept), left_out={CACHED: int((~kept).sum())}) if kept.any() else None

    points = table.points.T
    if table.name in _CHUNKS:
        shape = base.attention_shape()
        common = {"heads": shape.heads, "kv_heads": getattr(shape, "kv_heads", 0), "window": 0.0,
                  "head_dim": base.model.head_dim, "cache_bytes": shape.cache_bytes}
        if base.model.is_mla:
            return None
        if table.name == "attention_decode":
            return made("decode", **common, sequences=points[0], context=points[1])
        tokens, keys, *decoding = points
        # Shorter keys than tokens: equal chunks without history. Otherwise one chunk behind (keys - tokens) / 2.
        chunks = np.maximum(tokens / keys, 1.0)
        decodes, context = decoding or (0.0, 0.0)
        return made("prefill", **common, tokens=tokens, chunks=chunks, pairs=tokens * keys,
                    keys=np.where(chunks > 1, tokens, (keys + tokens) / 2), decodes=decodes, context=decodes * context)
    if table.name == "experts_touched":
        model, rank = base.model, base.model.rank_shape(base.plan.tensor_parallel_size, base.plan.expert_ranks)
        if not model.gated:
            return None
        family = "experts." + _section(base, "experts")
        return made(family, tokens=points[0], touched=points[1], per_token=model.experts_per_token,
                    num_experts=model.experts, hidden=model.hidden, inner=rank.moe_ffn,
                    number_bytes=base.weights.expert_bytes)
    count = jnp.asarray(points[0], float)
    works = {w.name: w for w in base.token_works(count) + base.sampled_works(count)}
    work = works.get(table.name)
    if table.name == "all_reduce":
        ranks = base.plan.tensor_parallel_size
        return made("custom_all_reduce", ranks=ranks, message_bytes=points[0]) if ranks in CUSTOM_RANKS else None
    if work is None or table.name in ("embedding", "sampler"):
        return None
    if work.kind == operators.GEMM:
        _, n, k = work.shape
        family = "gemm." + (_section(base, "gemm") if work.is_linear else "bf16")
        return made(family, m=points[0], n=n, k=k, weight_bytes=work.weight_bytes)
    if work.kind == operators.ELEMENTWISE:
        return small(made("elementwise", kernels=work.kernels, bytes=work.weight_bytes + work.activation_bytes))
    return None


_CHUNKS = ("attention_decode", "attention_prefill", "attention_mixed")


def _section(base, kind: str) -> str:
    """Section of the model's number format, as `roofline` picks it."""
    name = base.weights.name
    return {"bfloat16": "bf16", "float16": "bf16"}.get(name, base.weights.kernel or name)
