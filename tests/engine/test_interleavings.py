"""Laws under random interleavings of what may happen to a request: outages, deadlines, retries and preemptions;
migrations, preemptions and instances that come and go, also with outages; hand-overs over links; role switches,
preemptions, hand-overs and parts of images that are dealt again, also over links that are shared; outages, role
switches, preemptions and hand-overs.

Migrations and roles are refused beside each other, as are deadlines beside either.

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
from jaxsim.engine.outcomes import embedded, handed_over, role_changes
from jaxsim.kernels import clock, packed
from jaxsim.state.control import ON, STARTING
from tests.engine import cases as c
from tests.engine import failure_cases as fc
from tests.engine import link_cases as links
from tests.engine import moving_failure_cases as mc
from tests.engine import test_hand_over as roles
from tests.engine import test_links
from tests.engine import test_migration as moves
from tests.engine import test_role_switching as switches
from tests.engine import test_switching_failures as sf
from tests.reference import simulator
from tests.reference.disaggregation import NamedLink

WINDOW = 24
"""Transfers under way at a time: more than the requests of a case that are."""

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


def overfull_links(end: np.ndarray, seconds: np.ndarray, start_s: np.ndarray, end_s: np.ndarray) -> int:
    """Spans of time in which a link carried more than it can.

    Arrays over transfers: which link, seconds that it takes alone, when it could begin and when it had all its bytes.
    """
    found = 0
    for one in np.unique(end):
        mine = end == one
        for start in np.unique(start_s[mine]):
            for until in np.unique(end_s[mine]):
                inside = mine & (start_s >= start) & (end_s <= until)
                found += bool(seconds[inside].sum() > until - start) if inside.any() else 0
    return found


def test_a_link_that_is_too_full_is_found():
    """Two transfers of a second in a second and a half."""
    both = [np.array(x) for x in ([0, 0], [1.0, 1.0], [0.0, 0.5], [1.0, 1.5])]
    assert overfull_links(*both) == 1
    both[-1] = np.array([1.0, 2.0])
    assert overfull_links(*both) == 0


def test_hand_overs_over_links():
    """Prompts and outputs on different instances: as above, and bytes over a link are at most bandwidth times time, be
    it the way out of an instance, the way into one, or a link that all instances of two pools share."""
    flags, dims, seen = simulator.preset("vllm-v1"), test_links.dims_of("vllm-v1", "fifo"), Counter()
    drawn = test_links.drawn(11, flags, dims, "fifo")
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
        is_moved = world.transfers[lane, :len(case), hand_over.NUMBER] >= 0
        over = {name: values[is_moved] for name, values in handed_over(world, np.s_[lane, :len(case)]).items()}
        source, target = got["instance"][is_moved], over["decode_instance"]
        accepted, due = over["accepted_s"], over["delivered_s"]
        seconds, latency_s = links.alone_s(rules, rules.pools, case.prompt[is_moved], source, target)
        ends = links.ends_of(rules, rules.pools, source, target)
        laws = {
            "every request finishes, once": got["finished"] == len(case),
            "no block of nobody": bool(np.array_equal(got["used_blocks"], world.returned[lane][:-1])),
            "blocks within the pool": bool(np.all(got["peak_blocks"] <= case.limits["num_blocks"])),
            "accepted once": len(set(world.transfers[lane, :len(case), hand_over.NUMBER][is_moved])) == is_moved.sum(),
            "a transfer takes its time": bool(np.all(due - accepted >= seconds + latency_s)),
            "no link carries more than it can": sum(
                overfull_links(end, seconds, accepted, due - latency_s) for end in ends) == 0}
        assert [name for name, holds in laws.items() if not holds] == [], (lane, case, rules)
        whole = rules.overlap_layers == 0
        seen["moved"] += int(is_moved.sum())
        seen["waited"] += int(whole * (due - accepted > np.maximum(seconds, 2.0**-30) + latency_s).sum())
        seen["over shared ones"] += int((ends[2] < 1000).sum())
        seen["preempted"] += int(got["preemptions"].sum())
    assert all(seen[what] > least for what, least in (
        ("moved", 100), ("waited", 20), ("over shared ones", 20), ("preempted", 5))), seen
    assert seen["refused"] < 20, seen


def role_at(changes: np.ndarray, first: str, instance: int, time_s: float) -> str:
    """Role of an instance just before a time. changes: rows (instance, source, target, decided, stopped, emptied,
    changed) in seconds, NaN where that has not come; first: its role at the beginning."""
    mine = [row for row in changes if row[0] == instance and row[6] < time_s]
    return switches.ROLES[int(mine[-1][2])] if mine else first


def broken_by_switches(one: tuple, dims, world, lane: int) -> tuple[list[str], Counter]:
    """Names of the laws that a run breaks in which instances change their role, and what happened in it."""
    case, rules, encoding, tiles, switching = one
    count, got = len(case), c.unpack(dims, world, lane, len(case))
    is_moved = world.transfers[lane, :count, hand_over.NUMBER] >= 0
    over = {name: values[is_moved] for name, values in handed_over(world, np.s_[lane, :count]).items()}
    source, target = got["instance"][is_moved], over["decode_instance"]
    accepted, due = over["accepted_s"], over["delivered_s"]
    seconds, latencies = links.alone_s(rules, ("prefill", "decode"), case.prompt[is_moved],
                                       np.zeros(len(source)), np.ones(len(source)))
    numbers = world.transfers[lane, :count, hand_over.NUMBER][is_moved]
    encoded = []
    if dims.has_parts:
        each = [t if encoding.is_split else (sum(t),) for t in tiles if t]
        of = np.repeat([r for r in range(count) if tiles[r]], [len(t) for t in each]).astype(int)
        parts = embedded(world, lane, np.s_[count:count + len(of)])
        encoded = list(zip(parts["owner"], parts["encoded_s"], strict=True))
        source = np.concatenate([source, parts["owner"]])
        target = np.concatenate([target, got["instance"][of]])
        accepted, due = (np.concatenate([a, parts[b]]) for a, b in ((accepted, "accepted_s"), (due, "delivered_s")))
        work = np.array([n for t in each for n in t], float) * encoding.bytes_per_tile / rules.bandwidth
        seconds, latencies = np.concatenate([seconds, work]), np.append(latencies, np.full(len(of), rules.latency_s))
    changes, counts = role_changes(world, lane), c.w.count_rows(dims).everything(world.counts[lane])
    pool = max(*(flags.num_blocks for flags in switching.flags.values()), encoding.cache_tiles if dims.has_parts else 0)
    stamps = (case.arrival_s, got["scheduled_s"], got["first_token_s"], got["finish_s"])

    def is_as(role: str, instances, times) -> bool:
        return all(role_at(changes, rules.roles[int(i)], i, t) == role for i, t in zip(instances, times, strict=True))

    served = [(i, s, t) for i, s, t in zip(got["instance"], got["scheduled_s"], got["first_token_s"], strict=True)]
    served += list(zip(over["decode_instance"], over["accepted_s"], got["finish_s"][is_moved], strict=True))
    done = changes[~np.isnan(changes[:, 6])]
    # Who waits on a shared link beside others has a part of it: the link is one more end of all transfers.
    ends = source, target, *([np.zeros_like(source)] if any(x.is_shared for x in rules.named_links.values()) else [])
    laws = {
        "every request finishes, once": got["finished"] == count,
        "nobody is left on the way": not (counts.rank.in_transfer.length.any() or counts.rank.ready.length.any()
                                          or world.unaccepted[lane, :-1, 2].any() or world.roles.handed.length[lane]),
        "no block of nobody": bool(np.array_equal(got["used_blocks"], world.returned[lane][:-1])),
        "blocks within the pool": bool(np.all(got["peak_blocks"] <= pool)),
        "accepted once": len(set(numbers)) == is_moved.sum() == (case.output > 1).sum(),
        "every token after the first has its gap, once": got["itl"].sum() == (case.output - 1).sum(),
        "clocks do not run back": all(bool(np.all(a <= b)) for a, b in zip(stamps, stamps[1:], strict=False)),
        "handed over behind its first token": bool(np.all(
            (got["first_token_s"][is_moved] <= over["accepted_s"]) & (over["accepted_s"] <= over["delivered_s"])
            & (over["delivered_s"] <= got["finish_s"][is_moved]))),
        "a transfer takes its time": bool(np.all(due - accepted >= seconds + latencies)),
        "no link carries more than it can": sum(
            overfull_links(end, seconds, accepted, due - latencies) for end in ends) == 0,
        "images by who encodes": is_as("encode", *zip(*encoded, strict=True)) if encoded else True,
        "prompts by who computes prompts": is_as("prefill", got["instance"], got["first_token_s"]),
        "outputs by who decodes": is_as("decode", over["decode_instance"], got["finish_s"][is_moved]),
        "nobody is at who changes": not any(i == row[0] and start < row[6] and row[5] < end
                                            for row in done for i, start, end in served),
        "a switch has its order": bool(np.all(np.diff(done[:, 3:], axis=1) >= 0))}
    waited = due - accepted > seconds + latencies
    is_whole = rules.overlap_layers == 0
    seen = Counter({
        "switches": len(done), "preemptions": int(got["preemptions"].sum()), "transfers": len(seconds),
        "waited for a link": is_whole * int(waited.sum()), "parts": len(encoded),
        "dealt again": int(world.roles.num_handed[lane])})
    seen["all in one run"] = int(all(seen[what] for what in ("switches", "preemptions", "waited for a link")))
    return [name for name, holds in laws.items() if not holds] + left_behind(dims, world, lane), seen


def check_switches(drawn, dims, world) -> Counter:
    """All laws, over a batch; returns what happened."""
    seen = Counter()
    for lane, one in enumerate(drawn):
        if world.fault[lane]:
            seen["refused"] += 1
            continue
        broken, happened = broken_by_switches(one, dims, world, lane)
        assert broken == [], (lane, one)
        seen += happened
    return seen


def test_role_switches_preemptions_and_transfers():
    """Parts of images that wait are dealt again, KV and embeddings are on the way while roles change."""
    flags, dims = simulator.preset("vllm-v1"), c.dims_of(
        "vllm-v1", switches.EXECUTORS, has_roles=True, has_parts=True, has_role_switching=True)
    drawn = switches.draw(21, flags, dims)
    seen = check_switches(drawn, dims, jax.device_get(loop.run(dims, *switches.inputs(drawn, dims, flags))))
    print(seen)
    assert all(seen[what] > 10 for what in ("switches", "preemptions", "transfers", "waited for a link", "parts",
                                            "dealt again")) and seen["all in one run"] > 4, seen
    assert seen["refused"] < 20, seen


@pytest.mark.slow
def test_role_switches_over_links_that_are_shared():
    """Transfers take max-min fair parts of the links of their ends, and of one that all of them share; as in the
    reference, and no law is broken."""
    flags, dims = simulator.preset("vllm-v1"), c.dims_of(
        "vllm-v1", switches.EXECUTORS, has_roles=True, has_role_switching=True, num_flights=WINDOW, num_links=1,
        is_max_min=True)
    rng, drawn = np.random.default_rng(31), []
    for case, rules, *rest in switches.draw(31, flags, dims):
        link = NamedLink(rules.bandwidth * 2.0 ** -int(rng.integers(0, 6)), rules.latency_s, bool(rng.integers(2)))
        drawn.append((case, replace(rules, discipline="max_min", hand_over=str(rng.choice(["push", "pull"])),
                                    bytes_per_token=1.0, named_links={("prefill", "decode"): link}), *rest))
    world = jax.device_get(loop.run(dims, *switches.inputs(drawn, dims, flags)))
    same, seen = switches.compare(drawn, flags, dims, world), check_switches(drawn, dims, world)
    print(same, seen)
    assert same["cases"] > 40 and same["switches"] > 20 and same["with_transfers_out"] > 10, same
    assert all(seen[what] > 10 for what in ("switches", "preemptions", "transfers", "waited for a link")), seen
    assert seen["all in one run"] > 4 and seen["refused"] < 20, seen


# --- outages beside the others --------------------------------------------------------------------------------


def served_through(one: fc.FailureCase, instances, starts, ends) -> bool:
    """Whether anybody is served by an instance that goes down meanwhile."""
    spans = list(zip(instances, starts, ends, strict=True))
    return any(i == instance and start < down < end for instance, start, end in spans for i, down, _ in one.outages)


OTHERWISE = ("blocks at the end", "blocks within the pool", "nobody is served through an outage")
"""Laws of outages that are said otherwise where requests are in several places."""


@pytest.mark.slow
def test_outages_migrations_preemptions_and_instances_that_come_and_go():
    flags, seen = replace(simulator.preset("vllm-v1"), headroom_blocks=6), Counter()
    dims = mc.dims_of("vllm-v1", has_scaling=True, has_urgent=True)

    @SEEDS
    @given(st.integers(0, 2**32))
    def check(seed):
        batch = mc.draw_many(seed, flags, dims, "freeness", "last_come")
        world = mc.simulate(batch, flags, dims)
        for lane, one in enumerate(batch):
            got = mc.unpack(dims, world, lane, len(one))
            stays = (got["status"] == "finished") & (got["losses"] == 0) & (got["migrations"] == 0)
            fleet = world.control.fleet
            laws = {
                "an instance of the cluster": bool(np.all((got["last_instance"] >= -1)
                                                          & (got["last_instance"] < moves.EXECUTORS))),
                "no block of nobody": not got["used_blocks"].any() and not got["left"].any(),
                "blocks within the pool": bool(np.all(got["peak_blocks"] <= one.case.limits["num_blocks"])),
                "who stands still for a migration is stalled": bool(np.all(
                    (got["downtime_s"] <= got["stalled_s"]) | (got["sendings"] > 1))),
                "a link carries a block in its time": bool(np.all(
                    got["downtime_s"] >= (one.rules.block_s + one.rules.latency_s) * got["migrations"])),
                "instances on are those of the beginning, started and not drained": np.isin(
                    fleet.status[lane], (ON, STARTING)).sum() == one.scaling.fewest + got["starts"] - got["drains"],
                "nobody is served through an outage": not served_through(
                    one.failing, *(got[name][stays] for name in ("instance", "scheduled_s", "finish_s")))}
            broken = [name for name in broken_by_outages(one.failing, dims, world, lane) if name not in OTHERWISE]
            assert broken + [name for name, holds in laws.items() if not holds] == [], (lane, one)
            happened = {name: int(got[name].sum()) for name in ("losses", "restarts", "migrations", "preemptions")}
            happened |= dict(starts=got["starts"], drains=got["drains"], broken=int(got["aborted"][-1]))
            seen.update(happened)
            seen["all in one run"] += all(happened[what] for what in (
                "losses", "restarts", "migrations", "preemptions", "starts"))

    check()
    print(seen)
    assert all(seen[what] > 10 for what in ("losses", "restarts", "migrations", "preemptions", "starts", "drains",
                                            "broken")) and seen["all in one run"] > 2, seen


def tokens_over(result: simulator.ReferenceResult, rules: simulator.Disaggregation, case: c.Case) -> np.ndarray:
    """Of each request, whose KV went over last; the prompt where none did, or where KV has no bytes."""
    tokens = case.prompt.copy()
    for transfer in result.transfers if rules.bytes_per_token else ():
        tokens[transfer.request] = round(transfer.num_bytes / rules.bytes_per_token)
    return tokens


@pytest.mark.slow
def test_outages_role_switches_preemptions_and_transfers():
    flags, dims, seen = simulator.preset("vllm-v1"), sf.dims_of("vllm-v1"), Counter()
    for seed in (41, 42):
        batch = sf.draw_many(seed, flags, dims)
        world = sf.simulate(batch, flags, dims)
        for lane, (one, switching) in enumerate(batch):
            if world.fault[lane] == c.w.STARVED:
                seen["refused"] += 1
                continue
            got, case, rules = sf.pc.unpack(dims, world, lane, len(one)), one.case, one.rules
            is_done, is_moved = got["status"] == "finished", ~np.isnan(got["delivered_s"])
            source, target = got["instance"][is_moved], got["decode_instance"][is_moved]
            accepted, due = got["accepted_s"][is_moved], got["delivered_s"][is_moved]
            # Of a request that was sent on more goes over; the engine does not keep how much.
            tokens = tokens_over(sf.reference(one, switching, flags, dims), rules, case)[is_moved]
            seconds, latency_s = links.alone_s(rules, ("prefill", "decode"), tokens,
                                               np.zeros(len(source)), np.ones(len(source)))
            has_own = (got["losses"] == 0)[is_moved]
            seen["more went over"] += int((tokens > case.prompt[is_moved]).sum())
            changes = role_changes(world, lane)
            calm, moved = is_done & (got["losses"] == 0), is_done & (got["losses"] == 0) & is_moved
            pool = max(flags.num_blocks for flags in switching.flags.values())

            def is_as(role, instances, times, changes=changes, rules=rules):
                return all(role_at(changes, rules.roles[int(i)], i, t) == role
                           for i, t in zip(instances, times, strict=True))

            laws = {
                "nobody is left on the way": not got["left"].any() and not got["used_blocks"].any(),
                "blocks within the pool": bool(np.all(got["peak_blocks"] <= pool)),
                "a transfer takes its time": bool(np.all(due - accepted >= seconds + latency_s)),
                "no link carries more than it can": sum(
                    overfull_links(end, seconds, accepted, due - latency_s) for end in (source, target)) == 0,
                "accepted once": len(set(world.transfers[lane, :len(one), hand_over.NUMBER][is_moved])) == len(source),
                "handed over behind its first token": bool(np.all(
                    (got["first_token_s"] <= got["accepted_s"])[is_moved & is_done]) and np.all(accepted <= due)),
                "who is not lost is handed over": bool(np.all(is_moved[calm] == (case.output > 1)[calm])),
                "prompts by who computes prompts": is_as("prefill", got["instance"][calm], got["first_token_s"][calm]),
                "outputs by who decodes": is_as("decode", got["decode_instance"][moved], got["finish_s"][moved]),
                "nobody is served through an outage": not served_through(
                    one.failing, *(got[name][calm] for name in ("instance", "scheduled_s", "first_token_s")))
                and not served_through(
                    one.failing, *(got[name][moved] for name in ("decode_instance", "accepted_s", "finish_s"))),
                "KV is fetched from who is up": not served_through(
                    one.failing, *(got[name][moved] for name in ("instance", "first_token_s", "delivered_s")))}
            broken = [name for name in broken_by_outages(one.failing, dims, world, lane) if name not in OTHERWISE]
            assert broken + [name for name, holds in laws.items() if not holds] == [], (seed, lane, one)
            happened = {name: int(got[name].sum()) for name in ("losses", "restarts", "preemptions")}
            happened |= dict(switches=int((~np.isnan(changes[:, 6])).sum()), transfers=int(is_moved.sum()),
                             waited=int((due - accepted > seconds + latency_s)[has_own].sum()))
            seen.update(happened)
            seen["all in one run"] += all(happened.values())
    print(seen)
    assert all(seen[what] > 10 for what in ("losses", "restarts", "preemptions", "switches", "transfers", "waited"))
    assert seen["more went over"] > 4, seen
    assert seen["all in one run"] > 4 and seen["refused"] < 20, seen
