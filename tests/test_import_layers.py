"""Who may import whom, held by reading every module's imports."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "optax_cl"

RUNTIME = {"jax", "optax", "chex", "numpy"}
METHOD_ROOMS = {
    "projections",
    "penalties",
    "replay",
    "distillation",
    "isolation",
    "editing",
    "lora",
}
ALL_ROOMS = {"_core", "routing", "metrics", "boundaries"} | METHOD_ROOMS
# Room -> the other rooms it may import. "" is the package's own `__init__`.
MAY_IMPORT = {
    "_core": set(),
    "routing": {"_core"},
    **{room: {"_core", "routing"} for room in METHOD_ROOMS},
    "lora": {"_core"},
    "metrics": {"_core"},
    "boundaries": {"_core"},
    "recipes": ALL_ROOMS,
    "flax": ALL_ROOMS | {"recipes"},
    "testing": ALL_ROOMS | {"", "recipes", "flax"},
    "": ALL_ROOMS | {"recipes"},
}
# Room -> its modules that hold no method but what its methods are made of.
SHARED = {
    "lora": {
        "_absorb",
        "_adapters",
        "_capacity",
        "_checks",
        "_convert",
        "_drift",
        "_eblora_state",
        "_factors",
        "_gradients",
        "_inputs",
        "_memory",
        "_peft_files",
        "_rows",
        "_spectral",
        "_targets",
    }
}
# Room -> the packages of others it may import, where not RUNTIME.
MAY_USE = {
    "metrics": {"jax", "numpy"},
    "flax": RUNTIME | {"flax"},
    "lora": RUNTIME | {"safetensors"},
}


def violations(package: pathlib.Path) -> list[str]:
    """Every import in a package that the table doesn't allow, in words."""
    found = []
    for path in sorted(package.rglob("*.py")):
        module = _module_of(path, package)
        for line, name in _imports(path, package):
            reason = _forbidden(module, name, package.name)
            if reason:
                where = path.relative_to(package.parent)
                found.append(f"{where}:{line} imports {name}: {reason}")
    return found


def _module_of(path: pathlib.Path, package: pathlib.Path) -> tuple[str, ...]:
    """The path of a file inside the package, without `__init__` and suffix."""
    parts = path.relative_to(package).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _imports(path: pathlib.Path, package: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every module that a file imports, anywhere in it."""
    here = path.relative_to(package.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            source = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                # `from a import b` imports the module `a.b` if there is one.
                inner = package.parent.joinpath(*source, alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                yield (
                    node.lineno,
                    ".".join([*source, alias.name][: None if is_module else -1]),
                )


def _forbidden(module: tuple[str, ...], name: str, package: str) -> str | None:
    """Why ``module`` may not import ``name``, or None if it may."""
    room = module[0] if module else ""
    if room not in MAY_IMPORT:
        return f"the room `{room}` has no row in MAY_IMPORT"
    top, *target = name.split(".")
    if top != package:
        if top in sys.stdlib_module_names | MAY_USE.get(room, RUNTIME):
            return None
        return f"`{room or package}` may not use the package `{top}`"
    target_room = target[0] if target else ""
    if target_room != room:
        if target_room in MAY_IMPORT[room]:
            return None
        return f"`{room or package}` may not import `{target_room or package}`"
    if (
        room in METHOD_ROOMS
        and len(module) > 1
        and len(target) > 1
        and target[1] != module[1]
        and target[1].startswith("_")
        and target[1] not in SHARED.get(room, ())
    ):
        return (
            "methods don't import each other; what two share moves to `_core`, or to a "
            "module in SHARED"
        )
    return None


def test_every_import_in_the_package_is_allowed():
    assert not (found := violations(PACKAGE)), "\n".join(found)


def test_the_package_holds_modules_to_check():
    assert {"_core", "routing"} <= {path.name for path in PACKAGE.iterdir()}


@pytest.mark.parametrize(
    ("file", "line", "reason"),
    [
        ("_core/a.py", "from optax_cl import routing", "import `routing`"),
        ("_core/a.py", "import optax_cl.routing._adam", "import `routing`"),
        ("_core/a.py", "from ..routing import chain", "import `routing`"),
        ("_core/a.py", "def f():\n  import optax_cl.routing", "import `routing`"),
        ("routing/_a.py", "from optax_cl import projections", "import `projections`"),
        ("routing/_a.py", "from optax_cl import chain", "import `optax_cl`"),
        ("penalties/_a.py", "import optax_cl.replay", "import `replay`"),
        ("penalties/_a.py", "import optax_cl.recipes", "import `recipes`"),
        ("projections/_a.py", "from . import _gem", "methods don't"),
        ("projections/_a.py", "from ._gem import gem", "methods don't"),
        ("projections/_a.py", "from optax_cl.projections._gem import gem", "methods"),
        ("projections/_a/deep.py", "from .. import _gem", "methods don't"),
        ("lora/_a.py", "from optax_cl.routing import chain", "import `routing`"),
        ("metrics/_a.py", "import optax_cl.routing", "import `routing`"),
        ("metrics/_a.py", "import optax", "use the package `optax`"),
        ("recipes.py", "from flax import nnx", "use the package `flax`"),
        ("recipes.py", "import optax_cl.flax", "import `flax`"),
        ("__init__.py", "from optax_cl import flax", "import `flax`"),
        ("testing.py", "import experiments", "use the package `experiments`"),
        ("routing/_a.py", "import scipy.optimize", "use the package `scipy`"),
        ("newroom/_a.py", "import jax", "no row"),
    ],
)
def test_the_check_catches_a_planted_violation(tmp_path, file, line, reason):
    package = _plant(tmp_path, file, line)
    (found,) = violations(package)
    assert found.startswith(f"optax_cl/{file}:")
    assert reason in found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("_core/a.py", "import math\nimport jax.numpy as jnp\nfrom . import trees"),
        ("routing/_a.py", "from optax_cl.routing import _adam"),
        ("projections/_a.py", "from optax_cl._core import trees"),
        ("projections/_a.py", "from optax_cl.routing import chain"),
        ("projections/__init__.py", "from ._gem import gem as gem"),
        ("projections/_a/deep.py", "from . import other\nfrom ..._core import trees"),
        ("recipes.py", "from optax_cl import projections, routing"),
        ("flax.py", "from flax import nnx\nfrom optax_cl import routing"),
        ("testing.py", "import optax_cl"),
        ("__init__.py", "from optax_cl.routing import chain as chain"),
    ],
)
def test_the_check_lets_an_allowed_import_pass(tmp_path, file, line):
    assert violations(_plant(tmp_path, file, line)) == []


def _plant(folder: pathlib.Path, file: str, line: str) -> pathlib.Path:
    """Makes a small package that obeys the table, then adds one line to it."""
    package = folder / "optax_cl"
    rooms = ("_core/trees", "routing/_adam", "projections/_gem", "replay/_buffer")
    for empty in (*rooms, "recipes", "flax", "projections/_a/other", file[:-3]):
        path = package / f"{empty}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (package / file).write_text(line + "\n")
    return package


def test_the_package_imports_without_what_only_extras_bring():
    # Reading the imports doesn't see what a dependency imports for us; this does.
    script = """
import sys
for name in ("flax", "orbax", "equinox", "scipy", "sklearn", "matplotlib", "pytest"):
    sys.modules[name] = None
import importlib, pkgutil, optax_cl
for module in pkgutil.walk_packages(optax_cl.__path__, "optax_cl."):
    if module.name != "optax_cl.flax":
        importlib.import_module(module.name)
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
