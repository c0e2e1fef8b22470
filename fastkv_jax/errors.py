"""The four kinds of error a caller can act on; every message names what was found, what is allowed, what to do.

What is doubtful but usable is a `ModelWarning`.
"""


class FastKVConfigError(ValueError):
    """A setting, or a combination of settings, that cannot work."""


class InputError(ValueError):
    """A prompt, batch or token id that cannot be processed."""


class CheckpointError(ValueError):
    """A model or tokenizer file that is missing, malformed or unsupported; the message names the file."""


class BackendError(RuntimeError):
    """A device or backend that is missing, busy or out of memory."""


class ModelWarning(UserWarning):
    """A model's files contradict themselves or leave something out; the message says what was believed."""


class Terminated(BaseException):
    """SIGTERM arrived."""
