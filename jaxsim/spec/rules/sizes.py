"""What can already be said about the longest request."""

from typing import TYPE_CHECKING, Any

from jaxsim._core.errors import InputError
from jaxsim.spec.costs import MAX_ITERATION_S, FittedCost
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.presets import Scheduler
from jaxsim.spec.rules.schedulers import scheduler_of
from jaxsim.spec.workload import (
    FixedLength,
    QuantilesLength,
)

if TYPE_CHECKING:
    from jaxsim.spec.scenario import Scenario


def _longest(law: Any) -> int | None:
    """The largest length a law can give; None where it is not known here."""
    if isinstance(law, int):
        return law
    if isinstance(law, QuantilesLength):
        return law.tokens[-1]
    return law.tokens if isinstance(law, FixedLength) else getattr(law, "max_tokens", None)


def shortest(law: Any) -> int | None:
    """The smallest length a law can give; None where it is not known here."""
    if law is None or isinstance(law, int):
        return law
    if isinstance(law, QuantilesLength):
        return law.tokens[0]
    return law.tokens if isinstance(law, FixedLength) else law.min_tokens


def check_sizes(s: "Scenario") -> None:
    """What can already be said about the longest request; the engine checks the lengths actually drawn."""
    w, engine = s.workload, s.engine
    scheduler = scheduler_of(engine)
    model = _known_model(s)
    prompt, output = _longest(w.input), _longest(w.output)
    if prompt is not None and w.prefix_groups is not None:
        prompt += w.prefix_groups.tokens
    if isinstance(s.cost, FittedCost):
        limit = engine.max_model_len or (model.max_position if model else None)
        most = prompt and prompt + (output or limit or 0)
        if w.has_sessions:
            most = w.sessions and w.sessions.context_limit
        longest = min((n for n in (limit, most) if n), default=None)
        if longest is not None:
            _check_coefficients(s, scheduler, longest)
    if prompt is None:
        return
    total = prompt + (output or 1)
    text = f"prompt {prompt} + output {output}" if output else f"prompt {prompt}"
    if model is not None and total > model.max_position:
        raise InputError("workload.input", prompt,
                         f"the longest request needs {total} tokens ({text}), beyond the {model.max_position} positions"
                         f" of {model.name}", "shorten workload.input or workload.output, or use a model with more")
    if engine.max_model_len is not None and total > engine.max_model_len:
        raise InputError("engine.max_model_len", engine.max_model_len,
                         f"the longest request needs {total} tokens ({text})",
                         f"raise it to {total}, or shorten workload.input or workload.output")
    if not scheduler.chunked_prefill and engine.max_num_batched_tokens is not None:
        if prompt > engine.max_num_batched_tokens:
            raise InputError("engine.max_num_batched_tokens", engine.max_num_batched_tokens,
                             f"a prompt of {prompt} tokens never fits one iteration without chunked prefill",
                             f"raise it to {prompt}, or set engine.enable_chunked_prefill = true")
    blocks = engine.num_gpu_blocks_override
    if blocks is not None and scheduler.kv_accounting:
        # Ranks that share a cache by tokens have a block of each.
        block_size = scheduler.block_size * engine.decode_context_parallel_size
        needed = -(-(total - 1) // block_size)
        if needed > blocks:
            raise InputError("engine.num_gpu_blocks_override", blocks,
                             f"the longest request ({text}) needs {needed} blocks of"
                             f" {block_size} tokens",
                             f"give at least {needed} blocks, or shorten the requests")


def _known_model(s: "Scenario") -> ModelSpec | None:
    """The model, where it can be had: what is wrong with it is told when the system is put together."""
    try:
        return s.model.spec() if s.model else None
    except InputError:
        return None


def _check_coefficients(s: "Scenario", scheduler: Scheduler, longest: int) -> None:
    """Refuse coefficients by which the largest batch of the longest requests would never end."""
    sequences = min(scheduler.max_num_seqs, s.num_requests or scheduler.max_num_seqs)
    context = sequences * longest
    tokens = min(scheduler.max_num_batched_tokens, context)
    pairs = min(2 * longest * tokens, sequences * longest**2)
    counts = {"prefill": (1, tokens, 0, sequences, pairs), "decode": (1, 0, context, sequences, 0),
              "mixed": (1, tokens, context, sequences, pairs)}
    for kind, most in counts.items():
        for start, *row in s.cost.rows(kind) or []:
            terms = [number * count for number, count in zip(row, most, strict=True)]
            if start <= sequences and sum(terms) > MAX_ITERATION_S:
                at = terms.index(max(terms))
                raise InputError(f"cost.{kind}.{'abcde'[at]}", row[at],
                                 f"an iteration of {sequences} sequences of up to {longest} tokens could take"
                                 f" {sum(terms):.3g} s, more than the {MAX_ITERATION_S} s that are simulated",
                                 "lower it (coefficients are in seconds), engine.max_num_seqs or"
                                 " engine.max_model_len")
