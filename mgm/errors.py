"""The one error that `mgm` raises for input a person can correct."""


class InputError(Exception):
    """Bad input: a file, a field or a setting that a person can fix.

    Args:
        title: What went wrong, in a few words.
        message: The file, the field and the offending value.
        hint: What to do about it.
    """

    def __init__(self, title: str, message: str, hint: str = "") -> None:
        super().__init__(f"{title}: {message}" + (f" ({hint})" if hint else ""))
        self.title = title
        self.message = message
        self.hint = hint

    def as_dict(self) -> dict[str, str]:
        """Return the three texts under their names."""
        return {"title": self.title, "message": self.message, "hint": self.hint}
