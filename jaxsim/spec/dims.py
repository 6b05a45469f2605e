"""Every static capacity of a compiled program."""

from dataclasses import dataclass

from jaxsim.kernels import packed

MAX_JUMP = 1 << 12
"""Iterations that `clock.multiply` can count."""


@dataclass(frozen=True)
class Dims:
    """Sizes that are structure: another value is another program.

    num_requests: padded requests of a scenario; num_executors: replicas; num_slots: sequences a rank can hold;
    block_size: KV tokens a block, a power of two; max_jump: iterations one step may cover; num_records: iterations
    kept on the tape (0: no tape); num_ranks: of an executor; num_batches: of a rank; num_stages: of a pipeline, with as
    many batches in flight; num_segments: of shared prompts, 0 without prefix caching; path_width: segments of a prompt;
    log_size: releases on record, a power of two; has_roles: prompts and outputs may be computed on different executors;
    has_migration: running requests may move between executors; has_demands: routers read the blocks that waiting
    requests need; has_scaling: executors are switched on and off; has_urgent: freeness keeps room for urgent requests;
    has_clients: requests may end without an answer, and be sent again; num_more_logs: rows for first tokens beyond one
    a request; has_parts: images are encoded on executors of their own; has_encoder: some that compute prompts encode
    them too;
    tracks_prefill, tracks_sent, has_noise: what routers read (`jaxsim.engine.caches`): prompt tokens on their way to a
    first token, what was sent where, random numbers of each request and instance; route_by: what a request's home
    among the instances is a hash of, "prefix" or "session" ("": it has none).
    num_outages: rows for instances that go down or come back, 0 where none does.
    swap_window: requests in line that are looked at together, 0 without swapping to host memory.
    has_role_switching: executors change between roles.
    num_tenants: that an engine shares itself among by virtual token counters, 0 without these.
    slack_window: preempted requests that wait at once under the order of least slack, 0 without that.
    keeps_turns: host memory may keep what the next turn of a session begins with; has_block_groups: what is copied at
    once depends on how free blocks lie.
    has_offload: host memory behind the prefix cache; offload_log: touches of it on record, a power of two, 0 where it
    holds everything; has_reuse: contexts come from siblings instead.
    has_remote: a store that instances share, behind host memory if there is any; has_egress: all loads from it go
    through one; remote_log: touches of it on record, a power of two, 0 where it holds everything.
    num_flights: transfers that may be under way at a time over links that are shared, 0 where each waits for its turn.
    has_variants: instances serve different fine-tunes; has_siblings: contexts come from instances of the run.
    num_links: between pools, that all of their engines share; is_max_min: what a transfer leaves of a shared link goes
    to others.
    has_kv_parallel: the KV of long contexts is cut over groups of devices.
    num_partial: prompts that may be partly computed side by side; line_window: requests that wait at once where these
    are several, else 0.
    reads_chunks: chunks of a batch that are unlike are priced by their own sizes (`BatchStats.prefill_tiled`).
    num_tangents: fields by which latencies have derivatives along the run (`jaxsim.engine.tangents`), 0 without.

    With roles, many stages and one batch are stages that take a new batch whenever the first of them is free
    (`jaxsim.engine.free_stages`).
    """

    num_requests: int
    num_executors: int = 1
    num_slots: int = 128
    block_size: int = 16
    max_jump: int = 2048
    num_records: int = 0
    num_ranks: int = 1
    num_batches: int = 1
    num_stages: int = 1
    num_segments: int = 0
    path_width: int = 0
    log_size: int = 0
    has_roles: bool = False
    has_migration: bool = False
    has_demands: bool = False
    has_scaling: bool = False
    has_urgent: bool = False
    has_clients: bool = False
    num_more_logs: int = 0
    has_parts: bool = False
    has_encoder: bool = False
    tracks_prefill: bool = False
    tracks_sent: bool = False
    has_noise: bool = False
    route_by: str = ""
    swap_window: int = 0
    num_tenants: int = 0
    slack_window: int = 0
    keeps_turns: bool = False
    has_block_groups: bool = False
    num_outages: int = 0
    has_role_switching: bool = False
    has_offload: bool = False
    offload_log: int = 0
    has_reuse: bool = False
    has_remote: bool = False
    has_egress: bool = False
    remote_log: int = 0
    num_flights: int = 0
    has_variants: bool = False
    has_siblings: bool = False
    num_links: int = 0
    is_max_min: bool = False
    has_kv_parallel: bool = False
    num_partial: int = 1
    line_window: int = 0
    reads_chunks: bool = False
    num_tangents: int = 0

    def __post_init__(self):
        if self.block_size & (self.block_size - 1) or self.block_size < 1:
            raise ValueError(f"block_size = {self.block_size}: not a power of two; use 1, 8, 16, 32, 64 or 128")
        if not 1 <= self.max_jump < MAX_JUMP:
            raise ValueError(f"max_jump = {self.max_jump}: not in 1 .. {MAX_JUMP - 1}, what the clock counts exactly")
        if self.num_stages > 1 and (self.num_ranks > 1 or self.num_batches not in self._batches_of_stages):
            raise ValueError(f"num_stages = {self.num_stages}: a pipeline is one rank with as many batches")
        if self.has_roles and (self.num_ranks > 1 or self.num_batches > 1 or self.num_segments):
            raise ValueError("has_roles: executors of one rank and one stage, without prefix caching")
        if self.has_migration and (self.num_ranks > 1 or self.num_batches > 1 or self.num_segments or self.has_roles):
            raise ValueError("has_migration: executors of one rank, one stage and no role, without prefix caching")
        if self.has_migration and not self.has_demands:
            raise ValueError("has_migration: the controller reads what waits, so has_demands too")
        if self.has_scaling and not self.has_migration:
            raise ValueError("has_scaling: by the controller of has_migration")
        if self.has_urgent and not self.has_demands:
            raise ValueError("has_urgent: a part of what has_demands reads")
        if self.has_demands and self.has_clients and not self.has_failures:
            raise ValueError("has_demands: without clients that give up")
        if self.has_migration and ((self.has_clients and not self.has_failures) or self.has_encoder or self.has_swap):
            raise ValueError("has_migration: without clients that give up, images and swapping")
        if self.has_clients and (self.num_ranks > 1 or self.num_batches > 1 or self.num_segments):
            raise ValueError("has_clients: executors of one rank and one stage, without prefix caching")
        if self.has_clients and self.has_roles and (not self.has_failures or self.num_flights or self.has_parts
                                                    or self.has_free_stages):
            raise ValueError("has_clients: with roles only where executors fail, and without links that are shared at a"
                             " time, images and stages")
        if self.has_roles and self.route_by:
            raise ValueError("route_by: homes are of all executors, not of those of a role")
        if self.num_flights and (not self.has_roles or self.has_parts):
            raise ValueError("num_flights: only with has_roles, and without has_parts")
        if self.num_links and not self.has_roles:
            raise ValueError("num_links: only with has_roles")
        if self.is_max_min and not self.num_flights:
            raise ValueError("is_max_min: only with num_flights")
        if self.has_parts and not self.has_roles:
            raise ValueError("has_parts: only with has_roles")
        if self.has_encoder and (self.num_ranks > 1 or self.num_batches > 1 or self.has_parts):
            raise ValueError("has_encoder: executors of one rank and one stage, without others that encode")
        if self.has_swap and (self.num_ranks > 1 or self.num_batches > 1 or self.num_segments or self.has_roles):
            raise ValueError("swap_window: executors of one rank and one stage, without roles and prefix caching")
        if (self.keeps_turns or self.has_block_groups) and not self.has_swap:
            raise ValueError("keeps_turns, has_block_groups: only with swap_window")
        if self.slack_window and (self.num_ranks > 1 or self.num_batches > 1 or self.has_moves or self.has_clients
                                  or self.has_swap or self.num_segments):
            raise ValueError("slack_window: executors of one rank and one stage, without roles, migration, clients that"
                             " give up, swapping and prefix caching")
        if self.num_tenants and (self.num_ranks > 1 or self.num_batches > 1 or self.has_roles):
            raise ValueError("num_tenants: executors of one rank and one stage, without roles")
        if self.num_tenants and (self.has_migration or self.has_clients or self.has_encoder or self.has_swap):
            raise ValueError("num_tenants: without migration, clients that give up, images and swapping")
        if self.has_failures and not self.has_clients:
            raise ValueError("num_outages: what is lost may end without an answer, so has_clients too")
        if self.has_role_switching and not self.has_roles:
            raise ValueError("has_role_switching: only with has_roles")
        if self.has_offload and self.has_reuse:
            raise ValueError("has_offload, has_reuse: one of them")
        if self.has_loads and (not self.num_segments or self.num_ranks > 1 or self.num_batches > 1):
            raise ValueError("has_offload, has_reuse, has_remote: behind a prefix cache, with executors of one rank and"
                             " one stage")
        if self.has_variants and (self.num_ranks > 1 or self.has_moves or self.has_failures):
            raise ValueError("has_variants: executors of one rank that are always there, without roles and migration")
        if self.has_siblings and not (self.has_reuse and self.has_variants):
            raise ValueError("has_siblings: only with has_reuse and has_variants")
        if self.offload_log and not self.has_offload:
            raise ValueError("offload_log: only with has_offload")
        if self.has_kv_parallel and (self.num_ranks > 1 or self.has_moves or self.has_clients or self.has_swap
                                     or self.has_encoder or self.num_segments or self.num_tenants):
            raise ValueError("has_kv_parallel: executors of one rank, without roles, migration, clients that give up,"
                             " swapping, images, prefix caching and virtual token counters")
        if self.num_partial > 1 and (self.num_ranks > 1 or self.has_moves or self.has_clients or self.has_swap
                                     or self.has_encoder or self.num_segments or self.num_tenants
                                     or self.slack_window or not self.line_window):
            raise ValueError("num_partial: executors of one rank with a line_window, without roles, migration, clients"
                             " that give up, swapping, images, prefix caching, virtual token counters and slack_window")
        if self.has_remote and self.has_reuse:
            raise ValueError("has_remote, has_reuse: one of them")
        if (self.has_egress or self.remote_log) and not self.has_remote:
            raise ValueError("has_egress, remote_log: only with has_remote")

    @property
    def has_moves(self) -> bool:
        """A request may go on at another executor than it began on."""
        return self.has_roles or self.has_migration

    @property
    def has_failures(self) -> bool:
        """Instances go down, and come back."""
        return self.num_outages > 0

    @property
    def has_swap(self) -> bool:
        """Who is preempted moves to host memory."""
        return self.swap_window > 0

    @property
    def has_loads(self) -> bool:
        """Blocks that the prefix cache lacks may be loaded."""
        return self.has_offload or self.has_reuse or self.has_remote

    @property
    def has_free_stages(self) -> bool:
        """Batches are formed whenever the first stage is free, however many are in flight."""
        return self.num_stages > 1 and self.num_batches == 1

    @property
    def _batches_of_stages(self) -> tuple[int, ...]:
        return (1, self.num_stages) if self.has_roles else (self.num_stages,)

    @property
    def all_ranks(self) -> int:
        """Ranks of all executors."""
        return self.num_executors * self.num_ranks

    @property
    def all_batches(self) -> int:
        """Batches of all ranks."""
        return self.all_ranks * self.num_batches

    @property
    def last_log(self) -> int:
        """The scratch row of the log of first tokens."""
        return self.num_requests + self.num_more_logs

    @property
    def slot_width(self) -> int:
        """Slots stored an instance: a scratch slot more, padded to a multiple of 16."""
        return -(-(self.num_slots + 1) // 16) * 16

    @property
    def null_slot(self) -> int:
        """The scratch slot: target of masked writes, and the end of lists."""
        return self.num_slots

    @property
    def slot_bits(self) -> int:
        """Low bits of a completion key that hold the slot."""
        return packed.index_bits(self.slot_width)

    @property
    def block_bits(self) -> int:
        """log2 of the block size."""
        return self.block_size.bit_length() - 1
