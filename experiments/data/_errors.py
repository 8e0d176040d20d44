"""The error that every fault of the data raises, so that a command can show it."""


class DataError(ValueError):
    """Text that is missing, damaged or unfit; the message says what to do."""
