"""Distillation losses: one module class and one function a method."""

from .ipot import ipot
from .kd2m import KD2M, kd2m
from .schedules import cosine_decay, stage_share
from .sinkd import SinKD, sinkd
from .wcord import WCoRD, wcord_global, wcord_local
from .wkd_logit import WKDLogit, wkd_logit

__all__ = [
    "KD2M",
    "SinKD",
    "WCoRD",
    "WKDLogit",
    "cosine_decay",
    "ipot",
    "kd2m",
    "sinkd",
    "stage_share",
    "wcord_global",
    "wcord_local",
    "wkd_logit",
]
