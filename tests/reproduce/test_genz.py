"""GenZ's claims: which of them hold, which do not, and what stands beside them."""

import jax
import pytest

from jaxsim.cost import genz as cost
from jaxsim.reproduce import genz
from jaxsim.reproduce.claim import NO_GATE, NOT_REPRODUCED, REPRODUCED
from jaxsim.spec.model import load_model

pytestmark = pytest.mark.unoptimised


@pytest.fixture(scope="module")
def found():
    return genz.reproduce()


def test_verdicts(found):
    """A claim that changes its verdict is to be looked at."""
    by = {verdict: [c.claim for c in found.claims if c.verdict == verdict] for verdict in (
        REPRODUCED, NOT_REPRODUCED, NO_GATE)}
    assert len(found.claims) == 28 and len(by[REPRODUCED]) == 12 and len(by[NO_GATE]) == 13
    assert by[NOT_REPRODUCED] == ["the same, times longer", "10T model at 2M tokens: memory, TB",
                                  "experts of a prefill: TP, then EP, ms"]


def test_layers_and_passes_have_the_tolerance_of_their_class(found):
    times = found.claims[:10]
    # No gate where a choice was read off the row itself.
    assert [c.tolerance for c in times] == [1e-3] * 5 + [None] + [0.1] * 3 + [None]
    assert [c.paper for c in times] == [float(c.published_ms) for c in cost.CLAIMS[:10]]


def test_memory_of_gpt_3_and_gpt_4_have_the_same_tokens():
    """The notebook's caches of three models in its first context; GPT-4's is 128 layers of 84 heads of 128."""
    assert genz.FIRST_TOKENS == 110_400
    assert 2 * 128 * 84 * 128 * genz.FIRST_TOKENS / cost.GIB == pytest.approx(283.0078125, rel=1e-9)


def test_weights_of_the_assistant_to_the_byte():
    model = genz.assistant()
    assert genz.weight_bytes(model) == 8839.125 * cost.GIB
    assert model.kv_heads == 108 and load_model("hypothetical/super-llm-10t-moe").kv_heads == 12


def test_elasticities_are_shares_of_a_pass():
    """A pass is homogeneous: a percent more of all rates and a percent less latency is a percent less time, but for
    the start of collectives."""
    for name, numbers in genz.elasticities().items():
        rates = sum(numbers[x] for x in ("bytes_per_s", "flops", "link_bytes_per_s"))
        assert -1 < rates - numbers["link_latency_s"] < -0.9, name


def test_routing_fills_a_chip():
    """From one token's two experts to all that four chips hold."""
    few, many = (genz.mixtral_22b(distinct_experts="expected"), genz.mixtral_22b(distinct_experts="all"))
    assert few == pytest.approx(many, rel=2e-3) and genz.mixtral_22b() < 0.6 * many
    assert jax.config.values["jax_enable_x64"] is False


def test_the_plot(found, tmp_path):
    found.draw(tmp_path / "genz.png")
    assert (tmp_path / "genz.png").stat().st_size > 20_000
