"""Virtual token counters: the next request is the oldest of the tenant that was served least.

Every tenant has a queue and a counter, on each instance by itself. Of the tenants that wait, the one with the smallest
counter goes next (a tie goes to the first of the workload's tenants). It is charged for the prompt when the request is
admitted, and for every output token as it is produced. Who has nobody waiting cannot save up: as the next request
comes in, the counter is lifted to the smallest of those that wait, or where nobody does to that of the tenant who was
the last to leave the queue.

On the lazy token clock nothing is added up token by token: at an iteration's end a tenant's counter is what it was
before the jump, plus price x sequences that decode x iterations. A jump behind a head that lacks blocks ends
where another tenant's counter becomes the smallest. Counters are kept relative to the smallest of those that wait (or
of who left last), which never falls, and not further below it than any tenant's running sequences can make good
(`jaxsim.policy.fairness.most_ahead`): who stands there will be lifted, whatever it is still charged.

What the paper leaves open, since its engine reserves memory for whole requests and preempts nobody: a preempted
request goes to the front of its tenant's queue and lifts its counter as one that comes in does; it was charged for its
prompt and its tokens so far, and is not again for computing them again. A prompt is charged whole when its first chunk
is scheduled. Every instance has counters of its own, which say nothing to routers.

Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (arXiv 2401.00588), Algorithm 2.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine.common import Context, iterations_to_reach, span, take
from jaxsim.engine.ending import Retired
from jaxsim.kernels import clock, packed, queues
from jaxsim.kernels.clock import Time
from jaxsim.kernels.queues import Link, Queue
from jaxsim.policy.fairness import LARGEST_COUNTER
from jaxsim.state import world as w
from jaxsim.state.requests import PROMPT
from jaxsim.state.world import Clocks, Counts

if TYPE_CHECKING:
    from jaxsim.engine.passes import Placed
    from jaxsim.engine.touched import Touched


class Tenants(eqx.Module):
    """Of a rank: the queue of every tenant, its counter, how many of its sequences decode; who left the queue last."""

    front: Int[Array, " tenants"]
    back: Int[Array, " tenants"]
    waiting: Int[Array, " tenants"]
    counter: Int[Array, " tenants"]
    decoding: Int[Array, " tenants"]
    last: Int[Array, ""]

    @property
    def row(self) -> Int[Array, " tenant_fields"]:
        """As it lies in `World.tenants`."""
        return jnp.concatenate([self.front, self.back, self.waiting, self.counter, self.decoding, self.last[None]])

    @property
    def level(self) -> Int[Array, ""]:
        """The smallest counter of those that wait, or that of who left last."""
        smallest = jnp.min(jnp.where(self.waiting > 0, self.counter, packed.EMPTY))
        return jnp.where(jnp.any(self.waiting > 0), smallest, take(self.counter, self.last))

    @property
    def next_up(self) -> Int[Array, ""]:
        """Whose request is next."""
        return jnp.argmin(jnp.where(self.waiting > 0, self.counter, packed.EMPTY)).astype(jnp.int32)

    @property
    def head(self) -> Int[Array, ""]:
        """The request that is next; of no meaning where nobody waits."""
        return take(self.front, self.next_up)

    def queue_of(self, whose: Int[Array, ""]) -> Queue:
        """One tenant's."""
        return Queue(take(self.front, whose), take(self.back, whose), take(self.waiting, whose))

    def with_queue(self, whose: Int[Array, ""], queue: Queue) -> "Tenants":
        """With another queue of one tenant."""
        is_own = jnp.arange(self.front.shape[0]) == whose
        front, back, waiting = (jnp.where(is_own, new, old) for new, old in
                                zip(queue, (self.front, self.back, self.waiting), strict=True))
        return replace(self, front=front, back=back, waiting=waiting)

    def lifted(self, whose: Int[Array, ""], is_any: Bool[Array, ""], accrued: Int[Array, " tenants"] | int = 0
               ) -> "Tenants":
        """The counter of a tenant of whom nobody waits, as one comes in; accrued: not added to the counters yet."""
        now = replace(self, counter=self.counter + accrued)
        is_own = (jnp.arange(self.front.shape[0]) == whose) & is_any & (self.waiting == 0)
        return replace(self, counter=jnp.where(is_own, jnp.maximum(now.counter, now.level) - accrued, self.counter))

    def add_decoding(self, whose: Int[Array, ""], number: Int[Array, ""]) -> "Tenants":
        """So many sequences of a tenant more that decode."""
        is_own = jnp.arange(self.front.shape[0]) == whose
        return replace(self, decoding=self.decoding + jnp.where(is_own, number, 0))


def of_row(row: Int[Array, " tenant_fields"]) -> Tenants:
    """What lies in a row of `World.tenants`."""
    count = row.shape[0] // w.TENANT_FIELDS
    *columns, last = jnp.split(row, [k * count for k in range(1, w.TENANT_FIELDS + 1)])
    return Tenants(*columns, last[0])


def arrive(context: Context, t: "Touched") -> tuple[Tenants, Link, Bool[Array, ""]]:
    """A request comes in. Returns the link of the queue that changes, and whether the tenant had nobody waiting."""
    request, is_any = t.event.request, t.event.is_arrival
    whose = take(context.requests.tenant, request)
    done = jnp.where(t.phase == w.ENDING, iterations_done(t.event.now, t.counts, t.times), 0)
    rate = context.params.counters.output_price * t.tenants.decoding
    tenants = t.tenants.lifted(whose, is_any, rate * done)
    queue = tenants.queue_of(whose)
    is_first = queue.length == 0
    queue, link = queues.push_back(queue, request, is_any, context.dims.num_requests)
    return tenants.with_queue(whose, queue), link, is_first


def iterations_done(now: Time, counts: Counts, times: Clocks) -> Int[Array, ""]:
    """Iterations of the jump in flight that have ended, one at this very instant among them."""
    own = times.batch
    after_first = clock.add(own.start, own.first)
    guess = iterations_to_reach(own.pace.hi, own.growth_s, clock.elapsed(after_first, now))
    behind = jnp.int32(0)
    for j in (guess - 1, guess, guess + 1):
        is_over = (j <= counts.batch.extra) & (clock.add(after_first, span(own.pace, own.growth_s,
                                                                         jnp.maximum(j, 0))) <= now)
        behind = jnp.where(is_over & (j > behind), j, behind)
    is_begun = (counts.batch.is_committed == 0) & (after_first <= now)
    return jnp.where(is_begun, behind + 1, 0)


def settle(context: Context, t: "Touched") -> Tenants:
    """Charge the tokens of the iterations that ended; `t` as before they were settled."""
    is_first_look = t.event.is_ending & (t.counts.batch.is_committed == 0)
    produced = t.tenants.decoding * (1 + t.counts.batch.extra)
    tenants = replace(t.tenants, counter=t.tenants.counter + context.params.counters.output_price * produced)
    tenants = replace(tenants, counter=jnp.maximum(tenants.counter - tenants.level, -LARGEST_COUNTER))
    return replace(t.tenants, counter=jnp.where(is_first_look, tenants.counter, t.tenants.counter))


def retire(context: Context, tenants: Tenants, retired: Retired) -> Tenants:
    """Who leaves produces no more."""
    whose = take(context.requests.tenant, retired.request)
    return tenants.add_decoding(whose, -retired.is_any.astype(jnp.int32))


def place(context: Context, t: "Touched", placed: "Placed") -> Tenants:
    """A request is admitted, at first for its price; or its prompt completes, and it decodes from now on."""
    whose = take(context.requests.tenant, t.candidate)
    tenants = t.tenants.with_queue(
        whose, queues.pop_front(t.tenants.queue_of(whose), t.next_head, placed.is_admitted))
    price = take(context.params.counters.prompt_price, whose) * t.lengths[PROMPT]
    is_charged = (jnp.arange(tenants.front.shape[0]) == whose) & placed.is_admitted & (t.preemptions == 0)
    tenants = replace(tenants, counter=tenants.counter + jnp.where(is_charged, price, 0),
                      last=jnp.where(placed.is_admitted, whose, tenants.last))
    return tenants.add_decoding(whose, placed.is_completing.astype(jnp.int32))


def preempt(context: Context, tenants: Tenants, is_any: Bool[Array, ""], request: Int[Array, ""],
            is_forming: Bool[Array, ""]) -> tuple[Tenants, Link]:
    """The victim goes to the front of its tenant's queue. Returns the link that changes."""
    whose = take(context.requests.tenant, request)
    tenants = tenants.lifted(whose, is_any).add_decoding(whose, -(is_any & ~is_forming).astype(jnp.int32))
    queue, link = queues.push_front(tenants.queue_of(whose), request, is_any, context.dims.num_requests)
    return tenants.with_queue(whose, queue), link


def iterations_alike(context: Context, tenants: Tenants, counts: Counts) -> Int[Array, ""]:
    """Iterations behind the one that starts before which the head of the queue is still the same.

    Where all slots are taken it does not matter who that is.
    """
    rate = context.params.counters.output_price * tenants.decoding
    whose = tenants.next_up
    gains = take(rate, whose) - rate
    is_catching = (tenants.waiting > 0) & (gains > 0)
    # A tie goes to the first.
    ahead = tenants.counter - take(tenants.counter, whose) - (jnp.arange(tenants.front.shape[0]) < whose)
    alike = jnp.min(jnp.where(is_catching, ahead // jnp.maximum(gains, 1), packed.EMPTY))
    return jnp.where(counts.rank.running >= context.group.batching.max_num_seqs, packed.EMPTY, alike)
