"""Random scenarios of instances that go down, for the engine and the reference alike.

Outages are drawn over what happens if nothing fails, many at the very instant that an iteration ends, a request arrives
or another instance goes down or comes back; most cases have clients that give up as well.
"""

from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxsim.engine import failures as engine
from jaxsim.engine import loop
from jaxsim.kernels import clock
from jaxsim.policy import failures as policy
from jaxsim.spec.dims import Dims
from tests.engine import cases as c
from tests.engine import client_cases as cc
from tests.reference import clients as client_rules
from tests.reference import failures as rules
from tests.reference import simulator

ROWS = 22
"""Of the table of outages."""


@dataclass
class FailureCase:
    """A case of clients, when instances are down, and how often a sending is sent on (infinite: always)."""

    clients: cc.ClientCase
    outages: tuple[tuple[int, float, float], ...]
    most_restarts: float

    def kept(self, mask: np.ndarray) -> "FailureCase":
        """The same with fewer requests."""
        return replace(self, clients=self.clients.kept(mask))

    def __len__(self) -> int:
        return len(self.clients)


def dims_of(preset: str, num_executors: int, **changes) -> Dims:
    """As of clients, with a first token lost with every outage at most."""
    dims = cc.dims_of(preset, num_executors, num_outages=ROWS, **changes)
    return replace(dims, num_more_logs=dims.num_more_logs + ROWS)


def draw(rng: np.random.Generator, flags: simulator.Flags, dims: Dims, router: str) -> FailureCase | None:
    """A case, or None where somebody could never be served."""
    case = cc.draw(rng, flags, dims, router)
    if case is None:
        return None
    if rng.random() < 0.35:
        never = np.full(len(case), np.inf)
        case = replace(case, deadline_s=never, first_token_deadline_s=never, max_waiting=np.inf,
                       max_outstanding=np.inf)
    calm = c.reference(case.case, flags, dims, router)
    return FailureCase(case, draw_outages(rng, dims, calm), float(rng.choice([0.0, 1.0, np.inf, np.inf])))


def draw_outages(rng: np.random.Generator, dims: Dims, calm: simulator.ReferenceResult, more: tuple[float, ...] = ()
                 ) -> tuple[tuple[int, float, float], ...]:
    """Outages over what happens if nothing fails; more: moments (s) that are of interest too."""
    moments = [0.0] + [r.end_s for r in calm.iterations] + [r.start_s + r.duration_s / 2 for r in calm.iterations]
    moments += [r.arrival_s for r in calm.requests] * 2 + list(more)
    moments = np.unique(clock.round_arrivals_reference(np.array(moments)))
    # Early on queues are longest.
    early = moments[:len(moments) // 2 + 1]
    count = int(rng.integers(1, 1 + rng.choice([3, (ROWS - 1) // 2])))
    outages: list[tuple[int, float, float]] = []
    longest = max(float(moments[-1]) * float(rng.choice([0.05, 0.3, 1.0])), 2.0**-6)
    for _ in range(count):
        seen = [time for _, *span in outages for time in span]
        start = float(rng.choice(seen if seen and rng.random() < 0.3 else early if rng.random() < 0.5 else moments))
        behind = moments[moments > start]
        if len(behind) and rng.random() < 0.5:
            end = float(rng.choice(behind[:8]))
        else:
            end = start + 2.0**-20 * float(np.ceil(2.0**20 * longest * rng.random()))
        end = max(end, start + 2.0**-20)
        instance = int(rng.integers(dims.num_executors)) if rng.random() < 0.7 else 0
        # They may meet, so that an instance comes back and goes down at one instant.
        if all(i != instance or end <= a or b <= start for i, a, b in outages):
            outages.append((instance, start, end))
    return tuple(outages)


def draw_many(seed: int, flags: simulator.Flags, dims: Dims, router: str = "mixed") -> list[FailureCase]:
    """A batch of cases from one seed."""
    rng = np.random.default_rng(seed)
    return c.drawn_until_many(lambda: draw(rng, flags, dims, router))


def make_failures(case: FailureCase, dims: Dims) -> policy.Failures:
    """What the engine is told."""
    most = 2**31 - 1 if np.isinf(case.most_restarts) else int(case.most_restarts)
    return policy.failures([policy.Outage(*one) for one in case.outages], dims.num_outages, most)


def inputs(cases: list[FailureCase], flags: simulator.Flags, dims: Dims, router: str):
    """Arguments of `loop.run` for a batch."""
    params, requests = cc.inputs([one.clients for one in cases], flags, dims, router)
    return replace(params, failures=c.stack([make_failures(one, dims) for one in cases])), requests


def simulate(cases: list[FailureCase], flags: simulator.Flags, dims: Dims, router: str = "mixed") -> list[dict]:
    """Engine results of all cases, in one program."""
    padded = cases + cases[:1] * (c.LANES - len(cases))
    world = jax.device_get(loop.run(dims, *inputs(padded, flags, dims, router)))
    return [unpack(dims, world, lane, len(one)) for lane, one in enumerate(cases)]


def unpack(dims: Dims, world, lane: int, count: int) -> dict:
    """As of clients, with what was lost."""
    ours, lost = cc.unpack(dims, world, lane, count), world.lost[lane, :count]
    preemptions = ours["preemptions"] - lost[:, engine.REPEATED]
    return ours | dict(preemptions=preemptions, losses=lost[:, engine.LOSSES], restarts=lost[:, engine.RESTARTS])


def reference(case: FailureCase, flags: simulator.Flags, dims: Dims, router: str = "mixed"
              ) -> simulator.ReferenceResult:
    """The reference's answer."""
    one = case.clients
    limits = client_rules.Clients(one.backoff_s, one.max_waiting, one.max_outstanding)
    return c.reference(one.case, flags, dims, router, clients=limits, deadline_s=one.deadline_s,
                       first_token_deadline_s=one.first_token_deadline_s,
                       failures=rules.Failures(case.outages, case.most_restarts))


def answer(result: simulator.ReferenceResult, num_executors: int, num_blocks: int,
           stops: list[tuple[float, int]] | None = None) -> dict:
    """The reference's answer in the form of `unpack`. stops: when (s) requests were preempted, or stopped that were to
    go on elsewhere, where passes may preempt and start nothing."""
    plain = cc.answer(result, num_executors, num_blocks)
    columns = {name: np.array([getattr(r, name) for r in result.requests]) for name in ("losses", "restarts")}
    # From a loss to the next iteration, or to the end, a request that was sent on stands still if it had run.
    stalled, since = np.zeros(len(result.requests)), {}
    losses = [loss for loss in result.outages.losses if loss.sending == result.requests[loss.request].sendings]
    happened = sorted([(loss.time_s, 0, k, loss) for k, loss in enumerate(losses)]
                      + [(record.start_s, 1, k, record) for k, record in enumerate(result.iterations)]
                      + [(time, -1, k, request) for k, (time, request) in enumerate(stops or ())
                         if time >= result.requests[request].last_sent_s],
                      key=lambda one: one[:3])
    for time, is_iteration, _, what in happened:
        if is_iteration < 0:
            since.setdefault(what, time)
            continue
        if not is_iteration:
            if what.ran and what.is_sent_on:
                since.setdefault(what.request, time)
            continue
        for request in what.preempted if stops is None else ():
            if time >= result.requests[request].last_sent_s:
                since.setdefault(request, time)
        for request in what.batch:
            if request in since:
                stalled[request] += time - since.pop(request)
    for request, start in since.items():
        stalled[request] += result.requests[request].ended_s - start
    return plain | columns | dict(stalled_s=stalled)


differences = cc.differences
