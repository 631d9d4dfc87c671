"""The errors a user can cause. Each says what was expected, what was found, and what to do next."""


class InputError(Exception):
    """A file, option or contract that cannot be used. The command line prints it as one line and exits with 2.

    Args:
        subject: what is wrong, such as a path or an option.
        expected: what would have been accepted.
        got: what was found.
        remedy: what the user can do about it.
    """

    def __init__(self, subject: str, *, expected: str, got: str, remedy: str) -> None:
        self.subject, self.expected, self.got, self.remedy = subject, expected, got, remedy
        super().__init__(f"{subject}: expected {expected}, got {got}; {remedy}")


class FrozenTeacherError(InputError):
    """A gradient was asked of the teacher, which has no parameters and no backward path by construction."""

    def __init__(self, asked: str) -> None:
        super().__init__(
            asked,
            expected="a request that needs no gradient from the teacher",
            got="a gradient request",
            remedy="the teacher is frozen: its weights are packed K-quant blocks with no derivative; train the student",
        )


class DegenerateDistillationError(InputError):
    """Teacher and student are the same function, so the distillation term would be zero throughout the run."""


class TrainingAborted(Exception):  # noqa: N818 - the run ended early; it is the event, not only the error, that matters
    """Training stopped before its last step (for example a loss that is not finite). Its message says where and why."""
