"""Operator tables of real kernels: seconds by the forms with a device's constants, and measured ones."""

from pathlib import Path

import numpy as np
import pandas as pd

from jaxsim.cost import attention as a
from jaxsim.cost.collectives import CustomAllReduce, Nccl
from jaxsim.cost.gemm import ExpertLoad, Experts, Gemm
from jaxsim.cost.rates import Rates
from jaxsim.spec.device import load_device

FILES = {"a100_sxm_80": "aic_a100_sxm_vllm0.14.0", "h100_sxm_80": "aic_h100_sxm_vllm0.19.0",
         "h200_sxm_141": "aic_h200_sxm_vllm0.19.0"}
NCCL_FILES = {"a100_sxm_80": "aic_a100_sxm_nccl2.27.3", "h100_sxm_80": "aic_h100_sxm_nccl2.27.3",
              "h200_sxm_141": "aic_h200_sxm_nccl2.26.2"}
RTX = "rtx_pro_6000"
RTX_MODELS = {"llama31_8b": dict(hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256),
              "qwen3_30b_a3b": dict(hidden=2048, heads=32, kv_heads=4, ffn=0, vocab=151936)}
WEIGHT_BYTES = {"bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "int4_wo": 0.53}
RECORDS = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "int4_wo": "int4"}


def rates(device: str, narrow: bool = False) -> Rates:
    spec = load_device(device)
    return Rates(spec.fp8_flops if narrow else spec.bf16_flops, spec.memory_bytes_per_s, spec.num_multiprocessors)


def record(device: str):
    return load_device(device).kernel_efficiency()


def table(folder: Path, device: str, name: str, files=FILES) -> pd.DataFrame:
    frame = pd.read_parquet(folder / "ops" / f"{files[device]}_{name}.parquet")
    for column in frame.columns:
        if pd.api.types.is_numeric_dtype(frame[column]):
            frame[column] = frame[column].astype(float)
    return frame.assign(seconds=frame.latency_ms.astype(float) * 1e-3)


def gemm(folder: Path, device: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    if device == RTX:
        return _rtx_gemm(folder)
    d = table(folder, device, "gemm")
    d = d[d.gemm_dtype == dtype]
    m, n, k = (d[c].to_numpy() for c in "mnk")
    kernel = Gemm.of(record(device).gemm[RECORDS[dtype]])
    return np.asarray(kernel.seconds(m, n, k, n * k * WEIGHT_BYTES[dtype], rates(device, dtype != "bfloat16"))), \
        d.seconds.to_numpy()


def _rtx_gemm(folder):
    kernel, predicted, measured = Gemm.of(record(RTX).gemm["bf16"]), [], []
    for name, s in RTX_MODELS.items():
        d = pd.read_csv(folder / "ops" / f"vllm019_dense_rtxpro6000_{name}.csv")
        queries = s["heads"] * 128
        shapes = {"qkv_proj": (queries + 256 * s["kv_heads"], s["hidden"]), "o_proj": (s["hidden"], queries),
                  "gate_up_proj": (2 * s["ffn"], s["hidden"]), "down_proj": (s["hidden"], s["ffn"]),
                  "lm_head": (s["vocab"], s["hidden"])}
        for layer, (n, k) in shapes.items():
            rows = d[(d.layer == layer) & (n * k > 0)]
            m = rows["size"].to_numpy(float)
            predicted.append(np.asarray(kernel.seconds(m, float(n), float(k), 2.0 * n * k, rates(RTX))))
            measured.append(rows.time_us.to_numpy() * 1e-6)
    return np.concatenate(predicted), np.concatenate(measured)


def _shapes(d: pd.DataFrame):
    """Rows of each attention shape."""
    d = d.assign(window=d.get("window_size", 0.0), cached=np.where(d.kv_cache_dtype.astype(str) == "fp8", 1.0, 2.0))
    for key, rows in d.groupby(["num_heads", "num_key_value_heads", "head_dim", "cached", "window"], observed=True):
        heads, kv_heads, head_dim, cached, window = key
        yield a.AttentionShape(int(heads), int(kv_heads), int(head_dim), cached, int(window)), rows


def decode(folder: Path, device: str) -> tuple[np.ndarray, np.ndarray]:
    kernel, predicted, measured = a.Decode.of(record(device).decode), [], []
    for shape, n, context, seconds in _rtx_decodes(folder) if device == RTX else _decodes(folder, device):
        reach = np.minimum(context, shape.window + a.WINDOW_TILE) if shape.window else context
        full = shape._replace(window=0)
        fixed = np.where((shape.window > 0) & (context > shape.window), kernel.fixed_seconds(shape, n, rates(device)),
                         kernel.fixed_seconds(full, n, rates(device)))
        predicted.append(fixed + np.asarray(kernel.slope(shape, n, rates(device))) * n * reach)
        measured.append(seconds)
    return np.concatenate(predicted), np.concatenate(measured)


def _decodes(folder, device):
    d = table(folder, device, "generation_attention")
    if device.startswith("h200"):
        # The harness sets the number of KV splits as if K = 8, and ignores the window.
        d = d[(d.num_key_value_heads == 8) & (d.window_size == 0)]
    for shape, rows in _shapes(d):
        yield shape, rows.batch_size.to_numpy(), rows.step.to_numpy() + 1, rows.seconds.to_numpy()


def _rtx_attention(folder):
    for name, s in RTX_MODELS.items():
        d = pd.read_parquet(folder / "ops" / f"vllm019_attention_rtxpro6000_{name}.parquet").astype(
            {c: float for c in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")})
        yield a.AttentionShape(s["heads"], s["kv_heads"], 128), d.assign(seconds=d.time_us * 1e-6)


def _rtx_decodes(folder):
    for shape, d in _rtx_attention(folder):
        d = d[(d.prefill_chunk == 0) & (d.n_decode > 0)]
        yield shape, d.n_decode.to_numpy(), d.kv_decode.to_numpy(), d.seconds.to_numpy()


def prefill(folder: Path, device: str) -> tuple[np.ndarray, np.ndarray]:
    kernel, predicted, measured = a.Prefill.of(record(device).prefill), [], []
    for shape, chunk, seconds in _rtx_chunks(folder) if device == RTX else _chunks(folder, device):
        count, new, history, decodes, context = chunk
        ends = history + new
        predicted.append(np.asarray(kernel.chunk_floor(shape) + a.chunk_seconds(
            kernel.coefficients(shape, rates(device)), count * new, count, count * (ends ** 2 - history ** 2),
            count * ends, decodes, decodes * context)))
        measured.append(seconds)
    return np.concatenate(predicted), np.concatenate(measured)


def _chunks(folder, device):
    d = table(folder, device, "context_attention")
    d = d[d.isl > 1]
    if device.startswith("h200"):
        # The harness sets the number of query heads wrongly but where there are two for a KV head (a layer gets faster
        # with more heads, and faster than the peak), and ignores the window.
        d = d[(d.window_size == 0) & (d.num_heads == 2 * d.num_key_value_heads)]
    for shape, rows in _shapes(d):
        zero = np.zeros(len(rows))
        yield shape, (rows.batch_size.to_numpy(), rows.isl.to_numpy(), zero, zero, zero), rows.seconds.to_numpy()


def _rtx_chunks(folder):
    for shape, d in _rtx_attention(folder):
        d = d[d.prefill_chunk > 0]
        yield shape, (np.ones(len(d)), *(d[c].to_numpy() for c in ("prefill_chunk", "kv_prefill", "n_decode",
                                                                   "kv_decode"))), d.seconds.to_numpy()


def mla(folder: Path, device: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Whole modules of DeepSeek-V3: projections, latent attention, rotary and cache write."""
    kernel, predicted, measured = a.Latent.of(record(device).latent), [], []
    d = table(folder, device, f"mla_{kind}_module")
    if kind == "context":
        d = d[d.isl >= 16]
    for (heads, gemm_type, cache), rows in d.groupby(["num_heads", "gemm_type", "kv_cache_dtype"], observed=True):
        narrow, h = gemm_type != "bfloat16", int(heads)
        product = Gemm.of(record(device).gemm["fp8_block" if narrow else "bf16"])
        shape = a.LatentShape(h, 512, 64, 128, 128, 1.0 if cache == "fp8" else 2.0, narrow, 7168)
        n = rows.batch_size.to_numpy()
        m = n * (rows.isl.to_numpy() if kind == "context" else 1)
        seconds = sum(product.seconds(m, float(c), float(r), c * r * (1.0 if narrow else 2.0), rates(device, narrow))
                      for r, c in ((7168, 2112), (1536, h * 192), (512, h * 256), (h * 128, 7168)))
        element = record(device).elementwise
        # Rotary and cache write, as `operators.token_work` counts them.
        moved = m * (h * 128 * 2 + 2 * 1152)
        seconds = seconds + 2 * element.floor_s + moved / (rates(device).bytes_per_s * element.efficiency)
        if kind == "context":
            length = rows.isl.to_numpy()
            seconds = seconds + kernel.chunk_floor(shape) + a.chunk_seconds(
                kernel.coefficients(shape, rates(device)), m, n, n * length ** 2, m, 0 * n, 0 * n)
        else:
            seconds = seconds + kernel.fixed_seconds(shape, n, rates(device)) + kernel.slope(
                shape, n, rates(device)) * n * rows.step.to_numpy()
        predicted.append(np.asarray(seconds))
        measured.append(rows.seconds.to_numpy())
    return np.concatenate(predicted), np.concatenate(measured)


TILES = (8, 16, 32, 64, 128)


def experts(folder: Path, device: str, dtype: str, rows: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Of a random sample: the loads of each row are drawn again."""
    if device == RTX:
        return _rtx_experts(folder)
    d = table(folder, device, "moe")
    d = d[(d.moe_dtype == dtype) & (d.num_experts % d.moe_ep_size == 0)].sample(rows, random_state=0)
    spread_largest = device.startswith("a100")
    loads = np.array([_loads(int(m), int(e), int(k), int(ep), str(law), spread_largest) for m, e, k, ep, law in zip(
        d.num_tokens, d.num_experts, d.topk, d.moe_ep_size, d.distribution.astype(str), strict=True)])
    records, inner = record(device).experts, d.inter_size.to_numpy() / d.moe_tp_size.to_numpy()
    seconds = np.zeros(len(d))
    tuned = records.get(RECORDS[dtype] + "_tuned")
    keys = np.stack([d.num_experts, inner, d.hidden_size, d.topk], axis=1)
    for key in np.unique(keys, axis=0):
        at = (keys == key).all(axis=1)
        e, f, hidden, topk = (int(x) for x in key)
        kernel = Experts.of(tuned if tuned and (e, f) in tuned.configs else records[RECORDS[dtype]])
        load = ExpertLoad(d.num_tokens.to_numpy()[at], {t: loads[at, i + 1] for i, t in enumerate(TILES)},
                          3.0 * hidden * f * WEIGHT_BYTES[dtype] * loads[at, 0], topk, e, hidden, f)
        seconds[at] = kernel.seconds(load, rates(device, dtype.startswith("fp8")))
    return seconds, d.seconds.to_numpy()


def _rtx_experts(folder):
    d = pd.read_csv(folder / "ops" / "vllm019_moe_rtxpro6000_qwen3_30b_a3b.csv").astype(float)
    touched, tokens = d.activated_experts.to_numpy(), d.tokens.to_numpy()
    blocks = {t: touched * np.ceil(np.maximum(tokens * 8 / touched, 1) / t) for t in TILES}
    load = ExpertLoad(tokens, blocks, 3.0 * 2048 * 768 * 2 * touched, 8, 128, 2048, 768)
    return np.asarray(Experts.of(record(RTX).experts["bf16"]).seconds(load, rates(RTX))), d.time_us.to_numpy() * 1e-6


def _loads(tokens, num_experts, topk, ranks, law, spread_largest, draws=3):
    """Distinct experts of the heaviest rank and tiles of each height, by aiconfigurator's load generator."""
    if law == "balanced":
        pairs = max(tokens * topk / ranks, 1)
        touched = min(num_experts // ranks, max(1, np.ceil(min(num_experts, tokens * topk) / ranks)))
        return [touched, *(touched * np.ceil(pairs / touched / t) for t in TILES)]
    rng, found = np.random.default_rng([tokens, num_experts, topk, ranks]), []
    for _ in range(draws):
        x = _power_law(tokens, num_experts, topk, float(law.split("_")[-1]), rng, spread_largest)
        x = x.reshape(ranks, -1)
        x = x[x.sum(1).argmax()]
        found.append([(x > 0).sum(), *(np.ceil(x / t).sum() for t in TILES)])
    return np.maximum(np.mean(found, axis=0), 1.0)


def _power_law(tokens, num_experts, topk, alpha, rng, spread_largest):
    total, power = tokens * topk, 1 - alpha
    low, high = (1, tokens * 0.8) if total > num_experts else (0.01, 2)
    for _ in range(20):
        x = ((high ** power - low ** power) * rng.random(num_experts) + low ** power) ** (1 / power)
        x = np.floor(x / x.sum() * total + 0.5)
        missing = int(total - x.sum())
        largest = np.argsort(-x, kind="stable")
        if missing > 0:
            into = (largest[np.arange(missing) % num_experts] if spread_largest
                    else rng.integers(0, num_experts, missing))
            np.add.at(x, into, 1)
        elif missing < 0:
            np.add.at(x, largest[:-missing], -1)
        x = np.maximum(x, 0)
        if x.max() <= tokens:
            break
    return np.minimum(x, tokens)


def nccl(folder: Path, device: str, collective: str) -> tuple[np.ndarray, np.ndarray]:
    d = table(folder, device, "nccl", NCCL_FILES)
    d = d[d.op_name.astype(str) == {"all_to_all": "alltoall"}.get(collective, collective)]
    num_bytes = d.message_size.to_numpy() * np.where(d.nccl_dtype.astype(str) == "half", 2, 1)
    kernel = Nccl.of(record(device).nccl[collective], collective)
    return np.asarray(kernel.seconds(d.num_gpus.to_numpy(), num_bytes, load_device(device).link_bytes_per_s)), \
        d.seconds.to_numpy()


def all_reduce(folder: Path, device: str) -> tuple[np.ndarray, np.ndarray]:
    d = table(folder, device, "custom_allreduce")
    d = d[d.backend.astype(str).str.contains("graph")]
    kernel, link = CustomAllReduce.of(record(device).custom_all_reduce), load_device(device).link_bytes_per_s
    parts = [(kernel.seconds(int(n), rows.message_size.to_numpy() * 2, link), rows.seconds.to_numpy())
             for n, rows in d.groupby("num_gpus")]
    return np.concatenate([np.asarray(p) for p, _ in parts]), np.concatenate([s for _, s in parts])


def errors(pair) -> tuple[float, float, float]:
    """Median and 90th percentile of the absolute relative error, and the median signed one."""
    predicted, seconds = (np.asarray(x, np.float64) for x in pair)
    relative = predicted / seconds - 1
    assert np.isfinite(relative).all()
    return float(np.median(np.abs(relative))), float(np.quantile(np.abs(relative), 0.9)), float(np.median(relative))


