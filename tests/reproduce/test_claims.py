"""Verdicts follow from numbers, records are JSON, tables are narrow, and orders are told from noise."""

import dataclasses
import io
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest

from jaxsim.reproduce import runs, show
from jaxsim.reproduce.claim import FALLS, NO_GATE, NOT_REPRODUCED, REPRODUCED, RISES, Claim, Factor, Reproduction

KEYS = ["system", "claim", "source", "paper", "ours", "tolerance", "verdict"]


def claim(paper, ours, tolerance, reason="", **given):
    return Claim(**{"system": "made-up", "claim": "a figure, ms", "source": "a paper, table 1", "paper": paper,
                    "ours": ours, "tolerance": tolerance, "reason": reason, **given})


@pytest.mark.parametrize("paper, ours, tolerance, verdict", [
    (1.0, 1.019, 0.02, REPRODUCED),
    (1.0, 1.02, 0.02, REPRODUCED),
    (1.0, 1.0201, 0.02, NOT_REPRODUCED),
    (-1.0, -1.0201, 0.02, NOT_REPRODUCED),
    (1.0, -1.0, 0.02, NOT_REPRODUCED),
    (0.0, 0.0, 0.02, REPRODUCED),
    (0.0, 1e-9, 0.02, NOT_REPRODUCED),
    (3.0, 3.0, 0.0, REPRODUCED),
    (3.0, 3.0001, 0.0, NOT_REPRODUCED),
    (1.0, math.nan, 0.02, NOT_REPRODUCED),
    (1.0, math.inf, 0.02, NOT_REPRODUCED),
    ((1.0, 2.0), (1.01, 1.99), 0.02, REPRODUCED),
    ((1.0, 2.0), (1.01, 1.9), 0.02, NOT_REPRODUCED),
    (3.0, 6.0, Factor(2), REPRODUCED),
    (3.0, 1.5, Factor(2), REPRODUCED),
    (3.0, 6.01, Factor(2), NOT_REPRODUCED),
    (3.0, 1.49, Factor(2), NOT_REPRODUCED),
    (3.0, 0.0, Factor(2), NOT_REPRODUCED),
    (3.0, -3.0, Factor(2), NOT_REPRODUCED),
    (3.0, math.nan, Factor(2), NOT_REPRODUCED),
    (3.0, math.inf, Factor(2), NOT_REPRODUCED),
    ((3.0, 4.0), (2.0, 6.1), Factor(1.5), NOT_REPRODUCED),
    ((3.0, 4.0), (2.0, 6.0), Factor(1.5), REPRODUCED),
    (RISES, (1.0, 2.0, 3.0), 0.0, REPRODUCED),
    (RISES, (1.0, 1.0, 3.0), 0.0, NOT_REPRODUCED),
    (RISES, (1.0, 2.0, 3.0), (0.9, 0.9), REPRODUCED),
    (RISES, (1.0, 2.0, 3.0), (0.9, 1.0), NOT_REPRODUCED),
    (RISES, (1.0, 2.0, math.nan), 0.0, NOT_REPRODUCED),
    (RISES, (3.0, 2.0, 1.0), 0.0, NOT_REPRODUCED),
    (FALLS, (3.0, 2.0, 1.0), 0.5, REPRODUCED),
    (FALLS, (3.0, 2.0, 1.7), 0.5, NOT_REPRODUCED),
])
def test_a_verdict_follows_from_the_numbers(paper, ours, tolerance, verdict):
    found = claim(paper, ours, tolerance)
    assert found.verdict == verdict
    assert bool(found.why) == (verdict == NOT_REPRODUCED)


@pytest.mark.parametrize("paper, ours, tolerance, verdict", [
    (None, 1.0, 0.02, NO_GATE), (None, None, None, NO_GATE), (1.0, 1.0, None, NO_GATE), (1.0, 9.0, None, NO_GATE),
    (RISES, (1.0, 2.0), None, NO_GATE), (1.0, None, 0.02, NOT_REPRODUCED), (RISES, None, 0.0, NOT_REPRODUCED)])
def test_what_lacks_a_number_says_why(paper, ours, tolerance, verdict):
    assert claim(paper, ours, tolerance, "not at hand").verdict == verdict
    assert claim(paper, ours, tolerance, "not at hand").why == "not at hand"
    with pytest.raises(ValueError, match="says why"):
        claim(paper, ours, tolerance)


def test_a_factor_is_above_one():
    for times in (1.0, 0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="above 1"):
            Factor(times)


def test_a_verdict_cannot_be_given():
    assert "verdict" not in {field.name for field in dataclasses.fields(Claim)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        claim(1.0, 2.0, 0.1).verdict = REPRODUCED


@pytest.mark.parametrize("paper, ours, tolerance", [
    ("grows", (1.0, 2.0), 0.0), (RISES, 1.0, 0.0), (RISES, (1.0,), 0.0), (RISES, (1.0, 2.0), (0.1, 0.1)),
    ((1.0, 2.0), 1.0, 0.1), (1.0, (1.0, 1.0), 0.1), (1.0, 1.0, (0.1, 0.1)), (1.0, 1.0, -0.1),
    (RISES, (1.0, 2.0), Factor(2)), (0.0, 1.0, Factor(2)), ((1.0, 2.0), 1.0, Factor(2))])
def test_what_does_not_belong_together_is_refused(paper, ours, tolerance):
    with pytest.raises(ValueError):
        claim(paper, ours, tolerance)


@pytest.mark.parametrize("given, says", [
    (claim(2.0, 3.0, 0.1), "off by +50 %"), (claim(2.0, 1.0, 0.1), "off by -50 %"),
    (claim((1.0, 2.0), (1.0, 3.0), 0.1), "off by +50 %"), (claim(0.0, 0.5, 0.1), "0.5 instead of 0"),
    (claim(1.0, math.nan, 0.1), "no number came out"),
    (claim(2.0, 5.0, Factor(2)), "2.5 times what was published"),
    (claim((2.0, 2.0), (9.0, 0.0), Factor(2)), "0 times what was published"),
    (claim(RISES, (1.0, 3.0, 3.5), (0.1, 0.7)), "1 of 2 steps are not there: from 3 to 3.5, where 0.7 can be noise"),
    (claim(RISES, (1.0, 1.0), 0.0), "1 of 1 steps are not there: from 1 to 1"),
    (claim(2.0, 3.0, 0.1, "too simple"), "too simple; off by +50 %")])
def test_a_miss_is_told(given, says):
    assert given.why == says


CLAIMS = (claim(1.234567, 1.2345, 0.02), claim((1.0, 2.0), (1.0, 2.0), 0.0), claim(RISES, (1.0, 20000.0), (0.5,)),
          claim(FALLS, (1.0, 1.0, 2.0), 0.0), claim(1.0, math.nan, 0.1), claim(None, 3.0, None, "unknown"),
          claim(0.2, None, 0.1, "cannot be said"), claim(2.0, 3.0, Factor(2)), claim(4.0, 1.0, Factor(1.5)),
          claim(1.0, 1.0, 0.1, claim="a rather long claim " * 5, source="a [bracketed] source " * 3))


def test_records_are_json():
    text = show.to_json(CLAIMS)
    records = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [record["verdict"] for record in records] == [found.verdict for found in CLAIMS]
    for record, found in zip(records, CLAIMS, strict=True):
        assert list(record) == KEYS + (["reason"] if found.why else [])
    assert [record["tolerance"] for record in records[7:9]] == ["x2", "x1.5"]
    assert records[1]["ours"] == [1.0, 2.0] and records[2]["tolerance"] == [0.5]
    assert records[4]["ours"] is None and records[5]["paper"] is None


def test_a_table_fits_and_leaves_nothing_out():
    file = io.StringIO()
    show.print_claims("A system", CLAIMS, file)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    text = " ".join(" ".join(lines).split())
    for words in ("1.235", "1 < 20,000", "1 = 1 < 2", "unknown", "cannot be said", "bracketed", "2 %", "exact", "noise",
                  "x1.5",
                  "5 reproduced, 4 not reproduced, 1 no gate"):
        assert words in text, words


def test_files_are_written(tmp_path):
    found = Reproduction(CLAIMS, lambda path: path.write_bytes(b"drawn"))
    paths = [tmp_path / name for name in ("a.png", "a.txt", "a.json")]
    show.write("A system", found, *paths)
    assert paths[0].read_bytes() == b"drawn" and json.loads(paths[2].read_text()) == [c.record() for c in CLAIMS]
    assert "not reproduced" in paths[1].read_text()


def made_up(seeds: int, noise: float) -> pd.DataFrame:
    """A metric that rises by 1 with x for every seed, whose seeds differ by much more than that, and some noise."""
    rng = np.random.default_rng(0)
    rows = [{"seed": seed, "x": x, "y": 100 * seed + x + noise * rng.standard_normal()}
            for seed, x in itertools.product(range(seeds), (1, 2, 3))]
    return pd.DataFrame(rows).sample(frac=1, random_state=1)


def test_steps_are_compared_within_seeds():
    means, margins = runs.means_in_order(made_up(8, 0.1), "x", [1, 2, 3], "y")
    assert np.diff(means) == pytest.approx([1, 1], abs=0.3)
    assert 0 < max(margins) < 0.3
    assert claim(RISES, means, margins).verdict == REPRODUCED
    backwards, margins = runs.means_in_order(made_up(8, 0.1), "x", [3, 2, 1], "y")
    assert claim(RISES, backwards, margins).verdict == NOT_REPRODUCED


def test_noise_is_no_order():
    means, margins = runs.means_in_order(made_up(8, 20.0), "x", [1, 2, 3], "y")
    assert claim(RISES, means, margins).verdict == NOT_REPRODUCED
    assert min(margins) > 1


def test_margins_are_students():
    """95 % of intervals made this way hold the mean."""
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 2.0, (4, 4000))
    is_in = np.abs(values.mean(axis=0) - 3.0) < runs.half_width(values)
    assert is_in.mean() == pytest.approx(0.95, abs=0.015)
