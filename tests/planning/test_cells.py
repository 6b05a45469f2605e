"""Tables of attention copied: nothing but the FFN is taken out, at every size that an iteration runs at."""

import jax
import numpy as np
import pytest

from jaxsim.cost.rank import pad_to_graph
from jaxsim.cost.roofline import roofline
from jaxsim.cost.tabulated import DECODE_DEVICE, TOKENS
from jaxsim.kernels import octaves
from jaxsim.planning import cells
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan

pytestmark = pytest.mark.unoptimised

MOST_TOKENS, MOST_SEQUENCES = 600, 40


@pytest.mark.parametrize("graphs, pads_prompts, pads_decodes", [
    ("decodes", False, True), pytest.param(True, True, True, marks=pytest.mark.slow),
    pytest.param(False, False, False, marks=pytest.mark.slow)])
def test_the_tables_of_a_group_and_its_ffn_are_those_without_cells(graphs, pads_prompts, pads_decodes):
    """Where only decodes are captured, prompts run as they are."""
    model, device = load_model("llama-3.1-8b"), load_device("h100")
    knots, counts = octaves.knots(TOKENS, MOST_TOKENS), np.arange(MOST_SEQUENCES + 1)
    with jax.disable_jit():
        group, whole = (roofline(model, device, Plan(tensor_parallel_size=n)) for n in (1, 2))
        plain = group.tables(MOST_TOKENS, MOST_SEQUENCES, cuda_graphs=graphs)
        made = cells.cell_tables(group, whole, MOST_TOKENS, MOST_SEQUENCES, cuda_graphs=graphs)
        run_at = np.asarray(pad_to_graph(knots) if pads_prompts else knots, float)
        decoded = np.asarray(pad_to_graph(counts) if pads_decodes else counts, float)
        by_tokens, by_sequences = (cells._ffn_seconds(group, x) for x in (run_at, decoded))
        # All that depends on tokens, operator by operator.
        asked = group.token_seconds(run_at)
    assert np.asarray(plain.by_tokens) == pytest.approx(np.asarray(asked), rel=1e-6)
    assert np.asarray(made.by_tokens + by_tokens) == pytest.approx(np.asarray(plain.by_tokens), rel=1e-5)
    assert np.asarray(made.by_sequences[:, DECODE_DEVICE] + by_sequences) == pytest.approx(
        np.asarray(plain.by_sequences[:, DECODE_DEVICE]), rel=1e-5)
    assert np.any(pad_to_graph(knots) != knots) and np.any(pad_to_graph(counts) != counts)
    assert (int(made.together.captured) > 0) == pads_prompts
