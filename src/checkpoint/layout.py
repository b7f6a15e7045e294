"""Where every tensor of the model comes from: Hugging Face names and shapes, how they combine, how ranks split them.

One declarative table, read in both directions: by the in-memory converter, the checks, the embedded runtime's loader,
the sharder and its inverse. A tensor of the model (Neuron name, as in NxDI's state dict) is made of one or more Hugging
Face tensors.

Sizes in shapes: H hidden, I intermediate, E routed experts, R kv_lora_rank, P qk_rope_head_dim, D qk_nope_head_dim,
V v_head_dim, N heads, Q q_lora_rank.
"""

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from math import prod

import torch

from ..model_config import ModelConfig
from ..weight_forms import DOWN, GATE_UP, ExpertScale, WeightForm

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.")
# Some write the language model as a part of a larger one, some leave `model.` out, as NxDI does.
_PREFIXES = ("language_model.", "model.language_model.")
_VISION = ("model.vision_tower.", "model.mm_projector.", "model.multi_modal_projector.")


def canonical_name(name: str) -> str:
    """The Hugging Face name of a tensor, as the layout has it, for the name under which a checkpoint stores it."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name if name.startswith(("model.", "lm_head.")) else "model." + name


def is_of_vision(name: str) -> bool:
    """Whether a tensor belongs to the part of a larger model that sees images."""
    return name.startswith(_VISION)


def layer_of(name: str) -> int | None:
    """The layer that a Hugging Face tensor belongs to, None for those outside of all layers."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


class Combine(Enum):
    """How the sources of a tensor become one."""

    ROWS = "stacked along dim 0; a single source is taken as it is"
    EXPERTS_GATE_UP = "gate_0, up_0, gate_1, ... [I, H] each to [E, H, 2I], gate in the first I columns"
    EXPERTS_DOWN = "down_0, down_1, ... [H, I] each to [E, I, H]"


@dataclass(frozen=True)
class Source:
    """A tensor of the Hugging Face checkpoint, as it is after dequantization."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """Where a source [rows, columns] begins in its tensor's grid, and whether it lies there transposed."""

    rows: int
    columns: int
    row: int = 0
    column: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Grid:
    """A tensor seen as [experts, rows, columns]; axes that it lacks have size 1. Says how sources and ranks divide it.

    blocks: the sources of one expert; all experts have the same. axis: the one that ranks split (1 rows, 2 columns),
    None for a copy on every rank.
    """

    experts: int
    rows: int
    columns: int
    blocks: tuple[Block, ...]
    axis: int | None
    stride: int

    def rank_ranges(self, rank: int, tp_degree: int) -> list[tuple[int, int]]:
        """The ranges of the split axis that a rank holds, one after the other; `stride` of them."""
        size = (self.rows, self.columns)[self.axis - 1] // (tp_degree * self.stride)
        return [(i * size, (i + 1) * size) for i in range(rank, tp_degree * self.stride, tp_degree)]

    def rank_shape(self, tp_degree: int) -> tuple[int, int, int]:
        rows = self.rows // tp_degree if self.axis == 1 else self.rows
        columns = self.columns // tp_degree if self.axis == 2 else self.columns
        return self.experts, rows, columns


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the Neuron model.

    partition_dim: axis that tensor parallelism splits, None for a copy on every rank. stride 2 splits each half of that
    axis on its own and joins the two pieces ([gate | up] stays [gate_rank | up_rank]). float32: keeps that dtype
    whatever the model's. scale: the tensor holds FP8 codes (weight_forms.py), and its scale is a tensor beside it.
    head_size: what an attention head has of that axis; ranks hold whole heads. padding: zeros behind the sources on
    that axis, of heads that the model does not have.
    """

    name: str
    sources: tuple[Source, ...]
    combine: Combine = Combine.ROWS
    partition_dim: int | None = None
    stride: int = 1
    float32: bool = False
    scale: ExpertScale | None = None
    head_size: int | None = None
    padding: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        rows, *rest = self.sources[0].shape
        if self.combine is Combine.EXPERTS_GATE_UP:
            return len(self.sources) // 2, rest[0], 2 * rows
        if self.combine is Combine.EXPERTS_DOWN:
            return len(self.sources), rest[0], rows
        shape = [sum(source.shape[0] for source in self.sources), *rest]
        if self.padding:
            shape[self.partition_dim] += self.padding
        return tuple(shape)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def has_experts(self) -> bool:
        """True for weights of routed experts, which a WeightForm is about."""
        return self.combine is not Combine.ROWS

    def dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype that the tensor has in a model of `model_dtype`."""
        if self.scale:
            return torch.float8_e4m3fn
        return torch.float32 if self.float32 else model_dtype

    @property
    def scale_name(self) -> str:
        return self.name.removesuffix("weight") + "scale"

    def rank_tensors(
        self, model_dtype: torch.dtype, tp_degree: int
    ) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, shape) of what one rank holds: the tensor, and its scale if it has one."""
        yield self.name, self.dtype(model_dtype), self.rank_shape(tp_degree)
        if self.scale:
            yield self.scale_name, torch.float32, self.scale.rank_shape(tp_degree)

    def rank_shape(self, tp_degree: int) -> tuple[int, ...]:
        """The shape of one rank's part."""
        shape = list(self.shape)
        if self.partition_dim is not None:
            shape[self.partition_dim] //= tp_degree
        return tuple(shape)

    @cached_property
    def grid(self) -> Grid:
        if self.combine is Combine.ROWS:
            sizes = [(source.shape[0], prod(source.shape[1:])) for source in self.sources]
            starts = [sum(rows for rows, _ in sizes[:i]) for i in range(len(sizes))]
            blocks = tuple(Block(*size, row=start) for size, start in zip(sizes, starts, strict=True))
            axis = None if self.partition_dim is None else self.partition_dim + 1
            return Grid(1, self.shape[0], prod(self.shape[1:]), blocks, axis, self.stride)
        experts, rows, columns = self.shape
        size = self.sources[0].shape
        blocks = tuple(Block(*size, column=start, transposed=True) for start in range(0, columns, size[0]))
        return Grid(experts, rows, columns, blocks, self.partition_dim, self.stride)


def in_form(specs: Iterable[TensorSpec], form: WeightForm, config: ModelConfig, tp_degree: int) -> Iterator[TensorSpec]:
    """The specs as `tp_degree` ranks share them: the routed experts in a form, as many heads on each rank."""
    projections = {Combine.EXPERTS_GATE_UP: GATE_UP, Combine.EXPERTS_DOWN: DOWN}
    padding = config.padded_heads(tp_degree) - config.num_attention_heads
    for spec in specs:
        if projection := projections.get(spec.combine):
            spec = replace(spec, scale=form.scale(projection, config, tp_degree))
        yield replace(spec, padding=padding * spec.head_size) if spec.head_size else spec


def model_layout(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every weight of the model, in the order of the forward pass. MTP layers are not part of it."""
    H, vocab = config.hidden_size, config.vocab_size
    embedding = Source(_EMBEDDING, (vocab, H))
    yield TensorSpec("embed_tokens.weight", (embedding,), partition_dim=1)
    for layer in range(config.num_hidden_layers):
        yield from layer_layout(config, layer)
    yield _spec("norm.weight", "model.norm.weight", (H,))
    yield TensorSpec("lm_head.weight", (_head(config),), partition_dim=0)


def layer_layout(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    """The weights of one decoder layer."""
    neuron, hf = f"layers.{layer}.", f"model.layers.{layer}."
    after = ("post_mlp_layernorm",) if config.has_norm_after_mlp(layer) else ()
    for norm in ("input_layernorm", "post_attention_layernorm", *after):
        yield _spec(f"{neuron}{norm}.weight", f"{hf}{norm}.weight", (config.hidden_size,))
    yield from _attention(config, neuron + "self_attn.", hf + "self_attn.")
    mlp = _moe if config.has_experts(layer) else _dense_mlp
    yield from mlp(config, neuron + "mlp.", hf + "mlp.")


def mtp_layout(config: ModelConfig, stored: Container[str] | None = None) -> Iterator[TensorSpec]:
    """The multi-token prediction layers, which follow the model's in the checkpoint.

    Each joins token and hidden state (arXiv:2412.19437, section 2.2) by eh_proj, split like the projections. Embedding
    and head are the model's: a checkpoint may hold copies of them in each layer. stored: the names of its tensors;
    where a copy is not among them, the model's own is the source.
    """
    H, vocab, copies = config.hidden_size, config.vocab_size, mtp_copies(config)
    for layer in config.mtp_layers:
        yield from layer_layout(config, layer)
        neuron, hf = f"layers.{layer}.", f"model.layers.{layer}."
        for name, shape, partition_dim in (
            ("embed_tokens", (vocab, H), 1),
            ("shared_head.head", (vocab, H), 0),
            ("enorm", (H,), None),
            ("hnorm", (H,), None),
            ("shared_head.norm", (H,), None),
            ("eh_proj", (H, 2 * H), 0),
        ):
            source = f"{hf}{name}.weight"
            if stored is not None and source not in stored:
                source = copies.get(source, source)
            yield _spec(f"{neuron}{name}.weight", source, shape, partition_dim)


def mtp_copies(config: ModelConfig) -> dict[str, str]:
    """The tensors of MTP layers that are copies of the model's own, and the names of these."""
    shared = {"embed_tokens": _EMBEDDING, "shared_head.head": _head(config).name}
    return {f"model.layers.{i}.{name}.weight": own for i in config.mtp_layers for name, own in shared.items()}


def stores_mtp(config: ModelConfig, stored: Container[str]) -> bool:
    """Whether a checkpoint with tensors of these names has the MTP layers that config.json tells of. They may be left
    out, and a layer of the model may lie in their place, where config.json asks for fewer layers than are stored."""
    own = ("enorm", "hnorm", "eh_proj")
    return any(f"model.layers.{layer}.{name}.weight" in stored for layer in config.mtp_layers for name in own)


def checkpoint_layout(config: ModelConfig, stored: Container[str]) -> list[TensorSpec]:
    """All that a checkpoint with tensors of these names must hold: the model, and the MTP layers if it has them."""
    mtp = mtp_layout(config, stored) if stores_mtp(config, stored) else ()
    return [*model_layout(config), *mtp]


def rank_tensor_names(config: ModelConfig, layers: range | None = None) -> Iterator[str]:
    """int32 tensors that tell a compiled rank its number: arange(tp_degree), one value per rank.
    `layers`: those of the file, the model's if not given."""
    yield "rank_util.rank"
    for layer in range(config.num_hidden_layers) if layers is None else layers:
        if config.has_experts(layer):
            yield f"layers.{layer}.mlp.expert_mlps.spmd_rank.rank"


def _head(config: ModelConfig) -> Source:
    return Source(_EMBEDDING if config.tie_word_embeddings else _HEAD, (config.vocab_size, config.hidden_size))


def _attention(config: ModelConfig, neuron: str, hf: str) -> Iterator[TensorSpec]:
    H, N, Q, R = config.hidden_size, config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
    D, P, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    down = [("kv_a_proj_with_mqa", R + P)]
    if Q is None:
        yield _of_heads(neuron + "q_proj.weight", hf + "q_proj.weight", (N * (D + P), H), 0, D + P)
    else:
        down.insert(0, ("q_a_proj", Q))
        yield _spec(neuron + "q_a_layernorm.weight", hf + "q_a_layernorm.weight", (Q,))
        yield _of_heads(neuron + "q_b_proj.weight", hf + "q_b_proj.weight", (N * (D + P), Q), 0, D + P)
    weights = tuple(Source(f"{hf}{name}.weight", (rows, H)) for name, rows in down)
    yield TensorSpec(neuron + "qkv_a_proj.weight", weights, partition_dim=0)
    yield _spec(neuron + "kv_a_layernorm.weight", hf + "kv_a_layernorm.weight", (R,))
    yield _of_heads(neuron + "kv_b_proj.weight", hf + "kv_b_proj.weight", (N * (D + V), R), 0, D + V)
    yield _of_heads(neuron + "o_proj.weight", hf + "o_proj.weight", (H, N * V), 1, V)
    if config.attention_bias:
        biases = tuple(Source(f"{hf}{name}.bias", (rows,)) for name, rows in down)
        yield TensorSpec(neuron + "qkv_a_proj.bias", biases, partition_dim=0)
        # Added after the outputs of all ranks are summed, so every rank holds it whole.
        yield _spec(neuron + "o_proj.bias", hf + "o_proj.bias", (H,))


def _dense_mlp(config: ModelConfig, neuron: str, hf: str) -> Iterator[TensorSpec]:
    yield from _mlp(neuron, hf, config.hidden_size, config.intermediate_size)


def _moe(config: ModelConfig, neuron: str, hf: str) -> Iterator[TensorSpec]:
    H, I, E = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts  # noqa: E741
    yield _spec(neuron + "router.linear_router.weight", hf + "gate.weight", (E, H))
    if config.member.correction_bias:
        bias = Source(hf + "gate.e_score_correction_bias", (E,))
        yield TensorSpec(neuron + "router.e_score_correction_bias", (bias,), float32=True)
    experts = [f"{hf}experts.{expert}." for expert in range(E)]
    gate_up = tuple(Source(f"{e}{proj}_proj.weight", (I, H)) for e in experts for proj in ("gate", "up"))
    down = tuple(Source(f"{e}down_proj.weight", (H, I)) for e in experts)
    mlp_op = neuron + "expert_mlps.mlp_op."
    yield TensorSpec(mlp_op + "gate_up_proj.weight", gate_up, Combine.EXPERTS_GATE_UP, partition_dim=2, stride=2)
    yield TensorSpec(mlp_op + "down_proj.weight", down, Combine.EXPERTS_DOWN, partition_dim=1)
    if config.n_shared_experts:
        yield from _mlp(neuron + "shared_experts.", hf + "shared_experts.", H, I * config.n_shared_experts)


def _mlp(neuron: str, hf: str, hidden: int, intermediate: int) -> Iterator[TensorSpec]:
    for proj in ("gate_proj.weight", "up_proj.weight"):
        yield _spec(neuron + proj, hf + proj, (intermediate, hidden), partition_dim=0)
    yield _spec(neuron + "down_proj.weight", hf + "down_proj.weight", (hidden, intermediate), partition_dim=1)


def _of_heads(name: str, source: str, shape: tuple[int, ...], partition_dim: int, head_size: int) -> TensorSpec:
    return TensorSpec(name, (Source(source, shape),), partition_dim=partition_dim, head_size=head_size)


def _spec(name: str, source: str, shape: tuple[int, ...], partition_dim: int | None = None) -> TensorSpec:
    return TensorSpec(name, (Source(source, shape),), partition_dim=partition_dim)
