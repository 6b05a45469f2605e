"""What GPUs hold that encode images, compute prompts, decode, or do it all; and what encoding apart is worth at most.

    weights     encode: vision tower and projector; prefill, decode: language model; aggregated: both
    an image    its embeddings, tiles x tile bytes, while it is encoded, and until its prompt is computed; where the
                language model is, the KV cache of its tokens as well

    TTFT alone    n t_img + t_pre on one engine, ceil(n / E) t_img + t_pre with the images dealt to E
    gain bound    1 - (t_enc / E + t_pre) / (t_enc + t_pre)

Source: EPD (arXiv 2501.05460) for what is where; sizes from `jaxsim.spec.vision` and `jaxsim.spec.model`.

Known gaps: activations (of the tower above all) and what an engine reserves beside its weights.
"""

import math
from dataclasses import dataclass

from jaxsim._core.errors import InputError
from jaxsim.spec.memory import rank_weight_bytes
from jaxsim.spec.vision import EMBEDDING_BYTES, VisionSpec

ROLES = ("encode", "prefill", "decode", "aggregated")


@dataclass(frozen=True)
class Held:
    """Memory of one GPU of a role, in bytes.

    weight_bytes; embedding_bytes and kv_bytes: of an image; token_bytes: KV of a token of text.
    """

    weight_bytes: float
    embedding_bytes: float
    kv_bytes: float
    token_bytes: float

    @property
    def image_bytes(self) -> float:
        """All that an image takes."""
        return self.embedding_bytes + self.kv_bytes

    def request_bytes(self, images: int, text_tokens: int = 0) -> float:
        """A request with so many images and tokens of text and output."""
        return images * self.image_bytes + text_tokens * self.token_bytes

    def peak_bytes(self, requests: int, images: int, text_tokens: int = 0) -> float:
        """Weights, and so many requests at once."""
        return self.weight_bytes + requests * self.request_bytes(images, text_tokens)

    def left_bytes(self, memory_bytes: float, cache_tiles: int = 0, tile_bytes: float = 0.0) -> float:
        """For requests, or for the KV cache, beside weights and a multimodal cache of so many tiles; 0 if none."""
        return max(memory_bytes - self.weight_bytes - cache_tiles * tile_bytes, 0.0)

    def largest_batch(self, memory_bytes: float, images: int, text_tokens: int = 0) -> int:
        """Requests that fit at once."""
        return int(self.left_bytes(memory_bytes) // self.request_bytes(images, text_tokens))

    def most_images(self, memory_bytes: float) -> int:
        """Images of the largest request that fits."""
        return int(self.left_bytes(memory_bytes) // self.image_bytes)


def held(vision: VisionSpec, role: str) -> Held:
    """What a GPU of a role holds. Raises `InputError` for another role."""
    if role not in ROLES:
        raise InputError("role", role, "is no role of a GPU", f"use one of {', '.join(ROLES)}")
    model = vision.language
    tower = EMBEDDING_BYTES * vision.num_parameters
    language = rank_weight_bytes(model)
    has_tower, has_language = role in ("encode", "aggregated"), role != "encode"
    token = float(model.kv_bytes_per_token()) if has_language else 0.0
    embeddings = vision.tiles_per_image * vision.tile_bytes if role != "decode" else 0
    return Held(has_tower * tower + has_language * language, float(embeddings), vision.tokens_per_image * token, token)


def ttft_s(images: int, image_s: float, prefill_s: float, num_encoders: int = 1) -> float:
    """Of a request alone, in seconds, its images dealt in turn to so many engines."""
    return math.ceil(images / num_encoders) * image_s + prefill_s


def most_gain(encode_s: float, prefill_s: float, num_encoders: int) -> float:
    """Share of the TTFT that dealing images to so many engines can save at most.

    encode_s: of all images of a request on one engine; prefill_s: of its prompt.
    """
    return 1 - (encode_s / num_encoders + prefill_s) / (encode_s + prefill_s)
