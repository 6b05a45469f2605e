"""A GPU that borrows from its host: weights over the link, attention and experts on the CPU, as lanes of an iteration.

    gpu     what any cost model says of the rest
    cpu     hand-overs (of attention where somebody decodes) + context tokens that decodes read x seconds each
            + experts by tokens
    in      streamed weights + what the GPU gets of each decode and prompt token, and of the KV of chunks before,
            + what the link loses while the CPU reads memory as well, by reader: attention, experts
    out     what the host gets of each decode, and of each prompt token

    overlapped    max(gpu, cpu, in, out)            chained    gpu + cpu + in + out

Source: MoE-Lens (arXiv 2504.09345): weights of the next layers are streamed while the GPU computes and the CPU attends;
chained is what a layer does whose experts are on the CPU, one after the other (KTransformers). Approximated: lanes are
joined over the whole iteration, where an engine joins them layer by layer; all layers are alike.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsim.cost.base import UNBOUNDED, AbstractIterationCost, BatchStats, DecodePace
from jaxsim.cost.tabulated import TOKENS
from jaxsim.kernels import octaves


class HybridCost(AbstractIterationCost):
    """Lanes of one iteration.

    gpu: of what the GPU computes, a cost without together_seconds and stages. read_s: CPU seconds of a context token.
    expert_s: CPU seconds of experts by tokens of the iteration, on the grid `TOKENS`; None where the GPU has all.
    stream_s: seconds of the weights that cross the link in every iteration. in_s, out_s: of a decode, to the GPU and
    from it; prompt_in_s, prompt_out_s: of a prompt token; history_in_s: of a token before a chunk, which that reads.
    contention: seconds that the link loses in a second in which the CPU reads KV: 0, both have all they need, to 1,
    the link waits; expert_lost_s: seconds that it loses to experts, by tokens as `expert_s`; None where it does not.
    hand_over_s: CPU seconds of any iteration; decode_hand_over_s: of one in which somebody decodes.
    """

    gpu: AbstractIterationCost
    read_s: Float[Array, ""]
    expert_s: Float[Array, " token_knots"] | None
    stream_s: Float[Array, ""]
    in_s: Float[Array, ""]
    out_s: Float[Array, ""]
    prompt_out_s: Float[Array, ""]
    contention: Float[Array, ""]
    is_chained: bool = eqx.field(static=True)
    prompt_in_s: Float[Array, ""] | float = 0.0
    history_in_s: Float[Array, ""] | float = 0.0
    hand_over_s: Float[Array, ""] | float = 0.0
    decode_hand_over_s: Float[Array, ""] | float = 0.0
    expert_lost_s: Float[Array, " token_knots"] | None = None

    @property
    def reads_longest(self) -> bool:
        """Whether the GPU's does."""
        return self.gpu.reads_longest

    @property
    def tile_tokens(self) -> Float[Array, ""] | None:
        """Of the GPU's."""
        return self.gpu.tile_tokens

    def _host_lanes(self, num_decode: Int[Array, ""], context: Int[Array, ""], prompt_tokens: Int[Array, ""] | int,
                    history: Int[Array, ""] | int = 0) -> Float[Array, " 3"]:
        """Seconds of cpu, in, out."""
        read = self.read_s * context
        lost, computed = self.contention * read, self.hand_over_s + self.decode_hand_over_s * (num_decode > 0) + read
        tokens = num_decode + prompt_tokens
        if self.expert_s is not None:
            computed = computed + octaves.look_up(TOKENS, self.expert_s, tokens)
        if self.expert_lost_s is not None:
            lost = lost + octaves.look_up(TOKENS, self.expert_lost_s, tokens)
        moved_in = self.in_s * num_decode + self.prompt_in_s * prompt_tokens + self.history_in_s * history
        return jnp.stack([computed, self.stream_s + moved_in + lost,
                          self.out_s * num_decode + self.prompt_out_s * prompt_tokens])

    def lanes(self, stats: BatchStats) -> Float[Array, " 4"]:
        """Seconds of gpu, cpu, in, out."""
        host = self._host_lanes(stats.num_decode, stats.decode_context, stats.prefill_tokens,
                                stats.prefill_context - stats.prefill_tokens)
        return jnp.concatenate([self.gpu.iteration(stats)[None], host])

    def iteration(self, stats: BatchStats) -> Float[Array, ""]:
        """Seconds of one iteration."""
        lanes = self.lanes(stats)
        return jnp.sum(lanes) if self.is_chained else jnp.max(lanes)

    def decode(self, num_sequences: Int[Array, ""], context: Int[Array, ""], shared: Int[Array, ""] | int = 0,
               longest: Int[Array, ""] | int = 0) -> DecodePace:
        """Pace until another lane becomes the longest, or the GPU's own pace ends. On the CPU shared tokens cost what
        others do."""
        gpu = self.gpu.decode(num_sequences, context, shared, longest)
        read_growth = self.read_s * num_sequences
        first = jnp.concatenate([gpu.first_s[None], self._host_lanes(num_sequences, context, 0)])
        growth = jnp.stack([gpu.growth_s, read_growth, self.contention * read_growth, jnp.zeros_like(read_growth)])
        if self.is_chained:
            return DecodePace(jnp.sum(first), jnp.sum(growth), gpu.horizon)
        # Of lanes alike the one that grows fastest, so that no other overtakes it at once.
        longest_s = jnp.max(first)
        steepest = jnp.max(jnp.where(first >= longest_s, growth, -jnp.inf))
        is_catching_up = growth > steepest
        left = (longest_s - first) / jnp.where(is_catching_up, growth - steepest, 1.0)
        to_crossing = jnp.min(jnp.where(is_catching_up, left, UNBOUNDED))
        horizon = jnp.minimum(jnp.minimum(to_crossing, UNBOUNDED).astype(jnp.int32), gpu.horizon)
        return DecodePace(longest_s, steepest, jnp.maximum(horizon, 1))
