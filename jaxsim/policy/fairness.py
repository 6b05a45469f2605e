"""What tokens cost the tenants of an engine that shares itself fairly among them."""

import math
from collections.abc import Sequence
from fractions import Fraction

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int

PROMPT_PRICE, OUTPUT_PRICE = 1, 2
"""Service of a prompt token and of an output token, as in the experiments of the paper."""

LARGEST_COUNTER = 1 << 29
"""Counters and what a jump adds to them stay below."""

_LARGEST_DENOMINATOR = 1_000
_LARGEST_ERROR = 2**-7


class TokenCounters(eqx.Module):
    """Prices of tokens by tenant, for virtual token counters (`jaxsim.engine.fair`).

    prompt_price: charged when a request is admitted, a token of its prompt; output_price: as a token is produced. Whole
    numbers of one unit for all tenants, each divided by the weight of the tenant.

    Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (arXiv 2401.00588), Algorithm 2, and
    its weighted form.
    """

    prompt_price: Int[Array, " tenants"]
    output_price: Int[Array, " tenants"]


def most_ahead(prompt_tokens: int, pool_tokens: int, max_num_seqs: int, output_tokens: int) -> tuple[int, float]:
    """Prompt and output tokens by which a counter can be ahead of the smallest of those that wait.

    A tenant is charged for a prompt only while its counter is the smallest. From then on only its running sequences
    add to it. They hold at most `pool_tokens`, and advance side by side: the k-th last of n to end has produced at most
    a k-th of them, all together pool_tokens (1 + 1/2 + .. + 1/n).
    """
    harmonic = 1.0 + math.log(max_num_seqs)
    return prompt_tokens, min(pool_tokens * harmonic, float(max_num_seqs) * output_tokens)


def token_counters(prompt_weight: float, output_weight: float, weights: Sequence[float],
                   ahead: tuple[int, float]) -> TokenCounters | None:
    """Whole prices in the ratio of these numbers, exactly so where a unit is found in which counters fit 32 bits, else
    rounded to the finest that does; None where that is off by more than 1 %.

    weights: of the tenants; ahead: of `most_ahead`.
    """
    given = [[Fraction(price).limit_denominator(_LARGEST_DENOMINATOR * 1_000)
              / Fraction(weight).limit_denominator(_LARGEST_DENOMINATOR) for weight in weights]
             for price in (prompt_weight, output_weight)]
    most = sum(max(prices) * math.ceil(tokens) for prices, tokens in zip(given, ahead, strict=True))
    room = Fraction(LARGEST_COUNTER) / max(most, 1)
    unit = Fraction(math.lcm(*(price.denominator for prices in given for price in prices)))
    unit = unit / math.gcd(*(int(price * unit) for prices in given for price in prices) or (1,))
    if unit > room:
        unit = Fraction(2) ** math.floor(math.log2(room))
    whole = [[round(price * unit) for price in prices] for prices in given]
    errors = (abs(n - price * unit) / (price * unit) for ns, prices in zip(whole, given, strict=True)
              for n, price in zip(ns, prices, strict=True) if price)
    if max(errors, default=0) > _LARGEST_ERROR:
        return None
    return TokenCounters(*(np.array(prices, np.int32) for prices in whole))
