"""Errors that are the caller's to mend: one sentence that says what, where and what to do."""


class InputError(ValueError):
    """A value, file or folder given by the user does not fit. The command line prints it without a traceback."""


class NonFiniteError(InputError):
    """A loss became NaN or infinite during training; checkpoints from before are kept."""


class Interrupted(Exception):
    """Training was asked to stop and has saved a checkpoint. `signum` is the signal, `step` where it goes on."""

    def __init__(self, step: int, signum: int):
        super().__init__(f"interrupted at step {step}")
        self.step, self.signum = step, signum
