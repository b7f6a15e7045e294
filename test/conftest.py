import sys

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


@pytest.fixture(autouse=True, scope="module")
def end_groups_of_ranks():
    """Of a module: its tests share them."""
    yield
    if "support.ranks" in sys.modules:
        sys.modules["support.ranks"].end_groups()
