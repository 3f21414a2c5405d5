"""What the commands return."""

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_MODEL = 3
EXIT_ENGINE = 4
EXIT_DIFFERENT = 5
"""outputs that should be equal are not"""
EXIT_NOT_JUDGED = 6
"""no output differs, but some could not be judged"""
EXIT_INTERRUPTED = 130
EXIT_CLOSED_OUTPUT = 141
"""128 + SIGPIPE: what a shell reports for a program whose reader has closed the pipe"""
