"""The section of an engine that runs a model on a GPU and its host together."""

from typing import Annotated, Literal

from msgspec import Meta

from jaxsim.spec.values import Level, NotNegative, Positive, Section

Place = Literal["gpu", "cpu"]


class HybridSection(Section, frozen=True):
    """A model on one GPU and the CPU beside it: weights that cross the link in every iteration, decode attention over
    KV in host memory, experts on the CPU. Everything left out stays on the GPU.

        weights: of what the GPU computes: resident there, or streamed from host memory in every iteration.
        resident_weight_gb: of streamed weights, 10^9 bytes that stay on the GPU.
        cpu_offload_gb: instead (vLLM's flag), 10^9 bytes that are streamed; the rest stays on the GPU. It only sets how
            many: weights arrive beside computing and the token cap follows from them as with streamed weights, while
            vLLM fetches a layer when it is its turn and leaves max_num_batched_tokens as it is (say overlap = false
            and give that for an engine that does so).
        attention: where decodes attend; prompts always do on the GPU. With "cpu" the KV cache is in host memory.
        experts: where routed experts are computed.
        hot_experts: of each layer, the most popular, that stay on the GPU where experts are on the CPU, also where
            other weights are streamed.
        popularity: of experts, of which hot ones have their share: the model's spread (expert_skew of the roofline), or
            uniform.
        kv_space_gb: host memory for KV, 10^9 bytes; all that weights leave of host_memory_gb if left out.
        host_memory_gb: of the host, 10^9 bytes; the CPU's own if left out.
        gpu_memory_gb: of the GPU, 10^9 bytes, if not all that it has.
        cpu: a name of `jaxsim list devices`; one socket.
        link_gb_per_s: host memory to GPU, as it is reached; a share of the GPU's host link if left out.
        cpu_gb_per_s: of host memory, as it is reached; a share of the CPU's peak if left out.
        cpu_tflops: of the CPU, as it is reached; a share of its peak if left out.
        cpu_threads: that read host memory side by side; the CPU's cores if left out.
        contention: seconds that the link loses of streaming in each second that the bytes of KV and
            experts take the CPU by themselves; if left out, what fair sharing of that memory by all threads and the
            link makes of them.
        overlap: GPU, CPU and link work at once and the slowest counts; otherwise one after the other. If left out,
            true unless experts are on the CPU, which a layer waits for.
        hand_over_us: that a layer takes, beside bytes, whose work goes to the CPU and comes back: experts' in every
            iteration, attention's where somebody decodes.
    """

    weights: Literal["resident", "streamed"] = "resident"
    resident_weight_gb: NotNegative | None = None
    cpu_offload_gb: Positive | None = None
    attention: Place = "gpu"
    experts: Place = "gpu"
    hot_experts: Annotated[int, Meta(ge=0, le=65536)] = 0
    popularity: Literal["skewed", "uniform"] = "skewed"
    kv_space_gb: Positive | None = None
    host_memory_gb: Positive | None = None
    gpu_memory_gb: Positive | None = None
    cpu: Annotated[str, Meta(min_length=1)] | None = None
    link_gb_per_s: Positive | None = None
    cpu_gb_per_s: Positive | None = None
    cpu_tflops: Positive | None = None
    cpu_threads: Annotated[int, Meta(ge=1, le=65536)] | None = None
    contention: Level | None = None
    overlap: bool | None = None
    hand_over_us: NotNegative = 0.0

    @property
    def is_streamed(self) -> bool:
        """Weights cross the link in every iteration."""
        return self.weights == "streamed"

    @property
    def uses_cpu(self) -> bool:
        """The CPU computes."""
        return "cpu" in (self.attention, self.experts)

    @property
    def overlaps(self) -> bool:
        """Lanes work at once."""
        return self.experts == "gpu" if self.overlap is None else self.overlap
