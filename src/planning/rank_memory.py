"""The memory of one rank: weights, cache, logits and what the graphs need beside them.

What is not arithmetic is named here, with its source. Nothing of it was measured by us.
"""

from dataclasses import dataclass, field, replace

from ..checkpoint.parts import DRAFT
from ..dtypes import BY_TORCH
from ..errors import ConfigError
from ..model_config import ModelConfig
from ..sharded_attention import rows_of
from ..weight_forms import BF16, WeightForm
from .instances import DEFAULT_LNC, Instance
from .prompt_graph import activation_peak, prompt_tensors
from .shard_choice import check_divides
from .weight_parts import weight_bytes

# Scratch memory of a graph comes in pages. The README of NxDI's contrib/models/DeepSeek-V3 names 512 MB for the prompt
# graph of 1,024 tokens, whose tensors by our formulas take less than a page.
SCRATCH_PAGE = 512 * 2**20
# What else a core holds: code of the graphs, DMA descriptors, the decode graph's own tensors. By that README the same
# model loads with seq_len 512 and does not with 1,024. Its 23.00 GB of weights, its cache (140,544 bytes a token) and a
# page leave 0.39 and 0.32 GB of 24, so the rest lies between.
RUNTIME_RESERVE = 360 * 10**6


@dataclass(frozen=True)
class CompiledShape:
    """What a model is compiled for. Fields as NxDI's NeuronConfig names them.

    max_context_length: of the longest prompt, or of a chunk of it where the cache is in blocks; seq_len if 0.
    ctx_batch_size: prompts at a time, batch_size if 0. pa_block_size: tokens of a block, 0 for an unpaged cache.
    pa_num_blocks: as many as batch_size sequences of seq_len tokens need if 0. kv_seq_shards: adjacent ranks that share
    each sequence's cache. speculation_length: tokens that a step drafts and verifies with the MTP layer, 0 without.
    """

    tp_degree: int
    batch_size: int = 1
    seq_len: int = 512
    max_context_length: int = 0
    ctx_batch_size: int = 0
    form: WeightForm = BF16
    dtype: str = "bfloat16"
    lnc: int = DEFAULT_LNC
    pa_block_size: int = 0
    pa_num_blocks: int = 0
    kv_seq_shards: int = 1
    speculation_length: int = 0

    @property
    def cached_rows(self) -> int:
        """Of all sequences together, on one rank. Blocks have one more, sequences that are split over ranks one row
        each, that takes what is not kept."""
        shards = self.kv_seq_shards
        if self.pa_block_size:
            return (self.blocks + 1) * self.pa_block_size // shards
        return self.batch_size * (self.seq_len if shards == 1 else rows_of(self.seq_len, shards) + 1)

    @property
    def blocks(self) -> int:
        return self.pa_num_blocks or self.batch_size * (self.seq_len // self.pa_block_size)

    @property
    def prefix_length(self) -> int:
        """The most cached tokens ahead of a chunk of a prompt."""
        return self.seq_len - self.prompt_length if self.pa_block_size else 0

    @property
    def prompt_length(self) -> int:
        return min(self.max_context_length or self.seq_len, self.seq_len)

    @property
    def prompts(self) -> int:
        return 1 if self.pa_block_size else min(self.ctx_batch_size or self.batch_size, self.batch_size)

    def with_(self, **fields: int) -> "CompiledShape":
        return replace(self, **fields)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank by part, and of its logical core."""

    parts: dict[str, int] = field(hash=False)
    capacity: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def free(self) -> int:
        """Below 0 where it does not fit."""
        return self.capacity - self.total

    @property
    def fits(self) -> bool:
        return self.free >= 0


def rank_memory(config: ModelConfig, shape: CompiledShape, instance: Instance) -> RankMemory:
    """Raises ConfigError where ranks cannot share the model, or the instance has too few logical cores for them."""
    cores = instance.logical_cores(shape.lnc)
    if shape.tp_degree > cores:
        raise ConfigError(
            f"tp_degree {shape.tp_degree}: {instance.name} has {cores} logical cores at LNC {shape.lnc}; "
            "choose a smaller tp_degree or a larger instance"
        )
    check_divides(shape.kv_seq_shards, shape.tp_degree, shape.pa_block_size)
    parts = dict(weight_bytes(config, shape.tp_degree, shape.dtype, shape.form))
    parts["cache"] = cache_bytes_per_token(config, shape.dtype) * shape.cached_rows
    if shape.speculation_length:
        parts["MTP draft"] = _draft_bytes(config, shape)
    parts["logits"] = _logit_bytes(config, shape)
    parts["prompt scratch"] = scratch_bytes(config, shape)
    parts["runtime reserve"] = RUNTIME_RESERVE
    return RankMemory(parts, instance.rank_bytes(shape.lnc))


def _draft_bytes(config: ModelConfig, shape: CompiledShape) -> int:
    """The MTP layer, its cache, and the draft's own embedding and head, which NxDI gives it."""
    weights = sum(weight_bytes(config, shape.tp_degree, shape.dtype, shape.form, DRAFT).values())
    return weights + cache_bytes_per_token(config, shape.dtype, 1) * shape.cached_rows


def cache_bytes_per_token(config: ModelConfig, dtype: str, layers: int | None = None) -> int:
    """Of one sequence on a rank that holds it: the latent and the rotary key of all layers, or of so many."""
    return (
        (layers or config.num_hidden_layers)
        * (config.kv_lora_rank + config.qk_rope_head_dim)
        * BY_TORCH[dtype].item_bytes
    )


def scratch_bytes(config: ModelConfig, shape: CompiledShape) -> int:
    """Of the longest prompt's graph, in whole pages."""
    prompts = shape.prompts, shape.prompt_length
    tensors = prompt_tensors(config, shape.tp_degree, *prompts, shape.dtype, shape.form, shape.prefix_length)
    return -(-activation_peak(tensors) // SCRATCH_PAGE) * SCRATCH_PAGE


def _logit_bytes(config: ModelConfig, shape: CompiledShape) -> int:
    """A rank's own, and all of them gathered in float32: of each sequence's last token."""
    own = config.vocab_size // shape.tp_degree * BY_TORCH[shape.dtype].item_bytes
    return shape.batch_size * (own + 4 * config.vocab_size)
