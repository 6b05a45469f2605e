"""Random scenarios of instances that go down where prompts and outputs are computed on different ones, for the engine
and the reference alike.

Outages are drawn over what happens if nothing fails, many while KV is on its way or waits to be fetched, or as it
comes.
"""

from collections import Counter
from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxsim.engine import loop
from jaxsim.engine.outcomes import handed_over
from jaxsim.kernels import clock
from jaxsim.policy.clients import patience
from jaxsim.spec.dims import Dims
from jaxsim.state.requests import pack_requests
from tests.engine import cases as c
from tests.engine import client_cases as cc
from tests.engine import failure_cases as fc
from tests.engine import link_cases as links
from tests.engine import test_hand_over as roles
from tests.reference import clients as client_rules
from tests.reference import failures as failure_rules
from tests.reference import simulator

HANDED_OVER = ("decode_instance", "left_s", "accepted_s", "delivered_s")


@dataclass
class PoolCase:
    """A case whose instances fail, and which of them do what."""

    failing: fc.FailureCase
    rules: simulator.Disaggregation

    @property
    def case(self) -> c.Case:
        """Requests, limits and costs."""
        return self.failing.clients.case

    def kept(self, mask: np.ndarray) -> "PoolCase":
        """The same with fewer requests."""
        return replace(self, failing=self.failing.kept(mask))

    def __len__(self) -> int:
        return len(self.failing)


def dims_of(preset: str, **changes) -> Dims:
    """As of failures, with roles."""
    return fc.dims_of(preset, roles.EXECUTORS, has_roles=True, **changes)


def draw_many(seed: int, flags: simulator.Flags, dims: Dims) -> list[PoolCase]:
    """A batch of cases from one seed."""
    rng = np.random.default_rng(seed)
    return c.drawn_until_many(lambda: draw(rng, flags, dims))


def draw(rng: np.random.Generator, flags: simulator.Flags, dims: Dims) -> PoolCase | None:
    """A case, or None where somebody could never be served, by any instance."""
    case = c.draw(rng, c.MOST_REQUESTS, dims.num_slots, dims.block_size, flags)
    case = replace(case, router=int(rng.integers(len(roles.PLAIN_ROUTERS))))
    rules = roles.draw_rules(rng)
    if dims.num_links:
        rules = links.draw_links(rng, rules)
    try:
        c.reference(case, flags, replace(dims, num_executors=1), "mixed")
        calm = c.reference(case, flags, dims, "mixed", disaggregation=rules)
    except ValueError:
        return None
    outages = aimed(rng, calm)
    behind = min((start for _, start, _ in outages), default=0.0) if rng.random() < 0.7 else 0.0
    more = [time for t in calm.transfers for time in (t.accepted_s, t.start_s, t.delivered_s)]
    outages += [(i, start, end) for i, start, end in fc.draw_outages(rng, dims, calm, tuple(more))
                if start > behind and all(i != j or end < a or b < start for j, a, b in outages)]
    never, backoff = np.full(len(case), np.inf), float(rng.choice([0.0, 2.0 ** -rng.integers(0, 8)]))
    clients = cc.ClientCase(case, never, never, (backoff,) * int(rng.integers(0, cc.SENDINGS)))
    most = float(rng.choice([0.0, 1.0, np.inf, np.inf]))
    return PoolCase(fc.FailureCase(clients, tuple(outages[:fc.ROWS // 2 - 1]), most), rules)


def aimed(rng: np.random.Generator, calm: simulator.ReferenceResult) -> list[tuple[int, float, float]]:
    """An outage of either end of a transfer, in it, as it begins or ends, or while it waits."""
    if not calm.transfers or rng.random() < 0.1:
        return []
    t = calm.transfers[rng.integers(len(calm.transfers))]
    done = calm.requests[t.request].first_token_s
    moments = [done, (done + t.accepted_s) / 2, t.accepted_s, (t.accepted_s + t.delivered_s) / 2, t.delivered_s]
    start = float(clock.round_arrivals_reference(np.array([rng.choice(moments)]))[0])
    return [(int(rng.choice([t.source, t.destination])), start, start + 2.0 ** -int(rng.integers(0, 8)))]


def inputs(batch: list[PoolCase], flags: simulator.Flags, dims: Dims):
    """Arguments of `loop.run` for a batch."""
    params, requests = [], []
    for one in batch:
        case, never = one.case, np.full(len(one), np.inf)
        params.append(replace(roles.params_of(case, one.rules, flags), clients=cc.make_clients(one.failing.clients),
                              failures=fc.make_failures(one.failing, dims)))
        requests.append(pack_requests(
            case.arrival_s, case.prompt, case.output, case.max_tokens, case.uniforms, num_requests=dims.num_requests,
            priority=case.priority, patience=patience(never, never)))
    return c.stack(params), c.stack(requests)


def simulate(batch: list[PoolCase], flags: simulator.Flags, dims: Dims):
    """The world of all cases, in one program."""
    padded = batch + batch[:1] * (c.LANES - len(batch))
    return jax.device_get(loop.run(dims, *inputs(padded, flags, dims)))


def unpack(dims: Dims, world, lane: int, count: int) -> dict:
    """As of failures, with the last hand-over of each request since it was last lost."""
    got = fc.unpack(dims, world, lane, count)
    rank = c.w.count_rows(dims).everything(world.counts[lane]).rank
    left = [rank.ready.length.sum(), rank.in_transfer.length.sum(), world.unaccepted[lane, :-1, 2].sum(),
            rank.held_blocks.sum(), (rank.kept_blocks[:, 0] != world.returned[lane, :-1]).sum()]
    return got | handed_over(world, np.s_[lane, :count]) | dict(
        left=np.array(left), used_blocks=got["used_blocks"] - world.returned[lane, :-1])


def reference(one: PoolCase, flags: simulator.Flags, dims: Dims) -> simulator.ReferenceResult:
    """The reference's answer."""
    limits = client_rules.Clients(one.failing.clients.backoff_s)
    return c.reference(one.case, flags, dims, "mixed", disaggregation=one.rules, clients=limits,
                       failures=failure_rules.Failures(one.failing.outages, one.failing.most_restarts))


def answer(result: simulator.ReferenceResult, one: PoolCase) -> dict:
    """The reference's answer in the form of `unpack`."""
    plain = fc.answer(result, len(one.rules.roles), one.case.limits["num_blocks"], stops=result.outages.preempted)
    # Blocks are taken for transfers between iterations too.
    del plain["peak_blocks"]
    none = {"decode_instance": -1, "left_s": np.nan, "accepted_s": np.nan, "delivered_s": np.nan}
    return plain | {name: np.array([none[name] if getattr(r, name) is None else getattr(r, name)
                                    for r in result.requests]) for name in HANDED_OVER}


def differences(ours: dict, theirs: dict) -> list[str]:
    """Names of what is not exactly equal; what is left behind counts too."""
    return cc.differences(ours, theirs) + (["left"] if ours["left"].any() else [])


def exercised(one: PoolCase, result: simulator.ReferenceResult) -> Counter:
    """How often what is hard happened."""
    seen, role = Counter(r.status for r in result.requests), one.rules.roles
    for loss in result.outages.losses:
        what = loss.was or ("as it ran" if loss.ran else "as it waited")
        seen[f"lost {what} by {role[loss.instance]}"] += 1
        seen["lost with tokens"] += loss.emitted > 1
    for (what, emitted) in result.hand_over.lost:
        seen[f"lost {what}"] += 1
        seen["lost on the way with more than one token"] += emitted > 1
    for r in result.requests:
        seen["handed over after a restart"] += r.restarts > 0 and r.delivered_s is not None
        seen["done by who computes prompts"] += (r.restarts > 0 and r.status == "finished" and r.delivered_s is None
                                                 and role[r.instance] == "prefill")
        seen["taken by another"] += r.restarts
        seen["sent again"] += r.sendings > 1
        seen["preemptions"] += r.preemptions
    seen["waited for any to decode"] += result.hand_over.waited_for_any
    seen["nobody for prompts"] += result.outages.refused_all_down
    seen["accepted late"] += sum(r.accepted_s > r.first_token_s for r in result.requests if r.accepted_s is not None)
    return seen
