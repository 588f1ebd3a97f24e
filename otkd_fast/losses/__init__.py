"""Distillation losses: one module class and one function a method."""

from .schedules import cosine_decay, stage_share
from .sinkd import SinKD, sinkd
from .wkd_cost import wkd_cost
from .wkd_logit import WKDLogit, wkd_logit

__all__ = ["SinKD", "WKDLogit", "cosine_decay", "sinkd", "stage_share", "wkd_cost", "wkd_logit"]
