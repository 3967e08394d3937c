"""How long `import cdb_jax` takes after `import jax, optax`; fails at 0.3 seconds.

python benchmarks/import_time.py
"""

import sys
import time

import jax  # noqa: F401
import optax  # noqa: F401

start = time.perf_counter()
import cdb_jax  # noqa: E402

seconds = time.perf_counter() - start
print(f"cdb_jax {cdb_jax.__version__} was imported in {seconds:.2f} s, from {cdb_jax.__file__}")
if seconds >= 0.3:
    sys.exit("error: that is 0.3 s or more")
if "flax" in sys.modules:
    sys.exit("error: this has imported flax")
