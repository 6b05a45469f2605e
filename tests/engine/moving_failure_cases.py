"""Random scenarios of instances that go down while requests migrate between them and instances come and go, for the
engine and the reference alike.

Outages are drawn over what happens if nothing fails, many at the instants at which stages of migrations begin and end,
or between them.
"""

from collections import Counter
from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxsim.engine import loop
from jaxsim.engine.outcomes import migrated
from jaxsim.kernels import clock
from jaxsim.policy.clients import patience
from jaxsim.spec.dims import Dims
from jaxsim.state.requests import pack_requests
from tests.engine import cases as c
from tests.engine import client_cases as cc
from tests.engine import failure_cases as fc
from tests.engine import test_migration as moves
from tests.reference import clients as client_rules
from tests.reference import failures as failure_rules
from tests.reference import simulator

CAUSES = ("finished", "preempted", "no_room", "too_many_stages", "outage")


@dataclass
class MovingCase:
    """A case whose instances fail, and by what rules its requests migrate and its instances come and go."""

    failing: fc.FailureCase
    rules: simulator.Migration
    scaling: simulator.Scaling | None

    @property
    def case(self) -> c.Case:
        """Requests, limits and costs."""
        return self.failing.clients.case

    def kept(self, mask: np.ndarray) -> "MovingCase":
        """The same with fewer requests."""
        return replace(self, failing=self.failing.kept(mask))

    def __len__(self) -> int:
        return len(self.failing)


def dims_of(preset: str, **changes) -> Dims:
    """As of failures, with migration."""
    return fc.dims_of(preset, moves.EXECUTORS, has_migration=True, has_demands=True, **changes)


def draw_many(seed: int, flags: simulator.Flags, dims: Dims, metric: str, choice: str) -> list[MovingCase]:
    """A batch of cases from one seed."""
    rng = np.random.default_rng(seed)
    return c.drawn_until_many(lambda: draw(rng, flags, dims, metric, choice))


def draw(rng: np.random.Generator, flags: simulator.Flags, dims: Dims, metric: str, choice: str) -> MovingCase | None:
    """A case, or None where somebody could never be served."""
    case = c.draw(rng, c.MOST_REQUESTS, dims.num_slots, dims.block_size, flags)
    if dims.has_urgent:
        case = replace(case, priority=case.priority - 1)
    rules = moves.draw_rules(rng, metric, choice)
    scaling = moves.draw_scaling(rng) if dims.has_scaling else None
    try:
        calm = c.reference(case, flags, dims, "freest", migration=rules, scaling=scaling)
    except ValueError:
        return None
    if len(calm.live.spans) > 150:
        # Nothing but the same given up again and again.
        return None
    outages = aimed(rng, calm)
    behind = min((start for _, start, _ in outages), default=0.0) if rng.random() < 0.7 else 0.0
    more = [time / 2**30 for span in calm.live.spans for time in span[:2]]
    outages += [(i, start, end) for i, start, end in fc.draw_outages(rng, dims, calm, tuple(more))
                if start > behind and all(i != j or end < a or b < start for j, a, b in outages)]
    never, backoff = np.full(len(case), np.inf), float(rng.choice([0.0, 2.0 ** -rng.integers(0, 8)]))
    clients = cc.ClientCase(case, never, never, (backoff,) * int(rng.integers(0, cc.SENDINGS)))
    most = float(rng.choice([0.0, 1.0, np.inf, np.inf]))
    return MovingCase(fc.FailureCase(clients, tuple(outages[:fc.ROWS // 2 - 1]), most), rules, scaling)


def aimed(rng: np.random.Generator, calm: simulator.ReferenceResult) -> list[tuple[int, float, float]]:
    """An outage of either end of a stage of a migration, in it or as it begins or ends, or of an instance that starts
    or drains."""
    spans, changes = calm.live.spans, calm.live.fleet.changes if calm.live.fleet else []
    if changes and rng.random() < 0.3:
        time, instance = changes[rng.integers(len(changes))]
        start = time / 2**30 + float(rng.choice([2.0**-20, 2.0**-6, 2.0**-2]))
    elif spans and rng.random() < 0.9:
        begin, end, *ends = spans[rng.integers(len(spans))]
        middle = (begin + end) / 2
        instance, start = int(rng.choice(ends)), float(rng.choice([begin, middle, middle, end])) / 2**30
    else:
        return []
    start = float(clock.round_arrivals_reference(np.array([start]))[0])
    return [(instance, start, start + 2.0 ** -int(rng.integers(0, 8)))]


def inputs(batch: list[MovingCase], flags: simulator.Flags, dims: Dims):
    """Arguments of `loop.run` for a batch."""
    params, requests = [], []
    for one in batch:
        case = one.case
        made = moves.params_of(case, one.rules, flags)
        if one.scaling is not None:
            made = moves.with_scaling(made, one.scaling, flags.headroom_blocks)
        params.append(replace(made, clients=cc.make_clients(one.failing.clients),
                              failures=fc.make_failures(one.failing, dims)))
        never = np.full(len(case), np.inf)
        requests.append(pack_requests(
            case.arrival_s, case.prompt, case.output, case.max_tokens, case.uniforms, num_requests=dims.num_requests,
            priority=case.priority, is_urgent=case.priority < 0 if dims.has_urgent else None,
            patience=patience(never, never)))
    return c.stack(params), c.stack(requests)


def simulate(batch: list[MovingCase], flags: simulator.Flags, dims: Dims):
    """The world of all cases, in one program."""
    padded = batch + batch[:1] * (c.LANES - len(batch))
    return jax.device_get(loop.run(dims, *inputs(padded, flags, dims)))


def unpack(dims: Dims, world, lane: int, count: int) -> dict:
    """As of failures, with what became of migrations."""
    got = fc.unpack(dims, world, lane, count)
    found = migrated(world, np.s_[lane], np.s_[lane, :count], got["ended_s"])
    rank = c.w.count_rows(dims).everything(world.counts[lane]).rank
    fleet = {}
    if dims.has_scaling:
        fleet = {name: found[name] for name in ("starts", "drains", "instance_s")}
    left = np.array([rank.waiting_blocks.sum(), rank.killed.sum(), rank.kept_blocks.sum(), rank.ready.length.sum()]
                    + ([rank.urgent.sum()] if dims.has_urgent else []))
    return got | fleet | dict(
        migrations=found["migrations"], downtime_s=found["downtime_s"], last_instance=found["last_instance"],
        aborted=found["aborted_migrations"], started=int(world.control.started[lane]), left=left,
        used_blocks=got["used_blocks"] - rank.held_blocks[:, 0])


def reference(one: MovingCase, flags: simulator.Flags, dims: Dims) -> simulator.ReferenceResult:
    """The reference's answer."""
    limits = client_rules.Clients(one.failing.clients.backoff_s)
    return c.reference(one.case, flags, dims, "freest", migration=one.rules, scaling=one.scaling, clients=limits,
                       failures=failure_rules.Failures(one.failing.outages, one.failing.most_restarts))


def answer(result: simulator.ReferenceResult, one: MovingCase) -> dict:
    """The reference's answer in the form of `unpack`."""
    live, count = result.live, len(one)
    plain = fc.answer(result, moves.EXECUTORS, one.case.limits["num_blocks"],
                      stops=[(now / 2**30, request) for now, request in live.stops] + result.outages.preempted)
    # Blocks that come in are taken between iterations too.
    del plain["peak_blocks"]
    moved = [live.moved.get(i) for i in range(count)]
    ends = [r.instance if own is None or own.instance is None else own.instance
            for own, r in zip(moved, result.requests, strict=True)]
    fleet = {}
    if one.scaling is not None:
        end = max(r.ended_s for r in result.requests)
        fleet = dict(starts=live.fleet.starts, drains=live.fleet.drains,
                     instance_s=live.fleet.used_until(end * 2**30) / 2**30)
    return plain | fleet | dict(
        migrations=np.array([0 if own is None else own.migrations for own in moved]),
        downtime_s=np.array([0.0 if own is None else own.downtime / 2**30 for own in moved]),
        last_instance=np.array([-1 if r.instance is None else i for i, r in zip(ends, result.requests, strict=True)]),
        aborted=np.array([live.aborted[cause] for cause in CAUSES]), started=live.started)


def differences(ours: dict, theirs: dict) -> list[str]:
    """Names of what is not exactly equal; what is left behind counts too."""
    return cc.differences(ours, theirs) + (["left"] if ours["left"].any() else [])


def exercised(one: MovingCase, result: simulator.ReferenceResult) -> Counter:
    """How often what is hard happened."""
    live, seen = result.live, Counter(r.status for r in result.requests)
    seen.update({f"broken at its {what}": n for what, n in live.broken.items()})
    seen.update({f"given up: {cause}": n for cause, n in live.aborted.items()})
    for loss in result.outages.losses:
        seen["lost as it ran" if loss.ran and not loss.was else "lost as it waited" if not loss.ran else
             f"lost {loss.was}"] += 1
        seen["preempted before"] += loss.preemptions > 0
    for r in result.requests:
        own = live.moved.get(r.id)
        seen["sent on and migrated"] += own is not None and own.migrations > 0 and r.restarts > 0
        seen["migrated since"] += own is not None and own.instance is not None and r.restarts > 0
        seen["taken by another"] += r.restarts
        seen["sent again"] += r.sendings > 1
        seen["preemptions"] += r.preemptions
    seen["migrations"] += sum(own.migrations for own in live.moved.values())
    seen["no instance is up"] += result.outages.refused_all_down
    if live.fleet:
        seen.update({f"down while {status}": n for status, n in live.fleet.down_when.items()})
        seen.update({"starts": live.fleet.starts, "drains": live.fleet.drains,
                     "started as others were down": live.fleet.started_for_lack})
    return seen
