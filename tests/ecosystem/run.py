# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Run Transformers' own tests on TTT-Omni, outside of this repository.

    python tests/ecosystem/run.py modeling|processing [pytest arguments]

Their source release is downloaded from PyPI, in the version that is installed, or taken from --source.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import transformers


# What the common tests import from folders that the release lacks. They hold tests of export and generation, which
# our own tests cover; empty classes stand in for them.
STAND_INS = {
    "tests/__init__.py": "",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin: ...\nclass ExportGenerateTesterMixin: ...\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def download(package: ModuleType, folder: Path) -> Path:
    """Download and unpack the source release of the installed `package` into `folder`."""
    requirement = f"{package.__name__}=={package.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    subprocess.run([*pip, requirement, "--dest", str(folder)], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("modeling", "processing"))
    parser.add_argument("--source", type=Path, help="an unpacked source release of Transformers")
    arguments, pytest_arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = arguments.source or download(transformers, folder)
        work = folder / "work"
        shutil.copytree(source / "tests", work / "tests")
        for name, text in STAND_INS.items():
            path = work / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        suite = work / "tests" / "models" / "ttt_omni" / f"test_{arguments.suite}_ttt_omni.py"
        suite.parent.mkdir(parents=True)
        for package in (suite.parent, suite.parent.parent):
            (package / "__init__.py").touch()
        shutil.copy(Path(__file__).with_name(f"{arguments.suite}_suite.py"), suite)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfEs", "--rootdir", str(work)]
        return subprocess.run([*command, str(suite), *pytest_arguments], cwd=work, env={**os.environ}).returncode


if __name__ == "__main__":
    sys.exit(main())
