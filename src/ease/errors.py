"""The one error that ease raises for bad input."""


class EaseError(ValueError):
    """Bad input, told in one sentence that names the fix.

    It is a `ValueError`, so library users need not know it; the command line prints its message alone
    and exits with code 2.
    """


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuses a value that is none of the choices."""
    if value not in choices:
        raise EaseError(f"{name} must be {' or '.join(choices)}, got {value!r}")
