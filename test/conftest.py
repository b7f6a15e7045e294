import pytest

pytest.register_assert_rewrite("support.parity_suite")
