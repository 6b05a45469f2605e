"""Measured runs of the shared data as scenarios and the tables that `jaxsim validate` reads."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from jaxsim.engine.simulate import simulate
from jaxsim.metrics import request_frame
from jaxsim.profiles import importing, native
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan
from jaxsim.spec.scenario import Scenario
from jaxsim.validate.replay import Comparison, replay
from jaxsim.workload import Workload

WARM = 150
"""Requests of the inference-perf runs that include cold starts."""


@dataclass(frozen=True)
class Run:
    """A run request by request. scenario: of its system; table: measured; skip: warm-up."""

    name: str
    scenario: Scenario
    table: pd.DataFrame
    skip: int = 0

    def replay(self, folder: Path) -> Comparison:
        """Replayed, from a file in `folder`."""
        path = folder / f"{self.name}.csv"
        self.table.to_csv(path, index=False)
        return replay(self.scenario, str(path), skip=self.skip)


def scenario(model: str, device: str, engine: dict, cost: dict | None = None, name: str = "") -> Scenario:
    """Of a system; the workload is replaced."""
    return Scenario.from_dict({
        "schema_version": 1, "name": name, "model": {"name": model}, "device": {"name": device}, "engine": engine,
        "workload": {"kind": "batch"}, "num_seeds": 1, **({"cost": cost} if cost else {})})


def h100(folder: Path) -> list[Run]:
    """vLLM 0.15 on H100 behind HTTP: 100 prompts in turn, with one system prompt. Saturated and failed ones too."""
    source = folder / "runs" / "vllm_h100_inferenceperf"
    index, runs = pd.read_csv(source / "index.csv"), []
    for name, stages in index.groupby("run"):
        about = stages[stages["stage"] == -1].iloc[0]
        d = pd.read_csv(source / f"{name}.csv").sort_values("arrival_us", kind="stable")
        system = int(about["system_prompt_len"]) // 16
        ids = [" ".join(str(b if b < system else 1000 * (prompt + 1) + b) for b in range(int(tokens) // 16))
               for prompt, tokens in zip(d["prompt_id"], d["input_tokens"], strict=True)]
        failed = d["ok"] != 1
        table = pd.DataFrame({
            "arrival_s": d["arrival_us"] * 1e-6, "input_tokens": d["input_tokens"],
            "output_tokens": int(about["output_len_requested"]), "ttft_s": (d["ttft_us"] * 1e-6).mask(failed),
            "e2e_s": (d["e2e_us"] * 1e-6).mask(failed), "prefix_block_ids": ids, "stage": d["stage"]})
        runs.append(Run(name, scenario(about["model"], "h100", {
            "preset": "vllm-v1@0.15", "tensor_parallel_size": int(about["tp"]), "dtype": "float16", "max_num_seqs": 128,
            "max_num_batched_tokens": 2048, "max_model_len": 4096, "enable_prefix_caching": True,
            "num_gpu_blocks_override": int(about["kv_blocks_gpu"])}, name=name), table, WARM))
    return runs


RTX = {"vllm_rtxpro6000_llama31_8b_tp1": ("llama-3.1-8b", "llama31_8b", "llama31", {}),
       "vllm_rtxpro6000_qwen3_30b_a3b_dp2ep2": ("qwen3-30b-a3b", "qwen3_30b_a3b", "qwen3",
                                                {"data_parallel_size": 2, "enable_expert_parallel": True})}


def rtx(folder: Path, profiles: Path) -> list[Run]:
    """vLLM 0.19 on RTX PRO 6000, clocks inside the engine, with profiles made of the same GPU's layer timings."""
    runs = []
    for name, (model, layers, tokenizer, engine) in RTX.items():
        d = pd.read_csv(folder / "runs" / name / "requests.csv").sort_values("queued_us", kind="stable")
        lines = (folder / "traces" / f"sharegpt300_{tokenizer}.jsonl").read_text().splitlines()
        ids = {row["i"]: " ".join(map(str, row["block16_ids"])) for row in map(json.loads, lines)}
        table = pd.DataFrame({
            "arrival_s": d["queued_us"] * 1e-6, "input_tokens": d["input_tokens"],
            "output_tokens": d["output_tokens"], "ttft_s": (d["first_token_us"] - d["queued_us"]) * 1e-6,
            "e2e_s": (d["last_token_us"] - d["queued_us"]) * 1e-6, "prefix_block_ids": [ids[i] for i in d["i"]]})
        path = profiles / f"{layers}.parquet"
        ops = folder / "ops"
        files = [f"dense={ops}/vllm019_dense_rtxpro6000_{layers}.csv",
                 f"attention={ops}/vllm019_attention_rtxpro6000_{layers}.parquet"]
        files += [f"experts={p}" for p in [ops / f"vllm019_moe_rtxpro6000_{layers}.csv"] if p.exists()]
        plan = Plan(enable_expert_parallel=bool(engine))
        native.write(importing.import_profile("llmservingsim", files, model=load_model(model), device="rtx_pro_6000",
                                              plan=plan), path)
        runs.append(Run(name, scenario(model, "rtx_pro_6000", {
            "preset": "vllm-v1@0.19", "max_num_seqs": 128, "max_num_batched_tokens": 2048,
            "enable_prefix_caching": True, **engine},
            {"kind": "profiled", "path": str(path), "front_end_s": 0.0}, name), table))
    return runs


APEX_MODELS = {"meta-llama/Llama-3.1-70B": ("llama-3.1-70b", {}),
               "mistralai/Mistral-Large-Instruct-2407 (FP8 weights + FP8 KV)": (
                   "mistral-large-2407", {"dtype": "fp8", "kv_cache_dtype": "fp8"})}


def apex(folder: Path) -> pd.DataFrame:
    """vLLM 0.6.0 on H100: means of TTFT, TPOT and end to end, measured and simulated."""
    source = folder / "runs" / "vllm060_h100_apex"
    index, rows = pd.read_csv(source / "index.csv"), []
    for about in index[index["engine"] == "vllm 0.6.0"].to_dict("records"):
        model, formats = APEX_MODELS[about["model"]]
        d = pd.read_csv(source / f"{about['run']}.csv")
        ranks = int(about["parallelism"].removeprefix("TP"))
        # Two-GPU runs were capped at the 24,272 tokens of their KV pool; the others chunk at 512 tokens.
        own = {"enable_chunked_prefill": True, "max_num_batched_tokens": 512}
        if ranks == 2:
            own = {"enable_chunked_prefill": False, "max_num_batched_tokens": 24272, "max_model_len": 24272,
                   "num_gpu_blocks_override": 1517}
        system = scenario(model, "h100", {"preset": "vllm-v0", "tensor_parallel_size": ranks, **formats, **own})
        lane = run_means(system, Workload((d["arrival_us"] - d["arrival_us"].iloc[0]).to_numpy() * 1e-6,
                                          d["input_tokens"].to_numpy(), d["output_tokens"].to_numpy()))
        rows.append({"run": about["run"], "ttft_ms": about["ttft_ms_mean"], "tpot_ms": about["tpot_ms_mean_per_token"],
                     "e2el_ms": 1e3 * about["e2e_s_mean"], **lane})
    return with_errors(pd.DataFrame(rows))


def run_means(system: Scenario, workload: Workload, first: int = 0, last: int | None = None) -> dict[str, float]:
    """Means in ms over the requests from `first` to `last`. TPOT over tokens, as the engine counts them."""
    frame = request_frame(simulate(system, workload=workload).lanes[0][0]).iloc[first:last]
    gaps = (frame["output_tokens"] - 1).clip(lower=0)
    return {"simulated_ttft_ms": 1e3 * float(frame["ttft_s"].mean()),
            "simulated_tpot_ms": 1e3 * float((frame["tpot_s"] * gaps).sum() / gaps.sum()),
            "simulated_e2el_ms": 1e3 * float(frame["e2e_s"].mean())}


HARDWARE = {"H100": "h100", "A100-80GB": "a100", "L40S": "l40s"}


def aggregates(folder: Path, source: str = "exact", step: int = 1) -> pd.DataFrame:
    """Stages of vLLM 0.15 runs on several GPUs: means measured and simulated. Poisson arrivals, prompts in turn.

    step: every so many-th experiment."""
    d = pd.read_csv(folder / "runs" / "vllm_stage_aggregates.csv")
    rows = []
    groups = d[d["workload_source"] == source].groupby(["exp", "hardware"], sort=False)
    for (name, hardware), stages in list(groups)[::step]:
        parts = stages[stages["stage"] >= 0].sort_values("stage")
        about = stages.iloc[0]
        if parts.empty or hardware not in HARDWARE:
            continue
        rng, arrival, stage, start = np.random.default_rng(0), [], [], 0.0
        for part in parts.to_dict("records"):
            count = int(part["rate_rps"] * part["duration_s"])
            arrival.append(np.sort(start + rng.random(count) * part["duration_s"]))
            stage.append(np.full(count, part["stage"]))
            start += part["duration_s"]
        arrival, stage = np.concatenate(arrival), np.concatenate(stage)
        tokens = int(about["system_prompt_len"] + about["question_len"])
        blocks, system = tokens // 16, int(about["system_prompt_len"]) // 16
        ids = np.concatenate([np.r_[np.arange(system), 1000 * (1 + i % 100) + np.arange(system, blocks)]
                              for i in range(len(arrival))])
        workload = Workload(arrival - arrival[0], np.full(len(arrival), tokens),
                            np.full(len(arrival), int(about["output_len"])), prefix_block_size=16,
                            prefix_offsets=blocks * np.arange(len(arrival) + 1), prefix_hashes=ids)
        dtype = {"FP8": "fp8"}.get(about["precision"], "float16")
        given = about["kv_blocks_gpu"]
        engine = {"preset": "vllm-v1@0.15", "tensor_parallel_size": int(about["tp"]), "dtype": dtype,
                  "max_num_seqs": int(about["max_num_seqs"]), "max_model_len": int(about["max_model_len"]),
                  "max_num_batched_tokens": int(about["max_num_batched_tokens"]), "enable_prefix_caching": True,
                  **({"num_gpu_blocks_override": int(given)} if given == given else {})}
        if about["gpu_mem_util"] == about["gpu_mem_util"]:
            engine["gpu_memory_utilization"] = float(about["gpu_mem_util"])
        frame = request_frame(simulate(scenario(about["model"], HARDWARE[hardware], engine),
                                       workload=workload).lanes[0][0])
        for part in parts.to_dict("records"):
            mine = frame[(stage == part["stage"]) & (np.arange(len(frame)) >= WARM)]
            rows.append({"run": f"{name} {hardware} stage {part['stage']}", "ttft_ms": part["ttft_ms_mean"],
                         "tpot_ms": part["tpot_ms_mean_derived"], "e2el_ms": part["e2e_ms_mean"],
                         "simulated_ttft_ms": 1e3 * mine["ttft_s"].mean(),
                         "simulated_tpot_ms": 1e3 * mine["tpot_s"].mean(),
                         "simulated_e2el_ms": 1e3 * mine["e2e_s"].mean()})
    return with_errors(pd.DataFrame(rows))


def with_errors(frame: pd.DataFrame) -> pd.DataFrame:
    """With signed relative errors."""
    return frame.assign(**{f"{name}_error": frame[f"simulated_{name}"] / frame[name] - 1
                           for name in ("ttft_ms", "tpot_ms", "e2el_ms")})
