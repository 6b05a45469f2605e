"""What is derived: the columns of a study's table by kind, and the step that suits each kind.

A central difference errs by the square of its step, and by noise over it. A mean of smooth latencies hardly feels noise
under common random numbers, so its step is small. A percentile, or the share of requests within a limit, changes by the
few requests that pass over it, so its step is larger.
"""

import re
from collections.abc import Mapping, Sequence

from jaxsim._core.errors import InputError, suggest
from jaxsim.metrics import PERCENTILES
from jaxsim.spec.scenario import Scenario

STEPS = {"mean": 0.03, "percentile": 0.10}
"""Of the logarithm of a parameter, by kind of metric. Source: DESIGN, section 7."""

_LATENCIES = ("ttft", "tpot", "itl", "e2el")
_STATISTICS = ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))
_ALWAYS = (
    "duration", "window_s", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
    "request_goodput", "output_throughput", "total_token_throughput",
    *(f"{statistic}_{latency}_ms" for latency in _LATENCIES for statistic in _STATISTICS),
    "slo.attainment", "slo.ttft_attainment", "slo.tpot_attainment", "slo.e2e_attainment",
    *(f"queueing.{name}_ms" for name in ("mean", "std", *(f"p{p}" for p in PERCENTILES), "max")),
    "preemptions.total", "preemptions.requests_share", "preemptions.mean_stall_ms",
    "kv.num_blocks", "kv.mean_share", "kv.peak_share", "utilisation.busy_share", "utilisation.device_busy_share",
    "utilisation.least_busy_share", "utilisation.most_busy_share", "utilisation.mean_running",
    "utilisation.num_iterations", "num_requests", "num_warmup_requests", "num_cooldown_requests", "num_devices",
    "output_throughput_per_device", "usd_per_million_output_tokens", "mean_power_w", "energy_j", "energy_wh",
    "energy_j_per_output_token")
"""Of every scenario, with or without a value."""

_OF_FEATURES = ("outcomes.", "outages.", "fairness.", "transfers.", "migrations.", "scaling.", "role_switching.",
                "sessions.", "swaps.", "loads.", "cached_share")
"""Of scenarios that have what these are about."""

_VERDICTS = ("unstable", "fault", "slo.separate_p90")
_OF_LIMITS = re.compile(r"request_goodput|slo\.(|ttft_|tpot_|e2e_)attainment")
_BY_FEW = re.compile(r"(^|\.)(p\d+|median|std|max)_|request_goodput|attainment|kv\.peak_share|(least|most)_busy"
                     r"|^preemptions\.|^swaps\.|^outages\.|^migrations\.|^outcomes\.|^fairness\.|^scaling\.")


def kind(metric: str) -> str:
    """mean, or percentile: whatever few requests or events decide."""
    return "percentile" if _BY_FEW.search(metric) else "mean"


def steps_of(given: float | Mapping[str, float] | None) -> dict[str, float]:
    """Steps by kind of metric. Raises `InputError`."""
    steps = dict.fromkeys(STEPS, given) if isinstance(given, (int, float)) else STEPS | dict(given or {})
    for name, step in steps.items():
        if name not in STEPS:
            raise InputError("steps", name, "is no kind of metric", "kinds are " + " and ".join(STEPS))
        if isinstance(step, bool) or not isinstance(step, (int, float)) or not 1e-4 <= step <= 0.5:
            raise InputError("steps", step, "is not a share from 0.0001 to 0.5",
                             "steps of 0.03 for means and 0.1 for percentiles suit most")
    return steps


def default_metrics(scenario: Scenario) -> list[str]:
    """A tail, a mean, and what the scenario has besides: limits, a device whose power is known."""
    found = ["p99_ttft_ms", "mean_ttft_ms", "mean_tpot_ms"]
    if _has_limits(scenario):
        found.append("request_goodput")
    spec = None
    try:
        spec = scenario.device and scenario.device.spec()
    except InputError:
        # A fitted cost needs no device, so the one named may be in no catalogue.
        pass
    if spec is not None and spec.power is not None:
        found.append("energy_j_per_output_token")
    return found


def _has_limits(scenario: Scenario) -> bool:
    slo = scenario.slo
    own = [getattr(t, name) for t in scenario.workload.tenants for name in ("ttft_ms", "tpot_ms", "deadline_ms")]
    return any(limit is not None for limit in (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms, *own))


def chosen(scenarios: Sequence[Scenario], of: str | Sequence[str] | None) -> list[str]:
    """The metrics that are asked for. Raises `InputError`."""
    if of is None:
        return default_metrics(scenarios[0])
    asked = [of] if isinstance(of, str) else list(of)
    if not asked:
        raise InputError("of", asked, "names nothing", "name metrics of docs/results.md, e.g. p99_ttft_ms")
    for name in asked:
        if name in _VERDICTS:
            raise InputError("of", name, "is a verdict, not a number",
                             "ask for a number it rests on, e.g. slo.attainment, p99_ttft_ms")
        if not isinstance(name, str) or not (name in _ALWAYS or name.startswith(_OF_FEATURES)):
            raise InputError("of", name, "is no metric of a run",
                             suggest(name, _ALWAYS, "they are those of docs/results.md, e.g. p99_ttft_ms"))
        if _OF_LIMITS.fullmatch(name) and not any(_has_limits(s) for s in scenarios):
            raise InputError("of", name, "is not computed: the scenario has no limits",
                             "give it some, e.g. --set slo.ttft_ms=500, or ask for p99_ttft_ms")
    return list(dict.fromkeys(asked))
