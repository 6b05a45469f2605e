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
    num_tenants: that an engine shares itself among by virtual token counters, 0 without these.
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
    num_tenants: int = 0

    def __post_init__(self):
        if self.block_size & (self.block_size - 1) or self.block_size < 1:
            raise ValueError(f"block_size = {self.block_size}: not a power of two; use 1, 8, 16, 32, 64 or 128")
        if not 1 <= self.max_jump < MAX_JUMP:
            raise ValueError(f"max_jump = {self.max_jump}: not in 1 .. {MAX_JUMP - 1}, what the clock counts exactly")
        if self.num_stages > 1 and (self.num_ranks > 1 or self.num_batches != self.num_stages):
            raise ValueError(f"num_stages = {self.num_stages}: a pipeline is one rank with as many batches")
        if self.has_roles and (self.num_ranks > 1 or self.num_batches > 1 or self.num_segments):
            raise ValueError("has_roles: executors of one rank and one stage, without prefix caching")
        if self.num_tenants and (self.num_ranks > 1 or self.num_batches > 1 or self.has_roles):
            raise ValueError("num_tenants: executors of one rank and one stage, without roles")

    @property
    def all_ranks(self) -> int:
        """Ranks of all executors."""
        return self.num_executors * self.num_ranks

    @property
    def all_batches(self) -> int:
        """Batches of all ranks."""
        return self.all_ranks * self.num_batches

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
