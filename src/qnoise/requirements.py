"""The versions of other packages this one works with: a row each, and one place that checks them.

pyproject.toml asks for the same minima, and constraints.txt pins versions of the tested series (a test compares them).
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Requirement:
    """Of one package, by the name it is installed under.

    Attributes:
        minimum: the oldest supported version; older ones raise.
        tested: the newest series (two numbers) the tests ran with; newer ones warn.
    """

    minimum: str
    tested: str


REQUIREMENTS: dict[str, Requirement] = {
    "transformers": Requirement("5.20", "5.23"),
    "peft": Requirement("0.20", "0.21"),
    "trl": Requirement("1.16", "1.16"),
    "compressed-tensors": Requirement("0.20", "0.20"),
    "accelerate": Requirement("1.10", "1.15"),
    "pyyaml": Requirement("6.0", "6.0"),
}
_warned: set[str] = set()


def require(package: str, user: str) -> None:
    """Check that a package is there, in a version that `user` works with. Call it before importing the package.

    Args:
        package: a key of `REQUIREMENTS`.
        user: what needs it, for the message: a name of this package.

    Raises:
        ImportError: it is missing or too old.

    Warns:
        UserWarning: it is newer than the tests know; once for each package.
    """
    needed = REQUIREMENTS[package]
    cure = f"pip install '{package}>={needed.minimum}'"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(
            f"{user} needs {package} >= {needed.minimum}, which is not installed: {cure}", name=package
        ) from None
    if _numbers(found) < _numbers(needed.minimum):
        raise ImportError(f"{user} needs {package} >= {needed.minimum}; found {found}: {cure}", name=package)
    if _numbers(found)[:2] > _numbers(needed.tested)[:2] and package not in _warned:
        _warned.add(package)
        warnings.warn(
            f"{user} was tested with {package} {needed.minimum} to {needed.tested}; found {found}. If something fails, "
            f"try {package}=={needed.tested}.*",
            UserWarning,
            stacklevel=3,
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The release numbers of a version; a pre-release counts as the release it leads to."""
    release = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in release.group(1).split(".")) if release else ()
