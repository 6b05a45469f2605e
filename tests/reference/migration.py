"""Live migration of running requests between instances, under a controller that looks at all of them now and then.

Every `polling_s`, after the iterations that end at that instant and before arrivals, sources (somebody preempted waits
there, or less is free than `out_below`) are sorted from the least free, destinations (nobody such, more is free than
`in_above`) from the freest, and paired in that order. A pair of two instances that have no migration begins one, if a
running request of the source has decoded there. The timer begins anew with an arrival that finds nobody in the cluster,
and stops when it finds nobody itself.

A stage begins by counting the blocks that the request holds and its destination has not taken for it. More than
`last_stage_blocks`: all but one are taken and copied, and the next stage begins at the end of that. Otherwise the
request stops at the end of the iteration in flight (at once if there is none), what it then holds more is taken and
copied, and at the end of that it is ready at the destination and gone from the source.

A migration ends without effect if at the beginning of a stage the request was preempted since it began, or has
finished, or `max_stages` stages are over; if the request finishes as it is to stop; or if the destination has less than
the stage's blocks free above its watermark. Blocks taken go back; who has stopped is ready where it was. So it is where
its destination goes down; where its source does, it is lost with that.

Source: AlibabaPAI/llumnix; Llumnix (arXiv 2406.03243).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import inf

from .clock import Clock
from .memory import ceil_div
from .scaling import Fleet
from .state import Instance, Job


@dataclass(frozen=True)
class Migration:
    """Numbers of the controller. metric: `remaining_steps` or `freeness`; choice: `shortest` or `last_come`."""

    polling_s: float
    out_below: float
    in_above: float
    max_stages: int = 3
    last_stage_blocks: int = 16
    block_s: float = 0.0
    latency_s: float = 0.0
    metric: str = "remaining_steps"
    choice: str = "shortest"


@dataclass(eq=False)
class Move:
    """A migration under way."""

    number: int
    job: Job
    source: Instance
    destination: Instance
    preemptions: int
    stages: int = 0
    taken: int = 0  # blocks at the destination
    is_stopping: bool = False
    stopped: float | None = None


@dataclass
class Moved:
    """What became of one request: migrations, seconds it stood still for them (ticks), where it ended up."""

    migrations: int = 0
    downtime: float = 0
    instance: int | None = None


def demand(job: Job, instance: Instance) -> int:
    """Blocks of all that is known of a waiting request."""
    return ceil_div(job.known, instance.flags.block_size)


def headroom(instance: Instance) -> int:
    """Blocks kept for urgent requests."""
    is_any = any(job.request.priority < 0 for job in instance.running)
    return instance.flags.headroom_blocks if is_any else 0


def free_to_migrate(instance: Instance, metric: str) -> Fraction | float:
    """Blocks a request, by either metric, the head of the queue served."""
    blocks = instance.free_blocks - sum(demand(job, instance) for job in instance.waiting[:1])
    here = len(instance.running) + len(instance.ready)
    if metric == "freeness":
        return Fraction(blocks - headroom(instance), max(here, 1))
    here += bool(instance.waiting)
    return Fraction(blocks, here) if here else inf


@dataclass
class LiveMigration:
    """The controller, and all migrations.

    expect(time, number): a stage of a migration ends then. ask_for_pass: an instance may have something to do.
    """

    rules: Migration
    instances: Sequence[Instance]
    clock: Clock
    expect: Callable[[float, int], None]
    ask_for_pass: Callable[[Instance], None]
    moves: dict[int, Move] = field(default_factory=dict)  # under way
    started: int = 0
    aborted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(
        ("finished", "preempted", "no_room", "too_many_stages", "outage"), 0))
    stops: list[tuple[float, int]] = field(default_factory=list)  # who stopped for a last stage, and when
    spans: list[tuple[float, float, int, int]] = field(default_factory=list)  # of stages: when, from where, to where
    broken: Counter = field(default_factory=Counter)  # by outages, as what and when
    down: set[int] = field(default_factory=set)  # instances
    moved: dict[int, Moved] = field(default_factory=dict)  # by request
    num_stages: int = 0
    refused_at_last: int = 0
    fleet: Fleet | None = None
    prefers_calm: bool = False  # urgent requests migrate only where there is no other
    is_over: bool = False  # every request has finished: what follows counts no more

    def look(self, now: float) -> None:
        free = [free_to_migrate(instance, self.rules.metric) for instance in self.instances]
        killed = [any(job.preemptions > job.preemptions_before for job in instance.waiting)
                  for instance in self.instances]
        everybody = [i for i in range(len(self.instances)) if i not in self.down]
        takers = everybody
        if self.fleet:
            draining, takers = self.fleet.those("draining", now), self.fleet.those("on", now)
            draining, takers = ([i for i in some if i not in self.down] for some in (draining, takers))
            everybody = sorted([*draining, *takers])
            free = [-inf if i in draining else own for i, own in enumerate(free)]
        sources = [i for i in everybody if killed[i] or free[i] < self.rules.out_below]
        destinations = [i for i in takers if i not in sources and not killed[i] and free[i] > self.rules.in_above]
        sources.sort(key=lambda i: (free[i], i))
        destinations.sort(key=lambda i: (-free[i], i))
        for source, destination in zip(sources, destinations, strict=False):
            pair = self.instances[source], self.instances[destination]
            if not any(self.is_busy(instance) for instance in pair):
                self.begin(*pair, now)

    def is_busy(self, instance: Instance) -> bool:
        return any(instance in (move.source, move.destination) for move in self.moves.values())

    def begin(self, source: Instance, destination: Instance, now: float) -> None:
        able = [job for job in source.running if job.is_prefilled and not job.is_newcomer]
        if not able:
            return
        calm = [job for job in able if job.request.priority >= 0]
        if self.prefers_calm and calm:
            able = calm
        job = able[-1] if self.rules.choice == "last_come" else min(able, key=lambda j: j.computed)
        move = Move(self.started, job, source, destination, job.preemptions)
        self.moves[move.number] = move
        self.started += 1
        self.begin_stage(move, now)

    def begin_stage(self, move: Move, now: float) -> None:
        job = move.job
        left = job.blocks - move.taken
        if job.preemptions > move.preemptions:
            self.abort(move, "preempted")
        elif job.finish is not None:
            self.abort(move, "finished")
        elif move.stages >= self.rules.max_stages:
            self.abort(move, "too_many_stages")
        elif left <= self.rules.last_stage_blocks:
            move.is_stopping = True
            if not move.source.flights:
                self.stop(job, now)
        else:
            self.copy(move, left - 1, now)

    def is_stopping(self, job: Job) -> bool:
        return any(move.job is job and move.is_stopping and move.stopped is None for move in self.moves.values())

    def move_of(self, job: Job) -> Move:
        return next(move for move in self.moves.values() if move.job is job)

    def finished(self, job: Job) -> None:
        """A request that was to stop now has emitted its last token."""
        if self.is_stopping(job):
            self.abort(self.move_of(job), "finished")

    def stop(self, job: Job, now: float) -> None:
        move = self.move_of(job)
        move.stopped = now
        self.stops.append((now, job.request.id))
        move.source.running.remove(job)
        move.source.stopped.append(job)
        self.copy(move, job.blocks - move.taken, now)

    def copy(self, move: Move, blocks: int, now: float) -> None:
        destination = move.destination
        if destination.free_blocks - blocks < destination.flags.watermark_blocks:
            self.refused_at_last += move.stopped is not None
            self.abort(move, "no_room")
            if move.stopped is not None:
                move.source.stopped.remove(move.job)
                self.join(move, move.source, now)
            return
        destination.free_blocks -= blocks
        destination.inbound_blocks += blocks
        move.taken += blocks
        move.stages += 1
        self.num_stages += 1
        end = now + self.clock.ticks(self.rules.latency_s) + self.clock.ticks(blocks * self.rules.block_s)
        self.spans.append((now, end, move.source.index, move.destination.index))
        self.expect(end, move.number)

    def stage_ends(self, number: int, now: float) -> None:
        move = self.moves.get(number)
        if move is None:
            return  # broken off by an outage
        if move.stopped is None:
            self.begin_stage(move, now)
            return
        source, destination, job = move.source, move.destination, move.job
        source.stopped.remove(job)
        source.free_blocks += job.blocks
        assert destination.inbound_blocks == move.taken == job.blocks, "blocks of another size arrived"
        destination.inbound_blocks = 0
        del self.moves[number]
        moved = self.join(move, destination, now)
        moved.migrations += 1
        moved.instance = destination.index
        self.ask_for_pass(source)

    def join(self, move: Move, instance: Instance, now: float) -> Moved:
        """The request is ready at an instance, after it stood still."""
        moved = self.moved.setdefault(move.job.request.id, Moved())
        moved.downtime += now - move.stopped
        move.job.is_newcomer = True
        instance.ready.append(move.job)
        self.ask_for_pass(instance)
        return moved

    def break_off(self, instance: Instance, now: float) -> list[Job]:
        """An instance goes down. Returns who had stopped there for the last stage of a migration, if anybody."""
        for move in list(self.moves.values()):
            if instance is move.destination:
                self.abort(move, "outage")
                self.broken["destination, stopped" if move.stopped is not None else "destination, to stop"
                            if move.is_stopping else "destination"] += 1
                if move.stopped is not None:
                    # The source goes on with it.
                    move.source.stopped.remove(move.job)
                    self.join(move, move.source, now)
            elif instance is move.source:
                self.abort(move, "outage")
                self.broken["source" if move.stopped is None else "source, stopped"] += 1
                if move.stopped is not None:
                    instance.stopped.remove(move.job)
                    self.moved.setdefault(move.job.request.id, Moved()).downtime += now - move.stopped
                    return [move.job]
        return []

    def abort(self, move: Move, cause: str) -> None:
        self.aborted[cause] += not self.is_over
        del self.moves[move.number]
        assert move.destination.inbound_blocks == move.taken
        move.destination.free_blocks += move.taken
        move.destination.inbound_blocks = 0
        self.ask_for_pass(move.destination)
