"""The commands: flags -> one function call. Each module here is one command's."""
