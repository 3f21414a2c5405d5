"""`python -m sempre.engine` is `sempre`."""

import sys

from sempre.engine.cli.main import main

sys.exit(main())
