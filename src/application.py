"""The causal LM that NxDI compiles, loads and runs: weights, requests, cache slots, compiler options."""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import backend
from .checkpoint.convert import state_dict_of
from .checkpoint.copies import check_copies
from .checkpoint.folder import Checkpoint
from .checkpoint.parts import DRAFT, FUSED, MODEL
from .checkpoint.source import StateDictSource, TensorSource
from .compiler_options import check_prompts, compiler_options
from .config import DeepseekV3InferenceConfig
from .dtypes import dtype_name
from .errors import ConfigError
from .modeling_deepseek import NeuronDeepseekV3Model
from .paged_requests import PagedRequests
from .planning.load_check import check_loads
from .rank_files import check_rank_files
from .requests import RequestChecks, take_rows
from .speculation import check_draft, draft_config
from .third_party import started_by_torchrun, told
from .weight_forms import weight_form

__all__ = ["NeuronDeepseekV3ForCausalLM"]

# Of the Neuron XLA backend: how it takes float8_e4m3fn and scalars that are infinite.
FP8_VARIABLES = {"XLA_HANDLE_SPECIAL_SCALAR": "1", "UNSAFE_FP8FNCAST": "1"}
_logger = logging.getLogger("Neuron")  # NxDI's, which is shown while it compiles


class NeuronDeepseekV3ForCausalLM(backend.NeuronBaseForCausalLM):
    """The causal LM that NxDI compiles, loads and runs."""

    _model_cls = NeuronDeepseekV3Model

    @classmethod
    def get_config_cls(cls) -> type[DeepseekV3InferenceConfig]:
        return DeepseekV3InferenceConfig

    @classmethod
    def get_state_dict(cls, model_name_or_path: str, config: DeepseekV3InferenceConfig) -> dict[str, Tensor]:
        """The model's unsharded state dict, read from a checkpoint folder piece by piece. Raises ConfigError where
        memory cannot hold it, CheckpointError for a checkpoint that cannot be loaded."""
        with Checkpoint(model_name_or_path) as checkpoint:
            return _state_dict(checkpoint.reader, config)

    @staticmethod
    def convert_hf_to_neuron_state_dict(
        state_dict: dict[str, Tensor], config: DeepseekV3InferenceConfig
    ) -> dict[str, Tensor]:
        """The same from a Hugging Face state dict in memory, with or without the `model.` prefix.

        FP8 blocks are dequantized to torch_dtype, q_a and kv_a are joined, experts fused to [E, H, 2I] and [E, I, H] in
        the form of `weights`, the router's bias stays float32, rank tensors are added, MTP layers left out. Raises as
        get_state_dict.
        """
        return _state_dict(StateDictSource(state_dict), config)

    def __init__(
        self, model_path: str, config: DeepseekV3InferenceConfig | None = None, *args: Any, **kwargs: Any
    ) -> None:
        config = self.get_config_cls().load(model_path) if config is None else config
        super().__init__(model_path, self._with_draft(config), *args, **kwargs)
        # The embedded runtime's forward makes plain steps, whether there is a draft or not.
        drafts = self.neuron_config.enable_fused_speculation and backend.NAME == "nxdi"
        step_length = self.neuron_config.speculation_length if drafts else 1
        self.requests = RequestChecks(self.neuron_config, self.config.vocab_size, step_length)
        self.paged = PagedRequests(self.neuron_config) if self.neuron_config.is_block_kv_layout else None
        if self.neuron_config.quantized and self._runs_on_neuron():
            # Ahead of compile() and load(): of NxDI's doors inference_demo alone sets them.
            os.environ.update(FP8_VARIABLES)

    @classmethod
    def _with_draft(cls, config: DeepseekV3InferenceConfig) -> DeepseekV3InferenceConfig:
        """The draft is always the checkpoint's own: a door may have named another one."""
        if not config.neuron_config.enable_fused_speculation:
            return config
        asked = getattr(config, "fused_spec_config", None)
        if asked is not None:
            check_draft(config.model, asked.draft_config.model)
        return backend.with_draft(config, draft_config(config), cls._model_cls)

    @functools.wraps(backend.NeuronBaseForCausalLM.forward, assigned=())  # transformers asks for its arguments
    def forward(self, input_ids: Tensor | None = None, seq_ids: Tensor | None = None, **inputs: Any) -> Any:
        """As the base class's, for cache slots in any order: each row of the output is of the sequence in its row.

        NxDI matches the rows of a full decoding batch with cache slots by their order, whatever seq_ids says, and fills
        a batch with copies of its first row, which overwrite the cache of the slots left out. With a cache in blocks it
        matches rows with tables, see PagedRequests, which also cuts prompts into chunks.
        Raises ConfigError for a request that cannot be answered right.
        """
        seq_ids = (
            torch.arange(0 if input_ids is None else len(input_ids)) if seq_ids is None else seq_ids.flatten().cpu()
        )
        inputs |= {"attention_mask": None} | self.requests.check(input_ids, seq_ids, inputs)
        request = {"input_ids": input_ids, "seq_ids": seq_ids} | inputs
        if backend.NAME == "nxdi" and request.get("sampling_params") is None:
            # The likeliest token. NxDI's own default has a row for each of batch_size sequences, and no graph fits it
            # where ctx_batch_size is another.
            request["sampling_params"] = torch.ones(len(input_ids), 3)
        if self.paged:
            output = self.paged.run(super().forward, request)
            self.kv_cache_populated = True
            return output
        if backend.NAME == "nxdi":
            request = self.requests.fill_batch(request)
        order = request["seq_ids"].argsort()
        if torch.equal(order, torch.arange(len(seq_ids))):
            return super().forward(**request)
        output = super().forward(**{name: take_rows(value, order) for name, value in request.items()})
        rows = order.argsort()[: len(seq_ids)]
        for name, value in (dict(output) | vars(output)).items():
            setattr(output, name, take_rows(value, rows, len(order)))
        return output

    def compile(self, compiled_model_path: str, *args: Any, **kwargs: Any) -> None:
        """As NxDI's. On the CPU there is nothing to compile: it saves the config, from which `load` can start later.

        Logs the instructions of each prompt graph's expert kernels. Raises ConfigError for prompts that they rule out,
        and where a logical core could not hold what would be compiled.
        """
        if self._runs_on_neuron():
            check_loads(self.config.model, self.neuron_config)
            for line in check_prompts(self.config):
                _logger.info(line)
            super().compile(compiled_model_path, *args, **kwargs)
        else:
            self.config.save(compiled_model_path)

    def load(self, *args: Any, **kwargs: Any) -> None:
        """As NxDI's; with `on_cpu` in the NeuronConfig, NxDI's CPU mode."""
        if backend.NAME == "nxdi" and not self._runs_on_neuron():
            self.to_cpu()
        else:
            super().load(*args, **kwargs)

    def to_cpu(self) -> None:
        """As NxDI's CPU mode, with buckets: before each call the model is told its bucket's length."""
        if backend.NAME == "nxdi":
            self._check_processes()
            if "WORLD_SIZE" not in os.environ and not torch.distributed.is_initialized():
                # NxDI's own takes port 29500, which a second run on the machine finds in use.
                store = torch.distributed.HashStore()
                torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        with told("the model cannot run on the CPU", NotImplementedError, ValueError, torch.distributed.DistError):
            super().to_cpu()
        for model in {wrapper.model for wrapper in getattr(self, "models", ())}:
            model.register_forward_pre_hook(_follow_bucket)

    def _runs_on_neuron(self) -> bool:
        return backend.NAME == "nxdi" and not self.neuron_config.on_cpu

    def _check_processes(self) -> None:
        """NxD would use the number of processes as tp_degree without a word."""
        processes = started_by_torchrun()
        if torch.distributed.is_initialized():
            processes = torch.distributed.get_world_size()
        tp_degree = self.neuron_config.tp_degree
        if processes != tp_degree:
            raise ConfigError(
                f"neuron_config: tp_degree {tp_degree} needs as many processes on the CPU, and has {processes}; "
                f"set tp_degree to {processes}, or use torchrun"
            )

    @classmethod
    def save_quantized_state_dict(cls, model_path: str, config: DeepseekV3InferenceConfig) -> None:
        """Writes nothing, where NxDI's own loads the Hugging Face model into memory and quantizes it there."""
        print(
            f"weights {config.neuron_config.weights}: made from {model_path} while it is sharded or loaded; "
            "quantized_checkpoints_path is not used"
        )

    @staticmethod
    def load_hf_model(model_path: str) -> nn.Module:
        """Hugging Face's model in float32, the judge of NxDI's accuracy checks. Raises ConfigError where it is too
        large for this machine."""
        from .accuracy.reference import hugging_face_model

        return hugging_face_model(model_path)

    def checkpoint_loader_fn(self, mmap: bool = False) -> dict[str, Tensor]:
        """What NxDI shards and loads. Replaces NxDI's own, which casts the correction bias to bfloat16."""
        return self.get_state_dict(self._checkpoint_dir(), self.config)

    def rank_state_dict(self, rank: int, config: DeepseekV3InferenceConfig) -> dict[str, Tensor]:
        """What the embedded runtime loads: one rank's part of the model, or of the draft if `config` is the draft's.
        The others' is neither read nor built."""
        with Checkpoint(self._checkpoint_dir()) as checkpoint:
            return _state_dict(checkpoint.reader, config, rank)

    def shard_weights(
        self, compiled_model_path: str, debug: bool = False, pre_shard_weights_hook: Callable[..., None] | None = None
    ) -> None:
        """Writes the files that NxDI's own writes, but streamed: NxDI holds all ranks in memory at once.

        Files of the same sharding that are there already, of `nxdi-deepseek shard` or an earlier compile(), are kept.
        """
        from .checkpoint.sharder import shard_checkpoint

        neuron_config = self.neuron_config
        if neuron_config.skip_sharding or not neuron_config.save_sharded_checkpoint:
            return
        if pre_shard_weights_hook:
            pre_shard_weights_hook(self)
        ranks = range(neuron_config.start_rank_id, neuron_config.start_rank_id + neuron_config.local_ranks_size)
        shard_checkpoint(
            self._checkpoint_dir(),
            compiled_model_path,
            neuron_config.tp_degree,
            dtype_name(neuron_config.torch_dtype),
            ranks=ranks,
            resume=True,
            config=self.config.model,
            weights=neuron_config.weights,
            fused=neuron_config.enable_fused_speculation,
        )

    def load_weights(
        self, compiled_model_path: str, start_rank_id: int | None = None, local_ranks_size: int | None = None
    ) -> None:
        """As NxDI's, for files that are this model's. Raises CheckpointError for others, of FP8 weights in a BF16 model
        for example, which NxDI would load."""
        neuron_config = self.neuron_config
        if neuron_config.save_sharded_checkpoint:
            first = neuron_config.start_rank_id if start_rank_id is None else start_rank_id
            count = neuron_config.local_ranks_size if local_ranks_size is None else local_ranks_size
            check_rank_files(compiled_model_path, self.config, range(first, first + count))
        super().load_weights(compiled_model_path, start_rank_id, local_ranks_size)

    def _checkpoint_dir(self) -> str:
        """The folder with the weights. model_path may be the compiled folder, which has none."""
        path = getattr(self.config, "_name_or_path", None)
        return path if path and os.path.isdir(path) else self.model_path

    @staticmethod
    def update_state_dict_for_tied_weights(state_dict: dict[str, Tensor]) -> None:
        """Nothing to do: the layout gives a tied head the embedding's weight."""

    def get_compiler_args(self) -> str:
        """neuronx-cc options, see compiler_options."""
        return compiler_options(self.config)


def _state_dict(source: TensorSource, config: DeepseekV3InferenceConfig, rank: int | None = None) -> dict[str, Tensor]:
    """What a config's model holds. On the embedded runtime draft and model are two; NxDI's are one."""
    neuron_config, model = config.neuron_config, config.model
    part = MODEL
    if neuron_config.is_eagle_draft:
        part = DRAFT
    elif neuron_config.enable_fused_speculation and backend.NAME == "nxdi":
        part = FUSED
    if part != MODEL:
        check_copies(source, model)
    form = weight_form(neuron_config.weights)
    return state_dict_of(source, model, neuron_config.torch_dtype, neuron_config.tp_degree, rank, form, part)


def _follow_bucket(model: NeuronDeepseekV3Model, args: tuple[Tensor, ...]) -> None:
    """Tracing sets n_positions to each bucket's length, and with a cache in blocks that of the prefix; NxDI's CPU mode
    leaves them at seq_len and 0."""
    input_ids, mask = args[:2]
    if not model.neuron_config.is_block_kv_layout:
        model.n_positions = mask.shape[1]
        return
    model.n_active_tokens = input_ids.shape[1]
    model.prefix_size = mask.shape[1] if mask.ndim == 2 else 0  # without a prefix, NxDI passes one zero
    model.n_positions = model.prefix_size if model.n_active_tokens == 1 else model.n_active_tokens
