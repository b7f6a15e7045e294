"""The graphs that NxDI hands to the Neuron compiler, executed on this machine at the real tensor-parallel degree.

NxDI's CPU mode runs other branches of its own code than those that are compiled for the device. Here the traced graphs
themselves run: NxDI's model instances are lowered for rank 0 with torch_xla, as ModelBuilder lowers them, and compiled
by jaxlib's CPU client with one replica per rank, so that every collective happens.

process             prepares a process: device branches, stand-ins for the SDK, kernels in one of their forms
kernel_table        the Neuron kernels: name on Neuron, form that runs here, form that is counted
executable_kernels  the forms that run here
rank_zero           NxD's state of rank 0, and the lowering of a module under it
replicas            compiled graphs and buffers, one replica per rank
device_model        what stands in NxDModel's place: graphs by input shapes, weights and caches of all ranks
loading             loads a causal LM on it

The kernels' forms are a reading of the kernels and were compared with nothing on Neuron. Needs torch_xla and jaxlib of
one version of torch; `make graph-env` sets them up.
"""
