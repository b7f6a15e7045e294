"""Compiled graphs and buffers of jaxlib's CPU client: one replica per rank, each on a device of its own."""

import hashlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from jaxlib import _jax, xla_client
from torch import Tensor

from ..dtypes import dtype_name
from ..errors import DeviceGraphError

# What one replica holds of a tensor; jaxlib's array of one device.
Buffer = Any

_usable: dict[int, "Replicas"] = {}


class Replicas:
    """`count` replicas, and the graphs compiled for them. Models share them: use `Replicas.of`."""

    def __init__(self, count: int):
        self.count = count
        self._client = xla_client.make_cpu_client(num_devices=count)
        self._devices = self._client.devices()[:count]
        self._compiled: dict[bytes, Any] = {}
        self._failed = False

    @classmethod
    def of(cls, count: int) -> "Replicas":
        """Those that are there already, unless a graph failed on them."""
        if count not in _usable:
            _usable[count] = cls(count)
        return _usable[count]

    def compile(self, hlo: bytes) -> Any:
        """hlo: a serialised HloModuleProto of one rank. Compiled once."""
        key = hashlib.sha256(hlo).digest()
        if key not in self._compiled:
            module = _jax.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(hlo))
            self._compiled[key] = self._client.compile_and_load(module, self._devices, self._options())
        return self._compiled[key]

    def _options(self) -> Any:
        options = xla_client.CompileOptions()
        options.num_replicas, options.num_partitions = self.count, 1
        assignment = np.arange(self.count).reshape(self.count, 1)
        options.device_assignment = xla_client.DeviceAssignment.create(assignment)
        # A graph runs a few times only: its code need not be fast, but has to be there soon.
        options.executable_build_options.debug_options.xla_backend_optimization_level = 0
        options.env_option_overrides = [("xla_cpu_use_fusion_emitters", False)]
        return options

    def execute(self, executable: Any, arguments: list[list[Buffer]]) -> list[list[Buffer]]:
        """Buffers by output and rank, from buffers by parameter number and rank.

        Raises DeviceGraphError where an earlier call failed: the next one would hang.
        """
        if self._failed:
            raise DeviceGraphError("a graph failed on these replicas, and the next would hang; load the model again")
        try:
            outputs = executable.execute_sharded(arguments).disassemble_into_single_device_arrays()
            for buffers in outputs:
                for buffer in buffers:
                    buffer.block_until_ready()
        except BaseException:
            self._failed = True
            _usable.pop(self.count, None)
            raise
        return outputs

    def put(self, per_rank: Sequence[Tensor]) -> list[Buffer]:
        """A tensor per rank."""
        return [self._put(_to_numpy(value), device) for value, device in zip(per_rank, self._devices, strict=True)]

    def replicate(self, tensor: Tensor) -> list[Buffer]:
        """The same tensor on all ranks."""
        array = _to_numpy(tensor)
        return [self._put(array, device) for device in self._devices]

    def _put(self, array: np.ndarray, device: Any) -> Buffer:
        return self._client.buffer_from_pyval(array, device)


def to_torch(buffer: Buffer) -> Tensor:
    """Waits for the value and copies it."""
    array = to_numpy(buffer)
    if array.dtype.kind == "V" or array.dtype.name in vars(ml_dtypes):
        return torch.from_numpy(array.view(f"i{array.itemsize}").copy()).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array.copy())


def to_numpy(buffer: Buffer) -> np.ndarray:
    """Waits for the value, which the array shares."""
    return buffer._single_device_array_to_np_array_did_copy()[0]


def _to_numpy(tensor: Tensor) -> np.ndarray:
    name = dtype_name(tensor.dtype)
    tensor = tensor.detach().contiguous()
    if hasattr(ml_dtypes, name):  # numpy has no such type
        return tensor.view(getattr(torch, f"int{8 * tensor.itemsize}")).numpy().view(getattr(ml_dtypes, name))
    return tensor.numpy()
