"""Kernels of a forward pass as eager PyTorch launches them: counted from the operators of Hugging Face's models.

Counted, not measured: what each operator launches, on contiguous 16-bit tensors with more than one sequence, follows
from what it is:

    a launch     linear layer with its bias (a cuBLASLt epilogue), batched product, softmax, layer norm, GELU, any
                 pointwise operator, gather, `cat`, reduction, change of type, fill of a constant made anew
    a copy       `reshape` of a permuted tensor: queries and keys before `matmul`, values, merged heads, `repeat_kv`
    no launch    `view`, `permute`, `expand`, slices, dropout in evaluation, a change to the type it has already

Of a layer, attention first:

    BERT, XLM-RoBERTa  20 = 3 linear, 3 copies, 2 products, scale, mask, softmax, merged heads
                          + 3 linear, GELU, 2 adds, 2 norms
    GPT-2              27 = linear, 3 copies, 2 products, 2 fills, scale, where, softmax, merged heads
                          + 3 linear, GELU as 8 pointwise operators, 2 adds, 2 norms
    Llama              47 = 3 linear, rotary 2 x (2 mul, neg, cat, add), 2 `repeat_kv`, copy, 2 products, scale, mask,
                          softmax in fp32, back to 16 bits, merged heads
                          + 4 linear, SiLU, mul, 2 adds, 2 RMS norms of 8

With fused attention (`scaled_dot_product_attention`) what is between the projections, rotary and `repeat_kv` excepted,
is one kernel. Before and after the layers: embeddings, masks, positions, rotary angles; last norm and head, of the last
token alone.

Known gaps: products that cuBLAS splits over k launch a reduction too; a name holds the sizes of a product, not the tile
that cuBLAS picks; parameters of norms, and masks that are broadcast, are read for nothing.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from jaxtyping import Array, Float

from jaxsim._core.errors import InputError
from jaxsim.spec.model import ModelSpec

LINEAR, PRODUCT, FUSED, ELEMENTWISE, EMBEDDING, HEAD, CHAIN = (
    "linear", "attention product", "fused attention", "elementwise", "embedding", "head", "chain")
"""Kinds of kernels. Elementwise: norms, softmax, copies, pointwise; a chain is several kernels launched as one."""

FUSIBLE = (ELEMENTWISE, EMBEDDING)
"""What a compiler that fuses pointwise operators and reductions turns into one kernel where nothing else is between."""

NUMBER_BYTES, FLOAT_BYTES = 2, 4

Attention = Literal["eager", "fused"]

Counts = Float[Array, " batches"] | float


class Kernel(NamedTuple):
    """One kernel, over an array of batches.

    name: equal for kernels that a trace shows by one name. shape: (m, n, k) of a product, batches in m; weight_bytes:
    of its second matrix. Elementwise: bytes `taken` of what the kernel before has written, `beside` it, and `given`;
    is_fresh: what is taken is from elsewhere; is_kept: what is given is not for the next kernel alone. tokens,
    sequences, pairs: of fused attention, as `jaxsim.cost.attention.chunk_seconds` takes them. parts: kernels of a
    chain.
    """

    name: str
    kind: str
    shape: tuple[Counts, int, int] | None = None
    weight_bytes: Counts = 0.0
    taken: Counts = 0.0
    beside: Counts = 0.0
    given: Counts = 0.0
    is_fresh: bool = False
    is_kept: bool = False
    tokens: Counts = 0.0
    sequences: Counts = 0.0
    pairs: Counts = 0.0
    parts: tuple["Kernel", ...] = ()


class Pass(NamedTuple):
    """A pass: distinct kernels, and which of them is launched when."""

    kernels: tuple[Kernel, ...]
    order: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of launches."""
        return tuple(self.kernels[i].name for i in self.order)

    def count(self, *kinds: str) -> int:
        """Launches, of these kinds if given."""
        return sum(not kinds or self.kernels[i].kind in kinds for i in self.order)


# The encoders of the study: engines here do not serve encoders, so they are not in the catalogue.
_ENCODER = dict(layers=12, hidden=768, heads=12, kv_heads=12, head_dim=64, ffn=3072, gated=False, qkv_bias=True,
                output_bias=True, ffn_bias=True, norm_bias=True, dtype="float16")
ENCODERS = {
    "bert-base": ModelSpec(name="google-bert/bert-base-uncased", vocab=30522, max_position=512, learned_positions=512,
                           source="config.json of the Hugging Face repository", **_ENCODER),
    "xlm-roberta-base": ModelSpec(name="FacebookAI/xlm-roberta-base", vocab=250002, max_position=514,
                                  learned_positions=514, source="config.json of the Hugging Face repository",
                                  **_ENCODER)}


def eager_pass(model: ModelSpec, batch: Counts, length: int, attention: Attention = "eager") -> Pass:
    """The kernels of one pass over `batch` sequences of `length` tokens, in 16 bits, without a KV cache before it.

    Raises `InputError` for a model whose layers are not listed above.
    """
    if attention not in ("eager", "fused"):
        raise InputError("attention", attention, "is not known", "use 'eager' or 'fused'")
    family = family_of(model)
    made = _Sizes(model, batch, length, attention == "fused")
    before, layer, after = {"bert": _bert, "xlm-roberta": _roberta, "gpt2": _gpt2, "llama": _llama}[family](made)
    kernels = (*before, *layer, *after)
    first, last = len(before), len(before) + len(layer)
    return Pass(kernels, (*range(first), *tuple(range(first, last)) * model.layers, *range(last, len(kernels))))


def family_of(model: ModelSpec) -> str:
    """Whose operators a model has: "bert", "xlm-roberta", "gpt2" or "llama". Raises `InputError`."""
    if model.name in (m.name for m in ENCODERS.values()):
        return "xlm-roberta" if "roberta" in model.name else "bert"
    family = ("llama" if model.gated and not model.norm_bias and not model.learned_positions
              else "gpt2" if not model.gated and model.norm_bias and model.learned_positions else None)
    unlisted = (model.experts or model.is_mla or model.qk_norm or model.sliding_window or model.attention_sinks
                or (family == "llama" and (model.qkv_bias or model.output_bias)))
    if family is None or unlisted:
        raise InputError("model.name", model.name, "has layers whose eager kernels are not counted",
                         f"use a model with the layers of Llama or GPT-2, or one of {', '.join(ENCODERS)}")
    return family


class _Sizes:
    """What the kernels of a model are made of, at one size of batch and sequence."""

    def __init__(self, model: ModelSpec, batch: Counts, length: int, is_fused: bool):
        self.model, self.batch, self.length, self.is_fused = model, batch, length, is_fused
        self.tokens = batch * length
        self.hidden = self.tokens * model.hidden * NUMBER_BYTES
        self.queries = self.tokens * model.heads * model.head_dim * NUMBER_BYTES
        self.keys = self.tokens * model.kv_heads * model.head_dim * NUMBER_BYTES
        self.inner = self.tokens * model.ffn * NUMBER_BYTES
        self.scores = self.tokens * length * model.heads * NUMBER_BYTES
        # One number a token: statistics of norms, indices.
        self.column = self.tokens * FLOAT_BYTES

    def linear(self, columns: int, depth: int) -> Kernel:
        return Kernel(f"linear {depth} to {columns}", LINEAR, (self.tokens, columns, depth),
                      columns * depth * NUMBER_BYTES)

    def pointwise(self, name: str, taken: Counts, given: Counts | None = None, **more) -> Kernel:
        return Kernel(name, ELEMENTWISE, taken=taken, given=taken if given is None else given, **more)

    def copy(self, given: Counts, taken: Counts | None = None) -> Kernel:
        return self.pointwise("copy", given if taken is None else taken, given, is_fresh=True, is_kept=True)

    def gather(self, name: str = "gather") -> Kernel:
        return Kernel(name, EMBEDDING, taken=self.hidden, given=self.hidden, is_fresh=True, is_kept=True)

    def residual(self, is_kept: bool = False) -> Kernel:
        return self.pointwise("add", self.hidden, beside=self.hidden, is_kept=is_kept)

    def layer_norm(self) -> Kernel:
        return self.pointwise("layer_norm", self.hidden)

    def head(self) -> Kernel:
        """Of the last token of each sequence, as generating takes it."""
        vocab, d = self.model.vocab, self.model.hidden
        return Kernel("lm_head", HEAD, (self.batch, vocab, d), vocab * d * NUMBER_BYTES)

    def scored(self) -> Kernel:
        m = self.model
        return Kernel("bmm scores", PRODUCT, (self.tokens * m.heads, self.length, m.head_dim), self.queries)

    def weighted(self) -> Kernel:
        m = self.model
        return Kernel("bmm values", PRODUCT, (self.tokens * m.heads, m.head_dim, self.length), self.queries)

    def fused(self, is_causal: bool) -> Kernel:
        # Twice the pairs of queries and keys that are causal; all of them are twice as many.
        pairs = self.tokens * self.length * (1.0 if is_causal else 2.0)
        return Kernel("flash_attention", FUSED, tokens=self.tokens, sequences=self.batch, pairs=pairs)


def _encoder_layer(s: _Sizes) -> Iterator[Kernel]:
    d, f = s.model.hidden, s.model.ffn
    yield from [s.linear(d, d)] * 3
    if s.is_fused:
        yield s.fused(is_causal=False)
    else:
        yield from [s.copy(s.queries)] * 2
        yield s.scored()
        yield s.pointwise("div", s.scores)
        yield s.pointwise("add mask", s.scores)
        yield s.pointwise("softmax", s.scores, is_kept=True)
        yield s.copy(s.queries)
        yield s.weighted()
        yield s.copy(s.queries)
    yield s.linear(d, d)
    yield s.residual()
    yield s.layer_norm()
    yield s.linear(f, d)
    yield s.pointwise("gelu", s.inner)
    yield s.linear(d, f)
    yield s.residual()
    yield s.layer_norm()


def _encoder_before(s: _Sizes) -> Iterator[Kernel]:
    """Mask (to 16 bits, 1 - mask, times the least number), embeddings of words, types and positions."""
    yield from (s.pointwise(name, s.column) for name in ("to half", "rsub", "mul"))
    yield s.gather()
    yield s.gather()
    yield s.residual()
    yield s.gather()
    yield s.residual()
    yield s.layer_norm()


def _pooled(s: _Sizes) -> Iterator[Kernel]:
    d = s.model.hidden
    yield Kernel("linear pooler", LINEAR, (s.batch, d, d), d * d * NUMBER_BYTES)
    yield s.pointwise("tanh", s.batch * d * NUMBER_BYTES)


def _bert(s: _Sizes):
    return [*_encoder_before(s)], [*_encoder_layer(s)], [*_pooled(s)]


def _roberta(s: _Sizes):
    """Positions follow from the padding: not equal, to int, cumulated sum, add, mul, to long, add."""
    positions = [s.pointwise(name, s.column) for name in ("ne", "to int", "cumsum", "add int", "mul int", "to long",
                                                          "add int")]
    return [*positions, *_encoder_before(s)], [*_encoder_layer(s)], [*_pooled(s)]


def _gpt2_layer(s: _Sizes) -> Iterator[Kernel]:
    d, f = s.model.hidden, s.model.ffn
    yield s.layer_norm()
    yield s.linear(3 * d, d)
    if s.is_fused:
        yield s.fused(is_causal=True)
    else:
        yield from [s.copy(s.queries)] * 2
        yield s.scored()
        yield s.pointwise("fill", 0.0, FLOAT_BYTES)
        yield s.pointwise("div", s.scores)
        yield s.pointwise("fill", 0.0, FLOAT_BYTES)
        yield s.pointwise("where", s.scores, beside=s.length**2)
        yield s.pointwise("softmax", s.scores, is_kept=True)
        yield s.copy(s.queries)
        yield s.weighted()
        yield s.copy(s.queries)
    yield s.linear(d, d)
    yield s.residual(is_kept=True)
    yield s.layer_norm()
    yield s.linear(f, d)
    # 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    for name, operands in (("mul", 1), ("pow", 1), ("mul", 1), ("add", 2), ("mul", 1), ("tanh", 1), ("add", 1),
                           ("mul", 2)):
        yield s.pointwise(f"{name} inner", operands * s.inner, s.inner)
    yield s.linear(d, f)
    yield s.residual(is_kept=True)


def _gpt2(s: _Sizes):
    before = [s.pointwise("arange", 0.0, s.column), s.gather(), s.gather(), s.residual(is_kept=True)]
    return before, [*_gpt2_layer(s)], [s.layer_norm(), s.head()]


def _rms_norm(s: _Sizes) -> Iterator[Kernel]:
    wide = 2 * s.hidden
    yield s.pointwise("to float", s.hidden, wide)
    yield s.pointwise("pow", wide)
    yield s.pointwise("mean", wide, s.column)
    yield s.pointwise("add column", s.column)
    yield s.pointwise("rsqrt", s.column)
    yield s.pointwise("mul column", wide)
    yield s.pointwise("to half", wide, s.hidden)
    yield s.pointwise("mul weight", s.hidden)


def _rotary(s: _Sizes, size: Counts) -> Iterator[Kernel]:
    yield s.pointwise("mul cos", size, is_fresh=True)
    yield s.pointwise("neg", size / 2)
    yield s.pointwise("cat", size)
    yield s.pointwise("mul cos", size)
    yield s.pointwise("add rotary", 2 * size, size, is_kept=True)


def _llama_layer(s: _Sizes) -> Iterator[Kernel]:
    m = s.model
    d, f, q, k = m.hidden, m.ffn, m.heads * m.head_dim, m.kv_heads * m.head_dim
    yield from _rms_norm(s)
    yield s.linear(q, d)
    yield from [s.linear(k, d)] * 2
    yield from _rotary(s, s.queries)
    yield from _rotary(s, s.keys)
    if m.heads > m.kv_heads:
        yield from [s.copy(s.queries, s.keys)] * 2
    if s.is_fused:
        yield s.fused(is_causal=True)
    else:
        yield s.copy(s.queries)
        yield s.scored()
        yield s.pointwise("mul scores", s.scores)
        yield s.pointwise("add mask", s.scores, beside=s.scores / m.heads)
        yield s.pointwise("softmax", s.scores, 2 * s.scores)
        yield s.pointwise("to half", 2 * s.scores, s.scores, is_kept=True)
        yield s.weighted()
        yield s.copy(s.queries)
    yield s.linear(d, q)
    yield s.residual(is_kept=True)
    yield from _rms_norm(s)
    yield from [s.linear(f, d)] * 2
    yield s.pointwise("silu", s.inner)
    yield s.pointwise("mul inner", s.inner, beside=s.inner)
    yield s.linear(d, f)
    yield s.residual(is_kept=True)


def _llama(s: _Sizes):
    """Embedding; positions; causal mask (full, triu, arange, gt, mul); rotary angles (product, cat, cos, sin, twice mul
    and to 16 bits)."""
    angles = s.tokens * s.model.head_dim * NUMBER_BYTES
    mask = s.batch * s.length**2 * NUMBER_BYTES
    before = [s.gather(), s.pointwise("arange", 0.0, s.column),
              *(s.pointwise(name, mask) for name in ("full", "triu", "arange mask", "gt", "mul mask")),
              *(s.pointwise(name, angles) for name in (
                  "outer", "cat", "cos", "sin", "mul angles", "mul angles", "to half", "to half"))]
    return before, [*_llama_layer(s)], [*_rms_norm(s), s.head()]
