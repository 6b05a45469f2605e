"""Rules of several partly computed prompts side by side, and of the orders that go by their work."""

from typing import TYPE_CHECKING

from jaxsim._core.errors import InputError
from jaxsim.spec.presets import Scheduler
from jaxsim.spec.rules.schedulers import scheduler_of

if TYPE_CHECKING:
    from jaxsim.spec.scenario import Scenario

MOST = 4
"""Partly computed prompts of an engine."""

FIELD = "engine.max_num_partial_prefills"

DEADLINES = ("edf", "lrs", "lars")
"""Orders, side by side, that go by deadlines."""

_OWN = ("max_long_partial_prefills", "long_prompt_tokens", "deadline_work_factor", "prefill_window")


def check_partial_prefills(s: "Scenario", reads_loads: bool = False) -> None:
    """reads_loads: a router that is no name here does. Raises `InputError`."""
    engine, scheduler = s.engine, scheduler_of(s.engine)
    count, order = scheduler.max_num_partial_prefills, scheduler.order
    if count == 1:
        for name in (*_OWN, "most_relative_slack"):
            if getattr(engine, name) is not None:
                raise InputError(f"engine.{name}", getattr(engine, name),
                                 "has no effect with one partly computed prompt at a time",
                                 f"leave it out, or give {FIELD} of 2 to {MOST}")
        if order in ("lrs", "lars"):
            raise InputError("engine.scheduling_policy", order, "chooses among prompts that are partly computed",
                             f"give {FIELD} of 2 to {MOST}, or use 'edf'")
        return
    _check_engine(s, scheduler)
    if reads_loads or s.cluster.router in ("llumnix_load", "remaining_steps"):
        raise InputError("cluster.router", s.cluster.router,
                         f"goes by what the first of a queue needs, and with {FIELD} nobody is the first",
                         "use 'least_outstanding' or 'least_kv'")
    _check_deadlines(s, order)


def _check_engine(s: "Scenario", scheduler: Scheduler) -> None:
    engine, count, order = s.engine, scheduler.max_num_partial_prefills, scheduler.order
    for name, value, is_wrong, problem, remedy in (
            (FIELD, count, count > MOST, f"is more than the {MOST} that are simulated", f"give at most {MOST}"),
            (FIELD, count, not scheduler.chunked_prefill, "has no effect where prompts are not chunked",
             "set engine.enable_chunked_prefill = true, or leave it out"),
            ("engine.target_batch_time_ms", None, engine.target_batch_time_ms is None,
             f"missing, and prompts of {FIELD} share the time of an iteration", "give it"),
            ("engine.scheduling_policy", order, order not in ("fcfs", *DEADLINES),
             f"is not simulated with {FIELD}", "use 'lars', 'lrs', 'edf' or 'fcfs'"),
            ("engine.reserve", scheduler.reserve, scheduler.reserve not in ("max_tokens", "max_model_len"),
             f"is not simulated with {FIELD}: nobody is preempted there",
             "set engine.reserve = 'max_tokens' (and engine.decode_needs_free_block = 'crossing')"),
            ("engine.async_scheduling", True, scheduler.async_scheduling, f"is not simulated with {FIELD}",
             "set it to false"),
            ("engine.max_long_partial_prefills", engine.max_long_partial_prefills,
             (engine.max_long_partial_prefills or 1) > count, f"is more than {FIELD} = {count}", "lower it"),
            ("workload.kind", s.workload.kind, s.workload.kind == "closed-loop" or s.workload.has_sessions,
             f"has arrivals that are results, which is not simulated with {FIELD}", "use an open loop")):
        if is_wrong:
            raise InputError(name, value, problem, remedy)


def _check_deadlines(s: "Scenario", order: str) -> None:
    # Of the earliest deadline `check_engine` knows.
    if order in ("lrs", "lars") and s.engine.deadline_work_factor is None and s.workload.kind != "trace":
        own = [t.deadline_ms or t.ttft_ms for t in s.workload.tenants] or [None]
        if None in own and s.slo.e2e_ms is None and s.slo.ttft_ms is None:
            raise InputError("engine.deadline_work_factor", None,
                             f"missing, and scheduling_policy = {order!r} goes by deadlines",
                             "give it, or slo.ttft_ms, or both")
