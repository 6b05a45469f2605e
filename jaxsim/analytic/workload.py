"""A workload by its moments: all that a steady state reads."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsim._core.errors import InputError
from jaxsim.workload.workload import Workload


class Load(eqx.Module):
    """Poisson arrivals of requests with random lengths; every field is a traced scalar.

    rate_rps: requests/s over the whole system. input_tokens, output_tokens: means; input_square, output_square,
    input_output: means of the squares and of the product.
    """

    rate_rps: Float[Array, ""]
    input_tokens: Float[Array, ""]
    output_tokens: Float[Array, ""]
    input_square: Float[Array, ""]
    output_square: Float[Array, ""]
    input_output: Float[Array, ""]

    @classmethod
    def of(cls, rate_rps: float, input_tokens: float, output_tokens: float, *, input_sd: float = 0.0,
           output_sd: float = 0.0, correlation: float = 0.0) -> "Load":
        """From means, standard deviations (tokens) and the correlation of both lengths. Raises `InputError`."""
        for field, value in (("rate_rps", rate_rps), ("input_tokens", input_tokens), ("output_tokens", output_tokens)):
            if not np.all(np.asarray(value) > 0):
                raise InputError(field, value, "is not positive", "give a number above 0")
        product = input_tokens * output_tokens + correlation * input_sd * output_sd
        return cls(*(jnp.asarray(x, float) for x in (
            rate_rps, input_tokens, output_tokens, input_tokens**2 + input_sd**2, output_tokens**2 + output_sd**2,
            product)))

    def at_rate(self, rate_rps: Float[Array, ""] | float) -> "Load":
        """The same requests at another rate."""
        return eqx.tree_at(lambda load: load.rate_rps, self, jnp.asarray(rate_rps, float))

    @property
    def decode_context(self) -> Float[Array, ""]:
        """Mean KV tokens of a decoding sequence: (E[p o] + E[o^2] / 2) / E[o].

        Source: a sequence is met in proportion to its output, halfway through it on average (renewal theory).
        """
        return (self.input_output + 0.5 * self.output_square) / self.output_tokens

    @property
    def longest_held(self) -> Float[Array, ""]:
        """Mean prompt + output tokens of a decoding sequence."""
        return (self.input_output + self.output_square) / self.output_tokens

    @property
    def input_sd(self) -> Float[Array, ""]:
        """Standard deviation of prompts, tokens."""
        # The root of nothing has no slope.
        variance = self.input_square - jnp.square(self.input_tokens)
        return jnp.sqrt(jnp.maximum(variance, 1e-6 * jnp.square(self.input_tokens)))


def load_of(workload: Workload, rate_rps: float | None = None) -> Load:
    """Moments of the requests of a workload; its own mean rate unless given. Raises `InputError`."""
    prompt, output = workload.input_tokens.astype(np.float64), workload.output_tokens.astype(np.float64)
    if rate_rps is None:
        span = float(workload.arrival_s[-1] - workload.arrival_s[0])
        if not span > 0:
            raise InputError("workload", "all requests at once", "have no rate", "give arrivals over time, or a rate")
        rate_rps = (len(workload) - 1) / span
    moments = (rate_rps, prompt.mean(), output.mean(), (prompt**2).mean(), (output**2).mean(), (prompt * output).mean())
    return Load(*(jnp.asarray(x, float) for x in moments))
