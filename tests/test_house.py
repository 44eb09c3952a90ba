"""The house: floors, one stem per op, no room too large, and a package that works with nothing optional around it."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = {
    "kernels": 0, "odn_fast.kernels": 0, "odn_fast._extension": 0, "odn_fast.reference": 0, "odn_fast.config": 0, "odn_fast.record": 0,
    "odn_fast.machine": 0, "odn_fast.ops": 1, "odn_fast.nn": 2, "odn_fast.models": 3, "odn_fast.data": 3,
    "odn_fast.engine": 4, "odn_fast.search": 5, "odn_fast.export": 5, "odn_fast.report": 5, "odn_fast.predict": 5, "odn_fast.doctor": 5,
    "odn_fast.tune": 5, "odn_fast.evaluate": 5,
    "odn_fast": 6}
# Within floor 5, who may use whom.
WITHIN_5 = {("odn_fast.search", "odn_fast.export"), ("odn_fast.search", "odn_fast.report"), ("odn_fast.predict", "odn_fast.export"),
            ("odn_fast.evaluate", "odn_fast.export")}


def room(module):
    """The name in FLOORS that a dotted module belongs to."""
    parts = module.split(".")
    name = ".".join(parts[:2]) if len(parts) > 1 else parts[0]
    return name if name in FLOORS else parts[0]


def imports(path, package):
    """Dotted names of this project that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names
                    if name.split(".")[0] in ("odn_fast", "kernels") and name not in ("odn_fast._C", "odn_fast.__version__"))


def sources():
    for path in sorted([*ROOT.glob("odn_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")]):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        package = module.rsplit(".", 1)[0]
        yield path, module.removesuffix(".__init__"), package


def test_every_file_imports_only_from_floors_below_its_own():
    seen = 0
    for path, module, package in sources():
        for imported in imports(path, package):
            here, there = room(module), room(imported)
            if here == there:
                continue
            seen += 1
            assert FLOORS[there] < FLOORS[here] or (here, there) in WITHIN_5, f"{module} imports {imported}"
    assert seen > 30


def test_every_file_has_its_floor():
    modules = [module for _, module, _ in sources()]
    for module in modules:
        assert module == "odn_fast" or room(module) != "odn_fast", module
    assert set(FLOORS) - {"odn_fast.kernels"} == set(map(room, modules))  # which is what kernels are imported as


def test_floors_are_found_wanting_where_they_are():
    """The check itself can fail: an import upwards is seen."""
    path = ROOT / "odn_fast" / "engine" / "fit.py"
    assert "odn_fast.data.Source" in list(imports(path, "odn_fast.engine"))
    assert FLOORS[room("odn_fast.data.Source")] < FLOORS[room("odn_fast.engine.fit")] < FLOORS[room("odn_fast.search.expansion_state")]


def test_an_op_has_one_stem_in_every_folder():
    """Kernels of its own it has, too, but for separable_unit, which launches those of separable_conv."""
    for path in (ROOT / "odn_fast" / "ops").glob("[a-z]*.py"):
        stem = path.stem
        kernels = [] if stem == "separable_unit" else [f"csrc/{stem}.h", f"csrc/{stem}_cpu.cpp"]
        for place in (f"odn_fast/reference/{stem}.py", f"csrc/{stem}.cpp", *kernels, f"tests/test_{stem}.py", f"bench/bench_{stem}.py"):
            assert (ROOT / place).is_file(), place


def test_no_file_and_no_line_outgrows_its_idea():
    paths = [path for places in ("odn_fast/**/*.py", "kernels/*.py", "csrc/*.*", "bench/*.py", "tests/*.*") for path in ROOT.glob(places)]
    assert len(paths) > 200
    for path in paths:
        lines = path.read_text().splitlines()
        assert len(lines) <= 450, path
        assert not [line for line in lines if len(line) > 140], path


def test_nothing_optional_is_needed(tmp_path):
    """With the extension, Triton and DALI hidden, everything imports and a search runs."""
    program = """
import sys, warnings
for name in ("odn_fast._C", "triton", "nvidia.dali"):
    sys.modules[name] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import odn_fast, odn_fast.predict, odn_fast.report, odn_fast.doctor, odn_fast.search.__main__
said = [str(warning.message) for warning in caught if "odn_fast" in str(warning.message)]
assert len(said) == 1 and "extension" in said[0], said
assert not odn_fast._extension.available
import torch
y = torch.arange(40) % 2
x = (y[:, None, None, None] * 200 + torch.randint(0, 50, (40, 1, 8, 8))).to(torch.uint8)
result = odn_fast.search.expand("resnet18", train=(x, y), validation=(x, y), out=sys.argv[1], target=60, warm_up_epochs=1,
                                epochs_per_depth=[2], batch_size=20)
assert result.validation_accuracy >= 50 and result.network(torch.zeros(1, 1, 8, 8)).shape == (1, 2)
print("whole")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("whole\n"), done.stdout + done.stderr
