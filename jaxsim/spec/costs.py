"""The kinds of costs."""

from typing import Annotated, Literal

from msgspec import Meta

from jaxsim.spec.engine import Text
from jaxsim.spec.values import NotNegative, Section

MAX_ITERATION_S = 1 << 15
"""An iteration of fitted coefficients may not take more seconds than this (9 hours)."""
Coefficient = Annotated[float, Meta(ge=0, le=MAX_ITERATION_S)]


class FittedForm(Section, frozen=True):
    """Seconds: a + b x prefill tokens + c x decode context + d x sequences + e x prefill pairs.

        min_sequences: the form holds from this number of sequences on.
        a: seconds.
        b: seconds a prompt token computed.
        c: seconds a KV token that decodes read, the new one included.
        d: seconds a sequence in the batch.
        e: seconds a unit of (history + chunk)^2 - history^2, summed over prompt chunks.
    """

    min_sequences: Annotated[int, Meta(ge=0)] = 0
    a: Coefficient = 0.0
    b: Coefficient = 0.0
    c: Coefficient = 0.0
    d: Coefficient = 0.0
    e: Coefficient = 0.0

    @property
    def row(self) -> tuple[float, ...]:
        """(min_sequences, a, b, c, d, e), as `jaxsim.cost.fitted.fitted` takes them."""
        return (self.min_sequences, self.a, self.b, self.c, self.d, self.e)


Pieces = FittedForm | tuple[FittedForm, ...]


class RooflineCost(Section, frozen=True, tag_field="kind", tag="roofline"):
    """Operators against the device's peaks.

        overrides: parameters of the roofline by name, instead of their calibrated values.
        host: whose host overheads are taken; those of the preset's engine if left out.
        distinct_experts: how many experts a batch reads: as expected under uniform routing, the tokens' top-k
            with no overlap, or all.
        expert_load: how tokens fall on the ranks that share experts: no expert is favoured ("balanced"), popularities
            differ by overrides.expert_skew ("skewed"), less so where engine.enable_eplb has placed them, or all choose
            one rank ("worst").
        front_end_s: seconds of a request outside the engine (HTTP server, tokenizer), in TTFT and end to end; those of
            `host` if left out, 0 where clocks are inside the engine.
        split_kv: attention is cut over the keys too, whatever the batch, as kernels for long contexts do it
            (FlashInfer, FlashAttention 3 with splits); otherwise a tile of a chunk's queries passes all keys on one
            multiprocessor.
    """

    overrides: dict[str, float] = {}
    host: Text | None = None
    distinct_experts: Literal["expected", "topk", "all"] = "expected"
    expert_load: Literal["balanced", "skewed", "worst"] = "balanced"
    front_end_s: NotNegative | None = None
    split_kv: bool = False


class ProfiledCost(Section, frozen=True, tag_field="kind", tag="profiled"):
    """Measured operator times; the roofline prices what was not measured and continues what was.

        path: a profile that `jaxsim import-profile` wrote, of the model, device and tensor-parallel degree that run.
        overrides: parameters of that roofline by name, instead of their calibrated values.
        host: whose host overheads are taken, unless the profile holds its own; those of the preset's engine if left
            out.
        distinct_experts: as for the roofline; also where a profile's expert times are read.
        front_end_s: as for the roofline.
    """

    path: Text
    overrides: dict[str, float] = {}
    host: Text | None = None
    distinct_experts: Literal["expected", "topk", "all"] = "expected"
    front_end_s: NotNegative | None = None


class FittedHead(Section, frozen=True):
    """Seconds of an iteration that the first of several pipeline stages takes beyond an equal part.

        a: constant.
        c: a token of context that sequences have before the iteration; of prompts, their length.
    """

    a: Coefficient = 0.0
    c: Coefficient = 0.0


class FittedCost(Section, frozen=True, tag_field="kind", tag="fitted"):
    """Coefficients from the user, by composition of the iteration, piecewise in its number of sequences.

    With pipeline stages they are of the whole way through: every stage has an equal part, but for `head`.

        prefill: iterations of prompt chunks only.
        decode: iterations of decodes only.
        mixed: iterations of both; made from the other two if left out.
        head: the part of these seconds that only the first stage has; none if left out.
        exact: keep what float32 rounds off, to compare long runs with another simulator's to the microsecond.
        front_end_s: seconds of a request outside the engine; 0 if left out.
    """

    prefill: Pieces
    decode: Pieces
    mixed: Pieces | None = None
    head: FittedHead | None = None
    exact: bool = False
    front_end_s: NotNegative | None = None

    def rows(self, kind: str) -> list[tuple[float, ...]] | None:
        """Rows (min_sequences, a, b, c, d, e) of `prefill`, `decode` or `mixed`; None where left out."""
        forms = getattr(self, kind)
        if forms is None:
            return None
        return [f.row for f in (forms if isinstance(forms, tuple) else (forms,))]
