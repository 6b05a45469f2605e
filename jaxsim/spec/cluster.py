"""The sections of a cluster: its pools, and what moves between them."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from jaxsim.spec.costs import FittedCost
from jaxsim.spec.engine import Text
from jaxsim.spec.values import NotNegative, Positive, Section, Tokens


class PoolSection(Section, frozen=True):
    """Some of the engines of a cluster, all alike.

        role: mixed, prefill (prompts, up to the first token), decode (all tokens after it) or encode (images only;
            engine.max_num_seqs is then how many parts of requests it encodes at once).
        name: what cluster.links call it.
        replicas: how many.
        device: a name of `jaxsim list devices`, if they run on another than [device].
        engine: fields of [engine] that are other here.
        cost: fitted coefficients of these, instead of [cost].
    """

    role: Literal["mixed", "prefill", "decode", "encode"] = "mixed"
    name: Text | None = None
    replicas: Annotated[int, Meta(ge=1, le=4096)] = 1
    device: Text | None = None
    engine: dict[str, Any] = {}
    cost: FittedCost | None = None


class TransferSection(Section, frozen=True):
    """How the KV cache of a prompt gets from a prefill to a decode engine.

        hand_over: pull (a decode engine takes no more while what it has taken and does not run yet holds
            waiting_block_share of its blocks) or push (as soon as its free blocks suffice).
        waiting_block_share: for pull; 0.05, DistServe's, if left out.
        gb_per_s: of a link, out of a prefill and into a decode engine; that of the devices between them if left out,
            times the ranks of the narrower engine.
        latency_us: of a transfer; none if left out.
        discipline: of a link, fifo (one transfer after the other, each for its latency too), fair (all at once: a
            transfer goes at an equal part of the busier of its two links, and its latency is shared by nobody) or
            max_min (as fair, and what a transfer leaves of a link goes to others: max-min fairness).
        most_at_once: transfers under way in the whole cluster, for fair and max_min: a run with more is given up; 64 if
            left out. A step takes longer with its square.
        by_layer: layers are sent as they are computed, so that what is left when the prompt is done is what took longer
            than its last iteration, at least one layer; else all of it then.
        router: of decode engines, as cluster.router; least_outstanding if left out.
        router_weights: numbers of that router, where it has any.
    """

    hand_over: Literal["pull", "push"] = "pull"
    waiting_block_share: Annotated[float, Meta(gt=0, le=1)] | None = None
    gb_per_s: Positive | None = None
    latency_us: NotNegative = 0.0
    discipline: Literal["fifo", "fair", "max_min"] = "fifo"
    most_at_once: Annotated[int, Meta(ge=1, le=1024)] | None = None
    by_layer: bool = False
    router: Text = "least_outstanding"
    router_weights: dict[str, float] = {}


class LinkSection(Section, frozen=True, rename={"source": "from", "target": "to"}):
    """How fast what goes from the engines of a pool to those of another moves, instead of cluster.transfer.

        from: a pool's name, or a role: all pools of that role.
        to: likewise.
        gb_per_s: from one engine to another.
        latency_us: of a transfer; that of cluster.transfer if left out.
        shared: all of these engines share one link of gb_per_s. Otherwise every two of them have one of their own, and
            only the way out of an engine and the way into one are shared.
    """

    source: Text
    target: Text
    gb_per_s: Positive
    latency_us: NotNegative | None = None
    shared: bool = False


class MigrationSection(Section, frozen=True):
    """Running requests move from full engines to free ones while they decode (Llumnix).

        metric: how free an engine is, in KV blocks a request: remaining_steps (of Llumnix's public code) or freeness
            (of its paper).
        choice: who goes: the shortest running request, or the last_come.
        polling_s: between two looks at all engines.
        out_below: engines less free than this send requests, and so do those where a preempted one waits.
        in_above: engines freer than this take them; out_below if left out.
        max_stages: stages of copying after which a migration is given up.
        last_stage_blocks: no more than these are copied while the request stands still.
        gb_per_s: of the link out of or into an engine; that of the device between two of them if left out, times its
            ranks.
        latency_us: of a stage.
    """

    metric: Literal["remaining_steps", "freeness"] = "remaining_steps"
    choice: Literal["shortest", "last_come"] = "shortest"
    polling_s: Annotated[float, Meta(ge=0.001, le=3600)] = 0.05
    out_below: float = 3.0
    in_above: float | None = None
    max_stages: Annotated[int, Meta(ge=1, le=1000)] = 3
    last_stage_blocks: Annotated[int, Meta(ge=1, le=1 << 20)] = 16
    gb_per_s: Positive | None = None
    latency_us: NotNegative = 0.0


class ScalingSection(Section, frozen=True):
    """Engines are switched on and off, one at a time, to keep the mean freeness of those that are on in a band.

    Freeness is the remaining_steps of all that are on taken together, in KV blocks a request. cluster.replicas is the
    most that are on.

        min_replicas: the fewest, which are on at the beginning.
        check_s: between two looks.
        out_below: one more is started below this.
        in_above: one is drained above this.
        startup_s: from the start of an engine to when it takes requests.
    """

    min_replicas: Annotated[int, Meta(ge=1, le=4096)] = 1
    check_s: Annotated[float, Meta(ge=0.001, le=3600)] = 10.0
    out_below: float = 10.0
    in_above: float = 60.0
    startup_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0


class AdmissionSection(Section, frozen=True):
    """What the cluster refuses, with an answer at once (HTTP 429).

        max_waiting: an engine refuses who is routed to it while so many wait there.
        max_outstanding: the cluster refuses whoever comes while so many wait or run in all of it.
    """

    max_waiting: Annotated[int, Meta(ge=0, le=1 << 30)] | None = None
    max_outstanding: Annotated[int, Meta(ge=1, le=1 << 30)] | None = None


class OutageSection(Section, frozen=True):
    """One engine is down for a while.

        instance: which, from 0; with pools those of the first, then of the next.
        at_s: from when, in seconds from the start of the run.
        down_s: for how long.
    """

    instance: Annotated[int, Meta(ge=0, le=4095)]
    at_s: Annotated[float, Meta(ge=0, le=1e9)]
    down_s: Annotated[float, Meta(ge=1e-6, le=1e9)]


class FailuresSection(Section, frozen=True):
    """Engines that go down, with everything that runs and waits there, and come back empty.

        on_failure: what becomes of the requests there: reroute (the router sends them to other engines at once, which
            compute the prompt and the tokens emitted so far and go on) or fail (their clients may send them again).
        max_restarts: with reroute, how often a request is sent on before it fails; as often as need be if left out.
        outages: given ones.
        mtbf_s: of every engine, mean time to the next outage from the start of the run or from the end of the last
            outage, drawn from an exponential law.
        mttr_s: mean duration of these outages, drawn from an exponential law.
        until_s: outages that would begin from here on are not drawn.
    """

    on_failure: Literal["reroute", "fail"] = "reroute"
    max_restarts: Annotated[int, Meta(ge=1, le=1 << 30)] | None = None
    outages: tuple[OutageSection, ...] = ()
    mtbf_s: Annotated[float, Meta(ge=1e-3, le=1e9)] | None = None
    mttr_s: Annotated[float, Meta(ge=1e-3, le=1e9)] | None = None
    until_s: Annotated[float, Meta(ge=1e-3, le=1e9)] | None = None


class EncodeSection(Section, frozen=True):
    """The encoding of images: base_ms + tile_ms x tiles for a batch of them.

        base_ms: of a batch.
        tile_ms: of a tile in it.
        cache_tiles: of the multimodal cache of an encode engine, and of one that takes embeddings.
        waiting_tile_share: an engine accepts no more requests while embeddings of those that it has accepted and not
            begun hold this share of its cache.
        split_images: the images of a request are dealt to several encode engines; otherwise one encodes all.
        router: which encode engine gets them, as cluster.router.
        embedding_width: numbers of two bytes of the embedding of a token; the model's hidden size if left out.
    """

    base_ms: NotNegative
    tile_ms: NotNegative
    cache_tiles: Annotated[int, Meta(ge=1, le=1 << 20)] = 3000
    waiting_tile_share: Annotated[float, Meta(gt=0, le=1)] = 0.05
    split_images: bool = True
    router: Text = "round_robin"
    embedding_width: Tokens | None = None


class RoleSwitchingSection(Section, frozen=True):
    """Engines change between the roles of the pools: now and then one goes to the stage with the longest queue (EPD).

    pools[k].replicas are those of the beginning; an engine has the limits, the KV pool and the costs of its role.

        sample_s: between two samples of the queues of the stages.
        decide_s: between two decisions, each of which looks at the mean of the samples since the one before and moves
            one engine at most, to the stage with the longest queue.
        poll_s: between two polls of an engine, which learns then that it is to move, and takes nobody from then on.
        drain_check_s: between two looks at whether it is empty.
        switch_s: from there to when it has its new role, for loading other weights. Published for no engine.
        deal_anew: parts of images that wait are dealt out again when one more engine encodes; otherwise they stay where
            they are, and it gets new ones only.
    """

    sample_s: Annotated[float, Meta(ge=0.001, le=3600)] = 1.0
    decide_s: Annotated[float, Meta(ge=0.001, le=3600)] = 5.0
    poll_s: Annotated[float, Meta(ge=0.001, le=3600)] = 2.0
    drain_check_s: Annotated[float, Meta(ge=0.001, le=3600)] = 1.0
    switch_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    deal_anew: bool = False


class RemoteStoreSection(Section, frozen=True):
    """A store of KV blocks that all engines share, behind their prefix caches and behind engine.offload if that is
    given: every full block of a prompt is put there as it is computed, and loaded by whoever lacks it. Needs
    engine.enable_prefix_caching.

        gb_per_s: of the link of an engine to the store, all its devices together, toward them.
        latency_us: until the store has answered, once for all that an iteration loads from it.
        egress_gb_per_s: that the store gives out in all, to one engine after the other; no limit if left out.
        space_gb: of the store, 10^9 bytes; it holds everything if left out. The longest untouched blocks go first.
        load: "serial" (before the layers of the iteration that first schedules a request) or "by_layer" (beside the
            layers before), from host memory too; as engine.offload.load if left out, "serial" without that.
    """

    gb_per_s: Positive
    latency_us: NotNegative = 0.0
    egress_gb_per_s: Positive | None = None
    space_gb: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    load: Literal["serial", "by_layer"] | None = None


class ClusterSection(Section, frozen=True):
    """How many engines, and who chooses among them.

        replicas: independent engines, each with its own queue and KV pool.
        router: a name of `jaxsim list policies`, or the dotted path of a router class; round_robin if left out, or with
            data-parallel ranks vLLM's own balancer among all of them.
        router_weights: numbers of the router, where it has any.
        pools: engines that differ, in role, device or settings, instead of replicas.
        variants: fine-tunes of one base: instance i serves variant i modulo so many, and a request goes to instances of
            its own. Of sessions the turns go through them in order, other requests are of any, equally likely. With
            engine.context_reuse they take contexts from each other. All replicas serve the same model if left out.
        migration: of running requests between replicas.
        scaling: replicas are switched on and off.
        headroom_blocks: KV blocks that freeness keeps for requests of a priority below 0 on an engine where one runs.
        admission: what is refused; nothing if left out.
        failures: when engines are down; never if left out.
        transfer: of KV between pools, with prefill and decode engines, and of embeddings, with encode engines.
        links: between two pools each, where these differ from that.
        encode: how images are encoded: by the pools of role encode, otherwise by all that compute prompts.
        role_switching: engines change between the roles of the pools; they keep theirs if left out.
        remote_store: of KV blocks, that all engines share; none if left out.
        num_devices: that there are; engines that need more are refused.
    """

    replicas: Annotated[int, Meta(ge=1, le=4096)] = 1
    router: Text | None = None
    router_weights: dict[str, float] = {}
    pools: tuple[PoolSection, ...] = ()
    variants: Annotated[int, Meta(ge=1, le=4096)] | None = None
    transfer: TransferSection | None = None
    links: tuple[LinkSection, ...] = ()
    migration: MigrationSection | None = None
    scaling: ScalingSection | None = None
    headroom_blocks: Annotated[int, Meta(ge=1, le=1 << 27)] | None = None
    admission: AdmissionSection | None = None
    failures: FailuresSection | None = None
    encode: EncodeSection | None = None
    role_switching: RoleSwitchingSection | None = None
    remote_store: RemoteStoreSection | None = None
    num_devices: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None

    @property
    def has_roles(self) -> bool:
        """Prompts and outputs are computed by different engines."""
        return any(pool.role != "mixed" for pool in self.pools)
