"""From published or own tables to a profile that is checked against the system it is for and can be written.

    profile = import_profile("llmservingsim", ["dense.csv", "attention.parquet"], model="llama-3.1-8b",
                             device="rtx_pro_6000")

Every file has a role, a keyword of the format's reader: the one its name contains, or what stands before "=".
"""

import inspect
import typing
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxsim._core.errors import InputError, suggest
from jaxsim.cost import operators
from jaxsim.cost.profile import OPERATORS, Profile
from jaxsim.cost.profile_checks import check_device, check_system, check_units
from jaxsim.cost.rank import Roofline
from jaxsim.cost.roofline import roofline
from jaxsim.profiles import _table, aiconfigurator, llmservingsim, plain, vidur
from jaxsim.spec.device import DeviceSpec, device_catalogue, load_device
from jaxsim.spec.model import ModelSpec, load_model
from jaxsim.spec.plan import Plan, kv_cache_bytes, weight_format

READERS = {module.NAME: module for module in (aiconfigurator, llmservingsim, plain, vidur)}
"""Reader modules by format name."""

ROLES: dict[str, dict[str, tuple[str, ...]]] = {
    "llmservingsim": {"skew": ("skew",), "dense": ("dense",), "attention": ("attention",),
                      "experts": ("experts", "moe"), "meta": ("meta",)},
    "aiconfigurator": {
        "mla_context": ("mla_context", "context_mla"), "mla_generation": ("mla_generation", "generation_mla"),
        "context_attention": ("context_attention",), "generation_attention": ("generation_attention",),
        "custom_allreduce": ("custom_allreduce",), "nccl": ("nccl",), "moe": ("moe",), "gemm": ("gemm",)},
    "vidur": {"cpu_overheads": ("cpu_overhead",), "collectives": ("collective",),
              "operators": ("linear", "operators", "mlp")},
    "plain": {"path": ("",)},
}
"""What names of files contain, by format and role; the first role that fits is taken."""

NEEDED = {"llmservingsim": "dense", "vidur": "operators", "plain": "path"}
"""The role without which a format says nothing."""

OF_EXPERTS = ("router", "experts", "experts_touched", "shared_expert_up", "shared_expert_down")
"""Operators that only models with experts have."""

KV_NAMES = {4.0: "float32", 2.0: "bfloat16", 1.0: "fp8", 0.5: "int4"}
"""What a KV cache is called by the bytes of its numbers."""

_SET_HERE = ("model", "plan", "gpu", "device", "tensor_parallel_size", "expert_parallel_size", "provenance")


def import_profile(format: str, files: Iterable[str | Path], *, model: ModelSpec | str, device: DeviceSpec | str,
                   plan: Plan | None = None, options: Mapping[str, Any] | None = None) -> Profile:
    """A profile of `model` on `device` from tables of one format.

    format: a name of `READERS`. files: paths, or "role=path". options: of the format's reader (`dtype`, `kv_dtype`,
    `distribution`, `system`, ...). Names become those of the catalogue; what the files called them, a digest of each
    file, and what could not be checked (`notes`) go into the provenance. Raises `InputError` for files that cannot be
    read or are of another system.
    """
    model = load_model(model) if isinstance(model, str) else model
    device = load_device(device) if isinstance(device, str) else device
    plan = (plan or Plan()).check(model)
    if format not in READERS:
        raise InputError("profile format", format, "is not known", suggest(format, READERS))
    given = roles(format, files)
    digests = _table.digests(given.values())
    options = _options(format, options or {})
    profile = _read(format, given, model, device, plan, options)
    called = {"model": profile.model, "device": profile.device}
    notes = _check_named(profile, format, model, device)
    for name, table in profile.tables.items():
        if name in OF_EXPERTS and not model.experts:
            raise InputError(f"profile {table.source}", name, f"is an operator of experts, and {model.name} has none",
                             "leave these rows out, or correct the model")
    base = base_of(profile, model, device, plan)
    if profile.kv_dtype == "auto":
        # Whoever runs another cache than the model's own has to be told.
        profile = replace(profile, kv_dtype=KV_NAMES.get(base.kv_bytes, "auto"))
    check_system(profile, base)
    check_units(profile, base)
    provenance = {**profile.provenance, "called": called, "sha256": digests,
                  **({"options": options} if options else {}), **({"notes": notes} if notes else {})}
    return replace(profile, model=model.name, device=device.name, provenance=provenance)


def _check_named(profile: Profile, format: str, model: ModelSpec, device: DeviceSpec) -> list[str]:
    """Refuse tables of another device, or of one nobody knows; what the files do not say, a sentence each."""
    # A device that the user wrote down may be called anything.
    if profile.device and device.name in device_catalogue() and not _table.known_device(profile.device):
        raise InputError("profile.device", profile.device, f"is not in the catalogue, so it may not be {device.name}",
                         "correct the name in the files, or leave it out if you know better")
    check_device(profile, device)
    notes = []
    if not profile.device:
        notes.append(f"the files do not say which device they were measured on: taken for {device.name}")
    # Kernel tables are of shapes, which pick the rows.
    if not profile.model:
        notes.append(f"the files do not say which model they were measured on: taken for {model.name}")
    elif format != "aiconfigurator" and not _is_known_model(profile.model):
        notes.append(f"the files call their model {profile.model}, which is not in the catalogue: taken for"
                     f" {model.name}")
    return notes


def _is_known_model(name: str) -> bool:
    try:
        load_model(name)
    except InputError:
        return False
    return True


def base_of(profile: Profile, model: ModelSpec, device: DeviceSpec, plan: Plan) -> Roofline:
    """The roofline a profile is held against: of the number formats measured, as far as they have a name here."""
    def known(dtype: str) -> str:
        try:
            roofline(model, device, plan, dtype)
        except InputError:
            return "auto"
        return dtype

    try:
        return roofline(model, device, plan, known(profile.dtype), profile.kv_dtype)
    except InputError:
        return roofline(model, device, plan, known(profile.dtype))


def not_measured(profile: Profile, base: Roofline) -> tuple[str, ...]:
    """Operators of the model that the roofline prices because the profile has no table of them."""
    one = jnp.ones(())
    works = (operators.token_work(base.model, base.plan, base.weights, one)
             + operators.head_work(base.model, base.plan, base.weights, one))
    covered = {work for name in profile.tables for work in OPERATORS[name].covers}
    missing = [work.name for work in works if work.name not in covered]
    for kind in ("decode", "prefill"):
        if not {f"attention_{kind}", f"latent_{kind}"} & set(profile.tables):
            missing.append(f"attention_{kind}")
    return tuple(missing)


def roles(format: str, files: Iterable[str | Path]) -> dict[str, Path]:
    """The file of each role. Raises `InputError`."""
    known, found = ROLES[format], {}
    for file in files:
        name, equals, path = str(file).partition("=")
        if equals and name in known:
            role = name
        else:
            path = str(file)
            low = Path(path).name.lower()
            role = next((role for role, parts in known.items() if any(part in low for part in parts)), None)
            if role is None:
                raise InputError("profile", path, "its name does not tell which table it is",
                                 f"write ROLE={path}, with ROLE one of {', '.join(sorted(known))}")
        if role in found:
            raise InputError("profile", path, f"is a second file for {role}, beside {found[role]}",
                             "give one, or write ROLE=FILE where the name misleads")
        found[role] = _table.as_path(path)
    if not found or NEEDED.get(format, next(iter(found))) not in found:
        raise InputError("profile", [str(f) for f in files] if found else None,
                         f"lacks the file of the role {NEEDED.get(format, 'gemm')!r}" if found else "no file is given",
                         f"roles of {format}: {', '.join(sorted(known))}")
    return found


def _options(format: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those given, checked against the reader's own."""
    hints = typing.get_type_hints(READERS[format].read)
    own = [name for name in inspect.signature(READERS[format].read).parameters
           if name not in (*ROLES[format], *_SET_HERE)]
    for name, value in options.items():
        if name not in own:
            raise InputError(f"profile option {name}", value, f"is not one of the format {format}",
                             suggest(name, own, f"it has {', '.join(own) or 'none'}"))
        kinds = [kind for kind in typing.get_args(hints[name]) or (hints[name],) if kind is not type(None)]
        if type(value) not in kinds:
            raise InputError(f"profile option {name}", value, "cannot be used",
                             "give a whole number" if int in kinds else "give text")
    if format == "plain":
        # Elsewhere these names pick rows of the files.
        for name, width in (("dtype", weight_format), ("kv_dtype", kv_cache_bytes)):
            try:
                width(options.get(name, "auto"))
            except InputError as error:
                raise InputError(f"profile option {name}", error.value, error.problem, error.remedy) from None
    return dict(options)


def _read(format: str, files: Mapping[str, Path], model: ModelSpec, device: DeviceSpec, plan: Plan,
          options: Mapping[str, Any]) -> Profile:
    degree = plan.tensor_parallel_size
    if format == "aiconfigurator":
        return aiconfigurator.read(model, plan, **files, **options)
    if format == "plain":
        return plain.read(files["path"], tensor_parallel_size=degree, expert_parallel_size=plan.expert_ranks,
                          **options)
    if format == "vidur":
        frame = _table.read(files["operators"], ["num_tokens", "tp"])
        gpu = _named(frame, "gpu", files["operators"], lambda name: load_device(name).name, device.name)
        named = _named(frame, "model", files["operators"], lambda name: load_model(name).name, model.name)
        return vidur.read(**files, gpu=gpu, model=named, tensor_parallel_size=degree, **options)
    profile = llmservingsim.read(**files, tensor_parallel_size=degree, **options)
    # Several experts on a rank are measured as such, whatever spreads them.
    return replace(profile, expert_parallel_size=plan.expert_ranks)


def _named(frame, column: str, path: Path, catalogue, wanted: str) -> str | None:
    """What the column calls the one that is wanted; None without such a column."""
    if column not in frame:
        return None
    names = sorted(map(str, frame[column].unique()))
    for name in names:
        try:
            if catalogue(name) == wanted:
                return name
        except InputError:
            if name.lower() == wanted.lower():
                return name
    raise InputError(f"profile {path.name}, {column}", wanted, "was not measured", f"measured: {', '.join(names)}")
