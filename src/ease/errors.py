"""The one error that ease raises for bad input."""


class EaseError(ValueError):
    """Bad input, told in one sentence that names the fix.

    It is a `ValueError`, so library users need not know it; the command line prints its message alone
    and exits with code 2.
    """
