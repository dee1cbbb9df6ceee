"""The environment of all tests, set before torch, matplotlib and Gradio read theirs.

Nothing that a user has set for programs reaches a test, a notebook or a process that they start.
"""

import os
import signal

# ERA_OUT_DIR, for example, would let the notebooks overwrite the results of a run.
PREFIXES = ("ERA_", "GRADIO_", "GIT_", "SLURM_", "TORCHELASTIC_")
NAMES = {"DATA_DIR", "MODEL", "SPACE", "YES", "DRY_RUN", "UPLOADS_KEEP_SECONDS", "MPLBACKEND"}
NAMES |= {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
MARK = "CIFAR10_TESTS"  # processes that a test starts keep what it sets for them


def forget_what_a_user_has_set() -> None:
    for name in [name for name in os.environ if name.startswith(PREFIXES) or name in NAMES]:
        del os.environ[name]


def ask_this_machine_directly() -> None:
    """Servers of the tests, whatever proxy is set."""
    kept = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""  # as urllib and httpx do
    if kept != "*":
        kept = f"{kept},127.0.0.1,localhost".lstrip(",")
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = kept


def hear_ctrl_c() -> None:
    """A script starts `make test &` with Ctrl-C ignored, and all processes of the tests with it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if MARK not in os.environ:
    forget_what_a_user_has_set()
    ask_this_machine_directly()
    hear_ctrl_c()
    os.environ[MARK] = "1"

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
# Threads that have nothing to do sleep, here and in all processes that are started. To wait in a
# loop is faster where tensors are large; with the small ones of the tests it is a waste.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests expect a CPU, and pretend a GPU where need be
