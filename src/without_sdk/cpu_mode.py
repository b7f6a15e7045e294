"""NxDI's CPU mode in this process."""

import os

from . import stand_ins
from .nxdi_source import make_importable

VARIABLE = "NXD_CPU_MODE"


def set_up() -> None:
    """Lets NxD and NxDI be imported, for the CPU, with or without the SDK. Raises NxDINotFound."""
    from . import logit_validation  # imports torch, which environment.py does without

    os.environ[VARIABLE] = "1"
    stand_ins.define(
        "torch_neuronx.testing.validation",
        logit_validation=logit_validation.logit_validation,
        neuron_allclose=logit_validation.neuron_allclose,
    )
    make_importable()
