"""Distillation losses: one module class and one function a method."""

from .schedules import cosine_decay, stage_share
from .sinkd import SinKD, sinkd
from .wkd_cost import wkd_cost
from .wkd_feature import WKDFeature, wkd_feature
from .wkd_logit import WKDLogit, wkd_logit
from .wkl import WKL, wkl
from .wkl_diagnostics import WKLDiagnostics
from .wkl_feature import WKLFeature, wkl_feature

__all__ = [
    "WKL",
    "SinKD",
    "WKDFeature",
    "WKDLogit",
    "WKLDiagnostics",
    "WKLFeature",
    "cosine_decay",
    "sinkd",
    "stage_share",
    "wkd_cost",
    "wkd_feature",
    "wkd_logit",
    "wkl",
    "wkl_feature",
]
