"""A small runtime with the names of NxD and NxDI that the model uses, in plain PyTorch on CPU or CUDA.

It follows NxDI's contracts (what a layer gets and returns, the masks, the cache layout, the state dict), so that the
same model classes and the same tests run on both. It is not traced: shapes may depend on data.
"""

from .generation import HuggingFaceGenerationAdapter
from .model_base import NeuronBaseForCausalLM, NeuronBaseModel, with_draft
from .modules import BlockKVCacheManager, KVCacheManager, rmsnorm_cls
from .moe import build_moe
from .neuron_config import InferenceConfig, MoENeuronConfig
from .parallel_layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from .parallel_state import all_gather as gather_columns
from .parallel_state import gather_sequence, rank_of, shard_group
