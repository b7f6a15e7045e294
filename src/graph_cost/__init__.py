"""What one rank of a model costs as a static graph: lowered to XLA's HLO without weights or device, and counted.

`lowering` runs in processes of its own and needs torch_xla and the source of NxD and NxDI, as do its parts `neuron_ops`
and `rank_model`. The other modules need nothing but Python.
"""
