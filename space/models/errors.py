"""Errors that the project raises on purpose.

The message says all; a notebook shows it without a traceback.

They live here because `models` is below every other room, and imports none of them. Each is also
the built-in error of its kind, so `except ValueError` catches what it always did.
"""


class ProjectError(Exception):
    """What was got, what is expected and what to do are in the message."""


class InvalidValue(ProjectError, ValueError):
    """A value, a file or a name that is not what it has to be."""


class StorageError(ProjectError, OSError):
    """A folder that cannot be written to, or has no room left."""


class TrainingFailed(ProjectError, RuntimeError):
    """The training cannot go on as it was asked for."""


class Diverged(ProjectError, FloatingPointError):
    """The loss is no number."""


class Interrupted(KeyboardInterrupt):
    """Somebody stopped the training. No ProjectError: `except Exception` must not swallow it."""


EXPLAINED = (ProjectError, Interrupted)
