"""Rules of [cluster]: pools, roles that change, migration, failures."""

from typing import TYPE_CHECKING

from jaxsim._core.errors import InputError
from jaxsim.spec.presets import Scheduler
from jaxsim.spec.rules.schedulers import scheduler_of
from jaxsim.spec.values import plain

if TYPE_CHECKING:
    from jaxsim.spec.scenario import Scenario

MAX_OUTAGES = 4096
"""Of all engines of a run, about."""

_OF_ONE_KIND = {"target_batch_time_ms": None, "kv_parallel_size": 1, "kv_parallel_tokens": None,
                "max_num_partial_prefills": None,
                "prefill_context_parallel_size": 1, "decode_context_parallel_size": 1}
"""Fields of an engine that no pool has of its own, and what they are where nobody gives them."""


def check_pools(s: "Scenario") -> None:
    """Pools and what they hand over. Raises `InputError`."""
    cluster = s.cluster
    if not cluster.pools:
        if cluster.transfer is not None:
            raise InputError("cluster.transfer", plain(cluster.transfer), "has no effect without [[cluster.pools]]",
                             "add pools of role 'prefill' and 'decode', or leave it out")
        return
    if cluster.replicas != 1:
        raise InputError("cluster.replicas", cluster.replicas, "given beside [[cluster.pools]]",
                         "give cluster.pools[k].replicas")
    roles = {pool.role for pool in cluster.pools}
    if roles in ({"encode"}, {"encode", "decode"}):
        raise InputError("cluster.pools", sorted(roles), "compute no prompts", "add one of role 'prefill' or 'mixed'")
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if cluster.has_roles and getattr(s.engine, name) > 1:
            raise InputError(f"engine.{name}", getattr(s.engine, name), "is not simulated with prefill and decode"
                             " engines: what they hand over is cut by tensor-parallel ranks alone",
                             "use 1, or cluster.replicas")
    for index, pool in enumerate(cluster.pools):
        lacking = {"prefill": "decode", "decode": "prefill"}.get(pool.role)
        if lacking is not None and lacking not in roles:
            cannot = "nobody would compute its prompts" if lacking == "prefill" else "nobody would go on after them"
            raise InputError(f"cluster.pools[{index}].role", pool.role, f"without a pool of role {lacking!r} {cannot}",
                             f"add one of role {lacking!r}, or use 'mixed'")
        for name, without in _OF_ONE_KIND.items():
            if pool.engine.get(name, without) != without:
                raise InputError(f"cluster.pools[{index}].engine.{name}", pool.engine[name], "is not simulated in"
                                 " pools", "leave it out, or use cluster.replicas and engine." + name)
        try:
            s.of_pool(index)
        except InputError as error:
            section = "device" if error.field.startswith("device") else error.field
            own = {f"engine.{name}" for name in pool.engine} | ({"device"} if pool.device is not None else set())
            if section not in own and (not own or section.startswith("workload.")):
                raise
            # What a pool says, and what does not go together with it.
            where = f"cluster.pools[{index}]" + ("." if section in own else ": ")
            raise InputError(where + section, error.value, error.problem, error.remedy) from None
    if cluster.transfer is not None and not cluster.has_roles:
        raise InputError("cluster.transfer", plain(cluster.transfer), "has no effect where all pools are mixed",
                         "leave it out, or use roles 'prefill' and 'decode'")
    if cluster.transfer is not None and cluster.transfer.hand_over == "push":
        share = cluster.transfer.waiting_block_share
        if share is not None:
            raise InputError("cluster.transfer.waiting_block_share", share, "has no effect with hand_over = 'push'",
                             "leave it out, or use 'pull'")
    if cluster.transfer is not None and cluster.transfer.discipline != "fifo" and cluster.encode is not None:
        raise InputError("cluster.transfer.discipline", cluster.transfer.discipline,
                         "is not simulated where engines encode images", "use 'fifo'")
    if cluster.transfer is not None and cluster.transfer.most_at_once and cluster.transfer.discipline == "fifo":
        raise InputError("cluster.transfer.most_at_once", cluster.transfer.most_at_once,
                         "has no effect with discipline = 'fifo'", "leave it out, or use 'fair'")


def check_role_switching(s: "Scenario", reads_loads: bool = False) -> None:
    """Engines that change roles. reads_loads: a router that is no name here does. Raises `InputError`."""
    given, cluster = s.cluster.role_switching, s.cluster
    if given is None:
        return
    where, scheduler = "cluster.role_switching", scheduler_of(s.engine)
    roles = [pool.role for pool in cluster.pools]
    if not cluster.has_roles:
        raise InputError(where, plain(given), "has no effect without engines of different roles",
                         "add [[cluster.pools]] of role 'prefill' and 'decode', or leave it out")
    for index, pool in enumerate(cluster.pools):
        at = f"cluster.pools[{index}]"
        if pool.role == "mixed":
            raise InputError(f"{at}.role", "mixed", f"is not simulated with [{where}]",
                             "use roles 'encode', 'prefill' and 'decode'")
        if roles.index(pool.role) != index:
            raise InputError(f"{at}.role", pool.role, f"is that of another pool, which is not simulated with [{where}]:"
                             " an engine has the settings of its role", "put their replicas together")
        if pool.device is not None:
            raise InputError(f"{at}.device", pool.device, f"is not simulated with [{where}], since engines keep their"
                             " devices", "use one [device] for all")
        degree = pool.engine.get("tensor_parallel_size", s.engine.tensor_parallel_size)
        first = cluster.pools[0].engine.get("tensor_parallel_size", s.engine.tensor_parallel_size)
        if degree != first:
            raise InputError(f"{at}.engine.tensor_parallel_size", degree,
                             f"differs from the first pool's, {first}, and engines keep their devices",
                             "give all the same")
    if max(pool.replicas for pool in cluster.pools) == 1:
        raise InputError("cluster.pools", roles, f"have one engine each, so [{where}] leaves nobody to move",
                         "give one of them more replicas, or leave it out")
    if given.deal_anew and "encode" not in roles:
        raise InputError(f"{where}.deal_anew", True, "has no effect without a pool of role 'encode'", "leave it out")
    if given.decide_s < given.sample_s:
        raise InputError(f"{where}.decide_s", given.decide_s, f"is below sample_s = {given.sample_s:g}: decisions would"
                         " have nothing to look at", "raise it, or lower sample_s")
    if s.workload.images is not None and "encode" not in roles:
        raise InputError("workload.images", plain(s.workload.images), f"are not simulated with [{where}] and encoders"
                         " beside the model", "add a pool of role 'encode', or leave them out")
    if s.workload.kind == "closed-loop" or s.workload.has_sessions:
        raise InputError("workload.kind", s.workload.kind, f"is not simulated with [{where}] where answers bring"
                         " requests about", "use an open loop")
    if reads_loads or cluster.router in ("llumnix_load", "remaining_steps"):
        raise InputError("cluster.router", cluster.router, f"is not simulated with [{where}]",
                         "use 'least_outstanding'")
    for name, value, is_wrong, remedy in (
            ("preset", scheduler.preset, not scheduler.kv_accounting or scheduler.phase_mix != "unified",
             "use preset 'vllm-v1@0.9', or 'sarathi'"),
            ("async_scheduling", True, scheduler.async_scheduling, "set it to false, or use preset 'vllm-v1@0.9'")):
        if is_wrong:
            raise InputError(f"engine.{name}", value, f"is not simulated with [{where}]", remedy)


def check_migration(s: "Scenario", reads_loads: bool = False) -> None:
    """Live migration, scaling, and routers that read loads. reads_loads: one that is no name here does. Raises
    `InputError`."""
    cluster, workload, engine = s.cluster, s.workload, s.engine
    moving = next((name for name in ("migration", "scaling") if getattr(cluster, name) is not None), None)
    is_freeness = cluster.migration is not None and cluster.migration.metric == "freeness"
    if cluster.headroom_blocks is not None and cluster.router != "llumnix_load" and not is_freeness:
        raise InputError("cluster.headroom_blocks", cluster.headroom_blocks, "has no effect: nobody asks for freeness",
                         "use router = 'llumnix_load' or migration.metric = 'freeness', or leave it out")
    reads_loads = reads_loads or cluster.router in ("llumnix_load", "remaining_steps")
    if cluster.transfer is not None and cluster.transfer.router in ("llumnix_load", "remaining_steps"):
        raise InputError("cluster.transfer.router", cluster.transfer.router, "is not simulated for decode engines",
                         "use 'least_kv' or 'least_outstanding'")
    if moving is None and not reads_loads:
        return
    where = f"cluster.{moving}" if moving else "cluster.router"
    value = plain(getattr(cluster, moving)) if moving else cluster.router
    scheduler = scheduler_of(engine)
    if scheduler.order != "fcfs" and (scheduler.order in ("vtc", "least_slack") or scheduler.victim != "last_admitted"):
        raise InputError("engine.scheduling_policy", scheduler.order,
                         f"is not simulated with {where} where it says who is preempted too",
                         "use 'fcfs', or 'priority' with engine.victim = 'last_admitted'")
    if not scheduler.kv_accounting:
        raise InputError(where, value, f"reads KV memory, of which {scheduler.preset} keeps no account",
                         "use a preset 'vllm-v1'")
    impatient = [t.name for t in workload.tenants if (t.deadline_s, t.first_token_deadline_s) != (None, None)]
    others = (("workload.images", workload.images), ("engine.swap", engine.swap),
              ("workload.client", workload.client if workload.has_deadlines else None),
              ("workload.tenants", impatient or None), ("cluster.admission", cluster.admission))
    for field, given in others:
        if given is not None:
            raise InputError(field, plain(given), f"is not simulated with {where}", "leave one of them out")
    if moving is None:
        return
    if cluster.pools:
        raise InputError(where, value, "is not simulated with [[cluster.pools]]", "use cluster.replicas")
    if cluster.replicas < 2:
        raise InputError("cluster.replicas", cluster.replicas, f"leaves {where} nothing to do",
                         f"use 2 or more, or leave [{where}] out")
    for field, given, is_wrong, remedy in (
            ("data_parallel_size", engine.data_parallel_size, engine.data_parallel_size > 1,
             "use 1, and more replicas for a dense model"),
            ("pipeline_parallel_size", engine.pipeline_parallel_size, engine.pipeline_parallel_size > 1, "use 1"),
            ("enable_prefix_caching", True, engine.enable_prefix_caching, "set it to false"),
            ("async_scheduling", True, scheduler.async_scheduling, "set it to false, or use preset 'vllm-v1@0.9'"),
            ("preset", scheduler.preset, scheduler.phase_mix != "unified" or scheduler.gathers
             or scheduler.reserve not in ("none", "prompt") or scheduler.admit != "any_time",
             "use preset 'vllm-v1@0.9', or 'sarathi'")):
        if is_wrong:
            raise InputError(f"engine.{field}", given, f"is not simulated with [{where}]", remedy)
    if workload.kind == "closed-loop" or workload.has_sessions or workload.replay == "sessions":
        raise InputError("workload.kind", workload.kind, f"is not simulated with [{where}] where answers bring requests"
                         " about", "use an open loop")
    if cluster.scaling is not None:
        fewest = cluster.scaling.min_replicas
        if fewest > cluster.replicas:
            raise InputError("cluster.scaling.min_replicas", fewest,
                             f"is more than cluster.replicas = {cluster.replicas}",
                             "lower it, or raise cluster.replicas")
        if cluster.scaling.out_below > cluster.scaling.in_above:
            raise InputError("cluster.scaling.out_below", cluster.scaling.out_below,
                             f"is above in_above = {cluster.scaling.in_above:g}: engines would come and go",
                             "give a band: out_below under in_above")


def check_variants(s: "Scenario") -> None:
    """Instances that serve different fine-tunes of one base. Raises `InputError`."""
    cluster, engine, field = s.cluster, s.engine, "cluster.variants"
    if cluster.variants is None:
        return
    if cluster.pools:
        raise InputError("cluster.pools", [pool.role for pool in cluster.pools], f"is not simulated with {field}",
                         "use cluster.replicas")
    # Variants have KV of their own, and a store does not say whose blocks are whose.
    for name in ("migration", "scaling", "failures", "remote_store"):
        given = getattr(cluster, name)
        if given is not None:
            raise InputError(f"cluster.{name}", plain(given), f"is not simulated with {field}", "leave it out")
    if engine.data_parallel_size > 1:
        raise InputError("engine.data_parallel_size", engine.data_parallel_size, f"is not simulated with {field}",
                         "use 1, and more replicas")
    if cluster.variants > cluster.replicas:
        raise InputError(field, cluster.variants, f"are more than cluster.replicas = {cluster.replicas}, and some would"
                         " be served by nobody", "lower it, or raise cluster.replicas")


def _keeps_from_failing(scheduler: Scheduler) -> list[str]:
    """What of an engine is not simulated where engines fail."""
    are_wrong = {"phase_mix": scheduler.phase_mix != "unified", "reserve": scheduler.reserve not in ("none", "prompt"),
                 "kv_accounting": not scheduler.kv_accounting, "victim": scheduler.victim != "last_admitted"}
    return [name for name, is_wrong in are_wrong.items() if is_wrong]


def check_failures(s: "Scenario") -> None:
    """Instances that go down. Raises `InputError`."""
    given, cluster, field = s.cluster.failures, s.cluster, "cluster.failures"
    if given is None:
        return
    drawn = {name: getattr(given, name) for name in ("mtbf_s", "mttr_s", "until_s")}
    if not given.outages and not any(drawn.values()):
        raise InputError(field, plain(given), "lets no engine fail",
                         "give outages, or mtbf_s, mttr_s and until_s, or leave it out")
    for name, value in drawn.items():
        if value is None and any(drawn.values()):
            raise InputError(f"{field}.{name}", None, "missing, and outages are drawn by mtbf_s, mttr_s and until_s",
                             "give all three of them, or none")
    if given.max_restarts is not None and given.on_failure == "fail":
        raise InputError(f"{field}.max_restarts", given.max_restarts, "has no effect with on_failure = 'fail'",
                         "leave it out, or use 'reroute'")
    scheduler, engines = scheduler_of(s.engine), sum(pool.replicas for pool in cluster.pools) or cluster.replicas
    discipline = cluster.transfer.discipline if cluster.transfer is not None else "fifo"
    for name, value, is_wrong, remedy in (
            ("cluster.pools", [pool.role for pool in cluster.pools], bool(cluster.pools) and not cluster.has_roles,
             "use cluster.replicas, or roles 'prefill' and 'decode'"),
            ("cluster.transfer.discipline", discipline, discipline != "fifo", "use 'fifo'"),
            ("engine.data_parallel_size", s.engine.data_parallel_size, s.engine.data_parallel_size > 1,
             "use 1, and more replicas for a dense model"),
            ("engine.preset", scheduler.preset, bool(_keeps_from_failing(scheduler)), "use a preset 'vllm-v1', or"
             " 'sarathi'")):
        if is_wrong:
            raise InputError(name, value, f"is not simulated with engines that fail ({field})", remedy)
    for index, pool in enumerate(cluster.pools):
        of_pool = scheduler_of(s.of_pool(index).engine)
        for name in _keeps_from_failing(of_pool):
            own = name if name in pool.engine else "preset"
            raise InputError(f"cluster.pools[{index}].engine.{own}", getattr(of_pool, own),
                             f"is not simulated with engines that fail ({field})",
                             "use a preset 'vllm-v1', or 'sarathi', as it is")
    if given.mtbf_s is not None:
        number = engines * (given.until_s / (given.mtbf_s + given.mttr_s) + 1)
        if number > MAX_OUTAGES:
            raise InputError(f"{field}.mtbf_s", given.mtbf_s, f"makes some {number:.0f} outages, more than the"
                             f" {MAX_OUTAGES} simulated", "raise it, or lower until_s or "
                             + ("cluster.pools[k].replicas" if cluster.pools else "cluster.replicas"))
    spans: dict[int, list[tuple[float, float]]] = {}
    for index, one in enumerate(given.outages):
        if one.instance >= engines:
            what = f"the {engines} engines of [[cluster.pools]]" if cluster.pools else f"cluster.replicas = {engines}"
            raise InputError(f"{field}.outages[{index}].instance", one.instance, f"is not one of {what}",
                             "count from 0")
        for start_s, end_s in spans.get(one.instance, ()):
            if one.at_s < end_s and start_s < one.at_s + one.down_s:
                raise InputError(f"{field}.outages[{index}].at_s", one.at_s,
                                 f"is in another outage of instance {one.instance}, from {start_s:g} to {end_s:g} s",
                                 "make one of them")
        spans.setdefault(one.instance, []).append((one.at_s, one.at_s + one.down_s))
