# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels for the inner loop of Test-Time Training."""
