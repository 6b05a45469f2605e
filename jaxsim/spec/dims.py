"""Every static capacity of a compiled program."""

from dataclasses import dataclass

from jaxsim.kernels import packed


@dataclass(frozen=True)
class Dims:
    """Sizes that are structure: another value is another program.

    num_requests: padded requests of a scenario; num_instances: replicas; num_slots: sequences an instance can
    hold; block_size: KV tokens a block, a power of two; max_jump: iterations one step may cover; num_records:
    iterations kept on the tape (0: no tape).
    """

    num_requests: int
    num_instances: int = 1
    num_slots: int = 128
    block_size: int = 16
    max_jump: int = 2048
    num_records: int = 0

    def __post_init__(self):
        if self.block_size & (self.block_size - 1) or self.block_size < 1:
            raise ValueError(f"block_size = {self.block_size}: not a power of two; use 1, 8, 16, 32, 64 or 128")

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
