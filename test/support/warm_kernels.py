"""For a fork server to import: its processes then have the compiled loops from the start."""

import numpy as np
from nxdi_deepseek.checkpoint import numba_kernels as kernels

_codes = np.zeros((1, 1), np.uint8)
for _dtype in (np.uint16, np.uint32):
    _bits = np.zeros((1, 1), _dtype)
    kernels.largest_magnitude(_bits[0])
    kernels.copy_strips(_bits, _bits)
    kernels.decode_blocks(_codes, np.zeros((1, 1, 256), _dtype), 0, 0, 1, 1, _bits)
