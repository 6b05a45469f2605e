"""Whole steps of real systems, and what the roofline says of them: `python -m tests.cost.steps` prints both."""

from typing import NamedTuple

from jaxsim.cost.base import BatchStats
from jaxsim.cost.roofline import roofline
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan


class Step(NamedTuple):
    """One iteration: `batch` decodes of `context` tokens each, or a prompt of `prompt` tokens.

    group: of the same system and source; within: relative error allowed; device_only: without the host; outside_ms: of
    the measured time, outside the step.
    """

    group: str
    model: str
    device: str
    measured_ms: float
    within: float
    batch: int = 0
    context: int = 0
    prompt: int = 0
    tensor_ranks: int = 1
    dtype: str = "bfloat16"
    host: str = "vllm-v1"
    all_reduce: str = "custom"
    moe_backend: str = "auto"
    is_async: bool = False
    device_only: bool = False
    outside_ms: float = 0.0

    @property
    def simulated_ms(self) -> float:
        """Of the step, and what is outside it."""
        cost = roofline(load_model(self.model), load_device(self.device), Plan(tensor_parallel_size=self.tensor_ranks),
                        self.dtype, host=self.host, all_reduce=self.all_reduce, moe_backend=self.moe_backend)
        stats = (BatchStats.of(num_prefill=1, prefill_tokens=self.prompt, prefill_context=self.prompt,
                               prefill_pairs=float(self.prompt) ** 2) if self.prompt
                 else BatchStats.of(self.batch, self.batch * self.context))
        step = cost.explain(stats, async_scheduling=self.is_async)
        return 1e3 * (step.device_s if self.device_only else step.seconds) + self.outside_ms

    @property
    def error(self) -> float:
        """Simulated over measured, less one."""
        return self.simulated_ms / self.measured_ms - 1

    def __str__(self) -> str:
        size = f"prompt of {self.prompt:,}" if self.prompt else f"{self.batch} x {self.context:,}"
        ranks = f" TP {self.tensor_ranks}" if self.tensor_ranks > 1 else ""
        return f"{self.group}: {self.model}, {self.device}{ranks}, {size}"


def _many(rows, **common) -> list[Step]:
    return [Step(**common, **row) for row in rows]


RTX_LAYERS = "LLMServingSim, sum of layers of vLLM 0.19, device only"
APEX = "apex_plus, vLLM 0.6"
STAGES = "inference-sim, vLLM 0.15"
MLENERGY = "ML.ENERGY, vLLM 0.11"
INFERENCEX = "InferenceX, vLLM 0.18"

STEPS = [
    Step(RTX_LAYERS, "llama-3.1-8b", "rtx_pro_6000", 11.3, 0.06, batch=1, context=100, device_only=True),
    Step(RTX_LAYERS, "llama-3.1-8b", "rtx_pro_6000", 27.3, 0.06, batch=128, context=1200, device_only=True),
    # Products of that generation of software ran 15 % slower than those of vLLM 0.19, whose tables the constants are of
    # (Vidur's tables against aiconfigurator's).
    Step(APEX, "llama-3.1-70b", "h100", 373, 0.15, prompt=3017, tensor_ranks=2, host="vllm-v0", outside_ms=13),
    # Chat at 0.25 requests/s; the scripts disable the custom all-reduce for 2 ranks.
    *_many([dict(tensor_ranks=2, all_reduce="nccl", measured_ms=31.8), dict(tensor_ranks=4, measured_ms=20.1),
            dict(tensor_ranks=8, measured_ms=13.83)], group=APEX, model="llama-3.1-70b", device="h100", batch=1,
           context=150, host="vllm-v0", within=0.06),
    # Mean time per output token; batch = rate x end-to-end time.
    *_many([dict(model=model, device=device, tensor_ranks=ranks, batch=batch, context=context, measured_ms=ms)
            for model, device, ranks, batch, context, ms in (
                ("llama-2-7b", "h100", 1, 9, 715, 7.23), ("llama-2-7b", "h100", 1, 22, 715, 8.89),
                ("llama-2-7b", "h100", 1, 17, 1758, 11.75), ("llama-3.1-8b", "h100", 1, 15, 671, 7.50),
                ("llama-3.1-8b", "h100", 1, 45, 671, 8.95), ("qwen3-14b", "h100", 1, 8, 671, 12.06),
                ("mistral-nemo", "h100", 1, 12, 690, 9.83), ("mistral-nemo", "h100", 2, 4, 671, 5.97),
                ("codellama-34b", "h100", 2, 9, 671, 13.95), ("mixtral-8x7b", "h100", 2, 38, 671, 19.17),
                ("llama-3.1-8b", "a100", 1, 8, 671, 12.25), ("codellama-34b", "a100", 2, 16, 671, 26.34))],
           group=STAGES, is_async=True, within=0.12),
    # Median inter-token time.
    *_many([dict(batch=batch, measured_ms=ms) for batch, ms in ((8, 12.85), (16, 17.55), (32, 22.57), (64, 28.94))],
           group=MLENERGY, model="qwen3-30b-a3b", device="h100", context=560, within=0.1),
    # Time per output token at 1,024 tokens in and out, prompts between the decodes included; its runs set
    # VLLM_MXFP4_USE_MARLIN.
    *_many([dict(batch=batch, measured_ms=ms) for batch, ms in ((4, 5.03), (16, 8.18), (64, 14.83))], group=INFERENCEX,
           model="gpt-oss-120b", device="h100", tensor_ranks=2, dtype="auto", context=1380, is_async=True,
           moe_backend="marlin", within=0.2),
]


if __name__ == "__main__":
    for step in STEPS:
        print(f"{step}: {step.measured_ms:g} ms, {step.simulated_ms:.1f} ms, {100 * step.error:+.0f} %")
