"""Worker groups: the processes that hold a model and turn assignments into tokens. Importing this pulls in nothing."""
