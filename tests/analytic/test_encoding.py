"""Memory of GPUs by role, and what dealing images saves, against sums done by hand."""

import pytest

from jaxsim._core.errors import InputError
from jaxsim.analytic.encoding import held, most_gain, ttft_s
from jaxsim.spec.vision import load_vision, vision_catalogue

# Published totals of the checkpoints, in 1e9 parameters (model cards).
PUBLISHED = {"openbmb/MiniCPM-V-2_6": 8.10, "OpenGVLab/InternVL2-8B": 8.08, "OpenGVLab/InternVL2-26B": 25.5}


def test_every_tower_and_its_language_model_add_up_to_the_published_total():
    assert set(PUBLISHED) == set(vision_catalogue())
    for name, total in PUBLISHED.items():
        vision = load_vision(name)
        assert (vision.num_parameters + vision.language.num_parameters) / 1e9 == pytest.approx(total, rel=0.003)
        assert vision.source and vision.language.source


def test_embeddings_of_an_image_are_those_published():
    """EPD: 640 tokens of 3584 numbers (4.6 MB), 3328 tokens of 4096 (27 MB) for an image of 4032 x 3024."""
    small, large = load_vision("minicpm-v-2.6"), load_vision("internvl2-8b")
    assert (small.tokens_per_image, large.tokens_per_image) == (640, 3328)
    assert small.tiles_per_image * small.tile_bytes == 640 * 3584 * 2 == pytest.approx(4.6e6, rel=0.01)
    assert large.tiles_per_image * large.tile_bytes == 3328 * 4096 * 2 == pytest.approx(27e6, rel=0.02)


def test_who_holds_what():
    vision = load_vision("minicpm-v-2.6")
    encode, prefill, decode, both = (held(vision, role) for role in ("encode", "prefill", "decode", "aggregated"))
    assert encode.weight_bytes + prefill.weight_bytes == both.weight_bytes
    assert prefill.weight_bytes == decode.weight_bytes and encode.kv_bytes == 0 == decode.embedding_bytes
    # 28 layers of keys and values, 4 heads of 128 numbers of 2 bytes.
    assert prefill.kv_bytes == 640 * 28 * 2 * 4 * 128 * 2
    assert both.image_bytes == prefill.image_bytes == encode.image_bytes + prefill.kv_bytes
    assert encode.peak_bytes(3, 2) == encode.weight_bytes + 6 * 640 * 3584 * 2
    assert encode.largest_batch(encode.weight_bytes + 5 * encode.image_bytes + 1, 2) == 2
    assert encode.most_images(encode.weight_bytes + 5 * encode.image_bytes + 1) == 5
    assert both.largest_batch(1e9, 1) == 0, "the weights alone are more"
    assert prefill.left_bytes(40e9, 3000, 100.0) == 40e9 - prefill.weight_bytes - 3e5


def test_dealing_images():
    assert ttft_s(5, 0.5, 0.25, 2) == 3 * 0.5 + 0.25
    assert most_gain(6 * 0.5, 0.25, 6) == 1 - ttft_s(6, 0.5, 0.25, 6) / ttft_s(6, 0.5, 0.25) == 1 - 0.75 / 3.25


@pytest.mark.parametrize(("call", "says"), [
    (lambda: held(load_vision("minicpm-v-2.6"), "mixed"), "is no role"),
    (lambda: load_vision("llama-3.1-8b"), "no vision tower"),
    (lambda: load_vision("no-such-model"), "not in the catalogue")])
def test_what_is_not_known_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()
