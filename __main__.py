# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""`python -m ttt_omni`, the same as the command `ttt-omni`."""

from .commands.cli import main


if __name__ == "__main__":
    main()
