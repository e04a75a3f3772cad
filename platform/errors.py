"""The errors a user can meet, as one tree.

FewstepError
├── UserError            bad input: one clear line, exit code 2
│   ├── ConfigError      a configuration key or value
│   ├── CheckpointError  a model folder that is missing, partial or does not fit
│   ├── TaskFileError    a task file with a broken line
│   ├── RequestError     one generation request; the batch goes on
│   └── ResourceError    a port in use, a full disk, a cluster without the resources
└── ActorDied            a worker is gone; carries its cause
"""

from __future__ import annotations


class FewstepError(Exception):
    """Base of every error Fewstep raises on purpose."""


class UserError(FewstepError):
    """Bad input. The message says what, what was got, what is allowed and how to fix it.

    Args:
        field: the thing that is wrong, as the user spelled it (a key, a path, a request field).
        got: what was found there.
        allowed: what would have been accepted.
        fix: one imperative sentence.
    """

    def __init__(self, field: str, got: object, allowed: str, fix: str) -> None:
        self.field, self.got, self.allowed, self.fix = field, got, allowed, fix
        super().__init__(f"{field}: got {got}; allowed: {allowed}; fix: {fix}")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str, str]]:
        # Exceptions cross Ray's process boundary; the default reduce would pass the joined message only.
        return type(self), (self.field, str(self.got), self.allowed, self.fix)


class ConfigError(UserError):
    """An unknown or invalid configuration key."""


class CheckpointError(UserError):
    """A model folder that cannot be loaded or written."""


class TaskFileError(UserError):
    """A task file with a broken line."""


class RequestError(UserError):
    """A generation request that cannot be served as asked."""


class ResourceError(UserError):
    """A resource (port, disk, CPU) that is not there."""


class ActorDied(FewstepError):
    """A worker process is gone.

    Args:
        who: the actor's name.
        cause: its last words (traceback or exit reason).
    """

    def __init__(self, who: str, cause: str) -> None:
        self.who, self.cause = who, cause
        super().__init__(f"{who} died: {cause}")

    def __reduce__(self) -> tuple[type[ActorDied], tuple[str, str]]:
        # As UserError's: the default would call the class with the joined message alone.
        return type(self), (self.who, self.cause)
