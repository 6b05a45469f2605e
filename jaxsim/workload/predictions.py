"""Predicted output lengths: what a scheduler that goes by them is told of outputs that it cannot know."""

import dataclasses

import numpy as np
from jaxtyping import PRNGKeyArray
from scipy.special import ndtri

from jaxsim._core.errors import InputError
from jaxsim.workload.streams import Stream, stream_key, uniforms
from jaxsim.workload.workload import Workload

MOST_PREDICTED_TOKENS = 2**31 - 1


def with_predictions(workload: Workload, sigma: float, seed: int | PRNGKeyArray) -> Workload:
    """The same requests with predicted outputs: true tokens x exp(sigma z), z standard normal, rounded, at least 1.

    The draw z of a request is the same for every sigma, and of a stream of its own; it is clipped at five standard
    deviations, where the uniforms' grid ends. Known gap: errors do not depend on the length or the tenant.
    """
    if not 0 <= sigma <= 10:
        raise InputError("sigma", sigma, "is not from 0 to 10", "0 predicts exactly")
    draws = ndtri(uniforms(stream_key(seed, Stream.PREDICTIONS), len(workload))[:, 0])
    predicted = np.rint(workload.output_tokens * np.exp(sigma * np.clip(draws, -5.0, 5.0)))
    return dataclasses.replace(
        workload, predicted_tokens=np.clip(predicted, 1, MOST_PREDICTED_TOKENS).astype(np.int64))
