"""The version that the programs tell: in `--version`, in the log, in /health, in the document of the routes and on the page.

CHANGELOG.md says what each version brought; its newest heading is this one.
"""

VERSION = "0.5.0"
