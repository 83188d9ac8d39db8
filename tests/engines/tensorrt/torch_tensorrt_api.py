# SPDX-License-Identifier: Apache-2.0
"""Parameters of the function of torch-tensorrt that we call, by version, read from its wheels.

    python tests/engines/tensorrt/torch_tensorrt_api.py FOLDER...     writes the JSON beside this

Each FOLDER holds `torch_tensorrt/` of an unpacked wheel (pip download --no-deps
torch-tensorrt==...). Nothing of it is imported: that needs a CUDA build of PyTorch.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

API = Path(__file__).with_suffix(".json")
FUNCTION = "convert_exported_program_to_serialized_trt_engine"


def parameters(folder: Path) -> list[str]:
    """Names, in order; `**` where any other is taken too."""
    tree = ast.parse((folder / "torch_tensorrt/dynamo/_compiler.py").read_text())
    (function,) = (
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == FUNCTION
    )
    names = [node.arg for node in (*function.args.args, *function.args.kwonlyargs)]
    return names + ["**"] * (function.args.kwarg is not None)


def version_of(folder: Path) -> str:
    """2.13.0 and so on."""
    text = (folder / "torch_tensorrt/_version.py").read_text()
    match = re.search(r"""__version__ = ["']([\d.]+)""", text)
    assert match, f"no version in {folder}"
    return match[1]


def known() -> dict[str, list[str]]:
    """The committed parameters by version."""
    return json.loads(API.read_text())


def main() -> None:
    """Write the parameters of the wheels that are named."""
    by_version = {version_of(Path(name)): parameters(Path(name)) for name in sys.argv[1:]}
    API.write_text(json.dumps(by_version, indent=1) + "\n")


if __name__ == "__main__":
    main()
