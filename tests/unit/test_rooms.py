"""Import rules that import-linter's contracts can't describe."""

from __future__ import annotations

import ast
from pathlib import Path

import agr_ray

PACKAGE = Path(agr_ray.__file__).parent


def imports_ray(path: Path) -> bool:
    """Return whether a module imports ray itself, at its top or anywhere else."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module or "")
    return any(name.split(".")[0] == "ray" for name in names)


def test_runtime_holds_the_modules_that_import_ray_and_no_others() -> None:
    modules = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or imports_ray(path)]

    importing = sorted(str(path.relative_to(PACKAGE)) for path in modules if imports_ray(path))

    runtime = [path for path in modules if path.relative_to(PACKAGE).parts[0] == "runtime"]
    assert importing == sorted(str(path.relative_to(PACKAGE)) for path in runtime)
    assert len(importing) > 10
