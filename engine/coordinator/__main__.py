"""`python -m sempre.engine.coordinator`."""

import sys

from sempre.engine.coordinator.process import main

sys.exit(main())
