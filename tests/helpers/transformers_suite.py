"""transformers' own common model tests: fetched with its source distribution at the locked version, then imported.

A wheel has no tests. The three files are written into .cache/ once and are imported as a package of their own, with
stand-ins for what the source distribution leaves out (the mixins for generation and export, a table of values).
"""

import hashlib
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

VERSION = "5.23.0"
SHA256 = "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71"
FILES = ("test_modeling_common.py", "test_configuration_common.py", "test_training_mixin.py")
PACKAGE = f"transformers_tests_{VERSION.replace('.', '_')}"
CACHE = Path(__file__).resolve().parents[2] / ".cache"

# Values of a configuration's general fields, none of them a default: what the test of constructors asks for.
COMMON_FIELDS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}


def common_tests() -> tuple[ModuleType, ...]:
    """The modules of `FILES`; skips the module that asks where the source distribution cannot be had."""
    pytest.importorskip("parameterized", reason="transformers' common tests need parameterized")
    import transformers

    if transformers.__version__ != VERSION:
        pytest.skip(f"transformers is {transformers.__version__}, its tests are {VERSION}'s", allow_module_level=True)
    if not all((CACHE / PACKAGE / name).is_file() for name in FILES):
        _fetch(CACHE / PACKAGE)
    _stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _stand_in("utils.test_configuration_utils", config_common_kwargs=COMMON_FIELDS)
    if str(CACHE) not in sys.path:
        sys.path.append(str(CACHE))
    return tuple(importlib.import_module(f"{PACKAGE}.{name.removesuffix('.py')}") for name in FILES)


def _stand_in(name: str, **content: Any) -> None:
    """A module that the files import and the source distribution does not have."""
    module = ModuleType(f"{PACKAGE}.{name}")
    vars(module).update(content)
    sys.modules[module.__name__] = module
    parent = module.__name__.rpartition(".")[0]
    sys.modules.setdefault(parent, ModuleType(parent)).__path__ = []


def _fetch(folder: Path) -> None:
    """Download the source distribution, check its hash, and write the three files into a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "0",
            "--timeout", "15", "--no-deps", "--no-build-isolation", "--no-binary", "transformers", "--dest", scratch,
            f"transformers=={VERSION}",
        ]  # fmt: skip
        pip = subprocess.run(command, capture_output=True, text=True, timeout=300)
        archive = Path(scratch) / f"transformers-{VERSION}.tar.gz"
        if pip.returncode:
            pytest.skip("no package index: transformers' source distribution cannot be had", allow_module_level=True)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != SHA256:
            raise ValueError(f"{archive.name} has sha256 {digest}, not {SHA256}")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as packed:
            for name in (*FILES, "__init__.py"):
                member = None if name == "__init__.py" else packed.extractfile(f"transformers-{VERSION}/tests/{name}")
                _write(folder / name, member.read() if member else b"")


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: several test processes may be at it."""
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)
