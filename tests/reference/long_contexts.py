"""Long contexts: chunks as long as an iteration may take, and KV that several groups of devices hold.

Token by token and prompt by prompt; nothing is fast. Source: Mnemosyne and Medha, arXiv 2409.17264.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from .flags import Flags
from .state import BatchStatsRef, Job, Plan


@dataclass(frozen=True)
class Groups:
    """groups: of devices; tokens: that each takes of a context before the next does; what follows is spread evenly.
    merge_s, token_merge_s: of an iteration with tokens of contexts on several groups, and of each of them."""

    groups: int
    tokens: int
    merge_s: float = 0.0
    token_merge_s: float = 0.0

    def on_busiest(self, context: Fraction | int) -> Fraction:
        """Tokens of a context there."""
        held = [Fraction(min(max(context - k * self.tokens, 0), self.tokens)) for k in range(self.groups)]
        behind = context - sum(held)
        return max(held) + behind / self.groups

    def pairs(self, start: int, end: int) -> Fraction:
        """Twice the area under what each query of a chunk finds there: contexts go up by one token, and what is found
        is a straight line within it."""
        return _area(self, end) - _area(self, start)


@functools.cache
def _area(groups: Groups, context: int) -> Fraction:
    """From the first token on."""
    if context == 0:
        return Fraction(0)
    return _area(groups, context - 1) + groups.on_busiest(context - 1) + groups.on_busiest(context)


Entries = Sequence[tuple[Job, int]]


def seconds(entries: Entries, stats: BatchStatsRef, flags: Flags
            ) -> tuple[BatchStatsRef, float]:
    """What a cost function is told of an iteration, and what comes on top of its answer."""
    cut: Groups | None = flags.kv_groups
    if cut is None:
        return stats, 0.0
    contexts = [job.computed + 1 for job, _ in entries if job.is_prefilled]
    chunks = [(job.scheduled_tokens, tokens) for job, tokens in entries if not job.is_prefilled]
    short, long = ([n for n in contexts if (n > cut.tokens) == is_long] for is_long in (False, True))
    # Short ones lie on one group each, as evenly as can be.
    read = max([Fraction(sum(short), cut.groups), *short]) + sum(map(cut.on_busiest, long))
    spread = len(long) + sum(c for h, c in chunks if h + c > cut.tokens)
    told = replace(stats, decode_context=float(read), prefill_pairs=float(sum(cut.pairs(h, h + c) for h, c in chunks)))
    return told, cut.merge_s + cut.token_merge_s * spread if spread else 0.0


def chunk_in_time(plan: Plan, job: Job, most: int, flags: Flags, predict: Callable[[Entries], float]) -> int | None:
    """Tokens of the next chunk of a prompt; None where it would be too few for it to join others."""
    if flags.target_s is None:
        return most
    tokens = 0
    while tokens < most and predict([*plan.entries, (job, tokens + 1)]) <= flags.target_s:
        tokens += 1
    least = min(flags.min_chunk_tokens, most)
    is_first = all(other.is_prefilled for other, _ in plan.entries)
    return None if tokens < least and not is_first else max(tokens, least)
