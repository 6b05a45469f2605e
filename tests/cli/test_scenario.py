"""Scenario files: what is read, what is refused and how it is said."""

import copy
import json
import math
from importlib import resources

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsim._core.errors import InputError
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.scenario import FittedCost, ProfiledCost, Scenario, WorkloadSection, json_schema
from jaxsim.spec.toml import dump_toml, parse_toml, parse_value
from jaxsim.workload import named

BASE = {
    "schema_version": 1,
    "model": {"name": "llama-3.1-8b"},
    "device": {"name": "h100"},
    "workload": {"kind": "poisson", "rate_rps": 2.0, "input": 512, "output": {"kind": "fixed", "tokens": 64}},
}


def changed(**fields):
    """BASE with `section__field` replaced; a value of None takes the field away."""
    tree = copy.deepcopy(BASE)
    for path, value in fields.items():
        *parents, last = path.split("__")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        if value is None:
            node.pop(last)
        else:
            node[last] = value
    return tree


def refused(tree) -> InputError:
    with pytest.raises(InputError) as caught:
        Scenario.from_dict(tree)
    assert "\n" not in str(caught.value) and "$" not in str(caught.value)
    return caught.value


REFUSALS = [
    # field, value, what the message must say
    (changed(engine__max_num_seqs=0), "engine.max_num_seqs", ">= 1"),
    (changed(engine__max_num_seqs="many"), "engine.max_num_seqs", "whole number"),
    (changed(engine__max_num_seq=4), "engine.max_num_seq", "did you mean 'max_num_seqs'"),
    (changed(engine__chunked_prefill=True), "engine.chunked_prefill", "enable_chunked_prefill"),
    (changed(engine__phase_mix="unifed"), "engine.phase_mix", "did you mean 'unified'"),
    (changed(engine__block_size=12), "engine.block_size", "16, 32"),
    (changed(engine__preset="vlm-v1"), "engine.preset", "did you mean 'vllm-v1'"),
    (changed(engine__enable_prefix_caching=True, engine__preset="sglang"), "engine.enable_prefix_caching",
     "as vLLM V1 does it"),
    (changed(engine__pipeline_parallel_size=2, engine__preset="sglang"), "engine.pipeline_parallel_size",
     "not simulated for sglang"),
    (changed(engine__max_num_seqs=600, engine__max_num_batched_tokens=512), "engine.max_num_seqs",
     "at most 512"),
    (changed(engine__max_model_len=400), "engine.max_model_len", "576"),
    (changed(engine__num_gpu_blocks_override=30), "engine.num_gpu_blocks_override", "36 blocks"),
    (changed(engine__dtype="fp8", model__dtype="bf16"), "engine.dtype", "differs from model.dtype"),
    (changed(engine__reserve="expected"), "engine.reserve", "prefill_first"),
    (changed(engine__victim="fewest_outputs"), "engine.victim", "reserve = 'none'"),
    (changed(engine__schedule_conservativeness=2.0), "engine.schedule_conservativeness", "no effect"),
    (changed(cluster__replicas=0), "cluster.replicas", ">= 1"),
    (changed(cluster__router_weights={"load": "much"}), "cluster.router_weights", "numbers"),
    (changed(workload__rate_rps=-1), "workload.rate_rps", "> 0"),
    (changed(workload__rate_rps=math.nan), "workload.rate_rps", "not a finite number"),
    (changed(slo__ttft_ms=math.inf), "slo.ttft_ms", "not a finite number"),
    (changed(cost={"kind": "fitted", "prefill": {"a": math.nan}, "decode": {}}), "cost.prefill.a", "finite"),
    (changed(workload__rate_rps=None), "workload.rate_rps", "missing"),
    (changed(workload__kind="posson"), "workload.kind", "did you mean 'poisson'"),
    (changed(workload__kind="gamma"), "workload.cv", "missing"),
    (changed(workload__cv=2), "workload.cv", "'gamma' or 'weibull'"),
    (changed(workload__kind="mmpp", workload__rate_ratio=4), "workload.high_dwell_s", "missing"),
    (changed(workload__kind="trace"), "workload.input", "no effect"),
    (changed(workload__kind="batch"), "workload.rate_rps", "no effect"),
    (changed(workload__kind="closed-loop", workload__concurrency=4), "workload.rate_rps", "answers bring requests"),
    (changed(workload__kind="closed-loop", workload__rate_rps=None), "workload.concurrency", "missing"),
    (changed(workload__think_s=1.0), "workload.think_s", "no effect with kind"),
    (changed(workload={"kind": "trace"}), "workload.trace", "missing"),
    (changed(workload__output__kind="log-norml"), "workload.output.kind", "did you mean 'log-normal'"),
    (changed(workload__output__tokens=None), "workload.output.tokens", "missing"),
    (changed(workload__output__token=3), "workload.output.token", "did you mean 'tokens'"),
    (changed(workload__output={"kind": "uniform", "min_tokens": 9, "max_tokens": 8}),
     "workload.output.min_tokens", "above max_tokens = 8"),
    (changed(workload__output={"kind": "log-normal", "sigma": 1.0}), "workload.output.mean_tokens",
     "exactly one"),
    (changed(workload__output={"kind": "quantiles", "levels": [0, 0.5], "tokens": [1, 2]}),
     "workload.output.levels", "0 to 1"),
    (changed(workload__lengths_from="x.csv"), "workload.input", "lengths_from"),
    (changed(workload__tenants=[{"name": "a"}, {"name": "a"}]), "workload.tenants", "same name"),
    (changed(workload__tenants=[{"name": "a", "share": 0}]), "workload.tenants[0].share", "> 0"),
    (changed(model={}), "model.name", "exactly one"),
    (changed(model=None), "model", "roofline"),
    (changed(cost={"kind": "roof"}), "cost.kind", "'roofline'"),
    (changed(cost={"kind": "fitted", "prefill": {}}), "cost.decode", "missing"),
    (changed(cost={"kind": "fitted", "prefill": {}, "decode": [{"a": 1}, {"a": 2}]}), "cost.decode", "rise"),
    (changed(cost={"kind": "fitted", "prefill": {}, "decode": {}}, model=None),
     "engine.num_gpu_blocks_override", "KV blocks"),
    (changed(slo__ttft=3), "slo.ttft", "did you mean 'ttft_ms'"),
    (changed(num_seeds=0), "num_seeds", ">= 1"),
    (changed(schema_version=2), "schema_version", "use one of 1"),
    (changed(schema_version=None), "schema_version", "missing"),
    (changed(workload=3), "workload", "table"),
    (changed(warmup_s=600.0), "warmup_s", "within about 500 s; lower it, or raise workload.num_requests"),
    (changed(warmup_s=1.0, workload__kind="batch", workload__rate_rps=None), "warmup_s", "within about 0 s"),
    (changed(warmup_s=5.0, workload={"kind": "trace", "trace": "t.csv", "slice": {"start_s": 5, "end_s": 9}}),
     "warmup_s", "within about 4 s"),
    (changed(workload__sort=True), "workload.sort", "kind = 'trace'"),
    (changed(workload__input=200_000), "workload.input", "beyond the 131072 positions of meta-llama/Llama-3.1-8B"),
    (changed(workload__input=200_000, engine__max_model_len=150_000), "workload.input", "shorten workload.input"),
    (changed(cost={"overrides": {"gemm_efficiency": 1.2}}), "cost.overrides.gemm_efficiency", "at most 1"),
    (changed(cost={"overides": {"gemm_efficiency": 1.2}}), "cost.overides", "did you mean 'overrides'"),
    (changed(cost={"prefill": {}}), "cost.kind", "missing"),
    (changed(cost={"kind": "fitted", "prefill": {"a": 1e5}, "decode": {}}), "cost.prefill.a", "<= 32768"),
    (changed(cost={"kind": "fitted", "prefill": {}, "decode": [{"c": 1.0}]}), "cost.decode.c", "in seconds"),
    (changed(cost={"kind": "fitted", "prefill": {"e": 1.0}, "decode": {}}), "cost.prefill.e", "32768 s"),
    (changed(model__dimensions={"layers": 2}), "model.dimensions.hidden", "missing"),
    (changed(model={"config": "x.json", "dimensions": {}}), "model.dimensions", "model.config"),
    (changed(device__numbers={"memory_bytes_per_s": "fast"}), "device.numbers.memory_bytes_per_s", "a number > 0"),
    (changed(device__numbers={"memory_bytes_per_s": 1e12}), "device.numbers.bf16_flops", "no arithmetic peak"),
    (None, "scenario", "Scenario.named"),
    ({1: 2}, "a field of the scenario", "not text"),
    (changed(cluster__router_weights={1: 2.0}), "a field of cluster.router_weights", "not text"),
]


@pytest.mark.parametrize("tree, field, says", REFUSALS, ids=[f"{i}-{r[1]}" for i, r in enumerate(REFUSALS)])
def test_refusals_name_field_and_remedy(tree, field, says):
    error = refused(tree)
    assert error.field == field
    assert says in str(error)


def test_every_preset_and_law_is_accepted():
    for preset in ("vllm-v1@0.9", "vllm-v1@0.19", "vllm-v0", "sarathi", "orca", "static", "sglang",
                   "tensorrt-llm", "distserve-sim-vllm"):
        assert Scenario.from_dict(changed(engine__preset=preset)).engine.preset == preset
    for law in (64, {"kind": "uniform", "min_tokens": 1, "max_tokens": 8},
                {"kind": "log-normal", "mean_tokens": 100.0, "sigma": 0.5},
                {"kind": "quantiles", "levels": [0, 0.5, 1], "tokens": [1, 10, 50]}):
        Scenario.from_dict(changed(workload__output=law))


WORKLOADS = [
    BASE["workload"],
    {"kind": "gamma", "cv": 3.0, "rate_rps": 4.0, "input": 10, "output": 5, "spearman": 0.0},
    {"kind": "weibull", "cv": 2.0, "rate_rps": 4.0},
    {"kind": "deterministic", "rate_rps": 4.0, "spearman": 0.4,
     "input": {"kind": "uniform", "min_tokens": 4, "max_tokens": 9},
     "output": {"kind": "log-normal", "mean_tokens": 50.0, "sigma": 0.5, "max_tokens": 80}},
    {"kind": "mmpp", "rate_rps": 4.0, "rate_ratio": 5.0, "high_dwell_s": 2.0, "low_dwell_s": 8.0,
     "input": {"kind": "quantiles", "levels": [0.0, 0.5, 1.0], "tokens": [3, 30, 300]}, "output": 7},
    {"kind": "batch", "input": 10, "output": 5},
    {"kind": "closed-loop", "concurrency": 8, "think_s": 0.5, "input": 10, "output": 5},
    {"kind": "azure-conv-2023", "rate_rps": 9.0, "output_limit": 100},
    {"kind": "azure-conv-2023"},
]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w["kind"])
def test_generated_workloads_can_be_drawn(workload):
    section = Scenario.from_dict(changed(workload=workload)).workload
    drawn = named.generator(**section.generator_arguments()).sample(3, 200)
    if section.rate_rps is not None:
        assert drawn.arrival_s[-1] == pytest.approx(200 / section.rate_rps, rel=0.7)
    if section.kind in ("batch", "closed-loop"):
        assert (drawn.arrival_s == 0).all()
    if section.output_limit is not None:
        assert drawn.output_tokens.max() <= 100 and (drawn.max_tokens == 100).all()
    if isinstance(section.input, int):
        assert (drawn.input_tokens == section.input).all()


def test_dtype_may_be_given_in_either_place():
    assert Scenario.from_dict(BASE).dtype == "auto"
    assert Scenario.from_dict(changed(model__dtype="fp8", engine__dtype="auto")).dtype == "fp8"
    assert Scenario.from_dict(changed(engine__kv_cache_dtype="fp8")).kv_dtype == "fp8"


def test_fitted_rows():
    cost = Scenario.from_dict(changed(cost={
        "kind": "fitted", "prefill": {"a": 1.0, "b": 2.0},
        "decode": [{"a": 3.0}, {"a": 4.0, "d": 5.0, "min_sequences": 95}]})).cost
    assert isinstance(cost, FittedCost)
    assert cost.rows("prefill") == [(0, 1.0, 2.0, 0.0, 0.0, 0.0)]
    assert cost.rows("decode") == [(0, 3.0, 0.0, 0.0, 0.0, 0.0), (95, 4.0, 0.0, 0.0, 5.0, 0.0)]
    assert cost.rows("mixed") is None


def test_values_are_replaced_checked_and_taken_back():
    scenario = Scenario.from_dict(BASE)
    other = scenario.with_values({"engine.max_num_seqs": 64, "workload.output.tokens": 9,
                                  "slo.ttft_ms": 5.0})
    assert (other.engine.max_num_seqs, other.workload.output.tokens, other.slo.ttft_ms) == (64, 9, 5.0)
    assert scenario.engine.max_num_seqs is None
    assert other.with_values({"engine.max_num_seqs": None}).engine.max_num_seqs is None
    # A shorthand gives way to a table.
    wider = scenario.with_values({"workload.input.kind": "uniform", "workload.input.min_tokens": 1,
                                  "workload.input.max_tokens": 4})
    assert wider.workload.input.max_tokens == 4
    for path, value, says in (("engine.max_num_seqs", -1, "out of range"),
                              ("engine.nope", 1, "no such field"),
                              ("engine.max_num_seqs.x", 1, "cannot be used"), ("engine..x", 1, "not a field"),
                              ("workload.tenants.3.name", "a", "cannot be used")):
        with pytest.raises(InputError, match=says):
            scenario.with_values({path: value})


@pytest.mark.parametrize("values", ["x", None, 5, {1: 2}, {"a": object()}, {"workload": np.zeros((2, 2))}])
def test_what_is_no_table_of_values_is_refused(values):
    with pytest.raises(InputError) as refusal:
        Scenario.from_dict(BASE).with_values(values)
    assert refusal.value.field and refusal.value.remedy


def test_numpy_counts_as_numbers():
    scenario = Scenario.from_dict(BASE).with_values({
        "workload.rate_rps": np.float64(3), "engine.max_num_seqs": np.int32(64), "workload.input": np.array(7),
        "slo.ttft_ms": np.float32(0.5), "engine.enforce_eager": np.bool_(True), "name": np.str_("n"),
        "workload.output": {"kind": "quantiles", "levels": np.array([0.0, 1.0]), "tokens": np.arange(1, 3)}})
    same = Scenario.from_dict(BASE).with_values({
        "workload.rate_rps": 3.0, "engine.max_num_seqs": 64, "workload.input": 7, "slo.ttft_ms": 0.5,
        "engine.enforce_eager": True, "name": "n",
        "workload.output": {"kind": "quantiles", "levels": [0.0, 1.0], "tokens": [1, 2]}})
    assert scenario == same and scenario.to_toml() == same.to_toml()
    with pytest.raises(InputError, match="workload.rate_rps = nan: not a finite number"):
        scenario.with_values({"workload.rate_rps": np.float64("nan")})


def test_a_profile_is_a_cost(tmp_path):
    scenario = Scenario.from_dict(BASE).with_values({"cost": {"path": "p.parquet", "host": "vllm-v0"}})
    assert isinstance(scenario.cost, ProfiledCost) and scenario.cost.path == "p.parquet"
    assert Scenario.from_dict(scenario.to_dict()) == scenario
    (tmp_path / "s.toml").write_text(scenario.to_toml())
    assert Scenario.from_toml(tmp_path / "s.toml").cost.path == str(tmp_path / "p.parquet")
    for cost, field, says in (
            ({"kind": "profiled"}, "cost.path", "missing"), ({"kind": "profiled", "path": ""}, "cost.path", "text"),
            ({"kind": "profiled", "path": "p", "overrides": {"gemm_efficiency": 1.5}},
             "cost.overrides.gemm_efficiency", "more than all"),
            ({"kind": "roofline", "path": "p"}, "cost.path", "no such field")):
        with pytest.raises(InputError, match=says) as info:
            Scenario.from_dict(BASE | {"cost": cost})
        assert info.value.field == field
    with pytest.raises(InputError, match="device = None: missing, and a profiled cost needs it"):
        Scenario.from_dict({k: v for k, v in BASE.items() if k != "device"} | {"cost": {"path": "p.parquet"}})


def test_overrides_alone_are_those_of_the_roofline():
    scenario = Scenario.from_dict(BASE).with_values({"cost.overrides.gemm_efficiency": 0.6})
    assert scenario.cost.overrides == {"gemm_efficiency": 0.6}
    assert Scenario.from_dict(scenario.to_dict()) == scenario


def test_models_and_devices_of_ones_own():
    """Copied from the catalogue under another name they are the same."""
    for section, field, known in (("model", "dimensions", load_model("llama-3.1-8b")), ("device", "numbers",
                                                                                      load_device("h100"))):
        table = {k: v for k, v in msgspec.to_builtins(known).items() if k not in ("name", "aliases") and v is not None}
        scenario = Scenario.from_dict(changed(**{f"{section}__name": "mine", f"{section}__{field}": table}))
        assert msgspec.structs.replace(getattr(scenario, section).spec(), name=known.name,
                                       aliases=known.aliases) == known
        assert Scenario.from_dict(parse_toml(scenario.to_toml(), "here")) == scenario
        assert getattr(Scenario.from_dict(BASE), section).spec() == known


def test_options_of_a_trace():
    workload = {"kind": "trace", "trace": "t.csv", "rate_rps": 4.0, "sort": True, "drop_failed": False,
                "slice": {"start_s": 1.0, "run": 3}}
    section = Scenario.from_dict(changed(workload=workload)).workload
    assert section.trace_options() == {"rate_rps": 4.0, "sort": True, "drop_failed": False, "start_s": 1.0,
                                       "keep": 1.0, "run": 3}
    assert Scenario.from_dict(changed(workload={"kind": "trace", "trace": "t.csv"})).workload.trace_options() == {}


def test_list_elements_can_be_replaced():
    scenario = Scenario.from_dict(changed(workload__tenants=[{"name": "a"}, {"name": "b"}]))
    assert scenario.with_values({"workload.tenants.1.share": 3.0}).workload.tenants[1].share == 3.0
    with pytest.raises(InputError, match="not an index of a list of 2"):
        scenario.with_values({"workload.tenants.2.share": 3.0})


@pytest.mark.parametrize("text, value", [
    ("64", 64), ("0.5", 0.5), ("true", True), ('"a b"', "a b"), ("poisson", "poisson"), ("[1, 2]", [1, 2]),
    ("{ a = 1 }", {"a": 1}), ("vllm-v1@0.9", "vllm-v1@0.9"), ("1\nother = 2", "1\nother = 2")])
def test_values_are_read_as_toml(text, value):
    assert parse_value(text) == value


# ---- files


def test_malformed_toml_is_told_with_its_line(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('schema_version = 1\n[engine]\nmax_num_seqs = = 3\n')
    with pytest.raises(InputError) as caught:
        Scenario.from_toml(path)
    assert "line 3" in caught.value.field and caught.value.value == "max_num_seqs = = 3"


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        Scenario.from_toml(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(InputError, match="UTF-8"):
        Scenario.from_toml(tmp_path / "latin.toml")


@pytest.mark.parametrize("path, says", [
    (5, "is not the path"), (None, "is not the path"), ("", "is not the path"), ("defualt", "did you mean 'default'"),
    ("none.toml", "No such file"), (".", "directory"), ("a\0b", "cannot be read")])
def test_what_is_no_scenario_file_is_refused(path, says):
    with pytest.raises(InputError, match=says):
        Scenario.from_toml(path)


def test_shipped_scenarios_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Scenario.from_toml("default") == Scenario.named("default") and Scenario.named("default").name == "default"
    (tmp_path / "default").write_text(dump_toml(changed(name="mine")))
    assert Scenario.from_toml("default").name == "mine"
    for name in ("defualt", None, 3):
        with pytest.raises(InputError, match="no scenario of that name"):
            Scenario.named(name)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "s.toml").write_text(dump_toml(BASE), encoding="utf-8-sig")
    assert Scenario.from_toml(tmp_path / "s.toml") == Scenario.from_dict(BASE)


def test_paths_in_a_file_count_from_its_folder(tmp_path):
    (tmp_path / "s.toml").write_text(dump_toml(changed(workload={"kind": "trace", "trace": "t.csv"})))
    assert Scenario.from_toml(tmp_path / "s.toml").workload.trace == str(tmp_path / "t.csv")
    absolute = changed(workload={"kind": "trace", "trace": "/t.csv"})
    (tmp_path / "s.toml").write_text(dump_toml(absolute))
    assert Scenario.from_toml(tmp_path / "s.toml").workload.trace == "/t.csv"


def test_a_preset_file_beside_the_scenario(tmp_path):
    shipped = resources.files("jaxsim.scenarios").joinpath("presets", "sarathi.toml").read_text()
    (tmp_path / "mine.toml").write_text(shipped.replace('"sarathi"', '"mine"'))
    (tmp_path / "s.toml").write_text(dump_toml(changed(engine__preset="mine.toml")))
    assert Scenario.from_toml(tmp_path / "s.toml").engine.preset == str(tmp_path / "mine.toml")
    (tmp_path / "mine.toml").write_text(shipped.replace('"prompt"', '"promt"'))
    with pytest.raises(InputError, match="flags.reserve = 'promt': no such choice; did you mean 'prompt'"):
        Scenario.from_toml(tmp_path / "s.toml")


leaves = st.one_of(st.booleans(), st.integers(-2**60, 2**60), st.text(max_size=12),
                   st.floats(allow_nan=False, allow_infinity=False))
keys = st.text(max_size=6)
trees = st.dictionaries(keys, st.recursive(leaves, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)), max_leaves=12))


@settings(max_examples=200, deadline=None)
@given(trees)
def test_toml_written_is_toml_read(tree):
    assert parse_toml(dump_toml(tree), "here") == tree


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w["kind"])
def test_scenarios_survive_a_file(workload, tmp_path):
    scenario = Scenario.from_dict(changed(workload=workload, engine__max_num_seqs=7, slo__tpot_ms=20.0,
                                          cluster__router_weights={"load_weight": 1.0}))
    (tmp_path / "s.toml").write_text(scenario.to_toml())
    assert Scenario.from_toml(tmp_path / "s.toml") == scenario
    assert scenario.checked() == scenario


def test_scenarios_built_by_hand_can_be_checked():
    scenario = Scenario.from_dict(BASE)
    wrong = msgspec.structs.replace(scenario, num_seeds=-1)
    with pytest.raises(InputError, match="num_seeds"):
        wrong.checked()


# ---- schema


def test_shipped_schema_is_current():
    shipped = resources.files("jaxsim.scenarios").joinpath("schema", "scenario.schema.json").read_text()
    current = json.loads(json.dumps(json_schema()))
    assert json.loads(shipped) == current, "run: jaxsim schema > scenarios/schema/scenario.schema.json"


def test_schema_describes_every_field():
    schema = json_schema()
    for name, section in {"Scenario": schema, **schema["$defs"]}.items():
        for field, node in section["properties"].items():
            tag = field == "kind" and "enum" in node or field == "law"
            assert tag or node.get("description"), f"{name}.{field} is not described in its docstring"


def test_generator_arguments_refuse_a_trace():
    with pytest.raises(ValueError, match="a trace is read"):
        WorkloadSection(kind="trace", trace="x").generator_arguments()
