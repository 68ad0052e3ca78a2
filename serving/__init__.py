# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""A server of spoken conversations: OpenAI's protocols in front, one model that answers all of them behind."""
