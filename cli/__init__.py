"""The command line: app.py holds the commands' list, one file a command."""
