"""NxD and NxDI in CPU mode on a machine without the Neuron SDK.

stand_ins       what they import of the SDK's closed packages, importable and empty
nxdi_source     where NxD and NxDI are: installed, or the source of their public repositories
cpu_mode        both together, in this process
environment     the same for a command and all of its processes, by way of site/sitecustomize.py
"""
