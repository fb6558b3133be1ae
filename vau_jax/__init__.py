"""Video anomaly understanding with reinforcement fine-tuning, in JAX."""

import os

# transformers is used for tokenizers alone; it would warn at every start that torch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
