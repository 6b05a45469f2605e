"""What prompts have in common, as paths through segments of KV blocks."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxsim.workload.segments import radix_segments
from jaxsim.workload.workload import Workload


class Prefixes(NamedTuple):
    """Paths of all prompts through their segments (-1 behind the end), and the bounds of these in blocks."""

    paths: Int[np.ndarray, "requests path"]
    bounds: Int[np.ndarray, "requests path+1"]

    @property
    def num_segments(self) -> int:
        """Segments of all of them."""
        return int(self.paths.max(initial=-1)) + 1

    @property
    def num_releases(self) -> int:
        """Entries of the log of releases, if nobody is preempted: all segments of a prompt, and what is behind it."""
        return int((self.paths >= 0).sum()) + len(self.paths)


def shared_prefixes(workload: Workload, block_size: int) -> Prefixes:
    """The segments that prompts share, for blocks of `block_size` tokens.

    A prompt of whole blocks only may find all but its last block, so there a segment ends too. Raises `InputError`
    where the workload's ids stand for tokens that are not whole blocks. Without ids, turns of sessions share what they
    have in common (`session_prefixes`).
    """
    if workload.prefix_hashes is None and workload.think_s is not None:
        return session_prefixes(workload, block_size)
    if workload.prefix_hashes is None:
        return Prefixes(np.full((len(workload), 1), -1), np.zeros((len(workload), 2), np.int64))
    offsets, per = workload.prefix_offsets.astype(np.int64), workload.prefix_block_size
    tokens = workload.input_tokens.astype(np.int64)
    most = (tokens - 1) // block_size * block_size
    counts = np.minimum(np.diff(offsets), -(-most // per))
    shorter = np.concatenate([workload.prefix_hashes[a:a + n] for a, n in zip(offsets[:-1], counts, strict=True)])
    segments = radix_segments(
        np.concatenate([offsets, offsets[-1] + np.cumsum(counts)]),
        np.concatenate([workload.prefix_hashes, shorter]), np.concatenate([tokens, np.maximum(most, 1)]),
        prefix_block_size=per, block_size=block_size)
    width, count = max(segments.max_path_segments, 1), len(workload)
    paths, bounds = np.full((count, width), -1), np.zeros((count, width + 1), np.int64)
    starts, flat = segments.paths()
    lengths = np.diff(starts)[:count]
    is_in = np.arange(width) < lengths[:, None]
    paths[is_in] = flat[:starts[count]]
    bounds[:, 1:][is_in] = segments.end_blocks[paths[is_in]]
    return Prefixes(paths, np.maximum.accumulate(bounds, axis=1))


def session_prefixes(workload: Workload, block_size: int) -> Prefixes:
    """Segments of growing contexts: what all sessions begin with, then what each turn of a session adds.

    A turn's path goes on through the whole blocks of its answer, of which the last token is never computed; the next
    turn finds them. Where a prompt is shorter than the context before it, the session's context begins anew.
    """
    prompt, session = workload.input_tokens.astype(np.int64), workload.session
    context = prompt + workload.output_tokens
    ends = np.maximum((context - 1) // block_size, 0)
    shared = workload.shared_tokens // block_size
    paths: list[list[int]] = [[] for _ in prompt]
    bounds: list[list[int]] = [[] for _ in prompt]
    num_segments = int(shared > 0)
    # In the order of turns; a path is that of the turn before it, and more.
    before = np.full(len(prompt), -1)
    successors = workload.successors()
    before[successors[successors >= 0]] = np.flatnonzero(successors >= 0)
    for i in np.lexsort((workload.turn, session)).tolist():
        last = before[i]
        if last >= 0 and prompt[i] >= context[last]:
            paths[i], bounds[i] = paths[last].copy(), bounds[last].copy()
        elif shared and prompt[i] > workload.shared_tokens:
            paths[i], bounds[i] = [0], [shared]
        if ends[i] > (bounds[i][-1] if bounds[i] else 0):
            paths[i].append(num_segments)
            bounds[i].append(int(ends[i]))
            num_segments += 1
    width = max(map(len, paths), default=0) or 1
    return Prefixes(
        np.array([path + [-1] * (width - len(path)) for path in paths]),
        np.array([[0, *at, *[at[-1] if at else 0] * (width - len(at))] for at in bounds], np.int64))
