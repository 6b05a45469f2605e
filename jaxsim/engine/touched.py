"""What one step works on, filled in phase by phase."""

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxsim.cost.base import DecodePace
from jaxsim.engine import (
    chunks,
    clients,
    fair,
    hand_over,
    kv_parallel,
    lockstep,
    lost_hand_overs,
    migration,
    offload,
    partial_prefills,
    pipeline,
    prefix,
    remote_store,
    role_switching,
    siblings,
    slack,
    swapping,
    tangents,
    tape,
)
from jaxsim.engine.ending import Retired
from jaxsim.engine.events import Event
from jaxsim.engine.passes import Placed, Plan
from jaxsim.engine.slots import Slots
from jaxsim.kernels import queues
from jaxsim.kernels.clock import Time
from jaxsim.state.control import Control
from jaxsim.state.world import Clocks, Counts


class Touched(eqx.Module):
    """What one step works on. Phases fill it in from above; each field is written by the phase it stands under."""

    # look: the event; whether the next lies too far ahead; the executor's rows, in these one rank and batch, and
    # where these lie among those of all executors; its block residues; what woke it; of a
    # pipeline, what is in flight; with virtual token counters the tenants of the rank, which later phases change.

    event: Event
    is_frozen: Bool[Array, ""]
    rank: Int[Array, ""]
    batch: Int[Array, ""]
    count_row: Int[Array, " count_fields"]
    clock_row: Float[Array, " clock_fields"]
    counts: Counts
    times: Clocks
    residue_row: Int[Array, " block_size"]
    phase: Int[Array, ""]
    wake: Time
    flying: pipeline.Flights | None
    tenants: fair.Tenants | None = None
    # With tangents, what its times change by, which `settle` and `price` change; receive: what an arrival moves by.
    moving: tangents.Tangents | None = None
    arrived: Time | None = None

    # receive: the source's state; the link of the queue that changes (and may again in `fill`); under a sorted queue
    # the arriving request's place and the first place that waits; what an arrival leaves of the jump of several ranks.
    cut_extra: Int[Array, ""] | None = None
    source: PyTree = None
    link: queues.Link | None = None
    places: tuple[Int[Array, ""], Int[Array, ""]] | None = None
    # With least slack, the preempted ones that wait (and of `open_pass`: the candidate is one of them).
    again: slack.Again | None = None
    is_again: Bool[Array, ""] | None = None

    # open_door: with roles, what it did; with migration, what the controller or a door did; with roles that change,
    # what their controller did.

    control: Control | None = None
    acted: migration.Acted | None = None
    opened: hand_over.Opened | None = None
    switched: role_switching.Switched | None = None

    # give_up: with clients, whose request was cut off.
    cut_off: clients.CutOff | None = None
    # With roles, who was looked at of those who have left for an instance.
    item: lost_hand_overs.Item | None = None

    # settle: samples of the time between tokens, and how many tokens each stands for; what the tape is told.
    itl_s: Float[Array, " samples"] | None = None
    itl_weights: Int[Array, " samples"] | None = None
    taped: tape.Known | None = None

    # retire: who left; whether more leave at this instant; the smallest completion key that stays; the last of the
    # running list and the links that change in it; the entry of `World.due` that changes; all slots, if the pass scans
    # them; the largest offset of those that stay, if the cost reads it; with roles who left for another executor, and
    # whether this one is to see who fits.
    left: hand_over.Left | migration.Left | None = None
    is_looking: Bool[Array, ""] | None = None
    due: tuple[Int[Array, ""], Float[Array, " 3"]] | None = None
    released: prefix.Release | None = None
    slots: Slots | None = None
    longest: Int[Array, ""] | None = None
    retired: Retired | None = None
    has_more: Bool[Array, ""] | None = None
    next_key: Int[Array, ""] | None = None
    tail: Int[Array, ""] | None = None
    unlinked: tuple[queues.Link, queues.Link] | None = None
    # With KV-cache parallelism, who decodes (of `price`: the prompt that was placed among those that follow).
    decoding: kv_parallel.Decoding | None = None

    # open_pass: whether a pass is due, under way, free to place a prompt, short of blocks, closed before this step,
    # about to preempt, without anybody who goes ahead; the victim (slot, request, offset); the candidate: its lengths,
    # tokens emitted, preemptions, seconds since the last of these, and who waits behind it; whether it has its KV here.
    # Where victims are swapped: the line as it is.
    is_ready: Bool[Array, ""] | None = None
    sight: swapping.Sight | None = None
    # Where time limits chunks: the candidate's next.
    sized: chunks.Sized | None = None
    # Where several prompts are partly computed: whose turn it is.
    chosen: partial_prefills.Chosen | None = None
    # Where turns are kept: the one that ended (of `retire`), what there is for the candidate, and whether this step
    # only drops a copy, and whose.
    ended: swapping.Ended | None = None
    kept_turn: swapping.Turn | None = None
    is_trimming: Bool[Array, ""] | None = None
    trimmed: Int[Array, ""] | None = None
    is_due: Bool[Array, ""] | None = None
    has_ended: Bool[Array, ""] | None = None
    has_work: Bool[Array, ""] | None = None
    is_passing: Bool[Array, ""] | None = None
    is_placing: Bool[Array, ""] | None = None
    is_short: Bool[Array, ""] | None = None
    was_closed: Bool[Array, ""] | None = None
    is_preempting: Bool[Array, ""] | None = None
    is_empty: Bool[Array, ""] | None = None
    victim: tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]] | None = None
    candidate: Int[Array, ""] | None = None
    lengths: Int[Array, " 4"] | None = None
    emitted: Int[Array, ""] | None = None
    preemptions: Int[Array, ""] | None = None
    preempted_s: Float[Array, ""] | None = None
    next_head: Int[Array, ""] | None = None

    # look_up: what is cached of the candidate, and what host memory has of it.
    found: prefix.Found | None = None
    behind: offload.Behind | None = None
    # What this rank has put of it into the store that instances share, and what that has evicted.
    own_puts: remote_store.OwnPuts | None = None
    # Who of the other instances gives what the prefix cache lacks.
    offer: siblings.Offer | None = None

    # fill: who was placed; whether a first token opens a row of the log, the head of the queue waits for an event, more
    # can be placed at this instant; tokens the victim has emitted.
    placed: Placed | None = None
    opens_log: Bool[Array, ""] | None = None
    is_held: Bool[Array, ""] | None = None
    can_go_on: Bool[Array, ""] | None = None
    victim_emitted: Int[Array, ""] | None = None

    # fill: where decodes are a queue, who is in the batch; launch: of free stages, when each slot's iteration ends.
    are_going: Bool[Array, " slot_width"] | None = None
    slot_ends: Float[Array, "slot_width 2"] | None = None
    # Where victims are swapped: what changes in the line.
    moved: swapping.Moved | None = None
    # What goes to host memory behind the prefix cache.
    kept: offload.Kept | None = None
    # What it puts there now; launch: until when the egress of the store is busy.
    puts: remote_store.Puts | None = None
    egress: Time | None = None
    # Who gave a context, and the link out of there.
    loan: siblings.Loan | None = None

    # price: nothing could be scheduled; until blocks come back; and never will; seconds of the iteration and the pace
    # behind it; whether it starts.
    is_idle: Bool[Array, ""] | None = None
    is_resting: Bool[Array, ""] | None = None
    is_stuck: Bool[Array, ""] | None = None
    price: tuple[Float[Array, ""], DecodePace] | None = None
    is_starting: Bool[Array, ""] | None = None

    # launch; of several ranks, what their turn comes to.
    plan: Plan | None = None
    turn: lockstep.Turn | None = None
