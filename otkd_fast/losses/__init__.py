"""Distillation losses: one module class and one function a method."""

from .divergence import SinkhornDivergenceLoss, sinkhorn_divergence_loss
from .ipot import ipot
from .kd2m import KD2M, kd2m
from .multi_level_ot import MultiLevelOT, multi_level_ot
from .schedules import cosine_decay, stage_share
from .sinkd import SinKD, sinkd
from .sinkd_total import sinkd_total
from .uld import UniversalLogitDistillation, universal_logit_distillation
from .wcord import WCoRD, wcord_global, wcord_local
from .wkd_cost import wkd_cost
from .wkd_feature import WKDFeature, wkd_feature
from .wkd_logit import WKDLogit, wkd_logit
from .wkl import WKL, wkl
from .wkl_diagnostics import WKLDiagnostics
from .wkl_feature import WKLFeature, wkl_feature

__all__ = [
    "KD2M",
    "WKL",
    "MultiLevelOT",
    "SinKD",
    "SinkhornDivergenceLoss",
    "UniversalLogitDistillation",
    "WCoRD",
    "WKDFeature",
    "WKDLogit",
    "WKLDiagnostics",
    "WKLFeature",
    "cosine_decay",
    "ipot",
    "kd2m",
    "multi_level_ot",
    "sinkd",
    "sinkd_total",
    "sinkhorn_divergence_loss",
    "stage_share",
    "universal_logit_distillation",
    "wcord_global",
    "wcord_local",
    "wkd_cost",
    "wkd_feature",
    "wkd_logit",
    "wkl",
    "wkl_feature",
]
