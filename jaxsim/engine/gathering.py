"""TensorRT-LLM's batch waiting: prompts that could join running decodes wait until there are enough of them.

A pass first counts the prompts at the head of the queue that would be scheduled, one a step. If they and the decodes
are fewer tokens than `batch_wait_tokens`, and fewer than `batch_wait_timeout_iters` iterations have been waited, only
the decodes run, and that is one iteration waited. Else the prompts go, and nothing has been waited. Without decodes
nobody waits. What was counted stays counted in the passes that follow: decodes only leave meanwhile, so it still fits.

Source: NVIDIA/TensorRT-LLM 1.1, tensorrt_llm/_torch/pyexecutor/py_executor.py, `_schedule` and `_waiting_requests`.
"""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine.common import Group, has, mark, take
from jaxsim.kernels.queues import Link
from jaxsim.state import world as w
from jaxsim.state.world import Counts, Rank


class Gathered(NamedTuple):
    """Requests counted so far, their tokens and blocks, the last of them; iterations waited."""

    requests: Int[Array, ""]
    tokens: Int[Array, ""]
    blocks: Int[Array, ""]
    last: Int[Array, ""]
    iterations: Int[Array, ""]


def gathered(rank: Rank) -> Gathered:
    """What a rank has counted. It lies where a prompt in chunks would, which an engine that waits has not."""
    return Gathered(rank.forming_chunk, rank.forming_known, rank.forming_computed, rank.forming_request, rank.cursor)


def _keep(rank: Rank, g: Gathered) -> Rank:
    return replace(rank, forming_chunk=g.requests, forming_known=g.tokens, forming_computed=g.blocks,
                   forming_request=g.last, cursor=g.iterations)


def _release(counts: Counts, condition: Bool[Array, ""]) -> Counts:
    """The prompts go: they are placed from the head of the queue, and nothing is counted any more."""
    g = gathered(counts.rank)
    g = g._replace(**{name: jnp.where(condition, 0, getattr(g, name)) for name in ("requests", "tokens", "blocks")})
    return mark(replace(counts, rank=_keep(counts.rank, g)), condition, w.RELEASED)


def begin(group: Group, is_fresh: Bool[Array, ""], counts: Counts) -> Counts:
    """In a pass that begins nobody waits if nothing decodes, or if enough iterations were waited."""
    is_over = gathered(counts.rank).iterations >= group.batching.batch_wait_timeout_iters
    return _release(counts, is_fresh & ((counts.batch.count == 0) | is_over))


def candidate(counts: Counts, next_waiting: Int[Array, " rows"], changed: Link) -> Int[Array, ""]:
    """The request to look at next: the head of the queue, or the one behind those counted.

    changed: the link of the queue that changes in this step, and is not in `next_waiting` yet.
    """
    g = gathered(counts.rank)
    behind = jnp.where(g.last == changed[0], changed[1], take(next_waiting, g.last))
    return jnp.where(g.requests == 0, counts.rank.queue.front, behind)


def settle(group: Group, counts: Counts, is_counted: Bool[Array, ""], is_admitted: Bool[Array, ""],
           request: Int[Array, ""], tokens: Int[Array, ""], blocks: Int[Array, ""]) -> tuple[Counts, Bool[Array, ""]]:
    """Count a request that would be scheduled, or note that one was placed. Returns whether they go now."""
    g, one = gathered(counts.rank), is_counted.astype(jnp.int32)
    decodes = counts.batch.count
    g = Gathered(g.requests + one, g.tokens + one * tokens, g.blocks + one * blocks,
                 jnp.where(is_counted, request, g.last), jnp.where(is_admitted & (decodes > 0), 0, g.iterations))
    are_enough = is_counted & (decodes + g.tokens >= group.batching.batch_wait_tokens)
    return _release(replace(counts, rank=_keep(counts.rank, g)), are_enough), are_enough


def note_waited(counts: Counts) -> Counts:
    """The iteration that starts leaves out those counted: one more waited."""
    g = gathered(counts.rank)
    waits = (g.requests > 0) & ~has(counts, w.RELEASED)
    return replace(counts, rank=_keep(counts.rank, g._replace(iterations=g.iterations + waits)))
