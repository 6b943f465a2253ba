"""``python -m lean_fx``."""

import sys

from lean_fx.command_line import main

sys.exit(main())
