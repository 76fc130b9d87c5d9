"""Deployment: the same detector, faster, or as a file that other runtimes read."""

from .optimize import optimize_for_inference

__all__ = ["optimize_for_inference"]
