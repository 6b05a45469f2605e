"""What came out of a run: the arrays of a batch's world as host arrays of one lane, or of many."""

from dataclasses import dataclass

import numpy as np

from jaxsim.engine import failures, hand_over, lower, swapping, tape
from jaxsim.engine.common import MAX_SPAN_S, Params
from jaxsim.kernels import clock
from jaxsim.metrics import FINISHED, UNFINISHED, LaneResult
from jaxsim.metrics.lane import FAILED, REJECTED, TIMED_OUT
from jaxsim.policy.failures import down_seconds, outages_of
from jaxsim.spec.dims import Dims
from jaxsim.state import roles
from jaxsim.state import world as w
from jaxsim.state.control import OFF
from jaxsim.state.world import World
from jaxsim.workload.workload import Workload

FAULTS = {
    w.STUCK: "a scheduling pass could place nothing and never would: a request needs more than the engine has",
    w.STEP_LIMIT: f"more than {lower.MAX_STEPS_A_TOKEN} steps for every token of the workload: the scheduler is"
                  " going in circles (the KV pool is too small for the preemption rule)",
    w.STARVED: "requests are left that nothing will bring: the source of arrivals has stopped, or parts of images wait"
               " for each other in full caches (raise cluster.encode.cache_tiles)",
    w.LOG_FULL: "more releases of cached blocks, or touches of those in host memory (engine.offload) or in a store"
                " (cluster.remote_store), than were foreseen: sequences are preempted over and over",
    w.TOO_SLOW: f"an iteration that takes more than {MAX_SPAN_S:.0f} s, or no time that is a number: look at cost",
    w.LINKS_FULL: "more transfers are under way at once than cluster.transfer.most_at_once: raise it",
    w.WINDOW_FULL: "more requests wait for a place at once than engine.swap.window: raise it, or lower the load",
    w.SLACK_WINDOW_FULL: "more preempted requests wait at once than engine.slack_window: raise it, or lower the load",
    w.LINE_FULL: "more requests wait at once than engine.prefill_window: raise it, or lower the load",
    w.NO_NUMBER: "an action gave a router a weight that is not a number",
}


@dataclass(frozen=True)
class Lane:
    """One scenario, one seed, on its way through the engine.

    longest: tokens of a request of any of its seeds. front_end_s: that every request spends outside the engine.
    is_split: images of a request are encoded apart.
    """

    scenario: int
    system: lower.System
    workload: Workload
    dims: Dims
    params: Params
    longest: int
    prefixes: lower.Prefixes | None = None
    front_end_s: float = 0.0
    patience: np.ndarray | None = None
    is_split: bool = True


def lane_result(dims: Dims, world: World, lane: int, made: Lane, *, has_steps: bool = True) -> LaneResult:
    """One run of a batch, as plain host arrays; has_steps: with its tape, where there is one."""
    workload, count = made.workload, len(made.workload)
    is_finished = np.zeros(count, bool)
    counts = w.count_rows(dims).everything(world.counts[lane])
    times = w.clock_rows(dims).everything(world.clocks[lane])

    def seconds(array):
        return clock.join_reference(*array[lane].T)

    finish_s = seconds(world.finished)[:count]
    is_finished = finish_s > 0
    log_row, instance = world.placed[lane, :count].T
    first_s = seconds(world.first_tokens)
    scheduled_s = seconds(world.scheduled)[:count]

    def joined(pair):
        return pair.hi.astype(np.float64) + pair.lo.astype(np.float64)

    status, instance = np.where(is_finished, 0, 1).astype(np.int8), np.maximum(instance, 0)
    scheduled_s = np.where(world.placed[lane, :count, 1] >= 0, scheduled_s, np.nan)
    first_token_s = np.where(log_row >= 0, first_s[log_row], np.nan)
    clients = {}
    if dims.has_clients:
        clients = ends(world, np.s_[lane, :count], finish_s, first_token_s)
        status, instance = clients.pop("status"), clients.pop("instance")
        first_token_s, is_finished = clients.pop("first_token_s"), status == FINISHED
    lost = lost_of(world, made.params, np.s_[lane, :count], clients.get("ended_s"))
    preemptions = world.progress[lane, :count, 1] - lost.pop("repeated", 0)
    fault = int(world.fault[lane])
    names = [text for bit, text in FAULTS.items() if fault & bit]
    return LaneResult(
        arrival_s=_arrivals(world, lane, made), input_tokens=workload.input_tokens,
        output_tokens=workload.output_tokens, max_tokens=workload.max_tokens,
        scheduled_s=scheduled_s, first_token_s=first_token_s,
        finish_s=np.where(is_finished, finish_s, np.nan),
        stall_s=clock.from_integers_reference(world.stalled[lane, :count]), preemptions=preemptions,
        instance=instance, priority=workload.priority, tenant=workload.tenant,
        tenant_names=workload.tenant_names, status=status,
        itl_counts=world.itl[lane], busy_s=np.repeat(joined(times.executor.busy), dims.num_ranks),
        device_busy_s=np.repeat(joined(times.executor.alone) / dims.num_stages if dims.num_stages > 1
                                else joined(times.executor.busy), dims.num_ranks),
        kv_block_s=joined(times.rank.held).ravel(),
        running_s=joined(times.rank.running).ravel(), kv_peak_blocks=counts.rank.peak_blocks.ravel(),
        num_blocks=blocks_of(made.system),
        num_iterations=int(counts.executor.num_iterations.sum()), num_prefix_blocks=workload.num_prefix_blocks,
        fault="; ".join(names), front_end_s=made.front_end_s,
        cached_tokens=None if world.cached is None else world.cached[lane, :count],
        **handed_over(world, np.s_[lane, :count]), **migrated(world, np.s_[lane], np.s_[lane, :count], finish_s),
        **switched_roles(world, np.s_[lane]),
        role_changes=None if world.roles is None else role_changes(world, lane),
        **clients, **lost, **images_of(dims, world, lane, made.workload, made.is_split),
        **swapped(dims, world, np.s_[lane, :count], lane),
        **loaded(dims, world, np.s_[lane, :count], lane, block_seconds(made.params)),
        steps=tape.read(dims, world, lane) if dims.num_records and has_steps else None,
        lost_steps=max(int(world.num_recorded[lane]) - dims.num_records, 0) if dims.num_records else 0,
        predicted_tokens=workload.predicted_tokens, variant=workload.variant if dims.has_variants else None,
        session=workload.session, turn=workload.turn, num_context_limited=workload.num_context_limited)


def ends(world: World, rows: tuple, ended_s: np.ndarray, first_token_s: np.ndarray) -> dict[str, np.ndarray]:
    """With clients: how the last sending of these requests ended, how many there were, who served it, and when; the
    first token if it came before that."""
    sendings, status = np.moveaxis(world.clients[rows], -1, 0)
    # Who is refused, or lost, as the run begins has ended at 0 s.
    is_over = np.where(status == 0, ended_s > 0, np.isin(status, (TIMED_OUT, REJECTED, FAILED)))
    status = np.where(is_over, np.where(status == 0, FINISHED, status), UNFINISHED).astype(np.int8)
    first_token_s = np.where(~is_over | (first_token_s <= ended_s), first_token_s, np.nan)
    return {"status": status, "attempts": sendings >> 1, "ended_s": np.where(is_over, ended_s, np.nan),
            "instance": world.routed[rows].astype(np.int64), "first_token_s": first_token_s}


def lost_of(world: World, params: Params, rows: tuple, ended_s: np.ndarray) -> dict[str, np.ndarray]:
    """Where instances fail: `losses` and `restarts` of these requests, and how often they were `repeated`, which counts
    among preemptions in the loop; `num_outages`, `down_s` up to the last end of a request. Of one run."""
    if world.lost is None:
        return {}
    lost, until_s = world.lost[rows], float(np.nan_to_num(ended_s).max(initial=0.0))
    outages = outages_of(params.failures)
    return {"losses": lost[:, failures.LOSSES], "restarts": lost[:, failures.RESTARTS],
            "repeated": lost[:, failures.REPEATED], "num_outages": sum(one.start_s <= until_s for one in outages),
            "down_s": down_seconds(outages, world.phase.shape[-1], until_s)}


def handed_over(world: World, rows: tuple) -> dict[str, np.ndarray]:
    """With roles: `decode_instance`, `accepted_s` and `delivered_s` of these requests, where instances fail `left_s`
    too."""
    if world.transfers is None:
        return {}
    transfers = world.transfers[rows]
    target, is_through = transfers[..., hand_over.TARGET].astype(np.int64), transfers[..., hand_over.NUMBER] >= 0

    def seconds(column):
        stamps = np.moveaxis(transfers[..., column:column + 3], -1, 0)
        return np.where(is_through, clock.join_reference(*stamps), np.nan)

    found = {"decode_instance": target, "accepted_s": seconds(hand_over.ACCEPTED),
             "delivered_s": seconds(hand_over.DUE)}
    if world.left_at is not None:
        stamps = np.moveaxis(world.left_at[rows], -1, 0)
        found["left_s"] = np.where(is_through, clock.join_reference(*stamps), np.nan)
    return found


def migrated(world: World, lanes: tuple, rows: tuple, finish_s: np.ndarray) -> dict[str, np.ndarray]:
    """With migration: `migrations`, `downtime_s` and `last_instance` of these requests, `aborted_migrations`; with
    scaling `instance_s`, `starts` and `drains`. finish_s: of these requests, over the last axis."""
    if world.control is None:
        return {}
    moved, fleet = world.moved[rows], world.control.fleet
    found = {"migrations": moved[..., 0], "downtime_s": clock.from_integers_reference(moved[..., 2:]),
             "last_instance": _last(world, rows, moved[..., 1]),
             "aborted_migrations": world.control.aborted[lanes]}
    if fleet is not None:
        end_s = np.max(finish_s, axis=-1)
        is_used = (fleet.status[lanes] != OFF).sum(axis=-1)
        found |= {"instance_s": clock.from_integers_reference(fleet.used[lanes]) + is_used * end_s,
                  "starts": fleet.starts[lanes], "drains": fleet.drains[lanes]}
    return found


def _last(world: World, rows: tuple, shift: np.ndarray) -> np.ndarray:
    """Where requests that migrated so far from their first instance ended up; where instances fail, from that to which
    they were sent last, -1 if none took them then."""
    if world.lost is None:
        return np.maximum(world.placed[rows][..., 1], 0) + shift
    routed = world.routed[rows]
    return np.where(routed < 0, -1, routed + shift)


def images_of(dims: Dims, world: World, lane: int, workload: Workload, is_split: bool) -> dict[str, np.ndarray]:
    """With images: `num_images`; where others encode them, `encoded_s` and `embedded_s` of requests that have any."""
    count = len(workload)
    if workload.num_images is None:
        return {}
    found = {"num_images": workload.num_images}
    if dims.has_parts:
        whose = lower.parts_of(workload, is_split)[0]
        parts = embedded(world, lane, np.s_[count:count + len(whose)])
        for ours, theirs in (("encoded_s", "encoded_s"), ("embedded_s", "delivered_s")):
            latest = np.full(count, -np.inf)
            np.maximum.at(latest, whose, np.nan_to_num(parts[theirs], nan=np.inf))
            found[ours] = np.where(np.isfinite(latest), latest, np.nan)
    return found


def embedded(world: World, lane: int, rows: slice) -> dict[str, np.ndarray]:
    """Of parts of images, by row: `owner`, `started_s`, `encoded_s`, `accepted_s`, `delivered_s`."""
    def seconds(stamps, is_known):
        return np.where(is_known, clock.join_reference(*np.moveaxis(stamps, -1, 0)), np.nan)

    log_row, owner = world.placed[lane, rows].T
    transfers = world.transfers[lane, rows]
    is_sent = transfers[:, hand_over.NUMBER] >= 0
    return {"owner": owner, "started_s": seconds(world.scheduled[lane, rows], owner >= 0),
            "encoded_s": seconds(world.first_tokens[lane, log_row], log_row >= 0),
            "accepted_s": seconds(transfers[:, hand_over.ACCEPTED:hand_over.ACCEPTED + 3], is_sent),
            "delivered_s": seconds(transfers[:, hand_over.DUE:hand_over.DUE + 3], is_sent)}


def switched_roles(world: World, lanes: tuple | int | slice) -> dict[str, np.ndarray]:
    """With roles that change: `role_switches` of these runs, and `drain_s` of the first `MOST_SWITCHES` decided."""
    if world.roles is None:
        return {}
    rows = world.switches[lanes][..., :-1, :]

    def seconds(column):
        return clock.join_reference(*np.moveaxis(rows[..., column:column + 3], -1, 0))

    are_done = rows[..., roles.CHANGED] >= 0
    drain_s = np.where(are_done, seconds(roles.CHANGED) - seconds(roles.STOPPED), 0.0).sum(axis=-1)
    count = are_done.sum(axis=-1)
    return {"role_switches": world.roles.num_changed[lanes],
            "drain_s": np.where(count > 0, drain_s / np.maximum(count, 1), np.nan)}


def role_changes(world: World, lane: int) -> np.ndarray:
    """With roles that change: of every switch the executor, the role it left and the one it was to have
    (`jaxsim.policy.role_switching`), and when it was decided, took nobody any more, was seen empty, had its new role;
    NaN for what had not happened. The first `MOST_SWITCHES` of them."""
    rows = world.switches[lane, :min(int(world.roles.num_switches[lane]), roles.MOST_SWITCHES)]

    def seconds(column):
        stamps = rows[:, column:column + 3]
        return np.where(stamps[:, 0] >= 0, clock.join_reference(*stamps.T), np.nan)

    return np.column_stack([rows[:, :3], *(seconds(column) for column in (
        roles.DECIDED, roles.STOPPED, roles.EMPTIED, roles.CHANGED))])


def swapped(dims: Dims, world: World, rows: tuple, lanes: int | slice) -> dict[str, np.ndarray]:
    """With host memory: `swaps` and `swap_s` of these requests, `swap_delay_s` and `swapped_blocks` of these runs."""
    if world.swaps is None:
        return {}
    records = world.swaps[rows]
    seconds = clock.from_integers_reference(records[..., swapping.SECONDS:swapping.SECONDS + 3])
    stood = w.clock_rows(dims).everything(world.clocks[lanes]).rank.swap.stood
    counts = w.count_rows(dims).everything(world.counts[lanes]).rank.swap
    delay = stood.hi.astype(np.float64) + stood.lo
    return {"swaps": records[..., swapping.SWAPS], "swap_s": seconds,
            "swap_delay_s": delay.reshape(*delay.shape[:-2], -1),
            "swapped_blocks": np.stack([counts.copied_blocks.sum((-2, -1)), counts.spared_blocks.sum((-2, -1))], -1)}


def block_seconds(params: Params) -> tuple[float, float]:
    """Of a block that is loaded on its link, and of one from the store that instances share; NaN where none is."""
    offload, reuse, remote = params.flags.offload, params.flags.reuse, params.flags.remote
    fetched_s = float("nan") if remote is None else float(remote.seconds_per_block)
    if reuse is not None:
        return float(reuse.kv_s) + (float(reuse.hidden_s) if reuse.recomputed_share > 0 else 0.0), fetched_s
    return float("nan") if offload is None else float(offload.seconds_per_block), fetched_s


def loaded(dims: Dims, world: World, rows: tuple, lanes: int | slice, block_s: tuple[float, float] | np.ndarray
           ) -> dict[str, np.ndarray]:
    """Where blocks are loaded behind the prefix cache: `loaded_tokens` of these requests, `load_s` and `load_delay_s`
    of the instances of these runs, with a store that these share `fetched_tokens`, with siblings among them
    `loaded_from` of these requests; block_s: as `block_seconds` says, of each run where they are many."""
    if world.loaded is None:
        return {}
    held = w.count_rows(dims).everything(world.counts[lanes]).rank.offload
    loads = w.clock_rows(dims).everything(world.clocks[lanes]).rank.loads
    blocks, delay, found = held.loaded_blocks, loads.hi.astype(np.float64) + loads.lo, {}
    one_s, fetched_s = np.moveaxis(np.asarray(block_s)[..., None, None], -3, 0)
    if dims.has_remote:
        # Without host memory a block from there has no time, and none came.
        own_s = (blocks - held.fetched_blocks) * np.nan_to_num(one_s)
        load_s, found = own_s + held.fetched_blocks * fetched_s, {"fetched_tokens": world.fetched[rows]}
    elif dims.has_siblings:
        linked = w.clock_rows(dims).everything(world.clocks[lanes]).rank.borrowing.linked
        load_s, found = linked.hi.astype(np.float64) + linked.lo, {"loaded_from": world.loaded_from[rows]}
    else:
        load_s = blocks * one_s
    return found | {"loaded_tokens": world.loaded[rows], "load_s": load_s.reshape(*blocks.shape[:-2], -1),
                    "load_delay_s": delay.reshape(*delay.shape[:-2], -1)}


def blocks_of(system: lower.System) -> int | np.ndarray:
    """KV blocks of an instance, of each where there are pools; 0 where memory is no limit, or where instances change
    between roles that have not the same: what a role had of them is not kept."""
    if not system.scheduler.kv_accounting:
        return 0
    blocks = system.blocks_of_executors
    if system.switches_roles and len(set(blocks.tolist())) > 1:
        return 0
    return system.num_blocks if blocks is None else blocks


def _arrivals(world: World, lane: int, made: Lane) -> np.ndarray:
    if not made.params.source.answers:
        return np.asarray(made.workload.arrival_s)
    due = world.due[lane, :len(made.workload)]
    # One that never came, where a bound stopped the run.
    return np.where(np.isinf(due[:, 1]), np.nan, clock.join_reference(*due.T))
