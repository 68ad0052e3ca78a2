# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""What a model remembers, and for how long: recall of facts and perplexity over tens of thousands of tokens."""
