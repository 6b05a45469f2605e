"""The readers on the measured traces: published counts and statistics."""

import numpy as np
import pytest

from jaxsim.traces import read_lengths, read_trace


@pytest.fixture
def folder(shared_data):
    path = shared_data / "traces"
    if not path.is_dir():
        pytest.skip("no traces in the measured data")
    return path


@pytest.mark.parametrize(
    ("name", "rows", "rate", "mean_input", "mean_output"),
    [("azure2023_conv.csv", 19_366, 5.53, 1155, 211), ("azure2023_code.csv", 8_819, 2.57, 2048, 27.9)],
)
def test_azure(folder, name, rows, rate, mean_input, mean_output):
    w = read_trace(folder / name)
    assert len(w) == rows and w.provenance["num_dropped"] == 0
    assert w.mean_rate_rps == pytest.approx(rate, abs=0.005)
    assert w.input_tokens.mean() == pytest.approx(mean_input, abs=0.6)
    assert w.output_tokens.mean() == pytest.approx(mean_output, abs=0.2)


def unbounded_prefix_hits(w):
    """Share of prompt tokens whose block was seen before in an earlier request."""
    seen, hits = set(), 0
    for i in range(len(w)):
        blocks = w.prefix_of(i).tolist()
        depth = next((k for k, b in enumerate(blocks) if b not in seen), len(blocks))
        hits += min(depth * w.prefix_block_size, int(w.input_tokens[i]))
        seen.update(blocks)
    return hits / w.input_tokens.sum(dtype=np.int64)


def test_mooncake(folder):
    w = read_trace(folder / "mooncake_conversation_trace.jsonl")
    assert len(w) == 12_031
    assert w.input_tokens.mean() == pytest.approx(12_035, abs=1) and w.output_tokens.mean() == pytest.approx(
        343, abs=1
    )
    assert np.percentile(w.input_tokens, [50, 90]) == pytest.approx([6909, 27_367], abs=2)
    # Published for an unbounded cache: 37.4 % of tokens, counted with whole blocks.
    assert unbounded_prefix_hits(w) == pytest.approx(0.374, abs=0.02)
    assert np.diff(np.unique(w.arrival_s)).min() > 2.99
    spread = read_trace(folder / "mooncake_conversation_trace.jsonl", dither_s=3.0)
    assert len(np.unique(spread.arrival_s)) > 11_900
    assert unbounded_prefix_hits(spread) == pytest.approx(0.374, abs=0.02)


@pytest.mark.parametrize(
    ("name", "seen_before"), [("sharegpt300_llama31.jsonl", 0.077), ("sharegpt300_qwen3.jsonl", 0.080)]
)
def test_sharegpt_with_block_ids(folder, name, seen_before):
    w = read_trace(folder / name)
    assert len(w) == 300 and w.prefix_block_size == 16
    assert 1 - len(np.unique(w.prefix_hashes)) / w.num_prefix_blocks == pytest.approx(seen_before, abs=0.0006)
    np.testing.assert_array_equal(np.diff(w.prefix_offsets), w.input_tokens // 16)


@pytest.mark.parametrize(
    ("name", "rows", "mean_input", "mean_output"),
    [
        ("sharegpt_lengths_10k.csv", 10_000, None, None),
        ("arxiv_summarization_lengths.csv", 28_257, 2588, 291),
    ],
)
def test_lengths(folder, name, rows, mean_input, mean_output):
    inputs, outputs = read_lengths(folder / name)
    assert len(inputs) == rows
    if mean_input is not None:
        assert inputs.mean() == pytest.approx(mean_input, abs=1) and outputs.mean() == pytest.approx(
            mean_output, abs=1
        )
