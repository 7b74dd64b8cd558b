"""`python -m systems.common.load`: see `cli`."""

import sys

from systems.common.load.cli import main

sys.exit(main())
