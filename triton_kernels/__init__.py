"""Triton kernels, one operator family a file; installed as ``otkd_fast.triton_kernels``.

Importable without Triton and without a GPU: a call then says what is missing. A kernel module holds `@jit` kernels, the
host functions that launch them (named in ``ops/<op>.py``), and `aot_cases()`, what to compile ahead of time.
"""
