"""Everything is declared in pyproject.toml; the compiled engines will be built from here."""

from setuptools import setup

setup()
