# SPDX-License-Identifier: Apache-2.0
"""Imports point one way, cost nothing and do nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pw_runtime.system.packages import BASE, declared, module_of
from tests.e2e.pw import write_preset

FOLDERS = (".", "kernels", "export", "engines", "bench")
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numpy", "transformers", "safetensors", "av", "PIL"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
sys.argv[0] = "pw"
"""
ALL_MODULES = """
import importlib, logging, os, pkgutil, warnings
import torch, tokenizers, av, PIL.Image, pydantic, rich
others = dict(os.environ), list(logging.getLogger().handlers), list(warnings.filters)
threads = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
for name in ("pw_runtime", "pw_kernels", "pw_export", "pw_engines", "pw_bench"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
assert (dict(os.environ), list(logging.getLogger().handlers), list(warnings.filters)) == others
assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()) == threads
assert not torch.cuda.is_initialized()
print("imported")
"""


def python(root: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(root / folder) for folder in FOLDERS)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )


def test_contracts_hold(root: Path) -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    run = python(root, code)
    assert run.returncode == 0, run.stdout + run.stderr


def test_command_line_is_imported_without_torch(root: Path) -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'safetensors', 'av', 'PIL'}"
    run = python(root, f"import sys, pw_runtime.cli.main; print({heavy} & set(sys.modules))")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "set()"


COUNT = """
import sys
from pw_runtime.cli.main import main
sys.argv = ["pw", *sys.argv[1:]]
try:
    main()
finally:
    tops = {name.partition(".")[0] for name in sys.modules}
    print(*sorted(tops | set(sys.modules)), file=sys.stderr)
"""


def modules_after(root: Path, *arguments: str) -> set[str]:
    """Return the modules that a command has imported when it ends."""
    run = python(root, COUNT, *arguments)
    assert run.returncode == 0, run.stderr
    return set(run.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    ["--help", "--version", "generate --help", "bench e2e --help", "fleet run --help"],
)
def test_help_imports_no_package_but_click(arguments: str, root: Path) -> None:
    packages = {module_of(name) for name in declared()[BASE]} | {"transformers", "triton", "scipy"}
    modules = modules_after(root, *arguments.split())
    assert modules & packages == {"click"}
    assert len(modules) < 400  # 198 with Python 3.11


@pytest.mark.slow
def test_generating_on_a_cpu_imports_no_compiler(
    root: Path, bundle_dir: Path, tmp_path: Path
) -> None:
    """Seen: transformers, and drawing an embedding on the meta device, took half of a start."""
    preset = write_preset(tmp_path / "small.toml")
    modules = modules_after(
        root, "generate", "--model", str(bundle_dir), "--preset", str(preset), "--quiet",
        "--prompt", "a cat", "--device", "cpu", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert {"torch", "tokenizers", "av"} <= modules
    unused = {"transformers", "sympy", "scipy", "triton", "torch._dynamo", "torch._inductor"}
    assert not modules & (unused | {"torch.utils.flop_counter", "pw_export", "matplotlib"})


@pytest.mark.parametrize("argument", ["--help", "doctor"])
def test_command_works_with_torch_broken(argument: str, root: Path) -> None:
    run = python(root, BLOCK + "from pw_runtime.cli.main import main; main()", argument)
    assert "Traceback" not in run.stderr
    if argument == "--help":
        assert run.returncode == 0, run.stderr
        assert "generate" in run.stdout
    else:
        assert "pw generate: not ready: torch is broken" in run.stdout


def test_importing_every_module_changes_nothing(root: Path) -> None:
    run = python(root, ALL_MODULES)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "imported\n"
