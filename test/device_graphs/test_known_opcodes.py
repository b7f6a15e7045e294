"""Operations that no graph known to run on Neuron has are in none of ours."""

import pytest
from support.device_graphs import load, written
from support.models import V3

UNKNOWN = {("scatter", "PRED"), ("concatenate", "PRED")}


@pytest.mark.parametrize("batch", [1, 3])
def test_booleans_are_neither_scattered_nor_joined(tmp_path, batch):
    _, device = load(written(tmp_path, V3), batch_size=batch, tp_degree=2)
    for graph in device.graphs:
        instructions = graph.lowering.lowered.graph.instructions
        assert not UNKNOWN & {(item.opcode, item.shapes[0].dtype) for item in instructions if item.shapes}
