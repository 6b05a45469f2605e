"""Ranks that iterate together against the reference, which keeps them in step one iteration at a time."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim.engine import loop
from tests.engine import cases as c
from tests.engine import test_prefix
from tests.reference import simulator

FIELDS = ("instance", "scheduled_s", "first_token_s", "finish_s", "preemptions")
"""What the reference says about requests."""

RANKS = 3


def compare(batch, flags, dims, router: str) -> dict[str, int]:
    """Bit for bit; returns what the cases had in them."""
    seen = dict(cases=0, preemptions=0, uneven=0)
    world = jax.device_get(loop.run(dims, *c.inputs(batch, flags, dims, router)))
    for lane, case in enumerate(batch):
        try:
            result = c.reference(case, flags, dims, router)
        except ValueError:
            continue
        got = c.unpack(dims, world, lane, len(case))
        assert got["fault"] == 0
        for name in FIELDS:
            want = np.array([getattr(request, name) for request in result.requests])
            np.testing.assert_array_equal(got[name], want, err_msg=f"{lane} {name}")
        starts = {}
        for record in result.iterations:
            starts.setdefault((record.start_s, record.instance // dims.num_ranks), []).append(record)
        assert got["num_iterations"].sum() == len(starts)
        seen["cases"] += 1
        seen["preemptions"] += int(got["preemptions"].sum())
        seen["uneven"] += sum(len({r.duration_s for r in records}) > 1 for records in starts.values())
    return seen


@pytest.mark.parametrize("name, executors", [("vllm-v1", 1), ("vllm-v1-async", 2), ("vllm-v0", 1)])
def test_engine_equals_reference(name, executors):
    """Queues, pools and batches of their own; starts and ends in common."""
    flags = simulator.preset(name)
    dims = replace(c.dims_of(name, executors), num_ranks=RANKS)
    seen = compare(c.draw_many(5, flags, dims), flags, dims, "round_robin")
    assert seen["cases"] > 40 and seen["preemptions"] > 5 and seen["uneven"] > 500, seen


def test_with_prefix_caching():
    """Every rank finds what it has computed itself."""
    flags = replace(simulator.preset("vllm-v1"), prefix_caching=True)
    dims = replace(c.dims_of("vllm-v1", 1, **test_prefix.SIZES), num_ranks=2)
    # Identical prompts of whole blocks make second copies, which the engine does not follow.
    batch = [case for case in test_prefix.draw(7, flags, dims) if not has_whole_twins(case, dims)]
    seen = compare(batch, flags, dims, "round_robin")
    assert seen["cases"] > 10 and seen["uneven"] > 100, seen


def has_whole_twins(case, dims) -> bool:
    """Whether two prompts are the same and fill their blocks."""
    whole = [tuple(ids) for ids, n in zip(case.prefixes, case.prompt, strict=True) if n % dims.block_size == 0 and ids]
    return len(set(whole)) < len(whole)
