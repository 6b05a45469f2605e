"""Adaptive chunks and KV-cache parallelism as the loop takes them, and what is refused once costs are known."""

import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.cost.base import AbstractIterationCost, BatchStats
from jaxsim.cost.collectives import over
from jaxsim.cost.context_parallel import LSE_BYTES, merged_numbers
from jaxsim.engine.lower.alone import most_chunks
from jaxsim.engine.lower.systems import System
from jaxsim.policy.chunks import Chunks
from jaxsim.policy.kv_parallel import KvParallel
from jaxsim.spec.dims import Dims
from jaxsim.spec.plan import weight_format
from jaxsim.spec.scenario import Scenario
from jaxsim.workload.workload import Workload

MESSAGES = 2
"""A layer: queries there, partial outputs back."""

MOST_SUM = 2**31 - 1


def make_chunks(scenario: Scenario) -> Chunks | None:
    """How long an iteration with a prompt may take; None where only tokens count."""
    engine = scenario.engine
    if engine.target_batch_time_ms is None:
        return None
    return Chunks(np.float32(1e-3 * engine.target_batch_time_ms), np.int32(engine.min_chunk_tokens or 1))


def make_kv_parallel(scenario: Scenario, system: System) -> KvParallel | None:
    """Groups that share the KV of long contexts, and the messages between them; None with a single one.

    The group of a request sends its queries to the others and gets partial outputs back, in every layer one message
    each way over the link of a device, which carries those of all other groups: latency + bytes / bandwidth.
    """
    engine, model, plan = scenario.engine, system.model, system.plan
    if engine.kv_parallel_size == 1:
        return None
    groups, tensors = engine.kv_parallel_size, plan.tensor_parallel_size
    link = system.device.link_among(groups, plan.num_devices)
    hop = over(system.device.kernel_efficiency().hop, link.kind)
    heads = model.rank_shape(tensors).heads
    activation_bytes = weight_format(scenario.dtype, model).activation_bytes
    size = heads * (activation_bytes * sum(merged_numbers(model)) + LSE_BYTES)
    return KvParallel(
        np.int32(groups), np.int32(engine.kv_parallel_tokens), np.float32(MESSAGES * model.layers * hop.latency_s),
        np.float32(model.layers * (groups - 1) * size / (link.bytes_per_s * hop.efficiency)))


def check_target(scenario: Scenario, cost: AbstractIterationCost) -> None:
    """Refuse a time that not even the smallest chunk keeps to, alone. Raises `InputError`."""
    target_ms = scenario.engine.target_batch_time_ms
    if target_ms is None:
        return
    least = scenario.engine.min_chunk_tokens or 1
    alone_ms = 1e3 * float(cost.iteration(BatchStats.of(0, 0, 1, least, least, float(least**2))))
    if alone_ms > target_ms:
        raise InputError("engine.target_batch_time_ms", target_ms,
                         f"is less than the {alone_ms:.4g} ms of an iteration of {least} prompt token"
                         f"{'s' * (least > 1)} and nothing else, so every chunk would be of the least size",
                         f"give more than {alone_ms:.4g} ms" + ", or lower engine.min_chunk_tokens" * (least > 1))


MOST_CHUNK_RECORDS = 1 << 21
"""Rows of the tape for chunks that keep to a time: some 150 MB."""

BESIDE = 2
"""Rows of the tape for each chunk of a prompt that is alone. Beside decodes, and by relative slack, chunks are shorter;
a tape that was too short says what it lost."""


def chunk_records(scenario: Scenario, system: System, cost: AbstractIterationCost, workloads: list[Workload]) -> int:
    """Rows of the tape for chunks that keep to a time; none where only tokens count. Raises `InputError` for more than
    a tape keeps."""
    chunks, budget = make_chunks(scenario), system.scheduler.max_num_batched_tokens
    if chunks is None:
        return 0
    groups, least, rows = make_kv_parallel(scenario, system), int(chunks.least), 0
    for workload in workloads:
        alone = most_chunks(cost, chunks, groups, budget, workload.input_tokens)
        if alone > MOST_CHUNK_RECORDS:
            raise InputError("engine.target_batch_time_ms", scenario.engine.target_batch_time_ms,
                             f"cuts the prompts into some {alone:,} chunks, of which a tape of iterations keeps"
                             f" {MOST_CHUNK_RECORDS:,}",
                             "raise it or engine.min_chunk_tokens, or do not record iterations")
        # No chunk is shorter but the last of a prompt and one that fills an iteration.
        rows = max(rows, min(BESIDE * alone, int((-(-workload.input_tokens.astype(np.int64) // least)).sum())
                             + len(workload)))
    return min(rows, MOST_CHUNK_RECORDS)


def check_sums(dims: Dims, system: System, workload: Workload) -> None:
    """Refuse contexts whose sum over the sequences of an engine is beyond 32 bits. Raises `InputError`."""
    lengths = np.sort(workload.input_tokens.astype(np.int64) + workload.output_tokens)[::-1]
    most = int(lengths[:min(dims.num_slots, system.scheduler.max_num_seqs)].sum())
    if system.scheduler.kv_accounting:
        most = min(most, system.num_blocks * system.scheduler.block_size)
    if most > MOST_SUM:
        raise InputError("engine.max_num_seqs", system.scheduler.max_num_seqs,
                         f"sequences have up to {most:,} tokens of context together, more than the {MOST_SUM:,} that"
                         " are counted", "lower it, engine.num_gpu_blocks_override or the lengths")
