"""Links that transfers share, against the reference, and what must hold of them."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.engine import fair_links, loop
from jaxsim.engine.simulate import simulate
from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.state import flights as f
from jaxsim.state import world as w
from tests.engine import cases as c
from tests.engine import test_hand_over as roles
from tests.engine import test_pools as pools
from tests.reference import simulator

WINDOW = 24
"""More than the requests of a case that are under way at once."""


def drawn(seed: int, flags: simulator.Flags, dims):
    """Mostly slow links and engines that take all that come, so that many transfers are under way."""
    rng = np.random.default_rng(seed)
    return [(case, replace(rules, discipline="fair", hand_over=str(rng.choice(["push", "push", "pull"])),
                           bytes_per_token=float(rng.choice([0.0, 1.0, 1.0, 1.0])),
                           bandwidth=2.0 ** int(rng.choice([3, 5, 9]))))
            for case, rules in roles.draw(seed, flags, dims)]


def exercised(cases, flags, dims) -> Counter:
    """What transfers met, as the reference has it."""
    seen = Counter()
    for case, rules in cases:
        try:
            result = c.reference(case, flags, dims, "mixed", disaggregation=rules)
        except ValueError:
            continue
        moved = sorted(result.transfers, key=lambda t: t.accepted_s)
        for one in moved:
            others = [t for t in moved if t is not one and t.start_s < one.delivered_s and t.delivered_s > one.start_s]
            seen["into"] += any(t.destination == one.destination for t in others)
            seen["out of"] += any(t.source == one.source and t.destination != one.destination for t in others)
            seen["overtaken"] += any(t.destination == one.destination and t.accepted_s > one.accepted_s
                                     and t.delivered_s < one.delivered_s for t in others)
            seen["thirds"] += sum(t.destination == one.destination for t in others) == 2
        ends = Counter(t.delivered_s for t in moved)
        seen["ties"] += sum(n for n in ends.values() if n > 1)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vllm-v1", "vllm-v1-async", "vllm-v0"])
def test_engine_equals_reference(name):
    flags = simulator.preset(name)
    dims = c.dims_of(name, roles.EXECUTORS, has_roles=True, num_flights=WINDOW)
    dims = replace(dims, num_slots=32) if name == "vllm-v0" else dims
    cases = drawn(3, flags, dims)
    seen = exercised(cases, flags, dims) + Counter(roles.compare(cases, flags, dims))
    assert seen["cases"] > 40 and seen["moved"] > 200, seen
    for what in ("into", "out of", "overtaken", "thirds", "ties", "waited"):
        assert seen[what] > 10, seen
    # A table that is too small is told.
    small = replace(dims, num_flights=1)
    params = c.stack([roles.params_of(case, rules, flags) for case, rules in cases])
    _, requests = c.inputs([case for case, _ in cases], flags, small, "mixed")
    fault = np.asarray(loop.run(small, params, requests).fault)
    assert set(fault.tolist()) == {0, w.LINKS_FULL}


def test_shares_end_at_the_tick():
    """Random joins over random ends, every time a whole number of ticks, against integers of any size."""
    rng, window, nobody, lanes = np.random.default_rng(0), 6, 99, 32

    @jax.jit
    @jax.vmap
    def one(flights, now, is_ending, is_starting, starting, work_s):
        return fair_links.change(flights, now, nobody, is_ending=is_ending, is_starting=is_starting,
                                 starting=starting, work_s=work_s)

    state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (lanes, *jnp.shape(leaf))),
                         f.no_flights(window, nobody))
    known = [[] for _ in range(lanes)]  # (number, source, target, left in ticks)
    at, ended, fulls = [0] * lanes, 0, 0
    for number in range(60):
        now, ending, starting, rows, work = [], [], [], [], []
        for lane in range(lanes):
            mine = known[lane]
            parts = [max(sum(x[1] == o[1] for o in mine), sum(x[2] == o[2] for o in mine)) for x in mine]
            first = min(((x[3] * p, x[0]) for x, p in zip(mine, parts, strict=True)), default=None)
            got = (float(state.next_end.hi[lane]), float(state.next_end.lo[lane]))
            assert (got[0] == np.inf) if first is None else sum(got) * 2**30 == at[lane] + first[0]
            wait = int(rng.integers(0, 1 << int(rng.integers(1, 32))))
            is_end = first is not None and (first[0] <= wait or len(mine) == window)
            wait = first[0] if is_end else wait
            for x, p in zip(mine, parts, strict=True):
                x[3] -= wait // p
            at[lane] += wait
            if is_end:
                known[lane] = [x for x in mine if x[0] != first[1]]
                ended += 1
            new = [number, int(rng.integers(2)), int(rng.integers(3)),
                   int(np.float32(rng.integers(1, 1 << int(rng.integers(2, 33)))))]
            if not is_end:
                known[lane].append(new)
                fulls += len(known[lane]) == window
            now.append(at[lane]), ending.append(is_end), starting.append(not is_end)
            rows.append([7, new[1], new[2], number]), work.append(new[3] * 2.0**-30)
        _, hi, lo = clock.split_reference(np.array(now) * 2.0**-30)
        state, overflows = one(state, Time(jnp.asarray(hi), jnp.asarray(lo)), jnp.array(ending), jnp.array(starting),
                               jnp.array(rows, jnp.int32), jnp.array(work, jnp.float32))
        assert not overflows.any()
    assert ended > 500 and fulls > 20


def lanes_of(*transfers):
    return [pools.run(transfer={"gb_per_s": 0.6, "latency_us": 500.0, "hand_over": "push"} | one) for one in transfers]


@pytest.mark.unoptimised
@pytest.mark.slow
def test_laws_of_a_shared_link():
    """No link carries more than it can; prompts of one size are through later on average than one after the other, and
    as soon as alone where they are alone."""
    fifo, fair = lanes_of({}, {"discipline": "fair"})
    moved = fair.decode_instance >= 0
    work = 900 * 2 * 8 * 128 * 2 * 32 / 0.6e9
    took = [np.sort((lane.delivered_s - lane.accepted_s)[moved]) for lane in (fifo, fair)]
    assert np.array_equal(fifo.first_token_s, fair.first_token_s)
    for one in took:
        assert one[0] == pytest.approx(work + 500e-6, rel=1e-6)
    assert (fair.accepted_s - fair.first_token_s)[moved].max() < 1e-6, "not taken at once: the mean says nothing"
    assert took[1].mean() > 1.1 * took[0].mean() and took[1].max() > 1.9 * work
    start, end = fair.accepted_s[moved], fair.delivered_s[moved] - 500e-6
    for begin in start:
        inside = np.sort(end[start >= begin])
        # All come out of the one prefill engine.
        assert (np.arange(1, len(inside) + 1) * work <= (inside - begin) * (1 + 1e-6)).all()


@pytest.mark.parametrize("transfer, says", [
    ({"most_at_once": 8}, "has no effect with discipline = 'fifo'"), ({"discipline": "lifo"}, "discipline"),
    ({"discipline": "fair", "gb_per_s": 1e-4}, "may share a link")])
def test_refused(transfer, says):
    with pytest.raises(InputError, match=says):
        simulate(pools.scenario(transfer=transfer))
