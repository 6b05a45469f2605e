"""Links between pools: how fast each way is, links that the engines of two pools share, max-min fair parts of them."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.engine import lower, max_min
from jaxsim.engine.simulate import simulate
from jaxsim.spec.scenario import Scenario
from jaxsim.study import runner
from tests.engine import cases as c
from tests.engine import link_cases as links
from tests.engine import test_encode, test_fair_links, test_pools
from tests.engine import test_hand_over as roles
from tests.reference import simulator
from tests.reference.transfers import MaxMinLinks, Transfer

pytestmark = pytest.mark.unoptimised


def drawn(seed: int, flags: simulator.Flags, dims, discipline: str) -> list[tuple]:
    """Cases with links between their pools, half of them of two prefill and two decode executors."""
    rng, found = np.random.default_rng(seed), []
    for lane, (case, rules) in enumerate(test_fair_links.drawn(seed, flags, dims)):
        names = rules.roles if lane % 2 else ("prefill", "decode", "decode", "prefill")
        found.append((case, links.draw_links(rng, replace(rules, roles=names, discipline=discipline))))
    return found


def dims_of(name: str, discipline: str):
    window = 0 if discipline == "fifo" else test_fair_links.WINDOW
    return c.dims_of(name, roles.EXECUTORS, has_roles=True, num_links=links.NUM_LINKS, num_flights=window,
                     is_max_min=discipline == "max_min")


def exercised(cases, flags, dims) -> Counter:
    """What transfers met, as the reference has it."""
    seen = Counter()
    for case, rules in cases:
        try:
            result = c.reference(case, flags, dims, "mixed", disaggregation=rules)
            fair = c.reference(case, flags, dims, "mixed", disaggregation=replace(rules, discipline="fair"))
        except ValueError:
            continue
        seen += links.exercised(rules, result.transfers)
        if rules.discipline == "max_min":
            ends = {t.request: t.delivered_s for t in fair.transfers}
            seen["sooner than equal shares"] += sum(t.delivered_s < ends[t.request] for t in result.transfers)
    return seen


@pytest.mark.parametrize("discipline", ["fifo", *(pytest.param(name, marks=pytest.mark.slow)
                                                  for name in ("fair", "max_min"))])
def test_engine_equals_reference(discipline):
    flags, dims = simulator.preset("vllm-v1"), dims_of("vllm-v1", discipline)
    cases = drawn(5, flags, dims, discipline)
    seen = exercised(cases, flags, dims) + Counter(roles.compare(cases, flags, dims))
    print(seen)
    assert seen["cases"] > 40 and seen["moved"] > 200, seen
    hard = ["named", "not named", "shared", "behind others on it" if discipline == "fifo" else "beside others on it"]
    hard += ["sooner than equal shares"] if discipline == "max_min" else []
    assert all(seen[what] > 10 for what in hard), seen


@pytest.mark.slow
def test_embeddings_go_over_links_too():
    flags = simulator.preset("vllm-v1")
    dims = c.dims_of("vllm-v1", test_encode.EXECUTORS, has_roles=True, has_parts=True, num_links=links.NUM_LINKS)
    rng = np.random.default_rng(7)
    cases = [(case, links.draw_links(rng, rules), *rest) for case, rules, *rest in test_encode.draw(7, flags, dims)]
    seen = Counter(test_encode.compare(cases, flags, dims))
    for case, rules, encoding, tiles in cases:
        try:
            seen += links.exercised(rules, test_encode.refer(case, rules, encoding, tiles, flags, dims).transfers)
        except ValueError:
            continue
    print(seen)
    assert seen["cases"] > 30 and seen["behind others on it"] > 2, seen
    assert all(seen[what] > 100 for what in ("named", "not named", "shared")), seen


# --- max-min fair parts -------------------------------------------------------------------------------------------


def random_transfers(rng: np.random.Generator, window: int) -> list[Transfer | None]:
    """Over ways of different speeds and links that several share; ends as fast as the fastest way from or to them."""
    sources, targets, found = int(rng.integers(1, 5)), int(rng.integers(1, 5)), []
    speed = rng.choice([max_min.WHOLE, max_min.WHOLE // 2, 90_000, 50_001], (sources, targets))
    shared = rng.integers(-1, 3, (sources, targets))
    for link in range(3):
        # A link is as fast for all who use it.
        speed[shared == link] = speed[shared == link].max(initial=0)
    for number in range(window):
        i, j = int(rng.integers(sources)), int(rng.integers(targets))
        parts = int(speed[i, j]), int(speed[i].max()), int(speed[:, j].max())
        over = None if shared[i, j] < 0 else int(shared[i, j])
        found.append(Transfer(None, i, j, 0.0, 1, 0, number, over=over, parts=parts) if rng.random() < 0.7 else None)
    return found


def test_parts_are_max_min_fair():
    """As the reference has them; and every transfer uses something that is full, but for what does not divide, of which
    nobody has more than it. So they are the only max-min fair ones (Bertsekas and Gallager)."""
    rng, window, lanes = np.random.default_rng(2), 12, 200
    cases = [random_transfers(rng, window) for _ in range(lanes)]
    rows, ways = np.zeros((lanes, window, 6), np.int32), np.full((lanes, window, 5), -1, np.int32)
    for lane, one in enumerate(cases):
        for k, transfer in enumerate(one):
            if transfer is not None:
                rows[lane, k, 1:3] = transfer.source, transfer.destination
                ways[lane, k, :4] = -1 if transfer.over is None else transfer.over, *transfer.parts
    is_any = np.array([[transfer is not None for transfer in one] for one in cases])
    ours = np.asarray(jax.jit(jax.vmap(max_min.allotted))(*map(jnp.asarray, (is_any, rows, ways))))
    assert not ours[~is_any].any()
    seen = Counter()
    for lane, one in enumerate(cases):
        there = [transfer for transfer in one if transfer is not None]
        speeds = MaxMinLinks(True, None)._speeds(there)
        parts = {transfer: int(ours[lane, transfer.number]) for transfer in there}
        assert {transfer: (n, transfer.parts[0]) for transfer, n in parts.items()} == speeds
        for transfer in there:
            things = [([transfer], transfer.parts[0], "alone"),
                      ([t for t in there if t.source == transfer.source], transfer.parts[1], "out"),
                      ([t for t in there if t.destination == transfer.destination], transfer.parts[2], "in")]
            if transfer.over is not None:
                things.append(([t for t in there if t.over == transfer.over], transfer.parts[0], "link"))
            assert all(sum(parts[t] for t in users) <= most for users, most, _ in things)
            own = parts[transfer]
            full = [what for users, most, what in things
                    if sum(parts[t] for t in users) > most - len(users) and own == max(parts[t] for t in users)]
            assert full, (lane, transfer)
            seen.update(full)
    assert all(seen[what] > 50 for what in ("alone", "out", "in", "link")), seen


def test_durations_are_scaled_exactly():
    """Against integers of any size."""
    rng, count = np.random.default_rng(3), 20_000
    bits = rng.integers(1, 46, count)
    ticks = np.array([int(rng.integers(0, 1 << int(b))) for b in bits])
    number = rng.integers(1, max_min.WHOLE + 1, count)
    divisor = np.where(rng.random(count) < 0.5, rng.integers(1, max_min.WHOLE + 1, count), number)
    keep = ticks * number.astype(object) // divisor < 1 << 45
    ticks, number, divisor = ticks[keep], number[keep], divisor[keep]
    units, fine, is_more = map(np.asarray, jax.jit(max_min.scaled)(*(
        jnp.asarray(x, jnp.int32) for x in (ticks >> 15, ticks & 32767, number, divisor))))
    up = [np.asarray(x).astype(object) for x in max_min.rounded_up(units, fine, is_more)]
    exact = [Fraction(int(t) * int(n), int(d)) for t, n, d in zip(ticks, number, divisor, strict=True)]
    assert (units.astype(object) * 32768 + fine).tolist() == [e.numerator // e.denominator for e in exact]
    assert (up[0] * 32768 + up[1]).tolist() == [-(-e.numerator // e.denominator) for e in exact]
    assert fine.max() < 32768 and up[1].max() < 32768 and is_more.sum() > 1000


# --- as a user describes them ---------------------------------------------------------------------------------------

POOLS = [{"role": "prefill", "name": "near"}, {"role": "prefill", "name": "far"}, {"role": "decode", "replicas": 2}]
KV_BYTES = 900 * 2 * 8 * 128 * 2 * 32
"""Of a prompt of the scenarios of `test_pools`."""


def scenario(given, pools=POOLS, transfer=None, **changes) -> Scenario:
    tree = test_pools.scenario(pools, transfer).to_dict()
    tree["cluster"]["links"] = given
    return Scenario.from_dict(tree).with_values(changes)


def link(source: str, target: str, gb_per_s: float, **more) -> dict:
    return {"from": source, "to": target, "gb_per_s": gb_per_s, **more}


def alone_s(lane, source: int) -> float:
    """The least that a transfer out of an engine took."""
    moved = (lane.decode_instance >= 0) & (lane.instance == source)
    return float((lane.delivered_s - lane.accepted_s)[moved].min())


def beside(gb_per_s: float = 0.4, discipline: str = "fifo", **more) -> Scenario:
    """All ways alike, and two of each engines."""
    return scenario([link("prefill", "decode", gb_per_s, **more)], transfer={
        "discipline": discipline, "hand_over": "push"}, **{"workload.rate_rps": 20.0})


@pytest.fixture(scope="module")
def lanes():
    """By name, all of one program; a link that one engine is at the end of is no other for being shared."""
    slow = scenario([link("far", "decode", 0.2, latency_us=700.0, shared=True)],
                    transfer={"gb_per_s": 2.0, "latency_us": 100.0})
    made = {"slow": slow, "swept": slow.with_values({"cluster.links.0.gb_per_s": 0.4}), "shared": beside(shared=True)}
    return {name: lane for name, (lane,) in zip(made, simulate(list(made.values())).lanes, strict=True)}


@pytest.mark.slow
def test_a_way_is_as_fast_as_its_link(lanes):
    """By hand: one of two prefill engines is at the end of a slow link, of the other the default holds."""
    for name, gb in (("slow", 0.2), ("swept", 0.4)):
        assert alone_s(lanes[name], 0) == pytest.approx(KV_BYTES / 2e9 + 100e-6, rel=1e-5)
        assert alone_s(lanes[name], 1) == pytest.approx(KV_BYTES / (1e9 * gb) + 700e-6, rel=1e-5)
    slow = lanes["slow"]
    assert np.array_equal(slow.first_token_s, lanes["swept"].first_token_s)
    # All that go out of the slow one do so one after the other, into whichever decode engine; others beside them.
    moved = slow.decode_instance >= 0
    far = moved & (slow.instance == 1)
    assert len(set(slow.decode_instance[far])) == 2
    assert np.diff(np.sort(slow.delivered_s[far])).min() >= 0.999 * KV_BYTES / 0.2e9
    near_end = slow.delivered_s[moved & (slow.instance == 0)]
    assert any(((end - 0.4 < near_end) & (near_end < end - 0.1)).any() for end in slow.delivered_s[far])


def check_shared(lane) -> np.ndarray:
    """Bytes over a link that all share are at most its bandwidth times time; returns when transfers ended."""
    moved, work = lane.decode_instance >= 0, KV_BYTES / 0.4e9
    start, end = lane.accepted_s[moved], lane.delivered_s[moved]
    assert (end - start).min() >= 0.999 * work
    for begin in start:
        inside = np.sort(end[start >= begin])
        assert (np.arange(1, len(inside) + 1) * work <= (inside - begin) * (1 + 1e-6)).all()
    return np.sort(end)


def test_a_shared_link_carries_one_at_a_time(lanes):
    """Two prefill and two decode engines."""
    end, moved = check_shared(lanes["shared"]), lanes["shared"].decode_instance >= 0
    ways = set(zip(lanes["shared"].instance[moved].tolist(), lanes["shared"].decode_instance[moved].tolist(),
                   strict=True))
    assert len(ways) == 4 and np.diff(end).min() > 0.999 * KV_BYTES / 0.4e9


@pytest.mark.slow
def test_equal_parts_of_one_link_are_max_min_fair():
    """Where all share one link and nothing else is narrower; but for one part in `WHOLE` that each may go without."""
    both = [lane for (lane,) in simulate([beside(shared=True, discipline=name) for name in ("fair", "max_min")]).lanes]
    equal, parts = (check_shared(lane) for lane in both)
    assert ((parts - equal >= -1e-6) & (parts - equal <= equal * len(equal) / max_min.WHOLE)).all()


@pytest.mark.slow
def test_a_sweep_gives_what_single_runs_give():
    """Over a link's numbers, in one program; links that are shared are another."""
    many = [beside(0.2), beside(0.4), beside(0.2, shared=True), beside(0.4, shared=True)]
    table, refused = runner.table(many)
    assert not refused
    assert table["transfers.mean_ms"].tolist() == pytest.approx(
        [m["transfers"]["mean_ms"] for m in simulate(many).metrics], rel=1e-6)


def test_ways_that_no_link_names_have_the_default():
    """NVLink between devices of a node; where all ways have links nothing else has to be known."""
    made = scenario([link("far", "decode", 25.0)])
    found = lower.ways_of(made, lower.resolve_system(made))
    assert found.bytes_per_s[0, 2] == 450e9 and found.bytes_per_s[1, 2] == 25e9 and (found.bytes_per_s > 0).sum() == 2
    alike = beside(450.0, shared=True)
    same = lower.ways_of(alike, lower.resolve_system(alike))
    assert (same.bytes_per_s[:2, 2] == 450e9).all() and same.num_shared == 1
    assert same.shared_link[:2, 2].tolist() == [0, 0]


@pytest.mark.slow
def test_links_like_the_default_change_nothing():
    both = simulate([test_pools.scenario(POOLS), scenario([link("prefill", "decode", 450.0)])])
    for field in ("accepted_s", "delivered_s", "finish_s"):
        np.testing.assert_array_equal(*(getattr(lane, field) for (lane,) in both.lanes))


@pytest.mark.parametrize("given, values, says", [
    ([link("prefil", "decode", 1.0)], {}, "did you mean 'prefill'"),
    ([link("near", "decode ", 1.0)], {}, "cluster.links[0].to = 'decode '"),
    ([link("decode", "near", 1.0)], {}, "carries nothing"),
    ([link("near", "near", 1.0)], {}, "use one of: near to decode, far to decode"),
    ([link("near", "decode", 1.0), link("prefill", "decode", 2.0)], {}, "is the way of cluster.links[0] too"),
    ([link("near", "decode", 0.0)], {}, "cluster.links[0].gb_per_s = 0.0: out of range; use a number > 0"),
    ([{"from": "near", "gb_per_s": 1.0}], {}, "cluster.links[0].to = None: missing"),
    ([{"from": "near", "to": "decode", "gb_per_s": 1.0, "form": 1}], {}, "did you mean 'from'"),
    ([link("prefill", "decode", 1.0)], {"cluster.transfer.gb_per_s": 2.0}, "all that is sent goes over cluster.links"),
    ([link("far", "decode", 1.0, latency_us=5.0)], {"cluster.transfer.discipline": "fair"}, "into decode"),
    ([link("far", "decode", 1e-30)], {}, "cluster.links[0] = "),
    ([link("far", "decode", 1e-3)], {"cluster.transfer.discipline": "max_min"}, "too little to be shared by 64"),
    ([link("far", "decode", 0.01)], {
        "cluster.transfer.discipline": "max_min", "cluster.transfer.gb_per_s": 0.01, "workload.input": 4000,
        "cluster.transfer.most_at_once": 1024}, "may share a link"),
    ([link("prefill", "decode", 1.0)], {"cluster.pools": [], "cluster.replicas": 2}, "has no effect without engines"),
])
def test_refused(given, values, says):
    with pytest.raises(InputError) as error:
        simulate(scenario(given, **values))
    assert says in str(error.value)


@pytest.mark.parametrize("pools, says", [
    ([{"role": "prefill", "name": "decode"}, {"role": "decode"}], "is a role"),
    ([{"role": "prefill", "name": "a"}, {"role": "decode", "name": "a"}], "is that of cluster.pools[0] too")])
def test_names_of_pools(pools, says):
    with pytest.raises(InputError, match=r"cluster\.pools\[\d\]\.name") as error:
        test_pools.scenario(pools)
    assert says in str(error.value)


def test_links_are_written_back():
    made = scenario([link("far", "decode", 25.0, shared=True)])
    assert Scenario.from_dict(made.to_dict()) == made
    assert made.to_dict()["cluster"]["links"] == [link("far", "decode", 25.0, shared=True)]
