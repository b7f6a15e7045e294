"""What one rank of a model costs as a static graph: lowered to XLA's HLO without weights or device, and counted.

`lowering` runs in a process of its own per graph, needs torch_xla and the source of NxD and NxDI, and hands over the HLO;
`hlo`, `count`, `time_model` and `table` need nothing but Python.
"""
