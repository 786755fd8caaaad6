"""The errors whose message is for the person who started the run."""


class UserError(ValueError):
    """Bad input. The message is one sentence that names the setting, the value and the remedy."""


class DivergedError(RuntimeError):
    """The loss stopped being a finite number. The message names the step and what is left intact."""
