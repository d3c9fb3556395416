"""What can go wrong, by whose doing.

Every error that a user can cause derives from `UserError`: the command line prints its message as one line
and ends with exit code 2. Anything else is a bug and keeps its traceback. A message names the file, key or
value and says what to do about it.
"""


class UserError(Exception):
    """An input cannot be used as it is. `str(error)` is one line that a user can act on."""

    exit_code = 2


class ConfigError(UserError):
    """A flag, a YAML key or an environment variable is unknown, contradictory or out of range."""


class DataError(UserError):
    """A data set, a row of it or the chat template cannot be used."""


class ModelError(UserError):
    """A model directory is incomplete, of an unsupported architecture, or its weights do not fit its
    configuration.
    """


class MalformedConfigError(ModelError):
    """A model's configuration says what no model has: a value of another type, or a size beyond bounds."""


class CheckpointError(UserError):
    """A Megatron checkpoint is missing, incomplete or does not belong to this run."""


class OutputError(UserError):
    """The output directory is in use or cannot be written."""


class TrainingError(UserError):
    """A run cannot go on: values that are not numbers, or a step that no longer ends."""

    exit_code = 1


class StoppedError(UserError):
    """A run was asked to stop, and did: its state is saved and it can be resumed.

    The exit code is EX_TEMPFAIL of sysexits.h, which a scheduler can requeue on.
    """

    exit_code = 75


def first_line(error: Exception) -> str:
    """What a library's error says, fit for a message of one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
