"""Operating points as aiconfigurator's `silicon_sample.csv` has them: its columns, and what its sources leave unsaid.

A row names an engine, a number format and a layout; which settings the server was started with is in the launch scripts
of where it was measured, and `inferencex` holds those.
"""

import re
from typing import Any

import pandas as pd

NAMES = {"model_path": "model", "system": "device", "tp_size": "tensor_parallel_size",
         "attention_dp_size": "data_parallel_size", "moe_ep_size": "expert_parallel_size"}
"""Columns of such a table, and those of ours."""

FORMATS = {"fp8": "fp8", "fp4": "fp4", "bf16": "bfloat16", "fp16": "float16", "int4": "int4"}


def is_silicon(frame: pd.DataFrame) -> bool:
    """Whether a table has that table's columns."""
    return set(NAMES) <= set(frame.columns)


def convert(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The aggregated, unambiguous rows as `jaxsim.validate.points` reads them, and what was left out.

    Ambiguous rows are repeats that differ too much for one system (`ambiguous` = 1). Sizes left empty are 1.
    """
    notes = []
    for name, kept, what in (("mode", "agg", "rows of prefill apart from decode"), ("ambiguous", 0, "ambiguous rows")):
        if name in frame:
            is_kept = frame[name] == kept
            if not is_kept.all():
                notes.append(f"{int((~is_kept).sum())} {what} are left out")
            frame = frame[is_kept]
    is_kept = frame["concurrency"].notna()
    if not is_kept.all():
        notes.append(f"{int((~is_kept).sum())} rows without a concurrency are left out")
    frame = frame[is_kept].rename(columns=NAMES)
    for name in list(NAMES.values())[2:]:
        frame[name] = frame[name].fillna(1)
    rows = [_settings(row) for row in frame.to_dict("records")]
    settings = pd.DataFrame(rows, index=frame.index, dtype=object)
    given = frame.drop(columns=[name for name in settings if name in frame])
    return pd.concat([given, settings], axis=1), notes


def _settings(row: dict[str, Any]) -> dict[str, Any]:
    """Engine, formats and lengths of a row."""
    text = {name: "" if row.get(name) is None or row.get(name) != row.get(name) else str(row[name])
            for name in ("backend", "backend_version", "precision", "provenance")}
    is_4_bit_anyway = "gpt-oss" in str(row["model"])
    found: dict[str, Any] = {
        "preset": _preset(text["backend"], text["backend_version"]),
        "dtype": "auto" if is_4_bit_anyway else FORMATS.get(text["precision"], "auto"),
        "kv_dtype": "fp8" if text["precision"] == "fp8" and text["backend"] != "sglang" else "auto"}
    if "inferencex" in text["provenance"]:
        found |= inferencex(text["backend"], str(row["model"]), int(row["isl"]), int(row["osl"]),
                            int(row["tensor_parallel_size"]), int(row["concurrency"]))
    if "gap-analysis" in text["provenance"]:
        found |= gap_analysis(text["backend"], int(row["isl"]), int(row["concurrency"]))
    return found


def _preset(backend: str, version: str) -> str:
    if backend != "vllm":
        return {"trtllm": "tensorrt-llm", "sglang": "sglang"}.get(backend, "vllm-v1")
    number = re.match(r"0\.(\d+)", version)
    minor = int(number[1]) if number else 0
    return "vllm-v1@0.19" if minor >= 18 else "vllm-v1@0.15" if minor >= 14 else "vllm-v1@0.9"


def inferencex(backend: str, model: str, isl: int, osl: int, tensor_parallel_size: int, concurrency: int
               ) -> dict[str, Any]:
    """Settings of InferenceX's servers and client.

    Source: SemiAnalysisAI/InferenceX, benchmarks/{70b_fp8,gptoss_fp4,dsr1_fp8}_{h100,h200}*.sh: prompts and outputs
    uniform in 0.8 to 1 of the nominal, no prefix caching; vLLM with 8,192 tokens an iteration and, for gpt-oss,
    VLLM_MXFP4_USE_MARLIN; TensorRT-LLM with 16,384 tokens for Llama (in another form of the script the longest
    request), 20,000 for gpt-oss and else room for a whole prompt beside all decodes, and with prompts of Llama that
    wait for each other at 1k/1k on fewer than 8 devices; SGLang with chunks of 32,768 tokens and 0.82 of memory. Left
    out: asynchronous scheduling of vLLM before 0.14, which these scripts switch on and which hid little of the host
    then (TPOT of Llama-3.1-70B is 10 to 15 % above what it is with all of it hidden).
    """
    common, is_gpt_oss = {"range_ratio": 0.8}, "gpt-oss" in model
    if backend == "vllm":
        marlin = {"engine.moe_backend": "marlin"} if is_gpt_oss else {}
        return common | marlin | {"engine.max_num_batched_tokens": max(8192, concurrency)}
    if backend == "sglang":
        return common | {"engine.max_num_batched_tokens": 32768, "engine.gpu_memory_utilization": 0.82}
    if backend == "trtllm":
        if "Llama" in model:
            waits = (isl, osl) == (1024, 1024) and tensor_parallel_size < 8
            batch_wait = {"engine.batch_wait_timeout_iters": 20, "engine.batch_wait_max_tokens_ratio": 0.9}
            return common | {"engine.max_num_batched_tokens": 16384} | (batch_wait if waits else {})
        whole = 20000 if is_gpt_oss else max(-(-(concurrency + isl + 64) // 64) * 64, 8192)
        return common | {"engine.max_num_batched_tokens": whole}
    return common


def gap_analysis(backend: str, isl: int, concurrency: int) -> dict[str, Any]:
    """Settings of the servers of NVIDIA's gap analysis, as far as aiconfigurator's generator says them.

    Source: ai-dynamo/aiconfigurator, generator/rule_plugin/benchmark/trtllm.rule: an iteration of TensorRT-LLM has room
    for as many tokens as it has places, a prompt and 1,500 more, the overlap scheduler is on, and every number of
    decodes is captured. That the points were taken with these rules is assumed. Left out: the rules of SGLang and vLLM,
    whose points differ by more than settings.
    """
    return {"engine.max_num_batched_tokens": concurrency + isl + 1500} if backend == "trtllm" else {}
