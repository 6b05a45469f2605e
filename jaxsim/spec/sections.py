"""The sections of a scenario that say what runs where, and how fast that should be."""

from typing import Any

import msgspec

from jaxsim.spec.device import DeviceSpec, load_device
from jaxsim.spec.engine import Text
from jaxsim.spec.model import ModelSpec, load_model
from jaxsim.spec.values import Positive, Section, Tokens


class ModelSection(Section, frozen=True):
    """Which model runs.

        name: a name of `jaxsim list models`, or a Hugging Face id that the catalogue knows.
        config: path of a Hugging Face config.json, instead of a name.
        dimensions: every dimension of a model that is in no catalogue (`jaxsim.spec.model.ModelSpec`); name is then
            only a label.
        dtype: weights and activations (bf16, fp16, fp8, int8, int4, ...); the model's own if left out.
        kv_dtype: KV cache; the same as dtype if left out.
        max_position: positions it is served for, where RoPE scaling extends them; its own if left out.
    """

    name: Text | None = None
    config: Text | None = None
    dimensions: dict[str, Any] | None = None
    dtype: Text | None = None
    kv_dtype: Text | None = None
    max_position: Tokens | None = None

    def spec(self) -> ModelSpec:
        """The model itself. Raises `InputError` where it cannot be had."""
        own = self._own_spec()
        return own if self.max_position is None else msgspec.structs.replace(own, max_position=self.max_position)

    def _own_spec(self) -> ModelSpec:
        if self.dimensions is not None:
            return ModelSpec.from_dict({"name": self.name, **self.dimensions}, "model.dimensions")
        return ModelSpec.from_hf_config(self.config) if self.config is not None else load_model(self.name)


class DeviceSection(Section, frozen=True):
    """What it runs on.

        name: a name of `jaxsim list devices`.
        numbers: every number of a device that is in no catalogue (`jaxsim.spec.device.DeviceSpec`); name is then only
            a label.
        clock: of a GPU's multiprocessors, as a share of the highest, from 0.7 to 1 (1 if left out): arithmetic slows
            with it, memory does not, watts fall faster (`jaxsim.spec.device.DeviceSpec`, docs/gradients.md). Of pools
            with a device of their own it is 1.
    """

    name: Text
    numbers: dict[str, Any] | None = None
    clock: float | None = None

    def spec(self) -> DeviceSpec:
        """The device itself. Raises `InputError` where it cannot be had."""
        if self.numbers is not None:
            found = DeviceSpec.from_dict({"name": self.name, **self.numbers}, "device.numbers")
        else:
            found = load_device(self.name)
        return found if self.clock is None else msgspec.structs.replace(found, clock=self.clock)


class SloSection(Section, frozen=True):
    """Limits a good request meets, all of those given at once.

        ttft_ms: time to first token.
        tpot_ms: time per output token after the first.
        e2e_ms: arrival to last token.
    """

    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    e2e_ms: Positive | None = None
