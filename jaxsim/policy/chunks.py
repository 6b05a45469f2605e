"""Adaptive chunks: a part of a prompt is as long as the iteration that holds it may take."""

import equinox as eqx
from jaxtyping import Array, Float, Int


class Chunks(eqx.Module):
    """The time that an iteration with a prompt may take, in seconds, and the least tokens of a chunk.

    A chunk is the most tokens with which the predicted iteration, with the decodes of the batch and the prompts placed
    already, takes at most `target_s`; at least `least` of them in the first chunk of a batch, whatever they take. A
    further prompt joins where as many fit. What is predicted is what the engine's cost model says. Where that is

        g0 + b c + a c (kv + c / 2) + rest

    for a chunk of c tokens behind kv, as `jaxsim.analytic.long_context` has it, a chunk is the whole part of
    [sqrt((b + a kv)^2 + 2 a (target - g0 - rest)) - (b + a kv)] / a.

    Source: Mnemosyne and Medha (arXiv 2409.17264), adaptive chunking under a target batch time. With pipeline stages
    the time is that of the whole way through all of them, which is what a decode waits for, without what batches wait
    for each other.
    """

    target_s: Float[Array, ""]
    least: Int[Array, ""]
