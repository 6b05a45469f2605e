"""Laws under random interleavings of what may happen to a request: outages, deadlines, retries and preemptions;
migrations, preemptions and instances that come and go; hand-overs over links.

By what the engine says alone: every request ends once and with one status, no token is counted twice, no block and no
slot is left behind, no pool holds more than it has, no link carries more than its bandwidth allows.
"""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jaxsim.engine import hand_over, loop
from jaxsim.kernels import clock, packed
from jaxsim.state.control import ON, STARTING
from tests.engine import cases as c
from tests.engine import failure_cases as fc
from tests.engine import test_hand_over as roles
from tests.engine import test_migration as moves
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

SEEDS = settings(max_examples=3, derandomize=True, deadline=None, database=None,
                 phases=(Phase.explicit, Phase.generate))


def left_behind(dims, world, lane: int) -> list[str]:
    """What is still there although nobody is."""
    counts = c.w.count_rows(dims).everything(world.counts[lane])
    rank = counts.rank
    nothing = {
        "sequences": not rank.running.any() and not counts.batch.count.any() and not counts.batch.offsets.any(),
        "waiting": not rank.waiting.any(), "slots": bool(np.all(world.slot_keys[lane] == packed.EMPTY)),
        "residues": not world.residues[lane].any(), "outstanding": not world.outstanding[lane].any(),
        "free slots, each once": all(sorted(row[:dims.num_slots]) == list(range(dims.num_slots))
                                     for row in world.free_slots[lane])}
    return [name for name, holds in nothing.items() if not holds]


def broken_by_outages(case: fc.FailureCase, dims, world, lane: int) -> list[str]:
    """Names of the laws that a run with outages breaks."""
    count, plain, got = len(case), case.clients.case, fc.unpack(dims, world, lane, len(case))
    is_done = got["status"] == "finished"
    arrival, span = plain.arrival_s, got["ended_s"].max()
    stamps = (arrival, got["scheduled_s"], got["first_token_s"], got["finish_s"])
    gaps, tokens = got["itl"].sum(), (plain.output - 1)
    is_single = bool(np.all(is_done & (got["sendings"] == 1)))
    up_s = np.full(dims.num_executors, span)
    for instance, start, end in case.outages:
        up_s[instance] -= max(min(end, span) - start, 0.0)

    def is_whole(request: int) -> bool:
        """Nobody is served through an outage of its instance."""
        start, end = got["scheduled_s"][request], got["finish_s"][request]
        return not any(i == got["instance"][request] and start < down < end for i, down, _ in case.outages)

    laws = {
        "no fault": got["fault"] == 0,
        "every request ends, once": got["finished"] == count,
        "one status": set(got["status"]) <= {"finished", "timed_out", "rejected", "failed"},
        "who is lost was lost": bool(np.all((got["status"] != "failed") | (got["losses"] > 0))),
        "taken as often as lost at most": bool(np.all(got["restarts"] <= got["losses"])),
        "sent as often as may be": bool(np.all(got["sendings"] <= 1 + len(case.clients.backoff_s))),
        "no sending is sent on too often": bool(np.all(got["restarts"] <= case.most_restarts * got["sendings"])),
        "clocks do not run back": all(bool(np.all((a <= b)[is_done]))
                                      for a, b in zip(stamps, stamps[1:], strict=False)),
        "ends behind arrivals": bool(np.all(got["ended_s"] >= arrival)),
        "every token after the first has its gap, once": gaps == tokens.sum() if is_single else
        tokens[is_done].sum() <= gaps <= (tokens * got["sendings"]).sum(),
        "nobody is served through an outage": all(is_whole(r) for r in np.flatnonzero(is_done & (got["losses"] == 0))),
        # Who is given up may run on behind the last end.
        "nothing runs while down": not is_single or bool(np.all(got["busy_s"] <= up_s)),
        "blocks at the end": not got["used_blocks"].any(),
        "blocks within the pool": bool(np.all(got["peak_blocks"] <= plain.limits["num_blocks"])),
        "nobody is there at the end": got["num_outstanding"] == 0,
        "stalls lie in the time served": bool(np.all(got["stalled_s"] <= got["ended_s"] - arrival))}
    return [name for name, holds in laws.items() if not holds] + left_behind(dims, world, lane)


def test_outages_deadlines_retries_and_preemptions():
    flags, dims, seen = simulator.preset("vllm-v1"), fc.dims_of("vllm-v1", 3), Counter()

    @SEEDS
    @given(st.integers(0, 2**32))
    def check(seed):
        batch = fc.draw_many(seed, flags, dims)
        world = jax.device_get(loop.run(dims, *fc.inputs(batch, flags, dims, "mixed")))
        for lane, case in enumerate(batch):
            assert broken_by_outages(case, dims, world, lane) == [], case
            got = fc.unpack(dims, world, lane, len(case))
            seen.update(got["status"].tolist())
            for name in ("restarts", "preemptions", "losses"):
                seen[name] += int(got[name].sum())
            seen["sent again"] += int((got["sendings"] > 1).sum())
            seen["both"] += int(((got["restarts"] > 0) & (got["preemptions"] > 0)).sum())

    check()
    assert all(seen[what] > 10 for what in ("finished", "timed_out", "rejected", "failed", "restarts", "preemptions",
                                            "losses", "sent again", "both")), seen


@pytest.mark.slow
def test_migrations_preemptions_and_instances_that_come_and_go():
    flags, seen = replace(simulator.preset("vllm-v1"), headroom_blocks=6), Counter()
    dims = c.dims_of("vllm-v1", moves.EXECUTORS, has_migration=True, has_demands=True, has_scaling=True,
                     has_urgent=True)

    @SEEDS
    @given(st.integers(0, 2**32))
    def check(seed):
        rng = np.random.default_rng(seed)
        drawn = [(replace(case, priority=case.priority - 1), rules)
                 for case, rules in moves.draw(seed, flags, dims, "freeness", "shortest")]
        scalings = [moves.draw_scaling(rng) for _ in drawn]
        params = c.stack([moves.with_scaling(moves.params_of(case, rules, flags), own, 6)
                          for (case, rules), own in zip(drawn, scalings, strict=True)])
        _, requests = c.inputs([case for case, _ in drawn], flags, dims, "freest")
        world = jax.device_get(loop.run(dims, params, requests))
        for lane, (case, rules) in enumerate(drawn):
            got = c.unpack(dims, world, lane, len(case))
            if got["fault"]:
                # Somebody is larger than the pool less what is kept for urgent requests.
                with pytest.raises(ValueError, match="can never be served"):
                    c.reference(case, flags, dims, "freest", migration=rules)
                seen["refused"] += 1
                continue
            counts = c.w.count_rows(dims).everything(world.counts[lane])
            moved = world.moved[lane, :len(case)]
            down_s = clock.from_integers_reference(moved[:, 2:])
            last = got["instance"] + moved[:, 1]
            # Blocks taken for a migration that was still to come belong to nobody who waits.
            held = counts.rank.held_blocks[:, 0]
            laws = {
                "every request finishes, once": got["finished"] == len(case),
                "an instance of the cluster": bool(np.all((last >= 0) & (last < moves.EXECUTORS))),
                "no block of nobody": bool(np.array_equal(got["used_blocks"], held)) and not (
                    counts.rank.kept_blocks.any() or counts.rank.waiting_blocks.any()),
                "blocks within the pool": bool(np.all(got["peak_blocks"] <= case.limits["num_blocks"])),
                "every token after the first has its gap, once": got["itl"].sum() == (case.output - 1).sum(),
                "Little's law": np.sum(got["running_s"]) == np.sum(
                    got["finish_s"] - got["scheduled_s"] - got["stalled_s"]),
                "who stands still for a migration is stalled": bool(np.all(down_s <= got["stalled_s"])),
                "a link carries a block in its time": bool(np.all(
                    down_s >= (rules.block_s + rules.latency_s) * moved[:, 0])),
                "instances on are those of the beginning, started and not drained": np.isin(
                    world.control.fleet.status[lane], (ON, STARTING)).sum() == scalings[lane].fewest + int(
                    world.control.fleet.starts[lane] - world.control.fleet.drains[lane])}
            assert [name for name, holds in laws.items() if not holds] == [], (lane, case, rules)
            seen["migrations"] += int(moved[:, 0].sum())
            seen["preemptions"] += int(got["preemptions"].sum())
            seen["both"] += int(((moved[:, 0] > 0) & (got["preemptions"] > 0)).sum())
            seen["starts"] += int(world.control.fleet.starts[lane])
            seen["drains"] += int(world.control.fleet.drains[lane])

    check()
    assert all(seen[what] > 10 for what in ("migrations", "preemptions", "both", "starts", "drains")), seen
    assert seen["refused"] < 20, seen


def overfull_links(source: np.ndarray, target: np.ndarray, seconds: np.ndarray, accepted_s: np.ndarray,
                   due_s: np.ndarray, latency_s: float) -> int:
    """Spans of time in which an end of a link carried more than it can. Arrays over transfers."""
    found = 0
    for ends in (source, target):
        for end in np.unique(ends):
            mine = ends == end
            for start in np.unique(accepted_s[mine]):
                for until in np.unique(due_s[mine]):
                    inside = mine & (accepted_s >= start) & (due_s <= until)
                    found += bool(seconds[inside].sum() > until - latency_s - start) if inside.any() else 0
    return found


def test_a_link_that_is_too_full_is_found():
    """Two transfers of a second in a second and a half."""
    both = [np.array(x) for x in ([0, 0], [1, 2], [1.0, 1.0], [0.0, 0.5], [1.0, 1.5])]
    assert overfull_links(*both, 0.0) == 1
    both[-1] = np.array([1.0, 2.0])
    assert overfull_links(*both, 0.0) == 0


def test_hand_overs_over_links():
    """Prompts and outputs on different instances: as above, and bytes over a link are at most bandwidth times time."""
    flags, dims, seen = simulator.preset("vllm-v1"), c.dims_of("vllm-v1", roles.EXECUTORS, has_roles=True), Counter()
    drawn = roles.draw(11, flags, dims)
    params = c.stack([roles.params_of(case, rules, flags) for case, rules in drawn])
    _, requests = c.inputs([case for case, _ in drawn], flags, dims, "mixed")
    world = jax.device_get(loop.run(dims, params, requests))
    for lane, (case, rules) in enumerate(drawn):
        got = c.unpack(dims, world, lane, len(case))
        if got["fault"]:
            with pytest.raises(ValueError, match="can never be served"):
                c.reference(case, flags, dims, "mixed", disaggregation=rules)
            seen["refused"] += 1
            continue
        transfers = world.transfers[lane, :len(case)].astype(np.float64)
        is_moved = transfers[:, hand_over.NUMBER] >= 0
        accepted, due = (clock.join_reference(*world.transfers[lane, :len(case), k:k + 3][is_moved].T)
                         for k in (hand_over.ACCEPTED, hand_over.DUE))
        seconds = transfers[is_moved, hand_over.SECONDS]
        laws = {
            "every request finishes, once": got["finished"] == len(case),
            "no block of nobody": bool(np.array_equal(got["used_blocks"], world.returned[lane][:-1])),
            "blocks within the pool": bool(np.all(got["peak_blocks"] <= case.limits["num_blocks"])),
            "accepted once": len(set(transfers[is_moved, hand_over.NUMBER])) == is_moved.sum(),
            "a transfer takes its time": bool(np.all(due - accepted >= seconds + rules.latency_s)),
            "no link carries more than it can": overfull_links(
                got["instance"][is_moved], transfers[is_moved, hand_over.TARGET], seconds, accepted, due,
                rules.latency_s) == 0}
        assert [name for name, holds in laws.items() if not holds] == [], (lane, case, rules)
        seen["moved"] += int(is_moved.sum())
        seen["waited"] += int((due - accepted > seconds + rules.latency_s).sum())
        seen["preempted"] += int(got["preemptions"].sum())
    assert seen["moved"] > 100 and seen["waited"] > 20 and seen["preempted"] > 5, seen
    assert seen["refused"] < 20, seen
