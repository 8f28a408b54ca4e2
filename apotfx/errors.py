"""The one exception that a user's mistake raises."""


class ApotfxError(ValueError):
    """A user's mistake: one line that names the thing, what was got, what was expected and the fix."""
