"""The rules of the house: which folder may import which, where heavy packages live, what is public."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import workbench

PACKAGE = Path(workbench.__file__).parent
LEAVES = {"errors", "records"}
RECORDS = LEAVES | {"home", "plan", "frames", "store", "view", "run", "live"}  # the side of saved runs and figures: no processes
MAY_IMPORT = {  # part -> parts that it may import; one that is not here (cli, ...) may import all, and none of these may import it
    "errors": {"records"},
    "records": set[str](),
    "plan": LEAVES,
    "cores": set[str](),
    "postponing": set[str](),
    "environment": {"cores"},
    "home": set[str](),
    "ranks": LEAVES | {"plan", "environment", "home", "cores", "postponing"},
    "models": LEAVES | {"plan"},
    "rollout": LEAVES | {"plan", "ranks", "models", "run", "live", "store", "environment", "cores", "postponing"},  # it tells a Run
    "learn": LEAVES | {"plan", "ranks", "models", "rollout"},
    "frames": LEAVES | {"plan"},
    "store": RECORDS,
    "run": RECORDS,
    "live": RECORDS,
    "view": LEAVES | {"plan", "frames"},
}
HOMES = {  # heavy package -> where its import may stand
    "vllm": ("rollout/vllm_engine.py", "rollout/vllm_worker.py"),
    "matplotlib": ("view/",),
    "ipywidgets": ("view/",),
    "anywidget": ("view/",),
    "torch.distributed": ("ranks/", "rollout/"),
}
INSIDE_FUNCTIONS = {("plan/layout.py", "torch.distributed")}  # Layout gives a DeviceMesh to who asks; nobody else loads it
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imports(tree: ast.AST, *, is_inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports when it runs, and whether within a function; `if TYPE_CHECKING` is no run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, is_inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import in full"
            yield from ((f"{node.module}.{alias.name}", is_inside) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), is_inside
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield from imports(node, is_inside=is_inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imports_of(file: str) -> list[tuple[str, bool]]:
    return list(imports(ast.parse((PACKAGE / file).read_text())))


def wrong_order(file: str, found: list[tuple[str, bool]]) -> list[str]:
    """Imports of the package's own parts that stand above the file in the flow of data."""
    own = file.split("/")[0].removesuffix(".py")
    parts = {name.split(".")[1] for name, _ in found if name.startswith("workbench.")}
    parts = {part for part in parts if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()}
    return sorted(parts - MAY_IMPORT[own] - {own}) if own in MAY_IMPORT else []


def away_from_home(file: str, found: list[tuple[str, bool]]) -> list[str]:
    """Heavy packages that the file imports though they live elsewhere."""
    return sorted(
        heavy
        for heavy, homes in HOMES.items()
        for name, is_inside in found
        if f"{name}.".startswith(f"{heavy}.") and not file.startswith(homes) and not (is_inside and (file, heavy) in INSIDE_FUNCTIONS)
    )


@pytest.mark.parametrize("file", FILES)
def test_data_flows_one_way(file):
    wrong = wrong_order(file, imports_of(file))
    assert not wrong, f"workbench/{file} imports {wrong}; the order is plan -> ranks -> rollout -> (records) -> view"


@pytest.mark.parametrize("file", FILES)
def test_heavy_packages_are_imported_at_home(file):
    found = away_from_home(file, imports_of(file))
    assert not found, f"workbench/{file} imports {found}; their homes are {[HOMES[name] for name in found]}"


@pytest.mark.parametrize(
    "file, code, wrong, heavy",
    [
        ("view/a.py", "from workbench.ranks import group", ["ranks"], []),
        ("plan/a.py", "def f():\n    import workbench.rollout.engine", ["rollout"], []),
        ("plan/a.py", "import torch.distributed as dist", [], ["torch.distributed"]),
        ("run.py", "from torch import distributed", [], ["torch.distributed"]),
        ("rollout/engine.py", "from vllm import LLM", [], ["vllm"]),
        ("ranks/a.py", "from importlib import import_module\nimport_module('vllm.config')", [], ["vllm"]),
        ("ranks/a.py", "if TYPE_CHECKING:\n    import matplotlib\nfrom workbench import errors, plan", [], []),
        ("rollout/vllm_engine.py", "import vllm, torch.distributed\nfrom workbench.ranks.group import Group", [], []),
    ],
)
def test_the_rules_see_what_breaks_them(file, code, wrong, heavy):
    found = list(imports(ast.parse(code)))
    assert (wrong_order(file, found), away_from_home(file, found)) == (wrong, heavy)


def fresh(code: str) -> str:
    """What a new Python prints; warnings are errors in it."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    heavy = ["torch", "vllm", "transformers", "ipywidgets", "anywidget", "matplotlib", "pandas", "pyarrow", "accelerate", "IPython"]
    assert fresh(f"import sys, workbench; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_importing_the_package_is_quick():
    code = "import time; t = time.perf_counter(); import workbench; print(time.perf_counter() - t)"
    seconds = []
    for _ in range(5):  # the best of five, since another program may have the cores
        seconds.append(float(fresh(code)))
        if seconds[-1] < 0.3:
            return
        time.sleep(0.5)
    pytest.fail(f"import workbench took {min(seconds):.2f} s; 0.3 s are allowed")


def test_all_is_what_is_public():
    assert len(set(workbench.__all__)) == len(workbench.__all__)
    assert sorted(workbench.__all__) == dir(workbench)
    seen = {name for name in vars(workbench) if not name.startswith("_")}
    modules = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}  # an imported part becomes an attribute by itself
    assert seen <= {
        *workbench.__all__,
        *modules,
        "load_ipython_extension",
        "unload_ipython_extension",
        "annotations",
        "import_module",
        "sys",
        "Any",
        "ModuleType",
        "TYPE_CHECKING",
    }


@pytest.mark.parametrize("name", workbench.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(workbench, name)
    assert value is getattr(workbench, name)
    assert isinstance(value, str) or value.__doc__, f"wb.{name} has no docstring"


@pytest.mark.parametrize("first", ["workbench.start_engine", "workbench.rollout", "import_module('workbench.rollout.batch')"])
def test_rollout_is_the_function_whatever_is_imported_first(first):
    assert fresh(f"import workbench; from importlib import import_module; {first}; print(type(workbench.rollout).__name__)") == "function"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'workbench' has no attribute 'launhc'"):
        workbench.launhc  # noqa: B018


@pytest.mark.parametrize("file", FILES)
def test_functions_stay_short(file):
    tree = ast.parse((PACKAGE / file).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [
        f"{node.name}: {(node.end_lineno or 0) - node.lineno + 1} lines" for node in functions if (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert not long, f"workbench/{file}: {long}; 60 lines at most"


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


def test_the_map_of_the_ranks_folder_names_every_file():
    folder = PACKAGE / "ranks"
    named = set(re.findall(r"\w+", ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""))
    assert {file.stem for file in folder.glob("*.py")} - {"__init__"} <= named


@pytest.mark.parametrize("file", sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.css")))
def test_ink_and_ground_are_of_one_theme(file):
    """A page may have JupyterLab's variables or not, and VS Code has the light theme's also on a dark page."""
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", (PACKAGE / file).read_text())
    inks = {selector for selector, body in rules if re.search(r"(?<![-\w])color:\s*var\(", body)}
    grounds = {selector for selector, body in rules if re.search(r"(?<![-\w])background(-color)?:\s*var\(", body)}
    assert inks == grounds


@pytest.mark.parametrize("file", sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.css")))
def test_high_contrast_sets_every_variable_of_the_theme_at_once(file):
    """There VS Code may give its own ink, and leave JupyterLab's white ground."""
    text = (PACKAGE / file).read_text()
    used = set(re.findall(r"var\((--jp-(?:ui-font|layout)-color\d)", text))
    (body,) = re.findall(r"^\.vscode-high-contrast [^{]*\{([^}]*)\}", text, flags=re.MULTILINE)
    told = dict(re.findall(r"(--jp-[\w-]+): var\((--vscode-[\w-]+), \w+\)", body))
    assert used <= set(told)
    assert all(value == ("--vscode-editor-foreground" if "font" in name else "--vscode-editor-background") for name, value in told.items())


def test_nothing_that_is_shown_needs_jupyterlab():
    for path in [*PACKAGE.rglob("*.js"), *PACKAGE.rglob("*.css"), *PACKAGE.rglob("*.py")]:
        text = path.read_text()
        assert not re.findall(r"var\(\s*--(jp|vscode)-[\w-]+\s*\)", text), f"{path}: a variable without what stands in for it"
        if path.suffix == ".js":
            assert not re.findall(r"\bjupyter\w*\.|\brequire\(", text, flags=re.IGNORECASE), f"{path}: what JupyterLab alone has"
        if path.suffix == ".py":  # plain HTML has no ground of its own
            assert not re.findall(r"color:\s*var\(--(jp|vscode)", text), f"{path}: text in a theme's colour on the page's ground"
