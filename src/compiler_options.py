"""neuronx-cc options, and what its limit on instructions means for the prompts of a model."""

import os

from .config import DeepseekV3InferenceConfig, prompt_lengths
from .errors import ConfigError
from .expert_kernel import expert_kernel_cost

# The compiler's default is taken from a comment in NxDI's Qwen3-MoE, which raises it to the other (error NCC_EBVF030).
# Other instructions than the expert kernel's are not counted here, hence half of the default.
_UNCOUNTED_FROM = 5_000_000 // 2
_RAISED_LIMIT = 15_000_000
_LIMIT_OPTION = "--internal-max-instruction-limit"
# Tokens in a tile of the sum of the kernel's two halves.
_SUM_TILE = 128


def expert_instructions(config: DeepseekV3InferenceConfig) -> dict[int, int]:
    """Instructions of the expert kernels of all layers, per core, by length of the prompts (a graph each). Empty where
    blockwise_matmul_config chooses another kernel than the one sharded over blocks."""
    neuron_config, model = config.neuron_config, config.model
    kernel = neuron_config.blockwise_matmul_config
    if not kernel.use_shard_on_block_dynamic_while:
        return {}
    layers = sum(map(model.has_experts, range(model.num_hidden_layers)))
    layers += neuron_config.enable_fused_speculation  # the draft's, in the same graph
    found = {}
    for length in prompt_lengths(neuron_config):
        cost = expert_kernel_cost(
            model,
            neuron_config.ctx_batch_size * length,
            neuron_config.tp_degree,
            block_size=kernel.block_size,
            skip_token=kernel.skip_dma_token,
            skip_weight=kernel.skip_dma_weight,
        )
        found[length] = layers * cost.instructions
    return found


def check_prompts(config: DeepseekV3InferenceConfig) -> list[str]:
    """A line per prompt graph with the instructions of its expert kernels. Raises ConfigError for prompts that the
    kernel does not take, or that the compiler would refuse after hours."""
    batch, lines = config.neuron_config.ctx_batch_size, []
    for length, instructions in expert_instructions(config).items():
        if batch * length % _SUM_TILE:
            raise ConfigError(
                f"neuron_config: {batch} prompts of {length} are no multiple of {_SUM_TILE} tokens, in which the "
                "expert kernel adds up; change max_context_length or context_encoding_buckets"
            )
        if instructions > _RAISED_LIMIT and not _set_by_user():
            raise ConfigError(
                f"neuron_config: prompts of {length}: the expert kernels have {instructions:,} instructions, and "
                f"{_RAISED_LIMIT:,} are allowed; use shorter context_encoding_buckets, or set {_LIMIT_OPTION} in "
                "NEURON_CC_FLAGS"
            )
        lines.append(f"prompts of {length}: {instructions:,} instructions in the expert kernels, on each core")
    return lines


def compiler_options(config: DeepseekV3InferenceConfig) -> str:
    """A transformer for trn2, numbers left in the dtype that the model gives them; the limit on instructions raised
    where a prompt needs it."""
    neuron_config = config.neuron_config
    options = [
        "--model-type=transformer",
        "-O1",
        "--auto-cast=none",
        "--enable-saturate-infinity",
        "--enable-mixed-precision-accumulation",
        f"--lnc={neuron_config.logical_nc_config}",
        f"--tensorizer-options='--enable-ccop-compute-overlap "
        f"--cc-pipeline-tiling-factor={neuron_config.cc_pipeline_tiling_factor}'",
        "--internal-enable-dge-levels vector_dynamic_offsets",
    ]
    if neuron_config.scratchpad_page_size:
        options.append(f"--hbm-scratchpad-page-size={neuron_config.scratchpad_page_size}")
    if max(expert_instructions(config).values(), default=0) > _UNCOUNTED_FROM and not _set_by_user():
        options.append(f"{_LIMIT_OPTION}={_RAISED_LIMIT}")
    return " ".join(options)


def _set_by_user() -> bool:
    return _LIMIT_OPTION in os.environ.get("NEURON_CC_FLAGS", "")
