"""What goes wrong while the model is registered must not stop those who serve another model."""

import contextlib
import importlib.metadata
import warnings
from collections.abc import Iterator

from ..errors import DeepseekError


@contextlib.contextmanager
def warning_instead_of_error(package: str) -> Iterator[None]:
    """Turns whatever is raised inside, SystemExit too, into one warning that names `package` and its version."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        kind = "" if isinstance(error, DeepseekError | ImportError) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())
        # Python shows a text from one place once, so that several tables without the model give one warning.
        warnings.warn(f"DeepSeek-V3 is not registered with {version_of(package)}: {kind}{reason}", stacklevel=1)


def version_of(package: str) -> str:
    """`package version`, for messages."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except Exception:  # no metadata, or damaged ones
        return f"{package} (from source)"
