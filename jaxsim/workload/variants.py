"""Which fine-tune of a base every request is for.

Agents that work on one context in turn, say one that writes code, one that tests it and one that reviews it, are the
turns of a session: turn k is for variant k modulo their number. Any other request is for each of them with the same
probability. Known gap: no variant is asked more than another.
"""

import dataclasses

import numpy as np
from jaxtyping import PRNGKeyArray

from jaxsim._core.errors import InputError
from jaxsim.workload.streams import Stream, stream_key, uniforms
from jaxsim.workload.workload import Workload


def with_variants(workload: Workload, number: int, seed: int | PRNGKeyArray) -> Workload:
    """The same requests, each for one of so many variants; where they say for which, these are kept.

    Raises `InputError` for one that is not there.
    """
    if workload.variant is not None:
        if workload.variant.max() >= number:
            raise InputError("workload.variant", int(workload.variant.max()),
                             f"is not one of cluster.variants = {number}", "count from 0, or raise cluster.variants")
        return workload
    if workload.turn is not None:
        return dataclasses.replace(workload, variant=workload.turn % number)
    draws = uniforms(stream_key(seed, Stream.VARIANTS), len(workload))[:, 0]
    return dataclasses.replace(workload, variant=np.floor(draws * number).astype(np.int64))
