"""Fitted latencies of DistServe's public simulator: OPT on A100-80GB, its own engine and vLLM.

Milliseconds of a whole iteration, spread over the stages of a pipeline in equal parts:

    prefill   a + b sum(len) + c sum(len^2), and 1 in each stage
    decode    a + b sum(context + 1) + c sequences, of which there are fewer than 95, or more: other coefficients
    both      2 + 0.0001 sum(context) in the first stage alone

Source: arXiv 2401.09670, appendix A; LLMServe/DistServe `simdistserve/estimators` (coefficients and KV capacities). Of
some coefficients only six digits are known here.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jaxsim._core.errors import InputError
from jaxsim.spec.scenario import Scenario

Engine = Literal["distserve", "vllm"]

PREFILL, SMALL, LARGE = range(3)
"""Rows of `FITTED`."""

LARGE_BATCH = 95
"""Sequences from which the last row holds."""

FITTED: dict[tuple[str, str, int], tuple[tuple[float, float, float], ...]] = {
    ("distserve", "opt-13b", 1): (
        (18.10254647486372, 0.1019122572698738, 7.122264314252114e-06),
        (19.934702624895458, 0.0006269356524350583, 0.03850697740828398),
        (7.1661889468253595, 0.0005798000403396046, 0.15831096191764046)),
    ("distserve", "opt-13b", 2): (
        (14.742973695171262, 0.06857720739764, 2.4495727400243586e-06),
        (13.294796350285385, 0.00034109219700723494, 0.06296393225243659),
        (10.638741913126715, 0.00031183369638295723, 0.08562913604102729)),
    ("distserve", "opt-13b", 4): (
        (12.0623, 0.0380814, 5.22625e-7), (10.2562, 1.87867e-4, 0.0326927), (10.4835, 1.71209e-4, 0.0456665)),
    ("distserve", "opt-66b", 2): (
        (43.05881348288936, 0.2742292870458432, 2.2478042467169447e-05),
        (48.288015489286245, 0.0009424343535737985, 0.12755020094383188),
        (28.727693993711597, 0.00047448475459061987, 0.29617792360743994)),
    ("distserve", "opt-66b", 3): (
        (32.9982, 0.195683, 1.22052e-5), (35.8015, 5.84500e-4, 0.0952670), (22.6539, 5.35849e-4, 0.208514)),
    ("distserve", "opt-66b", 4): (
        (29.441636037717455, 0.151352180625198, 8.317450765979451e-06),
        (30.760284619429587, 0.000451947603788462, 0.063284195750671),
        (27.47082137429487, 0.0004046845541646486, 0.12480667738300383)),
    ("distserve", "opt-66b", 8): (
        (25.4907, 0.106592, 3.39105e-6), (23.1551, 2.26915e-4, 0.0480064), (21.7177, 3.75809e-4, 0.0897861)),
    ("vllm", "opt-13b", 1): (
        (22.052204789310185, 0.14050923870128956, 8.076584822611088e-06),
        (23.475041008414784, 0.000592934466077393, 0.060726861260369455),
        (20.206356173691958, 0.0004907727036234946, 0.1200031385587413)),
    ("vllm", "opt-13b", 2): (
        (27.440806247810684, 0.0905453268062731, 8.452054313246025e-06),
        (24.54058424191086, 0.00022440145424035404, 0.08715787269447899),
        (17.947769467112806, 0.0004570851465217072, 0.11179075830699213)),
    ("vllm", "opt-13b", 4): (
        (30.536322590049405, 0.05150644936810146, 4.232473132942393e-07),
        (25.90114444283343, 7.753634454230709e-05, 0.05528087160867803),
        (23.88388468859458, 0.00028400164093310935, 0.06276523831046728)),
    ("vllm", "opt-66b", 4): (
        (42.965489361973944, 0.2128658422785494, 4.601017396226869e-05),
        (39.58178936012414, 0.0006945721692406896, 0.13580868185596764),
        (40.859718006896806, 0.0004264871259058686, 0.19508372547790553)),
    ("vllm", "opt-66b", 8): (
        (38.931193445523604, 0.1573682229779579, 4.531676245669589e-06),
        (31.176041922273107, 0.00027556543631760213, 0.0679770397053775),
        (29.087774405517447, 0.0006027720257746419, 0.1389608688300688)),
}
"""(a, b, c) of prefill and decode, by engine, model and tensor-parallel degree."""

CAPACITY = {
    ("opt-13b", 1, 1): 66144, ("opt-13b", 2, 1): 163008, ("opt-13b", 4, 1): 356736, ("opt-66b", 4, 1): 78496,
    ("opt-66b", 8, 1): 212304, ("opt-66b", 2, 2): 78512, ("opt-66b", 4, 2): 212320}
"""KV tokens of an engine, by model, tensor-parallel degree and stages: the token budget of its prefills."""


CHAT_LIMITS_MS = {"opt-13b": (250.0, 100.0), "opt-66b": (400.0, 100.0)}
"""TTFT and TPOT of the paper's chatbot, by model."""


class Degrees(NamedTuple):
    """Of one engine: tensor-parallel ranks, and stages."""

    tensors: int
    stages: int

    @property
    def num_devices(self) -> int:
        """Of one engine."""
        return self.tensors * self.stages

    def __str__(self) -> str:
        return f"TP{self.tensors}" + (f" PP{self.stages}" if self.stages > 1 else "")


class Engines(NamedTuple):
    """What is known of an engine of some degrees: [cost], and the KV tokens it has room for."""

    cost: dict[str, Any]
    tokens: int


def cost_section(engine: Engine, model: str, tensor_parallel: int, stages: int = 1) -> dict[str, Any]:
    """`[cost]` of a scenario, seconds. Raises `InputError` for what was not measured."""
    rows = FITTED.get((engine, model, tensor_parallel))
    if rows is None:
        known = sorted({degree for e, m, degree in FITTED if (e, m) == (engine, model)})
        raise InputError("tensor_parallel_size", tensor_parallel, f"has no published coefficients of {engine}, {model}",
                         f"use one of {', '.join(map(str, known))}" if known else "use opt-13b or opt-66b")
    head, context = 2e-3, 1e-7
    a, b, c = (1e-3 * x for x in rows[PREFILL])
    # One millisecond in each stage is one a stage of each of the equal parts.
    prefill = {"a": a + 1e-3 * stages * stages + head, "b": b + context, "e": c}
    decode = [{"min_sequences": start, "a": 1e-3 * a + head, "c": 1e-3 * b + context, "d": 1e-3 * c - context}
              for start, (a, b, c) in ((0, rows[SMALL]), (LARGE_BATCH, rows[LARGE]))]
    return {"kind": "fitted", "exact": True, "prefill": prefill, "decode": decode, "head": {"a": head, "c": context}}


def published(model: str, engine: Engine = "distserve") -> Callable[[Degrees], Engines | None]:
    """Engines of the public simulator of DistServe; None for degrees that it has no coefficients or capacity of.

    The capacity is its table's; more stages than that lists have as many times the memory, and at least as much room.
    """
    if not any(m == model for _, m, _ in FITTED):
        raise InputError("model.name", model, "has no published coefficients", "use opt-13b or opt-66b")

    def of(degrees: Degrees) -> Engines | None:
        known = [s for m, t, s in CAPACITY if m == model and t == degrees.tensors and s <= degrees.stages]
        if (engine, model, degrees.tensors) not in FITTED or not known:
            return None
        return Engines(cost_section(engine, model, *degrees), CAPACITY[model, degrees.tensors, max(known)])

    return of


def pair(scenario: Scenario, prefill: tuple[Degrees, Engines], decode: tuple[Degrees, Engines], *,
         is_prefill_only: bool = False) -> Scenario:
    """A prefill and a decode engine as the public simulator of DistServe has them. Raises `InputError`."""
    tree = scenario.to_dict()
    tree.pop("model", None)
    tree.pop("device", None)
    longest = tree.get("engine", {}).get("max_model_len") or 2048
    tree["engine"] = {"preset": "distserve-sim", "num_gpu_blocks_override": 1, "max_model_len": longest}
    tree["cost"] = prefill[1].cost
    tree["cluster"] = {"pools": [
        {"role": role, "cost": known.cost,
         "engine": {"tensor_parallel_size": degrees.tensors, "pipeline_parallel_size": degrees.stages,
                    "max_num_batched_tokens": known.tokens}}
        for role, (degrees, known) in (("prefill", prefill), ("decode", decode))]}
    if is_prefill_only:
        tree["workload"]["output_limit"] = 1
    return Scenario.from_dict(tree)
