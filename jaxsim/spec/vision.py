"""The vision tower in front of a language model: what it weighs, and what an image becomes."""

import functools
import tomllib
from importlib import resources

import msgspec

from jaxsim._core.errors import InputError, suggest
from jaxsim.spec.messages import convert_table
from jaxsim.spec.model import Count, ModelSpec, load_model

EMBEDDING_BYTES = 2
"""Of a number of an embedding, in half precision."""


class VisionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A vision transformer, and what brings its output to the width of the language model.

        model: the model that it belongs to, by its name in the catalogue.
        tower: its own name.
        layers, hidden, ffn: the usual dimensions; all layers are dense, with biases, and not gated.
        patch: pixels of the side of a patch; positions: embeddings of them.
        other_parameters: of what comes behind it (resampler or projector).
        tiles_per_image, tokens_per_tile: of an image of 4032 x 3024 pixels.
        source: where the numbers come from.

    Known gaps: images of other sizes; what the tower computes (its seconds are given, not derived).
    """

    model: str
    tower: str
    layers: Count
    hidden: Count
    ffn: Count
    patch: Count
    positions: Count
    other_parameters: Count
    tiles_per_image: Count
    tokens_per_tile: Count
    source: str

    @property
    def num_parameters(self) -> int:
        """Of the tower and of what comes behind it."""
        h = self.hidden
        attention, mlp, norms = 4 * (h * h + h), 2 * h * self.ffn + self.ffn + h, 4 * h
        return (self.layers * (attention + mlp + norms) + (3 * self.patch**2 + 1 + self.positions) * h
                + self.other_parameters)

    @property
    def tokens_per_image(self) -> int:
        """Tokens of the prompt."""
        return self.tiles_per_image * self.tokens_per_tile

    @property
    def language(self) -> ModelSpec:
        """The language model."""
        return load_model(self.model)

    @property
    def tile_bytes(self) -> int:
        """Of the embeddings of a tile, as wide as the language model."""
        return EMBEDDING_BYTES * self.tokens_per_tile * self.language.hidden


@functools.cache
def vision_catalogue() -> dict[str, VisionSpec]:
    """All towers, by the name of their model."""
    text = (resources.files("jaxsim.scenarios") / "models" / "multimodal.toml").read_text(encoding="utf-8")
    specs = [convert_table(row, VisionSpec, "vision", "vision tower", "see scenarios/models/multimodal.toml")
             for row in tomllib.loads(text)["vision"]]
    return {spec.model: spec for spec in specs}


def load_vision(name: str) -> VisionSpec:
    """The tower of a model of the catalogue, by any name of that. Raises `InputError`."""
    model, known = load_model(name), vision_catalogue()
    if model.name not in known:
        raise InputError("model.name", name, "has no vision tower that is known", suggest(name, known))
    return known[model.name]
