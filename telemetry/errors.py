"""What can go wrong, as a tree:

UnderstudyError
├── StateError               the state file or the store cannot be used
│   ├── StateLocked          another program holds the file
│   ├── StateReadOnly        the file or its folder cannot be written
│   ├── StateVersion         written by a newer understudy
│   └── StateUnavailable     Redis does not answer, or the disk fails
├── Fenced                   this writer's lease was taken over by another
└── Invalid                  a fact from outside that breaks its schema

Errors of SQLite and of Redis become these at the border (`telemetry.sqlite`, `router.store_redis`).
"""


class UnderstudyError(Exception):
    """Base of every error that Understudy raises on purpose."""


class StateError(UnderstudyError):
    """The state file or the store cannot be used; the message says which and what to do."""


class StateLocked(StateError):
    """Another program holds the state file's lock for longer than we wait."""


class StateReadOnly(StateError):
    """The state file, or the folder it lies in, cannot be written."""


class StateVersion(StateError):
    """The state was written by a newer understudy than this one."""


class StateUnavailable(StateError):
    """The store does not answer."""


class Fenced(UnderstudyError):
    """A newer lease exists: this controller must stop writing."""


class Invalid(UnderstudyError):
    """A fact from outside breaks its schema: `field` names the place."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field
