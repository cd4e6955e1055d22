from __future__ import annotations

import pytest

from qnoise.spelling import check_choice, nearest

KNOWN = ("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "nvfp4")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("mxfp8", "mxfp8_e4m3"), ("MXFP4", "mxfp4"), ("nvfp5", "nvfp4"), ("nvpf4", "nvfp4"), ("int", None), ("", None)],
)
def test_nearest(given, meant) -> None:
    assert nearest(given, KNOWN) == meant


def test_check_choice() -> None:
    check_choice("fmt", "mxfp4", KNOWN)
    with pytest.raises(ValueError, match=r"^fmt is 'mxpf4'; it must be one of 'mxfp4', .*\. Did you mean 'mxfp4'\?$"):
        check_choice("fmt", "mxpf4", KNOWN)
    with pytest.raises(ValueError, match=r"'nvfp4'\.$"):
        check_choice("fmt", 3, KNOWN)
