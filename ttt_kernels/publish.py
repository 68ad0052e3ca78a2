# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Lay this package out as a kernel repository of the Hub, for the `kernels` library:

    python -m ttt_kernels.publish DIRECTORY
    hf upload OWNER/ttt-kernels DIRECTORY --repo-type kernel --revision v1

    ttt_kernels = kernels.get_kernel("OWNER/ttt-kernels", version=1, trust_remote_code=True)
"""

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path


VERSION = 1  # to raise with every change to `__all__` or to what its functions take
SOURCES = ("__init__", "common", "layout", "linear", "linear_kernels", "mlp", "mlp_kernels")


def build(directory: str | Path, backend: str = "cuda") -> Path:
    """
    Write the repository's build variant for `backend` (`build/torch-<backend>`) under `directory` and return its path.

    Raises:
        FileExistsError: the variant is there already.
    """
    package = Path(__file__).parent
    sources = {f"{name}.py": (package / f"{name}.py").read_bytes() for name in SOURCES}
    # Each version's ops need a namespace of their own: several may be loaded at once.
    identifier = f"_ttt_kernels_{backend}_{hashlib.sha256(b''.join(sources.values())).hexdigest()[:7]}"
    sources["_ops.py"] = (package / "_ops.py").read_bytes().replace(b"ttt_kernels::", f"{identifier}::".encode())
    # The folder of the same name is for versions of `kernels` that look there.
    sources["ttt_kernels/__init__.py"] = (
        b"import importlib.util\nimport sys\nfrom pathlib import Path\n\n\n"
        b"_path = Path(__file__).parents[1] / '__init__.py'\n"
        b"_spec = importlib.util.spec_from_file_location(f'{__name__}_flat', _path)\n"
        b"_module = importlib.util.module_from_spec(_spec)\n"
        b"sys.modules[_spec.name] = _module\n_spec.loader.exec_module(_module)\n"
        b"globals().update({name: getattr(_module, name) for name in _module.__all__})\n"
        b"__all__ = _module.__all__\n"
    )
    digests = {name: base64.b64encode(hashlib.sha256(text).digest()).decode() for name, text in sources.items()}
    metadata = {
        "name": "ttt-kernels",
        "id": identifier,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": dict(sorted(digests.items()))},
    }
    sources["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()

    variant = Path(directory) / "build" / f"torch-{backend}"
    if variant.exists():
        raise FileExistsError(f"{variant} exists already: give another directory or remove it.")
    temporary = variant.with_name(f".{variant.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, text in sources.items():
        path = temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    temporary.rename(variant)
    return variant


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ttt_kernels.publish DIRECTORY")
    print(build(sys.argv[1]))
