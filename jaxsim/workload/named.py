"""Workloads by name, as a scenario file writes them.

A law or process is named by its class in lower case, words joined by hyphens (`log-normal`, `mmpp2`), and
built from the numbers given with it. The names are the final classes themselves: a new class needs no entry
here.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from jaxsim._core.errors import InputError, suggest
from jaxsim.workload.arrivals import MMPP2, AbstractArrivals
from jaxsim.workload.azure2023 import azure_conv_2023
from jaxsim.workload.durations import AbstractDuration
from jaxsim.workload.generator import Generator, Tenant
from jaxsim.workload.lengths import AbstractLength, AbstractLengths, Fixed, GaussianCopula, Independent
from jaxsim.workload.prefix_groups import GroupedGenerator, PrefixGroups
from jaxsim.workload.sessions import PRESETS, AbstractTurns, SessionGenerator, later_lengths

T = TypeVar("T")

FITTED = {"azure-conv-2023": azure_conv_2023}
"""Complete generators: arrivals and lengths fitted together. Each takes a rate."""

DEFAULT = "azure-conv-2023"


def class_name(cls: type) -> str:
    """The name a class goes by: `LogNormal` -> `log-normal`, `MMPP2` -> `mmpp2`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()


def classes(base: type[T], suffix: str = "") -> dict[str, type[T]]:
    """The final classes below an abstract one, by name, without a suffix that all of them have."""
    found: dict[str, type[T]] = {}
    pending = list(base.__subclasses__())
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        if not inspect.isabstract(cls):
            found[class_name(cls).removesuffix(suffix)] = cls
    return dict(sorted(found.items()))


def build(base: type[T], given: Mapping[str, Any] | str | T, field: str, suffix: str = "") -> T:
    """An object of a final class of `base` from {"kind": name, ...numbers}, a bare name, or itself.

    suffix: of the names of its classes, that is left out.
    """
    if isinstance(given, base):
        return given
    numbers = {"kind": given} if isinstance(given, str) else given
    if not isinstance(numbers, Mapping) or "kind" not in numbers:
        raise InputError(
            field, given, "does not say its kind", f"give kind = one of {', '.join(classes(base, suffix))}"
        )
    numbers = dict(numbers)
    kind = str(numbers.pop("kind"))
    known = classes(base, suffix)
    if kind not in known:
        raise InputError(f"{field}.kind", kind, "is unknown", suggest(kind, known))
    cls = known[kind]
    parameters = inspect.signature(cls).parameters
    for name in numbers:
        if name not in parameters:
            raise InputError(
                f"{field}.{name}", numbers[name], f"is not a number of {kind}", suggest(name, parameters)
            )
    missing = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in numbers]
    if missing:
        raise InputError(field, given, f"lacks {', '.join(missing)}", f"{kind} takes {', '.join(parameters)}")
    try:
        return cls(**numbers)
    except InputError as error:
        raise InputError(f"{field}.{error.field}", error.value, error.problem, error.remedy) from error
    except (TypeError, ValueError) as error:
        raise InputError(field, given, f"cannot be built ({error})", f"{kind} takes numbers") from error


def length_law(
    given: Mapping[str, Any] | str | int | AbstractLength, field: str = "length"
) -> AbstractLength:
    """A marginal length law: a whole number is `Fixed`."""
    if isinstance(given, int) and not isinstance(given, bool):
        given = {"kind": "fixed", "tokens": given}
    return build(AbstractLength, given, field)


def duration_law(
    given: Mapping[str, Any] | float | AbstractDuration, field: str = "think_s"
) -> AbstractDuration:
    """A law of durations: a number of seconds is `FixedTime`."""
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        given = {"kind": "fixed", "seconds": given}
    return build(AbstractDuration, given, field, "-time")


def turns_law(given: Mapping[str, Any] | int | AbstractTurns, field: str = "turns") -> AbstractTurns:
    """A law of the number of turns: a whole number is `FixedTurns`."""
    if isinstance(given, int) and not isinstance(given, bool):
        given = {"kind": "fixed", "turns": given}
    return build(AbstractTurns, given, field, "-turns")


def arrival_process(
    given: Mapping[str, Any] | str | AbstractArrivals, rate_rps: float, field: str = "arrivals"
) -> AbstractArrivals:
    """An arrival process; `mmpp2` may give dwell times in seconds (at `rate_rps`) instead of mean gaps."""
    if isinstance(given, Mapping) and given.get("kind") == class_name(MMPP2) and "high_dwell_s" in given:
        numbers = dict(given)
        for name in ("high_dwell", "low_dwell"):
            if not isinstance(numbers.get(f"{name}_s"), (int, float)):
                raise InputError(
                    f"{field}.{name}_s",
                    numbers.get(f"{name}_s"),
                    "is not a number of seconds",
                    "give both dwell times in seconds, or both in mean gaps",
                )
            numbers[f"{name}_gaps"] = numbers.pop(f"{name}_s") * rate_rps
        given = numbers
    if isinstance(given, Mapping) and "base" in given:
        given = {**given, "base": arrival_process(given["base"], rate_rps, f"{field}.base")}
    return build(AbstractArrivals, given, field)


def generator(
    kind: str = DEFAULT,
    *,
    rate_rps: float | None = None,
    input: Mapping[str, Any] | int | AbstractLength | None = None,
    output: Mapping[str, Any] | int | AbstractLength | None = None,
    spearman: float = 0.0,
    lengths: AbstractLengths | None = None,
    output_limit: int | None = None,
    tenants: tuple[Tenant, ...] = (Tenant(),),
    sessions: Mapping[str, Any] | None = None,
    prefix_groups: Mapping[str, Any] | None = None,
    **numbers: Any,
) -> Generator | SessionGenerator | GroupedGenerator:
    """A generator by name: a fitted one (`azure-conv-2023`), or an arrival process with the given numbers.

    With a fitted one, `input` and `output` replace its length laws. With a process, lengths left out are
    those of the default generator. `rate_rps` is required for a process.

    sessions: what comes are sessions of turns (`jaxsim.workload.sessions`): `turns`, `think_s`, `context_limit`, and if
    wanted `new_tokens` (of later turns; else as of first ones) and `shared_tokens`. `conversation` and `agent` are a
    Poisson process of such sessions with laws of their own, each of which may be replaced.

    prefix_groups: prompts begin with those of groups (`jaxsim.workload.prefix_groups`), not of sessions: `number`,
    `tokens`, and if wanted `distribution` and `exponent`.
    """
    if prefix_groups is not None:
        if sessions is not None or kind in PRESETS:
            raise InputError("workload.prefix_groups", prefix_groups, "comes with sessions, which share what they grow",
                             "leave one of them out")
        base = generator(kind, rate_rps=rate_rps, input=input, output=output, spearman=spearman, lengths=lengths,
                         output_limit=output_limit, tenants=tenants, **numbers)
        try:
            return GroupedGenerator(base, PrefixGroups(**prefix_groups))
        except InputError as error:
            field = f"workload.prefix_groups.{error.field}"
            raise InputError(field, error.value, error.problem, error.remedy) from error
    if kind in PRESETS:
        own = dict(PRESETS[kind])
        first = {name: own.pop(name) for name in ("input", "output")}
        if lengths is None:
            input = first["input"] if input is None else input
            output = first["output"] if output is None else output
        else:
            own.pop("new_tokens")
        given = {name: value for name, value in (sessions or {}).items() if value is not None}
        return generator("poisson", rate_rps=rate_rps, input=input, output=output, spearman=spearman, lengths=lengths,
                         output_limit=output_limit, tenants=tenants, sessions={**own, **given}, **numbers)
    if sessions is not None:
        base = generator(kind, rate_rps=rate_rps, input=input, output=output, spearman=spearman, lengths=lengths,
                         output_limit=output_limit, tenants=tenants, **numbers)
        return _of_sessions(base, sessions)
    if kind not in FITTED and kind not in classes(AbstractArrivals):
        raise InputError(
            "workload.kind", kind, "is unknown", suggest(kind, [*FITTED, *PRESETS, *classes(AbstractArrivals)])
        )
    fitted = FITTED.get(kind, FITTED[DEFAULT])
    if kind in FITTED and numbers:
        name, value = next(iter(numbers.items()))
        raise InputError(
            f"workload.{name}", value, f"is not a number of {kind}", "it takes rate_rps, input, output"
        )
    if kind not in FITTED and rate_rps is None:
        raise InputError(
            "workload.rate_rps",
            rate_rps,
            f"is missing: {kind} has no rate of its own",
            "give requests per second",
        )
    base = fitted() if rate_rps is None else fitted(rate_rps)
    arrivals = base.arrivals
    if kind not in FITTED:
        arrivals = arrival_process({"kind": kind, **numbers}, base.rate_rps, "workload")
    if lengths is not None:
        if input is not None or output is not None or spearman != 0:
            raise InputError(
                "workload.lengths", lengths, "comes with input, output or spearman", "give one or the other"
            )
    elif input is not None or output is not None:
        default = base.lengths
        first = default.input if input is None else length_law(input, "workload.input")
        second = default.output if output is None else length_law(output, "workload.output")
        lengths = Independent(first, second) if spearman == 0 else GaussianCopula(first, second, spearman)
    elif spearman != 0:
        lengths = GaussianCopula(base.lengths.input, base.lengths.output, spearman)
    else:
        lengths = base.lengths
    return Generator(arrivals, lengths, base.rate_rps, output_limit, tuple(tenants), kind)


def _of_sessions(base: Generator, given: Mapping[str, Any]) -> SessionGenerator:
    field = "workload.sessions"
    parameters = ("turns", "think_s", "new_tokens", "shared_tokens", "context_limit")
    for name in given:
        if name not in parameters:
            raise InputError(f"{field}.{name}", given[name], "is no number of sessions", suggest(name, parameters))
    for name in ("turns", "think_s", "context_limit"):
        if given.get(name) is None:
            raise InputError(f"{field}.{name}", None, "is missing", f"sessions take {', '.join(parameters)}")
    new = given.get("new_tokens")
    try:
        return SessionGenerator(
            base,
            turns_law(given["turns"], "turns"),
            duration_law(given["think_s"], "think_s"),
            later_lengths(base.lengths, None if new is None else length_law(new, "new_tokens")),
            given["context_limit"],
            given.get("shared_tokens") or 0,
        )
    except InputError as error:
        raise InputError(f"{field}.{error.field}", error.value, error.problem, error.remedy) from error


def fixed_lengths(input_tokens: int, output_tokens: int) -> Independent:
    """The same lengths for every request."""
    return Independent(Fixed(input_tokens), Fixed(output_tokens))
