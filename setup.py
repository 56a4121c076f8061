"""Metadata lives in setup.cfg; only the mapping of conf/ to the package hvdllm.conf needs code."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup

# setuptools copies into build/ and never deletes there: settings removed from conf/ would be installed again.
shutil.rmtree(Path(__file__).parent / "build" / "lib", ignore_errors=True)

setup(
    packages=[*find_packages(include=["hvdllm", "hvdllm.*"]), "hvdllm.conf"],
    package_dir={"hvdllm.conf": "conf"},
)
