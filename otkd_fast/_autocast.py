"""Autocast, switched off where a result's accuracy is promised."""

from __future__ import annotations

import contextlib

import torch


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast is off inside; tensors on 'meta' know none. (torch 2.11 cannot compile a question for it.)"""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
