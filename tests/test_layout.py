"""The tree keeps its promises: the links are the parts, each part imports only what its row allows, no file grows."""

import ast
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = {"benchmarks", "broker", "client", "gateway", "kernels", "scripts", "workers"}

# What a part may import of ours; "headrace" stands for the shared modules in headrace/ itself.
ALLOWED = {
    "headrace": {"headrace"},
    "kernels": {"kernels", "headrace"},
    "workers": {"workers", "kernels", "headrace"},
    "broker": {"broker", "headrace"},
    "client": {"client", "headrace"},
    "gateway": {"gateway", "client", "headrace"},
    "scripts": PARTS | {"headrace"},
    "benchmarks": PARTS | {"headrace"},
}

# Where the package finds its public names beyond the shared modules.
PUBLIC = ("headrace.client", "headrace.workers.inference")

# What may be imported at the top of a file without the extra `serve`.
BASE_PARTS = {"headrace", "broker", "client", "scripts", "benchmarks"}
BASE_PACKAGES = {"click", "jinja2", "msgpack", "tokenizers", "zmq"}

FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "recv_pyobj", "send_pyobj"}


def sources(part):
    """Python files of a part, by their real paths."""
    folder = ROOT / part
    return sorted(folder.glob("*.py") if part == "headrace" else folder.rglob("*.py"))


def imported(path, *, at_import=False):
    """Absolute names of all modules that a file imports; with `at_import` only those that importing the file needs."""
    names = set()

    def visit(node):
        if at_import and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types(node)):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


def is_for_types(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def part_of(module):
    """The part that a module of ours belongs to, None for others."""
    names = module.split(".")
    if names[0] != "headrace":
        return None
    return names[1] if len(names) > 1 and names[1] in PARTS else "headrace"


def all_sources():
    return [path for part in sorted(PARTS | {"headrace"}) for path in sources(part)]


def test_links_are_exactly_the_parts():
    links = {path.name: path for path in (ROOT / "headrace").iterdir() if path.is_symlink() or path.is_dir()}
    links.pop("__pycache__", None)

    assert set(links) == PARTS
    for name, link in links.items():
        assert str(link.readlink()) == f"../{name}"
        assert link.resolve() == ROOT / name


def test_kernels_is_a_namespace():
    assert not (ROOT / "kernels/__init__.py").exists()
    assert all((ROOT / part / "__init__.py").exists() for part in PARTS - {"kernels"})
    folders = {path.parent for path in sources("kernels")} - {ROOT / "kernels"}
    assert all((folder / "__init__.py").exists() for folder in folders)


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_parts_import_only_what_they_may(part):
    wrong = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in sources(part)
        for module in imported(path)
        if part_of(module) not in ALLOWED[part] | {None}
    }
    if part == "headrace":  # its public names, for type checkers only; at run time they are found when first used
        wrong = {one for one in wrong if not one.startswith(tuple(f"headrace/__init__.py: {home}" for home in PUBLIC))}
        assert not any(
            part_of(module) != "headrace"
            for module in imported(ROOT / "headrace/__init__.py", at_import=True)
            if part_of(module)
        )

    assert not wrong


@pytest.mark.parametrize("part", sorted(BASE_PARTS))
def test_base_install_suffices_to_import(part):
    known = BASE_PACKAGES | {"headrace"} | set(sys.stdlib_module_names)
    wrong = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in sources(part)
        for module in imported(path, at_import=True)
        if module.split(".")[0] not in known
    }

    assert not wrong


def test_no_code_comes_in_as_data():
    wrong = []
    for path in all_sources():
        if any(module.split(".")[0] in FORBIDDEN_MODULES for module in imported(path)):
            wrong.append(f"{path.relative_to(ROOT)} imports a module that runs what it loads")
        for node in ast.walk(ast.parse(path.read_text())):
            # Methods called `eval` (a module's switch to inference) are something else; pyobj ones are not.
            if isinstance(node, ast.Call):
                called = node.func
                name = called.id if isinstance(called, ast.Name) else None
                if isinstance(called, ast.Attribute) and called.attr.endswith("_pyobj"):
                    name = called.attr
                if name in FORBIDDEN_CALLS:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {name}")

    assert not wrong


def test_files_stay_small():
    paths = all_sources() + list((ROOT / "tests").rglob("*.py"))
    long = {str(path.relative_to(ROOT)): lines for path in paths if (lines := path.read_text().count("\n")) > 450}

    assert not long


def test_parts_are_imported_by_their_full_names():
    """A part imported by its bare name would be a second copy of every class in it."""
    wrong = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in all_sources()
        for module in imported(path)
        if module.split(".")[0] in PARTS
    }

    assert not wrong


def test_transformers_finds_no_kernels_of_ours():
    """transformers looks for a package named `kernels`; with an `__init__.py` the checkout's folder would be taken."""
    run_python("from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)", "LlamaForCausalLM")


def test_client_needs_no_torch():
    use = "import sys, headrace, headrace.client; headrace.Client, headrace.AsyncClient, headrace.client.Text"
    run_python(f"{use}; print({{'torch', 'transformers', 'numpy'}} & set(sys.modules))", "set()")


def test_building_a_model_needs_no_compiler():
    """A worker that starts, or starts again, should not wait for what it never uses."""
    build = "spec = find_policy('GPT2LMHeadModel').spec(GPT2Config(n_layer=1)); Model(spec, dtype=torch.bfloat16)"
    imports = (
        "import sys, torch; from transformers import GPT2Config; from headrace.kernels.model import Model; "
        "from headrace.kernels.policies import find_policy"
    )
    run_python(f"{imports}; {build}; print('torch._dynamo' in sys.modules)", "False")


def test_package_imports_nothing_by_itself():
    run_python(
        "import sys, headrace; print([name for name in sys.modules if name.startswith('headrace.')])",
        "['headrace._version']",
    )


def test_page_is_found_as_package_data():
    static = files("headrace.gateway") / "static"

    assert (static / "index.html").is_file()
    assert any(entry.name.endswith(".js") for entry in (static / "vendor").iterdir())


def run_python(code, expected):
    """Run code in the checkout, where its folders come first on the path."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected
