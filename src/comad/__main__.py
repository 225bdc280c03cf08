"""``python -m comad`` is the command ``comad``."""

import sys

from comad.cli import main

sys.exit(main())
