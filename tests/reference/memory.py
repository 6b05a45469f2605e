"""Blocks of KV cache: how many somebody takes, who holds them, whether they are expected to suffice."""

from .flags import CAN_GROW, Flags
from .state import Instance, Job


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def blocks_at_admission(job: Job, chunk: int, flags: Flags) -> int:
    """Blocks an admitted job takes at once."""
    if not flags.track_blocks:
        return 0
    tokens = {
        "none": chunk,
        "prompt": job.known,
        "expected": job.known,
        "max_tokens": job.request.prompt + job.request.max_tokens,
        "max_model_len": flags.max_model_len,
    }[flags.reserve]
    return ceil_div(tokens, flags.block_size)


def blocks_to_grow(job: Job, tokens: int, flags: Flags) -> int:
    """Blocks a running job lacks to compute `tokens` more."""
    if not flags.track_blocks:
        return 0
    lacking = max(0, ceil_div(job.scheduled_tokens + tokens, flags.block_size) - job.blocks)
    assert lacking == 0 or flags.reserve in CAN_GROW, "a full reservation was too small"
    return lacking


def blocks_for(job: Job, tokens: int, flags: Flags) -> tuple[int, int]:
    """Blocks a running job takes to compute `tokens` more, and how many must be free for it to go on."""
    lacking = blocks_to_grow(job, tokens, flags)
    if job.is_prefilled and flags.track_blocks and flags.decode_needs_free_block == "always":
        return lacking, max(1, lacking)
    return lacking, lacking


def take(instance: Instance, job: Job, blocks: int) -> None:
    assert 0 <= blocks <= instance.free_blocks, "more blocks taken than were free"
    instance.free_blocks -= blocks
    job.blocks += blocks


def release(instance: Instance, job: Job) -> None:
    if instance.cache is not None:
        instance.cache.free(job.for_cache)
        instance.free_blocks = instance.cache.num_free
    else:
        instance.free_blocks += job.blocks
    job.blocks = 0


def keep_for_transfer(instance: Instance, job: Job) -> None:
    """A job stops running here; its blocks stay until they are copied."""
    instance.running.remove(job)
    instance.leaving.append(job)
    job.source_blocks, job.blocks = job.blocks, 0


def release_source(instance: Instance, job: Job) -> None:
    """The copy is over: the blocks that were kept for it go."""
    instance.leaving.remove(job)
    if instance.cache is not None:
        instance.cache.free(job.for_cache)
        instance.free_blocks = instance.cache.num_free
    else:
        instance.free_blocks += job.source_blocks
    job.source_blocks = 0


def stored_behind(instance: Instance, job: Job, cached: int) -> int:
    """Tokens that host memory has right behind the cached ones."""
    if instance.store is None:
        return 0
    size = instance.flags.block_size
    return instance.store.find(job.for_cache, cached // size, size) * size


def hold_cached(instance: Instance, job: Job, chunk: int) -> None:
    """Admission with a prefix cache: the job holds what is cached of it, and room for what it loads and its first chunk
    behind."""
    cached = instance.cache.lookup(job.for_cache)
    loaded = stored_behind(instance, job, cached)
    assert instance.cache.allocate(job.for_cache, loaded + chunk), "admitted without room"
    job.computed = cached + loaded
    job.hit_tokens += cached + loaded
    if job.cached_tokens is None:
        job.cached_tokens, job.loaded_tokens = cached, loaded
        job.loaded_from = getattr(instance.store, "lender", None) if loaded else None
    if instance.store is not None:
        size = instance.flags.block_size
        fetched = instance.store.load(job.for_cache, cached // size, loaded // size)
        if job.fetched_tokens is None:
            job.fetched_tokens = (fetched or 0) * size
        instance.store.store(job.for_cache, job.computed + chunk, size)
    follow_cache(instance, job)


def grow_cached(instance: Instance, job: Job, tokens: int) -> None:
    """Room in the prefix cache for the next tokens of a running job."""
    assert instance.cache.grow(job.for_cache, tokens), "scheduled without room"
    if instance.store is not None and not job.is_prefilled:
        instance.store.store(job.for_cache, job.scheduled_tokens + tokens, instance.flags.block_size)
    follow_cache(instance, job)


def follow_cache(instance: Instance, job: Job) -> None:
    job.blocks = len(instance.cache.held[job.request.id])
    instance.free_blocks = instance.cache.num_free


def is_expected_to_fit(instance: Instance, job: Job, admitted_now: list[Job], flags: Flags) -> bool:
    """SGLang's admission test: prompt and all its output against free tokens less what the running expect."""
    free_tokens = instance.free_blocks * flags.block_size
    wanted = ceil_div(job.known, flags.block_size) * flags.block_size
    wanted += min(job.tokens_left, flags.expected_clip)
    expected = 0.0
    for other in instance.running:
        is_full = flags.expected_new_admissions == "full" and other in admitted_now
        ratio = 1.0 if is_full else instance.new_token_ratio
        expected += min(other.tokens_left, flags.expected_clip) * ratio
    left = free_tokens - expected
    return wanted < left or (wanted == left and not flags.is_expected_strict)
