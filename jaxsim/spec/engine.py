"""The engine section of a scenario: vLLM's flag names, and the scheduler flags a preset may be bent by."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from jaxsim.spec.hybrid import HybridSection

Count = Annotated[int, Meta(ge=1, le=1 << 30)]
Degree = Annotated[int, Meta(ge=1, le=1024)]
Share = Annotated[float, Meta(gt=0, le=1)]
Text = Annotated[str, Meta(min_length=1)]

PhaseMix = Literal["unified", "prefill_first"]
Reserve = Literal["none", "prompt", "max_tokens", "max_model_len", "expected"]
BlockRule = Literal["crossing", "always"]
Victim = Literal["last_admitted", "lowest_priority", "fewest_outputs"]
Order = Literal["fcfs", "priority"]
SchedulingPolicy = Literal["fcfs", "priority", "sjf", "edf", "least_slack", "vtc", "lrs", "lars"]
SORTED_POLICIES = ("priority", "sjf", "edf", "least_slack")
"""Orders by a key that is known before the run, at least of who never ran."""
ORDERS = {
    "fcfs": "who came first", "priority": "the smallest priority, then who came first",
    "sjf": "the fewest predicted output tokens", "edf": "the earliest deadline",
    "least_slack": "the least time to the deadline beyond what it is predicted to need",
    "vtc": "the oldest request of the tenant that was served least",
    "lrs": "of prompts side by side, the least time to the deadline beyond the rest of the prefill",
    "lars": "the same over the whole prefill"}
"""What each order of the waiting queue takes next."""
Admit = Literal["any_time", "when_empty"]
BlockSize = Literal[1, 2, 4, 8, 16, 32, 64, 128, 256]

AllToAll = Literal["allgather_reducescatter", "naive", "pplx", "deepep_high_throughput", "deepep_low_latency"]

MoeBackend = Literal["auto", "marlin"]


class RedrawSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Priorities that are drawn anew while requests are served, so that all of them get their turn.

        period_iterations: of an instance, between draws.
        pattern: random (each draw by itself), or markov (who was on the device at a draw is likelier to stay urgent).
        locality: of markov, how likely such a request is to have its place from the front halved.
        levels: of priority; equal ones go by arrival.
    """

    period_iterations: Annotated[int, Meta(ge=1, le=1 << 20)]
    pattern: Literal["random", "markov"] = "random"
    locality: Annotated[float, Meta(ge=0, le=1)] | None = None
    levels: Annotated[int, Meta(ge=2, le=4096)] = 4096


class SwapSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Host memory that preempted requests move to, with the rules of vLLM V0. Without room they are recomputed.

        space_gb: of each device, 10^9 bytes.
        dispatch_us: that the CPU takes to issue one copy: K or V of one layer, of run_blocks blocks. Published for no
            engine; fit it.
        launch_us: that the link takes for a copy beside its bytes.
        pcie_gb_per_s: of the link to the host, each way; the device's own if left out.
        run_blocks: blocks that lie in a row and go in one copy: 1 in vLLM (and if left out), the mean length of its
            block groups in FastSwitch.
        group_blocks: instead, blocks of a block group at most (FastSwitch: 60, not confirmed): groups get shorter as
            free blocks are scattered (a mean field; docs/reproduce/fastswitch.md).
        asynchronous: iterations go on during copies; otherwise these come first in the iteration.
        reuse: who comes back keeps its full blocks in host memory, and does not copy them out again. A turn of a
            session finds those of the turn before it there, unless others needed the room since.
        redraw: priorities that are drawn anew; first come first served if left out.
        window: requests that wait for a place at once, of which the run keeps track; beyond, it stops with a fault.
            With redraw all that wait count, else those in host memory.
    """

    space_gb: Annotated[float, Meta(gt=0, le=1e6)]
    dispatch_us: Annotated[float, Meta(ge=0, le=1e6)]
    launch_us: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    pcie_gb_per_s: Annotated[float, Meta(gt=0)] | None = None
    run_blocks: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    group_blocks: Annotated[int, Meta(ge=1, le=4095)] | None = None
    asynchronous: bool = False
    reuse: bool = False
    redraw: RedrawSection | None = None
    window: Annotated[int, Meta(ge=8, le=8192)] = 256


class OffloadSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Host memory behind the prefix cache: every full block of a prompt is stored there, and loaded where the device
    has dropped it. As LMCache's connector does it, in the iteration that first schedules a request.

        space_gb: of each device, 10^9 bytes. The longest untouched blocks go first.
        gb_per_s: of the link to the host, toward the device; the device's own if left out.
        load: "serial" (before the layers of that iteration) or "by_layer" (beside the layers before). Stores overlap
            with iterations and cost nothing.
    """

    space_gb: Annotated[float, Meta(gt=0, le=1e6)]
    gb_per_s: Annotated[float, Meta(gt=0)] | None = None
    load: Literal["serial", "by_layer"] = "serial"


class QualityRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What reuse does to answers, measured offline for a pair of models.

        recomputed_layers: of the model, the best group of so many.
        loss: of the measure of quality, whichever it is.
    """

    recomputed_layers: Annotated[int, Meta(ge=0, le=4096)]
    loss: float


class ContextReuseSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Contexts that siblings, fine-tunes of the same base, have computed (DroidSpeak): with cluster.variants other
    instances of the run, as far as they have them; else before the run, all of workload.prefix_groups. Their KV is
    behind a link, with the hidden states before the recomputed layers.

        gb_per_s: of the link of an instance; with cluster.variants of one in and one out.
        latency_us: of the link, once for the hidden states and once for the KV that an iteration loads; with
            cluster.variants that a request loads.
        recomputed_layers: of the receiver.
        quality: instead, losses by recomputed layers: the fewest of them with a loss of at most max_loss are taken.
        max_loss: with quality.
        pipelined: KV comes while layers are recomputed; otherwise before.
    """

    gb_per_s: Annotated[float, Meta(gt=0)]
    latency_us: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    recomputed_layers: Annotated[int, Meta(ge=0, le=4096)] | None = None
    quality: tuple[QualityRow, ...] = ()
    max_loss: float | None = None
    pipelined: bool = True


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One serving engine, as its command line describes it. A field left out is what the preset says.

    vLLM's names:
        preset: scheduler imitated: a name from `jaxsim list policies`, with or without @version, or the path
            of a preset file (.toml).
        max_num_seqs: sequences running at once.
        max_num_batched_tokens: token budget of one iteration.
        max_model_len: limit of prompt + output, tokens.
        block_size: tokens of a KV block.
        gpu_memory_utilization: share of device memory the engine may fill, by its own rule (SGLang's
            mem_fraction_static, TensorRT-LLM's free_gpu_memory_fraction).
        num_gpu_blocks_override: KV blocks, instead of what memory gives.
        tensor_parallel_size: devices that share each layer.
        pipeline_parallel_size: stages that share the layers, each with a batch in flight.
        data_parallel_size: ranks with a queue and a KV pool each. Around experts they iterate together, those of a
            dense model each by itself. Requests go to the rank with the least of 4 x waiting + running, unless
            cluster.router says otherwise.
        enable_expert_parallel: whole experts are spread over the devices, instead of a slice of each.
        all2all_backend: how tokens reach experts on other data-parallel ranks: gathered everywhere and summed back
            ("allgather_reducescatter"), or sent to where they are needed (the others).
        enable_eplb: a load balancer places whole experts, by how popular they are.
        num_redundant_experts: copies of the most popular ones that it may place beside them.
        prefill_context_parallel_size: groups of tensor-parallel devices that share the tokens of a prompt, on devices
            of their own. Each keeps all of the KV cache and computes all decodes.
        decode_context_parallel_size: tensor-parallel devices that share the tokens of a KV cache of which each would
            hold a copy: their number over the KV heads at most (one with latent attention). A block holds as many
            times block_size tokens.
        enable_sequence_parallelism: reduce-scatter and all-gather in place of all-reduce, norms on a share of the
            tokens each (vLLM's enable_sp).
        moe_backend: kernels of the experts: what vLLM takes unless told (for int4 weights that is Marlin's), or
            Marlin's, which multiply 4-bit weights in 16 bits (VLLM_MXFP4_USE_MARLIN).
        enable_chunked_prefill: a prompt may be split over iterations.
        scheduling_policy: order of the waiting queue: of arrival, by priority, the shortest predicted output first
            (sjf), the earliest deadline first (edf), the least slack first (least_slack), by virtual token
            counters of the tenants (vtc), or, of prompts that are partly computed too, the least remaining slack
            (lrs) or the least relative slack (lars).
        async_scheduling: the next iteration is scheduled while this one runs.
        watermark: share of the KV blocks that admissions leave free.
        batch_wait_timeout_iters: iterations that prompts which could join running decodes wait for, unless they are
            enough (TensorRT-LLM's flag). With 0 nobody waits.
        batch_wait_max_tokens_ratio: prompts and decodes are enough when they fill that share of
            max_num_batched_tokens. With 0 nobody waits.
        enable_prefix_caching: keep and share the KV blocks of equal prompt prefixes (vLLM V1 presets), which a trace
            names. Off unless set, on by default in vLLM.
        dtype: weights and activations, the same as model.dtype.
        kv_cache_dtype: KV cache, the same as model.kv_dtype.
        enforce_eager: no CUDA graphs, so that every launch is paid by the host.
        swap: host memory that preempted requests move to (presets 'vllm-v0'); recomputed if left out.
        offload: host memory behind the prefix cache, with enable_prefix_caching; what the device drops is gone if left
            out.
        context_reuse: contexts that siblings have computed, with enable_prefix_caching; all are computed if left out.
        hybrid: the CPU and its memory beside the GPU, for a model that the GPU alone does not hold; all on the GPU if
            left out.

    Flags of the scheduler itself (docs/schedulers.md):
        phase_mix: decodes and prompt chunks share an iteration, or prompts go first and alone.
        reserve: KV blocks a request takes when it is admitted.
        decode_needs_free_block: a decode wants a free block only when crossing into one, or always.
        victim: who is preempted when blocks run short.
        waiting_blocked_after_preempt: nothing is admitted in a pass that preempted.
        admit: requests join at any time, or only an empty engine.
        kv_accounting: false where KV memory is no limit at all.
        decode_context_limit: context tokens that one decode iteration may hold.
        schedule_conservativeness: scales the expected-growth reserve (SGLang's flag).
        input_token_weight: service of a prompt token under scheduling_policy = "vtc"; 1 if left out.
        output_token_weight: service of an output token there; 2 if left out.
        slack_output_ms: that an output token is taken to need under scheduling_policy = "least_slack".
        slack_prompt_ms: that a token of a prompt is taken to need there; 0 if left out.
        slack_window: preempted requests that wait at once there, of which the run keeps track (64 if left out);
            beyond, it stops with a fault.

    Long contexts (docs/long-context.md):
        target_batch_time_ms: that an iteration with a prompt is to take at most: chunks of prompts are as long as that
            leaves time for, within max_num_batched_tokens. Only tokens limit them if left out.
        min_chunk_tokens: of a chunk there, 1 if left out: the first of an iteration has as many, whatever they take.
        max_num_partial_prefills: prompts that are partly computed side by side, up to 4; 1 if left out. With more,
            the order is also that of the next chunks, and who has begun may wait for others.
        max_long_partial_prefills: long ones among them, 1 if left out.
        long_prompt_tokens: prompts of more are long, of which one has a chunk in an iteration; 32768 if left out.
        most_relative_slack: under scheduling_policy = "lars" the chunk of a long prompt fills an iteration but for its
            relative slack, of which so much counts at most; 0.4 if left out. The others do not read it.
        deadline_work_factor: of the time of its prefill alone, by which a request is due later than its ttft_ms or
            deadline_ms says; with it these may be left out.
        prefill_window: requests that wait at once there, of which the run keeps track (256 if left out); beyond, it
            stops with a fault.
        kv_parallel_size: groups of tensor x pipeline parallel devices that share the KV of long contexts.
        kv_parallel_tokens: of a context that a group has before the next one takes any.
    """

    preset: Text = "vllm-v1"
    max_num_seqs: Annotated[int, Meta(ge=1, le=65536)] | None = None
    max_num_batched_tokens: Count | None = None
    max_model_len: Count | None = None
    block_size: BlockSize | None = None
    gpu_memory_utilization: Share | None = None
    num_gpu_blocks_override: Count | None = None
    tensor_parallel_size: Degree = 1
    pipeline_parallel_size: Degree = 1
    data_parallel_size: Degree = 1
    enable_expert_parallel: bool = False
    all2all_backend: AllToAll = "allgather_reducescatter"
    enable_eplb: bool = False
    num_redundant_experts: Annotated[int, Meta(ge=0, le=65536)] = 0
    prefill_context_parallel_size: Degree = 1
    decode_context_parallel_size: Degree = 1
    enable_sequence_parallelism: bool = False
    moe_backend: MoeBackend = "auto"
    enable_chunked_prefill: bool | None = None
    scheduling_policy: SchedulingPolicy | None = None
    async_scheduling: bool | None = None
    watermark: Annotated[float, Meta(ge=0, lt=1)] | None = None
    batch_wait_timeout_iters: Annotated[int, Meta(ge=0, le=1 << 30)] | None = None
    batch_wait_max_tokens_ratio: Annotated[float, Meta(ge=0, le=1)] | None = None
    enable_prefix_caching: bool = False
    dtype: Text | None = None
    kv_cache_dtype: Text | None = None
    enforce_eager: bool = False
    swap: SwapSection | None = None
    offload: OffloadSection | None = None
    context_reuse: ContextReuseSection | None = None
    hybrid: HybridSection | None = None

    phase_mix: PhaseMix | None = None
    reserve: Reserve | None = None
    decode_needs_free_block: BlockRule | None = None
    victim: Victim | None = None
    waiting_blocked_after_preempt: bool | None = None
    admit: Admit | None = None
    kv_accounting: bool | None = None
    decode_context_limit: Count | None = None
    schedule_conservativeness: Annotated[float, Meta(gt=0, le=10)] | None = None
    input_token_weight: Annotated[float, Meta(ge=0, le=1_000)] | None = None
    output_token_weight: Annotated[float, Meta(ge=0, le=1_000)] | None = None
    slack_output_ms: Annotated[float, Meta(ge=0, le=10_000)] | None = None
    slack_prompt_ms: Annotated[float, Meta(ge=0, le=10_000)] | None = None
    slack_window: Annotated[int, Meta(ge=8, le=8192)] | None = None

    target_batch_time_ms: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    min_chunk_tokens: Count | None = None
    max_num_partial_prefills: Annotated[int, Meta(ge=1, le=1024)] | None = None
    max_long_partial_prefills: Annotated[int, Meta(ge=1, le=1024)] | None = None
    long_prompt_tokens: Annotated[int, Meta(ge=0, le=1 << 24)] | None = None
    most_relative_slack: Annotated[float, Meta(ge=0, lt=1)] | None = None
    deadline_work_factor: Annotated[float, Meta(ge=0, le=10_000)] | None = None
    prefill_window: Annotated[int, Meta(ge=8, le=8192)] | None = None
    kv_parallel_size: Degree = 1
    kv_parallel_tokens: Annotated[int, Meta(ge=1, le=1 << 24)] | None = None
