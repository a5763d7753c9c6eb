"""`python -m ctx_jax.cli` is `ctx-jax`."""

import sys

from ctx_jax.cli import main

sys.exit(main())
