"""A second opinion on the event engine: plain Python, a heap of events, one iteration at a time.

Every sequence is an object that holds what it computed, emitted and occupies; a scheduling pass walks lists
of such objects in the order the imitated engine walks them, so preemption is the engine's own sequential loop
and not a closed form. Nothing here is fast and nothing here is shared with `jaxsim`.

With `Flags.stages` an instance is a pipeline: up to so many batches are in flight, one behind the other through the
engine and the stages, each of which works on one at a time. A pass sees the sequences that are not in flight.

With `Request.after` a request waits for the answer to another: a turn of a session.

With `Clients` requests may end without an answer, and be sent again. With `Failures` instances are down for a while,
with everything that is there.

With `Disaggregation` prompts are computed on some instances and outputs on others; with `Encoding` images on others
again, with `encoder` by the instances that compute the prompts. With `Migration` running requests move between
instances. With `RoleSwitching` instances change their role (`role_switching`).

Order of events at one instant: (time, phase, index), phases: deliveries of KV in the order of acceptance,
iteration ends by instance, the look of a controller, arrivals by request, scheduling passes by instance. What an event
causes at the same instant has its place in this order among what is left. A pass is atomic; it needs an instance with
work and no iteration in flight.

Clock (`clock`): Python integers, one tick = 2^-30 s, so sums of times are exact. A duration is rounded to the tick, an
arrival to 2^-20 s, both half to even. With `round_times=False` times are float64 seconds as they come.

Source: the schedulers of vLLM (V0 and V1), SGLang, TensorRT-LLM, Sarathi-Serve and Orca (the last two as in
Vidur), DistServe, and LLMServe/DistServe `simdistserve` (`decode_context_limit`).

Orders of the waiting queue (`fairness`): sorted by a key, or by virtual token counters.

Prefix caching (`Flags.prefix_caching`, vLLM V1 only): the pool of an instance is a `PrefixCache`, block by block.

Known gaps: no speculation, one chunked prefill at a time (several, side by side, in `partial_prefills` only); a
sequence in flight is never preempted; SGLang without its radix tree; with asynchronous scheduling a block gets its key
when scheduled all the same; simdistserve's later stages take together what waits before them, here batches stay apart
(`ReferenceResult.merges_left_out` counts).
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from . import remote_store
from .checks import check_batch, check_between_iterations, check_cluster, check_instance, check_links, refuse_impossible
from .clients import PHASE_TIMEOUT, Clients
from .clock import ARRIVAL_GRID_TICKS, Clock
from .disaggregation import Disaggregation, HandOver
from .encoding import Encoders, Encoding
from .failures import BACK, PHASE_OUTAGE, Failures, Outages
from .flags import PRESETS, UNLIMITED, Flags, preset
from .lending import Borrower
from .long_contexts import seconds as long_seconds
from .memory import release
from .migration import LiveMigration, Migration
from .passes import enqueue, scheduling_pass
from .results import (
    IterationRecord,
    PartRecord,
    ReferenceResult,
    RequestResult,
    TransferRecord,
    arrival_margins,
    neighbour_margins,
)
from .role_switching import Controller, RoleSwitching
from .routing import ROUTERS, Router, fewest_prefills, fewest_queued_decodes
from .scaling import Fleet, Scaling
from .state import BatchStatsRef, Instance, Job, Request, batch_stats
from .swapping import Pool, SwapState, answer_is_out, swapping_pass
from .transfers import Transfer

__all__ = [
    "PRESETS", "ROUTERS", "UNLIMITED", "BatchStatsRef", "Disaggregation", "Encoding", "Flags", "IterationRecord",
    "Migration", "ReferenceResult", "Request", "RequestResult", "RoleSwitching", "Router", "Scaling", "TransferRecord",
    "arrival_margins", "fewest_prefills", "fewest_queued_decodes", "preset", "simulate",
]

PHASE_DELIVERY, PHASE_ITERATION_END, PHASE_CONTROL, PHASE_ARRIVAL, PHASE_PASS = range(5)

Cost = Callable[[BatchStatsRef], float]
StageCost = Callable[[BatchStatsRef], Sequence[float]]


def simulate(
    requests: Sequence[Request],
    flags: Flags | Sequence[Flags],
    num_instances: int,
    router: str | Router,
    cost: Cost | Sequence[Cost],
    *,
    round_times: bool = True,
    ranks: int = 1,
    stage_cost: StageCost | Sequence[StageCost | None] | None = None,
    disaggregation: Disaggregation | None = None,
    migration: Migration | None = None,
    scaling: Scaling | None = None,
    clients: Clients | None = None,
    failures: Failures | None = None,
    encoding: Encoding | None = None,
    encoder: Sequence[tuple[float, float]] | None = None,
    switching: RoleSwitching | None = None,
    variants: int | None = None,
) -> ReferenceResult:
    """Serves all requests to the end.

    Arguments:
    - requests: in order of (arrival, id), ids distinct; those that come after others anywhere among them.
    - flags, cost, stage_cost: of all instances, or of each.
    - router: a name of `ROUTERS` or a function (request, instances that prefill, requests routed so far) -> index.
    - cost: seconds of one iteration.
    - round_times: False keeps float64 seconds as they come instead of the grids.
    - ranks: so many instances each, one behind the other, iterate together: none starts or ends before the others.
    - stage_cost: seconds of one iteration in the engine and in each stage of a pipeline; by default nothing in the
      engine, and `cost` in equal parts.
    - clients: what they and the cluster do where an answer takes too long; by default all wait for ever.
    - failures: when instances are down; with `clients`.
    - disaggregation: roles of the instances and what is between them; by default all are mixed.
    - migration: of running requests; by default there is none. scaling: of how many instances are on, beside it.
    - encoding: rules of the instances whose role is to encode images.
    - encoder: of each instance the seconds (base, a tile) by which an iteration is longer that has the first tokens of
      requests with images, where these are not encoded elsewhere.
    - switching: of the roles of `disaggregation`, which are those at the beginning.
    - variants: of the model; instance i serves the one of number i modulo these, by default all serve all requests.

    Raises ValueError for a request that can never be served, AssertionError where a law is broken.
    """

    def of_each(given):
        each = list(given) if isinstance(given, (list, tuple)) else [given] * num_instances
        if len(each) != num_instances:
            raise ValueError(f"{len(each)} given for {num_instances} instances")
        return each

    all_flags = of_each(flags)
    if ranks > 1 and (disaggregation is not None or len(set(all_flags)) > 1):
        raise ValueError("ranks iterate together: they are alike and mixed")
    roles = ["mixed"] * num_instances if disaggregation is None else of_each(tuple(disaggregation.roles))
    if disaggregation is not None:
        disaggregation.refuse_flags(all_flags)
    for request in requests:
        for one, role in set(zip(all_flags, roles, strict=True)):
            if role == "prefill" and not (failures and failures.most_restarts):
                refuse_impossible(replace(request, output=1), one)
            elif role in ("mixed", "prefill") or (role == "decode" and request.output > 1):
                refuse_impossible(request, one)
    instances = [Instance(i, one, role) for i, (one, role) in enumerate(zip(all_flags, roles, strict=True))]
    simulation = Simulation(requests, instances, router, of_each(cost), of_each(stage_cost), Clock(round_times), ranks,
                            disaggregation, clients, encoding, encoder, migration, scaling, failures, switching,
                            variants)
    simulation.run()
    simulation.check_end()
    return simulation.result()


class Simulation:
    """A run: the heap, the instances, and what an event does."""

    def __init__(self, requests: Sequence[Request], instances: list[Instance], router: str | Router, costs: list[Cost],
                 stage_costs: list[StageCost | None], clock: Clock, ranks: int, rules: Disaggregation | None,
                 clients: Clients | None = None, encoding: Encoding | None = None,
                 encoder: Sequence[tuple[float, float]] | None = None, migration: Migration | None = None,
                 scaling: Scaling | None = None, failures: Failures | None = None,
                 switching: RoleSwitching | None = None, variants: int | None = None):
        self.variants, self.routed_of_variant = variants, {}
        links_out = {}
        for instance in instances:
            if isinstance(instance.store, Borrower):
                instance.store.meet(instances, variants, links_out, clock.ticks)
        self.instances, self.costs, self.clock, self.ranks = instances, costs, clock, ranks
        self.route = ROUTERS[router] if isinstance(router, str) else router
        self.prefilling = [instance for instance in instances if instance.can_prefill]
        self.stage_costs = [
            given or self._equal_parts(cost, instance.flags.stages)
            for given, cost, instance in zip(stage_costs, costs, instances, strict=True)
        ]
        self.jobs = [Job(request, clock.ticks(request.arrival_s, ARRIVAL_GRID_TICKS)) for request in requests]
        order = [(job.arrival, job.request.id) for job in self.jobs if job.request.after is None]
        assert order == sorted(order) and len({i for _, i in order}) == len(order), "requests out of order"
        self.followers: dict[int, list[int]] = {}  # by request: who comes when its answer is out
        for number, request in enumerate(requests):
            if request.after is not None:
                self.followers.setdefault(request.after, []).append(number)
        self.rules = rules
        self.hand_over = None if rules is None else HandOver(rules, instances, clock, self.expect_delivery)
        self.encoder = encoder
        self.encoders = None
        if encoding is not None:
            self.encoders = Encoders(
                encoding, rules.roles, self.jobs, clock, self.hand_over, self.choose,
                lambda index, end: heapq.heappush(self.events, (end, PHASE_ITERATION_END, index)),
                lambda index: heapq.heappush(self.events, (self.now, PHASE_PASS, index)), self.enter,
                can_switch=switching is not None)
        self.transfers: dict[tuple, Transfer] = {}  # on the way
        self.look_at: float | None = None  # when the controller looks next
        self.fleet = scaling and Fleet(scaling, instances, clock)
        self.live = migration and LiveMigration(
            migration, instances, clock, self.expect_stage, self.ask_for_pass, fleet=self.fleet,
            prefers_calm=any(instance.flags.headroom_blocks for instance in instances))
        self.iterations: list[IterationRecord] = []
        self.iteration_ends: list[list[float]] = [[] for _ in instances]
        for instance in instances:
            if instance.flags.swapping is not None:
                instance.swap = SwapState()
                if instance.flags.swapping.group_blocks:
                    instance.swap.pool = Pool(instance.flags.num_blocks, instance.flags.swapping.group_blocks)
        for instance in instances:
            instance.predict = lambda entries, instance=instance: self._alone_s(instance, entries)
            instance.now = lambda: self.now
        self.shared_store = remote_store.connect(instances, requests, lambda: self.now)
        self.num_routed = self.num_finished = 0
        self.clients = clients
        self.earlier_jobs: list[Job] = []  # sendings behind which there was another
        self.num_unheard = 0  # tokens that nobody was there for
        self.now = 0
        self.events: list[tuple] = [(job.arrival, PHASE_ARRIVAL, number) for number, job in enumerate(self.jobs)
                                    if job.request.after is None]
        if self.fleet:
            self.events.append((clock.ticks(scaling.check_s), PHASE_CONTROL, 0))
        self.num_over = 0  # finished, or ended without an answer for good
        self.outages = failures and Outages(failures, instances, clock, live=self.live, hand_over=self.hand_over,
                                            ask_for_pass=self.ask_for_pass)
        if self.outages:
            self.events += self.outages.events()
            for other in (self.live, self.fleet, self.hand_over):
                if other:
                    other.down = self.outages.down
        self.controller = switching and Controller(
            switching, instances, clock, self.encoders, self.hand_over, costs,
            lambda time, number: heapq.heappush(self.events, (time, PHASE_CONTROL, number)),
            lambda able: setattr(self, "prefilling", able))
        if self.controller and self.outages:
            self.controller.down = self.outages.down
        heapq.heapify(self.events)

    @staticmethod
    def _equal_parts(cost: Cost, stages: int) -> StageCost:
        return lambda stats: [0.0] + [cost(stats) / stages] * stages

    def run(self) -> None:
        while self.events:
            time, phase, index = heapq.heappop(self.events)
            if phase == PHASE_CONTROL and index == 1 and self.look_at != time:
                continue
            if self.live and phase == PHASE_DELIVERY:
                self.now = time
                self.live.is_over = self.num_over == len(self.jobs)
                self.live.stage_ends(index, time)
                self.check_migration()
                continue
            if phase == PHASE_DELIVERY and (index not in self.transfers or self.transfers[index].due != time):
                continue  # due at another time since
            assert time >= self.now, "the clock ran back"
            self.now = time
            if phase == PHASE_DELIVERY:
                self.deliver(self.transfers.pop(index))
            elif phase == PHASE_ITERATION_END and self.instances[index].role == "encode":
                self.encoders.end(index, self.now)
            elif phase == PHASE_PASS and self.instances[index].role == "encode":
                self.encoders.start(index, self.now)
            elif phase == PHASE_ITERATION_END and self.outages and self.outages.ends.get(index) != time:
                continue  # it was lost
            elif phase == PHASE_ITERATION_END:
                for instance in self.together(self.instances[index]):
                    if instance.flights:
                        self.end_iteration(instance)
                self.ask_for_pass(self.instances[index], is_return=True)
            elif phase == PHASE_CONTROL and self.controller:
                is_quiet = all(other == PHASE_CONTROL for _, other, _ in self.events)
                self.controller.turn(index, self.now, self.num_over == len(self.jobs), is_quiet)
                self.controller.other_events -= 1
            elif phase == PHASE_CONTROL and index == 0:
                if self.num_over < len(self.jobs):
                    self.fleet.switch_off(self.now, self.live.is_busy)
                    self.fleet.look(self.now)
                    heapq.heappush(self.events, (self.now + self.clock.ticks(self.fleet.rules.check_s), phase, 0))
            elif phase == PHASE_CONTROL:
                if self.fleet and self.num_over < len(self.jobs):
                    self.fleet.switch_off(self.now, self.live.is_busy)
                self.live.look(self.now)
                self.look_at = None
                self.expect_look()
            elif phase == PHASE_OUTAGE:
                self.change_outage(*index)
            elif phase == PHASE_TIMEOUT:
                self.time_out(*index)
            elif phase == PHASE_ARRIVAL:
                self.arrive(self.jobs[index] if self.clients is None else self.send(index))
            else:
                self.start_iterations(self.instances[index])
            if self.controller:
                self.controller.other_events += 1
            if self.rules is not None:
                check_cluster(self.instances, self.num_there)
            if self.live:
                self.check_migration()
            if self.outages:
                self.check_outages()

    def together(self, instance: Instance) -> list[Instance]:
        first = instance.index // self.ranks * self.ranks
        return self.instances[first : first + self.ranks]

    def ask_for_pass(self, instance: Instance, *, is_return: bool = False) -> None:
        leader = self.together(instance)[0]
        flags = instance.flags
        room = flags.stages if flags.pass_on_arrival or is_return else 1
        if flags.pass_when_stage_free:
            room = math.inf
        if leader.is_pass_due or any(len(i.flights) >= room for i in self.together(instance)):
            return
        if any(i.has_work for i in self.together(instance)):
            leader.is_pass_due = True
            heapq.heappush(self.events, (self.now, PHASE_PASS, leader.index))

    def expect_follower(self, number: int) -> None:
        follower = self.jobs[number]
        follower.arrival = self.now + self.clock.ticks(follower.request.think_s, ARRIVAL_GRID_TICKS)
        heapq.heappush(self.events, (follower.arrival, PHASE_ARRIVAL, number))

    def expect_delivery(self, transfer: Transfer) -> None:
        self.transfers[transfer.key] = transfer
        heapq.heappush(self.events, (transfer.due, PHASE_DELIVERY, transfer.key))

    def expect_stage(self, time: float, number: int) -> None:
        heapq.heappush(self.events, (time, PHASE_DELIVERY, number))

    def expect_look(self) -> None:
        if any(instance.outstanding for instance in self.instances):
            self.look_at = self.now + self.clock.ticks(self.live.rules.polling_s)
            heapq.heappush(self.events, (self.look_at, PHASE_CONTROL, 1))

    def check_migration(self) -> None:
        for instance in self.instances:
            check_instance(instance, instance.flags)
        assert sum(i.outstanding for i in self.instances) == self.num_there

    @property
    def num_there(self) -> int:
        """Who is to be at an instance: has been sent to one, has not ended, and is not on its way to another."""
        if not self.outages:
            return self.num_routed - self.num_finished
        return sum(job.instance is not None and job.ended is None and not job.is_on_its_way for job in self.jobs)

    def check_outages(self) -> None:
        """Who is lost is lost once, and nobody else is; nobody is where an instance is down, but for who waits for it
        because all that decode are."""
        assert sum(i.outstanding for i in self.instances) == self.num_there, "a request was lost, or is twice"
        for index in self.outages.down:
            one = self.instances[index]
            there = one.waiting + one.running + one.ready + one.in_transfer + one.leaving + one.stopped
            assert not there and not one.flights, "somebody is where nobody can be"
            assert one.free_blocks == one.flags.num_blocks, "blocks are taken of an instance that is down"

    @property
    def able(self) -> list[Instance]:
        """Who computes prompts, and is up and on."""
        able = self.prefilling
        if self.outages:
            able = [instance for instance in able if instance.index not in self.outages.down]
        if self.fleet:
            able = [self.instances[i] for i in self.fleet.able(self.now)]
        return able

    def choose(self, job: Job) -> Instance:
        """Who computes the prompt."""
        able = self.able
        num_routed = self.num_routed
        if self.variants is not None:
            able = [i for i in able if i.index % self.variants == job.request.variant]
            num_routed = self.routed_of_variant.get(job.request.variant, 0)
            self.routed_of_variant[job.request.variant] = num_routed + 1
        instance = able[self.route(job.request, able, num_routed)]
        job.instance, job.sequence = instance.index, self.num_routed
        self.num_routed += 1
        return instance

    def enter(self, instance: Instance, job: Job) -> None:
        is_first = not any(instance.outstanding for instance in self.instances)
        enqueue(instance, job, instance.flags, at_front=False)
        if self.live and is_first:
            self.expect_look()
        self.ask_for_pass(instance)

    def deliver(self, transfer: Transfer) -> None:
        transfer.delivered = None if transfer.is_cut else self.now
        if self.instances[transfer.source].role == "encode":
            self.encoders.deliver(transfer, self.instances[transfer.destination], self.now)
            return
        if transfer.is_cut:
            return
        self.hand_over.deliver(transfer, self.now)
        for index in (transfer.source, transfer.destination):
            self.ask_for_pass(self.instances[index])

    def send(self, number: int) -> Job:
        """The first sending of a request, or the next one, and how long its client waits for it."""
        job = self.jobs[number]
        if job.is_on_its_way:
            return job
        if job.ended is not None:
            self.earlier_jobs.append(job)
            job = self.jobs[number] = Job(job.request, self.now, sending=job.sending + 1)
        for is_first_token, wait_s in ((False, job.request.deadline_s), (True, job.request.first_token_deadline_s)):
            if math.isfinite(wait_s):
                until = self.now + self.clock.ticks(wait_s, ARRIVAL_GRID_TICKS)
                heapq.heappush(self.events, (until, PHASE_TIMEOUT, (number, job.sending, is_first_token)))
        return job

    def change_outage(self, change: int, index: int) -> None:
        if change == BACK:
            self.outages.down.remove(index)
            if self.hand_over:
                self.hand_over.accept(self.instances[index], self.now)
            return
        if self.live:
            self.live.is_over = self.num_over == len(self.jobs)
        if self.fleet:
            self.fleet.down_when[next(name for name in ("starting", "on", "draining", "off")
                                      if index in self.fleet.those(name, self.now))] += 1
        if self.instances[index].flights:
            last = max(i for i, record in enumerate(self.iterations) if record.instance == index)
            done_s = self.clock.seconds(self.now) - self.iterations[last].start_s
            self.iterations[last] = replace(self.iterations[last], duration_s=done_s)
        sent_on, failed = self.outages.go_down(index, self.now)
        for job in sent_on:
            heapq.heappush(self.events, (self.now, PHASE_ARRIVAL, self.jobs.index(job)))
        for job in failed:
            self.fail(self.jobs.index(job), "failed")

    def refuse(self, job: Job, is_lost: bool) -> None:
        job.instance = None
        self.fail(self.jobs.index(job), "failed" if is_lost else "rejected")

    def time_out(self, number: int, sending: int, is_first_token: bool) -> None:
        job = self.jobs[number]
        if job.sending != sending or job.ended is not None or (is_first_token and job.first_token is not None):
            return
        instance = self.instances[job.instance]
        job.is_given_up = True
        if job in instance.waiting:
            instance.waiting.remove(job)
            if instance.waiting_at_start is not None:
                instance.waiting_at_start.discard(job.request.id)  # what comes again is not known yet
        elif not any(job is flying for flight in instance.flights for flying, _ in flight):
            release(instance, job)
            instance.running.remove(job)
        self.fail(number, "timed_out")

    def fail(self, number: int, status: str) -> None:
        """A sending ended without an answer."""
        job = self.jobs[number]
        job.status, job.ended, job.is_given_up = status, self.now, True
        if job.sending <= len(self.clients.backoff_s):
            wait = self.clock.ticks(self.clients.backoff_s[job.sending - 1], ARRIVAL_GRID_TICKS)
            heapq.heappush(self.events, (self.now + wait, PHASE_ARRIVAL, number))
        else:
            self.num_over += 1

    def arrive(self, job: Job) -> None:
        limits = self.clients
        is_lost, job.is_on_its_way = job.is_on_its_way, False
        if limits is not None and sum(i.outstanding for i in self.instances) >= limits.max_outstanding:
            self.refuse(job, is_lost)
            return
        if self.outages and not self.able:
            self.outages.refused_all_down += 1
            self.refuse(job, is_lost)
            return
        if self.encoders is not None and job.request.tiles:
            self.encoders.arrive(job)
            return
        instance = self.choose(job)
        if limits is not None and len(instance.waiting) >= limits.max_waiting:
            self.refuse(job, is_lost)
            return
        if self.live and job.request.id in self.live.moved:
            self.live.moved[job.request.id].instance = None
        if is_lost:
            self.outages.restarts[job.request.id] += 1
        if instance.swap is not None:
            instance.swap.at_arrival[job.request.id] = instance.swap.stood
        self.enter(instance, job)

    def end_iteration(self, instance: Instance) -> None:
        flags = instance.flags
        self.iteration_ends[instance.index].append(self.now)
        if self.outages:
            self.outages.whole_ends.setdefault(instance.index, set()).add(self.clock.seconds(self.now))
        if isinstance(instance.store, remote_store.TieredStore):
            instance.store.iteration_ended()
        entries = instance.flights.pop(0)
        if instance.on_first_stage is entries:
            instance.on_first_stage = []
        if instance.swap is not None:
            entries = sorted(entries, key=lambda entry: entry[0].sequence)  # who came first leaves first
        for job, tokens in entries:
            job.computed += tokens
            job.pending -= tokens
            assert job.computed <= job.known
            if job.is_given_up:
                self.num_unheard += job.computed == job.known
                release(instance, job)
                instance.running.remove(job)
                continue
            if job.computed < job.known:
                continue
            job.emitted += 1
            if instance.counters is not None:
                instance.counters.produce(job)
            job.is_prefilled = True
            job.is_newcomer = False
            if job.first_token is None:
                job.first_token = self.now
                if self.encoders is not None:
                    self.encoders.release(instance, job)
            if job.emitted == job.request.output:
                job.finish = job.ended = self.now
                job.status = "finished"
                if instance.swap is not None:
                    answer_is_out(instance, job, self.now, self.clock.ticks)
                    gone = instance.swap.stood - instance.swap.at_arrival[job.request.id]
                    instance.swap.waited[job.request.id] = instance.swap.waited.get(job.request.id, 0) + gone
                self.num_finished += 1
                self.num_over += 1
                for number in self.followers.get(job.request.id, ()):
                    self.expect_follower(number)
                release(instance, job)
                instance.running.remove(job)
                if self.live:
                    self.live.finished(job)
            elif self.live and self.live.is_stopping(job):
                self.live.stop(job, self.now)
            elif instance.role == "prefill":
                self.hand_over.leave(instance, job, self.now)
            elif flags.decode_context_limit is not None:
                instance.running.remove(job)  # to the back of the queue of decodes
                instance.running.append(job)
        check_between_iterations(instance, flags)
        if not instance.has_work:
            instance.waiting_at_start = None  # idle: whoever comes next is seen at once
            if flags.resets_ratio_when_idle:
                instance.new_token_ratio = flags.new_token_ratio_init
        if instance.role == "decode":
            self.hand_over.accept(instance, self.now)
        elif self.encoders is not None:
            self.encoders.accept(instance, self.now)

    def start_iterations(self, leader: Instance) -> None:
        """What one scheduling event starts: a batch on every rank, or as many as the pipeline takes."""
        leader.is_pass_due = False
        if leader.swap is not None and leader.flights:
            return  # a copy is through, but somebody came first
        if leader.flags.pass_when_stage_free:
            leader.on_first_stage = []
            if leader.has_work and self.start_iteration(leader) is not None:
                leader.is_pass_due = True  # once the stage is free, and not before
                heapq.heappush(self.events, (leader.stage_free[1], PHASE_PASS, leader.index))
        elif leader.flags.stages > 1:
            while len(leader.flights) < leader.flags.stages and leader.has_work:
                if self.start_iteration(leader) is None:
                    break
        else:
            ends = [self.start_iteration(i) for i in self.together(leader) if i.has_work]
            ends = [end for end in ends if end is not None]
            if ends:
                heapq.heappush(self.events, (max(ends), PHASE_ITERATION_END, leader.index))
                if self.outages:
                    self.outages.ends[leader.index] = max(ends)

    def start_iteration(self, instance: Instance) -> float | None:
        """Returns its end, None if nothing can be scheduled until a batch or blocks return."""
        flags = instance.flags
        visible = instance.waiting_at_start if flags.async_scheduling else None
        if isinstance(instance.store, Borrower):
            instance.store.now = self.now
        if instance.swap is None:
            plan = scheduling_pass(instance, flags, visible)
        else:
            instance.swap.now, instance.swap.iterations = self.now, len(self.iteration_ends[instance.index])
            plan = swapping_pass(instance, self.clock.ticks)
            instance.swap.peak = max(instance.swap.peak, flags.num_blocks - instance.free_blocks)
        check_batch(instance, plan, flags)
        check_instance(instance, flags)
        instance.preempted_before += [job.request.id for job in plan.preempted]
        if self.outages:
            self.outages.preempted += [(self.clock.seconds(self.now), job.request.id) for job in plan.preempted]
        if not plan.entries and instance.flights:
            return None
        if not plan.entries:
            has_called = instance.swap is not None and instance.swap.has_called
            if plan.preempted or visible is not None or has_called:
                # Nothing runs and something waits: the engine's loop comes round at once, seeing everybody.
                instance.waiting_at_start = None
                return self.start_iteration(instance)
            if instance.swap is not None and instance.swap.next_due() is not None:
                heapq.heappush(self.events, (instance.swap.next_due(), PHASE_PASS, instance.index))
                return None
            is_more_to_come = instance.stopped or instance.inbound_blocks
            assert instance.leaving or instance.in_transfer or is_more_to_come, "an idle instance with work is stuck"
            return None
        tiles = 0
        for job, _ in plan.entries:
            if job.scheduled is None:
                job.scheduled = self.now
                tiles += sum(job.request.tiles)
                if self.encoders is not None:
                    self.encoders.taken(instance, job)
        stats = batch_stats(plan.entries)
        encoding_s = 0.0
        if self.encoder is not None and tiles:
            base_s, tile_s = self.encoder[instance.index]
            encoding_s = base_s + tile_s * tiles
        told, merge_s = long_seconds(plan.entries, stats, flags)
        end = self._end_of(instance, told, encoding_s, merge_s)
        for job, tokens in plan.entries:
            job.pending += tokens
            job.iteration = end - self.now
        self.iterations.append(
            IterationRecord(
                instance=instance.index,
                start_s=self.clock.seconds(self.now),
                duration_s=self.clock.seconds(end - self.now),
                batch={job.request.id: tokens for job, tokens in plan.entries},
                free_blocks=instance.free_blocks,
                preempted=tuple(instance.preempted_before),
                stats=stats,
            )
        )
        instance.preempted_before = []
        instance.waiting_at_start = {job.request.id for job in instance.waiting + instance.ready}
        instance.flights.append(plan.entries)
        instance.on_first_stage = plan.entries
        if flags.stages > 1:
            heapq.heappush(self.events, (end, PHASE_ITERATION_END, instance.index))
        return end

    def _alone_s(self, instance: Instance, entries: list) -> float:
        """Of a batch that goes through the engine and the stages by itself."""
        cost = self.costs[instance.index]
        told, merge_s = long_seconds(entries, batch_stats(entries), instance.flags)
        return cost(told) + merge_s

    def _end_of(self, instance: Instance, stats: BatchStatsRef, encoding_s: float = 0.0, merge_s: float = 0.0
                ) -> float:
        """The batch goes through the engine and the stages, each of which is first done with what it has."""
        flags = instance.flags
        if flags.stages == 1:
            seconds = [self.costs[instance.index](stats) + encoding_s + merge_s]
        else:
            core_s, *parts = self.stage_costs[instance.index](stats)
            seconds = [core_s, *(part + merge_s / flags.stages for part in parts)]
        assert all(math.isfinite(x) and x >= 0 for x in seconds)
        if instance.store is not None:
            (alone,) = seconds
            def prompt_s(start: int, end: int) -> float:
                return self.costs[instance.index](BatchStatsRef(0, 0, 1, end - start, end**2 - start**2, end, 1))

            return self.now + instance.store.lengthened(self.clock.ticks(alone), self.clock.ticks, prompt_s)
        swapped_s = instance.swapped_tokens * flags.kv_bytes_per_token / flags.swap_bandwidth
        instance.swapped_tokens = 0
        end = self.now + self.clock.ticks(swapped_s)
        if instance.swap is not None:
            end += instance.swap.delay
            instance.swap.stood, instance.swap.delay = instance.swap.stood + instance.swap.delay, 0
        for stage, part in enumerate(seconds):
            start = max(end, instance.stage_free[stage])
            if flags.pass_when_stage_free and stats.num_decode and stage:
                instance.merges_left_out += end < instance.stage_start[stage]
                instance.stage_start[stage] = start
            end = start + self.clock.ticks(part)
            instance.stage_free[stage] = end
        return end

    def check_end(self) -> None:
        """Everybody was served once, in full, and all blocks are free."""
        for instance in self.instances:
            assert not instance.has_work and not instance.outstanding and not instance.flights and not instance.leaving
            copies = 0 if instance.swap is None else instance.swap.leaving_blocks
            assert instance.free_blocks + copies == instance.flags.num_blocks
        everybody = self.jobs + self.earlier_jobs
        for job in everybody:
            assert job.ended is not None and job.blocks == 0
            if job.status != "finished":
                assert self.clients is not None and job.emitted < job.request.output and job.finish is None
                continue
            assert job.finish is not None and job.emitted == job.request.output
            assert job.computed == job.request.prompt + job.request.output - 1
            assert job.arrival <= job.scheduled <= job.first_token <= job.finish
            is_handed_over = job.request.output > 1 and (self.controller is not None
                                                          or self.instances[job.instance].role == "prefill")
            if self.outages:
                assert (job.delivered is None) == (job.decode_instance is None)
                # Who came last to one that computes prompts with one token to go was done there.
                assert is_handed_over or job.delivered is None
            else:
                assert (job.delivered is not None) == is_handed_over
            if is_handed_over and job.delivered is not None:
                assert job.first_token <= job.left <= job.accepted <= job.delivered <= job.finish
        emitted = self.num_unheard + sum(job.emitted for job in everybody)
        if self.outages:
            emitted += self.outages.num_unheard
        assert sum(record.stats.num_sampled for record in self.iterations) == emitted
        processed = sum(sum(record.batch.values()) for record in self.iterations)
        assert processed == sum(job.computed + job.lost_tokens - job.hit_tokens for job in everybody)
        preempted = sum(len(record.preempted) for record in self.iterations)
        if self.outages:
            # By a pass that started nothing, of an instance that started nothing more.
            preempted += sum(len(instance.preempted_before) for instance in self.instances)
        assert preempted == sum(job.preemptions for job in everybody)
        if self.hand_over is not None:
            moved = [transfer.job for transfer in self.hand_over.transfers if isinstance(transfer.job, Job)]
            if self.outages:
                self.check_hand_overs(everybody)
            else:
                assert len(set(map(id, moved))) == len(moved) == sum(job.delivered is not None for job in self.jobs)
            check_links(self.hand_over.transfers, self.rules.links, self.rules.discipline)

        if self.encoders is not None:
            self.encoders.check_end()

    def check_hand_overs(self, everybody: list[Job]) -> None:
        """Since it was last lost the KV of a request went over once at most, whole, and that is what decoded it."""
        transfers = self.hand_over.transfers
        assert sum(one.is_cut for one in transfers) == sum(what == "in transfer" for what, _ in self.hand_over.lost)
        by_job: dict[int, list[Transfer]] = {}
        for one in transfers:
            by_job.setdefault(id(one.job), []).append(one)
        for job in everybody:
            mine = by_job.pop(id(job), [])
            since = [one for one in mine if one.number >= job.transfers_before]
            assert len(since) <= 1 and not any(one.is_cut for one in since)
            assert bool(since) == (job.delivered is not None)
            if since:
                assert since == mine[-1:] and since[0].delivered == job.delivered
                assert since[0].source == job.instance and since[0].destination == job.decode_instance
            # The others were lost, on their way or behind it.
            assert len(mine) - len(since) <= self.outages.losses_of[id(job)]
        assert not by_job, "KV of nobody"

    def result(self) -> ReferenceResult:
        seconds = self.clock.seconds

        def if_any(ticks: float | None) -> float | None:
            return None if ticks is None else seconds(ticks)

        def or_nan(ticks: float | None) -> float:
            return math.nan if ticks is None else seconds(ticks)

        first_of = {job.request.id: job.arrival for job in self.earlier_jobs if job.sending == 1}
        arrivals = [first_of.get(job.request.id, job.arrival) for job in self.jobs]
        times = self.iteration_ends
        transfers = [] if self.hand_over is None else self.hand_over.transfers
        if self.hand_over is not None:
            times = [*times, [transfer.due for transfer in transfers]]
        margins = arrival_margins(arrivals, times, seconds)
        if self.hand_over is not None:
            margins += neighbour_margins(times, seconds)
        return ReferenceResult(
            requests=[
                RequestResult(
                    id=job.request.id,
                    instance=job.instance,
                    arrival_s=seconds(arrival),
                    scheduled_s=or_nan(job.scheduled),
                    first_token_s=or_nan(job.first_token),
                    finish_s=or_nan(job.finish),
                    preemptions=job.preemptions,
                    status=job.status,
                    ended_s=or_nan(job.ended),
                    sendings=job.sending,
                    last_sent_s=seconds(job.arrival),
                    cached_tokens=job.cached_tokens or 0,
                    loaded_tokens=job.loaded_tokens or 0,
                    fetched_tokens=job.fetched_tokens or 0,
                    loaded_from=job.loaded_from,
                    hit_tokens=job.hit_tokens,
                    decode_instance=job.decode_instance,
                    accepted_s=if_any(job.accepted),
                    left_s=if_any(job.left),
                    delivered_s=if_any(job.delivered),
                    swaps=self._swaps(job, "swaps"),
                    swap_s=seconds(self._swaps(job, "waited")),
                    losses=0 if not self.outages else sum(
                        loss.request == job.request.id for loss in self.outages.losses),
                    restarts=0 if not self.outages else self.outages.restarts[job.request.id],
                )
                for job, arrival in zip(self.jobs, arrivals, strict=True)
            ],
            iterations=self.iterations,
            parts=[] if self.encoders is None else [
                PartRecord(name, part.owner, part.tiles, *map(seconds, (part.started, part.encoded, part.accepted,
                                                                        part.delivered)))
                for name, parts in self.encoders.parts.items() for part in parts],
            encode_iterations={} if self.encoders is None else {
                i: (one.num_iterations, seconds(one.busy)) for i, one in self.encoders.instances.items()},
            encode_waits=0 if self.encoders is None else self.encoders.waits,
            margins=margins,
            transfers=[
                TransferRecord(transfer.job.request.id, transfer.source, transfer.destination, transfer.num_bytes,
                               seconds(transfer.accepted), seconds(transfer.start), seconds(transfer.due))
                for transfer in transfers
            ],
            live=self.live,
            outages=self.outages or None,
            hand_over=self.hand_over,
            switches=[] if self.controller is None else self.controller.switches,
            dealt_again=0 if self.controller is None else self.controller.num_dealt,
            lifts=sum(i.counters.lifts for i in self.instances if i.counters is not None),
            lifts_of_empty=sum(i.counters.lifts_of_empty for i in self.instances if i.counters is not None),
            turns=sum(i.counters.turns for i in self.instances if i.counters is not None),
            merges_left_out=sum(instance.merges_left_out for instance in self.instances),
            swapping=[instance.swap for instance in self.instances if instance.swap is not None],
            stores=[instance.store for instance in self.instances if instance.store is not None],
            shared_store=self.shared_store,
        )

    def _swaps(self, job: Job, name: str) -> float:
        # Who was refused has been nowhere.
        swap = None if job.instance is None else self.instances[job.instance].swap
        return 0 if swap is None else getattr(swap, name).get(job.request.id, 0)
