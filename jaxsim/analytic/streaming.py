"""Weights that stream from host memory once an iteration, and KV that stays there: what the throughput can be.

A model that is larger than the GPU's memory runs offline: every iteration moves all W bytes of weights over the link,
in delta = W / B seconds, and computes as many tokens as it has, prompts beside decodes, while the CPU attends over the
KV cache in its own memory. So the throughput is set by how many tokens share a pass, thus by room for KV:

    PME        2 (p + g) / ((2 p + g) g)            tokens processed an iteration and a token of room: a sequence of p
                                                    prompt and g output tokens holds p, p + 1, ... p + g for g of them
    bound      min(PME M / delta, T_gpu)            tokens/s, prompts and outputs; M: tokens of KV that fit
    finite     K (p + g) / ((K / q + g) delta)      K sequences, q = M / (g (p + g / 2)) admitted an iteration; a
                                                    sequence takes whole pages
    serial     n g / (n p / T_gpu + g max(delta, n / T_gpu))     outputs/s of n = u M / (p + g) sequences that are
                                                    computed together and then decoded together
    greedy     K (p + g) / (I delta + C)            K sequences of an engine that admits whatever fits, I iterations,
                                                    C seconds that reads of the CPU take from the link

An engine does not admit q an iteration but all that room and token cap n allow. So it fills the room at n tokens an
iteration, as each computed token is one of KV, and empties it at the end; in between room is full:

    room    K g h / M + M / (2 n) + g (1 - (p / 2 + g / 3) / (p + g / 2))    h: tokens that a sequence holds on average;
                                                    the last ones are of all ages and hold p / 2 + g / 3 of p + g / 2
    cap     K (p + g) / n + g (1 - g / (2 (p + g)))     the last iterations are not full
    one     min(-p ln(1 - K / n), K (p + g) / n) + g    where all K fit at once: to admit them, and one's outputs

    I = max(one where K (p + g) fits, else room, cap)

**One memory.** Cores read KV at all that host memory gives; the link's part is then that of one of T + 1 requesters
(`jaxsim.cost.host`), min(B, B_mem / (T + 1)), and it loses the rest for as long as they read. Each context token of
each decode is read once, so C is the same however iterations are composed.

Source: MoE-Lens (arXiv 2504.09345), intensity, saturation, PME and bound as published; the finite form is rebuilt from
these and from its effective room, (p + g) / (p + g / 2). The serial baseline is of the kind of MoE-Lightning. Greedy
iterations and the shared memory are derived here. Approximated: preempted sequences are computed again at no cost, as
the link is what limits, and room is full between the first and the last admission.

Every number is traced: differentiate `throughput` by a field of `Streaming` to see which resource is worth more.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsim.cost.host import Host, shared_memory

Scalar = Float[Array, "*shape"] | float


class Streaming(eqx.Module):
    """A model that streams to one GPU; all numbers broadcast.

    weight_bytes: W; link_bytes_per_s: B, host memory to GPU; gpu_tokens_per_s: T_gpu, of iterations full of tokens;
    kv_bytes: room for the KV cache in host memory; token_bytes: KV of a token. memory_bytes_per_s: of host memory, and
    threads that read it beside the link; without end nobody waits for it.
    """

    weight_bytes: Scalar
    link_bytes_per_s: Scalar
    gpu_tokens_per_s: Scalar
    kv_bytes: Scalar
    token_bytes: Scalar
    memory_bytes_per_s: Scalar = jnp.inf
    threads: Scalar = 1.0

    @property
    def pass_s(self) -> Scalar:
        """Seconds in which all weights cross the link."""
        return self.weight_bytes / self.link_bytes_per_s

    @property
    def room_tokens(self) -> Scalar:
        """Tokens of KV that fit."""
        return self.kv_bytes / self.token_bytes

    def link_tokens_per_s(self, prompt: Scalar, output: Scalar) -> Scalar:
        """Tokens/s, prompts and outputs, that room and link allow without end."""
        return parallelism_memory_efficiency(prompt, output) * self.room_tokens / self.pass_s

    def throughput(self, prompt: Scalar, output: Scalar) -> Scalar:
        """The bound: tokens/s, prompts and outputs, of endlessly many sequences."""
        return jnp.minimum(self.link_tokens_per_s(prompt, output), self.gpu_tokens_per_s)

    def output_throughput(self, prompt: Scalar, output: Scalar) -> Scalar:
        """Of the bound, output tokens/s."""
        return self.throughput(prompt, output) * output / (prompt + output)

    def gpu_utilisation(self, prompt: Scalar, output: Scalar) -> Scalar:
        """Share of `gpu_tokens_per_s` that the bound takes."""
        return self.throughput(prompt, output) / self.gpu_tokens_per_s

    def admitted(self, prompt: Scalar, output: Scalar, page: int = 1) -> Scalar:
        """Sequences admitted an iteration where room is what limits; page: tokens that KV is given by."""
        held = held_pages(prompt, output, page) * page
        return self.room_tokens / (output * held)

    def finite_throughput(self, sequences: Scalar, prompt: Scalar, output: Scalar, page: int = 1) -> Scalar:
        """Tokens/s, prompts and outputs, of so many sequences in all: the last ones run in passes that are not full."""
        iterations = sequences / self.admitted(prompt, output, page) + output
        linked = sequences * (prompt + output) / (iterations * self.pass_s)
        return jnp.minimum(linked, self.gpu_tokens_per_s)

    @property
    def token_cap(self) -> Scalar:
        """Tokens of an iteration that the GPU computes in the time of a pass."""
        return self.gpu_tokens_per_s * self.pass_s

    @property
    def link_while_reading(self) -> Scalar:
        """Bytes/s of the link while the CPU reads host memory."""
        # Nobody waits for a memory without end, so `threads` have no slope there: of infinity it would be no number.
        is_shared = jnp.isfinite(jnp.asarray(self.memory_bytes_per_s, float))
        memory = jnp.where(is_shared, self.memory_bytes_per_s, self.link_bytes_per_s)
        host = Host(self.link_bytes_per_s, memory, jnp.inf, self.threads)
        return jnp.where(is_shared, shared_memory(host, memory, jnp)[1], self.link_bytes_per_s)

    @property
    def lost_s(self) -> Scalar:
        """Seconds that the link loses for each token of KV that the CPU reads."""
        read_s = self.token_bytes / (self.memory_bytes_per_s - self.link_while_reading)
        return read_s * (1 - self.link_while_reading / self.link_bytes_per_s)

    @property
    def full_pass_s(self) -> Scalar:
        """Seconds of a pass of the weights while the CPU reads all of the room."""
        return self.pass_s + self.lost_s * self.room_tokens

    def shared_throughput(self, prompt: Scalar, output: Scalar, page: int = 1) -> Scalar:
        """The bound in whole pages, where CPU and link share host memory."""
        tokens = self.admitted(prompt, output, page) * (prompt + output)
        # Of pages that are full of tokens so many are read.
        used = (prompt + (output + 1) / 2) / (held_pages(prompt, output, page) * page)
        return jnp.minimum(tokens, self.token_cap) / (self.pass_s + self.lost_s * used * self.room_tokens
                                                      * jnp.minimum(1.0, self.token_cap / tokens))

    def greedy_iterations(self, sequences: Scalar, prompt: Scalar, output: Scalar, page: int = 1) -> Scalar:
        """Iterations of so many sequences in all, each admitted as soon as it fits."""
        room, cap = self.room_tokens, self.token_cap
        held = held_pages(prompt, output, page) * page
        emptied = output * (1 - (prompt / 2 + output / 3) / (prompt + output / 2))
        roomed = sequences * output * held / room + room / (2 * cap) + emptied
        passes = sequences * (prompt + output) / cap
        capped = passes + output * (1 - output / (2 * (prompt + output)))
        together = jnp.minimum(-prompt * jnp.log1p(-jnp.minimum(sequences / cap, 0.999)), passes) + output
        fits = sequences * (prompt + output) <= room
        return jnp.maximum(jnp.where(fits, together, roomed), capped)

    def greedy_throughput(self, sequences: Scalar, prompt: Scalar, output: Scalar, page: int = 1) -> Scalar:
        """Tokens/s, prompts and outputs, of so many sequences in all."""
        read = sequences * output * (prompt + (output + 1) / 2)
        seconds = self.greedy_iterations(sequences, prompt, output, page) * self.pass_s + self.lost_s * read
        return sequences * (prompt + output) / seconds

    def serial_output_throughput(self, prompt: Scalar, output: Scalar, used: Scalar = 1.0) -> Scalar:
        """Output tokens/s where a batch is computed, then decoded, then the next; used: share of the room taken."""
        sequences = used * self.room_tokens / (prompt + output)
        computed_s = sequences * prompt / self.gpu_tokens_per_s
        decoded_s = output * jnp.maximum(self.pass_s, sequences / self.gpu_tokens_per_s)
        return sequences * output / (computed_s + decoded_s)


RESOURCES = ("kv_bytes", "link_bytes_per_s", "memory_bytes_per_s", "gpu_tokens_per_s")
"""Of `Streaming`, what one can have more of."""


def which_resource_next(system: Streaming, prompt: float, output: float, sequences: float | None = None,
                        page: int = 1) -> dict[str, float]:
    """Elasticity of throughput by resource: percent more of it for a percent more of KV room, link, host memory
    bandwidth or GPU.

    sequences: of the whole job; endlessly many if left out. At a kink, where another resource takes over, it is that of
    one of the sides.
    """
    def throughput(numbers: dict[str, Array]) -> Array:
        changed = eqx.tree_at(lambda s: [getattr(s, name) for name in RESOURCES], system,
                              [numbers[name] for name in RESOURCES])
        if sequences is None:
            return changed.shared_throughput(prompt, output, page)
        return changed.greedy_throughput(sequences, prompt, output, page)

    numbers = {name: jnp.asarray(getattr(system, name), float) for name in RESOURCES}
    value, slopes = jax.value_and_grad(throughput)(numbers)
    # Of what is without end there is nothing to have more of.
    return {name: float(slopes[name] * numbers[name] / value) if bool(jnp.isfinite(numbers[name])) else 0.0
            for name in RESOURCES}


def parallelism_memory_efficiency(prompt: Scalar, output: Scalar) -> Scalar:
    """Tokens processed an iteration, prompts among them, by each token of room for KV."""
    return 2 * (prompt + output) / ((2 * prompt + output) * output)


def room_gain(prompt: Scalar, output: Scalar) -> Scalar:
    """How much more the room holds where sequences are of all ages than where all are to reach their ends together."""
    return (prompt + output) / (prompt + output / 2)


def held_pages(prompt: Scalar, output: Scalar, page: int = 1) -> Scalar:
    """Mean pages of a sequence over its decodes.

    With pages of one token p + g / 2, as published; with larger ones half a page is lost on average.
    """
    return (prompt + output / 2) / page + (0.5 - 0.5 / page)


def intensity(tokens: Scalar, experts: Scalar, active_experts: Scalar, queries_per_kv_head: Scalar,
              ffn_ratio: Scalar, weight_bytes: Scalar = 2.0) -> Scalar:
    """FLOP a byte of weights in a pass over so many tokens; ffn_ratio: FFN inner size over hidden size."""
    attention = 2 + 2 / queries_per_kv_head
    computed = 6 * ffn_ratio * active_experts + attention
    moved = 6 * ffn_ratio * experts + attention
    return 2 / weight_bytes * tokens * computed / moved


def saturating_tokens(gpu_flops: Scalar, link_bytes_per_s: Scalar, experts: Scalar, active_experts: Scalar) -> Scalar:
    """Tokens of a pass from which the GPU, not the link, is what limits; 16-bit weights."""
    return gpu_flops / link_bytes_per_s * experts / active_experts
