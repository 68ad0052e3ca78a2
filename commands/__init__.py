# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The command line."""
