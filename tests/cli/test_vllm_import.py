"""`vllm serve` lines: taken over, ignored with a word, or refused."""

import warnings

import pytest

from jaxsim._core.errors import InputError
from jaxsim.spec.vllm import IgnoredFlagsWarning, import_vllm


def imported(line, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scenario = import_vllm(line, device="h100", **options)
    return scenario, " ".join(str(w.message) for w in caught if w.category is IgnoredFlagsWarning)


def test_flags_are_taken_over():
    scenario, ignored = imported(
        "vllm serve meta-llama/Llama-3.1-8B-Instruct --tensor-parallel-size 2 --max-num-seqs=128"
        " --max_num_batched_tokens 4096 --max-model-len 16k --block-size 32 --gpu-memory-utilization 0.85"
        " --no-enable-prefix-caching --async-scheduling --scheduling-policy priority --kv-cache-dtype fp8"
        " --num-gpu-blocks-override 5000 --enforce-eager --enable-expert-parallel --dtype auto")
    engine = scenario.engine
    assert scenario.model.name == "meta-llama/Llama-3.1-8B-Instruct" and scenario.device.name == "h100"
    assert (engine.tensor_parallel_size, engine.max_num_seqs, engine.max_num_batched_tokens) == (2, 128, 4096)
    assert (engine.max_model_len, engine.block_size, engine.gpu_memory_utilization) == (16000, 32, 0.85)
    assert engine.async_scheduling and engine.enforce_eager and engine.enable_expert_parallel
    assert (engine.scheduling_policy, engine.kv_cache_dtype, engine.num_gpu_blocks_override) == (
        "priority", "fp8", 5000)
    assert engine.dtype is None and ignored == ""


def test_switches_can_be_off_or_spelled_out():
    off, _ = imported("vllm serve m --no-enable-chunked-prefill --max-num-seqs 4")
    assert off.engine.enable_chunked_prefill is False
    spelled, _ = imported("vllm serve m --enable-chunked-prefill False --async-scheduling true -tp 4")
    assert spelled.engine.enable_chunked_prefill is False and spelled.engine.async_scheduling is True
    assert spelled.engine.tensor_parallel_size == 4


def test_what_plays_no_part_is_listed():
    _, ignored = imported("HF_HOME=/x vllm serve --trust-remote-code m --port 8000 --host 0.0.0.0"
                          " --api-key k")
    for flag in ("--trust-remote-code", "--port", "--host", "--api-key", "prefix caching"):
        assert flag in ignored
    scenario, _ = imported("vllm serve --trust-remote-code m")
    assert scenario.model.name == "m"


def test_what_is_not_known_is_listed_apart():
    with pytest.warns(IgnoredFlagsWarning) as caught:
        import_vllm("vllm serve m --port 80 --frobnicate 3 --seed 1", device="h100")
    harmless, unknown = (str(w.message) for w in caught)
    assert "--port" in harmless and "--seed" in harmless and "--frobnicate" not in harmless
    assert "not known here" in unknown and unknown.endswith("--frobnicate")


def test_other_ways_to_start_it(tmp_path):
    assert imported("python -m vllm.entrypoints.openai.api_server --model a/b -q awq")[0].dtype == "int4"
    wrapped = "docker run --gpus all image \\\n  vllm serve \\\n  a/b --max-num-seqs 7"
    assert imported(wrapped)[0].engine.max_num_seqs == 7
    for image in ("vllm/vllm-openai", "vllm/vllm-openai:v0.9.1", "reg.example/vllm/vllm-openai@sha256:0"):
        image_line = f"docker run --gpus all -v ~/.cache:/root -p 8000:8000 --ipc=host {image} --model a/b --dtype fp8"
        assert imported(image_line)[0].model.name == "a/b" and imported(image_line)[0].dtype == "fp8"
    (tmp_path / "config.json").write_text("{}")
    assert imported(f"vllm serve {tmp_path}")[0].model.config == str(tmp_path)
    assert imported("vllm serve m --model m")[0].model.name == "m"


def test_data_parallel_ranks():
    engine = imported("vllm serve m -dp 4 --enable-expert-parallel")[0].engine
    assert engine.data_parallel_size == 4 and engine.enable_expert_parallel


@pytest.mark.parametrize("line, says", [
    ("vllm serve m --speculative-config '{}'", "--speculative-config.*not simulated"),
    ("vllm serve m --enable-lora", "--enable-lora = True: changes the timing"),
    ("vllm serve m --cpu-offload-gb 10", "--cpu-offload-gb"),
    ("vllm serve m --quantization bitsandbytes", "--quantization"),
    ("vllm serve m --pipeline-parallel-size 2 --async-scheduling", "async_scheduling.*pipeline_parallel_size = 2"),
    ("vllm serve m --max-num-seq 4", "did you mean 'max-num-seqs'"),
    ("vllm serve m --max-num-seqs", "has no value"),
    ("vllm serve m --max-num-seqs four", "engine.max_num_seqs = 'four'"),
    ("vllm serve m --block-size 12", "engine.block_size = 12"),
    ("vllm serve m n", "a second model"),
    ("vllm serve m --model n", "a second model beside 'm'"),
    ("vllm serve --model n m", "a second model beside 'n'"),
    ("vllm serve m --model", "--model.*has no value"),
    ("vllm serve m --config foo.yaml", "--config = 'foo.yaml'.*write its flags out"),
    ("docker run ubuntu m", "not a vLLM server"),
    ("vllm serve --port 1", "names no model"),
    ("vllm serve 'm", "cannot be split"),
    ("ollama run m", "not a vLLM server"),
])
def test_refusals(line, says):
    with pytest.raises(InputError, match=says):
        imported(line)


def test_harmless_values_of_refused_flags_pass():
    imported("vllm serve m --cpu-offload-gb 0 --max-num-partial-prefills 1 --swap-space 8")


def test_the_rest_comes_from_the_base():
    base = {"workload": {"kind": "batch", "input": 9, "output": 9}, "slo": {"ttft_ms": 9.0},
            "cluster": {"router": "random"}}
    scenario, _ = imported("vllm serve m -dp 2", base=base, preset="vllm-v1@0.19")
    assert scenario.slo.ttft_ms == 9.0 and scenario.workload.kind == "batch"
    assert (scenario.engine.data_parallel_size, scenario.cluster.router) == (2, "random")
    assert scenario.engine.preset == "vllm-v1@0.19"
    assert base["cluster"] == {"router": "random"}


def test_flags_of_plans_past_one_node():
    """Contexts cut over ranks, wide expert parallelism, its balancer."""
    scenario, _ = imported(
        "vllm serve deepseek-ai/DeepSeek-V3 -tp 8 -dcp 8 --prefill-context-parallel-size 2 --enable-expert-parallel"
        " --all2all-backend deepep_low_latency --enable-eplb --num-redundant-experts 32")
    engine = scenario.engine
    assert (engine.tensor_parallel_size, engine.decode_context_parallel_size) == (8, 8)
    assert (engine.prefill_context_parallel_size, engine.all2all_backend) == (2, "deepep_low_latency")
    assert engine.enable_eplb and engine.num_redundant_experts == 32
