"""Training: settings, recipes, runs that can be interrupted.

`python -m training` trains without the notebook.
"""

import os

# Memory for large tensors comes in pages of 2 MiB instead of 4 KiB, where the system allows it: a
# training step on a CPU otherwise spends part of its time on being given pages. torch reads this
# when it first asks for memory, which it does when Lightning is imported: so dataload sets it, too.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
