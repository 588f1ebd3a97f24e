"""Triton kernels, one operator family a file; installed as ``otkd_fast.triton_kernels``. None is written yet."""
