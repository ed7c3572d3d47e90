class UserError(Exception):
    """What a user can put right: one line with what was wrong, in the user's numbers, and what to do (exit code 2)."""
