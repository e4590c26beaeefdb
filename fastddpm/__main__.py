"""`python -m fastddpm` is the command `fastddpm`."""

import sys

from fastddpm.cli import main

sys.exit(main())
