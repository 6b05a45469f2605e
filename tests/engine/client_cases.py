"""Random scenarios of clients that give up and clusters that refuse, for the engine and the reference alike.

Deadlines are drawn around what requests take if nobody gives up, many at the very instant that an iteration ends.
"""

from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxsim.engine import loop
from jaxsim.policy.clients import UNBOUNDED, Clients, backoffs, patience
from jaxsim.spec.dims import Dims
from jaxsim.state.requests import pack_requests
from tests.engine import cases as c
from tests.reference import clients as rules
from tests.reference import simulator

SENDINGS = 4
"""At most so many of a request."""

STATUS = {0: "finished", 2: "timed_out", 3: "rejected", 4: "failed"}


@dataclass
class ClientCase:
    """A case, how long the client of each request waits, and what is refused (infinite where nothing is)."""

    case: c.Case
    deadline_s: np.ndarray
    first_token_deadline_s: np.ndarray
    backoff_s: tuple[float, ...]
    max_waiting: float = np.inf
    max_outstanding: float = np.inf

    def kept(self, mask: np.ndarray) -> "ClientCase":
        """The same with fewer requests."""
        return replace(self, case=self.case.kept(mask), deadline_s=self.deadline_s[mask],
                       first_token_deadline_s=self.first_token_deadline_s[mask])

    def __len__(self) -> int:
        return len(self.case)


def dims_of(preset: str, num_executors: int, **changes) -> Dims:
    """As of cases, with room for the first tokens of every sending."""
    return c.dims_of(preset, num_executors, has_clients=True, num_more_logs=(SENDINGS - 1) * c.NUM_REQUESTS, **changes)


def draw(rng: np.random.Generator, flags: simulator.Flags, dims: Dims, router: str) -> ClientCase | None:
    """A case whose clients give up now and then; None where somebody could never be served."""
    case = c.draw(rng, c.MOST_REQUESTS, dims.num_slots, dims.block_size, flags)
    try:
        calm = c.reference(case, flags, dims, router)
    except ValueError:
        return None
    ends = np.array([record.end_s for record in calm.iterations])
    arrivals = np.round(case.arrival_s * 2.0**20) / 2.0**20

    def waits(taken: np.ndarray) -> np.ndarray:
        """The same for all, or one each: a share of what was taken, or up to the end of some iteration."""
        share = np.maximum(np.round(rng.choice([0.25, 0.5, 0.75, 1.0]) * np.quantile(taken, rng.random()) * 64) / 64,
                           2.0**-6)
        until_end = ends[rng.integers(len(ends), size=len(taken))] - arrivals
        until_end = np.where(until_end > 0, until_end, share)
        kind = rng.integers(4)
        wait = [np.full(len(taken), share), np.full(len(taken), until_end[rng.integers(len(taken))]), until_end,
                taken][kind]
        return np.where(rng.random(len(taken)) < rng.choice([0.0, 0.3]), np.inf, wait)

    never = np.full(len(case), np.inf)
    deadline = waits(np.array([r.e2e_s for r in calm.requests])) if rng.random() < 0.8 else never
    first = waits(np.array([r.ttft_s for r in calm.requests])) if rng.random() < 0.6 else never
    retries = int(rng.integers(0, SENDINGS))
    grid = float(2.0 ** -rng.integers(0, 8))
    factor = float(rng.choice([1.0, 2.0]))
    backoff = float(rng.choice([0.0, grid, 3 * grid]))
    most = dict(max_waiting=float(rng.integers(0, 5)) if rng.random() < 0.3 else np.inf,
                max_outstanding=float(rng.integers(1, 12)) if rng.random() < 0.3 else np.inf)
    return ClientCase(case, deadline, first, tuple(backoff * factor**k for k in range(retries)), **most)


def draw_many(seed: int, flags: simulator.Flags, dims: Dims, router: str = "mixed") -> list[ClientCase]:
    """A batch of cases from one seed."""
    rng = np.random.default_rng(seed)
    return c.drawn_until_many(lambda: draw(rng, flags, dims, router))


def make_clients(case: ClientCase) -> Clients:
    """What the engine is told."""
    table = np.array(backoffs(0, 0.0, 1.0).repeat(SENDINGS, axis=0))
    for row, wait in zip(table, case.backoff_s, strict=False):
        row[:] = backoffs(1, wait, 1.0)[0]

    def bound(most):
        return np.int32(most) if np.isfinite(most) else UNBOUNDED

    return Clients(table, bound(case.max_waiting), bound(case.max_outstanding))


def inputs(cases: list[ClientCase], flags: simulator.Flags, dims: Dims, router: str):
    """Arguments of `loop.run` for a batch."""
    params = [replace(c.make_params(one.case, flags, router), clients=make_clients(one)) for one in cases]
    requests = [pack_requests(one.case.arrival_s, one.case.prompt, one.case.output, one.case.max_tokens,
                              one.case.uniforms, num_requests=dims.num_requests,
                              patience=patience(one.deadline_s, one.first_token_deadline_s)) for one in cases]
    return c.stack(params), c.stack(requests)


def simulate(cases: list[ClientCase], flags: simulator.Flags, dims: Dims, router: str = "mixed") -> list[dict]:
    """Engine results of all cases, in one program."""
    padded = cases + cases[:1] * (c.LANES - len(cases))
    world = jax.device_get(loop.run(dims, *inputs(padded, flags, dims, router)))
    return [unpack(dims, world, lane, len(one)) for lane, one in enumerate(cases)]


def unpack(dims: Dims, world, lane: int, count: int) -> dict:
    """As of cases, with how requests ended."""
    ours = c.unpack(dims, world, lane, count)
    state, placed = world.clients[lane, :count], world.placed[lane, :count]
    ended = ours["finish_s"]
    is_done = state[:, 1] == 0
    first = np.where(placed[:, 0] >= 0, ours["first_token_s"], np.nan)
    return ours | dict(
        status=np.array([STATUS[s] for s in state[:, 1]]), sendings=state[:, 0] >> 1, ended_s=ended,
        finish_s=np.where(is_done, ended, np.nan), first_token_s=np.where(first <= ended, first, np.nan),
        scheduled_s=np.where(placed[:, 1] >= 0, ours["scheduled_s"], np.nan), instance=world.routed[lane, :count],
        num_outstanding=int(world.num_outstanding[lane]), outstanding=world.outstanding[lane])


def reference(case: ClientCase, flags: simulator.Flags, dims: Dims, router: str = "mixed"
              ) -> simulator.ReferenceResult:
    """The reference's answer."""
    limits = rules.Clients(case.backoff_s, case.max_waiting, case.max_outstanding)
    return c.reference(case.case, flags, dims, router, clients=limits, deadline_s=case.deadline_s,
                       first_token_deadline_s=case.first_token_deadline_s)


def answer(result: simulator.ReferenceResult, num_executors: int, num_blocks: int) -> dict:
    """The reference's answer in the form of `unpack`."""
    fields = ("scheduled_s", "first_token_s", "finish_s", "ended_s", "preemptions", "status", "sendings")
    columns = {name: np.array([getattr(r, name) for r in result.requests]) for name in fields}
    columns["instance"] = np.array([-1 if r.instance is None else r.instance for r in result.requests])
    sent, stalled, since = [r.last_sent_s for r in result.requests], np.zeros(len(result.requests)), {}
    busy, peak = np.zeros(num_executors), np.zeros(num_executors, int)
    num_iterations = np.zeros(num_executors, int)
    for record in result.iterations:
        for request in record.preempted:
            if record.start_s >= sent[request]:
                since[request] = record.start_s
        for request in record.batch:
            if request in since:
                stalled[request] += record.start_s - since.pop(request)
        busy[record.instance] += record.duration_s
        num_iterations[record.instance] += 1
        peak[record.instance] = max(peak[record.instance], num_blocks - record.free_blocks)
    for request, start in since.items():
        stalled[request] += result.requests[request].ended_s - start
    return columns | dict(stalled_s=stalled, busy_s=busy, num_iterations=num_iterations, peak_blocks=peak)


def unequal(ours: dict, theirs: dict) -> list[str]:
    """Names of what is not exactly equal; what never happened is NaN on both sides."""
    return [name for name, value in theirs.items()
            if not np.array_equal(value, ours[name], equal_nan=np.asarray(value).dtype.kind == "f")]


def differences(ours: dict, theirs: dict) -> list[str]:
    """Names of what is not exactly equal; what is left behind counts too."""
    left = [name for name in ("used_blocks", "outstanding", "num_outstanding") if np.any(ours[name])]
    return (["fault"] if ours["fault"] else []) + unequal(ours, theirs) + left
