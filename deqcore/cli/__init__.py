"""The command line: `deqcore COMMAND`. One file per command, imported when it is called."""
