"""Distillation losses: one module class and one function a method."""

from .sinkd import SinKD, sinkd

__all__ = ["SinKD", "sinkd"]
