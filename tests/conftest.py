# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
