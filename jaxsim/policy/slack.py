"""Least slack first: what is left until a request's deadline, less what it still takes."""

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int

PARTS_MS = 64
"""Of a millisecond, in which the time of a token is given."""

_ROUNDING, _BITS = PARTS_MS // 2, 6


LATEST_DUE_MS = 1 << 30
"""Twelve days."""


class Slack(eqx.Module):
    """What a request is taken to need: of a token to compute before it decodes, of an output token, parts of a
    millisecond (`PARTS_MS`), at the scheduler's own stated pace. most_tokens: that a sequence may have; a prediction
    beyond that counts as so many.

    Slack is due - now - remaining, where remaining = prompt_parts known + output_parts left: known tokens (prompt, and
    output so far, which who was preempted computes again) and predicted output tokens still to come, one at least. Now
    is the same for all who wait, so they go by due - remaining: a number that stands while somebody waits, whoever runs
    meanwhile. It is known before the run for all who have never run. Of who was preempted it is another, as output
    tokens are there which are computed faster, or slower, than they came: it is settled as its wait begins.

    Source: slack time, R. W. Conway, W. L. Maxwell, L. W. Miller, "Theory of Scheduling" (1967), section 3-3.
    """

    prompt_parts: Int[Array, ""]
    output_parts: Int[Array, ""]
    most_tokens: Int[Array, ""] = np.int32(2**31 - 1)

    def key_ms(self, due_ms: Int[Array, "*shape"], known: Int[Array, "*shape"], left: Int[Array, "*shape"]
               ) -> Int[Array, "*shape"]:
        """Due less remaining, in whole milliseconds. Also of NumPy's."""
        return due_ms - ((self.prompt_parts * known + self.output_parts * left + _ROUNDING) >> _BITS)
