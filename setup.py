"""Finds the packages: each top-level folder installs as `llmc.<folder>`, with every subpackage it holds.

`packages.find` in pyproject.toml cannot add a prefix, and a list there would forget the next subpackage.
"""

from setuptools import find_packages, setup

FOLDERS = ("frontend", "ir", "passes", "codegen", "runtime", "plugins", "cli")

setup(
    packages=["llmc"]
    + [f"llmc.{folder}" for folder in FOLDERS]
    + [f"llmc.{folder}.{sub}" for folder in FOLDERS for sub in find_packages(folder)],
    package_dir={"llmc": "llmc", **{f"llmc.{folder}": folder for folder in FOLDERS}},
)
