"""Errors that the project raises on purpose; a notebook shows their messages without a traceback.

They live here because `models` imports nothing of the project outside itself, while everything else
may import it. Each is also the built-in error of its kind, so that `except ValueError` catches it.
"""


class ProjectError(Exception):
    """An error whose message says what was expected, what was found and what to do."""


class InvalidValue(ProjectError, ValueError):
    """A value, a file or a name that is not valid."""


class StorageError(ProjectError, OSError):
    """A folder that cannot be written to, or a disk that is full."""


class TrainingFailed(ProjectError, RuntimeError):
    """A training that cannot continue with its settings."""


class Diverged(ProjectError, FloatingPointError):
    """A loss that is NaN or infinite."""


class Interrupted(KeyboardInterrupt):
    """A training that the user stopped; no ProjectError: `except Exception` must not catch it."""


EXPLAINED = (ProjectError, Interrupted)  # their messages need no traceback
