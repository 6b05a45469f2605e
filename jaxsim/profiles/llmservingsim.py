"""Layer timings taken inside vLLM by LLMServingSim's profiler: dense, attention, experts, skew, and a meta YAML.

Files (of one model and GPU; a `tp` column where several degrees were measured):
* dense CSV: tp, kind, layer, size, time_us: `dense_tokens` by tokens, `per_sequence` by sequences, one layer each;
* attention Parquet or CSV: tp, prefill_chunk, kv_prefill, n_decode, kv_decode, time_us: one chunk behind kv_prefill
  cached tokens, n_decode sequences of kv_decode KV tokens each;
* experts CSV: tokens, activated_experts, time_us;
* meta YAML: versions, model, GPU, date.

Source: casys-kaist/LLMServingSim, `profiler`.

Known gaps: the timings are eager, without CUDA-graph effects and host work. Skew timings (unequal contexts) are
summarised in `provenance["skew"]`, not used: batch statistics hold no second moment. Routing is forced
when experts are timed, so the router is not in them; the roofline prices it.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from jaxsim._core.errors import InputError, suggest
from jaxsim.cost.profile import OperatorTable, Profile
from jaxsim.profiles import _table

NAME = "llmservingsim"
DENSE = ("kind", "layer", "size", "time_us")
ATTENTION = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
EXPERTS = ("tokens", "activated_experts", "time_us")
SKEW = ("regime", "n", "t_mean_us", "t_max_us", "t_skew_us")

LAYERS = {
    "embedding": ("embedding", 1), "qkv_proj": ("qkv", 1), "o_proj": ("attention_output", 1),
    "rotary_emb": ("rotary_and_cache_write", 1), "layernorm": ("norms", 2), "gate_up_proj": ("ffn_up", 1),
    "down_proj": ("ffn_down", 1), "act_fn": ("ffn_activation", 1), "qk_norm": ("qk_norm", 1),
    "final_layernorm": ("final_norm", 1), "lm_head": ("lm_head", 1), "sampler": ("sampler", 1),
}
"""Their layers: the operator, and how often a layer (or an iteration) makes the call."""


def read(dense: str | Path, attention: str | Path | None = None, experts: str | Path | None = None,
         meta: str | Path | None = None, skew: str | Path | None = None, *, tensor_parallel_size: int = 1,
         model: str = "", device: str = "") -> Profile:
    """One tensor-parallel degree of the given files; `model` and `device` default to what the meta file says."""
    tables = {t.name: t for t in _dense(Path(dense), tensor_parallel_size)}
    if attention is not None:
        tables |= {t.name: t for t in _attention(Path(attention), tensor_parallel_size)}
    if experts is not None:
        tables["experts_touched"] = _experts(Path(experts))
    known = _meta(Path(meta)) if meta is not None else {}
    names = {known[key]: f"{Path(meta).name}, {key}" for key in ("gpu", "hardware") if key in known}
    # The driver's name and the profiler's own: the catalogue may know one of them only.
    names = {name: at for name, at in names.items() if _table.known_device(name)} or dict(list(names.items())[:1])
    files = [Path(p).name for p in (dense, attention, experts, meta, skew) if p is not None]
    provenance = {"format": NAME, "files": files, "licence": "MIT (casys-kaist/LLMServingSim)", "execution": "eager",
                  **{k: known[k] for k in ("vllm_version", "cuda_version", "profiled_at", "profiler_version")
                     if k in known}}
    if skew is not None:
        provenance["skew"] = _skew(Path(skew), tensor_parallel_size)
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(known.get("variant", ""), known.get("variant", "auto"))
    return Profile(tables, model or known.get("model", ""), device or _table.one_device(names),
                   tensor_parallel_size, dtype=dtype, provenance=provenance)


def _degree(frame: pd.DataFrame, path: Path, tensor_parallel_size: int) -> pd.DataFrame:
    return _table.select(frame, path, tp=tensor_parallel_size) if "tp" in frame else frame


def _dense(path: Path, tensor_parallel_size: int) -> list[OperatorTable]:
    frame = _degree(_table.read(path, DENSE, ["tp"]), path, tensor_parallel_size)
    unknown = frame[~frame["layer"].isin(list(LAYERS))]
    if len(unknown):
        raise InputError(f"profile {path.name} row {unknown.index[0]}, layer", unknown["layer"].iloc[0],
                         "is not a layer of this format", suggest(unknown["layer"].iloc[0], LAYERS))
    tables = []
    for layer, rows in frame.groupby("layer", sort=False):
        name, calls = LAYERS[layer]
        # The last norm is timed by tokens, but an iteration applies it to sampled rows: the same count of rows.
        size = _table.numbers(rows, "size", path, is_count=True)
        tables.append(_table.table(name, rows, [size], calls * _table.times(rows, path, ["time_us"]), path))
    return tables


def _attention(path: Path, tensor_parallel_size: int) -> list[OperatorTable]:
    frame = _degree(_table.read(path, ATTENTION, ["tp"]), path, tensor_parallel_size)
    columns = {name: _table.numbers(frame, name, path, is_count=True) for name in ATTENTION[:4]}
    chunk, history, count, context = columns.values()
    seconds = _table.times(frame, path, ["time_us"])
    keys = 2 * history + chunk
    kinds = {"attention_decode": ((chunk == 0) & (count > 0), (count, context)),
             "attention_prefill": ((chunk > 0) & (count == 0), (chunk, keys)),
             "attention_mixed": ((chunk > 0) & (count > 0), (chunk, keys, count, context))}
    return [_table.table(name, frame[rows], [axis[rows] for axis in axes], seconds[rows], path)
            for name, (rows, axes) in kinds.items() if rows.any()]


def _experts(path: Path) -> OperatorTable:
    frame = _table.read(path, EXPERTS, ["tp"])
    axes = [_table.numbers(frame, name, path, is_count=True) for name in EXPERTS[:2]]
    return _table.table("experts_touched", frame, axes, _table.times(frame, path, ["time_us"]), path)


def _skew(path: Path, tensor_parallel_size: int) -> dict[str, float]:
    """What unequal contexts cost: median ratio to an even batch of the same sum, decode-only and mixed."""
    frame = _degree(_table.read(path, SKEW), path, tensor_parallel_size)
    even, uneven = (_table.numbers(frame, name, path) for name in ("t_mean_us", "t_skew_us"))
    return {f"{regime}_ratio": float(np.median((uneven / even)[(frame["regime"] == regime).to_numpy()]))
            for regime in frame["regime"].unique().tolist()}


def _meta(path: Path) -> dict[str, str]:
    """The top-level scalars of the YAML file, which is all that is wanted of it."""
    found = {}
    try:
        text = _table.as_path(path).read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError("profile", str(path), f"cannot be read as text ({error})", "give the YAML file") from None
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        value = value.partition(" #")[0].strip()
        if colon and key == key.strip() and key and not key.startswith(("#", "-")) and value:
            found[key] = value.strip("'\"")
    if not {"model", "gpu", "hardware"} & set(found):
        raise InputError("profile", str(path), "says neither model nor gpu nor hardware",
                         "give the profiler's meta.yaml, or leave it out")
    return found
