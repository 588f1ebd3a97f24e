"""Distillation losses: one module class and one function a method."""

from .kd2m import KD2M, kd2m
from .schedules import cosine_decay, stage_share
from .sinkd import SinKD, sinkd
from .wkd_logit import WKDLogit, wkd_logit

__all__ = ["KD2M", "SinKD", "WKDLogit", "cosine_decay", "kd2m", "sinkd", "stage_share", "wkd_logit"]
