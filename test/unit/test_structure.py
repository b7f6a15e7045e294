"""What the rooms of the package may know, read from its source."""

import ast
import pathlib
from collections import Counter

import nxdi_deepseek
import pytest

SRC = pathlib.Path(nxdi_deepseek.__file__).parent
FILES = sorted(SRC.rglob("*.py"))
HEAVY = ("transformers", "torch.distributed", "neuronx_distributed", "neuronx_distributed_inference", "numba")
# Has numba at its head: who needs it imports it where it is called.
LATE = SRC / "checkpoint" / "byte_squares.py"


def imports(path):
    """What importing a file imports: (names of others' modules, files of the package)."""
    foreign, own = [], []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            foreign += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            foreign.append(node.module)
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for place in (base, *(base / name.name for name in node.names)):
                own += [file for file in (place.with_suffix(".py"), place / "__init__.py") if file in FILES]
    return foreign, own


def test_no_two_modules_have_one_name():
    counts = Counter(path.stem for path in FILES if path.stem != "__init__")
    counts.update(path.parent.name for path in FILES if path.stem == "__init__" and path.parent != SRC)
    assert [name for name, count in counts.items() if count > 1] == []


def test_no_two_classes_have_one_name():
    counts = Counter(
        node.name for path in FILES for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(
    "room",
    [
        "checkpoint",
        "planning",
        "model_config.py",
        "family.py",
        "dtypes.py",
        "mla.py",
        "routing.py",
        "rope_util.py",
        "weight_forms.py",
    ],
)
def test_rooms_that_must_outlive_nxdi_know_no_backend(room):
    """Neither NxDI's config nor transformers, also not by way of another module."""
    todo = [path for path in FILES if (path == SRC / room or SRC / room in path.parents) and path != LATE]
    seen = set(todo)
    while todo:
        path = todo.pop()
        foreign, own = imports(path)
        assert not [name for name in foreign if name.startswith(HEAVY)], path
        assert not {SRC / "backend.py", SRC / "config.py", SRC / "embedded" / "__init__.py"} & set(own), path
        todo += set(own) - seen
        seen |= set(own)


def test_only_the_family_table_asks_for_a_model_type():
    """A comparison with a model_type elsewhere would be a member that is no row."""
    for path in set(FILES) - {SRC / "family.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                assert "model_type" not in ast.unparse(node.left), f"{path.relative_to(SRC)}: {ast.unparse(node)}"


def test_the_modules_of_the_model_stay_readable():
    assert len((SRC / "modeling_deepseek.py").read_text().splitlines()) < 400
