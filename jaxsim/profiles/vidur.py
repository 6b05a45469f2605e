"""Vidur's profiles: linear and elementwise operators by tokens, collectives by bytes, CPU overheads by batch size.

* operators: num_tokens, tp (or num_tensor_parallel_workers), optionally gpu and model, and one `*_ms` column an
  operator, of one layer;
* collectives CSV: collective, num_workers, devices_per_node, size_bytes, median_ms, optionally system;
* CPU overheads CSV: batch_size, tensor_parallel_degree, model_name, optionally gpu, and `*_median` columns in ms.

Source: microsoft/vidur, `data/profiling`, re-tabulated: medians, one column an operator.

Known gaps: attention tables are separate files of Vidur's and not read; attention then comes from the roofline. The
CPU overheads are of an early vLLM fork (v0): schedule, sampler, input preparation and output processing are taken
as serial, ray's communication is left out.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from jaxsim._core.errors import InputError
from jaxsim.cost.profile import OperatorTable, Profile
from jaxsim.profiles import _table

NAME = "vidur"

COLUMNS = {
    "emb_ms": "embedding", "attn_pre_proj_ms": "qkv", "attn_post_proj_ms": "attention_output",
    "attn_rope_ms": "rotary_and_cache_write", "mlp_up_proj_ms": "ffn_up", "mlp_down_proj_ms": "ffn_down",
    "mlp_act_ms": "ffn_activation", "add_ms": "residual_add",
}
NORMS = ("input_layernorm_ms", "post_attention_layernorm_ms")
SHAPE = ("gpu", "model", "n_head", "n_kv_head", "n_embd", "n_expanded_embd", "vocab_size", "use_gated_mlp")
HOST = ("schedule_median", "sampler_e2e_median", "prepare_inputs_e2e_median", "process_model_outputs_median")


def read(operators: str | Path, collectives: str | Path | None = None, cpu_overheads: str | Path | None = None, *,
         gpu: str | None = None, model: str | None = None, tensor_parallel_size: int = 1,
         system: str | None = None, devices_per_node: int | None = None) -> Profile:
    """One GPU, model and tensor-parallel degree of the given files.

    system: in the collectives' file, such as "a100_dgx"; by default the one that starts with `gpu`.
    devices_per_node: of the collectives; by default all workers in one node.
    """
    path = Path(operators)
    frame = _table.read(path, ["num_tokens", "tp"], [*SHAPE, *COLUMNS, *NORMS])
    frame = _table.select(frame, path, gpu=gpu, model=model, tp=tensor_parallel_size)
    for name, option in (("gpu", "gpu"), ("model", "model")):
        if name in frame:
            _table.only(frame, name, path, option)
    tokens = _table.numbers(frame, "num_tokens", path, is_count=True)
    tables = {name: _column(name, frame, tokens, [column], path)
              for column, name in COLUMNS.items() if column in frame}
    if all(column in frame for column in NORMS):
        tables["norms"] = _column("norms", frame, tokens, NORMS, path)
    device = gpu or (frame["gpu"].iloc[0] if "gpu" in frame else "")
    named = model or (frame["model"].iloc[0] if "model" in frame else "")
    if collectives is not None and tensor_parallel_size > 1:
        tables |= _collectives(Path(collectives), device, tensor_parallel_size, system, devices_per_node)
    if cpu_overheads is not None:
        tables["host_step"] = _host(Path(cpu_overheads), device, named, tensor_parallel_size)
    files = [Path(p).name for p in (operators, collectives, cpu_overheads) if p is not None]
    return Profile(tables, named, device, tensor_parallel_size, dtype="float16",
                   provenance={"format": NAME, "files": files, "licence": "MIT (microsoft/vidur)"})


def _column(name: str, frame: pd.DataFrame, tokens: np.ndarray, columns, path: Path) -> OperatorTable:
    seconds = sum(_table.numbers(frame, column, path) for column in columns) * 1e-3
    # Small operators are rounded to 0 at the tables' resolution of a microsecond or two.
    measured = seconds > 0
    return _table.table(name, frame[measured], [tokens[measured]], seconds[measured], path)


def _collectives(path: Path, gpu: str, workers: int, system: str | None, devices_per_node: int | None
                 ) -> dict[str, OperatorTable]:
    frame = _table.read(path, ["collective", "num_workers", "devices_per_node", "size_bytes", "median_ms"], ["system"])
    if "system" in frame:
        systems = sorted(frame["system"].unique())
        system = system or next((s for s in systems if gpu and s.startswith(gpu)), None)
        if system is None:
            raise InputError("profile system", system, "is not given", f"choose one of {', '.join(systems)}")
        frame = _table.select(frame, path, system=system)
    frame = _table.select(frame, path, collective="all_reduce", num_workers=workers,
                          devices_per_node=devices_per_node or workers)
    size = _table.numbers(frame, "size_bytes", path)
    return {"all_reduce": _table.table("all_reduce", frame, [size], _table.times(frame, path, ["median_ms"]), path)}


def _host(path: Path, gpu: str, model: str, tensor_parallel_size: int) -> OperatorTable:
    frame = _table.read(path, ["batch_size", "tensor_parallel_degree", "model_name", *HOST])
    frame = _table.select(frame, path, model_name=model or None, tensor_parallel_degree=tensor_parallel_size,
                          **({"gpu": gpu} if "gpu" in frame and gpu in set(frame["gpu"]) else {}))
    seconds = sum(_table.numbers(frame, column, path) for column in HOST) * 1e-3
    return _table.table("host_step", frame, [_table.numbers(frame, "batch_size", path, is_count=True)], seconds, path)
