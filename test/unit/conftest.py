"""The unit tests run on the embedded runtime, also where NxDI is installed."""

import os

os.environ["NXDI_DEEPSEEK_BACKEND"] = "embedded"
