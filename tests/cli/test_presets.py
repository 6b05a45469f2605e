"""Presets: what they resolve to, against a second list of the same engines' rules."""

from pathlib import Path

import pytest

from jaxsim._core.errors import InputError
from jaxsim.policy.batching import Batching
from jaxsim.spec import presets
from jaxsim.spec.engine import EngineConfig
from jaxsim.spec.presets import GIB, NO_TOKEN_LIMIT, all_presets, load_preset, markdown, resolve
from tests.reference import simulator

H100 = dict(device_name="h100_sxm_80", memory_bytes=80 * GIB)
A100 = dict(device_name="a100_sxm_80", memory_bytes=80 * GIB)

REFERENCE_NAMES = {
    "vllm-v1@0.9": "vllm-v1", "vllm-v1@0.15": "vllm-v1-async", "vllm-v1@0.19": "vllm-v1-async",
    "vllm-v0@0.6": "vllm-v0", "sarathi": "sarathi", "orca": "orca", "static": "static", "sglang@0.5": "sglang",
    "tensorrt-llm@1.0": "tensorrt-llm", "distserve-sim-vllm": "simdistserve-vllm",
    "distserve-sim": "simdistserve-vllm",
}


def test_every_preset_has_a_second_opinion():
    assert {p.name for p in all_presets()} == set(REFERENCE_NAMES)


@pytest.mark.parametrize("name", REFERENCE_NAMES)
def test_flags_agree_with_the_reference_simulators(name):
    ours = resolve(EngineConfig(preset=name))
    theirs = simulator.preset(REFERENCE_NAMES[name], num_blocks=1000)
    for flag in ("phase_mix", "chunked_prefill", "reserve", "decode_needs_free_block", "victim", "order",
                 "admit", "async_scheduling", "decode_context_limit"):
        assert getattr(ours, flag) == getattr(theirs, flag), flag
    assert ours.kv_accounting == theirs.track_blocks
    assert ours.watermark_blocks(1000) == theirs.watermark_blocks
    # Nothing that decodes can be preempted in the others, so there the flag is never read.
    if ours.reserve in ("none", "prompt") and ours.kv_accounting and ours.phase_mix == "unified":
        assert ours.waiting_blocked_after_preempt == theirs.waiting_blocked_after_preempt
    if ours.reserve == "expected":
        assert ours.ratio_start == theirs.new_token_ratio_init
        assert ours.ratio_floor == pytest.approx(theirs.new_token_ratio_floor)
        assert ours.ratio_decay == pytest.approx(theirs.new_token_ratio_decay)
        assert (ours.reserve_clip_tokens, ours.retract_free_tokens) == (theirs.expected_clip,
                                                                        theirs.retract_free_tokens)
    if theirs.max_num_batched_tokens == simulator.UNLIMITED:
        assert ours.max_num_batched_tokens == NO_TOKEN_LIMIT


@pytest.mark.parametrize("name", REFERENCE_NAMES)
def test_the_engine_takes_every_preset(name):
    s = resolve(EngineConfig(preset=name), max_model_len=4096)
    Batching(max_num_seqs=s.max_num_seqs, max_num_batched_tokens=s.max_num_batched_tokens,
             max_model_len=s.max_model_len, num_blocks=100, watermark_blocks=s.watermark_blocks(100),
             decode_context_limit=s.decode_context_limit or 0, ratio_start=s.ratio_start,
             ratio_floor=s.ratio_floor, ratio_decay=s.ratio_decay, reserve_clip_tokens=s.reserve_clip_tokens,
             retract_free_tokens=s.retract_free_tokens, phase_mix=s.phase_mix,
             chunked_prefill=s.chunked_prefill, reserve=s.reserve,
             decode_needs_free_block=s.decode_needs_free_block, victim=s.victim,
             waiting_blocked_after_preempt=s.waiting_blocked_after_preempt, order=s.order, admit=s.admit,
             async_scheduling=s.async_scheduling, kv_accounting=s.kv_accounting,
             has_context_limit=s.decode_context_limit is not None)


def test_unversioned_names():
    assert resolve(EngineConfig()).preset == "vllm-v1@0.9"
    # Asynchronous scheduling is the default from 0.14 on, another sampler from 0.17 on.
    assert [load_preset(f"vllm-v1@0.{n}").version for n in (9, 13, 14, 16, 17, 19)] == [
        "0.9", "0.9", "0.15", "0.15", "0.19", "0.19"]
    assert [load_preset(n).name for n in ("vllm-v0", "sglang", "tensorrt-llm")] == [
        "vllm-v0@0.6", "sglang@0.5", "tensorrt-llm@1.0"]
    with pytest.raises(InputError, match="did you mean 'sarathi'"):
        load_preset("saraty")


def test_defaults_depend_on_the_device_as_in_vllm():
    def limits(**device):
        s = resolve(EngineConfig(), **device)
        return s.max_num_seqs, s.max_num_batched_tokens

    assert limits(**H100) == (1024, 8192)
    assert limits(**A100) == limits() == (256, 2048)
    assert limits(device_name="l40s", memory_bytes=48 * GIB) == (256, 2048)
    assert resolve(EngineConfig(preset="sglang"), device_name="l4",
                   memory_bytes=24 * GIB).max_num_batched_tokens == 2048


def test_v0_budget_grows_with_the_model():
    assert resolve(EngineConfig(preset="vllm-v0"), max_model_len=8192).max_num_batched_tokens == 8192
    assert resolve(EngineConfig(preset="vllm-v0"), max_model_len=1024).max_num_batched_tokens == 2048
    assert resolve(EngineConfig(preset="vllm-v0", max_model_len=4096),
                   max_model_len=8192).max_num_batched_tokens == 4096


def test_what_is_given_wins():
    s = resolve(EngineConfig(max_num_seqs=8, block_size=32, watermark=0.05, async_scheduling=True,
                             reserve="prompt", enable_chunked_prefill=False), **H100)
    assert (s.max_num_seqs, s.block_size, s.async_scheduling, s.reserve) == (8, 32, True, "prompt")
    assert not s.chunked_prefill and s.watermark_blocks(199) == 9


def test_a_default_bends_to_the_number_that_is_given():
    assert resolve(EngineConfig(max_num_batched_tokens=512), **H100).max_num_seqs == 512
    assert resolve(EngineConfig(max_num_seqs=4096)).max_num_batched_tokens == 4096


def test_priority_brings_its_victim():
    assert resolve(EngineConfig(scheduling_policy="priority")).victim == "lowest_priority"
    assert resolve(EngineConfig(scheduling_policy="priority", victim="last_admitted")).victim == "last_admitted"
    with pytest.raises(InputError, match="= .fcfs.; use .last_admitted."):
        resolve(EngineConfig(victim="lowest_priority"))
    with pytest.raises(InputError, match="does not go with scheduling_policy = 'priority'"):
        resolve(EngineConfig(preset="sglang", scheduling_policy="priority"))


def test_conservativeness_scales_sglangs_reserve():
    s = resolve(EngineConfig(preset="sglang", schedule_conservativeness=0.5))
    assert (s.ratio_start, s.ratio_floor) == pytest.approx((0.35, 0.049))
    assert resolve(EngineConfig(preset="sglang", schedule_conservativeness=3.0)).ratio_start == 1.0


@pytest.mark.parametrize("engine, field", [
    (EngineConfig(decode_needs_free_block="always"), "decode_needs_free_block"),
    (EngineConfig(phase_mix="prefill_first"), "enable_chunked_prefill"),
    (EngineConfig(decode_context_limit=100), "decode_context_limit"),
    (EngineConfig(reserve="expected"), "reserve"),
])
def test_combinations_without_a_meaning_are_refused(engine, field):
    with pytest.raises(InputError) as caught:
        resolve(engine)
    assert caught.value.field == f"engine.{field}"
    # The second opinion refuses the same.
    names = ("decode_needs_free_block", "phase_mix", "decode_context_limit", "reserve")
    given = {name: getattr(engine, name) for name in names if getattr(engine, name) is not None}
    given |= {"victim": "fewest_outputs"} if engine.reserve == "expected" else {}
    with pytest.raises(ValueError, match=r"needs|goes"):
        simulator.preset("vllm-v1", **given)


def test_the_page_is_current_and_marks_what_is_unconfirmed():
    page = Path(__file__).parents[2] / "docs" / "schedulers.md"
    remedy = "run: jaxsim list policies --markdown > docs/schedulers.md"
    assert page.read_text(encoding="utf-8") == markdown(), remedy
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in markdown().splitlines()
            if line.startswith("| ")}
    names = [cell.strip(" `") for cell in rows["flag"]]
    for preset in all_presets():
        for cell in preset.unconfirmed:
            row = rows["host overhead of" if cell == "host" else f"`{cell}`"]
            assert row[names.index(preset.name)].endswith("**?** ")
    assert "2048; 8192 from 70 GiB, not A100" in markdown()


def test_files_are_checked(tmp_path, monkeypatch):
    good = (Path(presets.__file__).parents[2] / "scenarios" / "presets" / "orca.toml").read_text()
    path = tmp_path / "p.toml"
    for change, says in ((('version = "', 'versoin = "'), "did you mean 'version'"),
                         (("max_num_seqs = 128", "max_num_seqs = 0"), "numbers.max_num_seqs = 0"),
                         (('["host", ', '["hots", '), "did you mean 'host'"),
                         (("[flags]", "[flags"), "line ")):
        path.write_text(good.replace(*change))
        with pytest.raises(InputError, match=says.replace("[", r"\[")):
            load_preset(str(path))
    with pytest.raises(InputError, match="no such file"):
        load_preset(str(tmp_path / "none.toml"))
