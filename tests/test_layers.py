"""The plan of the house as a test: which room may import which, how long things may get, what an import may cost."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vatt_engine"

LOW = {
    "batch",
    "collectives",
    "faults",
    "schema",
    "dispatch",
    "refusals",
    "splitmix",
    "cpus",
    "output",
    "lock",
}  # any room may import these; they import only each other
ROOMS = {
    "__init__": {"ops", "models", "losses", "interop", "engine", "data", "tasks"},  # the public names
    "__main__": {"cli"},
    "cli": {"tasks"},
    "tasks": {"engine", "data", "models", "losses", "analysis", "interop", "ops"},
    "engine": set(),
    "data": set(),
    "models": {"ops"},
    "losses": {"ops"},
    "analysis": {"models", "ops"},
    "interop": {"models"},
    "ops": set(),
    "kernels": set(),
    "testing": set(),
    **{name: set() for name in LOW},
}
# Beside the standard library; all other rooms may import any library, below the top level if optional.
OUTSIDE = {"kernels": {"torch", "triton"}}
VERBS = {"cli", "tasks"}  # may follow their arrows inside functions: a verb loads only what it needs
NATIVE = {"ops", "data", "dispatch", "interop"}  # who may import vatt_engine._C, inside functions
OPTIONAL = {
    "triton",
    "nvidia",
    "deepspeed",
    "av",
    "transformers",
    "tokenizers",
    "yaml",
    "tyro",
    "matplotlib",
    "safetensors",
}

FILE_LINES, FUNCTION_LINES, TRITON_LINES, CUDA_LINES, COLUMNS = 400, 60, 150, 250, 120


def python_files():
    return sorted(p for p in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")] if not is_linked(p))


def native_files():
    return sorted(p for p in (ROOT / "csrc").iterdir() if p.is_file())


def is_linked(path):
    """Reached through vatt_engine/kernels, and so counted already."""
    return (PACKAGE / "kernels") in path.parents


def room_of(path):
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] == "kernels" else Path(parts[1]).stem


def imports(source, module):
    """(imported module, inside a function) for every import of a file that is importable as `module`."""
    found = []

    def visit(node, inside):
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [base])])
            names = [alias.name for alias in node.names]
            found.extend((f"{base}.{name}" if base == "vatt_engine" else base, inside) for name in names)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def arrow_faults(source, room, module):
    faults = []
    for name, inside in imports(source, module):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top in ("tests", "benchmarks", "kernels"):
            faults.append(f"{room} imports {name}: nobody imports it by that name")
        elif top == "vatt_engine" and target == "_C":
            if room not in NATIVE or not inside:
                faults.append(f"{room} imports {name}: only {sorted(NATIVE)} may, inside a function")
        elif top == "vatt_engine" and target != room and target in ROOMS:
            if target not in ROOMS[room] | (LOW if room != "kernels" else set()):
                faults.append(f"{room} imports {name}: it may import {sorted(ROOMS[room]) or 'no room'}")
            elif inside and room not in VERBS:
                faults.append(f"{room} imports {name} inside a function: that hides an arrow")
        elif room == "ops" and name.startswith("vatt_engine.ops.") and not same_op(name, module):
            faults.append(f"{module} imports {name}: ops never import ops")
        elif top != "vatt_engine" and room in OUTSIDE and top not in OUTSIDE[room] | sys.stdlib_module_names:
            faults.append(f"{room} imports {name}: it may import {sorted(OUTSIDE[room])}")
    return faults


def same_op(name, module):
    """A door may import the other files of its stem; the list of ops imports all doors."""
    return module == "vatt_engine.ops.__init__" or name.startswith(f"{module}_")


def module_of(path):
    relative = path.relative_to(ROOT).with_suffix("")
    return ".".join(("vatt_engine", *relative.parts) if relative.parts[0] == "kernels" else relative.parts)


def faults_of(paths, check):
    """All that `check` finds wrong in any of the files, each fault behind the name of its file."""
    return [f"{path.relative_to(ROOT)}: {fault}" for path in paths for fault in check(path)]


def wrong_arrows(path):
    room = room_of(path)
    if room not in ROOMS:
        return [f"add the room {room} and its arrows to the table"]
    return arrow_faults(path.read_text(), room, module_of(path))


def test_arrows():
    assert faults_of(python_files(), wrong_arrows) == []


def test_a_wrong_arrow_is_found():
    for source, room, module in (
        ("from vatt_engine.models import VATT", "engine", "vatt_engine.engine.engine"),
        ("from vatt_engine import data", "models", "vatt_engine.models.vatt"),
        ("from ..tasks import pretrain", "data", "vatt_engine.data.loader"),
        ("import vatt_engine.ops.nce", "ops", "vatt_engine.ops.attention"),
        ("import vatt_engine.ops.tokenize", "ops", "vatt_engine.ops.tokenize_native"),
        ("def f():\n    from vatt_engine.ops import nce", "losses", "vatt_engine.losses"),
        ("from vatt_engine import _C", "ops", "vatt_engine.ops.tokenize"),
        ("def f():\n    from vatt_engine import _C", "models", "vatt_engine.models.vatt"),
        ("from vatt_engine.dispatch import Impl", "kernels", "vatt_engine.kernels.nce"),
        ("import numpy", "kernels", "vatt_engine.kernels.nce"),
        ("from tests import conftest", "tasks", "vatt_engine.tasks.pretrain"),
    ):
        assert len(arrow_faults(source, room, module)) == 1, source


def too_long(path):
    """What is beyond its budget in a file: the file, lines, functions, kernels."""
    source = path.read_text()
    lines = source.splitlines()
    faults = [f"{len(lines)} lines: split it by idea"] if len(lines) > FILE_LINES else []
    faults += [f"line {i} has {len(line)} columns" for i, line in enumerate(lines, 1) if len(line) > COLUMNS]
    if path.suffix == ".py":
        faults += long_functions(source)
    if path.suffix in (".cu", ".cuh"):
        faults += long_kernels(source)
    return faults


def test_files_stay_short():
    assert faults_of([*python_files(), *native_files()], too_long) == []


def long_functions(source):
    """Functions beyond their budget; lines count without the docstring, which the public ones need long."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                lines -= first.end_lineno - first.lineno + 1
            jitted = any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)
            if lines > (TRITON_LINES if jitted else FUNCTION_LINES):
                found.append(f"{node.name}: {lines} lines")
    return found


def long_kernels(source):
    """__global__ functions beyond their budget: clang-format puts their last brace in the first column."""
    kernels = re.findall(r"^[^\n]*__global__.*?^}", source, flags=re.MULTILINE | re.DOTALL)
    return [kernel.splitlines()[0] for kernel in kernels if kernel.count("\n") >= CUDA_LINES]


def test_long_functions_are_found():
    body = "    pass\n" * 60
    assert long_functions(f"def f():\n{body}") == ["f: 61 lines"]
    assert long_functions(f"@triton.jit\ndef f():\n{body}") == []
    assert long_functions(f"def f():\n    '''One.\n\n{body}    '''\n{body[9:]}") == []
    assert len(long_kernels("__global__ void f() {\n" + "  g();\n" * 249 + "}\n")) == 1
    assert long_kernels("__global__ void f() {\n" + "  g();\n" * 248 + "}\n") == []


def test_names_say_something():
    empty = {"utils", "helpers", "misc", "v2", "util", "helper"}
    bad = [p for p in python_files() if p.stem in empty or p.stem.endswith("_v2") or p.parent.name in empty]
    assert bad == []


def test_kernels_are_reached_through_the_link():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "a top-level package `kernels` shadows another project's"
    if (ROOT / ".git").exists():  # a source archive holds the files themselves
        assert (PACKAGE / "kernels").is_symlink()
    assert (PACKAGE / "kernels" / "README.md").read_text() == (ROOT / "kernels" / "README.md").read_text()


PICKLES = {"torch.save", "torch.load", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def pickles(source):
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None)
            names = [f"{module}.{name}" for name in names] + [module] if module else names
            found += [name for name in names if name in PICKLES]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in PICKLES:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += ["allow_pickle"] if ast.unparse(node.value) != "False" else []
    return found


TRUSTED = {"vatt_engine/interop/deepspeed.py": ["torch.load", "torch.save"]}  # `vatt convert` alone, weights_only


def unexpected_pickles(path):
    """What pickles in a file that may not, and what the table still allows a file that no longer does."""
    found, allowed = set(pickles(path.read_text())), set(TRUSTED.get(str(path.relative_to(ROOT)), []))
    return sorted(found ^ allowed)


def test_nothing_is_pickled():
    assert faults_of(python_files(), unexpected_pickles) == []


def test_pickling_is_found():
    for bad in ("import pickle", "from torch import load", "torch.save(x, p)", "np.load(p, allow_pickle=True)"):
        assert len(pickles(bad)) == 1, bad
    assert pickles("np.load(p, allow_pickle=False)") == []


def test_import_needs_torch_alone_and_is_quick():
    code = f"""
import json, sys, time
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {sorted(OPTIONAL)!r} or name == 'vatt_engine._C':
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Blocker())
import torch
before, start = set(sys.modules), time.process_time()
import vatt_engine
loaded = [getattr(vatt_engine, name) for name in vatt_engine.__all__]  # they come when they are used
seconds = time.process_time() - start
assert "torch._dynamo" not in sys.modules, "it takes seconds and 80 MB"
print(json.dumps([seconds, sorted(name for name in set(sys.modules) - before if '.' not in name)]))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\n") == 1, "an import prints nothing"
    assert run.stderr == ""
    seconds, modules = json.loads(run.stdout)
    assert seconds < 2, f"import vatt_engine took {seconds:.1f} s beyond torch, with {modules}"
