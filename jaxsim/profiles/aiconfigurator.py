"""NVIDIA aiconfigurator's operator tables: GEMM, attention, experts, collectives and MLA modules of one GPU and engine.

Every family is one Parquet (or CSV) file with `latency_ms`; the model and the parallel plan select the rows:
* gemm: gemm_dtype, m, n, k; shapes that were not measured are interpolated between n and k of the same m;
* context_attention: batch_size prompts of isl tokens, one layer; generation_attention: batch_size sequences behind
  `step` tokens; heads are those of one rank;
* moe: the fused expert block of one layer on one rank, for a law of expert load (`distribution`);
* custom_allreduce, nccl: message_size in elements of 2 bytes;
* mla_context, mla_generation: attention of MLA with its projections.

Source: ai-dynamo/aiconfigurator, `systems/data`.

Known gaps: history behind prompt chunks was not measured (step 0 throughout), nor batches of both kinds; the first is
scaled by the roofline, the second adds up. DeepEP tables are not read.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from jaxsim._core.errors import InputError
from jaxsim.cost.profile import OperatorTable, Profile, interpolate
from jaxsim.profiles import _table
from jaxsim.spec.model import ModelSpec, load_model
from jaxsim.spec.plan import Plan

NAME = "aiconfigurator"
ELEMENT_BYTES = 2
_ANY = ("device", "framework", "kernel_source", "latency_ms", "op_name", "power_w", "version")
_ATTENTION = ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "kv_cache_dtype", "step",
              "latency_ms")
_LATENT = ("kv_cache_dtype", "gemm_type", "num_heads", "batch_size", "isl", "step", "latency_ms")
_MOE = ("moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size",
        "distribution", "latency_ms")


def read(model: ModelSpec | str, plan: Plan | None = None, *, gemm: str | Path | None = None,
         context_attention: str | Path | None = None, generation_attention: str | Path | None = None,
         moe: str | Path | None = None, custom_allreduce: str | Path | None = None, nccl: str | Path | None = None,
         mla_context: str | Path | None = None, mla_generation: str | Path | None = None,
         dtype: str = "bfloat16", kv_dtype: str = "bfloat16", distribution: str = "power_law_1.01",
         backend: str = "vllm_graph") -> Profile:
    """The tables of `model` under `plan`, from whichever families are given.

    dtype: of GEMMs and experts as the files name it; head and router stay bfloat16. backend: "vllm_graph" or
    "vllm_eager", of the custom all-reduce, which goes before NCCL's.
    """
    model = load_model(model) if isinstance(model, str) else model
    plan = (plan or Plan()).check(model)
    tables: list[OperatorTable] = []
    notes: dict[str, object] = {}
    if gemm is not None:
        tables += _gemms(Path(gemm), model, plan, dtype, has_latent=mla_context is not None, notes=notes)
    if context_attention is not None and not model.is_mla:
        tables += _context(Path(context_attention), model, plan, kv_dtype)
    if generation_attention is not None and not model.is_mla:
        tables += _generation(Path(generation_attention), model, plan, kv_dtype)
    if model.is_mla and (mla_context is None) != (mla_generation is None):
        raise InputError("profile mla", mla_context or mla_generation, "is one of two modules",
                         "give both mla_context and mla_generation")
    if model.is_mla and mla_context is not None:
        tables += _latent(Path(mla_context), Path(mla_generation), model, plan, dtype, kv_dtype)
    if moe is not None and model.experts:
        tables.append(_experts(Path(moe), model, plan, dtype, distribution))
    if nccl is not None:
        tables += _nccl(Path(nccl), plan)
    if custom_allreduce is not None and plan.tensor_parallel_size > 1:
        tables.append(_all_reduce(Path(custom_allreduce), plan, backend))
    files = [p for p in (gemm, context_attention, generation_attention, moe, custom_allreduce, nccl, mla_context,
                         mla_generation) if p is not None]
    if not files:
        raise InputError("profile", None, "no file is given", "give at least one family, such as gemm=")
    provenance = {"format": NAME, "files": [Path(p).name for p in files], "distribution": distribution,
                  "licence": "Apache-2.0 (ai-dynamo/aiconfigurator)", **notes}
    return Profile({t.name: t for t in tables}, model.name, _device(files), plan.tensor_parallel_size,
                   plan.expert_ranks, dtype, kv_dtype, provenance)


def _device(files: list[str | Path]) -> str:
    """The one device that all rows of all files are of; "" where none says. Raises `InputError`."""
    names: dict[str, str] = {}
    for path in files:
        frame = _table.read(path, [])
        for name in frame["device"].dropna().unique() if "device" in frame else ():
            names.setdefault(str(name), Path(path).name)
    return _table.one_device(names)


def _shapes(model: ModelSpec, plan: Plan, has_latent: bool) -> dict[str, tuple[float, int, bool]]:
    """Columns n and rows k of each product on one rank, and whether it is quantised."""
    d, rank = model.hidden, model.rank_shape(plan.tensor_parallel_size, plan.expert_ranks)
    shapes: dict[str, tuple[float, int, bool]] = {"lm_head": (rank.vocab, d, False)}
    gates = 2 if model.gated else 1
    if not model.is_mla:
        shapes["qkv"] = ((rank.heads + 2 * rank.kv_heads) * model.head_dim, d, True)
        shapes["attention_output"] = (d, rank.heads * model.head_dim, True)
    elif not has_latent:
        qk = model.qk_nope_head_dim + model.qk_rope_head_dim
        shapes["latent_down"] = (model.q_lora_rank + model.kv_lora_rank + model.qk_rope_head_dim, d, True)
        shapes["query_up"] = (rank.heads * qk, model.q_lora_rank or d, True)
        shapes["latent_up"] = (rank.heads * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank, True)
        shapes["attention_output"] = (d, rank.heads * model.v_head_dim, True)
    if model.num_dense_layers:
        shapes["ffn_up"] = (gates * rank.ffn, d, True)
        shapes["ffn_down"] = (d, rank.ffn, True)
    if model.num_moe_layers:
        shapes["router"] = (model.experts, d, False)
    if model.shared_experts:
        inner = model.shared_experts * model.moe_ffn // plan.tensor_parallel_size
        shapes["shared_expert_up"] = (gates * inner, d, True)
        shapes["shared_expert_down"] = (d, inner, True)
    return shapes


def _gemms(path: Path, model: ModelSpec, plan: Plan, dtype: str, has_latent: bool, notes: dict
           ) -> list[OperatorTable]:
    everything = _table.read(path, ["gemm_dtype", "m", "n", "k", "latency_ms"], _ANY)
    read = {}
    for name in {dtype, "bfloat16"}:
        frame = _table.select(everything, path, gemm_dtype=name)
        points = np.stack([_table.numbers(frame, c, path, is_count=True) for c in ("m", "k", "n")], axis=1)
        read[name] = points, _table.times(frame, path, ["latency_ms"])
    tables = []
    for name, (n, k, is_quantised) in _shapes(model, plan, has_latent).items():
        points, seconds = read[dtype if is_quantised else "bfloat16"]
        rows = np.unique(points[:, 0])
        found = interpolate(points, seconds, [rows, [k], [n]], lambda m, k, n: m * k * n)
        if found.outside_s.any():
            notes.setdefault("extrapolated_shapes", {})[name] = [int(n), int(k)]
        tables.append(OperatorTable(name, rows[:, None], found.seconds[:, 0, 0], path.name))
    return tables


def _heads(model: ModelSpec, plan: Plan) -> dict[str, int]:
    rank = model.rank_shape(plan.tensor_parallel_size)
    return {"num_heads": rank.heads, "num_key_value_heads": rank.kv_heads, "head_dim": model.head_dim}


def _windows(frame: pd.DataFrame, path: Path, model: ModelSpec) -> list[tuple[str, pd.DataFrame]]:
    """Full layers, and windowed ones where the window was measured. Older files have no windows at all."""
    if "window_size" not in frame:
        return [("", frame)]
    found = [("", _table.select(frame, path, window_size=0))]
    if model.window_layers and (frame["window_size"] == model.sliding_window).any():
        found.append(("_windowed", _table.select(frame, path, window_size=model.sliding_window)))
    return found


def _context(path: Path, model: ModelSpec, plan: Plan, kv_dtype: str) -> list[OperatorTable]:
    frame = _table.read(path, _ATTENTION, [*_ANY, "attn_dtype", "beam_width", "window_size"])
    frame = _table.select(frame, path, kv_cache_dtype=kv_dtype, **_heads(model, plan))
    return [_chunks("attention_prefill" + suffix, rows, path) for suffix, rows in _windows(frame, path, model)]


def _chunks(name: str, frame: pd.DataFrame, path: Path) -> OperatorTable:
    batch, prompt, history = (_table.numbers(frame, c, path, is_count=True) for c in ("batch_size", "isl", "step"))
    return _table.table(name, frame, [batch * prompt, 2 * history + prompt], _table.times(frame, path, ["latency_ms"]),
                        path)


def _generation(path: Path, model: ModelSpec, plan: Plan, kv_dtype: str) -> list[OperatorTable]:
    frame = _table.read(path, _ATTENTION, [*_ANY, "attn_dtype", "beam_width", "window_size"])
    frame = _table.select(frame, path, kv_cache_dtype=kv_dtype, **_heads(model, plan))
    tables = []
    for suffix, rows in _windows(frame, path, model):
        batch, step = (_table.numbers(rows, c, path, is_count=True) for c in ("batch_size", "step"))
        tables.append(_table.table("attention_decode" + suffix, rows, [batch, step + 1],
                                   _table.times(rows, path, ["latency_ms"]), path))
    return tables


def _latent(context: Path, generation: Path, model: ModelSpec, plan: Plan, dtype: str, kv_dtype: str
            ) -> list[OperatorTable]:
    wanted = {"kv_cache_dtype": kv_dtype, "gemm_type": dtype,
              "num_heads": model.rank_shape(plan.tensor_parallel_size).heads}
    allowed = [*_ANY, "model", "tp_size"]
    prompts = _table.select(_table.read(context, _LATENT, allowed), context, **wanted)
    decodes = _table.select(_table.read(generation, _LATENT, allowed), generation, **wanted)
    batch, step = (_table.numbers(decodes, c, generation, is_count=True) for c in ("batch_size", "step"))
    return [_chunks("latent_prefill", prompts, context),
            _table.table("latent_decode", decodes, [batch, step], _table.times(decodes, generation, ["latency_ms"]),
                         generation)]


def _experts(path: Path, model: ModelSpec, plan: Plan, dtype: str, distribution: str) -> OperatorTable:
    frame = _table.read(path, _MOE, _ANY)
    frame = _table.select(frame, path, moe_dtype=dtype, hidden_size=model.hidden, inter_size=model.moe_ffn,
                          topk=model.experts_per_token, num_experts=model.experts, moe_ep_size=plan.expert_ranks,
                          moe_tp_size=1 if plan.enable_expert_parallel else plan.tensor_parallel_size,
                          distribution=distribution)
    return _table.table("experts", frame, [_table.numbers(frame, "num_tokens", path, is_count=True)],
                        _table.times(frame, path, ["latency_ms"]), path)


def _all_reduce(path: Path, plan: Plan, backend: str) -> OperatorTable:
    frame = _table.read(path, ["num_gpus", "message_size", "latency_ms"], [*_ANY, "allreduce_dtype", "backend"])
    frame = _table.select(frame, path, num_gpus=plan.tensor_parallel_size)
    if "backend" in frame:
        frame = _table.select(frame, path, backend=backend)
    return _message("all_reduce", frame, path)


def _nccl(path: Path, plan: Plan) -> list[OperatorTable]:
    frame = _table.read(path, ["op_name", "nccl_dtype", "num_gpus", "message_size", "latency_ms"], _ANY)
    frame = _table.select(frame, path, nccl_dtype="half")
    tables = []
    if plan.tensor_parallel_size > 1:
        tables.append(_message("all_reduce", _table.select(
            frame, path, op_name="all_reduce", num_gpus=plan.tensor_parallel_size), path))
    if plan.enable_expert_parallel and plan.data_parallel_size > 1:
        tables.append(_message("all_to_all", _table.select(
            frame, path, op_name="alltoall", num_gpus=plan.expert_ranks), path))
    return tables


def _message(name: str, frame: pd.DataFrame, path: Path) -> OperatorTable:
    size = ELEMENT_BYTES * _table.numbers(frame, "message_size", path, is_count=True)
    return _table.table(name, frame, [size], _table.times(frame, path, ["latency_ms"]), path)
