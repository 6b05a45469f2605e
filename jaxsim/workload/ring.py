"""A hash ring: which instance a request falls to by what it has in common with others.

Every instance has `POINTS` places on a circle, and a request falls to the instance of the first place at or behind its
own. Hashes are those of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), a mixing function of 64 bits.
"""

import numpy as np
from jaxtyping import Float, Int, UInt64

POINTS = 160
"""Places of an instance. Source: SGLang's router (`virtual nodes`)."""


def splitmix64(values: Int[np.ndarray, "*shape"] | UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """The first output of splitmix64 seeded with each value."""
    mixed = np.asarray(values).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


KEYS = np.uint64(0x6A09E667F3BCC908)
"""Sets keys apart from places: both are small numbers, and equal ones must not fall together. Any number would do."""


def homes(keys: Int[np.ndarray, " requests"], num_instances: int) -> Int[np.ndarray, " requests"]:
    """The instance of each key."""
    points = splitmix64(np.arange(num_instances * POINTS))
    order = np.argsort(points, kind="stable")
    behind = np.searchsorted(points[order], splitmix64(splitmix64(keys) ^ KEYS))
    return order[behind % len(order)] // POINTS


def prefix_keys(paths: Int[np.ndarray, "requests path"], bounds: Int[np.ndarray, "requests path+1"],
                input_tokens: Int[np.ndarray, " requests"], num_tokens: int, block_size: int
                ) -> Int[np.ndarray, " requests"]:
    """Equal for prompts that begin with the same `num_tokens` tokens, as far as their shared blocks tell.

    Prompts that are shorter are equal if all of their whole blocks are; those of which too few blocks are known are
    like no other.
    """
    count = len(paths)
    wanted = np.where(input_tokens < num_tokens, input_tokens // block_size, -(-num_tokens // block_size))
    is_in = (bounds[:, :-1] < wanted[:, None]) & (wanted[:, None] <= bounds[:, 1:]) & (paths >= 0)
    segment = np.where(is_in, paths, 0).sum(axis=1)
    # A prompt that is shorter than another with which it shares all it has is still another one.
    ends = np.where(input_tokens < num_tokens, wanted, 0)
    keys = segment * (num_tokens + 1) + ends
    return np.where(is_in.any(axis=1), keys, -1 - np.arange(count))


def gumbels(uniforms: Float[np.ndarray, "requests 2"], num_instances: int) -> Float[np.ndarray, "requests instances"]:
    """A draw from Gumbel's law for every request and instance, made from the requests' own random numbers."""
    bits = (np.asarray(uniforms, np.float64) * 2.0**24).astype(np.uint64)
    seeds = splitmix64(bits[:, 0] << np.uint64(24) | bits[:, 1])
    draws = splitmix64(seeds[:, None] + splitmix64(np.arange(num_instances))[None, :])
    levels = ((draws >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(levels))
