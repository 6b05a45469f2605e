"""A workload as the loop reads it."""

import numpy as np
from jaxtyping import Int

from jaxsim.engine.lower.prefixes import Prefixes
from jaxsim.engine.lower.workloads import parts_of
from jaxsim.policy.cache_routing import PREFIX_TOKENS
from jaxsim.policy.partial_prefills import MOST_PARTS, PARTS
from jaxsim.policy.slack import Slack
from jaxsim.spec.dims import Dims
from jaxsim.state.requests import Images, Requests, pack_requests
from jaxsim.workload import ring
from jaxsim.workload.workload import Workload


def make_requests(workload: Workload, dims: Dims, prefixes: Prefixes | None = None, *,
                  patience: Int[np.ndarray, "requests 4"] | None = None, is_split: bool = True,
                  order: str = "fcfs", slack: Slack | None = None) -> Requests:
    """The workload as the loop reads it, padded. patience: of `make_patience`; is_split: images of a request are
    encoded apart; order: of the waiting queue, as of `Batching`; slack: of `Params`, with that of least slack."""
    shared = {} if patience is None else dict(patience=patience)
    if workload.num_images is not None and (dims.has_parts or dims.has_encoder):
        none = np.zeros(0, np.int64)
        whose, tiles = parts_of(workload, is_split) if dims.has_parts else (none, none)
        shared["images"] = Images(workload.num_images * workload.tiles_per_image, whose, tiles, dims.block_size)
    if prefixes is not None:
        more = dims.path_width - prefixes.paths.shape[1]
        shared |= dict(paths=np.pad(prefixes.paths, ((0, 0), (0, more)), constant_values=-1),
                      bounds=np.pad(prefixes.bounds, ((0, 0), (0, more)), mode="edge"),
                      num_segments=dims.num_segments)
    if dims.route_by == "prefix":
        shared["home"] = ring.homes(ring.prefix_keys(prefixes.paths, prefixes.bounds, workload.input_tokens,
                                                     PREFIX_TOKENS, dims.block_size), dims.all_ranks)
    if dims.route_by == "session":
        shared["home"] = ring.homes(workload.session, dims.all_ranks)
    if dims.has_noise:
        shared["noise"] = ring.gumbels(workload.uniforms, dims.all_ranks)
    if workload.think_s is not None:
        shared |= dict(successor=workload.successors(), think_s=workload.think_s, keeps_turns=dims.keeps_turns)
    key = workload.priority
    if order == "sjf":
        key = workload.predicted_tokens
    if order == "edf":
        key = workload.arrival_s + workload.limit_s
    if dims.has_urgent:
        # Whatever the queue is sorted by.
        shared["is_urgent"] = workload.priority < 0
    if order == "least_slack":
        due_ms = np.rint(1e3 * (workload.arrival_s + workload.limit_s)).astype(np.int64)
        predicted = np.minimum(workload.predicted_tokens.astype(np.int64), int(slack.most_tokens))
        shared["slack"] = np.stack([due_ms, predicted], axis=1)
        key = slack.key_ms(due_ms, workload.input_tokens.astype(np.int64), predicted)
    if dims.num_partial > 1:
        limit_s = np.zeros(len(workload)) if workload.limit_s is None else workload.limit_s
        shared["limit"] = np.minimum(np.rint(PARTS * limit_s), MOST_PARTS - 1).astype(np.int32)
    if dims.has_variants:
        shared["variant"] = workload.variant
    if dims.num_tenants:
        shared["tenant"] = workload.tenant
    return pack_requests(workload.arrival_s, workload.input_tokens, workload.output_tokens, workload.max_tokens,
                         workload.uniforms, dims.num_requests, key, **shared)
