"""What a person starts: the `headrace` command, one file per subcommand, and the shell scripts beside it.

The commands parse options, call the parts and show what they say; nothing that another part needs lives here.
"""
