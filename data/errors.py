"""The one exception for what a user can put right."""


class InputError(Exception):
    """Bad input, said in one sentence that names the file or value, the limit and the fix.

    Every command prints it without a traceback and exits with status 1 (`configs.command`).
    Anything else that escapes a command is a defect of ours and keeps its traceback.
    """
