"""What is derived: the columns of a study's table by kind, and the step that suits each kind.

A central difference errs by the square of its step, and by noise over it. A mean of smooth latencies hardly feels noise
under common random numbers, so its step is small. A percentile, or the share of requests within a limit, changes by the
few requests that pass over it, so its step is larger.
"""

import math
import re
from collections.abc import Mapping, Sequence

from jaxsim._core.errors import InputError, suggest
from jaxsim.metrics import ABORTS, PERCENTILES, devices_of
from jaxsim.sensitivity import tenants
from jaxsim.spec.scenario import Scenario
from jaxsim.study.lanes import Lanes

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

_OF_FEATURES = {
    "outcomes": ("timed_out", "timed_out_share", "rejected", "rejected_share", "failed_share", "mean_attempts"),
    "outages": ("number", "down_share", "lost", "rerouted", "failed"),
    "fairness": ("jain_index", "max_service_gap"),
    "transfers": ("requests", "mean_ms", "p99_ms"),
    "migrations": ("total", "requests", *(f"{name}_downtime_ms" for name in ("mean", "p50", "p99")),
                   *(f"aborted_{cause}" for cause in ABORTS)),
    "scaling": ("instance_s", "mean_instances", "starts", "drains"),
    "role_switching": ("switches", "mean_drain_s"),
    "sessions": ("completed", "failed", "context_limited", "mean_turns", "mean_duration_s",
                 *(f"p{p}_duration_s" for p in PERCENTILES)),
    "swaps": ("total", "requests_share", "mean_ms", "e2e_share", "delay_share", "copied_blocks", "spared_share"),
    "loads": ("device_share", "loaded_share", "computed_share", "store_share", "load_s", "delay_share"),
    "cached_share": ()}
"""Of scenarios that have what these are about: names behind the dot."""

KNOWN = (*_ALWAYS, *(f"{group}.{name}" if name else group for group, names in _OF_FEATURES.items()
                     for name in names or ("",)))
"""Every column of a study's table that is a number."""

_VERDICTS = ("unstable", "fault", "slo.separate_p90")
_OF_LIMITS = re.compile(r"request_goodput|slo\.(|ttft_|tpot_|e2e_)attainment")
_BY_FEW = re.compile(r"(^|\.)(p\d+|median|std|max)_|request_goodput|attainment|kv\.peak_share|(least|most)_busy"
                     r"|^preemptions\.|^swaps\.|^outages\.|^migrations\.|^outcomes\.|^fairness\.|^scaling\."
                     r"|^role_switching\.|^(sessions\.)?(completed|failed)$|context_limited|^num_|num_iterations"
                     r"|^transfers\.requests|^total_\w+_tokens$|^tenants\..+\.(requests|completed|failed)$")


def kind(metric: str) -> str:
    """mean, or percentile: whatever few requests or events decide."""
    return "percentile" if _BY_FEW.search(metric) else "mean"


def steps_of(given: float | Mapping[str, float] | None) -> dict[str, float]:
    """Steps by kind of metric. Raises `InputError`."""
    if given is not None and not isinstance(given, (int, float, Mapping)):
        raise InputError("steps", given, "is no number, and no table of numbers by kind of metric",
                         "give e.g. 0.05, or {'mean': 0.03, 'percentile': 0.1}")
    steps = dict.fromkeys(STEPS, given) if isinstance(given, (int, float)) else STEPS | dict(given or {})
    for name, step in steps.items():
        if name not in STEPS:
            raise InputError("steps", name, "is no kind of metric", "kinds are " + " and ".join(STEPS))
        if isinstance(step, bool) or not isinstance(step, (int, float)) or not 1e-4 <= step <= 0.5:
            raise InputError("steps", step, "is not a share from 0.0001 to 0.5",
                             "steps of 0.03 for means and 0.1 for percentiles suit most")
    return steps


def default_metrics(scenarios: Sequence[Scenario], lanes: Lanes) -> list[str]:
    """A tail, a mean, and what a scenario has besides: limits, devices whose power is known, more than one token."""
    found = ["p99_ttft_ms", "mean_ttft_ms", "mean_tpot_ms", "request_goodput", "energy_j_per_output_token"]
    return [name for name in found if any(not missing(name, s, lanes) for s in scenarios)]


def missing(metric: str, scenario: Scenario, lanes: Lanes) -> str:
    """Why no run of a scenario can have a metric, as far as that is known before it is simulated; "" else."""
    if tenants.parts(metric):
        return tenants.missing(metric, scenario, lanes)
    group, _, name = metric.partition(".")
    shape = lanes.shape(scenario)
    if _OF_LIMITS.fullmatch(metric):
        kind = next((one for one in ("ttft", "tpot", "e2e") if metric == f"slo.{one}_attainment"), None)
        if not _has_limits(scenario, kind):
            return f"the scenario has no limits{f' of {kind}' if kind else ''}"
    if re.search(r"_(tpot|itl)_ms$", metric) and shape.longest_output <= 1:
        return "every answer is one token, behind which there is no gap"
    if re.search(r"energy|power|usd", metric):
        devices = devices_of(scenario, shape.dims.all_ranks)
        numbers = (devices.usd_per_s,) if "usd" in metric else (devices.idle_w, devices.busy_w)
        if any(math.isnan(x) for column in numbers for x in column):
            return "no price of the device is known" if "usd" in metric else "the power of the device is not known"
    if group in _OF_FEATURES and not _has_feature(group, name, scenario, lanes):
        return "the scenario has nothing that it is about"
    return ""


def _has_feature(group: str, name: str, s: Scenario, lanes: Lanes) -> bool:
    dims, workload = lanes.shape(s).dims, lanes.workload(s, s.seeds[0])
    if group == "loads" and name == "store_share":
        return s.cluster.remote_store is not None
    return bool({
        "outcomes": dims.has_clients, "outages": dims.has_failures, "fairness": len(workload.tenant_names) > 1,
        "transfers": dims.has_roles or dims.has_parts, "migrations": dims.has_migration, "scaling": dims.has_scaling,
        "role_switching": dims.has_role_switching, "sessions": workload.session is not None,
        "swaps": dims.swap_window > 0, "cached_share": s.engine.enable_prefix_caching,
        "loads": s.engine.offload or s.engine.context_reuse or s.cluster.remote_store}[group])


def _has_limits(scenario: Scenario, kind: str | None = None) -> bool:
    """Of a kind (ttft, tpot, e2e), or any."""
    of = {"ttft": ("ttft_ms", "ttft_ms"), "tpot": ("tpot_ms", "tpot_ms"), "e2e": ("e2e_ms", "deadline_ms")}
    pairs = of.values() if kind is None else [of[kind]]
    return any(getattr(scenario.slo, common) is not None
               or any(getattr(t, own) is not None for t in scenario.workload.tenants) for common, own in pairs)


def chosen(scenarios: Sequence[Scenario], of: str | Sequence[str] | None, lanes: Lanes) -> list[str]:
    """The metrics that are asked for, each of which some scenario can have. Raises `InputError`."""
    if of is None:
        return default_metrics(scenarios, lanes)
    asked = [of] if isinstance(of, str) else list(of)
    if not asked:
        raise InputError("of", asked, "names nothing", "name metrics of docs/results.md, e.g. p99_ttft_ms")
    for name in asked:
        if name in _VERDICTS:
            raise InputError("of", name, "is a verdict, not a number",
                             "ask for a number it rests on, e.g. slo.attainment, p99_ttft_ms")
        if not isinstance(name, str) or (name not in KNOWN and not tenants.parts(name)):
            raise InputError("of", name, "is no metric of a run",
                             suggest(name, KNOWN, "they are those of docs/results.md, e.g. p99_ttft_ms"))
        reasons = [missing(name, s, lanes) for s in scenarios]
        if all(reasons):
            limits = "give it some, e.g. --set slo.ttft_ms=500, or ask for p99_ttft_ms"
            raise InputError("of", name, f"is not computed: {reasons[0]}",
                             limits if _OF_LIMITS.fullmatch(name) else
                             "ask for a metric that `jaxsim run` shows of this scenario")
    return list(dict.fromkeys(asked))
