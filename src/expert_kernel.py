"""What the expert kernel of prompts costs, counted from its loops.

NxD calls `bwmm_shard_on_block` of NKI's public library (github.com/aws-neuron/nki-library, core/moe/moe_cte): the rows
of each expert are cut into blocks, two cores take them in turn, and every block is unrolled into instructions. Its
counts agree with a run of the library's own tracing (NKI 2.29): 51,129 instructions for 512 tokens of the released
model at TP 64, 137,019 for 8,192. What it reads follows from the shapes that its copies have.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model_config import ModelConfig

CORES = 2  # that make a logical core (LNC 2)
TILE = 128  # rows and columns of the matrix unit
_BANK = 512  # columns of a PSUM bank in float32
_BLOCKS_AT_ONCE = 3  # whose tokens are loaded and transposed together


@dataclass(frozen=True)
class ExpertKernelCost:
    """Of one layer of one rank; instructions and cycles of the core that has more.

    flops: multiplications and additions of all rows of all blocks. padded_flops: the same with the part of the matrix
    unit that stays empty. cycles: of the matrix unit, a column each, transposes included. read_bytes, written_bytes:
    between HBM and both cores, with tokens spread evenly over the experts. instructions is None of another kernel than
    this one.
    """

    blocks: int
    instructions: int | None
    flops: int
    padded_flops: int
    cycles: int
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class ExpertKernelSizes:
    """What one call of the kernel is given.

    width: intermediate values on this rank. weight_bytes: of a weight and of an activation. skip_token, skip_weight:
    NxD's skip_dma_token and skip_dma_weight: rows that hold no token are not copied, nor are weights that the core has
    from its last block.
    """

    tokens: int
    experts: int
    top_k: int
    hidden: int
    width: int
    blocks: int
    block_size: int = 128
    weight_bytes: int = 2
    skip_token: bool = False
    skip_weight: bool = False


def expert_blocks(tokens: int, experts: int, top_k: int, block_size: int) -> int:
    """The blocks that a graph has for `tokens` tokens: enough for any choice of experts (as NxD counts them)."""
    return min(_ceil(tokens * top_k - (experts - 1), block_size) + experts - 1, tokens * top_k)


def expert_kernel_cost(
    model: "ModelConfig",
    tokens: int,
    tp_degree: int,
    block_size: int = 128,
    weight_bytes: int = 2,
    skip_token: bool = False,
    skip_weight: bool = False,
) -> ExpertKernelCost:
    """The cost for a prompt graph of `tokens` tokens, all sequences together. The rest as in ExpertKernelSizes."""
    experts, top_k = model.n_routed_experts, model.num_experts_per_tok
    sizes = ExpertKernelSizes(
        tokens=tokens,
        experts=experts,
        top_k=top_k,
        hidden=model.hidden_size,
        width=model.moe_intermediate_size // tp_degree,
        blocks=expert_blocks(tokens, experts, top_k, block_size),
        block_size=block_size,
        weight_bytes=weight_bytes,
        skip_token=skip_token,
        skip_weight=skip_weight,
    )
    return cost_of_sizes(sizes)


def cost_of_sizes(sizes: ExpertKernelSizes) -> ExpertKernelCost:
    """The cost of one call."""
    tokens, blocks, block_size = sizes.tokens, sizes.blocks, sizes.block_size
    hidden, width, skip_token = sizes.hidden, sizes.width, sizes.skip_token
    flops = blocks * block_size * 3 * 2 * hidden
    row = hidden * sizes.weight_bytes
    rows = min(tokens * sizes.top_k, blocks * block_size) if skip_token else blocks * block_size
    loads = min(blocks, sizes.experts) if sizes.skip_weight else blocks
    first = 0 if skip_token else CORES * block_size  # nothing is there yet to add to
    both_halves = CORES * tokens * row  # each core adds up its blocks on its own; the two halves are summed at the end
    return ExpertKernelCost(
        blocks=blocks,
        instructions=_instructions(tokens, hidden, width, blocks, block_size, skip_token, sizes.skip_weight),
        flops=flops * width,
        padded_flops=flops * _ceil(width, TILE) * TILE,
        cycles=_ceil(blocks, CORES) * _cycles(hidden, width, block_size),
        read_bytes=loads * 3 * width * row + (2 * rows - first) * row + both_halves,
        written_bytes=rows * row + 2 * both_halves,
    )


def _cycles(hidden: int, width: int, block_size: int) -> int:
    """Of the matrix unit for one block: a transpose of its tokens, gate and up, down."""
    row_tiles, width_tiles = _ceil(block_size, TILE), _ceil(width, TILE)
    hidden_tiles = _hidden_tiles(hidden)
    transposes = hidden_tiles * row_tiles * TILE
    gate_up = 2 * hidden_tiles * width_tiles * block_size
    return transposes + gate_up + row_tiles * width_tiles * _ceil(hidden, _BANK) * _BANK


def _instructions(
    tokens: int, hidden: int, width: int, blocks: int, block_size: int, skip_token: bool, skip_weight: bool
) -> int:
    """Of the first core, which has a block more where their number is odd."""
    own_blocks = _ceil(blocks, CORES)
    clear_transposed = _BLOCKS_AT_ONCE * _hidden_tiles(hidden) * _ceil(block_size, _BANK)
    per_block = _load_block(hidden, block_size) + _compute_block(hidden, width, block_size, skip_token, skip_weight)
    # The first block adds to zeros in place of a row of the output that it would have to look up.
    first = _ceil(block_size, TILE) * (2 if skip_token else 1)
    return (
        _begin(tokens, hidden, block_size, skip_token)
        + (_find_repeated_weights(own_blocks, hidden) if skip_weight else 0)
        + _ceil(own_blocks, _BLOCKS_AT_ONCE) * clear_transposed
        + own_blocks * per_block
        - first
        + _sum_halves(tokens)
    )


def _begin(tokens: int, hidden: int, block_size: int, skip_token: bool) -> int:
    """Zeros into the output, and the table of experts."""
    rows = tokens + (0 if skip_token else 1)  # a row more takes what the empty rows of blocks give
    clear_output = _ceil(rows, TILE) + _ceil(rows, TILE) - (rows % TILE == 1)
    return clear_output + 3 + _BLOCKS_AT_ONCE * _ceil(block_size, TILE)


def _find_repeated_weights(own_blocks: int, hidden: int) -> int:
    per_row = _ceil(own_blocks - 1, TILE)
    partial_row = (own_blocks - 1) % per_row if per_row else 0
    return 2 * _ceil(hidden, _BANK) + 2 + 4 + (4 if partial_row else 0) + 3


def _load_block(hidden: int, block_size: int) -> int:
    """The numbers of its tokens, the tokens, and their transpose through PSUM."""
    row_tiles, banks = _ceil(block_size, TILE), _ceil(block_size, _BANK)
    return 1 + row_tiles + _hidden_tiles(hidden) * (row_tiles + banks)


def _compute_block(hidden: int, width: int, block_size: int, skip_token: bool, skip_weight: bool) -> int:
    row_tiles, banks, width_tiles = _ceil(block_size, TILE), _ceil(block_size, _BANK), _ceil(width, TILE)
    columns = _ceil(hidden, _BANK)
    numbers_of_expert = 2
    load_old = row_tiles * (3 if skip_token else 2)
    clear_down = 1 if width % TILE and not skip_weight else 0
    load_weights = 2 * columns + width_tiles + clear_down
    gate_up = 2 * width_tiles * banks * (_hidden_tiles(hidden) + 1)
    activation = 2 * width_tiles * banks
    affinities = 6 + row_tiles + (2 if skip_token else 0)
    down = row_tiles * columns * (width_tiles + 1)
    store = 2 * row_tiles
    return numbers_of_expert + load_old + load_weights + gate_up + activation + affinities + down + store


def _sum_halves(tokens: int) -> int:
    """Zeros, a barrier, and three copies for each tile of the core's share of tokens."""
    return 2 + 3 * (_ceil(tokens, TILE) // CORES)


def _hidden_tiles(hidden: int) -> int:
    return _ceil(hidden, _BANK) * (_BANK // TILE)


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
