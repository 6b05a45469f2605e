"""Sessions as they are drawn: laws, contexts that grow, limits, what stays the same when something else changes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsim._core.errors import InputError
from jaxsim.spec.scenario import Scenario
from jaxsim.traces import read_trace
from jaxsim.workload import (
    ContinuingTurns,
    ExponentialTime,
    FixedTurns,
    GeometricTurns,
    LogNormalTime,
    QuantilesTime,
    Workload,
    duration_law,
    generator,
    turns_law,
)

LEVELS = (np.arange(200_000) + 0.5) / 200_000

CHAT = {"turns": {"kind": "geometric", "mean_turns": 4.0}, "think_s": {"kind": "exponential", "mean_s": 3.0},
        "new_tokens": {"kind": "uniform", "min_tokens": 1, "max_tokens": 60}, "shared_tokens": 50,
        "context_limit": 900}


def drawn(seed: int = 0, count: int = 500, rate_rps: float = 2.0, **changes) -> Workload:
    made = generator("poisson", rate_rps=rate_rps, input={"kind": "uniform", "min_tokens": 1, "max_tokens": 100},
                     output={"kind": "uniform", "min_tokens": 1, "max_tokens": 80}, sessions={**CHAT, **changes})
    return made.sample(seed, count)


@pytest.mark.parametrize("law, mean", [(GeometricTurns(8.8), 8.8), (ContinuingTurns((0.5,)), 2.0), (FixedTurns(3), 3),
                                       (GeometricTurns(1.0), 1.0),
                                       # 1 + 0.31 + 0.31 x 0.42 + 0.31 x 0.42 x 0.51 / (1 - 0.6)
                                       (ContinuingTurns((0.31, 0.42, 0.51, 0.6)), 1.6062)])
def test_turns(law, mean):
    turns = law.quantile(LEVELS)
    assert turns.min() >= 1 and np.all(np.diff(turns) >= 0)
    assert turns.mean() == pytest.approx(mean, rel=2e-3)


def test_shares_that_continue():
    turns = ContinuingTurns((0.3, 0.5, 0.0)).quantile(LEVELS)
    assert np.bincount(turns) / len(turns) == pytest.approx([0, 0.7, 0.15, 0.15], abs=1e-4)
    assert ContinuingTurns((0.5, 1.0), max_turns=7).quantile(LEVELS).tolist().count(7) == len(LEVELS) // 2


@pytest.mark.parametrize("law, mean, median", [
    (ExponentialTime(3.0), 3.0, 3.0 * np.log(2)), (LogNormalTime(2.0, 0.5), 2.0 * np.exp(0.125), 2.0),
    (QuantilesTime([0, 0.5, 1], [0, 2, 10]), 0.5 * 1 + 0.5 * 6, 2.0), (duration_law(4), 4.0, 4.0)])
def test_durations(law, mean, median):
    seconds = law.quantile(LEVELS)
    assert seconds.min() >= 0 and np.all(np.diff(seconds) >= 0)
    assert seconds.mean() == pytest.approx(mean, rel=2e-3) and np.median(seconds) == pytest.approx(median, rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**40), count=st.integers(1, 400), shared=st.integers(0, 300), limit=st.integers(481, 2000))
def test_contexts_grow_by_answers_and_new_tokens_up_to_the_limit(seed, count, shared, limit):
    w = drawn(seed, count, shared_tokens=shared, context_limit=limit)
    assert len(w) == count and np.all(np.diff(w.arrival_s) >= 0)
    order = np.lexsort((w.turn, w.session))
    session, turn, prompt, output, arrival = (
        x[order].astype(np.float64) for x in (w.session, w.turn, w.input_tokens, w.output_tokens, w.arrival_s))
    is_first = np.concatenate([[True], np.diff(session) > 0])
    assert np.array_equal(turn == 0, is_first) and np.all(np.diff(turn)[~is_first[1:]] == 1)
    assert set(session) == set(range(int(session[-1]) + 1))
    assert np.all((prompt[is_first] > shared) & (prompt[is_first] <= shared + 100)) and np.all(prompt + output <= limit)
    later = np.flatnonzero(~is_first)
    new = prompt[later] - prompt[later - 1] - output[later - 1]
    assert np.all((new >= 1) & (new <= 60))
    # The earliest that a turn could come, and who follows whom.
    assert np.array_equal(arrival[later], arrival[later - 1] + w.think_s[order][later])
    assert np.array_equal(w.successors()[order[later - 1]], order[later])
    assert (w.successors() >= 0).sum() == len(later)


def test_more_requests_and_another_rate_change_nothing_else():
    few, many, slow = drawn(count=200), drawn(count=900), drawn(count=200, rate_rps=1.0)

    def rows(w):
        return {(s, t): (p, o, x, tuple(u)) for s, t, p, o, x, u in zip(
            w.session, w.turn, w.input_tokens, w.output_tokens, w.think_s, w.uniforms, strict=True)}

    assert rows(few).items() <= rows(many).items() and rows(few) == rows(slow)
    starts = [w.arrival_s[w.turn == 0] for w in (few, slow)]
    np.testing.assert_allclose(starts[1], 2 * starts[0], atol=2e-6)


def test_an_output_limit_is_told_and_kept():
    made = generator("poisson", rate_rps=1.0, input=10, output=200, output_limit=64, sessions=CHAT)
    w = made.sample(0, 300)
    assert w.output_tokens.max() == 64 and np.all(w.max_tokens == 64) and (w.input_tokens + 64).max() <= 900
    assert w.num_context_limited > 0


def test_sessions_that_end_at_the_limit_are_counted():
    free = drawn(context_limit=10**6)
    tight = drawn(context_limit=400)
    assert free.num_context_limited == 0 < tight.num_context_limited <= tight.provenance["num_sessions"]
    assert tight.turn.max() < free.turn.max()


def test_published_shares_of_the_agent():
    """TraceLab: 8.8 steps a request, 18.4 s a tool call, 4 % of calls of more than 60 s with 84.7 % of the time, about
    70 % of less than 1 s."""
    w = generator("agent", rate_rps=1.0, sessions={"context_limit": 10**7}).sample(0, 60_000)
    tool = w.think_s[w.turn > 0]
    assert tool.mean() == pytest.approx(18.4, rel=0.03) and (tool < 1).mean() == pytest.approx(0.7, abs=0.01)
    is_long = tool > 60
    assert is_long.mean() == pytest.approx(0.04, abs=0.003)
    assert tool[is_long].sum() / tool.sum() == pytest.approx(0.847, abs=0.02)
    assert len(w) / w.provenance["num_sessions"] == pytest.approx(8.8, rel=0.03)
    assert np.median(w.output_tokens) == pytest.approx(220, rel=0.03)


def test_published_shares_of_conversations():
    """Mooncake's conversations: requests at chain positions 1 to 4, and fresh tokens of those that continue."""
    w = generator("conversation", rate_rps=1.0, sessions={"context_limit": 10**7}).sample(0, 60_000)
    shares = np.bincount(w.turn)[:4] / len(w)
    assert shares == pytest.approx([0.61, 0.19, 0.08, 0.04], abs=0.015)
    after = w.successors()
    is_answered = np.flatnonzero(after >= 0)
    new = w.input_tokens[after[is_answered]] - w.input_tokens[is_answered] - w.output_tokens[is_answered]
    assert np.percentile(new, [50, 90]) == pytest.approx([829, 9741], rel=0.06)
    assert np.percentile(w.output_tokens, [50, 90]) == pytest.approx([350, 597], rel=0.03)


def test_rows_taken_keep_their_order():
    w = drawn()
    some = w.take(w.session % 2 == 0)
    assert set(some.session) == {s for s in set(w.session) if s % 2 == 0}
    assert np.array_equal(some.turn[some.successors()[some.successors() >= 0]],
                          some.turn[np.flatnonzero(some.successors() >= 0)] + 1)
    kept = w.thinned(0.5, seed=3)
    assert 0.3 < len(set(kept.session)) / len(set(w.session)) < 0.7
    for session in set(kept.session):
        assert (kept.session == session).sum() == (w.session == session).sum()


@pytest.mark.parametrize("changes, field, words", [
    (dict(think_s=[0.0, -1.0, 0.0]), "think_s[1]", "negative"),
    (dict(turn=[0, 0, 0]), "turn[1]", "not behind"),
    (dict(turn=None), "session", "go together"),
    (dict(session=None, turn=None), "session", "go together"),
])
def test_a_workload_refuses(changes, field, words):
    fields = dict(arrival_s=[0.0, 1.0, 2.0], input_tokens=[5, 9, 5], output_tokens=[2, 2, 2], session=[0, 0, 1],
                  turn=[0, 1, 0], think_s=[0.0, 1.0, 0.0])
    assert Workload(**fields).successors().tolist() == [1, -1, -1]
    with pytest.raises(InputError) as error:
        Workload(**{**fields, **changes})
    assert error.value.field == field and words in str(error.value)


def test_a_rate_is_not_stretched_afterwards():
    with pytest.raises(InputError, match="cannot stretch sessions"):
        drawn().with_rate(3.0)
    open_loop = dataclasses.replace(drawn(), think_s=None)
    assert open_loop.with_rate(3.0).mean_rate_rps == pytest.approx(3.0)


BASE = {"schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
        "engine": {"max_model_len": 8192},
        "workload": {"kind": "poisson", "rate_rps": 1.0, "input": 100, "output": 50, "num_requests": 50,
                     "sessions": {"turns": 3, "think_s": 5, "context_limit": 4096}}}


BURSTGPT = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Log Type
0,a,4,ChatGPT,10,5,Conversation log
1,,2,ChatGPT,20,5,API log
2,b,9,GPT-4,30,5,Conversation log
7,a,3,ChatGPT,40,5,Conversation log
9,b,1,GPT-4,50,5,Conversation log
"""


def test_sessions_of_a_trace(tmp_path):
    """Think times are what is left between an answer and the next turn; one that did not wait has none."""
    path = tmp_path / "t.csv"
    path.write_text(BURSTGPT)
    closed = read_trace(path, sessions=True)
    assert closed.successors().tolist() == [3, -1, 4, -1, -1]
    assert closed.think_s.tolist() == [0, 0, 0, 3, 0] and closed.turn.tolist() == [0, 0, 0, 1, 1]
    open_loop = read_trace(path)
    assert open_loop.think_s is None and open_loop.session.tolist() == closed.session.tolist()
    assert open_loop.arrival_s.tolist() == [0, 1, 2, 7, 9]


def test_a_workload_written_is_read_again(tmp_path):
    w = drawn(count=80)
    w.to_frame().to_csv(tmp_path / "w.csv", index=False)
    again = read_trace(tmp_path / "w.csv", sessions=True, offset_to_zero=False)
    for name in ("arrival_s", "input_tokens", "output_tokens", "think_s", "turn"):
        np.testing.assert_array_equal(getattr(again, name), getattr(w, name))
    assert np.array_equal(again.successors(), w.successors())


@pytest.mark.parametrize("columns, words", [
    ("input_tokens,output_tokens,arrival_s\n1,1,0\n", "says nothing"),
    ("input_tokens,output_tokens,arrival_s,session\n1,1,0,a\n", "neither these"),
    ("input_tokens,output_tokens,arrival_s,session,think_s\n1,1,0,a,\n1,1,2,a,\n", "missing where a turn follows"),
])
def test_a_trace_that_cannot_be_closed_is_refused(tmp_path, columns, words):
    (tmp_path / "t.csv").write_text(columns)
    assert len(read_trace(tmp_path / "t.csv")) > 0
    with pytest.raises(InputError, match=words):
        read_trace(tmp_path / "t.csv", sessions=True)


def changed(sessions=None, engine=None, **workload):
    tree = {**BASE, "workload": {**BASE["workload"], **workload}, "engine": {**BASE["engine"], **(engine or {})}}
    tree["workload"]["sessions"] = {**BASE["workload"]["sessions"], **(sessions or {})}
    tree["workload"] = {k: v for k, v in tree["workload"].items() if v is not None}
    tree["workload"]["sessions"] = {k: v for k, v in tree["workload"]["sessions"].items() if v is not None}
    return tree


@pytest.mark.parametrize("tree, field, words", [
    (changed({"think_s": -1}), "workload.sessions.think_s", "out of range"),
    (changed({"turns": 0}), "workload.sessions.turns", "out of range"),
    (changed({"turns": {"kind": "geometric", "mean_turns": 0.5}}), "workload.sessions.turns.mean_turns", ">= 1"),
    (changed({"turns": {"kind": "continuing", "shares": [0.5, 1.0]}}), "workload.sessions.turns.shares", "never end"),
    (changed({"context_limit": 90}), "workload.sessions.context_limit", "below the first prompt"),
    (changed({"context_limit": 1000, "shared_tokens": 950}), "workload.sessions.context_limit", "raise it to 1051"),
    (changed({"context_limit": 9000}), "workload.sessions.context_limit", "beyond engine.max_model_len"),
    (changed({"turns": None}), "workload.sessions.turns", "missing"),
    (changed({"think_s": {"kind": "quantiles", "levels": [0, 0.5], "seconds": [1, 2]}}),
     "workload.sessions.think_s.levels", "0 to 1"),
    (changed({"new_tokens": {"kind": "uniform", "min_tokens": 9, "max_tokens": 8}}),
     "workload.sessions.new_tokens.min_tokens", "above max_tokens"),
    (changed(kind="closed-loop", concurrency=3, rate_rps=None), "workload.sessions", "no effect with kind"),
    ({**BASE, "workload": {"kind": "trace", "trace": "t.csv", "replay": "sessions", "rate_rps": 2.0}},
     "workload.rate_rps", "cannot be had with replay"),
    (changed(replay="sessions"), "workload.replay", "no effect with kind"),
    (changed(engine={"scheduling_policy": "priority"}), "engine.scheduling_policy", "not known of sessions"),
])
def test_a_scenario_refuses(tree, field, words):
    Scenario.from_dict(changed())
    with pytest.raises(InputError) as error:
        Scenario.from_dict(tree)
    assert error.value.field == field and words in str(error.value), error.value


def test_a_first_turn_beyond_the_limit_is_refused_when_drawn():
    with pytest.raises(InputError, match="context_limit = 100.*first turn of session"):
        drawn(context_limit=100)


@pytest.mark.parametrize("given, words", [
    ({"kind": "geometrical", "mean_turns": 3}, "did you mean 'geometric'"),
    ({"kind": "continuing", "shares": []}, "not shares"), (0, "turns, 1 or more")])
def test_laws_by_name(given, words):
    assert turns_law({"kind": "geometric", "mean_turns": 3.0}).mean_turns == 3.0
    with pytest.raises(InputError, match=words):
        turns_law(given)


@pytest.mark.parametrize("kind", ["conversation", "agent"])
def test_numbers_of_a_preset_can_be_replaced(kind):
    section = Scenario.from_dict({**BASE, "engine": {}, "workload": {
        "kind": kind, "rate_rps": 0.5, "num_requests": 40, "output": 30, "sessions": {"turns": 2}}}).workload
    w = generator(**section.generator_arguments()).sample(1, 40)
    assert section.has_sessions and w.turn.max() == 1 and np.all(w.output_tokens == 30) and w.shared_tokens > 0
