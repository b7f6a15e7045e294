import pytest
import torch

pytest.register_assert_rewrite(
    "support.parity_suite",
    "support.family_suite",
    "support.compare_suite",
    "support.module_suite",
    "support.saved_config_suite",
)
pytest_plugins = ["support.results_csv"]

# The models are too small for a second thread to pay.
torch.set_num_threads(1)
