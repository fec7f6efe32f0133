"""What `lmd demo` is made of: processes, broker, worker. The terminal's part is in commands/."""
