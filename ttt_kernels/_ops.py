# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Namespace of the custom ops; `kernels` needs one of its own in each published version, see `publish.py`."""


def add_op_namespace_prefix(name: str) -> str:
    """The op's full name."""
    return f"ttt_kernels::{name}"
