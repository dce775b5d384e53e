"""`python -m synth_agent` is the command `synth-agent`."""

import sys

from synth_agent.cli import main

sys.exit(main())
