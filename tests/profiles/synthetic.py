"""Small made-up profiles: the roofline's own seconds times a wobble, as files of each format and in memory."""

import numpy as np
import pandas as pd

from jaxsim.cost.profile import OPERATORS, OperatorTable, Profile
from jaxsim.cost.profile_rates import TableRates
from jaxsim.cost.rank import Roofline

COUNTS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
CONTEXTS = [16, 64, 256, 1024, 4096]
CHUNKS = [16, 64, 256, 273, 1024]


def wobble(points: np.ndarray) -> np.ndarray:
    """A smooth factor near 1.2 that a roofline does not have."""
    return 1.2 + 0.1 * np.sin(np.log1p(points).sum(axis=1))


def grid(*axes) -> np.ndarray:
    return np.stack([x.reshape(-1) for x in np.meshgrid(*axes, indexing="ij")], axis=1).astype(float)


def points_of(name: str) -> np.ndarray:
    axes = OPERATORS[name].axes
    if axes == ("tokens",):
        return grid([*COUNTS, 512, 1024])
    if axes == ("sequences",):
        return grid(COUNTS)
    if axes == ("message_bytes",):
        return grid(2.0 ** np.arange(8, 26))
    if axes == ("sequences", "context_tokens"):
        return grid(COUNTS, CONTEXTS)
    if axes == ("chunk_tokens", "keys_per_token"):
        points = grid(CHUNKS, [0, 64, 512, 4096])
        return np.stack([points[:, 0], 2 * points[:, 1] + points[:, 0]], axis=1)
    if axes == ("tokens", "experts"):
        points = grid([1, 4, 16, 64, 256, 1024], [8, 16, 32, 64, 128])
        return points[points[:, 1] <= 8 * points[:, 0]]
    points = grid(CHUNKS, [0, 512, 4096], [1, 4, 32, 128], CONTEXTS)
    points[:, 1] = 2 * points[:, 1] + points[:, 0]
    return points


def profile_of(base: Roofline, names, factor=wobble, **fields) -> Profile:
    """Tables of the given names."""
    tables = {}
    for name in names:
        points = points_of(name)
        seconds = np.asarray(TableRates(base).of(name)(*points.T), float) * factor(points)
        tables[name] = OperatorTable(name, points, seconds)
    return Profile(tables, tensor_parallel_size=base.plan.tensor_parallel_size, **fields)


def layer_files(folder):
    """The four files of LLMServingSim's profiler, with plain numbers."""
    rows = [(1, "dense_tokens", layer, m, 10 + 0.1 * m) for layer in ("qkv_proj", "o_proj", "layernorm")
            for m in (1, 8, 64)]
    rows += [(1, "per_sequence", "lm_head", n, 500.0 + n) for n in (1, 8, 64)]
    rows += [(2, "dense_tokens", "qkv_proj", 1, 6.0)]
    dense = folder / "dense.csv"
    pd.DataFrame(rows, columns=["tp", "kind", "layer", "size", "time_us"]).to_csv(dense, index=False)
    rows = [(1, 0, 0, n, c, 8 + 0.01 * n * c) for n in (1, 8) for c in (16, 1024)]
    rows += [(1, c, h, 0, 0, 9 + 0.02 * (c + h)) for c in (16, 256) for h in (0, 512)]
    rows += [(1, c, h, n, d, 12 + 0.02 * (c + h) + 0.02 * n * d) for c in (16, 256) for h in (0, 512)
             for n in (1, 8) for d in (16, 1024)]
    attention = folder / "attention.parquet"
    pd.DataFrame(rows, columns=["tp", "prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"]).to_parquet(
        attention)
    experts = folder / "moe.csv"
    pd.DataFrame([(m, e, 20.0 + 6 * e) for m in (1, 8) for e in (8, 16) if e <= 8 * m],
                 columns=["tokens", "activated_experts", "time_us"]).to_csv(experts, index=False)
    meta = folder / "meta.yaml"
    meta.write_text("vllm_version: 0.19.0\ngpu: Some GPU\nmodel: some/model\nvariant: bf16\n"
                    "engine:\n  block_size: 16\n", encoding="utf-8")
    return dense, attention, experts, meta
