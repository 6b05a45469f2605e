"""Hand-overs that end where an instance goes down: whose KV was on it, or on the way there, or is to come from there.

Whoever has left one instance for another and does not run there is lost with either of them, and computed again where
prompts are (`jaxsim.engine.failures`). What it holds at the other instance comes back at once. A transfer that is cut
off keeps its links for as long as it was to take.

Source: NVIDIA Dynamo's request migration, which sends the whole request anew, prompt and what was generated.

Approximated: real engines keep KV for a request that nobody fetches until a time is up.
"""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine import ending, hand_over
from jaxsim.engine.common import Context, choose, take
from jaxsim.engine.events import AT_ONCE, Event
from jaxsim.engine.hand_over import Front, Opened
from jaxsim.kernels import clock, queues
from jaxsim.kernels.clock import Time
from jaxsim.kernels.queues import Link
from jaxsim.state import world as w
from jaxsim.state.world import Clocks, Counts


class Item(NamedTuple):
    """Who is looked at of those who have left for this executor and do not run here, if anybody is.

    is_lost: it is lost; request: it then is, else nobody. sweep: `World.sweep` behind it.
    """

    is_any: Bool[Array, ""]
    is_lost: Bool[Array, ""]
    request: Int[Array, ""]
    sweep: Int[Array, " 4"]


def look(context: Context, event: Event, counts: Counts, times: Clocks, wake: Time, phase: Int[Array, ""],
         residue_row: Int[Array, " block_size"], link: Link, opened: Opened, is_losing: Bool[Array, ""]
         ) -> tuple[Counts, Time, Link, Opened, Item]:
    """Lose the first of who is on the way to this executor, which goes down; or look at the next of a queue here whose
    KV may be on another that does. Returns what this changes. is_losing: this one goes down, and its iteration is over.
    """
    dims, _, _, world, group = context
    e, now, nowhere = event.executor, event.now, dims.num_requests
    outage, unaccepted, in_transfer = event.outage, opened.front.queue, counts.rank.in_transfer
    sweep, is_sweep = outage.sweep, outage.sweep.is_any
    # An executor that goes down loses transfers first; of others those not accepted are looked at first.
    is_coming = jnp.where(is_sweep, sweep.unaccepted == 0, is_losing & (in_transfer.length > 0))
    is_asked = jnp.where(is_sweep, sweep.unaccepted > 0, is_losing & ~is_coming & (unaccepted.length > 0))
    is_any = is_coming | is_asked
    first = jnp.where(is_any, jnp.where(is_coming, in_transfer.front, unaccepted.front), nowhere)
    source = jnp.maximum(take(world.routed, first), 0)
    is_lost = is_any & (~is_sweep | (source == outage.executor))
    stays, following = is_any & ~is_lost, take(world.next_waiting, first)

    def turned(queue, is_meant):
        return queues.push_back(queues.pop_front(queue, following, is_meant), first, is_meant & stays, nowhere)

    unaccepted, joined = turned(unaccepted, is_asked)
    in_transfer, joined_transfers = turned(in_transfer, is_coming)
    link = choose(is_any, choose(is_coming, joined_transfers, joined), link)

    # Who comes with fewer blocks may let others in here.
    gives = is_lost & is_coming
    is_cut = is_sweep & gives & (phase == w.ENDING) & (counts.batch.is_committed == 0) & (counts.batch.extra > 0)
    cut, cut_end = ending.cut_jump(now, counts, times)
    counts, wake = choose(is_cut, cut, counts), clock.select(is_cut, cut_end, wake)
    counts = ending.take_blocks_of_jump(group, is_cut, counts, residue_row)
    blocks, rank = hand_over.kv_blocks(context, first), counts.rank
    back = jnp.where(gives, blocks, 0)
    counts = replace(counts, rank=replace(
        rank, in_transfer=in_transfer, used_blocks=rank.used_blocks - back, held_blocks=rank.held_blocks - back))

    is_last = is_sweep & (sweep.unaccepted + sweep.in_transfer == 1)
    lost = sweep.lost + (is_sweep & is_lost)
    behind = jnp.stack([e, sweep.unaccepted - is_asked, sweep.in_transfer - is_coming, lost])
    # Its door opens where others may be accepted now, or it is back; while it is down, for nobody.
    is_open = (is_last & (lost > 0)) | (outage.is_due & outage.is_back & (unaccepted.length > 0))
    hi, lo, turn = take(world.doors, e)
    door = clock.select(is_open, now, clock.select(is_any & ~is_sweep, clock.never(), Time(hi, lo)))
    is_woken = is_lost & ~is_sweep & (take(world.phase, source) == w.RESTING)
    is_changed = is_any | is_open
    opened = opened._replace(
        is_any=opened.is_any | is_changed, next_time=clock.select(is_changed, door, opened.next_time),
        next_turn=jnp.where(is_changed, jnp.where(is_open, AT_ONCE, turn), opened.next_turn),
        front=Front(unaccepted, opened.front.blocks),
        owed=(jnp.where(is_lost, source, opened.owed[0]), jnp.where(is_lost, blocks, opened.owed[1])),
        woken=jnp.where(is_woken, source, opened.woken))
    item = Item(is_any, is_lost, jnp.where(is_lost, first, nowhere), jnp.where(is_sweep, behind, world.sweep))
    return counts, wake, link, opened, item
