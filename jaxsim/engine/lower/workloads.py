"""The requests of a run: drawn or read, in the order that the scheduler goes by, with their images."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxsim._core.errors import InputError
from jaxsim.engine.lower.systems import System
from jaxsim.policy.slack import LATEST_DUE_MS
from jaxsim.spec.scenario import Scenario
from jaxsim.spec.workload import WorkloadSection
from jaxsim.traces import read_lengths, read_trace
from jaxsim.workload.generator import Tenant
from jaxsim.workload.lengths import Paired
from jaxsim.workload.named import generator
from jaxsim.workload.predictions import with_predictions
from jaxsim.workload.streams import Stream, stream_key, uniforms
from jaxsim.workload.variants import with_variants
from jaxsim.workload.workload import Workload


def make_workload(scenario: Scenario, seed: int) -> Workload:
    """Draw or read the requests of one run."""
    return ordered(scenario, _make_workload(scenario, seed), seed)


def ordered(scenario: Scenario, workload: Workload, seed: int) -> Workload:
    """With what the order of the waiting queue goes by: predicted outputs, limits; and with the variant that each is
    for, where instances serve several. Raises `InputError`."""
    order, prediction = scenario.engine.scheduling_policy, scenario.workload.prediction
    if scenario.cluster.variants is not None:
        workload = with_variants(workload, scenario.cluster.variants, seed)
    if prediction is not None:
        workload = with_predictions(workload, prediction.sigma, seed)
    if order in ("sjf", "least_slack") and workload.predicted_tokens is None:
        raise InputError("workload.prediction", None, f"missing, and the trace has no predicted_tokens for {order!r}",
                         "give e.g. { sigma = 0.0 } for exact predictions of output lengths")
    if order not in ("edf", "least_slack", "lrs", "lars"):
        return workload
    limits_ms = limits_of(scenario, workload.tenant_names)
    if scenario.engine.deadline_work_factor is not None:
        # Beside what goes with their work.
        limits_ms = [limit or 0.0 for limit in limits_ms]
    if None in limits_ms:
        raise InputError("workload.tenants", workload.tenant_names[limits_ms.index(None)],
                         f"has no limit, and scheduling_policy = {order!r} goes by deadlines",
                         "give its deadline_ms or ttft_ms, or those of [slo]")
    limit_s = np.array(limits_ms)[workload.tenant] / 1e3
    if order == "least_slack" and not 1e3 * (workload.arrival_s + limit_s).max() < LATEST_DUE_MS:
        raise InputError("engine.scheduling_policy", order, f"ranks deadlines up to {LATEST_DUE_MS / 1e3:,.0f} s only",
                         "raise the rate, or simulate in parts")
    return dataclasses.replace(workload, limit_s=limit_s)


def limits_of(scenario: Scenario, names: Sequence[str]) -> list[float | None]:
    """Of tenants, in ms from arrival to when a request is due: that of the last token before that of the first one, the
    tenant's own before that of all. Prompts side by side are ranked by what is left of their prefill, so there it is
    that of the first token, the tenant's own or that of all, and only without it that of the last."""
    own, slo = {t.name: t for t in scenario.workload.tenants}, scenario.slo

    def limit(name: str) -> float | None:
        tenant = own.get(name)
        first, last = (tenant.ttft_ms, tenant.deadline_ms) if tenant else (None, None)
        if (scenario.engine.max_num_partial_prefills or 1) > 1:
            return first or slo.ttft_ms or last or slo.e2e_ms
        return last or first or slo.e2e_ms or slo.ttft_ms

    return [limit(name) for name in names]


def _make_workload(scenario: Scenario, seed: int) -> Workload:
    w = scenario.workload
    tenants = tuple(Tenant(t.name, t.share, t.priority) for t in w.tenants)
    if w.kind == "trace":
        return read_trace(w.trace, w.format, seed=seed, **w.trace_options())
    arguments = w.generator_arguments()
    if tenants:
        arguments["tenants"] = tenants
    if w.lengths_from is not None:
        arguments["lengths"] = Paired(*read_lengths(w.lengths_from))
    return with_images(generator(**arguments).sample(seed, scenario.num_requests), w, seed)


def with_images(workload: Workload, section: WorkloadSection, seed: int) -> Workload:
    """The same with the images of the section, which are in front of the text of a prompt."""
    images = section.images
    if images is None:
        return workload
    least, most = images.range
    draws = uniforms(stream_key(seed, Stream.IMAGES), len(workload), 2)[:, 0]
    number = np.minimum(least + (draws * (most - least + 1)).astype(np.int64), most)
    tokens = number * images.tiles_per_image * images.tokens_per_tile
    return dataclasses.replace(workload, input_tokens=workload.input_tokens + tokens, num_images=number,
                               tiles_per_image=images.tiles_per_image)


def is_split(scenario: Scenario) -> bool:
    """Whether the images of a request are encoded apart."""
    return scenario.cluster.encode is None or scenario.cluster.encode.split_images


def parts_of(workload: Workload, is_split: bool) -> tuple[Int[np.ndarray, " parts"], Int[np.ndarray, " parts"]]:
    """Of each part of the images of a request, whose it is and its tiles."""
    number = workload.num_images
    count = number if is_split else np.minimum(number, 1)
    whose = np.repeat(np.arange(len(workload)), count)
    return whose, (np.ones_like(number) if is_split else number)[whose] * workload.tiles_per_image


def num_rows(scenario: Scenario, system: System, workload: Workload) -> int:
    """Requests, and the parts of images that others encode."""
    return len(workload) + (len(parts_of(workload, is_split(scenario))[0]) if system.has_parts else 0)


MAX_STEPS_A_TOKEN = 4
"""A run that takes more steps than this for every token of its workload is going in circles."""


ANY_STEPS = 1_000
"""Steps that every run is granted, whatever its tokens."""

WATCHED_S = 3600.0
"""Seconds for which controllers are granted their looks behind the last arrival, beside as long as requests came."""


def step_limit(workload: Workload, num_ranks: int = 1) -> int:
    """Steps after which a run is stopped; ranks that iterate together take turns."""
    tokens = int(workload.input_tokens.sum()) + int(workload.output_tokens.sum())
    if workload.num_images is not None:
        # Steps of the parts: dealt, begun, ended, accepted, delivered.
        tokens += 8 * int(workload.num_images.sum())
    return int(min(ANY_STEPS + MAX_STEPS_A_TOKEN * tokens * num_ranks, 2**31 - 1))
