"""Where images are encoded: on engines of their own, or by those that compute the prompts."""

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int

from jaxsim.policy.routing import AbstractRouting


class Encoding(eqx.Module):
    """Which executors only encode images, and how embeddings get from them to one that computes the prompt.

    encodes: of each executor, whether it does this and no more. dealing: which of these gets a part of a request's
    images; the router of arrivals chooses who computes the prompt, once all parts are encoded. cache_tiles: of the
    multimodal cache of each executor that computes prompts; most_tiles: those of requests that it has accepted and no
    pass has taken yet, before it accepts no more. seconds_per_tile: of embeddings on a link of its own; a transfer
    also takes the latency of `HandOver`.

    Source: EPD (arXiv 2501.05460): pools, the multimodal cache, parts dealt in turn (intra-request parallelism), the
    5 % rule of acceptance (`waiting_block_prop_threshold`, as in DistServe).
    """

    encodes: Bool[Array, " executors"]
    dealing: AbstractRouting
    cache_tiles: Int[Array, " executors"]
    most_tiles: Int[Array, " executors"]
    seconds_per_tile: Float[Array, "*ways"]


class Encoder(eqx.Module):
    """A vision tower beside the model: what an iteration takes longer in which so many tiles are encoded.

    base_s + tile_s x tiles if there are any; both 0 on executors that have none.
    """

    base_s: Float[Array, " executors"]
    tile_s: Float[Array, " executors"]
