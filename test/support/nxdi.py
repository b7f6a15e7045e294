"""NxD and NxDI in CPU mode, with or without the Neuron SDK, and groups of processes, for tests."""

import contextlib
import importlib
import importlib.metadata
import os

import torch
from nxdi_deepseek.device_graphs import process, rank_zero
from nxdi_deepseek.without_sdk import cpu_mode
from nxdi_deepseek.without_sdk.nxdi_source import NxDINotFound

from support import ranks

_rank_zero = contextlib.ExitStack()


def load_nxdi():
    """Import NxDI in CPU mode. Returns the module; raises NxDINotFound."""
    cpu_mode.set_up()
    importlib.import_module("neuronx_distributed")
    return importlib.import_module("neuronx_distributed_inference")


def nxdi_version():
    """The installed distribution's version; for a source folder, the one that the source declares."""
    try:
        return importlib.metadata.version("neuronx-distributed-inference")
    except importlib.metadata.PackageNotFoundError:
        return load_nxdi().__version__


def require_nxdi():
    """At the head of a test module: load NxDI, or skip the module; with REQUIRE_NXDI=1 that is a failure."""
    import pytest

    try:
        return load_nxdi()
    except NxDINotFound as error:
        if os.environ.get("REQUIRE_NXDI") == "1":
            pytest.fail(f"REQUIRE_NXDI=1, and {error}", pytrace=False)
        pytest.skip(str(error), allow_module_level=True)


def init_cpu_parallel(tp_degree=1, init_method="env://"):
    """Set up torch.distributed (gloo) and NxD's process groups, as NxD's parallel layers and `to_cpu()` expect them.

    Alone in its process, TP is 1. Under torchrun, or with the same variables set, every rank calls this. A process that
    is prepared for device graphs gets the state of rank 0, until `leave_parallel`.
    """
    if process.is_prepared():
        _rank_zero.enter_context(rank_zero.rank_zero(tp_degree, lnc_size=2))
        return
    load_nxdi()
    from neuronx_distributed.parallel_layers import parallel_state

    # to_cpu() would set up torch.distributed a second time if it found WORLD_SIZE, and fail.
    world_size = int(os.environ.pop("WORLD_SIZE", 1))
    if not torch.distributed.is_initialized():
        _init_process_group(world_size, init_method)
    if torch.distributed.get_world_size() != tp_degree:
        raise ValueError(f"TP degree {tp_degree} in a process group of {torch.distributed.get_world_size()}")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp_degree, skip_collective_init=True)


def leave_parallel():
    """Undoes `init_cpu_parallel` in a process that is prepared for device graphs."""
    _rank_zero.close()


def _init_process_group(world_size, init_method):
    if world_size == 1:
        # Without a port, test processes cannot disturb each other.
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    else:
        rank = int(os.environ["RANK"])
        torch.distributed.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)


def follow_buckets(model):
    """Make a model that went through `to_cpu()` use its buckets, as the traced model does.

    Tracing sets n_positions for every bucket; to_cpu() leaves it at seq_len, so that shorter buckets, and a
    max_context_length below seq_len, fail on a mask of the wrong size.
    """

    def set_n_positions(module, args):
        module.n_positions = args[1].shape[1]  # the attention mask, padded to the bucket

    for module in {wrapper.model for wrapper in model.models}:
        module.register_forward_pre_hook(set_n_positions)


def run_parallel(function, tp_degree, *args, initialize=init_cpu_parallel):
    """See ranks.run; by default the ranks set up NxDI. On device graphs one process has all ranks."""
    if process.is_prepared():
        return [function(*args)]
    return ranks.run(function, tp_degree, *args, initialize=initialize)
