"""Errors that a person sees: one plain sentence, a hint, and the exit code."""

FAILED = 1
USAGE = 2
UNREACHABLE = 3


class UserError(Exception):
    """Something the user can mend: `message` is one sentence, `hint` says how."""

    def __init__(self, message: str, hint: str = "", exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
