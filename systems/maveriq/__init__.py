"""MaverIQ (SC '25): deploying LLMs by stated intent. README.md is the paper in a page and the map of this package."""

import os

# Matrices here have a hundred rows: BLAS threads gain nothing, and on a busy machine waiting for each other they take ten times
# as long. OpenBLAS reads this when numpy is first imported; who has set it otherwise keeps it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
