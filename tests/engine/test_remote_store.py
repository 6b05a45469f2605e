"""A store that instances share, behind prefix caches and host memory, against the reference, which goes block by
block."""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim.engine import loop, remote_store
from jaxsim.kernels import clock
from jaxsim.policy.offload import Offload
from jaxsim.policy.remote_store import RemoteStore
from jaxsim.state import world as w
from tests.engine import cases as c
from tests.engine import test_offload as host
from tests.engine.test_prefix import SIZES
from tests.reference import simulator
from tests.reference.offload import Offloading
from tests.reference.remote_store import Remote

pytestmark = pytest.mark.unoptimised

copies = host.copies


def draw_cases(seed: int, flags: simulator.Flags, dims) -> list[tuple[c.Case, Offloading]]:
    """The same as of host memory, with links and an egress from nothing to longer than iterations."""
    rng, drawn = np.random.default_rng(900 + seed), []
    for case, rules in host.draw_cases(seed, flags, dims):
        if not dims.has_offload:
            rules = replace(rules, capacity=0)
        remote = Remote(float(rng.choice([0.0, 2.0**-7, 2.0**-4])), float(rng.choice([0.0, 0.0, 2.0**-6, 2.0**-2])))
        if dims.has_egress:
            remote = replace(remote, egress_s=float(rng.choice([2.0**-6, 2.0**-3, 1.0])))
        if dims.remote_log:
            need = -(-int(case.prompt.max() + case.output.max()) // dims.block_size)
            remote = replace(remote, capacity=int(rng.choice([need // 2, need, 2 * need, 4 * need])))
        drawn.append((case, replace(rules, remote=remote)))
    return drawn


def as_read(rules: Offloading, dims) -> dict:
    """The same rules as the engine reads them."""
    remote, layers, by_layer = rules.remote, np.int32(rules.layers), np.bool_(rules.by_layer)
    block_s, egress = remote.link_s, None
    if dims.has_egress:
        block_s, egress = max(block_s, remote.egress_s), np.float32(remote.egress_s)
    capacity = np.int32(host.EVERYTHING if remote.capacity is None else remote.capacity)
    made = dict(remote=RemoteStore(np.float32(block_s), np.float32(remote.latency_s), layers, by_layer, capacity,
                                   egress))
    if dims.has_offload:
        made["offload"] = Offload(np.int32(rules.capacity), np.float32(rules.block_s), layers, by_layer)
    return made


def params_of(case: c.Case, flags: simulator.Flags, rules: Offloading, dims):
    """What the engine is told of a case."""
    params = c.make_params(case, flags, "mixed")
    (group,) = params.groups
    return replace(params, groups=(replace(group, batching=replace(group.batching, **as_read(rules, dims))),))


def simulate(drawn: list[tuple[c.Case, Offloading]], flags: simulator.Flags, dims) -> list[dict]:
    """Engine results of a batch, padded to `LANES`."""
    padded = drawn + drawn[:1] * (c.LANES - len(drawn))
    params = c.stack([params_of(case, flags, rules, dims) for case, rules in padded])
    _, requests = c.inputs([case for case, _ in padded], flags, dims, "mixed")
    world = jax.device_get(loop.run(dims, params, requests))
    results = []
    for lane, (case, _) in enumerate(drawn):
        got, n = c.unpack(dims, world, lane, len(case)), len(case)
        held = w.count_rows(dims).everything(world.counts[lane]).rank.offload
        loads = w.clock_rows(dims).everything(world.clocks[lane]).rank.loads
        there = world.puts[lane, :, remote_store.SINCE].reshape(dims.num_executors, -1).max(axis=0)
        if dims.remote_log:
            is_item = np.arange(len(there)) != dims.num_segments
            got |= dict(roomed=world.roomed[lane, is_item].sum(), room=world.room[lane, remote_store.BLOCKS])
        results.append(got | dict(
            loaded_tokens=world.loaded[lane, :n], fetched_tokens=world.fetched[lane, :n],
            loaded_blocks=held.loaded_blocks.sum(1), fetched_blocks=held.fetched_blocks.sum(1),
            loads_s=(loads.hi.astype(float) + loads.lo).sum(1),
            there=there[np.arange(len(there)) != dims.num_segments].sum()))
    return results


def compare(drawn, flags, dims, copies, seen) -> None:
    """Everything bit for bit, but where the engine has a second copy of a block, which it says is approximated."""
    for (case, rules), got in zip(drawn, simulate(drawn, flags, dims), strict=True):
        copies[0] = 0
        try:
            result = c.reference(case, replace(flags, offloading=rules), dims, "mixed")
        except ValueError:
            continue
        want = c.answer(result, dims.num_executors, case.limits["num_blocks"])
        for name in ("cached_tokens", "loaded_tokens", "fetched_tokens"):
            want[name] = np.array([getattr(r, name) for r in result.requests])
        for name in ("loaded_blocks", "fetched_blocks"):
            want[name] = np.array([store.seen[name] for store in result.stores])
        want["loads_s"] = np.array([store.delay * clock.GRID_S for store in result.stores])
        shared = result.shared_store
        if not dims.remote_log:
            want["there"] = len(shared.blocks)
        names = c.differences(got, want)
        if dims.remote_log:
            # What is beyond the capacity is settled before the next prompt.
            if got["roomed"] != got["room"] or min(got["room"], rules.remote.capacity) != len(shared.order):
                names.append("room")
        seen.update(cases=1)
        if copies[0]:
            seen.update(with_copies=1, wrong_with_copies=bool(names))
            continue
        assert not names, (names, case, rules)
        for store in result.stores:
            seen.update(store.seen)
        seen.update(dropped=shared.num_evicted, dropped_on_the_way=shared.evicted_on_the_way,
                    touched_beyond=shared.touched_beyond)
        ends = [(record.end_s, record.instance) for record in result.iterations]
        seen.update(cached=want["cached_tokens"].sum(), loaded=want["loaded_tokens"].sum(),
                    fetched=want["fetched_tokens"].sum(), preemptions=want["preemptions"].sum(),
                    longer=(want["loads_s"] > 0).sum(), jumped=max(len(result.iterations) - got["steps"], 0),
                    ends_together=len(ends) - len({end for end, _ in ends}))


PROGRAMS = [
    ("vllm-v1", 3, dict(has_offload=True, offload_log=4096, has_egress=True, remote_log=4096)),
    pytest.param("vllm-v1-async", 3, dict(remote_log=4096), marks=pytest.mark.slow),
    pytest.param("vllm-v1-async", 3, dict(), marks=pytest.mark.slow),
    pytest.param("vllm-v1", 2, dict(has_offload=True), marks=pytest.mark.slow),
    pytest.param("vllm-v1", 1, dict(has_egress=True), marks=pytest.mark.slow),
    pytest.param("vllm-v1-priority", 3, dict(has_egress=True), marks=pytest.mark.slow)]


@pytest.mark.parametrize("name, num_executors, sizes", PROGRAMS)
def test_engine_equals_reference(name, num_executors, sizes, copies):
    """With host memory before the store and without, with an egress that all share and without."""
    flags = replace(simulator.preset(name), prefix_caching=True)
    dims = c.dims_of(name, num_executors, **SIZES, has_remote=True, **sizes)
    seen = Counter()
    for seed in range(3):
        compare(draw_cases(seed, flags, dims), flags, dims, copies, seen)
    print(dict(seen))
    assert seen["cases"] > 150 and seen["cached"] > 2000 and seen["fetched"] > 200, seen
    assert seen["preemptions"] > 20 and seen["loads_together"] > 5 and seen["longer"] > 30, seen
    assert seen["covered"] > 5 and seen["bound_by_load"] > 5, seen
    assert seen["own_blocks"] > 3 and seen["jumped"] > 100, seen
    if num_executors > 1:
        assert seen["foreign_blocks"] > 100 and seen["too_early"] > 5 and seen["ends_together"] > 50, seen
    assert (seen["touched_beyond"] > 0) == (dims.remote_log > 0), seen
    assert (seen["dropped"] > 500) == (seen["dropped_on_the_way"] > 20) == (dims.remote_log > 0), seen
    if dims.has_egress:
        assert seen["waits"] > 5 or num_executors == 1, seen
    if dims.has_offload:
        assert seen["both"] > 2 and seen["loaded_blocks"] > seen["fetched_blocks"] > 0, seen
    assert seen["with_copies"] < 0.5 * seen["cases"], seen
    assert seen["wrong_with_copies"] < 0.08 * seen["cases"], seen
