"""The sub-commands of `lmd`, one file each with a click command named `command`; loaded only when one is called."""
