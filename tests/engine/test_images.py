"""Images from scenarios: draws, results that add up, refusals."""

import re

import numpy as np
import pytest

import jaxsim
from jaxsim._core.errors import InputError
from jaxsim.engine import lower
from jaxsim.metrics import request_frame
from jaxsim.spec.scenario import Scenario

pytestmark = pytest.mark.unoptimised

ENCODE = {"base_ms": 10.0, "tile_ms": 30.0}
POOLS = [{"role": "encode", "replicas": 3, "engine": {"max_num_seqs": 1}}, {"role": "prefill"}, {"role": "decode"}]
IMAGES = {"number": {"kind": "uniform", "least": 0, "most": 3}, "tiles_per_image": 4, "tokens_per_tile": 16}
BASE = {
    "schema_version": 1, "num_seeds": 2, "model": {"name": "minicpm-v-2.6"}, "device": {"name": "a100-80gb"},
    "engine": {"preset": "vllm-v1@0.9"},
    "workload": {"kind": "poisson", "rate_rps": 2.0, "num_requests": 40, "input": 22, "output": 4, "images": IMAGES},
    "cluster": {"encode": ENCODE, "pools": POOLS}}


def changed(**values):
    return Scenario.from_dict(BASE).with_values({name.replace("__", "."): value for name, value in values.items()})


def test_images_are_drawn_and_their_tokens_are_in_the_prompt():
    workload = lower.make_workload(changed(workload__num_requests=400), 0)
    assert set(workload.num_images) == {0, 1, 2, 3}
    np.testing.assert_array_equal(workload.input_tokens, 22 + 64 * workload.num_images)
    np.testing.assert_array_equal(np.bincount(workload.num_images) > 70, True)
    # Other draws are what they were without.
    alone = lower.make_workload(Scenario.from_dict(
        BASE | {"cluster": {}, "workload": BASE["workload"] | {"images": None, "num_requests": 400}}), 0)
    np.testing.assert_array_equal(alone.arrival_s, workload.arrival_s)
    np.testing.assert_array_equal(workload.take(slice(3, 9)).num_images, workload.num_images[3:9])


@pytest.mark.slow
def test_results_add_up():
    """Parts of the end-to-end time; images that wait for nobody take what one or all of them take to encode."""
    for split in (True, False):
        (lanes,) = jaxsim.simulate(changed(cluster__encode__split_images=split)).lanes
        for lane in lanes:
            assert not lane.fault and lane.is_finished.all()
            frame = request_frame(lane)
            parts = frame[["front_end_s", "encode_s", "embedding_s", "queue_s", "prefill_s", "transfer_s", "decode_s",
                           "stall_s"]]
            np.testing.assert_allclose(parts.sum(axis=1), frame["e2e_s"], atol=1e-9)
            assert (parts.to_numpy() >= -1e-9).all()
            has_any = (frame["images"] > 0).to_numpy()
            assert (frame["encode_s"][~has_any] == 0).all() and (frame["embedding_s"][has_any] > 0).all()
            least = 0.01 + 0.12 * (np.minimum(frame["images"], 1) if split else frame["images"])
            assert (frame["encode_s"] >= least - 1e-6)[has_any].all()
            assert np.isclose(frame["encode_s"], least, atol=1e-6)[has_any].sum() > 3


@pytest.mark.parametrize(("values", "field", "says"), [
    ({"cluster__encode": None}, "cluster.encode", "missing, and images have to be encoded"),
    ({"workload__images": None}, "cluster.encode", "no effect without images"),
    ({"workload__images": None, "cluster__encode": None}, r"cluster.pools\[0\].role", "nothing to do without images"),
    ({"cluster__pools": POOLS[:1]}, "cluster.pools", "compute no prompts"),
    ({"cluster__pools": [POOLS[0], POOLS[2]]}, "cluster.pools", "compute no prompts"),
    ({"cluster__encode__cache_tiles": 11}, "cluster.encode.cache_tiles", "12 tiles of a request"),
    ({"cluster__encode__router": "no_such"}, "cluster.encode.router", "no such router"),
    ({"workload__kind": "closed-loop", "workload__rate_rps": None, "workload__concurrency": 2}, "workload.images",
     "not simulated with kind = 'closed-loop'"),
    ({"workload__images__number": {"kind": "uniform", "least": 3, "most": 1}}, "number.least", "above most"),
    ({"engine__preset": "vllm-v1@0.19"}, "async_scheduling", "is not simulated"),
    ({"engine__preset": "sglang"}, "preset", "is not simulated"),
    ({"engine__pipeline_parallel_size": 2}, "pipeline_parallel_size", "is not simulated"),
    ({"engine__pipeline_parallel_size": 2, "cluster__pools": None}, "workload.images", "pipeline stages"),
    ({"engine__enable_prefix_caching": True}, "enable_prefix_caching", "with images"),
])
def test_what_is_not_there_is_refused(values, field, says):
    with pytest.raises(InputError, match=says) as error:
        jaxsim.simulate(changed(**values))
    assert re.search(field, error.value.field), error.value.field


def test_a_workload_with_images_needs_a_scenario_with_images():
    workload = lower.make_workload(changed(), 0)
    with pytest.raises(InputError, match="do not agree on images"):
        jaxsim.simulate(changed(workload__images=None, cluster__encode=None, cluster__pools=None), workload=workload)
