"""The sensitivity scan: what formats do to a model, where, why, and what to do about it."""

from qnoise.sensitivity.plan import Plan
from qnoise.sensitivity.report import ScanReport
from qnoise.sensitivity.scanning import scan

__all__ = ["Plan", "ScanReport", "scan"]
