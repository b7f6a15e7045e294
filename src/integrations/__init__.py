"""The doors through which NxDI's users reach the model: inference_demo and vLLM. Importing this costs nothing."""

from .registration import register

__all__ = ["register"]
