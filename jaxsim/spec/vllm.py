"""A `vllm serve MODEL --flag value ...` command line as a scenario.

Flags that the simulator has are taken over. Flags that do not change when anything happens (names, ports,
logging, sampling) are ignored and listed, flags that are not known here are listed apart. Flags that would change
it and are not simulated are refused, so that nobody compares a simulation with an engine that ran something else.
"""

import copy
import difflib
import os
import re
import shlex
import warnings
from typing import Any

from jaxsim._core.errors import InputError, suggest
from jaxsim.spec.scenario import Scenario
from jaxsim.spec.toml import parse_value

_TAKEN = {
    "dtype": "engine.dtype", "kv-cache-dtype": "engine.kv_cache_dtype",
    "max-model-len": "engine.max_model_len",
    "block-size": "engine.block_size", "gpu-memory-utilization": "engine.gpu_memory_utilization",
    "num-gpu-blocks-override": "engine.num_gpu_blocks_override",
    "max-num-seqs": "engine.max_num_seqs", "max-num-batched-tokens": "engine.max_num_batched_tokens",
    "tensor-parallel-size": "engine.tensor_parallel_size", "tp": "engine.tensor_parallel_size",
    "pipeline-parallel-size": "engine.pipeline_parallel_size", "pp": "engine.pipeline_parallel_size",
    "data-parallel-size": "engine.data_parallel_size", "dp": "engine.data_parallel_size",
    "scheduling-policy": "engine.scheduling_policy", "moe-backend": "engine.moe_backend",
    "decode-context-parallel-size": "engine.decode_context_parallel_size", "dcp": "engine.decode_context_parallel_size",
    "prefill-context-parallel-size": "engine.prefill_context_parallel_size",
    "pcp": "engine.prefill_context_parallel_size", "all2all-backend": "engine.all2all_backend",
    "num-redundant-experts": "engine.num_redundant_experts",
}
"""Flags with a value, and the scenario's field."""

_SWITCHES = {
    "enable-expert-parallel": "engine.enable_expert_parallel", "ep": "engine.enable_expert_parallel",
    "enable-chunked-prefill": "engine.enable_chunked_prefill", "async-scheduling": "engine.async_scheduling",
    "enforce-eager": "engine.enforce_eager", "enable-prefix-caching": "engine.enable_prefix_caching",
    "enable-eplb": "engine.enable_eplb",
}
"""Flags without a value (`--no-` switches them off)."""

_PHYSICS = frozenset("""
    speculative-config speculative-model num-speculative-tokens spec-method spec-model spec-tokens enable-lora
    lora-modules cpu-offload-gb kv-transfer-config kv-offloading-size kv-cache-memory-bytes kv-cache-memory
    quantization max-num-partial-prefills max-long-partial-prefills long-prefill-token-threshold scheduler-cls
    num-scheduler-steps scheduler-delay-factor enable-dbo hf-overrides rope-scaling stream-interval runner
    task enable-sleep-mode disable-sliding-window preemption-mode swap-space cudagraph-capture-sizes
    compilation-config performance-mode optimization-level
""".split())
"""Flags that change when things happen and are not simulated."""

_PLAIN_SWITCHES = frozenset("""
    trust-remote-code disable-log-requests disable-log-stats enable-log-requests enable-auto-tool-choice
    disable-custom-all-reduce enable-prompt-tokens-details enable-server-load-tracking skip-tokenizer-init
    disable-uvicorn-access-log enable-request-id-headers disable-fastapi-docs return-tokens-as-token-ids
    enable-ssl-refresh language-model-only enable-reasoning headless
""".split())
"""Flags that take no value and play no part: what follows them may be the model."""

_HARMLESS = _PLAIN_SWITCHES | frozenset("""
    host port uds uvicorn-log-level allow-credentials allowed-origins allowed-methods allowed-headers api-key
    api-server-count chat-template chat-template-content-format default-chat-template-kwargs response-role ssl-keyfile
    ssl-certfile ssl-ca-certs ssl-cert-reqs root-path middleware tool-call-parser tool-parser-plugin tool-server
    log-config-file max-log-len enable-log-outputs served-model-name tokenizer tokenizer-mode tokenizer-revision
    revision code-revision download-dir load-format config-format hf-config-path hf-token seed allowed-local-media-path
    allowed-media-domains generation-config override-generation-config reasoning-parser reasoning-parser-plugin
    guided-decoding-backend structured-outputs-config logits-processors logits-processor-pattern max-logprobs
    logprobs-mode otlp-traces-endpoint collect-detailed-traces show-hidden-metrics-for-version kv-events-config
    distributed-executor-backend distributed-timeout-seconds worker-cls worker-extension-cls
    max-parallel-loading-workers ray-workers-use-nsight model-loader-extra-config ignore-patterns use-tqdm-on-load
    safetensors-load-strategy device data-parallel-address data-parallel-rpc-port data-parallel-backend
    limit-mm-per-prompt mm-processor-kwargs node-rank nnodes master-addr master-port h11-max-header-count
    h11-max-incomplete-event-size
""".split())
"""Flags, with or without a value, that change no timing."""

_HARMLESS_DEFAULTS = {
    "cpu-offload-gb": 0, "max-num-partial-prefills": 1, "max-long-partial-prefills": 1,
    "long-prefill-token-threshold": 0, "num-scheduler-steps": 1, "scheduler-delay-factor": 0,
    "stream-interval": 1, "task": "generate", "runner": "generate", "swap-space": None,
    "preemption-mode": "recompute",
}
"""Values of those flags at which they change nothing (None: no value does, in the V1 engine)."""

_KNOWN = (*_TAKEN, *_SWITCHES)

_QUANTIZED = {"fp8": "fp8", "awq": "int4", "awq_marlin": "int4", "gptq": "int4", "gptq_marlin": "int4",
              "mxfp4": "mxfp4", "modelopt": "fp8", "modelopt_fp4": "fp4"}
"""Values of --quantization, and the weight format."""

_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


_IMAGE = re.compile(r"(?:.*/)?vllm-openai(?:[:@].*)?")


class IgnoredFlagsWarning(UserWarning):
    """Flags of the command line that play no part in the simulation."""


def import_vllm(command: str, *, device: str, base: dict[str, Any] | None = None,
                preset: str = "vllm-v1") -> Scenario:
    """The scenario of a `vllm serve` command line (or of `python -m vllm.entrypoints.openai.api_server`).

    device: what it runs on, which the command line does not say. base: further fields of the scenario
    (workload, limits), nested as in the file; a Poisson workload of 1 request/s with the lengths of
    azure-conv-2023 if it has none. preset: the engine version imitated.

    Raises `InputError` for flags that change the physics and are not simulated; warns (`IgnoredFlagsWarning`)
    with the list of those it leaves out, and with another of those that are not known here.
    """
    words = _words(command)
    tree: dict[str, Any] = {"schema_version": 1, "workload": {"kind": "poisson", "rate_rps": 1.0},
                            **copy.deepcopy(base or {})}
    sections = {name: dict(tree.get(name, {})) for name in ("engine", "cluster")}
    sections["engine"].setdefault("preset", preset)
    model, ignored, unknown = None, [], []

    def named(word: str) -> str:
        if model is not None and word != model:
            raise InputError("vllm", word, f"is a second model beside {model!r}", "give one model")
        return word

    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("-"):
            model = named(word)
            continue
        flag, has_value, value = word.lstrip("-").partition("=")
        flag = {"O": "optimization-level", "q": "quantization"}.get(flag, flag.replace("_", "-"))
        is_off = flag.startswith("no-")
        switch = _SWITCHES.get(flag.removeprefix("no-"))
        if switch:
            text = words[index] if not has_value and index < len(words) else value
            if not has_value and text.lower() in ("true", "false"):
                index, value = index + 1, text
            section, field = switch.split(".")
            sections[section][field] = (value.lower() != "false") != is_off
            continue
        if flag in _PLAIN_SWITCHES:
            ignored.append(f"--{flag}")
            continue
        if not has_value and index < len(words) and not _is_flag(words[index]):
            value, has_value = words[index], True
            index += 1
        if flag == "model" or flag == "config":
            if not value:
                raise InputError(f"--{flag}", None, "has no value", "write it as in the vLLM command")
            if flag == "config":
                raise InputError("--config", value, "is a file of further flags, which is not read",
                                 "write its flags out on the command line")
            model = named(value)
        elif flag in _TAKEN:
            if not has_value:
                raise InputError(f"--{flag}", None, "has no value", "write it as in the vLLM command")
            section, field = _TAKEN[flag].split(".")
            if value not in ("auto", "-1"):
                sections[section][field] = _value(value)
        elif flag == "quantization" and value in _QUANTIZED:
            sections["engine"]["dtype"] = _QUANTIZED[value]
        elif flag in _PHYSICS:
            harmless = flag in _HARMLESS_DEFAULTS and _HARMLESS_DEFAULTS[flag] in (None, _value(value))
            if not harmless:
                raise InputError(f"--{flag}", value if has_value else True,
                                 "changes the timing and is not simulated",
                                 "remove it to simulate the engine without it")
        elif difflib.get_close_matches(flag, _KNOWN, n=1, cutoff=0.9):
            raise InputError(f"--{flag}", value if has_value else True, "is not a flag of vLLM",
                             suggest(flag, _KNOWN))
        elif flag.removeprefix("no-") in _HARMLESS:
            ignored.append(f"--{flag}")
        else:
            unknown.append(f"--{flag}")
    if model is None:
        raise InputError("vllm", command, "names no model", "write `vllm serve MODEL ...`")
    # The engine's own default; the simulator would refuse it spelled out.
    if sections["engine"].get("enable_prefix_caching") is None:
        ignored.append("prefix caching (on by default in vLLM, off here without --enable-prefix-caching)")
    tree["engine"] = sections["engine"]
    if sections["cluster"]:
        tree["cluster"] = sections["cluster"]
    is_file = model.endswith(".json") or os.path.isfile(os.path.join(model, "config.json"))
    tree["model"] = {"config": model} if is_file else {"name": model}
    tree["device"] = {"name": device}
    if ignored:
        warnings.warn("not part of the simulation: " + ", ".join(ignored), IgnoredFlagsWarning, stacklevel=2)
    if unknown:
        warnings.warn("not known here and left out (see that they do not change the timing): " + ", ".join(unknown),
                      IgnoredFlagsWarning, stacklevel=2)
    return Scenario.from_dict(tree)


def _words(command: str) -> list[str]:
    if not isinstance(command, str):
        raise InputError("vllm", command, "is not a command line", "write `vllm serve MODEL ...`")
    try:
        words = shlex.split(command.replace("\\\n", " "))
    except ValueError as error:
        raise InputError("vllm", command, f"cannot be split into words ({error})",
                         "check the quotes") from None
    # Environment settings, launchers and wrappers in front of the command.
    for start, word in enumerate(words):
        if word == "serve" and start and words[start - 1].rsplit("/", 1)[-1] == "vllm":
            return words[start + 1:]
        if word.startswith("vllm.entrypoints"):
            return words[start + 1:]
    for start, word in enumerate(words):
        # The entry point of the image is the server.
        if _IMAGE.fullmatch(word) and "run" in words[:start]:
            return words[start + 1:]
    raise InputError("vllm", command, "is not a vLLM server's command line", "write `vllm serve MODEL ...`")


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _value(text: str) -> Any:
    """A flag's value; human-readable integers (8k, 1.5K) as vLLM reads them."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG])", text)
    if found:
        return int(float(found.group(1)) * _SUFFIXES[found.group(2)])
    return parse_value(text)
