# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Recall of facts, perplexity and speech, over tens of thousands of tokens."""
