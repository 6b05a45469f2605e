"""A GPU and its host from scenario files: what is refused, with which sum, and what is said of a run."""

import dataclasses
import json

import msgspec
import pytest

from jaxsim._core.errors import InputError
from jaxsim.cost.hybrid import HybridCost
from jaxsim.cost.tabulated import CONTEXT, SHARED, TabulatedCost
from jaxsim.engine import lower, simulate
from jaxsim.io import result as files
from jaxsim.io import table
from jaxsim.spec.host_memory import place_weights
from jaxsim.spec.hybrid import HybridSection
from jaxsim.spec.model import load_model
from jaxsim.spec.scenario import Scenario
from jaxsim.study.lanes import Lanes

pytestmark = pytest.mark.unoptimised

STREAMED = {"weights": "streamed", "attention": "cpu", "cpu": "xeon_8380", "kv_space_gb": 70.0, "gpu_memory_gb": 24.0}
RESIDENT = {"experts": "cpu", "cpu": "xeon_8380", "host_memory_gb": 512.0}


def scenario(hybrid: dict | None = None, engine: dict | None = None, **sections) -> Scenario:
    """Mixtral-8x7B, 93.4 GB, on an A40; None takes a field away."""
    hybrid = {k: v for k, v in (STREAMED if hybrid is None else hybrid).items() if v is not None}
    engine = (engine or {}) | ({"hybrid": hybrid} if hybrid else {})
    base = {"schema_version": 1, "num_seeds": 1, "model": {"name": "mixtral-8x7b"}, "device": {"name": "a40"},
            "engine": {"preset": "vllm-v1@0.9", "max_num_seqs": 64, "max_model_len": 1024, **engine},
            "workload": {"kind": "batch", "num_requests": 40, "input": 98, "output": 8}} | sections
    return Scenario.from_dict({name: value for name, value in base.items() if value is not None})


FITTED = {"kind": "fitted", "prefill": {"a": 0.01}, "decode": {"a": 0.01}}

CASES = [
    # field, what is given, what the message says
    ("cost.kind", dict(cost=FITTED), "roofline"),
    ("engine.tensor_parallel_size", dict(engine={"tensor_parallel_size": 2}), "not simulated"),
    ("engine.pipeline_parallel_size", dict(engine={"pipeline_parallel_size": 2}), "not simulated"),
    ("engine.data_parallel_size", dict(engine={"data_parallel_size": 2}), "not simulated"),
    ("engine.enable_prefix_caching", dict(engine={"enable_prefix_caching": True}), "attention"),
    ("cluster.pools", dict(cluster={"pools": [{"role": "mixed"}]}), "not simulated"),
    ("cluster.pools[1].engine.hybrid", dict(hybrid={}, cluster={"pools": [
        {"role": "prefill"}, {"role": "decode", "engine": {"hybrid": STREAMED}}]}), "not simulated in pools"),
    ("engine.hybrid", dict(hybrid={"cpu": "xeon_8380"}), "all of the model on the GPU"),
    ("engine.hybrid.cpu", dict(hybrid=STREAMED | {"cpu": None}), "attention"),
    ("engine.hybrid.cpu", dict(hybrid=RESIDENT | {"cpu": None, "cpu_gb_per_s": 100.0}), "experts"),
    ("engine.hybrid.cpu", dict(hybrid=STREAMED | {"cpu": "h100"}), "is a gpu"),
    ("engine.hybrid.cpu", dict(hybrid=STREAMED | {"cpu": "xeon_8381"}), "not in the catalogue"),
    ("engine.hybrid.cpu_offload_gb", dict(hybrid=RESIDENT | {"cpu_offload_gb": 10.0}), "no effect"),
    ("engine.hybrid.cpu_offload_gb", dict(hybrid=STREAMED | {"cpu_offload_gb": 10.0, "resident_weight_gb": 1.0}),
     "resident_weight_gb"),
    ("engine.hybrid.cpu_offload_gb", dict(hybrid=STREAMED | {"cpu_offload_gb": 94.0}), "93.4 GB"),
    ("engine.hybrid.resident_weight_gb", dict(hybrid=STREAMED | {"resident_weight_gb": 94.0}), "93.4 GB"),
    ("engine.hybrid.kv_space_gb", dict(hybrid=RESIDENT | {"kv_space_gb": 10.0}), "no effect"),
    ("engine.hybrid.hot_experts", dict(hybrid=STREAMED | {"hot_experts": 2}), "no effect"),
    ("engine.hybrid.hot_experts", dict(hybrid=RESIDENT | {"hot_experts": 9}), "8 experts"),
    ("engine.hybrid.hot_experts", dict(hybrid=RESIDENT | {"hot_experts": 6}), "use at most 3"),
    ("engine.hybrid.contention", dict(hybrid=STREAMED | {"contention": 0.5, "overlap": False}), "take turns"),
    ("engine.hybrid.contention", dict(hybrid=RESIDENT | {"contention": 0.5}), "weights = 'resident'"),
    *((f"engine.hybrid.{name}", dict(hybrid={"weights": "streamed", name: value}), "CPU computes nothing")
      for name, value in (("contention", 0.5), ("cpu_gb_per_s", 100.0), ("cpu_tflops", 2.0), ("cpu_threads", 8))),
    ("engine.hybrid.popularity", dict(hybrid=STREAMED | {"popularity": "uniform"}), "no effect"),
    # Two of eight hot experts of all layers are 22.5 GB; 3.2 are left to stream.
    ("engine.hybrid.resident_weight_gb", dict(hybrid=RESIDENT | {
        "weights": "streamed", "hot_experts": 2, "resident_weight_gb": 4.0}), "3.2 GB of weights that the GPU"),
    ("engine.hybrid.hot_experts", dict(hybrid=RESIDENT | {"weights": "streamed", "hot_experts": 6}), "use at most 3"),
    ("engine.num_gpu_blocks_override", dict(engine={"num_gpu_blocks_override": 150_000}),
     "93.4 GB of weights + 314.6 GB of KV of mistralai/Mixtral-8x7B-v0.1 = 408.0 GB, host memory has 402.7 GB"),
    ("engine.num_gpu_blocks_override", dict(hybrid={"weights": "streamed"}, engine={"num_gpu_blocks_override": 50_000}),
     "104.9 GB of KV, more than"),
    ("engine.hybrid.hand_over_us", dict(hybrid={"weights": "streamed", "hand_over_us": 5.0}), "no effect"),
    # 93.4 + 310 GB beside 402.7, 93.4 beside 90.
    ("engine.hybrid.kv_space_gb", dict(hybrid=STREAMED | {"kv_space_gb": 310.0}), "93.4 GB of weights + 310.0 GB of KV"
     " of mistralai/Mixtral-8x7B-v0.1 = 403.4 GB, host memory has 402.7 GB"),
    ("engine.hybrid.host_memory_gb", dict(hybrid=STREAMED | {"host_memory_gb": 90.0}), "93.4 GB of weights"),
    ("engine.hybrid.kv_space_gb", dict(hybrid=STREAMED | {"kv_space_gb": None, "cpu": None, "cpu_gb_per_s": 100.0,
                                                           "cpu_tflops": 2.0}), "missing"),
    ("engine.hybrid.kv_space_gb", dict(hybrid=STREAMED | {"kv_space_gb": 0.1}), "max_model_len = 1,024"),
    # Two of 32 layers are 5.8 GB.
    ("engine.hybrid.gpu_memory_gb", dict(hybrid=STREAMED | {"gpu_memory_gb": 6.0}), "5.8 (two layers of streamed"),
    ("engine.hybrid.gpu_memory_gb", dict(hybrid=STREAMED | {"gpu_memory_gb": 60.0}), "51.5 GB of a40"),
    ("engine.hybrid.weights", dict(hybrid={"attention": "cpu", "cpu": "xeon_8380", "kv_space_gb": 10.0}),
     "set weights = 'streamed'"),
    ("engine.hybrid.experts", dict(model={"name": "llama-3.1-8b"}, hybrid=RESIDENT), "has no experts"),
    ("engine.hybrid.attention", dict(model={"name": "mistralai/Mistral-7B-v0.1"}, hybrid=STREAMED), "sliding window"),
    ("engine.hybrid.link_gb_per_s", dict(device={"name": "odd", "numbers": {
        "memory_bytes_per_s": 1e12, "memory_bytes": 48 << 30, "bf16_flops": 1e14}}), "not known"),
]


@pytest.mark.parametrize("field, given, says", CASES, ids=[f"{i}-{field}" for i, (field, *_) in enumerate(CASES)])
def test_refused(field, given, says):
    """By the field to change and with the sum that does not work out, before anything is compiled."""
    with pytest.raises(InputError) as caught:
        lower.resolve_system(scenario(**given))
    assert caught.value.field == field and says in str(caught.value) and "\n" not in str(caught.value)


def test_where_weights_are():
    """Mixtral-8x7B: 32 layers of 8 experts of 3 x 4,096 x 14,336 in 16 bits, 90.2 of 93.4 GB."""
    model = load_model("mixtral-8x7b")
    experts, total = 32 * 8 * 3 * 4096 * 14336 * 2, 93_405_577_216
    streamed = place_weights(model, HybridSection(weights="streamed", attention="cpu"))
    assert streamed == (0.0, total, 0.0, total / 32) and streamed.on_gpu == total / 16
    part = place_weights(model, HybridSection(weights="streamed", resident_weight_gb=20.0))
    assert part.resident == 20e9 and part.streamed == total - 20e9 and part == place_weights(
        model, HybridSection(weights="streamed", cpu_offload_gb=(total - 20e9) / 1e9))
    hot = place_weights(model, HybridSection(experts="cpu", hot_experts=2))
    assert hot.on_cpu == experts * 0.75 and hot.resident == total - hot.on_cpu == hot.on_gpu and hot.streamed == 0
    # Hot experts stay while the rest streams past them.
    both = place_weights(model, HybridSection(weights="streamed", experts="cpu", hot_experts=2))
    assert both.on_cpu == experts * 0.75 and both.resident == experts * 0.25 and both.streamed == total - experts
    assert both.on_gpu == experts * 0.25 + (total - experts) / 16
    kept = place_weights(model, HybridSection(weights="streamed", experts="cpu", hot_experts=2, resident_weight_gb=1.0))
    assert kept.resident == pytest.approx(experts * 0.25 + 1e9)
    assert kept.streamed == pytest.approx(total - experts - 1e9)


def test_room_for_kv():
    """KV of 131,072 bytes a token: of host memory where the CPU attends, else what the GPU has left."""
    system = lower.resolve_system(scenario())
    assert system.num_blocks == system.memory.num_blocks == int(70e9 // (16 * 131072))
    rest = lower.resolve_system(scenario(STREAMED | {"kv_space_gb": None, "host_memory_gb": 200.0}))
    assert rest.memory.kv_bytes == pytest.approx(200e9 - 93_405_577_216)
    on_gpu = lower.resolve_system(scenario({"weights": "streamed"}))
    m = on_gpu.memory
    assert m.kv_bytes == pytest.approx(0.9 * 48_305_799_168 - m.weight_bytes - m.activation_bytes - m.other_bytes)
    assert not m.is_on_host and on_gpu.hybrid.host.memory_bytes_per_s == float("inf")
    for hybrid in (STREAMED, STREAMED | {"kv_space_gb": None}, {"weights": "streamed"}):
        given = lower.resolve_system(scenario(hybrid, engine={"num_gpu_blocks_override": 99}))
        assert given.num_blocks == given.memory.num_blocks == 99 and given.memory.kv_bytes == 99 * 16 * 131072
        assert "99 KV blocks" in given.memory.lines[-1]
        facts = lower.hybrid_facts(given.hybrid, given.scheduler, given.memory)
        assert facts["kv_bytes"] == 99 * 16 * 131072


def test_the_token_cap_is_where_the_link_stops_to_be_what_limits():
    """By default the threshold, what the user says otherwise; not where weights stay, lanes take turns, or batches are
    whole. Twice the link is half the tokens."""
    free = lower.resolve_system(scenario())
    cap = free.scheduler.max_num_batched_tokens
    assert cap == free.hybrid.threshold.tokens > 10_000
    fast = lower.resolve_system(scenario(STREAMED | {"link_gb_per_s": 2 * 19.52}))
    assert fast.scheduler.max_num_batched_tokens == pytest.approx(cap / 2, rel=0.02)
    said = lower.resolve_system(scenario(engine={"max_num_batched_tokens": 5000}))
    assert said.scheduler.max_num_batched_tokens == 5000 and said.hybrid.threshold == free.hybrid.threshold
    for system in (lower.resolve_system(scenario(STREAMED | {"overlap": False})),
                   lower.resolve_system(scenario(RESIDENT | {"hot_experts": 1}))):
        assert system.hybrid.threshold is None and system.scheduler.max_num_batched_tokens == 2048
    static = lower.resolve_system(scenario(engine={"preset": "static"}))
    assert static.scheduler.max_num_batched_tokens == 1 << 30 and static.hybrid.threshold is not None


@pytest.mark.slow
def test_the_cap_follows_the_cost_in_a_study():
    """Systems are shared between scenarios of a study, but not those whose cap another cost makes."""
    lanes, plain = Lanes(), scenario()
    slow = plain.with_values({"cost.overrides": {"peak_flops": 0.75e14, "attention_flops": 0.75e14}})
    caps = [lanes.system(s).scheduler.max_num_batched_tokens for s in (plain, slow, plain)]
    assert caps[0] == caps[2] > 1.5 * caps[1]


@pytest.mark.slow
def test_columns_of_the_gpu_vanish():
    made = scenario()
    cost = lower.make_cost(made, lower.resolve_system(made), 64, 1024)
    assert isinstance(cost, HybridCost) and isinstance(cost.gpu, TabulatedCost) and cost.gpu.tail is None
    assert not cost.gpu.by_sequences[:, CONTEXT:SHARED + 1].any() and cost.expert_s is None
    kinds = {lower_kind(made), lower_kind(scenario(STREAMED | {"overlap": False})),
             lower_kind(scenario(RESIDENT | {"hot_experts": 1}))}
    assert len(kinds) == 3


def lower_kind(made: Scenario):
    """What a study takes for the structure of a scenario's cost."""
    lanes = Lanes()
    return lanes._cost_kind(made, lanes.system(made))


@pytest.mark.slow
def test_what_a_run_says(capsys):
    """With the default cap, in the summary and under the table; a stretched link makes longer runs."""
    variants = [scenario(), scenario(STREAMED | {"contention": 1.0, "link_gb_per_s": 5.0}),
                scenario(STREAMED | {"overlap": False}), scenario(RESIDENT | {"hot_experts": 1})]
    result = simulate.simulate(variants)
    assert result.faults == ()
    durations = [metrics["duration"] for metrics in result.metrics]
    assert durations[1] > 3 * durations[0] and durations[2] > durations[0]
    summary = json.loads(files.to_json(files.summary(result, 0)))
    said = summary["hybrid"]
    assert said["max_num_batched_tokens"] == said["threshold_tokens"] > 10_000 and said["kv_on_host"]
    assert said["pass_s"] == pytest.approx(93_405_577_216 / (0.61 * 32e9))
    assert "hybrid" in files.summary(result, 3)
    lines = [table._hybrid(variant) for variant in variants]
    assert any("cross the link" in line for line in lines[0]) and any("max_num_batched_tokens" in x for x in lines[0])
    assert not any("cross" in line for line in lines[3])
    # An iteration takes at least a pass.
    assert durations[0] > 8 * said["pass_s"]


def test_thousands_of_sequences_have_a_program():
    """Completion keys hold the slot and the iteration in 31 bits: with more slots jumps are shorter. Up to 1,024 they
    are what they were."""
    for slots, jump in ((64, 2048), (1024, 2048), (1500, 1024), (5000, 256), (16_384, 128)):
        made = scenario(engine={"max_num_seqs": slots, "max_num_batched_tokens": 20_000})
        system = lower.resolve_system(scenario())
        system = dataclasses.replace(system, scheduler=msgspec.structs.replace(system.scheduler, max_num_seqs=slots))
        dims = simulate.dims_of(made, system, 20_000)
        assert dims.max_jump == jump and dims.num_slots >= slots and lower.counter_room(dims) > 8192
