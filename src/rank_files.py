"""Whether rank files are those of a model: NxDI gives the device what they hold, whatever its graphs expect."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint.header import Header, read_header
from .checkpoint.parts import FUSED, MODEL, rank_layout
from .checkpoint.plan import file_name, part_folder
from .dtypes import dtype_name
from .errors import CheckpointError, report_problems
from .weight_forms import weight_form

if TYPE_CHECKING:
    from .config import DeepseekV3InferenceConfig


def check_rank_files(compiled_dir: str | Path, config: "DeepseekV3InferenceConfig", ranks: Iterable[int]) -> None:
    """Compares their headers with the tensors that the model has on a rank. Raises CheckpointError naming a file and a
    tensor: of another form of weights, dtype, tp_degree or model."""
    neuron_config = config.neuron_config
    form, tp_degree = weight_form(neuron_config.weights), neuron_config.tp_degree
    part = FUSED if neuron_config.enable_fused_speculation else MODEL
    layout = rank_layout(config.model, tp_degree, neuron_config.torch_dtype, form, part)
    wanted = {name: (dtype, shape) for name, dtype, shape in layout}
    for rank in ranks:
        path = part_folder(compiled_dir, part) / file_name(rank)
        header = read_header(path)
        report_problems("rank files cannot be used", header.problems)
        name = next((name for name in wanted if _found(header, name) != wanted[name]), None)
        if name:
            found, needed = _say(_found(header, name)), _say(wanted[name])
            raise CheckpointError(
                f"{path}: {name} is {found}, and {needed} in the model; shard again for weights {form.name}, "
                f"{dtype_name(neuron_config.torch_dtype)} and tp_degree {tp_degree}, or compile for what the files hold"
            )


_Kind = tuple[str, tuple[int, ...]]


def _found(header: Header, name: str) -> _Kind | None:
    entry = header.entries.get(name)
    return (entry.dtype, entry.shape) if entry else None


def _say(found: _Kind | None) -> str:
    return f"{found[0]} {list(found[1])}" if found else "missing"
