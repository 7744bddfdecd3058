"""Threads that wait sleep: spinning, two of them are up to eight times slower than one on a busy machine.

Imported first by each package, since OpenMP reads the variable once, when torch is imported.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
